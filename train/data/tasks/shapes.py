"""Visual search: small coloured shapes, with or without digits, on a photo.

A scene is a grid of cells. Every object lies inside its own cell, so objects never overlap, never leave the picture
and never cross its middle lines: "top left" is true of all of an object or of none of it.
"""

import math
from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from random import Random
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from train.data.tasks.photos import draw_background
from train.data.tasks.sample import Request, Sample, Step, crop_step, zoom_step


COLORS = {
    "red": (220, 30, 30),
    "orange": (255, 140, 0),
    "yellow": (250, 230, 30),
    "green": (30, 150, 50),
    "blue": (30, 70, 220),
    "purple": (140, 40, 170),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
MORE_COLORS = {  # for pictures in which eight are too few
    "pink": (255, 160, 200),
    "brown": (120, 70, 25),
    "gray": (130, 130, 130),
    "cyan": (60, 220, 240),
    "magenta": (240, 40, 190),
    "lime": (160, 245, 70),
    "teal": (0, 120, 130),
    "beige": (235, 205, 150),
}
LIGHT_COLORS = {"orange", "yellow", "white", "pink", "cyan", "lime", "beige"}
DIGITS = tuple("0123456789")
COUNTS = tuple("1234")
DESCRIBED = ("5", "6", "7", "8", "9", "10")
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")

GRID = 4  # cells a side; even, so that the middle lines run between cells
OBJECT_SIZE = (0.15, 0.2)  # fraction of the picture's side
OUTLINE, HALO = 0.05, 0.06  # fraction of the object's side
SMALL = 32  # pixels a side; smaller things are kept once drawn
SMOOTHING = 4  # shapes are drawn this many times larger, then reduced

Point = tuple[float, float]
Box = tuple[int, int, int, int]


def _circle() -> list[Point]:
    angles = [2 * math.pi * k / 60 for k in range(60)]
    return [(math.cos(t), math.sin(t)) for t in angles]


def _star() -> list[Point]:
    spokes = [(math.pi * k / 5, 1.05 if k % 2 == 0 else 0.5) for k in range(10)]
    return [(r * math.sin(t), 0.1 - r * math.cos(t)) for t, r in spokes]


def _heart() -> list[Point]:
    angles = [2 * math.pi * k / 60 for k in range(60)]
    heights = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in angles]
    return [(math.sin(t) ** 3, -height / 16 - 0.12) for t, height in zip(angles, heights)]


def _cross() -> list[Point]:
    arm = [(-0.4, -1.0), (0.4, -1.0), (0.4, -0.4)]
    turns = [(1, 0), (0, 1), (-1, 0), (0, -1)]  # (cosine, sine) of quarter turns
    return [(c * x - s * y, s * x + c * y) for c, s in turns for x, y in arm]


# Outlines in [-1, 1] x [-1, 1], y down, and how far below the middle a digit looks centred.
SHAPES: dict[str, tuple[list[Point], float]] = {
    "circle": (_circle(), 0.0),
    "square": ([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)], 0.0),
    "triangle": ([(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)], 0.3),
    "star": (_star(), 0.1),
    "heart": (_heart(), -0.1),
    "cross": (_cross(), 0.0),
}


class Thing(NamedTuple):
    color: str
    shape: str
    digit: str | None = None

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def draw_thing(picture: Image.Image, thing: Thing, box: Box) -> None:
    """Paint `thing` into the square `box`, with a dark outline in a light halo: one of them shows on any photo."""
    side = box[2] - box[0]
    patch = (_draw_small_patch if side <= SMALL else _draw_patch)(thing, side)
    picture.paste(patch, box[:2], patch)


def _draw_patch(thing: Thing, side: int) -> Image.Image:
    """Draw `thing` on a transparent square."""
    large = side * SMOOTHING
    middle, radius = large / 2, large * (0.5 - OUTLINE - HALO)
    points, digit_shift = SHAPES[thing.shape]
    corners = [(middle + radius * x, middle + radius * y) for x, y in points]
    # White below the transparent part, or reducing would darken the rim of the halo.
    patch = Image.new("RGBA", (large, large), (255, 255, 255, 0))
    draw = ImageDraw.Draw(patch)
    for width, ink in ((2 * (OUTLINE + HALO), "white"), (2 * OUTLINE, "black")):
        draw.line(corners + corners[:2], fill=ink, width=round(width * large), joint="curve")
    draw.polygon(corners, fill=(COLORS | MORE_COLORS)[thing.color])
    if thing.digit is not None:
        ink, rim = ("black", "white") if thing.color in LIGHT_COLORS else ("white", "black")
        draw.text(
            (middle, middle + radius * digit_shift),
            thing.digit,
            font=load_font(round(0.62 * large)),
            anchor="mm",
            fill=ink,
            stroke_width=round(0.03 * large),
            stroke_fill=rim,
        )
    return patch.reduce(SMOOTHING)


# Scenes hold few kinds of small things many times over; at the size of a merged patch all of them fit.
_draw_small_patch = lru_cache(maxsize=2048)(_draw_patch)


def deal_cells(rng: Random, grid: int, num_asked: int, num_others: int, quadrant: str | None) -> list[tuple[int, int]]:
    """Return different (row, column) of grid x grid cells, those of the asked things first and in reading order.

    Where `quadrant` is given, the first cell lies in it and the others in all quadrants in turn. No cell of an odd grid
    lies on a middle line.
    """
    lines = [line for line in range(grid) if grid % 2 == 0 or line != grid // 2]
    cells = [(row, column) for row in lines for column in lines]
    rng.shuffle(cells)
    if quadrant is not None:
        turns = [quadrant, *rng.sample([name for name in QUADRANTS if name != quadrant], len(QUADRANTS) - 1)]
        dealt = zip(*([cell for cell in cells if _quadrant_of_cell(cell, grid) == name] for name in turns))
        cells = [cell for one_each in dealt for cell in one_each]
    return sorted(cells[:num_asked]) + cells[num_asked : num_asked + num_others]


def _deal_boxes(request: Request, num_asked: int, num_others: int, quadrant: str | None) -> list[Box]:
    """Return boxes of random size and place in different cells, see `deal_cells`."""
    rng, size = request.rng, request.image_size
    boxes = []
    for row, column in deal_cells(rng, GRID, num_asked, num_others, quadrant):
        side = round(rng.uniform(*OBJECT_SIZE) * size)
        slack = size // GRID - side
        # Not `randint`, which draws more or fewer bits depending on its bounds: the scene would depend on the size.
        left = column * size // GRID + round(rng.random() * slack)
        top = row * size // GRID + round(rng.random() * slack)
        boxes.append((left, top, left + side, top + side))
    return boxes


def _quadrant_of_cell(cell: tuple[int, int], grid: int) -> str:
    row, column = cell
    return QUADRANTS[2 * (row >= grid // 2) + (column >= grid // 2)]


class Scene(NamedTuple):
    """A painted photo. The things asked about come first, in reading order of their cells."""

    picture: Image.Image
    things: list[Thing]
    boxes: list[Box]
    num_asked: int
    grid: int | None = GRID
    in_patches: bool = False  # every thing stands in a merged patch of its own

    def quadrant(self, number: int) -> str:
        """Return where thing `number` lies: all of it, because no thing crosses a middle line."""
        left, top, _, _ = self.boxes[number]
        half = self.picture.width // 2
        return QUADRANTS[2 * (top >= half) + (left >= half)]

    def zoom(self, number: int, text: str) -> Step:
        return (crop_step if self.in_patches else zoom_step)(text, self.picture, self.boxes[number])


Painter = Callable[..., Scene]  # as `paint_scene`


def paint_scene(request: Request, asked: list[Thing], others: list[Thing], quadrant: str | None = None) -> Scene:
    """Paint all things on a photo, a single asked one in `quadrant` where that is given."""
    picture = draw_background(request)
    things = asked + others
    boxes = _deal_boxes(request, len(asked), len(others), quadrant)
    for thing, box in zip(things, boxes):
        draw_thing(picture, thing, box)
    return Scene(picture, things, boxes, len(asked))


def compose(
    request: Request, scene: Scene, question: str, answer: str, choices: tuple[str, ...], steps: list[Step]
) -> Sample:
    objects = [
        {**thing._asdict(), "box": list(box), "asked": number < scene.num_asked}
        for number, (thing, box) in enumerate(zip(scene.things, scene.boxes))
    ]
    return Sample(request, scene.picture, question, answer, choices, steps, objects, scene.grid)


def pick(rng: Random, names: Iterable[str], *, but: str | None = None) -> str:
    return rng.choice([name for name in names if name != but])


def pick_thing(rng: Random, *, but: Thing) -> Thing:
    """Return a thing that does not answer to the name of `but`."""
    while True:
        thing = Thing(pick(rng, COLORS), pick(rng, SHAPES))
        if thing.name != but.name:
            return thing


def near_misses(rng: Random, target: Thing) -> list[Thing]:
    """Return one thing of the target's color and one of its shape: neither word of its name alone finds it."""
    return [
        Thing(target.color, pick(rng, SHAPES, but=target.shape)),
        Thing(pick(rng, COLORS, but=target.color), target.shape),
    ]


def ask_color(request: Request, paint: Painter = paint_scene, crowd: tuple[int, int] = (5, 8)) -> Sample:
    """What color is the one thing of a given shape?

    Args:
        crowd: least and largest number of other things.
    """
    rng = request.rng
    answer = request.balanced(tuple(COLORS))
    target = Thing(answer, pick(rng, SHAPES))
    others = [Thing(pick(rng, COLORS), pick(rng, SHAPES, but=target.shape)) for _ in range(rng.randint(*crowd))]
    scene = paint(request, [target], others)
    steps = [
        Step(f"I look for the {target.shape}."),
        scene.zoom(0, f"It is in the {scene.quadrant(0)}, and I zoom in on it."),
        Step(f"The {target.shape} is {answer}."),
    ]
    return compose(request, scene, f"What color is the {target.shape}?", answer, tuple(COLORS), steps)


def ask_digit(
    request: Request,
    paint: Painter = paint_scene,
    crowd: tuple[int, int] = (5, 8),
    signs: tuple[str, ...] = DIGITS,
    kind: str = "digit",
) -> Sample:
    """Which digit is on the one thing of a given color and shape? Every thing carries one.

    Args:
        crowd: least and largest number of other things.
        signs: what may be on a thing in the place of digits, called `kind`.
    """
    rng = request.rng
    answer = request.balanced(signs)
    target = Thing(pick(rng, COLORS), pick(rng, SHAPES), answer)
    others = near_misses(rng, target) + [pick_thing(rng, but=target) for _ in range(rng.randint(*crowd) - 2)]
    others = [other._replace(digit=pick(rng, signs)) for other in others]
    scene = paint(request, [target], others)
    steps = [
        Step(f"I look for the {target.name}."),
        scene.zoom(0, f"It is in the {scene.quadrant(0)}, and I zoom in on it."),
        Step(f"The {kind} on the {target.name} is {answer}."),
    ]
    return compose(request, scene, f"Which {kind} is on the {target.name}?", answer, signs, steps)


def ask_count(request: Request, paint: Painter = paint_scene, total: int = 10) -> Sample:
    """How many things are there of a given color and shape?

    The scene always holds `total` things, and a second kind that also comes in any number from one to four: neither the
    size of the crowd nor the largest group in it tells the answer without the question.
    """
    rng = request.rng
    answer = request.balanced(COUNTS)
    target = Thing(pick(rng, COLORS), pick(rng, SHAPES))
    decoy, single = rng.sample(near_misses(rng, target), 2)
    others = [decoy] * int(pick(rng, COUNTS)) + [single]
    while int(answer) + len(others) < total:
        others.append(pick_thing(rng, but=target))
    scene = paint(request, [target] * int(answer), others)
    plural = f"{target.color} crosses" if target.shape == "cross" else f"{target.name}s"
    found = [
        scene.zoom(number, f"Number {number + 1} is in the {scene.quadrant(number)}.") for number in range(int(answer))
    ]
    sum_up = f"That makes {answer} {target.name if answer == '1' else plural}."
    steps = [Step(f"I look for {plural} and zoom in on each."), *found, Step(sum_up)]
    return compose(request, scene, f"How many {plural} are there?", answer, COUNTS, steps)


def ask_position(request: Request, paint: Painter = paint_scene, per_quadrant: int = 2) -> Sample:
    """In which quadrant is the one thing of a given color and shape?

    Every quadrant holds as many things: betting on the fullest one would beat chance (0.37) without reading the question.
    """
    rng = request.rng
    answer = request.balanced(QUADRANTS)
    target = Thing(pick(rng, COLORS), pick(rng, SHAPES))
    others = near_misses(rng, target) + [pick_thing(rng, but=target) for _ in range(4 * per_quadrant - 3)]
    rng.shuffle(others)
    scene = paint(request, [target], others, quadrant=answer)
    height, side = answer.split()
    steps = [
        Step(f"I look for the {target.name}."),
        scene.zoom(0, "I zoom in to be sure that I found it."),
        Step(f"It is in the {height} half and in the {side} half of the image: {answer}."),
    ]
    question = (
        f"In which quadrant of the image is the {target.name}: top left, top right, bottom left or bottom right?"
    )
    return compose(request, scene, question, answer, QUADRANTS, steps)


def describe_scene(
    request: Request, paint: Painter = paint_scene, grid: int = GRID, numbers: tuple[str, ...] = DESCRIBED
) -> Sample:
    """What is where, cell by cell? No test of reasoning: dense supervision, for a vision tower that starts from nothing.

    Args:
        numbers: how many things there may be.
    """
    rng = request.rng
    answer = request.balanced(numbers)
    things = [Thing(pick(rng, COLORS), pick(rng, SHAPES), pick(rng, DIGITS)) for _ in range(int(answer))]
    if rng.random() < 0.5:
        things = [thing._replace(digit=None) for thing in things]
    scene = paint(request, [], things)
    cell = request.image_size // grid
    places = {(box[1] // cell, box[0] // cell): thing for thing, box in zip(scene.things, scene.boxes)}
    steps = []
    for row in range(grid):
        words = []
        for column in range(grid):
            thing = places.get((row, column))
            words.append("nothing" if thing is None else f"{thing.name} {thing.digit or ''}".strip())
        steps.append(Step(f"Row {row + 1}: {', '.join(words)}."))
    return compose(request, scene, "What is in the picture, row by row, and how much?", answer, numbers, steps)
