"""Measure how far serial questions are answered by clues, without following the way to its end.

A clue says something about every possible answer, such as how far from the start it stands. How often answers are right by what a
clue says is counted on some rows, for each number of steps; on others the most likely answer is taken (among equals
at random). Everybody is taken to see the start and, in pictures of tiles, the one that follows on it: from two steps on neither
can be the answer. In pictures of lines, the number of crossings that a line passes is taken to be known, which leaves about every
second end. Row "chance" is what is left by that knowledge alone, and every clue is added to it. "together" is all clues at
once, in boosted trees (where scikit-learn is installed).

Clues named "after 1" go further: a step was followed, and the rest is guessed. They are no shortcuts, but say how much is left;
"together" has none of them, "together after 1" all.
"""

from collections import Counter
from collections.abc import Hashable
from random import Random
from typing import Any

from train.data.tasks.lines import MOVES, Place, can_join, end_point
from train.data.tasks.trace import board_of


Clues = dict[str, dict[str, Hashable]]  # by clue: what it says about each possible answer
TOGETHER, AFTER_ONE = "together", "after 1"


def clues_of(row: dict[str, Any]) -> Clues:
    """The clues of a row of a serial task. The first is what is taken to be seen by everybody."""
    return _line_clues(row) if row["task"] == "trace" else _tile_clues(row)


def _tile_clues(row: dict[str, Any]) -> Clues:
    serial = row["serial"]
    start, following = serial["start"], serial["following"]
    after = following[start] if serial["num_steps"] > 1 else None  # else it is the answer
    cells = {thing["color"]: (thing["box"][1] // 28, thing["box"][0] // 28) for thing in row["objects"]}
    apart = {color: tuple(abs(a - b) for a, b in zip(cell, cells[start])) for color, cell in cells.items()}
    from_after = {
        color: tuple(abs(a - b) for a, b in zip(cell, cells[after or start])) for color, cell in cells.items()
    }
    led_to = Counter(following.values())
    return {
        "chance": {color: (color == start, color == after) for color in cells},
        "leads to start": {color: following[color] == start for color in cells},
        "in-degree": {color: led_to[color] for color in cells},
        "next's in-degree": {color: led_to[following[color]] for color in cells},
        "distance": {color: max(apart[color]) for color in cells},
        "offset": {color: tuple(sorted(apart[color])) for color in cells},
        "nearest": _ranks(apart),
        "near after 1": _ranks(from_after),
        "in line": {color: (0 in apart[color], apart[color][0] == apart[color][1]) for color in cells},
        "place": cells,
        "color": {color: color for color in cells},
        "start's color": {color: (start, color) for color in cells},
    }


def _line_clues(row: dict[str, Any]) -> Clues:
    lines, beads = board_of(row["objects"])
    numbers, start_heading = row["serial"]["start"].split()
    start = Place(*map(int, numbers.split(",")), start_heading)
    side = max(max(cell) for cell in lines)
    circles = {bead.color: edge for edge, bead in beads.items() if bead.shape == "circle"}
    points, origin = {color: end_point(edge) for color, edge in circles.items()}, end_point(start)
    apart = {color: tuple(abs(a - b) for a, b in zip(point, origin)) for color, point in points.items()}
    first_turn = row["serial"]["way"][1].split()
    second = Place(*map(int, first_turn[0].split(",")), first_turn[1])
    ahead = {name: _edge_ahead(place, side) for name, place in (("straight on", start), ("straight after 1", second))}
    return {
        "chance": {color: can_join(start, edge, row["serial"]["num_steps"], side) for color, edge in circles.items()},
        "nearest": _ranks(apart),
        "distance": {color: sum(apart[color]) for color in circles},
        "offset": {color: tuple(sorted(apart[color])) for color in circles},
        "same height": {color: apart[color][0] == 0 for color in circles},
        "in line": {color: 0 in apart[color] for color in circles},
        "sides": {color: (start.heading, edge.heading) for color, edge in circles.items()},
        **{name: {color: edge == place for color, edge in circles.items()} for name, place in ahead.items()},
        "near after 1": _ranks(
            {
                color: (abs(point[0] - 2 * second.row), abs(point[1] - 2 * second.column))
                for color, point in points.items()
            }
        ),
        "color": {color: (color, color == beads[start].color) for color in circles},
    }


def _edge_ahead(place: Place, side: int) -> Place:
    """The end at the border that is reached without bending."""
    down, right = MOVES[place.heading]
    while 1 <= place.row <= side and 1 <= place.column <= side:
        place = Place(place.row + down, place.column + right, place.heading)
    return place.turn_back()


def _ranks(apart: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """How many are nearer, as the crow flies."""
    distances = {name: sum(step**2 for step in steps) for name, steps in apart.items()}
    return {name: sum(other < one for other in distances.values()) for name, one in distances.items()}


def measure_shortcuts(train: list[dict], held_out: list[dict]) -> dict[str, dict[int, dict[str, float | None]]]:
    """Accuracy on rows of `held_out` by task, number of steps and clue; rows of tasks that are not serial are left out.

    Raises:
        ValueError: no row to learn from for a task and number of steps of `held_out`.
    """
    table: dict[str, dict[int, dict[str, float | None]]] = {}
    known, asked = ([row for row in rows if row.get("serial")] for rows in (train, held_out))
    for task in dict.fromkeys(row["task"] for row in asked):
        groups = [_by_steps(rows, task) for rows in (known, asked)]
        table[task] = {}
        for num_steps, scored in sorted(groups[1].items()):
            if num_steps not in groups[0]:
                raise ValueError(f"There must be rows of task {task} with {num_steps} steps to learn from, got none.")
            table[task][num_steps] = _score_clues(groups[0][num_steps], scored)
    return table


def _by_steps(rows: list[dict], task: str) -> dict[int, list[tuple[Clues, str]]]:
    groups: dict[int, list[tuple[Clues, str]]] = {}
    for row in rows:
        if row["task"] == task:
            groups.setdefault(row["serial"]["num_steps"], []).append((clues_of(row), row["answer"]))
    return groups


def _score_clues(known: list[tuple[Clues, str]], asked: list[tuple[Clues, str]]) -> dict[str, float | None]:
    first, *names = known[0][0]
    scores: dict[str, float | None] = {}
    for name in (first, *names):
        said, right = Counter(), Counter()
        for clues, answer in known:
            values = {choice: (clues[first][choice], value) for choice, value in clues[name].items()}
            said.update(values.values())
            right[values[answer]] += 1

        def likely(clues: Clues, name: str = name, said: Counter = said, right: Counter = right) -> dict[str, float]:
            values = {choice: (clues[first][choice], value) for choice, value in clues[name].items()}
            return {choice: right[value] / max(said[value], 1) for choice, value in values.items()}

        scores[name] = _share_right([likely(clues) for clues, _ in asked], [answer for _, answer in asked])
    shortcuts = [name for name in (first, *names) if AFTER_ONE not in name]
    scores[TOGETHER] = _score_together(known, asked, shortcuts)
    if len(shortcuts) <= len(names):
        scores[f"{TOGETHER} {AFTER_ONE}"] = _score_together(known, asked, [first, *names])
    return scores


def _share_right(likely: list[dict[str, float]], answers: list[str]) -> float:
    rng, right = Random(0), 0
    for scores, answer in zip(likely, answers, strict=True):
        best = max(scores.values())
        right += rng.choice([choice for choice, score in scores.items() if score == best]) == answer
    return right / len(answers)


def _score_together(known: list[tuple[Clues, str]], asked: list[tuple[Clues, str]], names: list[str]) -> float | None:
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
    except ImportError:
        return None
    codes: dict[str, int] = {}

    def numbers(value: Hashable) -> list[float]:
        if isinstance(value, tuple):
            return [number for one in value for number in numbers(one)]
        return [float(codes.setdefault(value, len(codes)) if isinstance(value, str) else value)]

    def features(clues: Clues) -> list[list[float]]:
        choices = clues[names[0]]
        return [[number for name in names for number in numbers(clues[name][choice])] for choice in choices]

    targets = [choice == answer for clues, answer in known for choice in clues[names[0]]]
    model = HistGradientBoostingClassifier(max_iter=60, max_leaf_nodes=15, random_state=0)
    model.fit([one for clues, _ in known for one in features(clues)], targets)
    scores = iter(model.predict_proba([one for clues, _ in asked for one in features(clues)])[:, 1].tolist())
    likely = [{choice: next(scores) for choice in clues[names[0]]} for clues, _ in asked]
    return _share_right(likely, [answer for _, answer in asked])


def print_shortcuts(table: dict[str, dict[int, dict[str, float | None]]]) -> None:
    """One table for each task, with a column for every number of steps."""
    for task, by_steps in table.items():
        print(f"\n{task + ' by steps':20s} " + " ".join(f"{number:7d}" for number in by_steps))
        for name in next(iter(by_steps.values())):
            scores = [scores[name] for scores in by_steps.values()]
            print(f"{name:20s} " + " ".join("      -" if one is None else f"{100 * one:5.1f} %" for one in scores))
