"""`generate` for models that open latent blocks: transformers' own decoding loops, with the blocks inside `forward`.

A mixin of small hook overrides. What the decoding needs beyond tokens lives on the cache (`LatentState`) and follows it
through beam search; what one call wants lives in a `LatentContext`. Nothing stays on the model between calls.
"""

import torch
from torch import Tensor
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils import logging

from modeling_latentvlm.block_decoding import LatentContext
from modeling_latentvlm.block_sites import check_grid, find_block_sites
from modeling_latentvlm.interventions import Intervention, check_intervention
from modeling_latentvlm.row_images import drop_cached_items
from modeling_latentvlm.trace import LatentGenerateBeamOutput, LatentGenerateOutput, LatentTrace, follow_rows


logger = logging.get_logger(__name__)

SUPPORTED_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)


class LatentBlockLimits(LogitsProcessor):
    """Opens the first blocks, forbids more than the most, and keeps a block's inner tokens from being written.

    Reads the count off the generated tokens, so it is right for every beam and needs no state.
    """

    def __init__(self, prompt_length: int, config, can_open: Tensor, min_blocks: int, max_blocks: int):
        self.prompt_length, self.start = prompt_length, config.latent_start_token_id
        self.inner = [config.latent_pad_token_id, config.latent_end_token_id]
        self.can_open, self.min_blocks, self.max_blocks = can_open, min_blocks, max_blocks

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        opened = (input_ids[:, self.prompt_length :] == self.start).sum(dim=1)
        can_open = self.can_open.to(opened.device).repeat_interleave(len(opened) // len(self.can_open))
        scores = scores.clone()
        scores[:, self.inner] = -float("inf")
        scores[:, self.start] = scores[:, self.start].masked_fill(
            ~can_open | (opened >= self.max_blocks), -float("inf")
        )
        if self.min_blocks:
            forced = can_open & (opened < self.min_blocks)
            only_start = torch.full_like(scores, -float("inf"))
            only_start[:, self.start] = 0
            scores = torch.where(forced[:, None], only_start, scores)
        return scores


class LatentGenerationMixin:
    """`generate` over `LatentContext`; the class beside it brings `forward`, `_encode_images` and `_rope_positions`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config=None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        min_latent_blocks: int | None = None,
        max_latent_blocks: int | None = None,
        latent_grid: tuple[int, int] | None = None,
        latent_grid_hw: Tensor | None = None,
        latent_intervention: str | Intervention | None = None,
        latent_noise: bool = False,
        output_latents: bool = False,
        **kwargs,
    ) -> LatentGenerateOutput | LatentGenerateBeamOutput | torch.LongTensor:
        """Generate text with latent blocks. Takes everything that `GenerationMixin.generate` takes, and:

        `sequences` hold `<latent>` once per block. To feed them back, pass the returned `latent_grid_hw` with them, or
        the returned `past_key_values`.

        Args:
            min_latent_blocks: blocks opened at the first answer positions, in rows with an image; default 0.
            max_latent_blocks: most blocks of one answer; 0 forbids them; default `config.max_latent_blocks`.
            latent_grid: (height, width) of every block instead of the predicted one.
            latent_grid_hw: (blocks, 2), grids of the blocks that stand in the prompt.
            latent_intervention: replaces latents before they enter the language model (`interventions.py`).
            latent_noise: draw the stochastic term of the modulation (rollouts of reinforcement learning).
            output_latents: return a `latent_trace`; needs `return_dict_in_generate=True`.

        Raises:
            ValueError: a decoding mode that cannot work with latents, or inputs that do not fit together.
        """
        settings, _ = self._prepare_generation_config(generation_config, **kwargs)
        check_settings(settings, kwargs, output_latents, self.device)
        low, high = self._block_limits(settings, min_latent_blocks, max_latent_blocks)
        context = self._new_generation_context(latent_grid, latent_intervention, latent_noise, output_latents, high)
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        prompt_length = 0
        if input_ids is not None:
            prompt_length = input_ids.shape[1]
            kwargs |= self._prepare_prompt(input_ids, latent_grid_hw, context, settings, kwargs)
        else:
            context.images = [None] * len(kwargs.get("inputs_embeds", [None]))
        can_open = torch.tensor([images is not None for images in context.images])
        limits = LatentBlockLimits(prompt_length, self.config, can_open, low, high)
        output = super().generate(
            input_ids,
            generation_config,
            LogitsProcessorList([*(logits_processor or []), limits]),
            stopping_criteria,
            latent_context=context,
            **kwargs,
        )
        if high and can_open.any():
            self._warn_if_unused(output if isinstance(output, Tensor) else output.sequences, prompt_length, can_open)
        if isinstance(output, Tensor):
            return output
        return self._account(output, context, prompt_length, settings, kwargs)

    def _input_device(self, inputs: Tensor) -> torch.device:
        """Where inputs belong: offloaded weights lie on `meta` and are fetched to where the caller put the inputs."""
        return inputs.device if self.device.type == "meta" else self.device

    def _warn_if_unused(self, sequences: Tensor, prompt_length: int, can_open: Tensor) -> None:
        if not (sequences[:, prompt_length:] == self.config.latent_start_token_id).any():
            logger.warning_once(
                f"No latent block was opened: none of the {int(can_open.sum())} rows with an image wrote `<latent>`. "
                "`min_latent_blocks=1` opens one."
            )

    def generate_batch(self, *args, **kwargs):
        raise ValueError("Continuous batching cannot open latent blocks: use `generate` on a batch instead.")

    def _new_generation_context(self, grid, intervention, noise: bool, output_latents: bool, max_blocks: int):
        """What this call wants of its blocks, checked."""
        check_intervention(intervention, self.config.latent_mode == "autoregressive")
        if grid is not None:
            check_grid(grid, self.config, "`latent_grid`")
            grid = (int(grid[0]), int(grid[1]))
        return LatentContext(
            images=[],
            intervention=intervention,
            noise=noise,
            output_latents=output_latents,
            grid=grid,
            max_blocks=max_blocks,
        )

    def _block_limits(self, settings, low: int | None, high: int | None) -> tuple[int, int]:
        """The fewest and most blocks, from the arguments, the generation config or the model config."""
        low = getattr(settings, "min_latent_blocks", None) if low is None else low
        high = getattr(settings, "max_latent_blocks", None) if high is None else high
        low, high = low or 0, self.config.max_latent_blocks if high is None else high
        if not 0 <= low <= high:
            raise ValueError(f"`min_latent_blocks` must lie within 0..`max_latent_blocks` ({high}), got {low}.")
        return low, high

    def _prepare_prompt(self, input_ids, latent_grid_hw, context, settings, kwargs) -> dict:
        """Encode what is new in the prompt and place it. Takes the vision inputs out of `kwargs`."""
        vision = {
            name: kwargs.pop(name, None)
            for name in (
                "pixel_values",
                "image_grid_thw",
                "pixel_values_videos",
                "video_grid_thw",
                "second_per_grid_ts",
            )
        }
        kwargs.pop("mm_token_type_ids", None)
        attention_mask = kwargs.get("attention_mask")
        if attention_mask is None:
            attention_mask = infer_attention_mask(input_ids, settings)
        self._check_length(input_ids, attention_mask)
        cache = kwargs.get("past_key_values")
        state = getattr(cache, "latent_state", None)
        expand = expansion(settings)
        seen = 0
        if state is not None:
            seen = state.num_tokens
            self._continue_cache(cache, state, input_ids, attention_mask, expand)
            vision = drop_cached_items(input_ids, seen, vision, self.config, self.model.visual.spatial_merge_size)
        new_ids = input_ids[:, seen:].to(self._input_device(input_ids))
        sites = find_block_sites(new_ids, self.config, latent_grid_hw)
        lone = [site for row in sites for site in row if site.grid is None]
        if lone and state is None:
            raise ValueError(
                f"Row {lone[0].row} of the prompt opens a latent block at column {lone[0].column}, but `latent_grid_hw` is not "
                "given. Pass the grids, or the `past_key_values`, that `generate` returned with the sequences."
            )
        if latent_grid_hw is not None:
            context.prompt_grids = torch.tensor([site.grid for row in sites for _ in range(expand) for site in row])
        earlier = None if state is None else [state.images[row * expand] for row in range(len(new_ids))]
        context.images, context.placeholders = self._encode_images(new_ids, vision, earlier, seen)
        positions = self._rope_positions(new_ids, attention_mask, vision)
        return {"attention_mask": attention_mask, "position_ids": positions}

    def _check_length(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        longest = self.config.get_text_config().max_position_embeddings
        if input_ids.shape[1] <= longest:
            return
        lengths = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).sum(dim=1)
        if lengths.max() > longest:
            row = int(lengths.argmax())
            raise ValueError(
                f"Row {row} of the prompt has {int(lengths[row])} tokens, but the context holds {longest}."
            )

    def _continue_cache(self, cache, state, input_ids: Tensor, attention_mask: Tensor | None, expand: int) -> None:
        """Check that a returned cache fits the sequences that continue it, and ready it for them."""
        rows = state.attention_mask.shape[0]
        if rows != input_ids.shape[0] or input_ids.shape[1] <= state.num_tokens:
            raise ValueError(
                f"`past_key_values` holds {rows} rows of {state.num_tokens} tokens; `input_ids` must be the same rows from their "
                f"start, with new tokens behind, but its shape is {tuple(input_ids.shape)}."
            )
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"`attention_mask` must have the shape of `input_ids` {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}."
                )
            if not attention_mask.all():
                state.mask_tokens(attention_mask[:, : state.num_tokens].bool())
        if expand > 1:
            cache.batch_repeat_interleave(expand)
            state.repeat_interleave(expand)

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
        **kwargs,
    ):
        """What is new since the cache; masks and positions of later steps belong to the cache's `latent_state`."""
        state = getattr(past_key_values, "latent_state", None)
        seen = 0 if state is None else state.num_tokens
        model_inputs = {"past_key_values": past_key_values, "latent_context": latent_context, **kwargs}
        if is_first_iteration:
            model_inputs |= {"attention_mask": attention_mask, "position_ids": position_ids}
            if inputs_embeds is not None:
                return model_inputs | {"inputs_embeds": inputs_embeds}
            return model_inputs | {"input_ids": input_ids[:, seen:].to(self._input_device(input_ids))}
        return model_inputs | {"input_ids": input_ids[:, -1:].to(self._input_device(input_ids))}

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        model_kwargs |= {"attention_mask": None, "position_ids": None}
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _reorder_cache(self, past_key_values, beam_idx: Tensor):
        past_key_values.reorder_cache(beam_idx)
        past_key_values.latent_state.reorder(beam_idx)
        return past_key_values

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """A static cache needs room for the blocks: at worst every row opens each of its blocks alone."""
        context = model_kwargs.get("latent_context")
        if context is not None:
            rows = batch_size * expansion(generation_config)
            max_cache_length += rows * context.max_blocks * self._largest_block(context.grid)
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _largest_block(self, grid: tuple[int, int] | None) -> int:
        """Cache slots of a block beyond its `<latent>`."""
        if self.config.latent_mode == "autoregressive":
            return 1 + (grid or (1, self.config.num_autoregressive_latents))[1]
        height, width = grid or (self.config.latent_grid_size, self.config.latent_grid_size)
        return self.config.num_control_tokens + height * width + 1

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        # Where a block opens depends on the data, so the whole forward is no one graph. Compile the part that is:
        # `model.model.language_model.compile()`.
        if generation_config.compile_config is not None:
            logger.warning_once("`compile_config` is ignored: compile `model.model.language_model` instead.")
        return False

    def _account(self, output, context: LatentContext, prompt_length: int, settings, kwargs):
        """Add block counts, grids, stop reasons and the trace to what the decoding loop returned."""
        rows = output.sequences.shape[0]
        steps = follow_rows(context.steps, rows, getattr(output, "beam_indices", None))
        new_steps = [step for step in steps if step.decode_step >= 0]
        blocks, latents = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
        for step in new_steps:
            blocks[step.row] += 1
            latents[step.row] += step.grid[0] * step.grid[1]
        trace = LatentTrace(rows, steps)
        kind = LatentGenerateBeamOutput if hasattr(output, "beam_indices") else LatentGenerateOutput
        return kind(
            **output,
            num_latent_blocks=blocks,
            num_latents=latents,
            latent_grid_hw=trace.latent_grid_hw,
            stop_reason=stop_reasons(output.sequences[:, prompt_length:], settings, kwargs.get("tokenizer")),
            latent_trace=trace if context.output_latents else None,
        )


def expansion(settings) -> int:
    """Rows that `generate` makes of one prompt."""
    return max(settings.num_beams or 1, settings.num_return_sequences or 1)


def check_settings(settings, kwargs: dict, output_latents: bool, device: torch.device) -> None:
    """Raise for what cannot work with latent blocks."""
    mode = settings.get_generation_mode(kwargs.get("assistant_model"))
    if mode not in SUPPORTED_MODES:
        raise ValueError(
            f"`{mode.value}` cannot open latent blocks: it rewinds or rescores tokens one by one. Supported: "
            f"{[supported.value for supported in SUPPORTED_MODES]}."
        )
    if settings.use_cache is False:
        raise ValueError("`use_cache=False` cannot work: latent blocks live in the key-value cache.")
    if settings.prefill_chunk_size is not None:
        raise ValueError(f"`prefill_chunk_size` cannot work with latent blocks, got {settings.prefill_chunk_size}.")
    if settings.output_attentions:
        raise ValueError("`output_attentions` has no one shape with latent blocks: use `output_latents=True`.")
    if settings.cache_implementation == "paged":
        raise ValueError("`cache_implementation='paged'` (continuous batching) cannot open latent blocks.")
    if "offloaded" in (settings.cache_implementation or "") and device.type == "cpu":
        raise ValueError(
            f"`cache_implementation={settings.cache_implementation!r}` moves a cache to the CPU, where it is already."
        )
    if output_latents and not settings.return_dict_in_generate:
        raise ValueError("`output_latents=True` needs `return_dict_in_generate=True`.")


def infer_attention_mask(input_ids: Tensor, settings) -> Tensor | None:
    """As transformers does: padding is masked where the pad token is no end token."""
    pad, eos = settings.pad_token_id, settings.eos_token_id
    eos = eos if isinstance(eos, list | tuple) else [eos]
    if pad is None or pad in eos or not (input_ids == pad).any():
        return None
    return (input_ids != pad).long()


def stop_reasons(generated: Tensor, settings, tokenizer) -> list[str]:
    """Why each row ended, read off its generated tokens (rows, T)."""
    eos = settings.eos_token_id if isinstance(settings.eos_token_id, list | tuple) else [settings.eos_token_id]
    eos = [token for token in eos if token is not None]
    stop_strings = settings.stop_strings and StopStringCriteria(tokenizer, settings.stop_strings)
    budget = settings.max_new_tokens
    reasons = []
    for row in generated:
        ends = torch.isin(row, torch.tensor(eos, device=row.device)).nonzero().flatten().tolist() if eos else []
        kept = row[: ends[0]] if ends else row
        if stop_strings and len(kept) and bool(stop_strings(kept[None], None)[0]):
            reasons.append("stop_string")
        elif ends:
            reasons.append("eos")
        else:
            reasons.append("max_length" if budget is None or len(row) >= budget else "stopping_criteria")
    return reasons
