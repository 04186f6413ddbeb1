"""Hooks into transformers' decoding loops that every architecture with latents shares.

What the decoding needs beyond tokens lives on the cache (`LatentState`) and follows it through beam search; what one
call wants lives in a context object that is handed through as `latent_context`. Nothing stays on the model.
"""

import torch
from torch import Tensor
from transformers.utils import logging

from configuration_latentvlm.transformers_api import CACHE_NAMES, cache_keyword, one_cache
from modeling_latentvlm.answered_model import KnownAnswersMixin


logger = logging.get_logger(__name__)


class LatentDecodingMixin(KnownAnswersMixin):
    """For a class that brings `forward(..., latent_context=...)` and lies before `GenerationMixin`."""

    _skip_keys_device_placement = list(CACHE_NAMES)  # with a `device_map`, each layer's part stays where the layer is

    def _input_device(self, inputs: Tensor) -> torch.device:
        """Where inputs belong: offloaded weights lie on `meta` and are fetched to where the caller put the inputs."""
        return inputs.device if self.device.type == "meta" else self.device

    def _check_length(self, input_ids: Tensor, attention_mask: Tensor | None, num_latents: int = 0) -> None:
        """Raise unless every row fits into the context together with the latents that follow it."""
        longest = self.config.get_text_config().max_position_embeddings
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` must have the shape of `input_ids` {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}."
            )
        if input_ids.shape[1] + num_latents <= longest:
            return
        lengths = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).sum(dim=1)
        if lengths.max() + num_latents > longest:
            row, latents = int(lengths.argmax()), f" and {num_latents} latents" if num_latents else ""
            raise ValueError(
                f"Row {row} of the prompt has {int(lengths[row])} tokens{latents}, but the context holds {longest}."
            )

    def _embed_prompt(self, input_ids: Tensor, context) -> Tensor:
        """Token embeddings with image features in their placeholders; takes the features out of `context`."""
        embeds = self.get_input_embeddings()(input_ids)
        for token, by_row in context.placeholders.items():
            features = [context.of_row(by_row, row, len(input_ids)) for row in range(len(input_ids))]
            features = [values for values in features if values is not None]
            if features:
                mask = (input_ids == token)[..., None].to(embeds.device)
                embeds = embeds.masked_scatter(mask, torch.cat(features).to(embeds.device, embeds.dtype))
        context.placeholders = {}
        return embeds

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        position_ids=None,
        is_first_iteration=False,
        latent_context=None,
        *,
        cache=None,
        **kwargs,
    ):
        """What is new since the cache; masks and positions of later steps belong to the cache's `latent_state`."""
        cache = one_cache(past_key_values, cache)
        state = getattr(cache, "latent_state", None)
        seen = 0 if state is None else state.num_tokens
        model_inputs = {"latent_context": latent_context, **cache_keyword(cache), **kwargs}
        if is_first_iteration:
            model_inputs |= {"attention_mask": attention_mask, "position_ids": position_ids}
            if inputs_embeds is not None:
                return model_inputs | {"inputs_embeds": inputs_embeds}
            return model_inputs | {"input_ids": input_ids[:, seen:].to(self._input_device(input_ids))}
        self._warn_past_context(input_ids.shape[1], cache)
        return model_inputs | {"input_ids": input_ids[:, -1:].to(self._input_device(input_ids))}

    def _warn_past_context(self, num_tokens: int, cache) -> None:
        """Say once that an answer has left the context: positions stay right there, but no training has seen them.

        transformers says so for models whose config holds the length at its top; ours is the language model's.
        """
        longest, layers = self.config.get_text_config().max_position_embeddings, getattr(cache, "layers", [])
        if layers and not hasattr(
            layers[0], "max_cache_len"
        ):  # a static cache counts on the device: not read per token
            num_tokens = max(num_tokens, cache.get_seq_length() + 1)  # latents too
        if num_tokens > longest:
            logger.warning_once(
                f"An answer has left the context of {longest} positions (`max_position_embeddings`): expect it to get worse. Give "
                "fewer `max_new_tokens`."
            )

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        # `generate` gives the prompt's positions; later ones belong to the cache's `latent_state`.
        return None

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        model_kwargs |= {"attention_mask": None, "position_ids": None}
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _reorder_cache(self, cache, beam_idx: Tensor):
        cache.reorder_cache(beam_idx)
        cache.latent_state.reorder(beam_idx)
        return cache

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        # What a forward does depends on the data, so it is no one graph. Compile the part that is:
        # `model.model.language_model.compile()`.
        if generation_config.compile_config is not None:
            logger.warning_once("`compile_config` is ignored: compile `model.model.language_model` instead.")
        return False

    def generate_batch(self, *args, **kwargs):
        raise ValueError("Continuous batching cannot decode latents: use `generate` on a batch instead.")
