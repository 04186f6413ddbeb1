"""What a KV cache with latents in it must remember beside keys and values, and whether a prompt continues it.

Shapes: B rows, S new tokens, L cache slots so far, D hidden size.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .transformers_api import CACHE


@dataclass
class EmbeddedBatch:
    """A padded batch on its way through the decoder."""

    embeds: Tensor  # (B, T, D)
    attended: Tensor  # (B, T) bool
    positions: Tensor  # (3, B, T)
    is_whole: bool = False  # whether all of `attended` is known to be True

    @property
    def length(self) -> int:
        return self.embeds.shape[1]

    def last(self) -> Tensor:
        """(B,) the last token of every row."""
        order = torch.arange(self.length, device=self.attended.device)
        return (order * self.attended).argmax(dim=1)

    def reach(self) -> Tensor:
        """(B,) the position behind every row's last."""
        return (self.positions.amax(0) + 1).masked_fill(~self.attended, 0).amax(1)

    def rows(self, rows: Tensor) -> "EmbeddedBatch":
        return EmbeddedBatch(self.embeds[rows], self.attended[rows], self.positions[:, rows])

    def join(self, other: "EmbeddedBatch") -> "EmbeddedBatch":
        return EmbeddedBatch(
            torch.cat([self.embeds, other.embeds], dim=1),
            torch.cat([self.attended, other.attended], dim=1),
            torch.cat([self.positions, other.positions], dim=2),
        )


@dataclass
class LatentState:
    """What a cache with latents in it needs beyond keys and values; kept as `cache.latent_state`."""

    attention_mask: Tensor  # (B, L) bool, the slots that may be attended
    is_token: Tensor  # (B, L) bool, the slots that hold a column of `input_ids`; others hold latents or padding
    next_position: Tensor  # (B,) rotary position of the next token
    tokens: Tensor  # (B, columns) the `input_ids` in the cache; -1 where only embeddings were given
    has_holes: bool = False  # whether any slot is masked; without, attention keeps its fast path
    images: list = field(default_factory=list)  # B x RowImages | None
    grids: list[list[tuple[int, int]]] = field(default_factory=list)  # B x (height, width) of each block
    sequence: EmbeddedBatch | None = (
        None  # all embeddings so far, where nothing can be cached (Vedas, scope "reference")
    )

    @classmethod
    def empty(cls, batch_size: int, device: torch.device, images: list) -> "LatentState":
        slots = torch.zeros(batch_size, 0, dtype=torch.bool, device=device)
        tokens = torch.zeros(batch_size, 0, dtype=torch.long, device=device)
        positions = torch.zeros(batch_size, dtype=torch.long, device=device)
        return cls(slots, slots, positions, tokens, images=images, grids=[[] for _ in range(batch_size)])

    @property
    def num_tokens(self) -> int:
        """Columns of `input_ids` in the cache."""
        return self.tokens.shape[1]

    def remember(self, input_ids: Tensor | None, length: int) -> None:
        """Keep which tokens the last slots came from, so that a later call can tell what it continues."""
        if input_ids is None:
            input_ids = self.tokens.new_full((self.tokens.shape[0], length), -1)
        self.tokens = torch.cat([self.tokens, input_ids.to(self.tokens)], dim=1)

    def append(self, attended: Tensor | None, is_token: Tensor | None, length: int) -> Tensor | None:
        """Add `length` slots and return the mask for attention; None for a mask means all of them."""
        ones = self.attention_mask.new_ones(self.attention_mask.shape[0], length)
        self.has_holes |= attended is not None
        self.attention_mask = torch.cat([self.attention_mask, ones if attended is None else attended], dim=1)
        self.is_token = torch.cat([self.is_token, ones if is_token is None else is_token], dim=1)
        return self.attention_mask.long() if self.has_holes else None

    def clear(self) -> None:
        """Forget all slots; what was read stays read (`tokens`, `images`)."""
        self.attention_mask, self.is_token = self.attention_mask[:, :0], self.is_token[:, :0]
        self.next_position, self.has_holes = torch.zeros_like(self.next_position), False

    def reorder(self, rows: Tensor) -> None:
        """Follow the cache through beam search. Beams move within their prompt, so `images` stay where they are."""
        self.attention_mask, self.is_token = self.attention_mask[rows], self.is_token[rows]
        self.next_position, self.tokens = self.next_position[rows], self.tokens[rows]
        if self.sequence is not None:
            self.sequence = self.sequence.rows(rows)
        if any(self.grids):
            self.grids = [list(self.grids[row]) for row in rows.tolist()]

    def repeat_interleave(self, repeats: int) -> None:
        """Follow the cache when every row is continued `repeats` times."""
        self.attention_mask = self.attention_mask.repeat_interleave(repeats, dim=0)
        self.is_token = self.is_token.repeat_interleave(repeats, dim=0)
        self.next_position = self.next_position.repeat_interleave(repeats, dim=0)
        self.tokens = self.tokens.repeat_interleave(repeats, dim=0)
        self.images = [images for images in self.images for _ in range(repeats)]
        self.grids = [list(grids) for grids in self.grids for _ in range(repeats)]

    def follow_undone_token(self, cache: Cache) -> None:
        """Forget the last token if the cache no longer has it.

        Where it reads the stop of a decoding loop one step late (on MPS), transformers >= 5.24 crops a token off the cache.
        """
        if int(cache.get_seq_length()) != self.attention_mask.shape[1] - 1:
            return
        self.next_position = self.next_position - self.attention_mask[:, -1].long()
        self.attention_mask, self.is_token = self.attention_mask[:, :-1], self.is_token[:, :-1]
        self.tokens = self.tokens[:, :-1]

    def mask_tokens(self, attention_mask: Tensor) -> None:
        """Mask cached tokens that the caller masks by now, e.g. the padding of rows that finished early.

        Args:
            attention_mask: (B, num_tokens) bool over the cached columns of `input_ids`.
        """
        before = self.attention_mask
        after = before.clone()
        after[self.is_token] = before[self.is_token] & attention_mask.flatten()
        self.next_position = self.next_position - (before & ~after).sum(dim=1)
        self.attention_mask, self.has_holes = after, True


def find_state(cache: Cache | None) -> LatentState | None:
    """The state of a cache, or None where it is empty: a cache that was reset starts anew.

    Raises:
        ValueError: positions were added to the cache or cropped from it by somebody who did not know of the latents.
    """
    state = getattr(cache, "latent_state", None)
    if state is None:
        return None
    held, known = int(cache.get_seq_length()), state.attention_mask.shape[1]
    if held == 0:
        del cache.latent_state
        return None
    if held != known:
        raise ValueError(f"`{CACHE}` holds {held} positions, but its `latent_state` knows {known}: it was changed.")
    return state


def check_continuation(cache: Cache, state: LatentState, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raise unless `input_ids` are the tokens in the cache, with new ones behind."""
    rows, seen = state.tokens.shape
    if rows != input_ids.shape[0] or input_ids.shape[1] <= seen:
        raise ValueError(
            f"`{CACHE}` holds {rows} rows of {seen} tokens; `input_ids` must be the same rows from their "
            f"start, with new tokens behind, but its shape is {tuple(input_ids.shape)}."
        )
    attended = state.attention_mask[state.is_token].view(rows, seen)
    if attention_mask is not None:
        attended = attended & attention_mask[:, :seen].bool().to(attended.device)
    differs = (state.tokens != input_ids[:, :seen].to(state.tokens.device)) & attended & (state.tokens >= 0)
    if differs.any():
        row, column = differs.nonzero()[0].tolist()
        raise ValueError(
            f"`input_ids` do not continue `{CACHE}`: row {row} has token {int(input_ids[row, column])} at column "
            f"{column}, the cache has {int(state.tokens[row, column])}."
        )
