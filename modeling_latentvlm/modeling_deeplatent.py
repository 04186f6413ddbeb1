"""DeepLatent: parallel latent visual reasoning on a Qwen2.5-VL backbone.

Paper: DeepLatent: Think with Images via Parallel Latent Visual Reasoning

The model writes text. When it emits `<latent>`, decoding pauses and one block of image-grounded latents is built in
parallel; the whole block enters the language model in one forward pass and text goes on:

    h_s, h_q, h_v = decoder(.. <latent> e_s e_q e_v)[-3:]
    z_1 .. z_N    = latent_blocks(h_s, h_q, h_v, image features)        `latent_former_deeplatent.py`, eq. 2-4
    logits        = decoder(z_1 .. z_N </latent>)[-1]

From outside that is one decoding step: `<latent>` goes in, the logits after `</latent>` come out, so the decoding loops of
transformers (greedy, sampling, beams) work unchanged. Without blocks the model *is* the backbone; a test holds it to that. `forward` builds
blocks that stand in `input_ids` (a training sample, an earlier answer) by the same code that `generate` runs.

Rotary positions: `<latent>` and the controls take one each; with p the next, z at (i, j) takes (p, p + i, p + j), as an
image of h x w merged patches would, and `</latent>` takes p + max(h, w).

Shapes: B rows, S new tokens, N latents of a block, D hidden size, G largest grid side.
"""

from configuration_latentvlm.transformers_contract import check_contract


check_contract("deeplatent")  # before the imports below: what they miss is said here


from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from transformers.utils import can_return_tuple

from configuration_latentvlm.configuration_deeplatent import DeepLatentConfig
from configuration_latentvlm.transformers_api import CACHE, BothCacheNames, cache_keyword, one_cache
from modeling_latentvlm.backbone_calls import FROM_FORWARD, FusedCall, guard_backbone
from modeling_latentvlm.block_sites import find_block_sites
from modeling_latentvlm.decoding_blocks import BlockContext, BlockDecoder
from modeling_latentvlm.generation_blocks import BlockGenerationMixin
from modeling_latentvlm.generation_common import NO_VIRTUAL_TOKENS, check_one_prompt, kept_columns
from modeling_latentvlm.interventions import Intervention, check_reached, prepare_intervention
from modeling_latentvlm.latent_former_deeplatent import LatentBlockBuilder, initialize_latent_module
from modeling_latentvlm.latent_state import find_state
from modeling_latentvlm.lockstep import Lockstep, agree_on_work, is_scattered, is_sharded, keep_in_graph
from modeling_latentvlm.qwen_inputs import QwenInputsMixin, rename_hub_weights
from modeling_latentvlm.trace import LatentTrace


# Out-of-tree classes do not inherit the key renames of their parent: without these every decoder weight of a stock
# checkpoint would stay random, with no more than a log line.
register_checkpoint_conversion_mapping(
    DeepLatentConfig.model_type,
    get_checkpoint_conversion_mapping("Qwen2_5_VLForConditionalGeneration"),
    overwrite=True,
)


NEW_WEIGHTS = ("latent_control.", "latent_blocks.")


@dataclass
class DeepLatentCausalLMOutputWithPast(BothCacheNames, CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` with what belongs to the blocks of this forward, in the order of `latent_grid_hw`.

    Args:
        scale_loss (`torch.FloatTensor` scalar, *optional*): L_scale (eq. 7), already in `loss` with its weight.
        scale_logits (`tuple[torch.FloatTensor]`, *optional*): height and width logits, each `(num_blocks, G)`.
        latent_trace (`LatentTrace`, *optional*): with `output_latents=True`.
        latent_states (`torch.FloatTensor`, *optional*): with `latent_state_layers`, the hidden states at all latents,
            `(num_layers, num_latents, D)`; those of a block in raster order.
    """

    scale_loss: torch.FloatTensor | None = None
    scale_logits: tuple[torch.FloatTensor] | None = None
    latent_trace: LatentTrace | None = None
    latent_states: torch.FloatTensor | None = None


class DeepLatentForConditionalGeneration(
    BlockGenerationMixin, QwenInputsMixin, Qwen2_5_VLForConditionalGeneration, GenerationMixin
):
    """Qwen2.5-VL that can open blocks of parallel, image-grounded latents in the middle of its text."""

    config: DeepLatentConfig
    config_class = DeepLatentConfig
    new_weights = NEW_WEIGHTS
    _only_of_forward = ("labels", "latent_state_layers")
    # Small, and the seat of all latents: quantizers skip them, and float16 (which overflows where bfloat16 does not) too.
    _keep_in_fp32_modules = ["latent_control", "latent_blocks"]
    _no_split_modules = ["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock", "LatentBlockBuilder"]

    def __init__(self, config: DeepLatentConfig):
        super().__init__(config)
        self.latent_control = nn.Embedding(3, config.get_text_config().hidden_size)  # e_s, e_q, e_v
        self.latent_blocks = LatentBlockBuilder(config)
        guard_backbone(self)
        self.register_load_state_dict_pre_hook(rename_hub_weights)
        self.post_init()

    @property
    def latent_placeholder_id(self) -> int:
        return self.config.latent_pad_token_id

    def _init_weights(self, module: nn.Module) -> None:
        if not initialize_latent_module(module, self.config.latent_query_rms):
            super()._init_weights(module)

    @can_return_tuple
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
        *,
        cache: Cache | None = None,
        **kwargs,
    ) -> DeepLatentCausalLMOutputWithPast | BaseModelOutput:
        """Run the model over text, images and the latent blocks that stand in `input_ids`.

        Without any block this is the backbone's own forward. With blocks, each segment between them is one forward of
        the language model over its own tokens, on the keys and values of the earlier ones, with gradients.

        Args:
            latent_grid_hw (`torch.LongTensor` of shape `(num_blocks, 2)`): height and width of each block, by row. A block
                stands in `input_ids` whole, with placeholders (as the processor writes it), or as `<latent>` alone (as
                `generate` returns it); the logits at a sites_without_grid `<latent>` are those after its `</latent>`.
            latent_intervention: replaces latents before they enter the language model (`interventions.py`).
            output_latents: return a `latent_trace`.
            latent_state_layers: numbers into `hidden_states`, of which those at latents alone are returned and kept in
                memory, as `latent_states`.
            latent_context: set by `generate` only.
            fused_call: set by the fused head of TRL only, which takes the hidden states of all columns and no logits.
            labels: as in transformers; placeholders and `</latent>` are never targets (eq. 5).

        Raises:
            ValueError: blocks, grids, placeholders or images do not fit together; the message names the row.
        """
        cache = one_cache(past_key_values, cache)
        check_one_prompt(input_ids, inputs_embeds, mm_token_type_ids)
        if latent_context is not None and latent_context.prompt_ids is not None and inputs_embeds is not None:
            input_ids = self._find_ids(None, inputs_embeds, latent_context)
        vision = {
            "pixel_values": pixel_values,
            "image_grid_thw": image_grid_thw,
            "pixel_values_videos": pixel_values_videos,
            "video_grid_thw": video_grid_thw,
            "second_per_grid_ts": second_per_grid_ts,
        }
        is_generating = latent_context is not None
        if not is_generating:
            is_one_at_a_time = self.config.latent_mode == "autoregressive"
            latent_intervention = prepare_intervention(latent_intervention, is_one_at_a_time)
        state = find_state(cache) if latent_context is None else None
        sites = self._find_sites(input_ids, latent_grid_hw, latent_context)
        lockstep, idle = None, []
        if latent_context is None and is_sharded(self):
            lockstep = self._agree_on_work(sites, vision)
            idle = self._run_dummy_vision(lockstep, vision)
        if cache is not None and latent_context is None and state is None and image_grid_thw is not None:
            seen, new = int(cache.get_seq_length()), 0 if input_ids is None else input_ids.shape[1]
            if seen and position_ids is None and attention_mask is not None and attention_mask.shape[1] != new:
                raise ValueError(
                    f"`{CACHE}` holds {seen} positions of which `input_ids` say nothing, so the positions of the images "
                    f"cannot be computed: give `position_ids`. {NO_VIRTUAL_TOKENS}"
                )
        has_blocks = any(sites) or bool(lockstep and lockstep.block_steps)
        if latent_context is None and state is None and not has_blocks:
            check_reached(latent_intervention, 0)
            if pixel_values is not None:  # while decoding, `generate` gives the grids alone
                self._check_vision(vision)
            if mm_token_type_ids is None and input_ids is not None:
                mm_token_type_ids = self._token_types(input_ids)
            output = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                mm_token_type_ids=mm_token_type_ids,
                **cache_keyword(cache),
                **vision,
                **kwargs,
                **{FROM_FORWARD: True},
            )
            hidden = keep_in_graph(output.last_hidden_state, idle)
            if fused_call is not None:
                return BaseModelOutput(last_hidden_state=self._keep_latents_in_graph(hidden))
            loss, logits = self._next_token_loss(hidden, labels, logits_to_keep, kwargs)
            return DeepLatentCausalLMOutputWithPast(
                loss=loss,
                logits=logits,
                hidden_states=output.hidden_states,
                attentions=output.attentions,
                latent_trace=LatentTrace(len(hidden)) if output_latents else None,  # which says that there were none
                **cache_keyword(output.get(CACHE)),
            )
        if latent_context is None:
            self._check_inputs(input_ids, attention_mask, position_ids, state, kwargs)
            latent_context = self._new_context(input_ids, vision, state, latent_intervention, output_latents)
            latent_context.state_layers = tuple(latent_state_layers or ())
            latent_context.lockstep, latent_context.idle = lockstep, idle
            position_ids = self._rope_positions(input_ids, attention_mask, vision)
        decoder = BlockDecoder(self, latent_context, cache, use_cache, kwargs)
        decoded = decoder.run(input_ids, inputs_embeds, attention_mask, position_ids, sites)
        if not is_generating:
            latent_context.check_reached(len(input_ids))
        if fused_call is not None:
            scale_loss = decoded.scale_loss()
            fused_call.latent_loss = None if scale_loss is None else self.config.scale_loss_weight * scale_loss
            return BaseModelOutput(last_hidden_state=self._keep_latents_in_graph(decoded.last_hidden_state))
        return self._predict(decoded, input_ids, labels, logits_to_keep, kwargs)

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

    def _new_context(self, input_ids, vision: dict, state, intervention, output_latents: bool) -> BlockContext:
        """What `forward` wants of its blocks when `generate` has not said it."""
        earlier, seen = (None, 0) if state is None else (state.images, state.num_tokens)
        images, placeholders = self._encode_images(input_ids, vision, earlier, seen)
        return BlockContext(images, placeholders, intervention, noise=self.training, output_latents=output_latents)

    def _find_sites(self, input_ids, latent_grid_hw, latent_context):
        """The blocks of every row; those without a grid are predicted, which only `generate` does."""
        if input_ids is None:
            if latent_grid_hw is not None:
                raise ValueError("`latent_grid_hw` needs `input_ids`: blocks cannot be found in `inputs_embeds`.")
            return []
        if latent_context is not None:
            prompt_sites = latent_context.take_prompt_sites()
            if prompt_sites is not None:
                return prompt_sites
            if latent_context.max_blocks == 0:
                return [[] for _ in input_ids]
            sites = latent_context.written_sites(input_ids, self.config.latent_start_token_id)
            if sites is not None:
                return sites
        sites = find_block_sites(input_ids, self.config, latent_grid_hw)
        sites_without_grid = [site for row in sites for site in row if site.grid is None]
        if sites_without_grid and latent_context is None:
            raise ValueError(
                f"Row {sites_without_grid[0].row} of `input_ids` opens a block at column {sites_without_grid[0].column}, but `latent_grid_hw` is not given. "
                "Pass the grids that `generate` returned with the sequences. TRL's GRPOTrainer and RLOOTrainer drop them: use "
                "`python -m train.train_deeplatent_rl`."
            )
        return sites

    def _predict(self, decoded, input_ids, labels, logits_to_keep, kwargs) -> DeepLatentCausalLMOutputWithPast:
        if labels is not None:
            labels = labels.masked_fill(self.never_labels(input_ids), -100)
        loss, logits = self._next_token_loss(decoded.last_hidden_state, labels, logits_to_keep, kwargs)
        scale_loss = None if loss is None else decoded.scale_loss()
        if scale_loss is not None:
            loss = loss + self.config.scale_loss_weight * scale_loss.to(loss)
        return DeepLatentCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=decoded.hidden_states,
            scale_loss=scale_loss,
            scale_logits=decoded.scale_logits,
            latent_trace=decoded.trace,
            latent_states=decoded.latent_states,
            **cache_keyword(decoded.cache),
        )

    @property
    def _placeholder_tokens(self) -> tuple[int, ...]:
        return self.config.image_token_id, self.config.video_token_id

    def never_labels(self, input_ids: Tensor) -> Tensor:
        """L_ntp has text and `<latent>` for targets, never e_*, z or `</latent>` (eq. 5)."""
        return (input_ids == self.config.latent_pad_token_id) | (input_ids == self.config.latent_end_token_id)

    def _next_token_loss(self, hidden: Tensor, labels: Tensor | None, logits_to_keep, kwargs: dict):
        """(loss or None, logits) of the hidden states of all columns."""
        logits = self.lm_head(hidden[:, kept_columns(logits_to_keep)])
        if labels is None:
            return None, logits
        vocab_size = self.config.get_text_config().vocab_size
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return self._keep_latents_in_graph(loss), logits

    def _agree_on_work(self, sites, vision: dict) -> Lockstep:
        """What every process of a sharded model has to run in this forward."""
        numbers = range(max((len(row) for row in sites), default=0))
        steps = [0 for _ in numbers]
        if self.config.latent_mode == "autoregressive":
            steps = [max(row[number].grid[1] for row in sites if number < len(row)) - 1 for number in numbers]
        num_passes = sum(vision[name] is not None for name in ("pixel_values", "pixel_values_videos"))
        return agree_on_work(steps, num_passes, self.lm_head.weight.device)

    def _run_dummy_vision(self, lockstep: Lockstep, vision: dict) -> list[Tensor]:
        """Run the vision tower on an empty picture as often as another process runs it more than this one."""
        num_passes = sum(vision[name] is not None for name in ("pixel_values", "pixel_values_videos"))
        tower = self.config.vision_config
        side, device = tower.spatial_merge_size, self.lm_head.weight.device
        size = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
        seen = []
        for _ in range(lockstep.num_vision_passes - num_passes):
            pixels = torch.zeros(side * side, size, device=device, dtype=self.dtype)
            grid = torch.tensor([[1, side, side]], device=device)
            seen += self.model.get_image_features(pixels, grid, return_dict=True).pooler_output
        return seen

    def _keep_latents_in_graph(self, loss: Tensor) -> Tensor:
        """Give every latent weight a gradient of zero: a replica whose batch uses fewer of them must not stall the others."""
        if not (self.training and torch.distributed.is_available() and torch.distributed.is_initialized()):
            return loss
        plain = [weight for module in (self.latent_control, self.latent_blocks) for weight in module.parameters()]
        plain = [weight for weight in plain if weight.requires_grad and not is_scattered(weight)]
        return loss + sum((0 * weight.sum() for weight in plain), torch.zeros_like(loss))


__all__ = ["DeepLatentForConditionalGeneration"]
