"""Spatial relations: what is beside a named thing, and on which side of a thing another one is.

Scenes and levels are those of `search.py`, layouts too, so that no scene of one split is found in another, whichever family it
belongs to. The assistant's picture is cut around both things.
"""

from collections.abc import Callable
from random import Random

from train.data.tasks.layout import deal_layout, require_size
from train.data.tasks.sample import Request, Sample, Step, crop_step
from train.data.tasks.search import LEAST_HARD, Cell, paint_cells, scene_grid, scene_layout
from train.data.tasks.shapes import COLORS, SHAPES, Scene, Thing, compose, near_misses, pick, pick_thing


SIDES = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
WORDS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


def ask_beside(request: Request) -> Sample:
    """What color is the thing next to a named one, on a given side? All four sides hold things of different colors."""
    rng = request.rng
    answer, side = request.balanced(tuple(COLORS)), pick(rng, SIDES)
    anchor = Thing(pick(rng, COLORS), pick(rng, SHAPES))
    colors = [answer, *rng.sample([color for color in COLORS if color != answer], 3)]
    beside = [Thing(color, _shape_but(rng, anchor, color)) for color in colors]
    others = near_misses(rng, anchor) + [pick_thing(rng, but=anchor) for _ in range(_num_others(request))]
    sides = [side, *(name for name in SIDES if name != side)]

    def place(grid: int) -> list[Cell]:
        row, column = rng.randint(1, grid - 2), rng.randint(1, grid - 2)
        around = [(row + down, column + right) for down, right in (SIDES[name] for name in sides)]
        return [(row, column), *around]

    scene = _paint(request, [anchor, *beside], others, place)
    question = f"What color is the thing directly {WORDS[side]} the {anchor.name}?"
    steps = [
        Step(f"I look for the {anchor.name}."),
        _look_at_both(scene, f"I look directly {WORDS[side]} it."),
        Step(f"There is a {beside[0].name}: {answer}."),
    ]
    return compose(request, scene, question, answer, tuple(COLORS), steps)


def ask_side(request: Request) -> Sample:
    """On which side of a named thing is another one? Both stand in one row or one column."""
    rng = request.rng
    answer = request.balanced(tuple(SIDES))
    anchor = Thing(pick(rng, COLORS), pick(rng, SHAPES))
    target = pick_thing(rng, but=anchor)
    others = []
    while len(others) < _num_others(request) + 3:
        other = pick_thing(rng, but=anchor)
        others += [other] if other.name != target.name else []

    def place(grid: int) -> list[Cell]:
        # The same distances for each side, so that where the pair stands tells nothing.
        line, (near, far) = rng.randrange(grid), sorted(rng.sample(range(grid), 2))
        if answer in ("right", "below"):
            near, far = far, near
        return [(line, far), (line, near)] if answer in ("left", "right") else [(far, line), (near, line)]

    scene = _paint(request, [anchor, target], others, place)
    steps = [
        Step(f"I look for the {target.name} and for the {anchor.name}."),
        _look_at_both(scene, "I look at both."),
        Step(f"The {target.name} is {WORDS[answer]} the {anchor.name}: {answer}."),
    ]
    question = f"On which side of the {anchor.name} is the {target.name}: left, right, above or below?"
    return compose(request, scene, question, answer, tuple(SIDES), steps)


def _shape_but(rng: Random, anchor: Thing, color: str) -> str:
    """A shape that with `color` does not make the anchor's name."""
    return pick(rng, SHAPES, but=anchor.shape if color == anchor.color else None)


def _num_others(request: Request) -> int:
    return request.rng.randint(1, 4) if request.level == "easy" else request.rng.randint(8, 16)


def _paint(request: Request, placed: list[Thing], others: list[Thing], place: Callable[[int], list[Cell]]) -> Scene:
    """Paint things in the cells that `place` gives, and others in any other cells.

    Raises:
        ValueError: the picture is too small for its level.
    """
    if request.level == "hard":
        require_size(request, LEAST_HARD)
    grid, things = scene_grid(request), placed + others
    every = [(row, column) for row in range(grid) for column in range(grid)]

    def draw() -> list[Cell]:
        cells = place(grid)
        free = [cell for cell in every if cell not in cells]
        return cells + request.rng.sample(free, len(others))

    cells = deal_layout(request, draw, lambda cells: scene_layout(request, things, cells))
    return paint_cells(request, things, cells, num_asked=2)


def _look_at_both(scene: Scene, text: str) -> Step:
    """Look at the smallest region with the first two things."""
    one, other = scene.boxes[:2]
    box = (min(one[0], other[0]), min(one[1], other[1]), max(one[2], other[2]), max(one[3], other[3]))
    return crop_step(text, scene.picture, box)
