"""Path planning: a maze of patches with thin walls between them. What can be reached, how to begin, how far is it?

A maze is a random tree over its cells, so there is one way between any two; for "which number can be reached" walls cut
it apart. On level "easy" it has 4 or 5 cells a side of one merged patch (28 pixels) each, on "hard" 8 to 12. The
assistant's picture is the maze with the way drawn in it. The layout (see `layout.py`) is which walls are open: no maze of one
split is found in another, whoever stands in it.
"""

from collections import deque
from itertools import combinations
from random import Random
from typing import NamedTuple

from PIL import Image, ImageDraw

from train.data.tasks.layout import deal_layout, num_cells, require_size
from train.data.tasks.photos import draw_calm_background
from train.data.tasks.sample import PATCH_MULTIPLE, Request, Sample, Step
from train.data.tasks.shapes import Thing, draw_thing


MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
WALLS = tuple(" ".join(some) for count in range(1, 4) for some in combinations(MOVES, count))  # of a cell; or OPEN
OPEN = "none"
GOALS = tuple("1234")
LENGTHS = {"easy": tuple("234567"), "hard": tuple(str(length) for length in range(6, 16))}
START, GOAL = Thing("red", "circle"), Thing("yellow", "star")
FLOOR, WALL, WAY = (238, 236, 228), (40, 40, 60), (40, 110, 230)
WALL_WIDTH, WAY_WIDTH, MARGIN = 4, 4, 4  # pixels; MARGIN between a thing and its cell
LEAST_HARD = 224  # pixels a side

Cell = tuple[int, int]


class Maze(NamedTuple):
    """`doors` are the pairs of neighbours without a wall between them, sorted; `start` has the red circle."""

    side: int
    doors: list[tuple[Cell, Cell]]
    start: Cell
    goals: dict[Cell, Thing]
    way: list[Cell]  # from the start to the asked goal, both included


def ask_goal(request: Request) -> Sample:
    """Which of four numbers can be reached?"""
    answer = request.balanced(GOALS)
    maze = _deal(request, lambda rng, side: _draw_parted(rng, side, answer))
    question = "Which number can the red circle reach without crossing a wall?"
    return _compose(request, maze, question, answer, GOALS, f"number {answer}", f"It reaches number {answer}.")


def ask_move(request: Request) -> Sample:
    """Which move comes first on the way to the star?"""
    answer = request.balanced(tuple(MOVES))
    lengths = [int(length) for length in LENGTHS[request.level]]
    maze = _deal(request, lambda rng, side: _draw_way(rng, side, lambda way: len(way) - 1 in lengths, answer))
    question = "The red circle goes to the yellow star. Which is its first move: up, down, left or right?"
    return _compose(request, maze, question, answer, tuple(MOVES), "the star", f"The first move is {answer}.")


def ask_length(request: Request) -> Sample:
    """How many moves is it to the star?"""
    choices = LENGTHS[request.level]
    answer = request.balanced(choices)
    maze = _deal(request, lambda rng, side: _draw_way(rng, side, lambda way: len(way) - 1 == int(answer)))
    question = "How many moves is it from the red circle to the yellow star?"
    return _compose(request, maze, question, answer, choices, "the star", f"That makes {answer} moves.")


def find_ways(doors: list[tuple[Cell, Cell]], start: Cell) -> dict[Cell, list[Cell]]:
    """Return the shortest way from `start` to every cell that can be reached, both ends included (breadth first)."""
    neighbours: dict[Cell, list[Cell]] = {}
    for one, other in doors:
        neighbours.setdefault(one, []).append(other)
        neighbours.setdefault(other, []).append(one)
    ways, queue = {start: [start]}, deque([start])
    while queue:
        cell = queue.popleft()
        for beside in neighbours.get(cell, []):
            if beside not in ways:
                ways[beside] = [*ways[cell], beside]
                queue.append(beside)
    return ways


def moves_of(way: list[Cell]) -> list[str]:
    """Name the move between each two cells of a way."""
    names = {step: name for name, step in MOVES.items()}
    return [
        names[row - last_row, column - last_column] for (last_row, last_column), (row, column) in zip(way, way[1:])
    ]


def _deal(request: Request, draw) -> Maze:
    """Draw mazes until one has what is asked for and belongs to the request's split.

    Raises:
        ValueError: the picture is too small for its level.
    """
    if request.level == "hard":
        require_size(request, LEAST_HARD)
    side = min(num_cells(request), 5 if request.level == "easy" else 12)

    def draw_one() -> Maze:
        while (maze := draw(request.rng, side)) is None:
            pass
        return maze

    return deal_layout(request, draw_one, lambda maze: ["maze", maze.side, maze.doors])


def _draw_tree(rng: Random, side: int) -> list[tuple[Cell, Cell]]:
    """Return side * side - 1 doors that join all cells (Kruskal's algorithm), in random order."""
    cells = [(row, column) for row in range(side) for column in range(side)]
    walls = [((row, column), (row + 1, column)) for row, column in cells if row + 1 < side]
    walls += [((row, column), (row, column + 1)) for row, column in cells if column + 1 < side]
    rng.shuffle(walls)
    parent = {cell: cell for cell in cells}

    def root(cell: Cell) -> Cell:
        while parent[cell] != cell:
            parent[cell] = cell = parent[parent[cell]]
        return cell

    doors = []
    for one, other in walls:
        if root(one) != root(other):
            parent[root(one)] = root(other)
            doors.append((one, other))
    return doors


def _draw_way(rng: Random, side: int, is_asked, first: str | None = None) -> Maze | None:
    """Draw a maze and a way in it, whose first move is `first` where that is given; None where there is no such way."""
    doors = _draw_tree(rng, side)
    start = (rng.randrange(side), rng.randrange(side))
    found = [way for way in find_ways(doors, start).values() if len(way) > 1 and is_asked(way)]
    found = [way for way in found if first is None or moves_of(way[:2]) == [first]]
    if not found:
        return None
    way = rng.choice(found)
    return Maze(side, sorted(doors), start, {way[-1]: GOAL}, way)


def _draw_parted(rng: Random, side: int, answer: str) -> Maze | None:
    """Draw a maze in parts: one number in the start's part, the others elsewhere; None where a part is too small."""
    doors = _draw_tree(rng, side)[: -2 if side > 5 else -1]
    start = (rng.randrange(side), rng.randrange(side))
    ways = find_ways(doors, start)
    inside = [way for way in ways.values() if len(way) > 2]
    outside = [(row, column) for row in range(side) for column in range(side) if (row, column) not in ways]
    if not inside or len(outside) < len(GOALS) - 1:
        return None
    way = rng.choice(inside)
    cells = [way[-1], *rng.sample(outside, len(GOALS) - 1)]
    numbers = [answer, *(number for number in GOALS if number != answer)]
    goals = {cell: Thing("white", "square", number) for cell, number in zip(cells, numbers)}
    return Maze(side, sorted(doors), start, goals, way)


def _compose(
    request: Request, maze: Maze, question: str, answer: str, choices: tuple[str, ...], goal: str, conclusion: str
) -> Sample:
    picture = draw_calm_background(request)
    # Whole patches, so that every cell is one.
    corner = (num_cells(request) - maze.side) // 2 * PATCH_MULTIPLE
    region = (corner, corner, corner + maze.side * PATCH_MULTIPLE, corner + maze.side * PATCH_MULTIPLE)
    drawn = _draw(maze, way=False)
    picture.paste(drawn, region[:2])
    steps = [
        Step("I look at the walls around the red circle and follow the open cells."),
        Step(f"The way to {goal} is {', '.join(moves_of(maze.way))}.", _draw(maze, way=True), region),
        Step(conclusion),
    ]
    return Sample(request, picture, question, answer, choices, steps, _objects(maze, corner), num_cells(request))


def _cell_box(cell: Cell, corner: int = 0, margin: int = 0) -> tuple[int, int, int, int]:
    top, left = (corner + line * PATCH_MULTIPLE for line in cell)
    return left + margin, top + margin, left + PATCH_MULTIPLE - margin, top + PATCH_MULTIPLE - margin


def _walls(maze: Maze) -> dict[Cell, list[str]]:
    """The closed sides of every cell, by the move that they stop."""
    doors = {frozenset(door) for door in maze.doors}
    return {
        (row, column): [
            name for name, (down, right) in MOVES.items() if {(row, column), (row + down, column + right)} not in doors
        ]
        for row in range(maze.side)
        for column in range(maze.side)
    }


def _draw(maze: Maze, way: bool) -> Image.Image:
    size = maze.side * PATCH_MULTIPLE
    picture = Image.new("RGB", (size, size), FLOOR)
    draw, half = ImageDraw.Draw(picture), WALL_WIDTH // 2
    for cell, walls in _walls(maze).items():
        left, top, right, bottom = _cell_box(cell)
        # Each cell paints its own half of a wall.
        sides = {
            "up": (left, top, right - 1, top + half - 1),
            "down": (left, bottom - half, right - 1, bottom - 1),
            "left": (left, top, left + half - 1, bottom - 1),
            "right": (right - half, top, right - 1, bottom - 1),
        }
        for wall in walls:
            draw.rectangle(sides[wall], fill=WALL)
    if way:
        middles = [((column + 0.5) * PATCH_MULTIPLE, (row + 0.5) * PATCH_MULTIPLE) for row, column in maze.way]
        draw.line(middles, fill=WAY, width=WAY_WIDTH, joint="curve")
    for cell, thing in {maze.start: START, **maze.goals}.items():
        draw_thing(picture, thing, _cell_box(cell, margin=MARGIN))
    return picture


def _objects(maze: Maze, corner: int) -> list[dict]:
    """Every cell with its walls and whether the way passes it, and the things."""
    objects = [
        {"box": list(_cell_box(cell, corner)), "walls": " ".join(walls) or OPEN, "asked": cell in maze.way}
        for cell, walls in _walls(maze).items()
    ]
    things = {maze.start: START, **maze.goals}
    return objects + [
        {**thing._asdict(), "box": list(_cell_box(cell, corner, MARGIN)), "asked": cell in maze.way}
        for cell, thing in things.items()
    ]
