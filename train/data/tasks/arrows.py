"""Arrows: the arrow on every tile points to another one. Which tile is reached after so many arrows?

A tile leads to the nearest one in the direction of its arrow, one of eight. No arrow points out of the picture, and together
they are one ring (see `tiles.py`). Where tiles lead is a matter of places alone: colors are dealt at random.

The next tile is near, and so would be the one after it: a guess at what stands two arrows away would be right twice as
often as by chance. Of many ways, that one is therefore taken which ends as far from the start, for every number of
arrows, as tiles drawn at random stand from one. The layout (see `layout.py`) is which tile stands where and its arrow.
"""

from functools import lru_cache
from random import Random

from PIL import Image, ImageDraw

from train.data.tasks.layout import require_size
from train.data.tasks.sample import Request, Sample
from train.data.tasks.serial import SerialTask, count_steps
from train.data.tasks.shapes import LIGHT_COLORS, SMOOTHING, Box, Thing, draw_thing
from train.data.tasks.tiles import (
    LEAST_HARD,
    MOST_STEPS,
    TILE_COLORS,
    Cell,
    Ring,
    all_cells,
    ask_tiles,
    deal_ring,
    numbers_of,
)


DIRECTIONS = {
    f"{height} {side}".strip(): (down, right)
    for height, down in (("up", -1), ("", 0), ("down", 1))
    for side, right in (("left", -1), ("", 0), ("right", 1))
    if down or right
}
NUM_RINGS = 16  # drawn for each sample; every tile of each is tried as the start, in both directions
ASKED_WEIGHT = 8  # of the asked number of arrows; others of the same picture count 1
MOST_TRIES = 200  # calls of the search for a ring, before other cells are drawn
# Tip, barbs and shaft of an arrow to the right, in [-1, 1] x [-1, 1].
ARROW = [(0.62, 0.0), (0.05, -0.55), (0.05, -0.2), (-0.6, -0.2), (-0.6, 0.2), (0.05, 0.2), (0.05, 0.55)]


def deal_arrows(request: Request) -> tuple[Ring, str, int]:
    """Draw a ring of tiles each of which sees the next; return it with a start and a number of arrows."""
    if request.level == "hard":
        require_size(request, LEAST_HARD)
    way = _draw_way(request)  # once: colors alone are dealt again for a layout of the split
    return deal_ring(request, lambda order: dict(zip(order, way, strict=True)), arrows_layout)


def arrows_layout(ring: Ring) -> list:
    """Which tile stands where, and where its arrow points, in reading order."""
    return ["arrows", sorted([list(cell), color, arrow_of(ring, color)] for color, cell in ring.cells.items())]


def arrow_of(ring: Ring, color: str) -> str:
    """The name of the direction in which the next tile lies."""
    steps = [next_line - line for line, next_line in zip(ring.cells[color], ring.cells[ring.following[color]])]
    return _name_direction(*((step > 0) - (step < 0) for step in steps))


def _name_direction(down: int, right: int) -> str:
    return next(name for name, step in DIRECTIONS.items() if step == (down, right))


def visible_from(cell: Cell, cells: set[Cell], side: int) -> list[Cell]:
    """The nearest of `cells` in every direction in which there is one."""
    found = []
    for down, right in DIRECTIONS.values():
        row, column = cell[0] + down, cell[1] + right
        while 0 <= row < side and 0 <= column < side:
            if (row, column) in cells:
                found.append((row, column))
                break
            row, column = row + down, column + right
    return found


def _draw_ring(rng: Random, places: list[Cell], num_tiles: int) -> list[Cell]:
    """Draw cells, and a way through all of them and back in which each sees the next (depth first)."""
    side = round(len(places) ** 0.5)
    while True:
        cells = rng.sample(places, num_tiles)
        visible = {cell: visible_from(cell, set(cells), side) for cell in cells}
        tries = 0

        def extend(way: list[Cell]) -> list[Cell] | None:
            nonlocal tries
            tries += 1
            if len(way) == num_tiles:
                return way if way[0] in visible[way[-1]] else None  # noqa: B023 (called in this round only)
            onward = [cell for cell in visible[way[-1]] if cell not in way]  # noqa: B023
            for cell in rng.sample(onward, len(onward)):
                if tries > MOST_TRIES:
                    return None
                if (found := extend([*way, cell])) is not None:
                    return found
            return None

        if (found := extend(cells[:1])) is not None:
            return found


def _draw_way(request: Request) -> list[Cell]:
    """Draw rings, and take the start and direction that hide best how far from the start each way ends."""
    rng, places = request.rng, all_cells(request)
    num_tiles, most = len(TILE_COLORS[request.level]), MOST_STEPS[request.level]
    num_steps, last = count_steps(request, num_tiles, most), max(places)[0]
    rings = [_draw_ring(rng, places, num_tiles) for _ in range(NUM_RINGS)]
    start, _, *others = _draw_ring(rng, places, num_tiles)
    # What is wanted after 2, 3, .. arrows: tiles of another ring that stand where any tile may. The start has to stand as far
    # from the border as there, since far tiles are seen from there only.
    wanted, wanted_inset = [_offset(start, cell) for cell in rng.sample(others, most - 1)], _inset(start, last)
    weights = [ASKED_WEIGHT if number == num_steps else 1 for number in range(2, most + 1)]
    ways = [one[first:] + one[:first] for ring in rings for one in (ring, ring[::-1]) for first in range(num_tiles)]
    rng.shuffle(ways)  # the first of equals is taken

    def misfit(way: list[Cell]) -> int:
        offsets = [_offset(way[0], cell) for cell in way[2 : most + 1]]
        apart = [_square_distance(one, other) for one, other in zip(offsets, wanted, strict=True)]
        inset = ASKED_WEIGHT * _square_distance(_inset(way[0], last), wanted_inset)
        return inset + sum(weight * one for weight, one in zip(weights, apart, strict=True))

    return min(ways, key=misfit)


def _square_distance(one: Cell, other: Cell) -> int:
    return (one[0] - other[0]) ** 2 + (one[1] - other[1]) ** 2


def _inset(cell: Cell, last: int) -> tuple[int, int]:
    """Rows and columns between a cell and the nearest borders, the smaller number first."""
    near, far = sorted(min(line, last - line) for line in cell)
    return near, far


def _offset(one: Cell, other: Cell) -> tuple[int, int]:
    """Rows and columns between two cells, the smaller number first: what turning or mirroring the picture keeps."""
    near, far = sorted(abs(line - other_line) for line, other_line in zip(one, other))
    return near, far


def ask_arrows(request: Request, ring: Ring, asked: list[tuple[str, int]]) -> list[Sample]:
    """Ask which tile is so many arrows after a start, for several starts and numbers."""
    shown = {color: {"arrow": arrow_of(ring, color), "next": ring.following[color]} for color in ring.cells}

    def question(start: str, num_arrows: int) -> str:
        return f"Which tile is {num_arrows} {'arrow' if num_arrows == 1 else 'arrows'} after {start}?"

    return ask_tiles(request, ring, asked, _paint_tile, question, shown)


def _paint_tile(picture: Image.Image, ring: Ring, color: str, box: Box) -> None:
    draw_thing(picture, Thing(color, "square"), box)
    arrow = _draw_arrow(arrow_of(ring, color), color in LIGHT_COLORS, box[2] - box[0])
    picture.paste(arrow, box[:2], arrow)


@lru_cache(maxsize=64)
def _draw_arrow(direction: str, is_dark: bool, side: int) -> Image.Image:
    """Draw an arrow on a transparent square."""
    large = side * SMOOTHING
    down, right = DIRECTIONS[direction]
    length = (down**2 + right**2) ** 0.5
    cosine, sine = right / length, down / length
    corners = [(large / 2 * (1 + cosine * x - sine * y), large / 2 * (1 + sine * x + cosine * y)) for x, y in ARROW]
    ink, rim = ((0, 0, 0), (255, 255, 255)) if is_dark else ((255, 255, 255), (0, 0, 0))
    patch = Image.new("RGBA", (large, large), (*rim, 0))
    draw = ImageDraw.Draw(patch)
    draw.line(corners + corners[:2], fill=rim, width=SMOOTHING * 2, joint="curve")
    draw.polygon(corners, fill=ink)
    return patch.reduce(SMOOTHING)


ARROWS = SerialTask(deal_arrows, ask_arrows, lambda ring: list(ring.cells), numbers_of)
