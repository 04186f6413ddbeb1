"""Which image features belong to which row of a batch."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .block_sites import special_columns
from .prompt_checks import check_grids


@dataclass
class RowImages:
    """The images a row may look at. Videos are one image per temporal slice: relative places collide, the index differs."""

    features: Tensor  # (M, D) merged features, concatenated in order
    grids: list[tuple[int, int]]  # (height, width) of each image, in merged patches
    columns: list[int]  # of each image's first placeholder in the row's tokens, ascending

    def before(self, column: int) -> "RowImages | None":
        """The images that stand before a column: a block never sees what comes after it."""
        count = sum(first < column for first in self.columns)
        if count == len(self.columns):
            return self
        length = sum(height * width for height, width in self.grids[:count])
        return RowImages(self.features[:length], self.grids[:count], self.columns[:count]) if count else None


@dataclass
class PlacedImage:
    """One image or video of a row."""

    column: int  # of its first placeholder
    features: Tensor  # (t * h * w, D)
    grids: list[tuple[int, int]]  # one per temporal slice


def collect_row_images(
    input_ids: Tensor,
    tokens: dict[int, str],
    features: dict[int, tuple[Tensor, ...]],
    grids: dict[int, list[tuple[int, int, int]]],
    earlier: list[RowImages | None],
    seen: int,
) -> tuple[list[RowImages | None], dict[int, list[Tensor | None]]]:
    """Deal the encoded images and videos out to the rows that hold their placeholders.

    Args:
        tokens: placeholder token -> what it stands for.
        features: placeholder token -> the merged features of each item, each (t * h * w, D), in batch order.
        grids: placeholder token -> (t, h, w) of each item, in merged patches.
        earlier: per row, images it has from earlier turns.
        seen: tokens of those earlier turns; `input_ids` holds what comes after them.

    Returns:
        Per row all its images, and per placeholder token the new features of each row, to be written into its embeddings.

    Raises:
        ValueError: a row's placeholders are not what a whole number of its images fill.
    """
    rows: list[list[PlacedImage]] = [[] for _ in range(input_ids.shape[0])]
    placeholders: dict[int, list[Tensor | None]] = {}
    for token, name in tokens.items():
        pending = iter(zip(features.get(token, ()), grids.get(token, ())))
        columns = special_columns(input_ids == token)
        taken = [take_items(row, columns[row], pending, name, seen) for row in range(len(rows))]
        placeholders[token] = [torch.cat([item.features for item in items]) if items else None for items in taken]
        for row, items in zip(rows, taken):
            row.extend(items)
        left = sum(1 for _ in pending)
        if left:
            raise ValueError(
                f"{left} more {name}s were given than the rows of `input_ids` have placeholders for "
                f"({[len(row) for row in columns]} by row)."
            )
    return [join(items, previous) for items, previous in zip(rows, earlier)], placeholders


def take_items(row: int, columns: list[int], pending: Iterator, name: str, seen: int) -> list[PlacedImage]:
    """Take as many of the pending images as fill the placeholders of one row."""
    items, filled = [], 0
    while filled < len(columns):
        values, grid = next(pending, (None, None))
        reached = filled + (0 if values is None else len(values))
        if values is None or reached > len(columns):
            raise ValueError(
                f"Row {row} of `input_ids` has {len(columns)} {name} placeholders, but its {name}s have {reached} features."
            )
        frames, height, width = grid
        items.append(PlacedImage(seen + columns[filled], values, [(height, width)] * frames))
        filled = reached
    return items


def join(items: list[PlacedImage], earlier: RowImages | None) -> RowImages | None:
    """Put a row's images in the order in which they stand, behind those of earlier turns."""
    if not items:
        return earlier
    items = sorted(items, key=lambda item: item.column)
    new = RowImages(
        torch.cat([item.features for item in items]),
        [grid for item in items for grid in item.grids],
        [item.column for item in items for _ in item.grids],
    )
    if earlier is None:
        return new
    return RowImages(
        torch.cat([earlier.features, new.features]), earlier.grids + new.grids, earlier.columns + new.columns
    )


def drop_cached_items(input_ids: Tensor, seen: int, vision: dict, config, merge_size: int) -> dict:
    """Leave out the images and videos whose placeholders a cache holds already; keep all if only new ones were given.

    Args:
        seen: columns of `input_ids` in the cache.
        vision: the vision inputs of the processor.
    """
    vision = dict(vision)
    for kind, token, pixels in (
        ("image", config.image_token_id, "pixel_values"),
        ("video", config.video_token_id, "pixel_values_videos"),
    ):
        grid_thw = vision[f"{kind}_grid_thw"]
        if grid_thw is None:
            continue
        patches = [t * h * w for t, h, w in check_grids(grid_thw, kind, merge_size)]
        sizes = [count // merge_size**2 for count in patches]
        is_placeholder = input_ids == token
        if sum(sizes) == int(is_placeholder[:, seen:].sum()):
            continue
        if len(vision[pixels]) != sum(patches):
            raise ValueError(
                f"`{kind}_grid_thw` names {sum(patches)} patches, but the {kind}s have {len(vision[pixels])}."
            )
        keep = new_items(sizes, is_placeholder[:, :seen].sum(dim=1).tolist(), is_placeholder.sum(dim=1).tolist())
        parts = vision[pixels].split(patches)
        vision[f"{kind}_grid_thw"] = grid_thw[keep] if keep else None
        vision[pixels] = torch.cat([parts[index] for index in keep]) if keep else None
        if kind == "video" and vision["second_per_grid_ts"] is not None:
            vision["second_per_grid_ts"] = [vision["second_per_grid_ts"][index] for index in keep]
    return vision


def new_items(sizes: list[int], cached: list[int], total: list[int]) -> list[int]:
    """Numbers of the items that start behind the cached placeholders of their row."""
    keep, item = [], 0
    for row_cached, row_total in zip(cached, total):
        filled = 0
        while filled < row_total and item < len(sizes):
            if filled >= row_cached:
                keep.append(item)
            filled += sizes[item]
            item += 1
    return keep
