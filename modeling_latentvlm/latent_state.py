"""Sequences with latents in them: what a KV cache must remember, and how a batch is cut into segments.

A block's latents depend on the hidden states before it, so a sequence with K blocks enters the language model as K + 1
segments, each one forward over what is new:

    segment 0:  text ... <latent> e_s e_q e_v          segment 1:  z_1 .. z_N </latent> text ...

Rows of a batch open blocks at different places and of different sizes. Segment k of every row is padded to the longest;
padding is masked out of the cache and consumes no position. Training and `generate` go through the same code.

Shapes: B rows, S new tokens, L cache slots so far, D hidden size.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from configuration_latentvlm.transformers_api import CACHE
from modeling_latentvlm.block_sites import BlockSite


@dataclass
class Sequence:
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

    def rows(self, rows: Tensor) -> "Sequence":
        return Sequence(self.embeds[rows], self.attended[rows], self.positions[:, rows])

    def join(self, other: "Sequence") -> "Sequence":
        return Sequence(
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
    sequence: Sequence | None = None  # all embeddings so far, where nothing can be cached (Vedas, scope "reference")

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


class SegmentLayer(DynamicLayer):
    """Keys and values of one segment beside those of the earlier ones, never written twice.

    Under gradient checkpointing a layer runs again in the backward pass. Then it must see what it saw before: the
    pieces before its own segment, as the tensors they were, and its own result must not be appended a second time.
    """

    def __init__(self, pieces: tuple[tuple[Tensor, Tensor], ...] = ()):
        super().__init__()
        self.pieces, self.own = pieces, None

    def update(self, key_states: Tensor, value_states: Tensor, kwargs: dict | None = None) -> tuple[Tensor, Tensor]:
        # `kwargs` are those of the attention (transformers >= 5.24), of which a layer of plain tensors needs none.
        if self.own is None:
            self.own = (key_states, value_states)
        keys, values = zip(*self.pieces, (key_states, value_states))
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)

    def get_seq_length(self) -> int:
        return sum(keys.shape[-2] for keys, _ in self.pieces)

    def following(self) -> "SegmentLayer":
        return SegmentLayer((*self.pieces, self.own))


def first_segment_cache(num_layers: int) -> Cache:
    """A cache for training: one object per segment, so that every segment can be run again on its own."""
    return Cache(layers=[SegmentLayer() for _ in range(num_layers)])


def next_segment_cache(cache: Cache) -> Cache:
    return Cache(layers=[layer.following() for layer in cache.layers])


@dataclass
class Block:
    """A block that was opened and is to be decoded: what the next segment of its row begins with."""

    site: BlockSite
    latents: Tensor  # (P, D) those not decoded yet: all, or the last in autoregressive mode
    positions: Tensor  # (P, 3)
    end_position: Tensor  # (3,)
    decoded: list[list[Tensor]] = field(default_factory=list)  # per layer, hidden states of latents decoded already


@dataclass
class Runs:
    """A row cut at its blocks: the text of each of its segments."""

    embeds: tuple[Tensor, ...]  # (run, D)
    positions: tuple[Tensor, ...]  # (run, 3), as if blocks took no position
    attended: tuple[Tensor, ...]  # (run,) bool
    shift: int = 0  # positions that the blocks so far took


@dataclass
class Piece:
    """One row's part of one segment: [latents][</latent>][run][controls]."""

    block: Block | None
    opening: BlockSite | None
    num_latents: int = 0
    num_ends: int = 0
    num_run: int = 0
    open_position: Tensor | None = None  # (3,) of the `<latent>` that ends the run
    embeds: Tensor | None = None
    positions: Tensor | None = None
    attended: Tensor | None = None
    is_token: Tensor | None = None
    runs: Runs | None = None
    row: int = 0


@dataclass
class Segment:
    pieces: list[Piece]
    layers: list[Tensor]  # (B, T, D): the last hidden state, then one per layer if asked for


def split_runs(values: Tensor, sites: list[BlockSite]) -> tuple[Tensor, ...]:
    """Cut one row at its blocks; placeholders and what stands between `<latent>` and `</latent>` fall away."""
    sizes, at = [], 0
    for site in sites:
        sizes += [site.column + 1 - at, site.num_pads]
        at = site.column + 1 + site.num_pads
    return values.split([*sizes, values.shape[0] - at])[::2]


def join_row(segments: list[Segment], row: int, layer: int) -> Tensor:
    """Put the hidden states of one row back in the order of its `input_ids`: (S, D)."""
    parts = []
    for segment in segments:
        piece, values = segment.pieces[row], segment.layers[layer][row]
        sizes = [piece.num_latents, piece.num_ends, piece.num_run]
        latents, end, run, rest = values.split([*sizes, values.shape[0] - sum(sizes)])
        if piece.block is not None and piece.block.site.num_pads:
            parts += [decoded[layer] for decoded in piece.block.decoded] + [latents]
        parts.append(end)
        if piece.opening is None:
            parts.append(run)
        elif piece.opening.num_pads:
            parts += [run, rest[: len(piece.embeds) - sum(sizes)]]
        else:
            # A lone `<latent>` answers with what follows its `</latent>`, in the next segment.
            parts.append(run[:-1])
    return torch.cat(parts)
