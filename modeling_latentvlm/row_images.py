"""Which image features belong to which row of a batch."""

import torch
from torch import Tensor

from modeling_latentvlm.latent_former import RowImages


def collect_row_images(
    input_ids: Tensor,
    tokens: dict[int, str],
    features: dict[int, tuple[Tensor, ...]],
    grids: dict[int, list[tuple[int, int, int]]],
    earlier: list[RowImages | None],
) -> tuple[list[RowImages | None], dict[int, list[Tensor | None]]]:
    """Deal the encoded images and videos out to the rows that hold their placeholders.

    Args:
        tokens: placeholder token -> what it stands for, in the order in which a row's features are joined.
        features: placeholder token -> the merged features of each item, each (t * h * w, D), in batch order.
        grids: placeholder token -> (t, h, w) of each item, in merged patches.
        earlier: per row, images it has from earlier turns.

    Returns:
        Per row all its images, and per placeholder token the new features of each row, to be written into its embeddings.

    Raises:
        ValueError: a row's placeholders are not what a whole number of its images fill.
    """
    rows: list[list[tuple[Tensor, list[tuple[int, int]]]]] = [[] for _ in range(input_ids.shape[0])]
    placeholders: dict[int, list[Tensor | None]] = {}
    for token, name in tokens.items():
        placeholders[token] = [None] * len(rows)
        counts = (input_ids == token).sum(dim=1).tolist()
        items = iter(zip(features.get(token, ()), grids.get(token, ())))
        for row, count in enumerate(counts):
            filled, before = 0, len(rows[row])
            while filled < count:
                item = next(items, None)
                if item is None or filled + len(item[0]) > count:
                    available = filled + (0 if item is None else len(item[0]))
                    raise ValueError(
                        f"Row {row} of `input_ids` has {count} {name} placeholders, but its {name}s have {available} features."
                    )
                values, (frames, height, width) = item
                rows[row].append((values, [(height, width)] * frames))
                filled += len(values)
            if filled:
                placeholders[token][row] = torch.cat([values for values, _ in rows[row][before:]])
        left = sum(1 for _ in items)
        if left:
            raise ValueError(
                f"{left} {name}s were given that no row of `input_ids` has placeholders for ({counts} by row)."
            )
    return [join(items, previous) for items, previous in zip(rows, earlier)], placeholders


def join(items: list[tuple[Tensor, list[tuple[int, int]]]], earlier: RowImages | None) -> RowImages | None:
    if not items:
        return earlier
    before = [] if earlier is None else [(earlier.features, earlier.grids)]
    items = before + items
    return RowImages(torch.cat([values for values, _ in items]), [grid for _, grids in items for grid in grids])


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
        patches = grid_thw.prod(dim=-1)
        sizes = (patches // merge_size**2).tolist()
        is_placeholder = input_ids == token
        if sum(sizes) == int(is_placeholder[:, seen:].sum()):
            continue
        keep = new_items(sizes, is_placeholder[:, :seen].sum(dim=1).tolist(), is_placeholder.sum(dim=1).tolist())
        parts = vision[pixels].split(patches.tolist())
        vision[f"{kind}_grid_thw"] = grid_thw[keep] if keep else None
        vision[pixels] = torch.cat([parts[index] for index in keep]) if keep else None
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
