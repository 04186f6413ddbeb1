"""Lines that cross and bend on a board of patches: where they lead, and boards drawn at random.

Every patch holds two pieces of line, which cross straight or bend apart. A line is entered at the border, goes straight on where
it crosses another, and comes out at another place of the border.
"""

import math
from functools import cache
from random import Random
from typing import NamedTuple

from train.data.tasks.layout import split_of
from train.data.tasks.sample import Request


CROSSING = "crossing"
MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
OPPOSITE = {"up": "down", "down": "up", "left": "right", "right": "left"}
# The sides of a patch that its two bends join, and how each turns what comes along.
TURNS = {
    "left up, right down": {"right": "up", "down": "left", "left": "down", "up": "right"},
    "left down, right up": {"right": "down", "up": "left", "left": "up", "down": "right"},
}
LINES = (CROSSING, *TURNS)
CROSSING_SHARE = 0.5  # of all patches
FIRST_CROSSING_SHARE = 0.15  # while the asked line is drawn: with few, it can be long
MOST_CHANGES = 4000  # of single patches, before a line is given up
MOST_LINES = 3  # before other ends are drawn
MOST_BOARDS = 100  # around a line, before another line is drawn


class Place(NamedTuple):
    """Where a line is: about to enter a patch in a direction. Rows and columns count from 1; 0 is outside."""

    row: int
    column: int
    heading: str

    @property
    def name(self) -> str:
        return place_name(self)

    def move(self, heading: str) -> "Place":
        """The place after leaving the patch in direction `heading`."""
        down, right = MOVES[heading]
        return Place(self.row + down, self.column + right, heading)

    def turn_back(self) -> "Place":
        """The place from which the line is entered that comes out here."""
        down, right = MOVES[self.heading]
        return Place(self.row - down, self.column - right, OPPOSITE[self.heading])


@cache
def place_name(place: Place) -> str:
    """`row,column heading`; one string for all pictures, which name each place several times."""
    return f"{place.row},{place.column} {place.heading}"


Cell = tuple[int, int]  # row and column
Lines = dict[Cell, str]


def follow(lines: Lines, place: Place) -> list[Place]:
    """The places from `place` on to the next crossing or, outside, to the end of the line.

    A closed line without a crossing is followed until it is at `place` again.
    """
    passed = [place]
    while (kind := lines.get(place[:2], CROSSING)) != CROSSING and (place != passed[0] or len(passed) == 1):
        place = place.move(TURNS[kind][place.heading])
        passed.append(place)
    return passed


def find_following(lines: Lines, side: int) -> dict[Place, Place] | None:
    """The place after each place and the crossing that the line comes to, where it does; None with a closed line.

    All places count, in both directions of each line, and those where a line comes out of the board.
    """
    inside = [Place(row, column, heading) for row, column in lines for heading in MOVES]
    places = [*inside, *(edge.turn_back() for edge in edges_of(side))]
    following = {}
    for place in places:
        reached = follow(lines, place)[-1]
        if reached[:2] in lines:
            if lines[reached[:2]] != CROSSING:
                return None
            following[place] = reached.move(reached.heading)
    return following


def edges_of(side: int) -> list[Place]:
    """All places from which a line is entered at the border."""
    ends = (("right", 1), ("left", side))
    across = [Place(row, column, heading) for heading, column in ends for row in range(1, side + 1)]
    ends = (("down", 1), ("up", side))
    return across + [Place(row, column, heading) for heading, row in ends for column in range(1, side + 1)]


def pass_line(lines: Lines, start: Place) -> tuple[list[Cell], Place]:
    """The patches that the line passes which is entered at `start`, and the place to enter it at its other end."""
    row, column, heading = start
    passed = []
    while (kind := lines.get((row, column))) is not None:
        passed.append((row, column))
        if kind != CROSSING:
            heading = TURNS[kind][heading]
        down, right = MOVES[heading]
        row, column = row + down, column + right
    return passed, Place(row, column, heading).turn_back()


def trace_line(lines: Lines, start: Place) -> tuple[list[Cell], Place]:
    """The crossings that the line passes which is entered at `start`, and the place to enter it at its other end."""
    passed, end = pass_line(lines, start)
    return [cell for cell in passed if lines[cell] == CROSSING], end


def lines_layout(lines: Lines) -> list:
    """The lines in reading order."""
    return ["trace", sorted([row, column, kind] for (row, column), kind in lines.items())]


def can_join(one: Place, other: Place, num_crossings: int, side: int) -> bool:
    """Whether a line between two ends can pass so many crossings, each once.

    Other lines pass from one side of it to the other once where one of their ends is on each side, and else an even number
    of times, so that the ends between the two along the border are even or odd in number as the crossings are.
    """

    def count_along(place: Place) -> int:  # clockwise from the upper left
        row, column, heading = place
        turn = ("down", "left", "up", "right").index(heading)
        return turn * side + (column, row, side + 1 - column, side + 1 - row)[turn]

    between = abs(count_along(one) - count_along(other)) - 1
    return one != other and between % 2 == num_crossings % 2


def end_point(place: Place) -> tuple[int, int]:
    """Down and right, in halves of a patch, where a line is entered at the border."""
    down, right = MOVES[place.heading]
    return 2 * place.row - down, 2 * place.column - right


def crossing_name(place: Place) -> str:
    """As on a chess board, counted from the top: column b, row 3 is `b3`."""
    return f"{'abcdefghijklmnopqrstuvwxyz'[place.column - 1]}{place.row}"


def draw_line(request: Request, side: int, num_crossings: int) -> tuple[Lines, Place]:
    """Draw two ends, and a line from one to the other that passes so many crossings, none of them twice.

    Returns:
        The lines of the whole board, and where the drawn one is entered.
    """
    rng, edges = request.rng, edges_of(side)
    while True:
        start = rng.choice(edges)
        end = rng.choice([edge for edge in edges if can_join(start, edge, num_crossings, side)])
        bent = None
        for _ in range(MOST_LINES):
            bent = bent or _bend_line(rng, start, end, num_crossings, side)
        if bent is None:  # as from a corner around it, or hardly ever
            continue
        fixed = {cell: bent[cell] for cell in pass_line(bent, start)[0]}
        for _ in range(MOST_BOARDS):
            lines = _draw_lines(rng, side) | fixed
            if split_of(lines_layout(lines)) == request.split and find_following(lines, side) is not None:
                return lines, start


def _bend_line(rng: Random, start: Place, end: Place, num_crossings: int, side: int) -> Lines | None:
    """Change patches that the line from `start` passes until it comes to `end` (simulated annealing); None if it does not."""
    lines, wanted = _draw_lines(rng, side, FIRST_CROSSING_SHARE), end_point(end)

    def measure() -> tuple[float, list[Cell]]:
        passed, reached = pass_line(lines, start)
        crossings = [cell for cell in passed if lines[cell] == CROSSING]
        apart = sum(abs(one - other) for one, other in zip(end_point(reached), wanted)) / 2  # patches
        excess = abs(len(crossings) - num_crossings) + len(crossings) - len(set(crossings))
        return apart + excess, passed

    misfit, passed = measure()
    for _ in range(MOST_CHANGES):
        if misfit == 0:
            return lines
        cell = rng.choice(passed)
        kept = lines[cell]
        lines[cell] = rng.choice([kind for kind in LINES if kind != kept])
        changed, changed_passed = measure()
        if changed <= misfit or rng.random() < math.exp(misfit - changed):
            misfit, passed = changed, changed_passed
        else:
            lines[cell] = kept
    return None


def _draw_lines(rng: Random, side: int, crossing_share: float = CROSSING_SHARE) -> Lines:
    turns = tuple(TURNS)
    return {
        (row, column): CROSSING if rng.random() < crossing_share else rng.choice(turns)
        for row in range(1, side + 1)
        for column in range(1, side + 1)
    }
