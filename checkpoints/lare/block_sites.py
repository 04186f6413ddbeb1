"""Where blocks stand in `input_ids`, read and checked.

A block stands there either whole (`<latent>`, a placeholder for each control and latent, `</latent>`: what the processor
writes) or as `<latent>` alone (what `generate` returns).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .block_latents import BlockLatents, BlockTokens


@dataclass
class BlockSite:
    """Where a row opens a block. `num_pads` placeholders and `</latent>` follow, or (0) they are left to the model."""

    row: int
    column: int  # of `<latent>` in `input_ids`
    num_pads: int
    grid: tuple[int, int] | None  # None: predicted


def find_block_sites(
    input_ids: Tensor,
    tokens: BlockTokens,
    latents: BlockLatents,
    latent_grid_hw: Tensor | None,
    open_ended: bool = False,
) -> list[list[BlockSite]]:
    """Find the blocks of every row, in order, and give them their grids.

    Args:
        open_ended: a `<latent>` that ends its row may go without a grid: an answer was cut off there.

    Raises:
        ValueError: the tokens of a block, the number of blocks, or a grid are not what they must be.
    """
    start, pad, end = tokens
    special = (input_ids == start) | (input_ids == pad) | (input_ids == end)
    sites: list[list[BlockSite]] = [[] for _ in range(input_ids.shape[0])]
    if latent_grid_hw is None and not special.any():
        return sites
    grids = None if latent_grid_hw is None else read_grids(latent_grid_hw)
    rows = input_ids.tolist()
    for row, columns in enumerate(special_columns(special)):
        sites[row] = parse_row(row, rows[row], columns, tokens)
    flat = [site for row in sites for site in row]
    if grids is None:
        whole = [site for site in flat if site.num_pads]
        if whole:
            raise ValueError(
                f"Row {whole[0].row} of `input_ids` holds a block of {whole[0].num_pads} placeholders, but no "
                "`latent_grid_hw` says its height and width."
            )
        return sites
    ends = [site for site in flat if open_ended and site.column == input_ids.shape[1] - 1]
    if ends and len(grids) == len(flat) - len(ends):
        flat = [site for site in flat if site not in ends]
    if len(grids) != len(flat):
        raise ValueError(
            f"`latent_grid_hw` gives {len(grids)} grids, but `input_ids` holds {len(flat)} blocks "
            f"({[len(row) for row in sites]} by row)."
        )
    for site, grid in zip(flat, grids):
        latents.check_grid(grid, f"row {site.row}")
        expected = latents.num_controls + grid[0] * grid[1]
        if site.num_pads not in (0, expected):
            raise ValueError(
                f"A block of {grid[0]} x {grid[1]} takes {expected} placeholders, but row {site.row} of `input_ids` "
                f"has {site.num_pads} after its `<latent>` at column {site.column}."
            )
        site.grid = grid
    return sites


def read_grids(latent_grid_hw) -> list[tuple[int, int]]:
    """(height, width) pairs from a tensor or nested lists of whole numbers."""
    try:
        grids = torch.as_tensor(latent_grid_hw)
    except (TypeError, ValueError, RuntimeError) as error:  # rows of unequal length, words, None
        raise ValueError(
            f"`latent_grid_hw` must be whole numbers of shape (blocks, 2), got {latent_grid_hw!r}."
        ) from error
    if grids.ndim != 2 or grids.shape[1] != 2 or grids.is_floating_point():
        raise ValueError(
            f"`latent_grid_hw` must be whole numbers of shape (blocks, 2), got shape {tuple(grids.shape)} of {grids.dtype}."
        )
    return [tuple(grid) for grid in grids.tolist()]


def special_columns(special: Tensor) -> list[list[int]]:
    """The columns that are True, by row."""
    columns: list[list[int]] = [[] for _ in range(special.shape[0])]
    for row, column in special.nonzero().tolist():
        columns[row].append(column)
    return columns


def parse_row(row: int, ids: list[int], columns: list[int], tokens: BlockTokens) -> list[BlockSite]:
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
