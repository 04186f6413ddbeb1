"""Hops: every tile says which one comes next. Which tile is so many hops after a given one?

A disc in the middle of each tile has the color of the next tile. Nothing else leads to the answer: tiles stand anywhere, the
start and the number of hops are in the question. See `tiles.py` for the ring. The layout (see `layout.py`) is which tile
stands where and what it points to.
"""

from PIL import Image

from train.data.tasks.sample import Request, Sample
from train.data.tasks.serial import SerialTask
from train.data.tasks.shapes import Box, Thing, draw_thing
from train.data.tasks.tiles import TILE_COLORS, Ring, all_cells, ask_tiles, deal_ring, numbers_of


DISC_SIZE = 0.5  # of the side of a tile


def deal_hops(request: Request) -> tuple[Ring, str, int]:
    """Draw a ring whose tiles stand in any cells; return it with a start and a number of hops."""
    colors, cells = TILE_COLORS[request.level], all_cells(request)
    return deal_ring(request, lambda _: dict(zip(colors, request.rng.sample(cells, len(colors)))), hops_layout)


def hops_layout(ring: Ring) -> list:
    """Which tile stands where, and what it points to, in reading order."""
    return ["hops", sorted([list(cell), color, ring.following[color]] for color, cell in ring.cells.items())]


def ask_hops(request: Request, ring: Ring, asked: list[tuple[str, int]]) -> list[Sample]:
    """Ask which tile is so many hops after a start, for several starts and numbers."""
    shown = {color: {"next": ring.following[color]} for color in ring.cells}

    def question(start: str, num_hops: int) -> str:
        return f"Which tile is {num_hops} {'hop' if num_hops == 1 else 'hops'} after {start}?"

    return ask_tiles(request, ring, asked, _paint_tile, question, shown)


def _paint_tile(picture: Image.Image, ring: Ring, color: str, box: Box) -> None:
    left, top, right, bottom = box
    margin = round((right - left) * (1 - DISC_SIZE) / 2)
    draw_thing(picture, Thing(color, "square"), box)
    inside = (left + margin, top + margin, right - margin, bottom - margin)
    draw_thing(picture, Thing(ring.following[color], "circle"), inside)


HOPS = SerialTask(deal_hops, ask_hops, lambda ring: list(ring.cells), numbers_of)
