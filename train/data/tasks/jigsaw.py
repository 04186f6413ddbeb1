"""Visual synthesis: a picture in pieces, shuffled and numbered. Which piece belongs where?

On level "easy" there are 2 x 2 pieces of a large shape in the middle of a calm photo: each shows by itself which corner
it is. On "hard" there are 3 x 3 pieces of a photo. The assistant's picture is the puzzle put together, in half size where
that is legible, with the numbers of the pieces on it. The layout (see `layout.py`) is the shape, its color and the order of the pieces; of a hard
puzzle the order alone.
"""

from typing import NamedTuple

from PIL import Image

from train.data.tasks.layout import deal_layout, num_cells, require_size
from train.data.tasks.photos import draw_calm_background, draw_structured_region
from train.data.tasks.sample import PATCH_MULTIPLE, Request, Sample, Step
from train.data.tasks.shapes import COLORS, QUADRANTS, SHAPES, Thing, draw_thing, pick


SHAPE_SIZE = (0.7, 0.85)  # fraction of the picture's side
LABEL, MARGIN = 24, 2  # pixels: side of a piece's number, and what separates it from the piece's corner
GAP = 2  # pixels that stay black on each side of a piece
LEAST_HARD = 224  # pixels a side: a number must not hide half of a piece
NINTHS = tuple(f"row {row}, column {column}" for row in (1, 2, 3) for column in (1, 2, 3))


class Puzzle(NamedTuple):
    """`order[slot]` is the home of the piece that lies in a slot; slots and homes count in reading order."""

    shape: str | None
    color: str | None
    order: tuple[int, ...]


def ask_jigsaw(request: Request) -> Sample:
    """Which piece belongs at a given place?

    Raises:
        ValueError: the picture is too small for its level.
    """
    is_easy = request.level == "easy"
    pieces, homes = (2, QUADRANTS) if is_easy else (3, NINTHS)
    if not is_easy:
        require_size(request, LEAST_HARD)
    rng, numbers = request.rng, tuple(str(number + 1) for number in range(pieces * pieces))
    answer = request.balanced(numbers)
    asked = rng.randrange(len(homes))
    puzzle = deal_layout(
        request, lambda: _draw_puzzle(request, asked, int(answer) - 1), lambda drawn: ["jigsaw", *drawn]
    )
    side = num_cells(request) // pieces * PATCH_MULTIPLE
    whole = _draw_whole(request, puzzle, pieces * side)
    picture, boxes = _lay_out(request, whole, puzzle.order, side)
    solved = _solve(whole, puzzle.order, _half_size(request, pieces))
    where = [homes[home] for home in puzzle.order]
    found = "; ".join(f"piece {number} is {home}" for number, home in zip(numbers, where))
    steps = [
        Step(f"I look at each piece: {found}."),
        Step("I put the pieces in their places.", solved, (0, 0, *picture.size)),
        Step(f"Piece {answer} belongs at {homes[asked]}."),
    ]
    whole_name = None if puzzle.shape is None else f"{puzzle.color} {puzzle.shape}"
    objects = [
        {"box": list(box), "home": home, "part_of": whole_name, "asked": number == answer}
        for number, home, box in zip(numbers, where, boxes)
    ]
    objects += [
        {**Thing("white", "square", number)._asdict(), "box": list(_label_box(box)), "asked": False}
        for number, box in zip(numbers, boxes)
    ]
    question = f"The picture was cut into pieces and shuffled. Which piece belongs at {homes[asked]}?"
    grid = num_cells(request) if is_easy else None
    return Sample(request, picture, question, answer, numbers, steps, objects, grid)


def _draw_puzzle(request: Request, asked: int, slot: int) -> Puzzle:
    """Draw a puzzle whose piece for place `asked` lies in `slot`, and whose pieces do not all lie at home."""
    rng, count = request.rng, 4 if request.level == "easy" else 9
    while True:
        order = [home for home in range(count) if home != asked]
        rng.shuffle(order)
        order.insert(slot, asked)
        if order != sorted(order):
            break
    if request.level == "hard":
        return Puzzle(None, None, tuple(order))
    return Puzzle(pick(rng, SHAPES), pick(rng, COLORS), tuple(order))


def _draw_whole(request: Request, puzzle: Puzzle, size: int) -> Image.Image:
    """Draw the picture that is cut, `size` pixels a side."""
    if puzzle.shape is None:
        return draw_structured_region(request).resize((size, size), Image.Resampling.BICUBIC)
    whole = draw_calm_background(request).resize((size, size), Image.Resampling.BICUBIC)
    # Even, so that the shape is cut in its middle.
    side = 2 * round(request.rng.uniform(*SHAPE_SIZE) * size / 2)
    corner = (size - side) // 2
    draw_thing(whole, Thing(puzzle.color, puzzle.shape), (corner, corner, corner + side, corner + side))
    return whole


def _piece(whole: Image.Image, home: int, side: int, count: int) -> Image.Image:
    row, column = divmod(home, count)
    return whole.crop((column * side, row * side, (column + 1) * side, (row + 1) * side))


def _label_box(box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    left, top = box[0] + MARGIN, box[1] + MARGIN
    return left, top, left + LABEL, top + LABEL


def _put(picture: Image.Image, piece: Image.Image, number: str, box: tuple[int, int, int, int]) -> None:
    """Paste a piece into its box, within black gaps, and number it."""
    inside = (GAP, GAP, piece.width - GAP, piece.height - GAP)
    picture.paste(piece.crop(inside), (box[0] + GAP, box[1] + GAP))
    draw_thing(picture, Thing("white", "square", number), _label_box(box))


def _lay_out(request: Request, whole: Image.Image, order: tuple[int, ...], side: int):
    """Return the shuffled puzzle and the boxes of its slots. Patches that are left over separate the pieces."""
    count = whole.width // side
    picture = Image.new("RGB", (request.image_size, request.image_size))
    spare = (request.image_size - count * side) // PATCH_MULTIPLE
    starts = [line * side + (spare * line // (count - 1)) * PATCH_MULTIPLE for line in range(count)]
    boxes = [(left, top, left + side, top + side) for top in starts for left in starts]
    for slot, (home, box) in enumerate(zip(order, boxes)):
        _put(picture, _piece(whole, home, side, count), str(slot + 1), box)
    return picture, boxes


def _half_size(request: Request, pieces: int) -> int:
    """Pixels a side of a piece in the solved picture: whole patches, and two, or the number would hide it."""
    return max(2, round(num_cells(request) / 2 / pieces)) * PATCH_MULTIPLE


def _solve(whole: Image.Image, order: tuple[int, ...], side: int) -> Image.Image:
    """Return the puzzle put together in pieces of `side` pixels, each with the number that it had."""
    count = round(len(order) ** 0.5)
    small = whole.resize((count * side, count * side), Image.Resampling.BICUBIC)
    solved = Image.new("RGB", small.size)
    for slot, home in enumerate(order):
        row, column = divmod(home, count)
        box = (column * side, row * side, (column + 1) * side, (row + 1) * side)
        _put(solved, _piece(small, home, side, count), str(slot + 1), box)
    return solved
