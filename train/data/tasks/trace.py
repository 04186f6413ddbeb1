"""Trace: lines that cross and bend, with a square at one end and a circle at the other. Where does a line end?

Every merged patch (28 pixels) of the board holds two pieces of line: two straight ones that cross, or two bends. A line goes
straight on where it crosses another. At the border each line has a small square at one end and a circle at the other.

The number of steps is the number of crossings that the line passes; none is passed twice. What is named after each
crossing is where the line leads from there: to the next crossing, by its place (`b3` is column b, row 3), or to the circle.
The assistant's pictures show these places, with the way up to there drawn.

A line has to be followed: like a tile of `arrows.py`, its end stands where any end may. Whether a line between two ends passes an
even or an odd number of crossings is known without following it, so circles stand, where they can, at ends that the asked
number allows. The layout (see `layout.py`) is the lines.
"""

import math
from functools import lru_cache
from random import Random
from typing import NamedTuple

from PIL import Image, ImageDraw

from train.data.tasks.layout import num_cells, require_size
from train.data.tasks.lines import (
    CROSSING,
    LINES,
    MOVES,
    TURNS,
    Lines,
    Place,
    can_join,
    crossing_name,
    draw_line,
    edges_of,
    find_following,
    follow,
    trace_line,
)
from train.data.tasks.photos import draw_calm_background
from train.data.tasks.sample import PATCH_MULTIPLE, Request, Sample, SerialAnswer, Step, crop_step
from train.data.tasks.serial import SerialTask, count_steps, file_name, serial_answer
from train.data.tasks.shapes import SMOOTHING, Box, Thing, draw_thing
from train.data.tasks.tiles import LEAST_HARD, MOST_STEPS, TILE_COLORS


FLOOR, LINE, WAY = (238, 236, 228), (40, 40, 60), (40, 110, 230)
LINE_WIDTH, BEAD = 4, 12  # pixels
ARC_POINTS = 6


class Board(NamedTuple):
    """`beads[place]` is the square or circle at the border where a line is entered from there."""

    lines: Lines
    beads: dict[Place, Thing]
    side: int


def deal_trace(request: Request) -> tuple[Board, str, int]:
    """Draw lines, one of which passes the request's number of crossings and ends at its answer.

    Raises:
        ValueError: the picture is too small for its level.
    """
    if request.level == "hard":
        require_size(request, LEAST_HARD)
    colors, rng = TILE_COLORS[request.level], request.rng
    answer = request.balanced(colors)
    num_crossings = count_steps(request, len(colors), MOST_STEPS[request.level])
    side = len(colors) // 2
    lines, start = draw_line(request, side, num_crossings)
    edges = [start, *(edge for edge in edges_of(side) if can_join(start, edge, num_crossings, side))]
    return Board(lines, _deal_beads(rng, lines, edges, answer, colors), side), start.name, num_crossings


def _deal_beads(
    rng: Random, lines: Lines, edges: list[Place], answer: str, colors: tuple[str, ...]
) -> dict[Place, Thing]:
    """Put a square and a circle to the ends of each line: a square to the first of `edges`, and the answer to its other end.

    Other circles stand at `edges` as well where their line has an end there: they could be the asked line's.
    """
    ends = {edge: trace_line(lines, edge)[1] for edge in edges_of(len(colors) // 2)}
    squares = edges[:1]
    for edge in rng.sample(list(ends), len(ends)):
        if edge not in squares and ends[edge] not in squares:
            squares.append(ends[edge] if edge in edges and ends[edge] not in edges else edge)
    square_colors = rng.sample(colors, len(colors))
    others = [color for color in colors if color != answer]
    circle_colors = [answer, *rng.sample(others, len(others))]
    beads = {edge: Thing(color, "square") for edge, color in zip(squares, square_colors, strict=True)}
    beads |= {ends[edge]: Thing(color, "circle") for edge, color in zip(squares, circle_colors, strict=True)}
    return {edge: beads[edge] for edge in ends}  # in the order of the edges: nothing says which is asked for


def _describe(board: Board) -> tuple[dict[str, str], dict[str, str]]:
    """What follows each place, and where the line leads from there, by the names of the places."""
    following = find_following(board.lines, board.side)
    inside = [Place(row, column, heading) for row, column in board.lines for heading in MOVES]
    contents = {}
    for place in [*inside, *(edge.turn_back() for edge in board.beads)]:
        reached = follow(board.lines, place)[-1]
        if reached[:2] in board.lines:
            contents[place.name] = crossing_name(reached)
        else:
            bead = board.beads[reached.turn_back()]
            contents[place.name] = bead.color if bead.shape == "circle" else bead.name
    return {place.name: after.name for place, after in following.items()}, contents


def ask_trace(request: Request, board: Board, asked: list[tuple[str, int]]) -> list[Sample]:
    """Ask where the lines from several squares end."""
    picture = draw_calm_background(request)
    corner = (num_cells(request) - board.side) // 2 * PATCH_MULTIPLE
    for cell, kind in board.lines.items():
        picture.paste(_draw_patch(kind), _box(cell, corner)[:2])
    _paint_beads(picture, board, corner)
    following, contents = _describe(board)
    by_name = {edge.name: edge for edge in board.beads}
    samples = []
    for start, num_crossings in asked:
        serial = serial_answer(following, contents, start, num_crossings)
        steps, passed = _look_along(picture, board, by_name[start], serial, corner)
        objects = _objects(board, passed, corner)
        question = f"Which color is the circle at the end of the line from the {board.beads[by_name[start]].name}?"
        answer = contents[serial.way[num_crossings]]
        choices, grid = TILE_COLORS[request.level], num_cells(request)
        samples.append(Sample(request, picture, question, answer, choices, steps, objects, grid, serial))
    return samples


def _look_along(
    picture: Image.Image, board: Board, start: Place, serial: SerialAnswer, corner: int
) -> tuple[list[Step], set[tuple[int, int]]]:
    """The steps along a line, and the patches that it passes."""
    drawn = picture.copy()
    draw = ImageDraw.Draw(drawn)
    place, passed, steps = start, set(), []
    for number, state in enumerate(serial.way[: serial.num_steps + 1]):
        if number:  # over the crossing to which the last step led
            passed.add(place[:2])
            _draw_piece(draw, place, place.heading, corner)
            place = place.move(place.heading)
        for after in follow(board.lines, place)[1:]:
            passed.add(place[:2])
            _draw_piece(draw, place, after.heading, corner)
            place = after
        _paint_beads(drawn, board, corner)
        if number:
            last = place if place[:2] in board.lines else place.turn_back()
            text = f"{serial.contents[state]} {number}"  # the content comes first, see `tiles.py`
            step = crop_step(text, drawn, _box(last[:2], corner))
            steps.append(step._replace(name=f"{file_name(serial.start)}-{number}"))
    return steps, passed


def _box(cell: tuple[int, int], corner: int) -> Box:
    top, left = (corner + (line - 1) * PATCH_MULTIPLE for line in cell)
    return left, top, left + PATCH_MULTIPLE, top + PATCH_MULTIPLE


def _piece_points(heading: str, heading_out: str) -> list[tuple[float, float]]:
    """Points of a piece of line that enters a patch in one direction and leaves in another, in (-1, 1) from its middle."""
    (down, right), (down_out, right_out) = MOVES[heading], MOVES[heading_out]
    if heading == heading_out:
        return [(-right, -down), (right, down)]
    # A quarter of a circle around the corner that both sides share.
    angles = [math.pi / 2 * number / (ARC_POINTS - 1) for number in range(ARC_POINTS)]
    return [
        (
            right_out - right + right * math.sin(angle) - right_out * math.cos(angle),
            down_out - down + down * math.sin(angle) - down_out * math.cos(angle),
        )
        for angle in angles
    ]


def _draw_piece(draw: ImageDraw.ImageDraw, place: Place, heading_out: str, corner: int) -> None:
    left, top, right, bottom = _box(place[:2], corner)
    half = PATCH_MULTIPLE / 2
    points = [
        ((left + right - 1) / 2 + half * x, (top + bottom - 1) / 2 + half * y)
        for x, y in _piece_points(place.heading, heading_out)
    ]
    draw.line(points, fill=WAY, width=LINE_WIDTH, joint="curve")


@lru_cache(maxsize=len(LINES))
def _draw_patch(kind: str) -> Image.Image:
    """The two pieces of line of a patch."""
    large = PATCH_MULTIPLE * SMOOTHING
    patch = Image.new("RGB", (large, large), FLOOR)
    draw = ImageDraw.Draw(patch)
    for heading in ("right", "left") if kind != CROSSING else ("right", "down"):
        heading_out = heading if kind == CROSSING else TURNS[kind][heading]
        points = [(large / 2 * (1 + x), large / 2 * (1 + y)) for x, y in _piece_points(heading, heading_out)]
        draw.line(points, fill=LINE, width=LINE_WIDTH * SMOOTHING, joint="curve")
    return patch.reduce(SMOOTHING)


def _paint_beads(picture: Image.Image, board: Board, corner: int) -> None:
    for edge, bead in board.beads.items():
        draw_thing(picture, bead, _bead_box(edge, corner))


def _bead_box(edge: Place, corner: int) -> Box:
    """A square inside the patch, in the middle of the side at which the line is entered."""
    left, top, right, bottom = _box(edge[:2], corner)
    rest = PATCH_MULTIPLE - BEAD
    down, right_step = MOVES[edge.heading]
    left, top = left + rest * (1 - right_step) // 2, top + rest * (1 - down) // 2
    return left, top, left + BEAD, top + BEAD


def _objects(board: Board, passed: set[tuple[int, int]], corner: int) -> list[dict]:
    """Every patch with its lines and with the beads at its left or right side, and at its upper or lower one."""
    objects = []
    for cell, kind in board.lines.items():
        beads = {edge.heading: bead.name for edge, bead in board.beads.items() if edge[:2] == cell}
        beside, across = (
            next((beads[heading] for heading in headings if heading in beads), None)
            for headings in (("left", "right"), ("up", "down"))
        )
        box = list(_box(cell, corner))
        objects.append({"lines": kind, "side_bead": beside, "end_bead": across, "box": box, "asked": cell in passed})
    return objects


def board_of(objects: list[dict]) -> tuple[Lines, dict[Place, Thing]]:
    """The lines, and what stands at their ends, from the `objects` of a row."""
    corner = min(patch["box"][0] for patch in objects)
    lines, beads = {}, {}
    for patch in objects:
        row, column = (1 + (patch["box"][k] - corner) // PATCH_MULTIPLE for k in (1, 0))
        lines[row, column] = patch["lines"]
        side = round(len(objects) ** 0.5)
        for kind, line, headings in (("side_bead", column, ("right", "left")), ("end_bead", row, ("down", "up"))):
            if patch[kind] is not None:
                beads[Place(row, column, headings[0] if line == 1 else headings[1])] = Thing(*patch[kind].split())
                assert line in (1, side)
    return lines, beads


def _numbers_of(board: Board, start: str, level: str) -> list[int]:
    """The number of crossings of the line from `start`, where it can be asked for."""
    crossings, _ = trace_line(board.lines, next(edge for edge in board.beads if edge.name == start))
    is_asked = 1 <= len(crossings) <= MOST_STEPS[level] and len(set(crossings)) == len(crossings)
    return [len(crossings)] if is_asked else []


def _starts_of(board: Board) -> list[str]:
    return [edge.name for edge, bead in board.beads.items() if bead.shape == "square"]


TRACE = SerialTask(deal_trace, ask_trace, _starts_of, _numbers_of)
