"""Run a language model segment by segment: its cache, the cache's state, masks and positions.

Shared by the architectures. In training the cache is one object per segment, so that gradient checkpointing can run every
segment's layers again (`latent_state.py`).

Shapes: B rows, S new tokens, D hidden size.
"""

import threading
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import logging

from .transformers_api import CACHE
from .interventions import Intervention, check_reached, intervene
from .latent_state import LatentState
from .row_images import RowImages
from .trace import LatentStep
from .training_cache import first_segment_cache, next_segment_cache


logger = logging.get_logger(__name__)


class Thread(threading.local):
    """What the forward that runs in this thread wants of the layers, which other threads may share."""

    keeps_cache = False


class CacheIsKept:
    """True in a thread whose forward keeps its cache under gradient checkpointing, False in every other."""

    def __bool__(self) -> bool:
        return THREAD.keeps_cache


THREAD = Thread()
CACHE_IS_KEPT = CacheIsKept()


@dataclass
class DecodingContext:
    """What one call of `forward` or `generate` wants of its latents, and the record of what it got."""

    images: list[RowImages | None]  # by prompt row; its beams share it
    placeholders: dict[int, list[Tensor | None]] = field(default_factory=dict)  # token -> features by prompt row
    intervention: str | Intervention | None = None
    output_latents: bool = False
    decode_step: int = -1  # the generated token that is being consumed; -1: the prompt
    steps: list[LatentStep] = field(default_factory=list)
    finite: list[tuple[list[int], Tensor]] | None = None  # (rows, whether their latents are finite); None: nobody asks
    config: Any = None  # the model's with the number of steps of this call; None: the model's own
    prompt_ids: Tensor | None = None  # (prompt rows, S) of a prompt that is given as `inputs_embeds`

    def of_row(self, values: list, row: int, num_rows: int):
        """The entry of the prompt row that `row` of an expanded batch continues."""
        return values[row * len(values) // num_rows]

    def intervene(self, steps: list[LatentStep], num_rows: int) -> list[Tensor]:
        """The latents of steps taken together, changed as the caller wants; beams of one prompt count as one."""
        changed = [step.latents for step in steps]
        if self.intervention is not None:
            prompts = list(range(len(self.images)))
            changed = intervene(self.intervention, steps, [self.of_row(prompts, step.row, num_rows) for step in steps])
        if self.finite is not None:
            self.finite += [([step.row], values.isfinite().all()[None]) for step, values in zip(steps, changed)]
        return changed

    def check_reached(self, num_rows: int) -> None:
        """Raise where the intervention names latents that none of the rows has."""
        check_reached(self.intervention, num_rows)

    def sorted_steps(self) -> list[LatentStep]:
        return sorted(self.steps, key=lambda step: (step.row, step.index))

    def check_latents(self) -> None:
        """Raise unless all latents since the last check are finite: what follows others would be garbage.

        Raises:
            ValueError: NaN or infinity among the latents of a row.
        """
        if not self.finite:
            return
        device = self.finite[0][1].device
        flags = torch.cat([flags.to(device) for _, flags in self.finite]).tolist()
        rows = [row for rows, _ in self.finite for row in rows]
        self.finite = []
        wrong = sorted({row for row, is_finite in zip(rows, flags) if not is_finite})
        if wrong:
            raise ValueError(
                f"The latents of rows {wrong} hold NaN or infinity: weights that overflow in this dtype, or a "
                "`latent_intervention` that returns no numbers."
            )


class SegmentDecoder:
    """One run over new tokens. Holds what changes from segment to segment."""

    def __init__(self, model, context: DecodingContext, cache: Cache | None, use_cache: bool | None, kwargs: dict):
        self.model, self.context = model, context
        self.config = model.config if context.config is None else context.config
        self.text_model = model.model.language_model
        self.cache, self.use_cache, self.kwargs = cache, use_cache, kwargs

    def embed_prompt(self, input_ids: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        """Token embeddings with image features in their placeholders; takes the features out of the context."""
        embeds = self.text_model.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        for token, by_row in self.context.placeholders.items():
            features = [self.context.of_row(by_row, row, len(input_ids)) for row in range(len(input_ids))]
            features = [values for values in features if values is not None]
            if features:
                mask = (input_ids == token)[..., None].to(embeds.device)
                embeds = embeds.masked_scatter(mask, torch.cat(features).to(embeds.device, embeds.dtype))
        self.context.placeholders = {}
        return embeds

    def prepare_cache(self, rows: int, embeds: Tensor, has_latents: bool) -> None:
        """Find or make the cache and its state. Latents need one; in training it is one object per segment."""
        if self.cache is None and self.use_cache is None:
            self.use_cache = self.text_model.config.use_cache
        self.returned_cache = self.cache
        if self.cache is None and has_latents and torch.is_grad_enabled():
            if self.use_cache and not self.model.training:
                logger.warning_once(
                    "`use_cache=True` is ignored: with gradients, the cache of latents is not returned."
                )
            self.cache = first_segment_cache(self.text_model.config.num_hidden_layers)
        elif self.cache is None and (
            has_latents or (self.use_cache and not (self.model.training and self.is_checkpointing()))
        ):
            self.cache = DynamicCache(config=self.text_model.config)
            self.returned_cache = self.cache if self.use_cache else None
        elif self.cache is not None and self.model.training and self.is_checkpointing():
            raise ValueError(
                f"Gradient checkpointing runs layers twice: it cannot extend the `{CACHE}` that were given."
            )
        self.is_segmented = self.cache is not None and self.returned_cache is None and torch.is_grad_enabled()
        self.state = getattr(self.cache, "latent_state", None)
        if self.state is None:
            seen = 0 if self.cache is None else int(self.cache.get_seq_length())
            if seen:
                raise ValueError(
                    f"`{CACHE}` holds {seen} positions but no `latent_state`: it was not filled by this model's `generate` "
                    "or by a forward with latents."
                )
            self.state = LatentState.empty(rows, embeds.device, [])
            if self.cache is not None and not self.is_segmented:
                self.cache.latent_state = self.state
        if self.state.attention_mask.shape[0] != rows:
            raise ValueError(f"`{CACHE}` holds {self.state.attention_mask.shape[0]} rows, but {rows} rows were given.")

    def start_afresh(self) -> None:
        """Drop keys and values of everything so far; what comes next starts at position 0."""
        if self.is_segmented:
            self.cache = first_segment_cache(self.text_model.config.num_hidden_layers)
        else:
            self.cache.crop(-int(self.cache.get_seq_length()))  # a negative number removes as many, in every version
        self.state.clear()

    def is_checkpointing(self) -> bool:
        """In training mode: whether layers run again in the backward pass."""
        layers = self.text_model.layers
        return torch.is_grad_enabled() and any(layer.gradient_checkpointing for layer in layers)

    def place(self, position_ids, mask, rows: int, length: int, device: torch.device) -> Tensor:
        """(3, B, S) positions of the new tokens, behind what the cache holds; advances `next_position`."""
        if position_ids is None and mask is None:  # as for every token of an answer: no sums over ones
            start = self.state.next_position
            self.state.next_position = start + length
            offsets = start[:, None] if length == 1 else start[:, None] + torch.arange(length, device=device)
            return offsets.to(device).expand(3, -1, -1)
        if position_ids is None:
            position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
        positions = position_ids[-3:].to(device) + self.state.next_position[:, None]
        reach = positions.amax(0) + 1 if mask is None else (positions.amax(0) + 1).masked_fill(~mask, 0)
        self.state.next_position = torch.maximum(self.state.next_position, reach.amax(-1))
        return positions

    def decode(
        self, embeds: Tensor, positions: Tensor, attended: Tensor | None, is_token: Tensor | None, **kwargs
    ) -> list[Tensor]:
        """One forward of the language model. Returns the last hidden state, then those of all layers if asked for."""
        mask = self.state.append(attended, is_token, embeds.shape[1])
        # Only in training mode do layers look at gradient checkpointing, with and without gradients.
        with self.kept_cache() if self.model.training else nullcontext():
            output = self.text_model(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions,
                use_cache=self.cache is not None and not self.is_segmented,
                **{CACHE: self.cache},
                **(self.kwargs | kwargs),
            )
        if self.is_segmented:
            self.cache = next_segment_cache(self.cache)
        return [output.last_hidden_state, *(output.hidden_states or ())]

    @contextmanager
    def kept_cache(self):
        """Keep the cache under gradient checkpointing: `SegmentLayer` can be replayed, so it need not be dropped."""
        # transformers drops the cache in training mode, without gradients too.
        active = self.cache is not None
        layers = [layer for layer in self.text_model.layers if layer.gradient_checkpointing] if active else []
        for layer in layers:
            if torch.is_grad_enabled() and getattr(layer._gradient_checkpointing_func, "keywords", {}).get(
                "use_reentrant", True
            ):
                raise ValueError(
                    "Latents need gradient checkpointing with `use_reentrant=False`: the reentrant kind passes no "
                    "gradient to the keys and values of earlier segments."
                )
            layer._can_checkpoint_with_cache = CACHE_IS_KEPT  # stays
        before, THREAD.keeps_cache = THREAD.keeps_cache, True
        try:
            yield
        finally:
            THREAD.keeps_cache = before
