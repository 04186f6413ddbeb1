"""Hooks into transformers' decoding loops that every architecture with latents shares.

What the decoding needs beyond tokens lives on the cache (`LatentState`) and follows it through beam search; what one
call wants lives in a context object that is handed through as `latent_context`. Nothing stays on the model.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from .transformers_api import CACHE_NAMES, cache_keyword, one_cache
from .answered_model import KnownAnswersMixin
from .backbone_calls import BackboneCallsMixin
from .pickling import PicklingMixin
from .prompt_checks import check_ids, check_numbers, check_prompt_mask


logger = logging.get_logger(__name__)


def kept_columns(logits_to_keep: int | Tensor | None) -> slice | Tensor:
    """The columns of which logits are wanted: the last `logits_to_keep`, 0 and None for all, or those of a tensor."""
    if logits_to_keep is None or isinstance(logits_to_keep, int):
        return slice(-(logits_to_keep or 0), None)
    return logits_to_keep


NO_VIRTUAL_TOKENS = (
    "Adapters that put virtual tokens before the prompt (prompt and prefix tuning) are not supported here."
)


def check_one_prompt(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, token_types: Tensor | None = None
) -> None:
    """Raise unless a forward has its tokens in one form, and as many of them as `mm_token_type_ids` has columns."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give `input_ids` or `inputs_embeds`, and not both.")
    if inputs_embeds is not None and token_types is not None and token_types.shape[1] != inputs_embeds.shape[1]:
        raise ValueError(
            f"`inputs_embeds` has {inputs_embeds.shape[1]} columns, but `mm_token_type_ids` has {token_types.shape[1]}. "
            f"{NO_VIRTUAL_TOKENS}"
        )


def check_mask(attention_mask: Tensor, input_ids: Tensor) -> None:
    """Raise unless the mask of a prompt has its rows and columns."""
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` {tuple(attention_mask.shape)} must have the rows and columns of the prompt "
            f"{tuple(input_ids.shape)}. {NO_VIRTUAL_TOKENS}"
        )


class LatentGenerationMixin(BackboneCallsMixin, KnownAnswersMixin, PicklingMixin):
    """For a class that brings `forward(..., latent_context=...)` and lies before `GenerationMixin`."""

    _skip_keys_device_placement = list(CACHE_NAMES)  # with a `device_map`, each layer's part stays where the layer is

    def _input_device(self, inputs: Tensor) -> torch.device:
        """Where inputs belong: offloaded weights lie on `meta` and are fetched to where the caller put the inputs."""
        return inputs.device if self.device.type == "meta" else self.device

    # Arguments of `forward` that transformers would hand through `generate`, where they would move or drop latents.
    _only_of_forward: tuple[str, ...] = ("labels",)

    def _check_prompt(self, input_ids, kwargs: dict) -> Tensor | None:
        """The ids of a prompt as 64-bit integers, (B, S); None where only embeddings are given, which must be finite.

        Raises:
            ValueError: tokens or embeddings that cannot be a prompt, or arguments that `generate` could not honour.
        """
        wrong = [name for name in self._only_of_forward if kwargs.get(name) is not None]
        if wrong:
            raise ValueError(f"`generate` cannot be given {wrong}: they are arguments of `forward`.")
        check_numbers(inputs_embeds=kwargs.get("inputs_embeds"))
        if input_ids is None or (kwargs.get("inputs_embeds") is not None and not input_ids.numel()):
            return input_ids
        return check_ids(input_ids, self.get_input_embeddings().num_embeddings)

    def _check_length(
        self, input_ids: Tensor, attention_mask: Tensor | None, num_latents: int | Sequence[int] = 0
    ) -> None:
        """Raise unless every row has something to read, and fits into the context together with its latents.

        Args:
            num_latents: positions in the cache that come on top of the prompt's tokens, for all rows or by row.
        """
        longest, rows = self.config.get_text_config().max_position_embeddings, len(input_ids)
        if attention_mask is not None:
            check_prompt_mask(attention_mask, input_ids.shape)
        latents = [num_latents] * rows if isinstance(num_latents, int) else list(num_latents)
        if input_ids.shape[1] + max(latents) <= longest:
            return
        lengths = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).sum(dim=1).tolist()
        row = max(range(rows), key=lambda row: lengths[row] + latents[row])
        if lengths[row] + latents[row] > longest:
            more = f" and {latents[row]} latents" if latents[row] else ""
            raise ValueError(
                f"Row {row} of the prompt has {int(lengths[row])} tokens{more}, but the context holds {longest}."
            )

    def _drop_unknown_outputs(self, kwargs: dict) -> None:
        """Take `output_hidden_states` and `output_attentions` out of `kwargs`, and say once that they are not returned."""
        asked = [name for name in ("output_hidden_states", "output_attentions") if kwargs.pop(name, None)]
        if asked:
            logger.warning_once(
                f"{asked} are ignored: with latent steps they have no one shape. Use `output_latents=True`."
            )

    _takes_virtual_tokens = False  # whether prompt tuning can work: not where positions are those of image grids

    @property
    def _placeholder_tokens(self) -> tuple[int, ...]:
        """The tokens that mean something beyond their embedding, and have to be found where embeddings are given."""
        raise NotImplementedError

    def _find_ids(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, context=None) -> Tensor:
        """(B, S) token ids; of embeddings, only the placeholders are known by their embedding, and -1 is every other token.

        Raises:
            ValueError: neither is given, or they do not have the same rows and columns.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("Give `input_ids`, or `inputs_embeds` of shape (rows, columns, hidden size).")
            return input_ids
        ids = input_ids if input_ids is not None and input_ids.numel() else getattr(context, "prompt_ids", None)
        if ids is not None:
            rows, length = inputs_embeds.shape[:2]
            if self._takes_virtual_tokens and context is not None:
                ids = F.pad(ids, (max(0, length - ids.shape[1]), 0), value=-1)  # prompt tuning puts them in front
            if ids.shape[1] != length or rows % len(ids):
                raise ValueError(
                    f"`inputs_embeds` {(rows, length)} must have the rows and columns of `input_ids` {tuple(ids.shape)}. "
                    f"{NO_VIRTUAL_TOKENS}"
                )
            return ids.repeat_interleave(rows // len(ids), dim=0)
        ids = torch.full(inputs_embeds.shape[:2], -1, device=inputs_embeds.device)
        for token in self._placeholder_tokens:
            one = self.get_input_embeddings()(torch.tensor([token], device=self._input_device(ids))).to(inputs_embeds)
            ids = ids.masked_fill((inputs_embeds == one).all(dim=-1), token)
        return ids

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
