"""Sequences with latents in them: what a KV cache must remember, and how a batch is cut into segments.

A block's latents depend on the hidden states before it, so a sequence with K blocks enters the language model as K + 1
segments, each one forward over what is new:

    segment 0:  text ... <latent> e_s e_q e_v          segment 1:  z_1 .. z_N </latent> text ...

Rows of a batch open blocks at different places and of different sizes. Segment k of every row is padded to the longest;
padding is masked out of the cache and consumes no position. Training and `generate` go through the same code.

Shapes: B rows, S new tokens, L cache slots so far, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


@dataclass
class LatentState:
    """What a cache with latents in it needs beyond keys and values; kept as `cache.latent_state`."""

    attention_mask: Tensor  # (B, L) bool, the slots that may be attended
    is_token: Tensor  # (B, L) bool, the slots that hold a column of `input_ids`; others hold latents or padding
    next_position: Tensor  # (B,) rotary position of the next token
    has_holes: bool  # whether any slot is masked; without, attention keeps its fast path
    num_tokens: int = 0  # columns of `input_ids` in the cache
    images: list = field(default_factory=list)  # B x RowImages | None

    @classmethod
    def empty(cls, batch_size: int, device: torch.device, images: list) -> "LatentState":
        slots = torch.zeros(batch_size, 0, dtype=torch.bool, device=device)
        return cls(slots, slots, torch.zeros(batch_size, dtype=torch.long, device=device), False, 0, images)

    def append(self, attended: Tensor | None, is_token: Tensor | None, length: int) -> Tensor | None:
        """Add `length` slots and return the mask for attention; None for a mask means all of them."""
        ones = self.attention_mask.new_ones(self.attention_mask.shape[0], length)
        self.has_holes |= attended is not None
        self.attention_mask = torch.cat([self.attention_mask, ones if attended is None else attended], dim=1)
        self.is_token = torch.cat([self.is_token, ones if is_token is None else is_token], dim=1)
        return self.attention_mask.long() if self.has_holes else None

    def reorder(self, rows: Tensor) -> None:
        """Follow the cache through beam search. Beams move within their prompt, so `images` stay where they are."""
        self.attention_mask, self.is_token = self.attention_mask[rows], self.is_token[rows]
        self.next_position = self.next_position[rows]

    def repeat_interleave(self, repeats: int) -> None:
        """Follow the cache when every row is continued `repeats` times."""
        self.attention_mask = self.attention_mask.repeat_interleave(repeats, dim=0)
        self.is_token = self.is_token.repeat_interleave(repeats, dim=0)
        self.next_position = self.next_position.repeat_interleave(repeats, dim=0)
        self.images = [images for images in self.images for _ in range(repeats)]

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


class SegmentLayer(DynamicLayer):
    """Keys and values of one segment beside those of the earlier ones, never written twice.

    Under gradient checkpointing a layer runs again in the backward pass. Then it must see what it saw before: the
    pieces before its own segment, as the tensors they were, and its own result must not be appended a second time.
    """

    def __init__(self, pieces: tuple[tuple[Tensor, Tensor], ...] = ()):
        super().__init__()
        self.pieces, self.own = pieces, None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
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
class BlockSite:
    """Where a row opens a block. `num_pads` placeholders and `</latent>` follow, or (0) they are left to the model."""

    row: int
    column: int  # of `<latent>` in `input_ids`
    num_pads: int
    grid: tuple[int, int] | None  # None: predicted


def find_block_sites(input_ids: Tensor, config, latent_grid_hw: Tensor | None) -> list[list[BlockSite]]:
    """Find the blocks of every row, in order, and give them their grids.

    A block stands in `input_ids` either whole (`<latent>`, a placeholder for each control and latent, `</latent>`: what
    the processor writes) or as `<latent>` alone (what `generate` returns).

    Raises:
        ValueError: the tokens of a block, the number of blocks, or a grid are not what they must be.
    """
    start, pad, end = config.latent_start_token_id, config.latent_pad_token_id, config.latent_end_token_id
    special = (input_ids == start) | (input_ids == pad) | (input_ids == end)
    sites: list[list[BlockSite]] = [[] for _ in range(input_ids.shape[0])]
    if latent_grid_hw is None and not special.any():
        return sites
    grids = None if latent_grid_hw is None else [tuple(grid) for grid in latent_grid_hw.tolist()]
    rows = input_ids.tolist()
    for row, columns in enumerate(special_columns(special)):
        sites[row] = parse_row(row, rows[row], columns, (start, pad, end))
    flat = [site for row in sites for site in row]
    if grids is None:
        whole = [site for site in flat if site.num_pads]
        if whole:
            raise ValueError(
                f"Row {whole[0].row} of `input_ids` holds a block of {whole[0].num_pads} placeholders, but no "
                "`latent_grid_hw` says its height and width."
            )
        return sites
    if len(grids) != len(flat):
        raise ValueError(
            f"`latent_grid_hw` gives {len(grids)} grids, but `input_ids` holds {len(flat)} blocks "
            f"({[len(row) for row in sites]} by row)."
        )
    for site, grid in zip(flat, grids):
        check_grid(grid, config, f"row {site.row}")
        expected = config.num_control_tokens + grid[0] * grid[1]
        if site.num_pads not in (0, expected):
            raise ValueError(
                f"A block of {grid[0]} x {grid[1]} takes {expected} placeholders, but row {site.row} of `input_ids` "
                f"has {site.num_pads} after its `<latent>` at column {site.column}."
            )
        site.grid = grid
    return sites


def special_columns(special: Tensor) -> list[list[int]]:
    """The columns that are True, by row."""
    columns: list[list[int]] = [[] for _ in range(special.shape[0])]
    for row, column in special.nonzero().tolist():
        columns[row].append(column)
    return columns


def parse_row(row: int, ids: list[int], columns: list[int], tokens: tuple[int, int, int]) -> list[BlockSite]:
    """Read the blocks of one row off its special columns."""
    start, pad, end = tokens
    sites, index = [], 0
    while index < len(columns):
        column = columns[index]
        if ids[column] != start:
            name = "placeholder" if ids[column] == pad else "`</latent>`"
            raise ValueError(f"Row {row} of `input_ids` has a latent {name} at column {column} outside any block.")
        stop = column + 1
        while stop < len(ids) and ids[stop] == pad:
            stop += 1
        num_pads = stop - column - 1
        closed = stop < len(ids) and ids[stop] == end
        if (num_pads > 0) != closed:
            raise ValueError(
                f"Row {row} of `input_ids`: the block at column {column} has {num_pads} placeholders and "
                f"{'a' if closed else 'no'} `</latent>`; it takes both, or neither to leave them to the model."
            )
        sites.append(BlockSite(row, column, num_pads, None))
        index += 1 + num_pads + closed
    return sites


def check_grid(grid: Sequence[int], config, where: str) -> None:
    """Raise unless `grid` is a (height, width) that the model can build."""
    if config.latent_mode == "autoregressive":
        if grid[0] != 1 or grid[1] < 1:
            raise ValueError(f"An autoregressive block is 1 x K latents, got {grid[0]} x {grid[1]} in {where}.")
    elif not all(1 <= side <= config.latent_grid_size for side in grid):
        raise ValueError(
            f"A latent grid must lie within 1..{config.latent_grid_size} (`latent_grid_size`) in height and width, "
            f"got {grid[0]} x {grid[1]} in {where}."
        )
