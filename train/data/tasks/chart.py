"""Charts: values, the highest or lowest, comparisons, read off bars or a line drawn here.

On level "easy" there are bars a whole number of units high, in columns of merged patches (28 pixels). On "hard" there
are up to eight bars or points of a line, and values up to 20 on an axis that names every fifth. Colors name the bars. The
assistant's picture is the bar's column, cut out with its grid lines. The layout (see `layout.py`) is which value each color
has, in the order of the columns.
"""

from random import Random
from typing import NamedTuple

from PIL import Image, ImageDraw

from train.data.tasks.layout import deal_layout, num_cells, require_size
from train.data.tasks.photos import draw_calm_background
from train.data.tasks.sample import PATCH_MULTIPLE, Request, Sample, Step, crop_step
from train.data.tasks.shapes import COLORS, load_font, pick


VALUES = {"easy": tuple("123456"), "hard": tuple(str(value) for value in range(1, 21))}
TICKS = {"easy": 1, "hard": 5}  # units between named grid lines
YES_NO = ("yes", "no")
PAPER, GRID_INK, INK = (236, 236, 232), (190, 190, 190), (20, 20, 20)
LEAST_HARD = 224  # pixels a side, for eight columns and an axis of twenty

Box = tuple[int, int, int, int]


class Chart(NamedTuple):
    """Bars from left to right: (color, value), and their `kind`, "bar" or "line"."""

    bars: list[tuple[str, int]]
    kind: str


def ask_value(request: Request) -> Sample:
    """What is the value of the bar of a given color?"""
    choices = VALUES[request.level]
    answer, asked = request.balanced(choices), pick(request.rng, COLORS)
    chart = _deal(request, {asked: int(answer)}, lambda value: True)
    steps = [
        Step(f"I look for the {asked} {_noun(chart)}."),
        (asked, "I follow its top to the axis."),
        Step(f"The {asked} {_noun(chart)} has the value {answer}."),
    ]
    return _compose(request, chart, f"What is the value of {asked} in the chart?", answer, choices, steps)


def ask_largest(request: Request) -> Sample:
    """Which bar is the highest, or the lowest?"""
    answer, is_highest = request.balanced(tuple(COLORS)), request.rng.random() < 0.5
    largest = len(VALUES[request.level])
    # So that another value is left for the other bars.
    value = request.rng.randint(2, largest) if is_highest else request.rng.randint(1, largest - 1)
    chart = _deal(request, {answer: value}, lambda other: other < value if is_highest else other > value)
    word = "highest" if is_highest else "lowest"
    values = ", ".join(f"{color} {value}" for color, value in chart.bars)
    steps = [
        Step(f"I read the values: {values}."),
        (answer, f"The {word} of them is {value}."),
        Step(f"The {word} is {answer}."),
    ]
    return _compose(request, chart, f"Which color is the {word} in the chart?", answer, tuple(COLORS), steps)


def ask_compare(request: Request) -> Sample:
    """Is one bar higher than another?"""
    rng, answer = request.rng, request.balanced(YES_NO)
    one, other = rng.sample(list(COLORS), 2)
    low, high = sorted(rng.sample(range(1, len(VALUES[request.level]) + 1), 2))
    values = (high, low) if answer == "yes" else (low, high)
    chart = _deal(request, dict(zip((one, other), values)), lambda value: True)
    relation = "more" if answer == "yes" else "less"
    steps = [
        (one, f"The value of {one} is {values[0]}."),
        (other, f"The value of {other} is {values[1]}."),
        Step(f"{values[0]} is {relation} than {values[1]}: {answer}."),
    ]
    return _compose(request, chart, f"Is {one} higher than {other} in the chart?", answer, YES_NO, steps)


def _noun(chart: Chart) -> str:
    return "bar" if chart.kind == "bar" else "point"


def _deal(request: Request, asked: dict[str, int], is_allowed) -> Chart:
    """Deal a chart with the asked bars and others, each of a value that `is_allowed`.

    Raises:
        ValueError: the picture is too small for its level.
    """
    is_hard = request.level == "hard"
    if is_hard:
        require_size(request, LEAST_HARD)
    most = min(num_cells(request) - 1, 7 if is_hard else 5)
    values = [int(value) for value in VALUES[request.level]]

    def draw() -> Chart:
        rng = request.rng
        return Chart(_draw_bars(rng, asked, values, rng.randint(3, most), is_allowed), rng.choice(kinds))

    kinds = ("bar", "line") if is_hard else ("bar",)
    return deal_layout(request, draw, lambda chart: ["chart", request.level, chart.bars])


def _draw_bars(rng: Random, asked: dict[str, int], values: list[int], count: int, is_allowed) -> list[tuple[str, int]]:
    colors = rng.sample([color for color in COLORS if color not in asked], count - len(asked))
    bars = list(asked.items())
    for color in colors:
        bars.append((color, rng.choice([value for value in values if is_allowed(value)])))
    rng.shuffle(bars)
    return bars


class Frame(NamedTuple):
    """Where a chart stands in its picture, in pixels. The axis fills the first column."""

    size: int
    unit: int
    column: int
    floor: int

    def top(self, value: int) -> int:
        return self.floor - value * self.unit

    def bar(self, number: int, value: int) -> Box:
        """The box of bar `number`, a column less its margins."""
        left, margin = PATCH_MULTIPLE + number * self.column, max(2, self.column // 10)
        return left + margin, self.top(value), left + self.column - margin, self.floor

    def whole_column(self, number: int) -> Box:
        left = PATCH_MULTIPLE + number * self.column
        return left, 0, left + self.column, self.size


def _frame(request: Request, num_bars: int) -> Frame:
    values, size = len(VALUES[request.level]), request.image_size
    # Half patches where the picture allows them: tops lie on the borders of patches, or in their middle.
    unit = (size - 20) // values
    half = PATCH_MULTIPLE // 2
    if unit >= half:
        unit = unit // half * half
    column = (size - PATCH_MULTIPLE) // num_bars // PATCH_MULTIPLE * PATCH_MULTIPLE
    below = (size - values * unit) // 2
    floor = size - (below // PATCH_MULTIPLE * PATCH_MULTIPLE or below)
    return Frame(size, unit, min(column, 2 * PATCH_MULTIPLE), floor)


def _draw(request: Request, chart: Chart, frame: Frame) -> Image.Image:
    paper = Image.new("RGB", (frame.size, frame.size), PAPER)
    picture = Image.blend(draw_calm_background(request), paper, 0.75)
    draw = ImageDraw.Draw(picture)
    tick, largest = TICKS[request.level], len(VALUES[request.level])
    font = load_font(max(10, min(16, frame.unit * tick - 2)))
    for value in range(0, largest + 1, tick):
        height = frame.top(value)
        draw.line((PATCH_MULTIPLE - 4, height, frame.size, height), fill=GRID_INK if value else INK)
        if value:
            draw.text((PATCH_MULTIPLE - 7, height), str(value), font=font, anchor="rm", fill=INK)
    boxes = [frame.bar(number, value) for number, (_, value) in enumerate(chart.bars)]
    if chart.kind == "line":
        tops = [((left + right) / 2, top) for left, top, right, _ in boxes]
        draw.line(tops, fill=INK, width=2, joint="curve")
        for (x, y), (color, _) in zip(tops, chart.bars):
            draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=COLORS[color], outline=INK)
        return picture
    for (left, top, right, bottom), (color, _) in zip(boxes, chart.bars):
        draw.rectangle((left, top, right - 1, bottom - 1), fill=COLORS[color], outline=INK)
    return picture


def _compose(
    request: Request, chart: Chart, question: str, answer: str, choices: tuple[str, ...], steps: list
) -> Sample:
    """Draw the chart; a step given as (color, text) looks at the column of that color."""
    frame = _frame(request, len(chart.bars))
    picture = _draw(request, chart, frame)
    columns = {color: frame.whole_column(number) for number, (color, _) in enumerate(chart.bars)}
    looked_at = [step[0] for step in steps if not isinstance(step, Step)]
    steps = [
        step if isinstance(step, Step) else crop_step(step[1], picture, columns[step[0]], least_width=1)
        for step in steps
    ]
    objects = [
        {"color": color, "value": value, "box": list(frame.bar(number, value)), "asked": color in looked_at}
        for number, (color, value) in enumerate(chart.bars)
    ]
    grid = num_cells(request) if request.level == "easy" else None
    return Sample(request, picture, question, answer, choices, steps, objects, grid)
