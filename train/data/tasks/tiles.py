"""Pictures of tiles that are one ring: what the tasks `hops` and `arrows` share.

A picture holds one square tile of every color, each in a merged patch (28 pixels) of its own, so that one token sees one tile.
On level "easy" there are 8 tiles, on "hard" 16 of twice as many colors; a tile is named by its color alone on both, so that what a
step is about is one word. Each tile leads to one other, and all are one ring: every tile is led to once, and none is
met twice. At most half of the ring is asked for, so that the way back from the start is not shorter.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from PIL import Image

from train.data.tasks.layout import deal_layout, num_cells, require_size
from train.data.tasks.photos import draw_calm_background
from train.data.tasks.sample import PATCH_MULTIPLE, Request, Sample, Step
from train.data.tasks.serial import count_steps, serial_answer
from train.data.tasks.shapes import COLORS, MORE_COLORS, Box


TILE_COLORS = {"easy": tuple(COLORS), "hard": (*COLORS, *MORE_COLORS)}
MOST_STEPS = {level: len(colors) // 2 for level, colors in TILE_COLORS.items()}
ENLARGED = 2  # merged patches a side of an assistant's picture
LEAST_HARD = 224  # pixels a side; in 112 the tiles would fill all cells

Cell = tuple[int, int]


class Ring(NamedTuple):
    """`cells[color]` is (row, column) of a tile, `following[color]` the color of the tile that it leads to."""

    cells: dict[str, Cell]
    following: dict[str, str]


Paint = Callable[[Image.Image, Ring, str, Box], None]  # paints the tile of a color into a box of a picture


def deal_ring(
    request: Request, place: Callable[[list[str]], dict[str, Cell]], layout: Callable[[Ring], Any]
) -> tuple[Ring, str, int]:
    """Deal colors to the tiles; return the ring, and a start and a number of steps that lead to a balanced answer.

    Args:
        place: gives the cell of every tile; it is given their colors in the order of the ring, the start's first.

    Raises:
        ValueError: the picture is too small for its level.
    """
    if request.level == "hard":
        require_size(request, LEAST_HARD)
    colors = TILE_COLORS[request.level]
    answer = request.balanced(colors)
    num_steps = count_steps(request, len(colors), MOST_STEPS[request.level])

    def draw() -> tuple[Ring, str]:
        order = [color for color in colors if color != answer]
        request.rng.shuffle(order)
        order.insert(num_steps, answer)
        cells, following = place(order), dict(zip(order, order[1:] + order[:1]))
        # In the order of the colors, so that nothing that is written says where the way begins.
        return Ring(*({color: one[color] for color in colors} for one in (cells, following))), order[0]

    ring, start = deal_layout(request, draw, lambda drawn: layout(drawn[0]))
    return ring, start, num_steps


def ask_tiles(
    request: Request,
    ring: Ring,
    asked: list[tuple[str, int]],
    paint: Paint,
    question: Callable[[str, int], str],
    shown: dict[str, dict[str, str]],
) -> list[Sample]:
    """Ask about the tiles that several starts and numbers of steps lead to. The samples share the painted pictures.

    Args:
        shown: what each tile shows besides its color, for `objects`.
    """
    picture = draw_calm_background(request)
    for color, cell in ring.cells.items():
        paint(picture, ring, color, cell_box(cell))
    enlarge = cache(lambda color: _enlarge(ring, color, paint))
    contents = {color: color for color in ring.cells}
    samples = []
    for start, num_steps in asked:
        serial = serial_answer(ring.following, contents, start, num_steps)
        passed = serial.way[: num_steps + 1]
        # The content comes first: the state that a model is in before it is then the state that predicts it.
        steps = [
            Step(f"{color} {number}", enlarge(color), cell_box(ring.cells[color]), color)
            for number, color in enumerate(passed[1:], 1)
        ]
        objects = [
            {"color": color, **shown[color], "box": list(cell_box(cell)), "asked": color in passed}
            for color, cell in ring.cells.items()
        ]
        text, choices = question(start, num_steps), TILE_COLORS[request.level]
        samples.append(Sample(request, picture, text, passed[-1], choices, steps, objects, num_cells(request), serial))
    return samples


def numbers_of(ring: Ring, start: str, level: str) -> range:
    """Every number of steps that can be asked for."""
    return range(1, MOST_STEPS[level] + 1)


def all_cells(request: Request) -> list[Cell]:
    side = range(num_cells(request))
    return [(row, column) for row in side for column in side]


def cell_box(cell: Cell) -> Box:
    top, left = (line * PATCH_MULTIPLE for line in cell)
    return left, top, left + PATCH_MULTIPLE, top + PATCH_MULTIPLE


def _enlarge(ring: Ring, color: str, paint: Paint) -> Image.Image:
    """The tile in every merged patch: each token of the picture shows what the tower knows of a cell."""
    picture = Image.new("RGB", (ENLARGED * PATCH_MULTIPLE, ENLARGED * PATCH_MULTIPLE), (128, 128, 128))
    for row in range(ENLARGED):
        for column in range(ENLARGED):
            paint(picture, ring, color, cell_box((row, column)))
    return picture
