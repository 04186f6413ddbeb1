"""Hops: every tile says which one comes next. Which tile is so many hops after a given one?

The picture holds one square tile of every color, each in a merged patch (28 pixels) of its own, with a disc in its middle
that has the color of the next tile. Nothing else leads to the answer: tiles stand anywhere, the start and the number of hops
are in the question. The tiles are one ring, so that each is pointed to once, and at most half of the ring is asked for, so
that the way back from the start is not shorter. The assistant's pictures are the tiles on the way, enlarged. The layout (see
`layout.py`) is which tile stands where and what it points to.
"""

from typing import NamedTuple

from PIL import Image

from train.tasks.layout import deal_layout, num_cells
from train.tasks.photos import draw_calm_background
from train.tasks.sample import PATCH_MULTIPLE, Request, Sample, Step
from train.tasks.serial import SerialTask, count_steps, serial_answer
from train.tasks.shapes import COLORS, Thing, draw_thing


MOST_HOPS = {"easy": 4}  # half of the ring
DISC_SIZE = 0.5  # of the side of a tile
ENLARGED = 2  # merged patches a side of an assistant's picture

Cell = tuple[int, int]


class Ring(NamedTuple):
    """`cells[color]` is (row, column) of a tile, `following[color]` the color of the next one."""

    cells: dict[str, Cell]
    following: dict[str, str]


def tile_colors(level: str) -> tuple[str, ...]:
    """The colors of all tiles, which are the possible answers."""
    return tuple(COLORS)


def deal_ring(request: Request) -> tuple[Ring, str, int]:
    """Draw a ring, and a start and a number of hops that lead to a balanced answer."""
    colors = tile_colors(request.level)
    answer = request.balanced(colors)
    num_hops = count_steps(request, len(colors), MOST_HOPS[request.level])
    side = num_cells(request)
    places = [(row, column) for row in range(side) for column in range(side)]

    def draw() -> tuple[Ring, str]:
        order = [color for color in colors if color != answer]
        request.rng.shuffle(order)
        order.insert(num_hops, answer)
        following = dict(zip(order, order[1:] + order[:1]))
        cells = dict(zip(colors, request.rng.sample(places, len(colors))))
        return Ring(cells, {color: following[color] for color in colors}), order[0]

    ring, start = deal_layout(request, draw, lambda drawn: ring_layout(drawn[0]))
    return ring, start, num_hops


def ring_layout(ring: Ring) -> list:
    """Which tile stands where, and what it points to, in reading order."""
    return ["hops", sorted([list(cell), color, ring.following[color]] for color, cell in ring.cells.items())]


def ask_hops(request: Request, ring: Ring, asked: list[tuple[str, int]]) -> list[Sample]:
    """Ask which tile is so many hops after a start, for several starts and numbers."""
    picture = draw_calm_background(request)
    for color, cell in ring.cells.items():
        _paint_tile(picture, ring, color, _box(cell))
    enlarged = {color: _enlarge(ring, color) for color in ring.cells}
    return [_ask(request, ring, picture, enlarged, *question) for question in asked]


def _ask(
    request: Request, ring: Ring, picture: Image.Image, enlarged: dict[str, Image.Image], start: str, num_hops: int
) -> Sample:
    serial = serial_answer(ring.following, {color: color for color in ring.cells}, start, num_hops)
    passed = serial.way[: num_hops + 1]
    # The content comes first: the state that a model is in before it is then the state that predicts it.
    steps = [
        Step(f"{color} {number}", enlarged[color], _box(ring.cells[color]), color)
        for number, color in enumerate(passed[1:], 1)
    ]
    objects = [
        {"color": color, "next": ring.following[color], "box": list(_box(cell)), "asked": color in passed}
        for color, cell in ring.cells.items()
    ]
    question = f"Which tile is {num_hops} {'hop' if num_hops == 1 else 'hops'} after {start}?"
    choices, grid = tile_colors(request.level), num_cells(request)
    return Sample(request, picture, question, passed[-1], choices, steps, objects, grid, serial)


def _box(cell: Cell) -> tuple[int, int, int, int]:
    top, left = (line * PATCH_MULTIPLE for line in cell)
    return left, top, left + PATCH_MULTIPLE, top + PATCH_MULTIPLE


def _paint_tile(picture: Image.Image, ring: Ring, color: str, box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = box
    margin = round((right - left) * (1 - DISC_SIZE) / 2)
    draw_thing(picture, Thing(color, "square"), box)
    inside = (left + margin, top + margin, right - margin, bottom - margin)
    draw_thing(picture, Thing(ring.following[color], "circle"), inside)


def _enlarge(ring: Ring, color: str) -> Image.Image:
    """The tile in every merged patch: each token of the picture shows what the tower knows of a cell."""
    side = ENLARGED * PATCH_MULTIPLE
    picture = Image.new("RGB", (side, side), (128, 128, 128))
    for row in range(ENLARGED):
        for column in range(ENLARGED):
            _paint_tile(picture, ring, color, _box((row, column)))
    return picture


HOPS = SerialTask(deal_ring, ask_hops, lambda ring: list(ring.cells), MOST_HOPS)
