"""LaRe: latent refocusing on a CLIP tower, a projector and a language model.

Paper: Multimodal Reasoning via Latent Refocusing

Between the prompt and the answer the model takes `config.num_refocus_steps` steps. Each looks at the image again where
the state of its reasoning points, and appends latents to the sequence:

    H_i, a_i = decoder([X ; <bot> ; Z_1 ; .. ; Z_i-1])[-1] at every layer, and where it looks      `saliency.py`
    V_i      = the image tokens of the window with the most of a_i                                 `sliding_window_lare.py`
    Z_i      = Extractor(H_i, V_i)                                                                 `refocus_extractor_lare.py`
    answer   ~ decoder([X ; <bot> ; Z_1 ; .. ; Z_N ; <eot>])

`decoding_lare.py` runs it. Everything else is LLaVA's. With `num_refocus_steps=0` the model *is*
`LlavaForConditionalGeneration`; a test holds it to that.

`<bot>` enters before the first step, where the paper adds it after the last, so that the cache of the steps is that of the
answer. In `input_ids` nothing stands for latents; `<bot><eot>` side by side may say where they go.

A row without an image refocuses on nothing: the Extractor's cross-attention adds exactly zero to it.

Shapes: B rows, S columns of `input_ids`, N steps, K latents of a step, W windows of a step, D hidden size.
"""

from .transformers_contract import check_contract


check_contract("lare")  # before the imports below: what they miss is said here


from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast
from transformers.models.llava.modeling_llava import LlavaModel, LlavaPreTrainedModel
from transformers.utils import can_return_tuple

from .configuration_lare import LaReConfig
from .transformers_api import CACHE, BothCacheNames, cache_keyword, one_cache
from .backbone_calls import FusedCall, check_answer_starts, find_answers, guard_backbone
from .decoding_lare import PromptEnds, RefocusContext, RefocusDecoder
from .generation_common import check_mask, check_one_prompt, kept_columns
from .generation_steps import StepGenerationMixin
from .interventions import Intervention, prepare_intervention
from .prompt_checks import (
    check_image_labels,
    check_labels,
    check_numbers,
    check_turns,
    end_tokens,
)
from .refocus_extractor_lare import RefocusEmbedding, RefocusExtractor, RefocusNorm
from .row_images import collect_row_images
from .saliency import record_attention
from .sharded_layers import keep_present_layers
from .trace import LatentTrace


@dataclass
class LaReCausalLMOutputWithPast(BothCacheNames, CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` with the latents, where `output_latents=True`. N is the most steps that a row took;
    in training with `adaptive_stop`, that a row may take.

    Args:
        latents (`torch.FloatTensor` of shape `(B, N, K, D)`): as they entered the language model, with gradients.
        latent_mask (`torch.BoolTensor` of shape `(B, N)`): the steps that a row took; the latents of others are zero.
        windows (`torch.LongTensor` of shape `(B, N, W, 3)`): (image of the row, top, left), -1 in a row without images; None
            where no window is used or no row has an image. Its side is `config.window_size`.
        image_hidden_states (`torch.FloatTensor` of shape `(images, tokens, D)`): projected image features, with gradients.
        latent_trace (`LatentTrace`): the same and more, by row and step, without gradients.
    """

    latents: torch.FloatTensor | None = None
    latent_mask: torch.BoolTensor | None = None
    windows: torch.LongTensor | None = None
    image_hidden_states: torch.FloatTensor | None = None
    latent_trace: LatentTrace | None = None


class LaReForCausalLM(StepGenerationMixin, LlavaPreTrainedModel, GenerationMixin):
    """LLaVA with an Extractor: a language model that looks at the image again before it answers."""

    config: LaReConfig
    config_class = LaReConfig
    step_name = "Refocusing steps"
    accepts_loss_kwargs = False
    _supports_flex_attn = False  # steps need a row of attention, which its mask, a program, does not give
    _only_of_forward = ("labels", "answer_starts")
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _no_split_modules = [
        "LlamaDecoderLayer",
        "Qwen2DecoderLayer",
        "Qwen3DecoderLayer",
        "CLIPEncoderLayer",
        "SiglipEncoderLayer",
        "RefocusExtractor",
    ]

    def __init__(self, config: LaReConfig):
        super().__init__(config)
        text_config = config.get_text_config()
        check_contract(f"lare with {text_config.model_type}")
        self.model = LlavaModel(config)
        guard_backbone(self)
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.refocus = RefocusExtractor(config) if config.use_extractor else None
        record_attention(self.model.language_model)
        if getattr(config, "quantization_config", None) is not None:
            self._keep_in_fp32_modules = ["refocus"]  # quantizers skip it; without one it has the dtype of all others
        self.post_init()
        keep_present_layers(self)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RefocusNorm):
            init.ones_(module.weight)
        elif isinstance(module, RefocusEmbedding):
            init.normal_(module.weight, std=self.config.get_text_config().initializer_range)
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
        logits_to_keep: int | torch.Tensor = 0,
        latent_intervention: str | Intervention | None = None,
        output_latents: bool = False,
        latent_context: RefocusContext | None = None,
        answer_starts: torch.LongTensor | None = None,
        fused_call: FusedCall | None = None,
        *,
        cache: Cache | None = None,
        **kwargs,
    ) -> LaReCausalLMOutputWithPast | BaseModelOutput:
        """Run the model over a prompt, its refocusing steps, and an answer.

        The steps are taken where a row has `<bot><eot>`, otherwise before its answer, otherwise behind its last token. Without
        labels, `answer_starts` says where the answer is: only then the logits are those that `generate` sampled from.
        The logits that follow them are those of the last column before (or of the row's own `<eot>`).

        Args:
            labels: as in transformers; `<bot>` and `<eot>` are never targets.
            pixel_values: (images, 3, height, width) of all rows, in the order of their placeholders.
            latent_intervention: replaces latents before they enter the language model (`interventions.py`).
            output_latents: also return the latents, with gradients, and a `latent_trace`.
            latent_context: set by `generate` only.
            answer_starts (`torch.LongTensor` of shape `(B,)`): the column of every row's first answer token, by default that
                of its first label.
            fused_call: set by the fused head of TRL only, which takes the hidden states of all columns and no logits.

        Raises:
            ValueError: images do not fit their placeholders, or `<bot>` and `<eot>` do not stand side by side, once a row.
        """
        cache = one_cache(past_key_values, cache)
        check_one_prompt(input_ids, inputs_embeds)
        input_ids = self._find_ids(input_ids, inputs_embeds, latent_context)
        is_generating = latent_context is not None
        # Outside `generate`: what is asked of the latents.
        if not is_generating:
            latent_intervention = prepare_intervention(latent_intervention, one_at_a_time=False)
            check_labels(labels, input_ids)
            for name, value in (("position_ids", position_ids), (CACHE, cache)):
                if value is not None:
                    raise ValueError(
                        f"`{name}` cannot be given: refocusing steps take positions and cache of their own."
                    )
            images, placeholders = self._encode_images(input_ids, pixel_values)
            latent_context = RefocusContext(
                images, placeholders, intervention=latent_intervention, output_latents=output_latents
            )
        config = self.config if latent_context.config is None else latent_context.config
        # Prompt, steps and answer through the language model; or one more token of an answer.
        features = [row.features for row in latent_context.images if row is not None]
        self._drop_unknown_outputs(kwargs)
        decoder = RefocusDecoder(self, latent_context, cache, use_cache, kwargs)
        if latent_context.decode_step >= 0:  # one more token of an answer
            hidden = decoder.decode_next_token(input_ids, decoder.embed_prompt(input_ids))
        else:  # prompt, steps and what there is of an answer
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            check_mask(mask, input_ids)
            learned = labels if fused_call is None else fused_call.labels
            if learned is not None:
                answer_starts = self._find_learned_answers(
                    input_ids, learned, mask, answer_starts, fused_call is not None
                )
            places = self._place_steps(input_ids, answer_starts, mask.bool(), is_generating, config.step_limit)
            prompt = (input_ids, inputs_embeds)
            embeds = decoder.embed_prompt(*(self._with_bot(*prompt) if config.step_limit else prompt))
            hidden = decoder.run(input_ids, embeds, mask.bool() & ~self._delimiters(input_ids), places)
        if fused_call is not None:
            return BaseModelOutput(last_hidden_state=hidden)
        logits = self.lm_head(hidden[:, kept_columns(logits_to_keep)])
        loss = self._take_loss(logits, labels, input_ids, kwargs)
        output = LaReCausalLMOutputWithPast(loss=loss, logits=logits, **cache_keyword(decoder.returned_cache))
        if not is_generating and output_latents:
            self._add_latents(output, latent_context, features)
        return output

    def _add_latents(self, output: LaReCausalLMOutputWithPast, context: RefocusContext, features: list) -> None:
        rows = len(output.logits)
        output.latent_trace = LatentTrace(rows, context.sorted_steps())
        if features:
            output.image_hidden_states = torch.cat(features).unflatten(0, (-1, self.config.image_seq_length))
        if context.latents:
            output.latents = torch.stack(context.latents, dim=1)
            output.latent_mask = torch.stack(context.is_taken, dim=1)
        if context.windows:
            output.windows = torch.stack(context.windows, dim=1)

    def _with_bot(self, input_ids: Tensor, inputs_embeds: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A `<bot>` behind every row: ids (B, S + 1), and embeddings (B, S + 1, D) where they are given."""
        bot = torch.full_like(input_ids[:, :1], self.config.bot_token_id)
        input_ids = torch.cat([input_ids, bot], dim=1)
        if inputs_embeds is not None:
            bot = bot.to(inputs_embeds.device)
            inputs_embeds = torch.cat([inputs_embeds, self.get_input_embeddings()(bot).to(inputs_embeds)], dim=1)
        return input_ids, inputs_embeds

    _takes_virtual_tokens = True

    @property
    def _placeholder_tokens(self) -> tuple[int, ...]:
        return self.config.image_token_id, self.config.bot_token_id, self.config.eot_token_id

    def _delimiters(self, input_ids: Tensor) -> Tensor:
        """(B, S) bool: the columns of `<bot>` and `<eot>`."""
        return (input_ids == self.config.bot_token_id) | (input_ids == self.config.eot_token_id)

    never_labels = _delimiters

    def _find_learned_answers(
        self, input_ids: Tensor, labels: Tensor, mask: Tensor, answer_starts: Tensor | None, is_fused: bool
    ) -> Tensor | None:
        """(B,) where the labels say that answers start, if the caller did not; None where it does not matter."""
        has_own = self._delimiters(input_ids).any(dim=1)
        if is_fused or answer_starts is None:
            answer_starts = None
            if self.config.step_limit and not has_own.all():
                answer_starts = find_answers(labels.masked_fill(has_own[:, None], -100), mask, is_fused)
        if self.config.step_limit:
            is_image = (input_ids == self.config.image_token_id) & ~has_own[:, None]
            check_image_labels(labels, is_image, "refocusing steps")
        return answer_starts

    def _place_steps(
        self, input_ids: Tensor, answer_starts: Tensor | None, mask: Tensor, is_generating: bool, step_limit: int
    ) -> PromptEnds | None:
        """Find where every row's steps go; None where there are none to take.

        Raises:
            ValueError: `<bot>` and `<eot>` do not stand side by side, once a row, or the steps would part an image.
        """
        length, config = input_ids.shape[1], self.config
        columns = torch.arange(length, device=input_ids.device)
        is_bot, is_eot = input_ids == config.bot_token_id, input_ids == config.eot_token_id
        has_pair = is_bot.any(dim=1) | is_eot.any(dim=1)
        at = is_bot.int().argmax(dim=1)
        fits = (is_bot.sum(dim=1) == 1) & (is_eot.sum(dim=1) == 1) & (is_eot.int().argmax(dim=1) == at + 1)
        wrong = (has_pair & ~fits).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(f"A row may hold <bot> and <eot> once, side by side; rows {wrong} of `input_ids` do not.")
        # `generate` goes on from the last column, wherever the padding is.
        ends = torch.full_like(at, length) if is_generating else ((columns + 1) * mask).amax(dim=1)
        if answer_starts is not None:
            ends = check_answer_starts(answer_starts, input_ids).to(ends)
        ends = torch.where(has_pair, at, ends)
        before = ((input_ids == config.image_token_id) & mask & (columns < ends[:, None])).sum(dim=1)
        parted = (before % config.image_seq_length).nonzero().flatten().tolist()
        if parted and step_limit:
            raise ValueError(
                f"The refocusing steps must not part an image, but in rows {parted} the prompt or its `attention_mask` ends "
                "within one: image tokens cannot be labels."
            )
        return PromptEnds(ends, ends + 2 * has_pair)

    def _encode_images(self, input_ids: Tensor, pixel_values: Tensor | None):
        """Run the vision tower once and deal its features out to the rows.

        Raises:
            ValueError: the pictures are not of the tower's size, or not as many as the placeholders ask for.
        """
        config, features, grids = self.config, {}, {}
        if pixel_values is not None:
            size = config.vision_config.image_size
            size = (size, size) if isinstance(size, int) else tuple(size)
            if pixel_values.ndim != 4 or tuple(pixel_values.shape[-2:]) != size:
                raise ValueError(
                    f"`pixel_values` must have the shape (images, channels, {size[0]}, {size[1]}) that the vision tower "
                    f"takes, got {tuple(pixel_values.shape)}."
                )
            dtype = self.model.multi_modal_projector.linear_1.weight.dtype
            pixel_values = pixel_values.to(self._input_device(pixel_values), dtype)
            encoded = self.model.get_image_features(pixel_values, return_dict=True).pooler_output
            features[config.image_token_id] = encoded
            grids[config.image_token_id] = [(1, config.image_grid_size, config.image_grid_size)] * len(encoded)
        tokens = {config.image_token_id: "image"}
        return collect_row_images(input_ids, tokens, features, grids, [None] * len(input_ids), 0)

    def _prepare_steps(self, input_ids: Tensor, config, settings, kwargs: dict) -> RefocusContext:
        mask = kwargs["attention_mask"]
        self._check_length(input_ids, mask, config.step_limit * config.num_step_latents)
        ids, pixel_values = input_ids.to(self._input_device(input_ids)), kwargs.pop("pixel_values", None)
        check_numbers(pixel_values=pixel_values)
        if config.step_limit:
            eos = end_tokens(settings.eos_token_id, config.get_text_config().eos_token_id)
            check_turns(self._delimiters(ids), ids, mask, eos, "`<bot>` and `<eot>`")
        images, placeholders = self._encode_images(ids, pixel_values)
        return RefocusContext(images, placeholders, prompt_ids=ids)

    def _reserved_tokens(self, config) -> list[int]:
        return [config.bot_token_id, config.eot_token_id, config.image_token_id] if config.step_limit else []

    def _count_steps_taken(
        self, context: RefocusContext, num_rows: int, beam_indices: Tensor | None
    ) -> tuple[Tensor, int]:
        steps = torch.zeros(num_rows, dtype=torch.long)
        if context.is_taken:
            taken = torch.stack(context.is_taken).sum(dim=0).cpu()  # by computed row: a beam has those of its prompt
            source = (
                torch.arange(num_rows) * len(taken) // num_rows if beam_indices is None else beam_indices[:, 0].cpu()
            )
            steps = taken[source]
        return steps, self.config.num_step_latents


__all__ = ["LaReForCausalLM"]
