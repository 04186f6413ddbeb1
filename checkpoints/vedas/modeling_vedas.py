"""Vedas: visual replay and routing depth scaling on a Qwen2-VL or Qwen2.5-VL backbone.

Paper: Visual Enhanced Depth Scaling for Multimodal Latent Reasoning

Between the prompt and the answer the model takes `config.num_latent_steps` latent steps:

    h_t, a_t = decoder([X ; B_1 ; z_1 ; .. ; B_t ; z_t])[-1], and where that position looks       `saliency.py`
    B_t+1    = softmax(a_t) * the K image tokens it looks at most, each only once                 `visual_replay_vedas.py`
    z_t+1    = h_t

and the answer is predicted from the last z. Some layers run again over the tokens that a router selects (`routing_vedas.py`);
which tokens compete is the routing scope (`decoding_vedas.py`). With no steps and no routed layers the model *is* the
backbone; a test holds it to that. `VedasConfig.preset("reference")` is the authors' published code, exactly.

In `input_ids` a step is one `latent_token_id` between prompt and answer; `generate` takes the steps by itself where the
prompt holds none.

Shapes: B rows, S columns of `input_ids`, D hidden size.
"""

from .transformers_contract import check_contract


check_contract("vedas")  # before the imports below: what they miss is said here


from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel, Qwen2_5_VLPreTrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.utils import can_return_tuple

from .configuration_vedas import VedasConfig
from .transformers_api import CACHE, BothCacheNames, cache_keyword, one_cache
from .backbone_calls import FusedCall, check_answer_starts, find_answers, guard_backbone
from .decoding_vedas import StepContext, StepDecoder
from .generation_common import check_mask, check_one_prompt, kept_columns
from .generation_steps import StepGenerationMixin
from .interventions import Intervention, prepare_intervention
from .prompt_checks import (
    check_image_labels,
    check_labels,
    check_not_within_image,
    check_numbers,
    check_turns,
    end_tokens,
)
from .qwen_inputs import QwenInputsMixin, rename_hub_weights
from .routing_vedas import (
    GATE_BIAS,
    DepthRouter,
    RoutedQwen2_5_VLDecoderLayer,
    RoutedQwen2VLDecoderLayer,
    TokenScore,
)
from .saliency import record_attention
from .sharded_layers import keep_present_layers
from .trace import LatentTrace
from .visual_replay_vedas import Replay


register_checkpoint_conversion_mapping(
    VedasConfig.model_type, get_checkpoint_conversion_mapping("Qwen2_5_VLForConditionalGeneration"), overwrite=True
)

BACKBONES = {
    "qwen2_vl": (Qwen2VLModel, RoutedQwen2VLDecoderLayer),
    "qwen2_5_vl": (Qwen2_5_VLModel, RoutedQwen2_5_VLDecoderLayer),
}


@dataclass
class VedasCausalLMOutputWithPast(BothCacheNames, CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` with what `output_latents=True` asks for.

    Args:
        latent_trace: picked tokens, routed tokens and latents, detached.
        replays: what each step replayed, with gradients; empty without images.
    """

    latent_trace: LatentTrace | None = None
    replays: tuple[Replay, ...] | None = None


class VedasForConditionalGeneration(StepGenerationMixin, QwenInputsMixin, Qwen2_5_VLPreTrainedModel, GenerationMixin):
    """A Qwen-VL backbone that reasons in latent steps before it answers."""

    config: VedasConfig
    config_class = VedasConfig
    _is_one_at_a_time = True
    accepts_loss_kwargs = False
    _only_of_forward = ("labels", "answer_starts")
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _no_split_modules = [
        "Qwen2VLDecoderLayer",
        "Qwen2_5_VLDecoderLayer",
        "RoutedQwen2VLDecoderLayer",
        "RoutedQwen2_5_VLDecoderLayer",
        "Qwen2VLVisionBlock",
        "Qwen2_5_VLVisionBlock",
    ]

    def __init__(self, config: VedasConfig):
        super().__init__(config)
        model_class, layer_class = BACKBONES[config.backbone]
        self.model = model_class(config)
        guard_backbone(self)
        self.register_load_state_dict_pre_hook(rename_hub_weights)
        text_config = config.get_text_config()
        for layer in config.routed_layers:
            self.model.language_model.layers[layer] = layer_class(text_config, layer, config.routing_depth)
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        record_attention(self.model.language_model)
        self.post_init()
        keep_present_layers(self)

    @property
    def latent_placeholder_id(self) -> int:
        return self.config.latent_token_id

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, TokenScore):
            init.normal_(module.weight, std=self.config.get_text_config().initializer_range)
            init.constant_(module.bias, GATE_BIAS)
        elif isinstance(module, DepthRouter):
            init.ones_(module.depth_scale)
        else:
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
        latent_intervention: str | Intervention | None = None,
        output_latents: bool = False,
        latent_context: StepContext | None = None,
        num_latent_steps: int | None = None,
        answer_starts: torch.LongTensor | None = None,
        fused_call: FusedCall | None = None,
        *,
        cache: Cache | None = None,
        **kwargs,
    ) -> VedasCausalLMOutputWithPast | BaseModelOutput:
        """Run the model over a prompt, the latent slots behind it, and an answer.

        The prompt ends before the first slot; without slots, before the answer; without either behind its last token. The
        logits at a slot are those after its latent, so the last slot predicts the first answer token. Without slots the last
        column of the prompt has the logits after the last latent, so that `labels` need no slots either.

        Args:
            labels: as in transformers; slots are never targets.
            latent_intervention: replaces latents z_t before they enter the language model (`interventions.py`).
            output_latents: return a `latent_trace`.
            latent_context: set by `generate` only.
            num_latent_steps: steps that are taken where no row has slots, by default those of the config.
            answer_starts (`torch.LongTensor` of shape `(B,)`): the column of every row's first answer token, by default that
                of its first label.
            fused_call: set by the fused head of TRL only, which takes the hidden states of all columns and no logits.

        Raises:
            ValueError: slots are not one run of equal length in every row, or images do not fit their placeholders.
        """
        cache = one_cache(past_key_values, cache)
        check_one_prompt(input_ids, inputs_embeds, mm_token_type_ids)
        input_ids = self._find_ids(input_ids, inputs_embeds, latent_context)
        vision = {
            "pixel_values": pixel_values,
            "image_grid_thw": image_grid_thw,
            "pixel_values_videos": pixel_values_videos,
            "video_grid_thw": video_grid_thw,
            "second_per_grid_ts": second_per_grid_ts,
        }
        # Outside `generate`: what is asked of the latents, and where every row's answer starts.
        if latent_context is None:
            latent_intervention = prepare_intervention(latent_intervention, one_at_a_time=True)
            if position_ids is not None:
                raise ValueError("`position_ids` cannot be given: latent steps take positions of their own.")
            if cache is not None:
                raise ValueError(f"`{CACHE}` belongs to `generate`: latent steps cannot be taken on a foreign cache.")
            images, placeholders = self._encode_images(input_ids, vision)
            latent_context = StepContext(
                images, placeholders, intervention=latent_intervention, output_latents=output_latents
            )
            latent_context.position_ids = self._rope_positions(input_ids, attention_mask, vision)
            latent_context.num_steps = self._count_steps(num_latent_steps)
            check_labels(labels, input_ids)
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            answer_starts = self._find_answers(
                input_ids, mask, latent_context.num_steps, answer_starts, labels, fused_call
            )
        # Prompt, steps and answer through the language model; or one more token of an answer.
        self._drop_unknown_outputs(kwargs)
        decoder = StepDecoder(self, latent_context, cache, use_cache, kwargs)
        embeds = decoder.embed_prompt(input_ids, inputs_embeds)
        if latent_context.decode_step >= 0:
            hidden = decoder.decode_next_token(input_ids, embeds)
        else:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            check_mask(mask, input_ids)
            lengths, slots = self._split_rows(input_ids, answer_starts)
            positions = latent_context.position_ids  # of prompt rows; beams of a row share them
            positions = positions.repeat_interleave(len(input_ids) // positions.shape[1], dim=1)
            hidden = decoder.run(input_ids, embeds, mask.bool(), positions, lengths, slots)
        if fused_call is not None:
            return BaseModelOutput(last_hidden_state=hidden)
        logits = self.lm_head(hidden[:, kept_columns(logits_to_keep)])
        loss = self._take_loss(logits, labels, input_ids, kwargs)
        output = VedasCausalLMOutputWithPast(loss=loss, logits=logits, **cache_keyword(decoder.returned_cache))
        if latent_context.output_latents:
            output.latent_trace = LatentTrace(len(input_ids), latent_context.sorted_steps())
            output.replays = tuple(decoder.replays)
        return output

    @property
    def _placeholder_tokens(self) -> tuple[int, ...]:
        return self.config.image_token_id, self.config.video_token_id, self.config.latent_token_id

    def never_labels(self, input_ids: Tensor) -> Tensor:
        return input_ids == self.config.latent_token_id

    def _count_steps(self, num_latent_steps: int | None) -> int:
        """The steps of rows without slots.

        Raises:
            ValueError: `num_latent_steps` is no whole number from 0 on.
        """
        if num_latent_steps is None:
            return self.config.num_latent_steps
        if not isinstance(num_latent_steps, int) or num_latent_steps < 0:
            raise ValueError(f"`num_latent_steps` must be a whole number from 0 on, got {num_latent_steps!r}.")
        return num_latent_steps

    def _find_answers(self, input_ids, mask, num_steps: int, answer_starts, labels, fused_call) -> Tensor | None:
        """(B,) where answers start in rows without slots; None where slots say it, or where it does not matter."""
        if self.never_labels(input_ids).any() or not (num_steps or self.config.routed_layers):
            return None
        if answer_starts is not None:
            is_picture = (input_ids == self.config.image_token_id) | (input_ids == self.config.video_token_id)
            check_not_within_image(check_answer_starts(answer_starts, input_ids), is_picture)
            return answer_starts
        learned = labels if fused_call is None else fused_call.labels
        if num_steps and learned is not None:
            check_image_labels(learned, input_ids == self.config.image_token_id, "latent steps")
        if fused_call is not None:
            return find_answers(fused_call.labels, mask, is_fused=True)
        return find_answers(torch.full_like(input_ids, -100) if labels is None else labels, mask)

    def _split_rows(self, input_ids: Tensor, answer_starts: Tensor | None) -> tuple[list[int], int]:
        """Columns of every row's prompt, and the number of slots behind it."""
        is_slot = input_ids == self.config.latent_token_id
        counts = is_slot.sum(dim=1).tolist()
        if any(counts):
            first = is_slot.int().argmax(dim=1).tolist()
            runs = [bool(row[start : start + count].all()) for row, start, count in zip(is_slot, first, counts)]
            if len(set(counts)) > 1 or not all(runs):
                raise ValueError(
                    f"Latent slots must be one run of equal length in every row, got {counts} by row"
                    f"{'' if all(runs) else ', not in one run'}."
                )
            return first, counts[0]
        return [input_ids.shape[1]] * len(input_ids) if answer_starts is None else answer_starts.tolist(), 0

    def _prepare_steps(self, input_ids: Tensor, config, settings, kwargs: dict) -> StepContext:
        names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
        vision = {name: kwargs.pop(name, None) for name in names}
        kwargs.pop("mm_token_type_ids", None)
        attention_mask, num_steps = kwargs["attention_mask"], config.num_latent_steps
        check_numbers(**{name: vision[name] for name in ("pixel_values", "pixel_values_videos")})
        ids = input_ids.to(self._input_device(input_ids))
        is_slot = ids == self.config.latent_token_id
        slots = is_slot.sum(dim=1)
        self._check_length(input_ids, attention_mask, self._count_step_tokens(ids, slots, num_steps))
        if slots.any() and (slots != num_steps).any():
            row = int((slots != num_steps).nonzero()[0])
            raise ValueError(
                f"Row {row} of the prompt has {int(slots[row])} latent slots, but `num_latent_steps` is {num_steps}; give as "
                "many, or none."
            )
        eos = end_tokens(settings.eos_token_id, self.config.get_text_config().eos_token_id)
        check_turns(is_slot, ids, attention_mask, eos, "latent slots")
        images, placeholders = self._encode_images(ids, vision)
        context = StepContext(images, placeholders, prompt_ids=ids, num_steps=num_steps)
        context.position_ids = self._rope_positions(ids, attention_mask, vision)
        return context

    def _reserved_tokens(self, config) -> list[int]:
        return [config.latent_token_id]

    def _count_steps_taken(
        self, context: StepContext, num_rows: int, beam_indices: Tensor | None
    ) -> tuple[Tensor, int]:
        return torch.full((num_rows,), context.num_steps), 1

    def _count_step_tokens(self, ids: Tensor, slots: Tensor, steps: int) -> list[int]:
        """By row the positions that the steps add to the prompt: latents without a slot of their own, and what is replayed."""
        config = self.config
        replayed = torch.zeros_like(slots)
        if config.replay_at_inference:
            replayed = (ids == config.image_token_id).sum(dim=1).clamp(max=config.num_replay_tokens * steps)
            if config.replay_pattern == "soft_mix":
                replayed = (replayed > 0) * steps
        return (steps + replayed - slots).tolist()


__all__ = ["VedasForConditionalGeneration"]
