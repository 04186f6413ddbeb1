"""Search, jigsaw, maze, chart, relation and serial: answers follow from what is drawn, splits are disjoint, nothing is given away."""

import json
import re
from collections import Counter
from itertools import count

import pytest
import torch
from PIL import Image, ImageChops, ImageStat

from train.data.small_tokenizer import texts_of
from train.data.tasks import (
    FAMILIES,
    LEVELS,
    SEARCH,
    SERIAL,
    SPLITS,
    SYNTHESIS,
    TASKS,
    family_of,
    generate_sample,
    write_dataset,
)
from train.data.tasks.__main__ import main
from train.data.tasks.arrows import DIRECTIONS
from train.data.tasks.balance import main as balance
from train.data.tasks.balance import make_rows, measure
from train.data.tasks.chart import TICKS, VALUES
from train.data.tasks.families import PRETRAINING, tasks_of
from train.data.tasks.gallery import write_gallery
from train.data.tasks.layout import split_of
from train.data.tasks.maze import FLOOR, LENGTHS, MOVES, START, WALL, find_ways, moves_of
from train.data.tasks.relation import SIDES
from train.data.tasks.sample import crop_step
from train.data.tasks.shapes import COLORS, QUADRANTS, SHAPES, Thing, draw_thing
from train.recipes.small_backbone import write_backbone
from train.recipes.vision_pretraining import NAMES, cell_labels, pretrain, read_scenes


NEW = [task for family, tasks in FAMILIES.items() if family != "shapes" for task in tasks]
SIZES = {"easy": 112, "hard": 224}  # the least
each_task = pytest.mark.parametrize("task", NEW)
each_level = pytest.mark.parametrize("level", LEVELS)


def make(task, index, level="easy", split="train", seed=0, image_size=None):
    return generate_sample(task, seed, index, split, image_size or SIZES[level], level)


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference in levels of 255."""
    return sum(ImageStat.Stat(ImageChops.difference(one, other)).mean) / 3


def things_of(sample) -> list[dict]:
    return [thing for thing in sample.objects if thing.get("shape")]


def named(sample) -> list[dict]:
    """The things that a question names, in the order of their names."""
    question = sample.question.replace("crosses", "cross")
    names = re.findall(rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})", question)
    return [thing for name in names for thing in things_of(sample) if (thing["color"], thing["shape"]) == name]


# Names


def test_every_name_has_a_function_and_a_family():
    assert [task for tasks in FAMILIES.values() for task in tasks] == list(TASKS)
    assert {*SEARCH, *SYNTHESIS, *SERIAL, "shapes"} == set(FAMILIES)
    assert tasks_of("all") == tuple(TASKS)
    assert tasks_of("all", "hard") == tuple(NEW)
    assert tasks_of("maze") == FAMILIES["maze"] and tasks_of("maze_goal") == ("maze_goal",)
    assert not tasks_of("color", "hard") and not tasks_of("describe_search", "hard") and not tasks_of("colour")
    assert family_of("chart_value") == "chart"
    assert {family_of(task) for task in PRETRAINING} == {"describe"}
    assert [generate_sample("all", 0, index, image_size=112).request.task for index in range(20)] == list(TASKS)


@each_task
def test_rows_carry_what_evaluation_groups_by(task):
    for level in LEVELS:
        sample = make(task, 1, level)
        row = json.loads(json.dumps(sample.record()))
        assert (row["family"], row["level"], row["task"]) == (family_of(task), level, task)
        assert row["chance"] == 1 / len(row["choices"]) and row["answer"] in row["choices"]
        assert row["answer_type"] in ("number", "letter", "word")
        assert ("hard" in row["id"]) == (level == "hard")
        assert row["rationale"] and row["assistant_images"] and len(row["boxes"]) == len(row["assistant_images"])


def test_answer_types():
    kinds = {"jigsaw": "number", "maze_move": "word", "search_color": "word", "chart_compare": "word"}
    assert {task: make(task, 0).answer_type for task in kinds} == kinds
    assert make("search_text", 0).answer_type == "number" and make("search_text", 0, "hard").answer_type == "letter"


@each_task
@each_level
def test_a_sample_follows_from_its_coordinates(task, level):
    assert make(task, 3, level).image.tobytes() == make(task, 3, level).image.tobytes()
    pictures = {make(task, index, level, seed=seed).image.tobytes() for seed in (0, 1) for index in (0, 1)}
    assert len(pictures) == 4


# Splits


def layout_of(sample) -> list:
    """The layout, recovered from the drawn objects alone: what `layout.py` proves holds of pictures only if this works."""
    family, size = family_of(sample.request.task), sample.image.width
    if family in ("search", "relation"):
        grid = size // 28 if sample.request.level == "easy" else 2 * (size // 74)
        cells = []
        for o in sample.objects:
            row, column = ((o["box"][k] + o["box"][k + 2]) // 2 * grid // size for k in (1, 0))
            cells.append([row, column, o["color"], o["shape"], o["digit"]])
        return ["scene", grid, sorted(cells)]
    if family == "jigsaw":
        pieces = [o for o in sample.objects if "home" in o]
        homes = [pieces[k]["home"] for k in range(len(pieces))]
        whole = pieces[0]["part_of"]
        color, shape = whole.split() if whole else (None, None)
        names = QUADRANTS if len(homes) == 4 else [f"row {r}, column {c}" for r in (1, 2, 3) for c in (1, 2, 3)]
        return ["jigsaw", shape, color, [names.index(home) for home in homes]]
    if family == "maze":
        side, doors = maze_of(sample)
        return ["maze", side, sorted(doors)]
    if family == "serial":
        corner, kind = min(o["box"][0] for o in sample.objects), sample.request.task
        if kind == "trace":
            cells = [[1 + (o["box"][k] - corner) // 28 for k in (1, 0)] for o in sample.objects]
            return [kind, sorted([*cell, o["lines"]] for cell, o in zip(cells, sample.objects))]
        shown = "next" if kind == "hops" else "arrow"
        return [kind, sorted([[o["box"][1] // 28, o["box"][0] // 28], o["color"], o[shown]] for o in sample.objects)]
    return ["chart", sample.request.level, [[o["color"], o["value"]] for o in sample.objects]]


def maze_of(sample) -> tuple[int, list]:
    cells = [o for o in sample.objects if "walls" in o]
    left, top = cells[0]["box"][:2]
    doors = []
    for o in cells:
        row, column = (o["box"][1] - top) // 28, (o["box"][0] - left) // 28
        for move in ("down", "right"):
            if move not in o["walls"].split():
                doors.append(((row, column), (row + MOVES[move][0], column + MOVES[move][1])))
    return round(len(cells) ** 0.5), doors


@each_task
@each_level
def test_a_layout_has_one_split_and_every_sample_one_of_its_own(task, level):
    for split in SPLITS:
        for index in range(3):
            assert split_of(layout_of(make(task, index, level, split))) == split


def test_every_split_has_its_share_of_layouts():
    shares = Counter(split_of(["jigsaw", shape, number]) for shape in SHAPES for number in range(500))
    assert shares["train"] / 3000 == pytest.approx(6 / 8, abs=0.03)
    assert shares["val"] / 3000 == pytest.approx(1 / 8, abs=0.02)
    assert shares["test"] / 3000 == pytest.approx(1 / 8, abs=0.02)


# Answers


def solve(sample) -> list[str]:
    """Every answer that the drawn objects allow, found from the question."""
    task, family = sample.request.task, family_of(sample.request.task)
    solvers = {"search": solve_search, "jigsaw": solve_jigsaw, "maze": solve_maze, "chart": solve_chart}
    return (solvers | {"serial": solve_serial}).get(family, solve_relation)(sample, task)


def solve_search(sample, task) -> list[str]:
    found = named(sample)
    if task == "search_color":
        shape = sample.question.split()[-1].rstrip("?")
        found = [thing for thing in sample.objects if thing["shape"] == shape]
    assert found == [thing for thing in sample.objects if thing["asked"]]
    half = sample.image.width // 2
    where = [
        ("bottom " if o["box"][1] >= half else "top ") + ("right" if o["box"][0] >= half else "left") for o in found
    ]
    assert all(o["box"][k + 2] <= half or o["box"][k] >= half for o in sample.objects for k in (0, 1))
    answers = {
        "search_color": [o["color"] for o in found],
        "search_text": [o["digit"] for o in found],
        "search_count": [str(len(found))],
        "search_position": where,
    }
    return answers[task]


def solve_jigsaw(sample, task) -> list[str]:
    pieces = [o for o in sample.objects if "home" in o]
    return [str(k + 1) for k, o in enumerate(pieces) if sample.question.endswith(f"belongs at {o['home']}?")]


def solve_maze(sample, task) -> list[str]:
    _, doors = maze_of(sample)
    left, top = next(o for o in sample.objects if "walls" in o)["box"][:2]
    cells = {((o["box"][1] - top) // 28, (o["box"][0] - left) // 28): o for o in things_of(sample)}
    start = [cell for cell, o in cells.items() if (o["color"], o["shape"]) == START[:2]]
    assert len(start) == 1
    ways = find_ways(doors, start[0])
    reached = [cell for cell in cells if cell in ways and cell != start[0]]
    if task == "maze_goal":
        assert len(cells) == 5
        return [cells[cell]["digit"] for cell in reached]
    moves = moves_of(ways[reached[0]])
    assert sample.rationale[1] == f"The way to the star is {', '.join(moves)}."
    assert str(len(moves)) in LENGTHS[sample.request.level]
    return [moves[0]] if task == "maze_move" else [str(len(moves))]


def solve_chart(sample, task) -> list[str]:
    values = {o["color"]: o["value"] for o in sample.objects}
    assert len(values) == len(sample.objects) >= 3
    asked = [color for color in re.findall(r"\w+", sample.question) if color in COLORS]
    if task == "chart_value":
        return [str(values[asked[0]])]
    if task == "chart_compare":
        assert values[asked[0]] != values[asked[1]]
        return ["yes" if values[asked[0]] > values[asked[1]] else "no"]
    best = (max if "highest" in sample.question else min)(values.values())
    return [color for color, value in values.items() if value == best]


def solve_serial(sample, task) -> list[str]:
    """The way is walked on the drawn objects, one step after the other; every step of it is what the rationale says."""
    if task == "trace":
        return [solve_trace(sample)]
    tiles = {o["color"]: o for o in sample.objects}
    places = {tuple(o["box"]): color for color, o in tiles.items()}
    assert len(places) == len(tiles) == len(sample.choices)
    words = sample.question.rstrip("?").split()
    number, at, said = int(words[3]), words[-1], []
    for _ in range(number):
        if task == "hops":
            at = tiles[at]["next"]
        else:
            (down, right), (left, top) = DIRECTIONS[tiles[at]["arrow"]], tiles[at]["box"][:2]
            at = None
            while at is None:
                left, top = left + 28 * right, top + 28 * down
                assert 0 <= left < sample.image.width and 0 <= top < sample.image.height
                at = places.get((left, top, left + 28, top + 28))
        said.append(at)
    assert sample.rationale == [f"{color} {count}" for count, color in enumerate(said, 1)]
    return [at]


def solve_trace(sample) -> str:
    """Follow a line from side to side of the patches, by what the patches say."""
    corner = min(o["box"][0] for o in sample.objects)
    patches = {((o["box"][1] - corner) // 28, (o["box"][0] - corner) // 28): o for o in sample.objects}
    last = max(patches)[0]
    outward = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
    across = {"left": "right", "right": "left", "up": "down", "down": "up"}

    def bead(row, column, side) -> str | None:
        at_border = {"left": column == 0, "right": column == last, "up": row == 0, "down": row == last}[side]
        return patches[row, column]["side_bead" if side in ("left", "right") else "end_bead"] if at_border else None

    wanted = sample.question.rstrip("?").split("from the ")[1]
    begins = [(*cell, side) for cell in patches for side in outward if bead(*cell, side) == wanted]
    assert len(begins) == 1
    (row, column, side), said = begins[0], []
    while True:
        lines = patches[row, column]["lines"]
        if lines == "crossing":
            said.append(f"{'abcdefgh'[column]}{row + 1}")
            side = across[side]
        else:
            (pair,) = [set(pair.split()) for pair in lines.split(", ") if side in pair.split()]
            (side,) = pair - {side}
        if (end := bead(row, column, side)) is not None:
            break
        row, column, side = row + outward[side][0], column + outward[side][1], across[side]
    color, shape = end.split()
    assert shape == "circle" and len(set(said)) == len(said) == sample.serial.num_steps
    assert sample.rationale == [f"{word} {count}" for count, word in enumerate([*said[1:], color], 1)]
    return color


def solve_relation(sample, task) -> list[str]:
    size = sample.image.width
    grid = size // 28 if sample.request.level == "easy" else 2 * (size // 74)
    cells = {tuple((o["box"][k] + o["box"][k + 2]) // 2 * grid // size for k in (1, 0)): o for o in sample.objects}
    where = [next(cell for cell, o in cells.items() if o is thing) for thing in named(sample)]
    (row, column), *others = where
    if task == "relation_color":
        assert not others
        side = next(side for side in SIDES if f"directly {side} " in sample.question)
        around = {name: cells[row + down, column + right]["color"] for name, (down, right) in SIDES.items()}
        assert len(set(around.values())) == 4
        return [around[side]]
    ((other_row, other_column),) = others
    assert (row == other_row) != (column == other_column)
    if row == other_row:
        return ["left" if other_column < column else "right"]
    return ["above" if other_row < row else "below"]


@each_task
@each_level
def test_objects_allow_one_answer_and_the_last_step_tells_it(task, level):
    for index in range(10):
        sample = make(task, index, level)
        assert solve(sample) == [sample.answer]
        assert sample.answer in sample.rationale[-1]
        for left, top, right, bottom in (o["box"] for o in sample.objects):
            assert 0 <= left < right <= sample.image.width and 0 <= top < bottom <= sample.image.height


# Pixels


@pytest.mark.parametrize("task", ["search_text", "search_count", "relation_color", "relation_side"])
@each_level
def test_scenes_show_the_recorded_things(task, level):
    """Redraw every thing in every color: the recorded one fits best, by far."""
    sample = make(task, 1, level)
    for o in sample.objects:
        region = sample.image.crop(o["box"])
        misfit = {}
        for color in COLORS:
            redrawn = region.copy()
            draw_thing(redrawn, Thing(color, o["shape"], o["digit"]), (0, 0, *region.size))
            misfit[color] = difference(redrawn, region)
        best, second = sorted(misfit, key=misfit.get)[:2]
        # Smoothed rims count twice when redrawn, and small things have much of a rim.
        assert best == o["color"] and misfit[best] < 10 and misfit[second] > misfit[best] + 5
    if level == "easy":
        assert all(o["box"][k] % 28 == 2 and o["box"][k + 2] % 28 == 26 for o in sample.objects for k in (0, 1))
        cells = {(o["box"][0] // 28, o["box"][1] // 28) for o in sample.objects}
        assert len(cells) == len(sample.objects)


@each_level
@pytest.mark.parametrize("image_size", [224, 252])
def test_solved_puzzle_is_made_of_the_pieces_at_their_homes(level, image_size):
    sample = make("jigsaw", 2, level, image_size=image_size)
    (solved,) = sample.assistant_images
    pieces = [o for o in sample.objects if "home" in o]
    across = round(len(pieces) ** 0.5)
    side = solved.width // across
    names = QUADRANTS if across == 2 else [f"row {r}, column {c}" for r in (1, 2, 3) for c in (1, 2, 3)]
    assert solved.width % 28 == 0 and sorted(o["home"] for o in pieces) == sorted(names)
    regions = []
    for home in range(len(pieces)):
        row, column = divmod(home, across)
        regions.append(solved.crop((column * side, row * side, (column + 1) * side, (row + 1) * side)))
    for o in pieces:
        assert all(o["box"][k] % 28 == 0 for k in range(4))
        # Without the number, whose size is the same in both, and without the gap.
        shown = sample.image.crop(o["box"]).resize((side, side), Image.Resampling.BOX)
        inside = (side // 2, side // 2, side - 4, side - 4)
        misfit = [difference(shown.crop(inside), region.crop(inside)) for region in regions]
        assert names[misfit.index(min(misfit))] == o["home"]
        number = (8, 8, 20, 20)
        there = regions[names.index(o["home"])].crop(number)
        assert there.tobytes() == sample.image.crop(o["box"]).crop(number).tobytes()


@pytest.mark.parametrize("task", FAMILIES["maze"])
def test_mazes_show_the_recorded_walls_and_the_way(task):
    sample = make(task, 4, image_size=168)
    for o in (o for o in sample.objects if "walls" in o):
        left, top, right, bottom = o["box"]
        assert left % 28 == top % 28 == 0 and right - left == 28
        spots = {
            "up": (left + 14, top),
            "down": (left + 14, bottom - 1),
            "left": (left, top + 14),
            "right": (right - 1, top + 14),
        }
        for move, spot in spots.items():
            assert sample.image.getpixel(spot) == (WALL if move in o["walls"].split() else FLOOR)
    (drawn,), (box,) = sample.assistant_images, sample.boxes
    assert difference(drawn, sample.image.crop(box)) > 0
    changed = ImageChops.difference(drawn, sample.image.crop(box)).getbbox()
    way = [o["box"] for o in sample.objects if "walls" in o and o["asked"]]
    assert changed[0] + box[0] >= min(one[0] for one in way) and changed[3] + box[1] <= max(one[3] for one in way)


@pytest.mark.parametrize("image_size", [112, 140, 224, 448])
def test_bars_are_as_high_as_their_values(image_size):
    sample = make("chart_value", 1, image_size=image_size)
    tops = {}
    for o in sample.objects:
        left, top, right, bottom = o["box"]
        middle = (left + right) // 2
        # The first pixel of the bar's color from above, whatever was recorded.
        colored = next(y for y in count() if sample.image.getpixel((middle, y)) == COLORS[o["color"]])
        assert colored == top + 1  # below the outline
        assert sample.image.getpixel((middle, bottom - 2)) == COLORS[o["color"]]
        tops[o["value"]] = bottom - top
    assert len({height / value for value, height in tops.items()}) == 1
    if image_size == 224:
        assert all(o["box"][1] % 28 == 0 for o in sample.objects)
    assert TICKS["easy"] == 1 and len(VALUES["easy"]) * min(tops) <= image_size


@each_task
@each_level
def test_assistant_pictures_show_their_boxes_in_whole_patches(task, level):
    for index in range(2):
        sample = make(task, index, level, image_size=224)
        for picture, box in zip(sample.assistant_images, sample.boxes, strict=True):
            assert picture.width % 28 == picture.height % 28 == 0
            assert picture.width * picture.height >= 4 * 28 * 28  # what processors take without another resize
            assert 0 <= box[0] < box[2] <= 224 and 0 <= box[1] < box[3] <= 224
            asked = [o["box"] for o in sample.objects if o["asked"]]
            assert any(
                box[0] <= one[0] and one[2] <= box[2] and box[1] <= one[1] and one[3] <= box[3] for one in asked
            )
            if family_of(task) in ("chart", "relation") or (family_of(task) == "search" and level == "easy"):
                assert picture.tobytes() == sample.image.crop(box).tobytes()


@pytest.mark.parametrize(
    "box, region",
    [
        ((30, 2, 54, 26), (28, 0, 84, 56)),  # a thing in one patch
        ((86, 86, 110, 110), (56, 56, 112, 112)),  # in the last corner
        ((30, 2, 82, 110), (28, 0, 84, 112)),
    ],
)
def test_crops_stay_inside(box, region):
    assert crop_step("", Image.new("RGB", (112, 112)), box).box == region


# Balance


def test_nothing_is_known_without_the_picture():
    train, held_out = (
        list(make_rows(tuple(NEW), 120, seed, split, "easy", 112)) for seed, split in ((0, "train"), (1, "test"))
    )
    table = measure(train, held_out)
    assert list(table) == NEW
    for scores in table.values():
        assert scores["constant"] == pytest.approx(scores["chance"])
        assert scores["question"] < scores["chance"] + 0.12
        assert scores["words"] < scores["chance"] + 0.12


def test_leaks_are_found():
    """An answer that the question tells, one that its words tell, and one that comes too often."""
    row = {"task": "maze_goal", "chance": 0.5}
    told = [
        {**row, "question": f"Is {k} even, {'yes' if k % 2 else 'no'}?", "answer": ["no", "yes"][k % 2]}
        for k in range(40)
    ]
    scores = measure(told, told[::-1])["maze_goal"]
    assert scores["constant"] == 0.5 and scores["question"] == 1
    fresh = [{**one, "question": one["question"].replace("Is ", "Is 1")} for one in told]
    scores = measure(told, fresh)["maze_goal"]
    assert scores["question"] < 0.7 and scores["words"] == 1
    often = [{**row, "question": "?", "answer": "yes" if k % 4 else "no"} for k in range(40)]
    assert measure(often, often)["maze_goal"]["constant"] == 0.75


def test_balance_reads_written_files(tmp_path, capsys):
    data = write_dataset("chart", 12, 0, tmp_path, image_size=112)
    balance(["--data", str(data)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["family", "task", "chance", "constant", "question", "words"]
    assert [line.split()[1] for line in lines[1:]] == list(FAMILIES["chart"])
    for bad, message in (
        (["--data", str(tmp_path / "no.jsonl")], "there is no file"),
        (["--split", "dev"], "`split` must be one of train, val, test; got 'dev'"),
    ):
        with pytest.raises(SystemExit):
            balance(bad)
        assert message in capsys.readouterr().err


# Levels, gallery, errors


@pytest.mark.parametrize(
    "task", ["search_color", "jigsaw", "maze_goal", "chart_value", "relation_side", *FAMILIES["serial"]]
)
def test_hard_pictures_have_a_least_size(task, tmp_path):
    with pytest.raises(ValueError, match=f"at least 224 pixels for task {task} at level hard, got 196"):
        write_dataset(task, 1, 0, tmp_path / "new", image_size=196, level="hard")
    assert not (tmp_path / "new").exists()


def test_gallery_is_one_page_with_all_in_it(tmp_path, capsys):
    main(["--task", "all", "--n", "40", "--output", str(tmp_path), "--image-size", "112", "--gallery"])
    assert f"Gallery in {tmp_path / 'gallery.html'}" in capsys.readouterr().out
    page = (tmp_path / "gallery.html").read_text()
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert page.count("<article>") == 40
    assert page.count('src="data:image/png;base64,') == page.count("src=") == 40 + sum(len(r["boxes"]) for r in rows)
    assert all(row["question"] in page and row["id"] in page for row in rows)
    short = write_gallery(tmp_path / "data.jsonl", tmp_path / "short.html", limit=20).read_text()
    assert short.count("<article>") == 20 and all(f"{task}-train" in short for task in TASKS)
    with pytest.raises(ValueError, match="there is no file"):
        write_gallery(tmp_path / "no.jsonl")
    with pytest.raises(ValueError, match="`limit` must be >= 1, got 0"):
        write_gallery(tmp_path / "data.jsonl", limit=0)


# What a vision tower is told of their cells


def test_labels_of_cells_say_what_the_objects_are():
    kinds = list(NAMES)
    for task in ("describe_search", "search_text", "jigsaw", "maze_length", "chart_value", "hops", "arrows", "trace"):
        sample = make(task, 1, image_size=224)
        labels = cell_labels(sample.objects, 224, sample.grid)
        assert labels.shape == (8, 8, len(kinds))
        for o in sample.objects:
            left, top, right, bottom = (edge / 28 for edge in o["box"])
            covered = labels[int(top) : -int(-bottom // 1), int(left) : -int(-right // 1)].flatten(0, 1)
            for kind in kinds:
                if o.get(kind) is not None:
                    assert set(covered[:, kinds.index(kind)].tolist()) == {NAMES[kind].index(str(o[kind]))}
    described = make("describe_search", 1, image_size=224)
    assert (
        int(described.answer)
        == len(described.objects)
        == int((cell_labels(described.objects, 224, 8)[..., 0] > 0).sum())
    )
    assert described.rationale[7].startswith("Row 8: ") and described.rationale[0].count(",") == 7


def test_towers_learn_from_several_files_of_one_size(tmp_path):
    scenes = write_dataset("describe_search", 8, 0, tmp_path / "scenes", image_size=112)
    puzzles = write_dataset("jigsaw", 8, 0, tmp_path / "puzzles", image_size=112)
    mazes = write_dataset("maze", 8, 0, tmp_path / "mazes", image_size=112)
    paths, labels = read_scenes([scenes, puzzles, mazes])
    assert len(paths) == 24 and labels.shape == (24, 4, 4, len(NAMES)) and labels.dtype == torch.long
    model = write_backbone(texts_of(scenes), tmp_path / "model", hidden_size=64, num_layers=2)
    scores = pretrain(model, [scenes, puzzles, mazes], epochs=1, batch_size=8)
    assert list(scores) == ["color", "shape", "digit", "home", "walls", "place"]
    assert list(pretrain(model, scenes, epochs=1, batch_size=8)) == ["color", "shape", "digit", "place"]


def test_scenes_that_cannot_teach_about_cells_are_refused(tmp_path):
    small = write_dataset("describe", 1, 0, tmp_path / "small", image_size=112)
    large = write_dataset("describe_search", 1, 0, tmp_path / "large", image_size=168)
    hard = write_dataset("search", 1, 0, tmp_path / "hard", level="hard")
    with pytest.raises(
        ValueError, match="all be of one size, got 112 x 112 pixels with 4 x 4 cells, 168 x 168 pixels with 6"
    ):
        read_scenes([small, large])
    with pytest.raises(ValueError, match="search_color-hard-train-0-000000 .* cannot teach about cells"):
        read_scenes(hard)


def test_shares_deal_a_task_more_often_and_repeat_no_sample():
    """What a task gives is what it gives alone, sample by sample, whatever else is dealt."""
    assert tasks_of("search_color, jigsaw") == ("search_color", "jigsaw")
    assert tasks_of("search_color:2, jigsaw") == ("search_color", "search_color", "jigsaw")
    assert not tasks_of("jigsaw:0") and not tasks_of("jigsaw:many") and not tasks_of("puzzle:2")
    dealt = [make("search_color:2,jigsaw", index, image_size=112) for index in range(6)]
    alone = {
        name: iter([make(name, index, image_size=112) for index in range(4)]) for name in ("search_color", "jigsaw")
    }
    assert [sample.request.task for sample in dealt] == ["search_color", "search_color", "jigsaw"] * 2
    for sample in dealt:
        assert sample.record() == next(alone[sample.request.task]).record()
