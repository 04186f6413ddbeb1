"""`generate` for models that open latent blocks: transformers' own decoding loops, with the blocks inside `forward`."""

import torch
from torch import Tensor
from transformers.generation import LogitsProcessorList, StoppingCriteriaList
from transformers.utils import logging

from .transformers_api import CACHE, cache_keyword, take_cache
from .decoding_blocks import BlockContext
from .generation_checks import (
    LastTokens,
    LatentBlockLimits,
    check_settings,
    expansion,
    infer_attention_mask,
    stop_reasons,
)
from .generation_common import LatentGenerationMixin
from .interventions import Intervention, prepare_intervention
from .latent_counts import are_off, check_latent_arguments
from .latent_state import check_continuation, find_state
from .prompt_checks import check_numbers
from .row_images import drop_cached_items
from .trace import LatentGenerateBeamOutput, LatentGenerateOutput, LatentTrace, follow_rows


logger = logging.get_logger(__name__)
BLOCK_COUNTS = ("min_latent_blocks", "max_latent_blocks")
VISION_GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")


class BlockGenerationMixin(LatentGenerationMixin):
    """`generate` over `BlockContext`; the class beside it brings `forward`, `_encode_images` and `_rope_positions`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config=None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        latents: str | None = None,
        min_latent_blocks: int | None = None,
        max_latent_blocks: int | None = None,
        latent_grid: tuple[int, int] | None = None,
        latent_grid_hw: Tensor | None = None,
        latent_intervention: str | Intervention | None = None,
        output_latents: bool = False,
        **kwargs,
    ) -> LatentGenerateOutput | LatentGenerateBeamOutput | torch.LongTensor:
        """Generate text with latent blocks. Takes everything that `GenerationMixin.generate` takes, and:

        `sequences` hold `<latent>` once per block. To feed them back, pass the returned `latent_grid_hw` with them, or
        the returned `past_key_values`.

        Args:
            latents: "off" opens no blocks; "on", the default, as many as the counts allow.
            min_latent_blocks: blocks opened at the first answer positions, in rows with an image; default 0.
            max_latent_blocks: most blocks of one answer; 0 forbids them; default `config.max_latent_blocks`.
            latent_grid: (height, width) of every block instead of the predicted one.
            latent_grid_hw: (blocks, 2), grids of the blocks that stand in the prompt.
            latent_intervention: replaces latents before they enter the language model (`interventions.py`).
            output_latents: return a `latent_trace`; needs `return_dict_in_generate=True`.

        Raises:
            ValueError: a decoding mode that cannot work with latents, or inputs that do not fit together.
        """
        wishes = {
            "latents": latents,
            "latent_grid": latent_grid,
            "latent_grid_hw": latent_grid_hw,
            "output_latents": output_latents,
        }
        wishes |= {"low": min_latent_blocks, "high": max_latent_blocks, "intervention": latent_intervention}
        arguments = (inputs, generation_config, logits_processor, stopping_criteria)
        return self._generate_with_blocks(BlockContext(images=[]), wishes, *arguments, **kwargs)

    def _generate_with_blocks(
        self,
        context: BlockContext,
        wishes: dict,
        inputs,
        generation_config,
        logits_processor,
        stopping_criteria,
        **kwargs,
    ):
        """`generate` on a context of the architecture's own.

        Args:
            wishes: `latents`, `low` and `high` numbers of blocks, `latent_grid`, `latent_grid_hw`, `intervention` and `output_latents` as given.
        """
        # What this call wants of its blocks.
        kwargs |= cache_keyword(take_cache(kwargs))
        settings, _ = self._prepare_generation_config(generation_config, **kwargs)
        check_settings(settings, kwargs, wishes["output_latents"], self.device)
        others = {name for name, value in (vars(settings) | kwargs).items() if value is not None}
        check_latent_arguments(others - set(self._only_of_forward), BLOCK_COUNTS, "block", self.config.model_type)
        low, high = self._block_limits(settings, wishes["latents"], wishes["low"], wishes["high"])
        latent_grid, latent_grid_hw = wishes["latent_grid"], wishes["latent_grid_hw"]
        self._fill_context(context, latent_grid, wishes["intervention"], wishes["output_latents"], high)
        # The prompt: its images are encoded and its blocks found before the first forward.
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        input_ids = self._check_prompt(input_ids, kwargs)
        prompt_length = 0 if input_ids is None else input_ids.shape[1]
        self._read_prompt(input_ids, latent_grid, latent_grid_hw, low, context, settings, kwargs)
        # The decoding loop of transformers, with limits on what may be written.
        can_open = torch.tensor([images is not None for images in context.images])
        limits = LatentBlockLimits(prompt_length, self.block_tokens, can_open, low, high)
        watch = []
        if high and (settings.num_beams or 1) == 1:  # beams change places between being written and being read
            context.last_tokens = LastTokens()
            watch.append(context.last_tokens)
        output = super().generate(
            input_ids,
            generation_config,
            LogitsProcessorList([*(logits_processor or []), limits]),
            StoppingCriteriaList([*(stopping_criteria or []), *watch]),
            latent_context=context,
            **kwargs,
        )
        # The account of what happened.
        context.check_reached(len(context.images) * expansion(settings))
        cache = kwargs.get(CACHE) if isinstance(output, Tensor) else output.get(CACHE)
        if hasattr(cache, "latent_state"):
            cache.latent_state.follow_undone_token(cache)
        if high and any(images is not None for images in context.images):
            sequences = output if isinstance(output, Tensor) else output.sequences
            context.is_unused = self._warn_if_unused(sequences, prompt_length, can_open)
        if isinstance(output, Tensor):
            return output
        return self._account(output, context, prompt_length, settings, kwargs)

    def _read_prompt(self, input_ids, latent_grid, latent_grid_hw, low: int, context, settings, kwargs: dict) -> None:
        """Encode and place the prompt, which may be given as embeddings; changes `kwargs` and `context`."""
        prompt_ids, inputs_embeds = input_ids, kwargs.get("inputs_embeds")
        if inputs_embeds is not None:
            prompt_ids = self._find_ids(input_ids, inputs_embeds)
            has_images = bool((prompt_ids[..., None] == prompt_ids.new_tensor(self._placeholder_tokens)).any())
            prompt_ids = prompt_ids if has_images else input_ids
        if prompt_ids is not None:
            kwargs |= self._prepare_prompt(prompt_ids, latent_grid_hw, context, settings, kwargs)
        else:
            context.images = [None] * len(self._check_blind_prompt(kwargs, low, latent_grid, latent_grid_hw))
            if inputs_embeds is not None and kwargs.get("position_ids") is None:
                # transformers up to 5.17 cannot expand a None to beams.
                mask, no_images = kwargs.get("attention_mask"), dict.fromkeys(VISION_GRIDS)
                kwargs["position_ids"] = self._rope_positions(self._find_ids(None, inputs_embeds), mask, no_images)

    def known_answer_settings(self, grids: Tensor | None) -> dict:
        blocks = min(1, self.config.max_latent_blocks)
        grid = {} if grids is None else {"latent_grid": tuple(grids[0].tolist())}
        return {"min_latent_blocks": blocks, "max_latent_blocks": blocks, **grid}

    def _check_blind_prompt(self, kwargs: dict, low: int, grid, grids) -> Tensor | list:
        """A prompt of embeddings alone (or none) has no images that a block could look at."""
        needless = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw")
        given = [name for name in needless if kwargs.get(name) is not None]
        given += ["min_latent_blocks"] * bool(low) + ["latent_grid"] * (grid is not None)
        given += ["latent_grid_hw"] * (grids is not None)
        if given:
            raise ValueError(f"{given} need `input_ids`: in `inputs_embeds` no image can be found.")
        embeds = kwargs.get("inputs_embeds")
        return [None] if embeds is None else embeds

    def _warn_if_unused(self, sequences: Tensor, prompt_length: int, can_open: Tensor) -> bool:
        unused = not (sequences[:, prompt_length:] == self.block_tokens.start).any()
        if unused:
            logger.warning_once(
                f"No latent block was opened: none of the {int(can_open.sum())} rows with an image wrote `<latent>`. "
                "`min_latent_blocks=1` opens one."
            )
        return unused

    def _fill_context(self, context: BlockContext, grid, intervention, output_latents: bool, max_blocks: int) -> None:
        """What this call wants of its blocks, checked."""
        context.intervention = prepare_intervention(intervention, self.block_latents.is_one_at_a_time)
        if grid is not None:
            if not isinstance(grid, tuple | list):
                raise ValueError(f"`latent_grid` must be (height, width) in whole numbers, got {grid!r}.")
            grid = tuple(grid)
            self.block_latents.check_grid(grid, "`latent_grid`")
        context.grid, context.max_blocks = grid, max_blocks
        context.output_latents, context.finite = output_latents, []

    def _block_limits(self, settings, latents: str | None, low: int | None, high: int | None) -> tuple[int, int]:
        """The fewest and most blocks, from the arguments, the generation config or the model config."""
        latents = getattr(settings, "latents", None) if latents is None else latents
        if are_off(latents, min_latent_blocks=low, max_latent_blocks=high):
            return 0, 0
        low = getattr(settings, "min_latent_blocks", None) if low is None else low
        high = getattr(settings, "max_latent_blocks", None) if high is None else high
        low, high = 0 if low is None else low, self.config.max_latent_blocks if high is None else high
        numbers = all(isinstance(number, int) and not isinstance(number, bool) for number in (low, high))
        if not (numbers and 0 <= low <= high):
            raise ValueError(
                f"`min_latent_blocks` must be a whole number within 0..`max_latent_blocks` ({high}), got {low}."
            )
        return low, high

    def _prepare_prompt(self, input_ids, latent_grid_hw, context, settings, kwargs) -> dict:
        """Encode what is new in the prompt and place it. Takes the vision inputs out of `kwargs`."""
        names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
        vision = {name: kwargs.pop(name, None) for name in names}
        kwargs.pop("mm_token_type_ids", None)
        if kwargs.get("position_ids") is not None:
            raise ValueError(
                "`position_ids` cannot be given to `generate`: latent blocks take positions of their own."
            )
        attention_mask = kwargs.get("attention_mask")
        if attention_mask is None:
            attention_mask = infer_attention_mask(input_ids, settings)
        check_numbers(**{name: vision[name] for name in ("pixel_values", "pixel_values_videos")})
        cache, expand = kwargs.get(CACHE), expansion(settings)
        state = find_state(cache)
        seen = 0 if state is None else state.num_tokens
        if state is not None:
            check_continuation(cache, state, input_ids, attention_mask)
            vision = drop_cached_items(input_ids, seen, vision, self.config, self.model.visual.spatial_merge_size)
        new_ids = input_ids[:, seen:].to(self._input_device(input_ids))
        context.prompt_ids = new_ids
        sites = self.find_blocks(new_ids, latent_grid_hw, open_ended=True)
        sites_without_grid = [site for row in sites for site in row if site.grid is None]
        if sites_without_grid and state is None and latent_grid_hw is None:
            raise ValueError(
                f"Row {sites_without_grid[0].row} of the prompt opens a latent block at column {sites_without_grid[0].column}, but `latent_grid_hw` is not "
                f"given. Pass the grids, or the `{CACHE}`, that `generate` returned with the sequences."
            )
        self._check_length(input_ids, attention_mask, self._count_block_tokens(sites, state))
        context.prompt_sites = [row for row in sites for _ in range(expand)]
        if state is not None:
            context.earlier_grids = [list(grids) for grids in state.grids]
        earlier = None if state is None else state.images
        context.images, context.placeholders = self._encode_images(new_ids, vision, earlier, seen)
        positions = self._rope_positions(new_ids, attention_mask, vision)
        if state is not None:  # last: until here a failed call has left the caller's cache as it was
            if attention_mask is not None and not attention_mask.all():
                state.mask_tokens(attention_mask[:, :seen].bool())
            if expand > 1:
                cache.batch_repeat_interleave(expand)
                state.repeat_interleave(expand)
        return {"attention_mask": attention_mask, "position_ids": positions}

    def _count_block_tokens(self, sites: list, state) -> list[int]:
        """By row the positions that the prompt's blocks take beyond its columns; blocks that may be opened are not counted."""
        counts = [0] * len(sites)
        if state is not None:
            counts = (state.attention_mask & ~state.is_token).sum(dim=1).tolist()
        for row, found in enumerate(sites):
            for site in found:
                if site.num_pads == 0 and site.grid is not None:
                    counts[row] += self._largest_block(site.grid)
        return counts

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """A static cache needs room for the blocks: at worst every row opens each of its blocks alone."""
        context = model_kwargs.get("latent_context")
        if context is not None:
            rows = batch_size * expansion(generation_config)
            room = rows * context.max_blocks * self._largest_block(context.grid)
            check_room(model_kwargs.get(CACHE), max_cache_length + room)
            max_cache_length += room
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _largest_block(self, grid: tuple[int, int] | None) -> int:
        """Cache slots of a block beyond its `<latent>`."""
        height, width = grid or self.block_latents.largest_grid()
        return self.block_latents.num_controls + height * width + 1

    def _account(self, output, context: BlockContext, prompt_length: int, settings, kwargs):
        """Add block counts, grids, stop reasons and the trace to what the decoding loop returned."""
        rows = output.sequences.shape[0]
        steps = follow_rows(context.steps, rows, getattr(output, "beam_indices", None))
        new_steps = [step for step in steps if step.decode_step >= 0]
        blocks, latents = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
        for step in new_steps:
            blocks[step.row] += 1
            latents[step.row] += step.grid[0] * step.grid[1]
        trace = LatentTrace(rows, steps)
        grids = []
        for row in range(rows):
            grids += context.of_row(context.earlier_grids, row, rows) if context.earlier_grids else []
            grids += [step.grid for step in trace.row(row)]
        kind = LatentGenerateBeamOutput if hasattr(output, "beam_indices") else LatentGenerateOutput
        return kind(
            **output,
            num_latent_blocks=blocks,
            num_latents=latents,
            latent_grid_hw=torch.tensor(grids, dtype=torch.long).view(-1, 2),
            latents_unused=context.is_unused,
            stop_reason=stop_reasons(
                output.sequences[:, prompt_length:], settings, kwargs.get("tokenizer"), prompt_length
            ),
            latent_trace=trace if context.output_latents else None,
        )


def check_room(cache, needed: int) -> None:
    """Raise if a fixed-size cache that the caller brought is too small for the worst case."""
    sizes = [layer.max_cache_len for layer in getattr(cache, "layers", []) if hasattr(layer, "max_cache_len")]
    if sizes and min(sizes) < needed:
        raise ValueError(
            f"The static cache holds {min(sizes)} positions, but prompt, answer and latent blocks may take {needed}."
        )
