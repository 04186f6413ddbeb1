"""Which layout belongs to which split.

A layout is what a picture shows apart from its background: things in cells, walls, bars, the order of pieces. Its split
is a function of the layout alone, `split_of`, and a sample is only made of a layout of its own split (`deal_layout`
draws until one is). So splits are disjoint, whatever the seeds: a layout found in two splits would have two values of
`split_of`. Photos are dealt to splits as well (`photos.py`), but that proves nothing for two dark regions. The family
`shapes` is older and not dealt so: its things stand at random pixels, its splits are other seeds and other photos.

What each family puts into its layout is coarser than the picture, so that near copies cannot be in two splits either:
cells rather than pixels, never background or question.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

from train.data.tasks.sample import PATCH_MULTIPLE, Request


HELD_OUT = {0: "val", 1: "test"}  # of eight equal shares of all layouts; the other six are for training
Drawn = TypeVar("Drawn")


def split_of(layout: Any) -> str:
    """The split of a layout given as JSON values; lists that stand for sets have to be sorted."""
    digest = hashlib.sha256(json.dumps(layout, sort_keys=True).encode()).digest()
    return HELD_OUT.get(digest[0] % 8, "train")


def deal_layout(request: Request, draw: Callable[[], Drawn], layout: Callable[[Drawn], Any]) -> Drawn:
    """Return the first of what `draw` gives whose layout belongs to the request's split."""
    while True:
        drawn = draw()
        if split_of(layout(drawn)) == request.split:
            return drawn


def num_cells(request: Request) -> int:
    """Cells a side of a picture whose cells are merged patches: one token sees one cell."""
    return request.image_size // PATCH_MULTIPLE


def require_size(request: Request, least: int) -> None:
    """Refuse a picture too small for its level.

    Raises:
        ValueError: fewer than `least` pixels a side.
    """
    if request.image_size < least:
        raise ValueError(
            f"`image_size` must be at least {least} pixels for task {request.task} at level {request.level}, "
            f"got {request.image_size}."
        )
