"""Visual search in large scenes: what is asked for covers about a hundredth of the picture, or less.

The questions are those of `shapes.py`. On level "easy" the picture is a grid of merged patches (28 pixels) and each
thing fills one of them, before a calm background; on "hard" there are about twice as many things, they vary in size,
stand across patches, and a photo in full contrast is behind them. The layout (see `layout.py`) is which thing stands in
which cell.
"""

from train.data.tasks.layout import deal_layout, num_cells, require_size
from train.data.tasks.photos import draw_background, draw_calm_background
from train.data.tasks.sample import PATCH_MULTIPLE, Request, Sample
from train.data.tasks.shapes import (
    DIGITS,
    Box,
    Scene,
    Thing,
    ask_color,
    ask_count,
    ask_digit,
    ask_position,
    deal_cells,
    describe_scene,
    draw_thing,
)


LETTERS = tuple("ABCEFHJKLMNPRSTUVXYZ")  # none that is easily taken for a digit or another letter
MARGIN = 2  # pixels between a thing and its patch
HARD_CELL = 37  # pixels; things stand freely in it, so that patches cut them anywhere
HARD_SIZE = (20, 32)  # pixels
LEAST_HARD = 224  # pixels a side, for the crowd of the hard level

Cell = tuple[int, int]


def scene_grid(request: Request) -> int:
    """Cells a side."""
    return num_cells(request) if request.level == "easy" else 2 * (request.image_size // (2 * HARD_CELL))


def scene_layout(request: Request, things: list[Thing], cells: list[Cell]) -> list:
    """Return which thing stands in which cell, in reading order: the layout of every scene of things."""
    return ["scene", scene_grid(request), sorted([*cell, *thing] for cell, thing in zip(cells, things))]


def paint_cells(request: Request, things: list[Thing], cells: list[Cell], num_asked: int) -> Scene:
    """Paint things in given cells."""
    is_easy = request.level == "easy"
    picture = (draw_calm_background if is_easy else draw_background)(request)
    boxes = [(_box_in_patch if is_easy else _box_in_cell)(request, cell) for cell in cells]
    for thing, box in zip(things, boxes):
        draw_thing(picture, thing, box)
    return Scene(picture, things, boxes, num_asked, num_cells(request) if is_easy else None, is_easy)


def paint_large_scene(request: Request, asked: list[Thing], others: list[Thing], quadrant: str | None = None) -> Scene:
    """Paint all things, a single asked one in `quadrant` where that is given; see `shapes.paint_scene`.

    Raises:
        ValueError: the picture is too small for its level.
    """
    things = asked + others
    if request.level == "hard":
        require_size(request, LEAST_HARD)
    cells = deal_layout(
        request,
        lambda: deal_cells(request.rng, scene_grid(request), len(asked), len(others), quadrant),
        lambda cells: scene_layout(request, things, cells),
    )
    return paint_cells(request, things, cells, len(asked))


def _box_in_patch(request: Request, cell: Cell) -> Box:
    top, left = (line * PATCH_MULTIPLE + MARGIN for line in cell)
    side = PATCH_MULTIPLE - 2 * MARGIN
    return left, top, left + side, top + side


def _box_in_cell(request: Request, cell: Cell) -> Box:
    rng, grid = request.rng, scene_grid(request)
    side = rng.randint(*HARD_SIZE)
    top, left = (
        line * request.image_size // grid + rng.randint(0, request.image_size // grid - side) for line in cell
    )
    return left, top, left + side, top + side


def _crowd(request: Request) -> tuple[int, int]:
    return (5, 11) if request.level == "easy" else (15, 23)


def ask_search_color(request: Request) -> Sample:
    return ask_color(request, paint_large_scene, _crowd(request))


def ask_search_count(request: Request) -> Sample:
    return ask_count(request, paint_large_scene, total=10 if request.level == "easy" else 20)


def ask_search_position(request: Request) -> Sample:
    return ask_position(request, paint_large_scene, per_quadrant=2 if request.level == "easy" else 5)


def ask_search_text(request: Request) -> Sample:
    """Which digit, on level "hard" which letter, is on the one thing of a given color and shape?"""
    signs, kind = (DIGITS, "digit") if request.level == "easy" else (LETTERS, "letter")
    return ask_digit(request, paint_large_scene, _crowd(request), signs, kind)


def describe_large_scene(request: Request) -> Sample:
    """What is where, with a quarter to a half of all cells filled: every picture teaches much about seeing."""
    cells = num_cells(request) ** 2
    # The fullest scene still fits where the middle lines of an odd grid stay empty.
    numbers = tuple(str(number) for number in range(cells // 4, cells // 2))
    return describe_scene(request, paint_large_scene, num_cells(request), numbers)
