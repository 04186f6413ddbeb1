"""A Qwen2.5-VL that opens latent blocks in the middle of its text: `forward` and `generate`, over two hooks.

A subclass says what opens a block (`block_tokens`) and what the latents of a block are (`block_latents`); `block_latents.py` has
both. From outside a block is one decoding step: the opening token goes in, the logits after the closing token come out, so the
decoding loops of transformers work unchanged. Without blocks the model *is* the backbone. `forward` builds blocks that stand in
`input_ids` (a training sample, an earlier answer) by the same code that `generate` runs.

Shapes: B rows, S new tokens, N latents of a block, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .transformers_api import CACHE, BothCacheNames, cache_keyword, one_cache
from .backbone_calls import FROM_FORWARD, FusedCall
from .block_latents import BlockLatents, BlockTokens
from .block_sites import BlockSite, find_block_sites
from .decoding_blocks import BlockContext, BlockDecoder, DecodedBlocks
from .generation_blocks import BlockGenerationMixin
from .generation_common import NO_VIRTUAL_TOKENS, check_one_prompt
from .interventions import Intervention, check_reached, prepare_intervention
from .latent_state import LatentState, find_state
from .lockstep import Lockstep, keep_weights_in_graph
from .lockstep_blocks import LockstepDecoder, run_in_lockstep
from .qwen_inputs import QwenInputsMixin
from .trace import LatentTrace


@dataclass
class BlockCausalLMOutputWithPast(BothCacheNames, CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` with what belongs to the blocks of this forward, in the order of `latent_grid_hw`.

    Args:
        latent_trace (`LatentTrace`, *optional*): with `output_latents=True`.
        latent_states (`torch.FloatTensor`, *optional*): with `latent_state_layers`, the hidden states at all latents,
            `(num_layers, num_latents, D)`; those of a block in raster order.
    """

    latent_trace: LatentTrace | None = None
    latent_states: torch.FloatTensor | None = None


class LatentBlocksMixin(BlockGenerationMixin, QwenInputsMixin):
    """For a class around a Qwen2.5-VL backbone `self.model` with an `lm_head`. Lies before the backbone's class."""

    _only_of_forward = ("labels", "latent_state_layers")
    output_class = BlockCausalLMOutputWithPast

    # The two hooks.

    @property
    def block_tokens(self) -> BlockTokens:
        """What opens a block."""
        config = self.config
        return BlockTokens(config.latent_start_token_id, config.latent_pad_token_id, config.latent_end_token_id)

    @property
    def block_latents(self) -> BlockLatents:
        """What the latents of a block are."""
        raise NotImplementedError

    # What a subclass may add.

    def _new_context(self, **fields) -> BlockContext:
        """What `forward` wants of its blocks when `generate` has not said it."""
        return BlockContext(**fields)

    def _score_blocks(self, decoded: DecodedBlocks, has_loss: bool) -> tuple[Tensor | None, dict]:
        """A loss of the blocks themselves, with its weight, for the next-token loss; and further fields of `output_class`."""
        return None, {}

    @property
    def _block_modules(self) -> list[nn.Module]:
        """The modules that only blocks use."""
        return []

    @can_return_tuple
    @run_in_lockstep
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        latent_grid_hw: torch.LongTensor | None = None,
        latent_intervention: str | Intervention | None = None,
        output_latents: bool = False,
        latent_state_layers: Sequence[int] = (),
        latent_context: BlockContext | None = None,
        fused_call: FusedCall | None = None,
        lockstep: Lockstep | None = None,
        *,
        cache: Cache | None = None,
        **kwargs,
    ) -> BlockCausalLMOutputWithPast | BaseModelOutput:
        """Run the model over text, images and the latent blocks that stand in `input_ids`.

        Without any block this is the backbone's own forward. With blocks, each segment between them is one forward of
        the language model over its own tokens, on the keys and values of the earlier ones, with gradients.

        Args:
            latent_grid_hw (`torch.LongTensor` of shape `(num_blocks, 2)`): height and width of each block, by row. A block
                stands in `input_ids` whole, with placeholders (as the processor writes it), or as `<latent>` alone (as
                `generate` returns it); the logits at a lone `<latent>` are those after its `</latent>`.
            latent_intervention: replaces latents before they enter the language model (`interventions.py`).
            output_latents: return a `latent_trace`.
            latent_state_layers: numbers into `hidden_states`, of which those at latents alone are returned and kept in
                memory, as `latent_states`.
            latent_context: set by `generate` only.
            fused_call: set by the fused head of TRL only, which takes the hidden states of all columns and no logits.
            lockstep: set by `run_in_lockstep` only.
            labels: as in transformers; placeholders and `</latent>` are never targets (DeepLatent, eq. 5).

        Raises:
            ValueError: blocks, grids, placeholders or images do not fit together; the message names the row.
        """
        cache = cache if past_key_values is None else one_cache(past_key_values, cache)
        vision = {
            "pixel_values": pixel_values,
            "image_grid_thw": image_grid_thw,
            "pixel_values_videos": pixel_values_videos,
            "video_grid_thw": video_grid_thw,
            "second_per_grid_ts": second_per_grid_ts,
        }
        # Where blocks open: in generation, where `<latent>` was written last; in training, where it stands.
        is_generating = latent_context is not None
        if is_generating and latent_context.prompt_ids is not None and inputs_embeds is not None:
            input_ids = self._find_ids(None, inputs_embeds, latent_context)
        if not is_generating:
            check_one_prompt(input_ids, inputs_embeds, mm_token_type_ids)
            latent_intervention = prepare_intervention(latent_intervention, self.block_latents.is_one_at_a_time)
        sites = self._find_sites(input_ids, latent_grid_hw, latent_context)
        if not is_generating:
            state = find_state(cache)
            self._check_positions(cache, state, input_ids, attention_mask, position_ids, image_grid_thw)
            if state is None and not any(sites) and not (lockstep and lockstep.block_steps):
                check_reached(latent_intervention, 0)
                inputs = {
                    "input_ids": input_ids,
                    "inputs_embeds": inputs_embeds,
                    "mm_token_type_ids": mm_token_type_ids,
                }
                inputs |= {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
                return self._run_stock(
                    inputs, vision, cache, labels, logits_to_keep, output_latents, fused_call, kwargs
                )
            self._check_inputs(input_ids, attention_mask, position_ids, state, kwargs)
            latent_context = self._encode_for_blocks(input_ids, vision, state)
            latent_context.intervention, latent_context.output_latents = latent_intervention, output_latents
            latent_context.state_layers = tuple(latent_state_layers or ())
            position_ids = self._rope_positions(input_ids, attention_mask, vision)
        # Text, blocks, text: each segment is one forward of the language model.
        arguments = (self, latent_context, cache, use_cache, kwargs)
        decoder = BlockDecoder(*arguments) if lockstep is None else LockstepDecoder(lockstep, *arguments)
        decoded = decoder.run(input_ids, inputs_embeds, attention_mask, position_ids, sites)
        if not is_generating:
            latent_context.check_reached(len(input_ids))
        if fused_call is not None:
            fused_call.latent_loss, _ = self._score_blocks(decoded, True)
            return BaseModelOutput(last_hidden_state=self._keep_latents_in_graph(decoded.last_hidden_state))
        if labels is not None:
            labels = labels.masked_fill(self.never_labels(input_ids), -100)
        loss, logits = self._next_token_loss(decoded.last_hidden_state, labels, logits_to_keep, kwargs)
        block_loss, fields = (None, {}) if is_generating else self._score_blocks(decoded, loss is not None)
        return self.output_class(
            loss=loss if block_loss is None else loss + block_loss.to(loss),
            logits=logits,
            hidden_states=decoded.hidden_states,
            latent_trace=decoded.trace,
            latent_states=decoded.latent_states,
            **fields,
            **{CACHE: decoded.cache},
        )

    def _run_stock(
        self, inputs: dict, vision: dict, cache, labels, logits_to_keep, output_latents: bool, fused_call, kwargs: dict
    ) -> BlockCausalLMOutputWithPast | BaseModelOutput:
        """The backbone's own forward, where there is no block."""
        if vision["pixel_values"] is not None:  # while decoding, `generate` gives the grids alone
            self._check_vision(vision)
        if inputs["mm_token_type_ids"] is None and inputs["input_ids"] is not None:
            inputs["mm_token_type_ids"] = self._token_types(inputs["input_ids"])
        output = self.model(**inputs, **cache_keyword(cache), **vision, **kwargs, **{FROM_FORWARD: True})
        hidden = output.last_hidden_state
        if fused_call is not None:
            return BaseModelOutput(last_hidden_state=self._keep_latents_in_graph(hidden))
        loss, logits = self._next_token_loss(hidden, labels, logits_to_keep, kwargs)
        return self.output_class(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            latent_trace=LatentTrace(len(hidden)) if output_latents else None,  # which says that there were none
            **cache_keyword(output.get(CACHE)),
        )

    def _check_positions(self, cache, state, input_ids, attention_mask, position_ids, image_grid_thw) -> None:
        """Raise where a foreign cache says nothing of the tokens before, which the positions of images depend on."""
        if cache is None or state is not None or image_grid_thw is None or position_ids is not None:
            return
        seen, new = int(cache.get_seq_length()), 0 if input_ids is None else input_ids.shape[1]
        if seen and attention_mask is not None and attention_mask.shape[1] != new:
            raise ValueError(
                f"`{CACHE}` holds {seen} positions of which `input_ids` say nothing, so the positions of the images "
                f"cannot be computed: give `position_ids`. {NO_VIRTUAL_TOKENS}"
            )

    def _check_inputs(self, input_ids, attention_mask, position_ids, state, kwargs: dict) -> None:
        """Raise for what a forward with blocks cannot honour."""
        if position_ids is not None:
            raise ValueError("`position_ids` cannot be given with latent blocks: they take positions of their own.")
        if kwargs.get("output_attentions"):
            raise ValueError("`output_attentions` has no one shape with latent blocks: use `output_latents=True`.")
        seen, new = (0 if state is None else state.num_tokens), input_ids.shape[1]
        if attention_mask is not None and attention_mask.shape[1] not in (new, seen + new):
            raise ValueError(
                f"`attention_mask` must cover the {new} new columns of `input_ids`, or all {seen + new}, got {attention_mask.shape[1]}."
            )

    def _encode_for_blocks(self, input_ids: Tensor, vision: dict, state: LatentState | None) -> BlockContext:
        """Run the vision tower; the images of earlier turns come with the state of the cache."""
        earlier, seen = (None, 0) if state is None else (state.images, state.num_tokens)
        images, placeholders = self._encode_images(input_ids, vision, earlier, seen)
        return self._new_context(images=images, placeholders=placeholders)

    def find_blocks(self, input_ids: Tensor, latent_grid_hw=None, open_ended: bool = False) -> list[list[BlockSite]]:
        """The blocks that stand in `input_ids`, by row (`find_block_sites`)."""
        return find_block_sites(input_ids, self.block_tokens, self.block_latents, latent_grid_hw, open_ended)

    def _find_sites(self, input_ids, latent_grid_hw, latent_context: BlockContext | None) -> list[list[BlockSite]]:
        """The blocks of every row; those without a grid are predicted, which only `generate` does."""
        if input_ids is None:
            if latent_grid_hw is not None:
                raise ValueError("`latent_grid_hw` needs `input_ids`: blocks cannot be found in `inputs_embeds`.")
            return []
        if latent_context is not None:
            sites, latent_context.prompt_sites = latent_context.prompt_sites, None  # the prompt's, once
            if sites is None and latent_context.max_blocks == 0:
                sites = [[] for _ in input_ids]
            if sites is None:
                sites = latent_context.written_sites(input_ids, self.block_tokens.start)
            if sites is not None:
                return sites
        sites = self.find_blocks(input_ids, latent_grid_hw)
        sites_without_grid = [site for row in sites for site in row if site.grid is None]
        if sites_without_grid and latent_context is None:
            raise ValueError(
                f"Row {sites_without_grid[0].row} of `input_ids` opens a block at column {sites_without_grid[0].column}, but "
                "`latent_grid_hw` is not given. Pass the grids that `generate` returned with the sequences. TRL's GRPOTrainer and "
                "RLOOTrainer drop them: use `python -m train.train_deeplatent_rl`."
            )
        return sites

    def never_labels(self, input_ids: Tensor) -> Tensor:
        """Text and `<latent>` are targets; controls, latents and `</latent>` are not."""
        return (input_ids == self.block_tokens.pad) | (input_ids == self.block_tokens.end)

    @property
    def latent_placeholder_id(self) -> int:
        return self.block_tokens.pad

    @property
    def _placeholder_tokens(self) -> tuple[int, ...]:
        return self.config.image_token_id, self.config.video_token_id

    def _next_token_loss(self, hidden: Tensor, labels: Tensor | None, logits_to_keep, kwargs: dict):
        """(loss or None, logits) of the hidden states of all columns."""
        kept = slice(-(logits_to_keep or 0), None) if isinstance(logits_to_keep, int | None) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        if labels is None:
            return None, logits
        vocab_size = self.config.get_text_config().vocab_size
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return self._keep_latents_in_graph(loss), logits

    def _keep_latents_in_graph(self, loss: Tensor) -> Tensor:
        """In training on several processes: with a gradient of zero for the weights that this one's rows do not use."""
        if not (self.training and torch.distributed.is_available() and torch.distributed.is_initialized()):
            return loss
        return keep_weights_in_graph(loss, self._block_modules)
