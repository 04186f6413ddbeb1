"""Serial questions: every question about a picture, what the answer would be from elsewhere, and no way around the steps."""

import hashlib
import json
from collections import Counter
from random import Random

import pytest
import torch
from PIL import Image

from train.data.tasks import FAMILIES, LEVELS, continue_from, generate_questions, generate_sample, write_dataset
from train.data.tasks.__main__ import main
from train.data.tasks.arrows import DIRECTIONS, arrows_layout, deal_arrows
from train.data.tasks.balance import main as balance
from train.data.tasks.balance import make_rows
from train.data.tasks.hops import deal_hops, hops_layout
from train.data.tasks.layout import split_of
from train.data.tasks.lines import (
    TURNS,
    can_join,
    draw_line,
    edges_of,
    end_point,
    find_following,
    lines_layout,
    trace_line,
)
from train.data.tasks.sample import Request
from train.data.tasks.serial import serial_answer
from train.data.tasks.shapes import COLORS, LIGHT_COLORS, MORE_COLORS
from train.data.tasks.shortcuts import measure_shortcuts
from train.data.tasks.tiles import MOST_STEPS, TILE_COLORS
from train.data.tasks.trace import deal_trace
from train.recipes.vision_pretraining import NAMES, num_classes


SIZES = {"easy": 112, "hard": 224}
each_task = pytest.mark.parametrize("task", FAMILIES["serial"])
each_level = pytest.mark.parametrize("level", LEVELS)


def make(task, index, level="easy", split="train", questions="one"):
    return generate_questions(task, 0, index, split, SIZES[level], level, questions)


def row_of(sample) -> dict:
    return json.loads(json.dumps(sample.record()))


def test_hops_are_what_the_first_models_were_trained_on():
    samples = [sample for index in range(8) for sample in make("hops", index, questions="steps")]
    content = [json.dumps([s.id, s.question, s.answer, s.rationale, s.boxes, s.objects]) for s in samples]
    assert hashlib.sha256("".join(content).encode()).hexdigest()[:16] == "6661066a4f19ff56"


# What the answer would be


@each_task
@each_level
def test_a_row_says_where_every_way_leads(task, level):
    """The end of its own way, every place on it, and the way of another picture's state."""
    rows = [row_of(make(task, index, level)[0]) for index in range(12)]
    for row, donor in zip(rows, rows[1:]):
        serial = row["serial"]
        way, number = serial["way"], serial["num_steps"]
        assert continue_from(row, serial["start"], number) == row["answer"]
        assert way[0] == serial["start"] and len(way) > number and len(set(way)) == len(way)
        said = [text.rsplit(" ", 1) for text in row["rationale"]]
        assert said == [[continue_from(row, way[k], 0), str(k)] for k in range(1, number + 1)]
        assert all(continue_from(row, way[k], number - k) == row["answer"] for k in range(number + 1))
        donor_state = donor["serial"]["way"][1]  # every state of a picture is one of every other picture
        state, left = donor_state, 0
        while left < number - 1 and state in serial["following"]:
            state, left = serial["following"][state], left + 1
        assert continue_from(row, donor_state, left) == serial["contents"][state]
    if task != "trace":
        assert len(rows[0]["serial"]["way"]) == len(TILE_COLORS[level])


def test_questions_without_an_answer_are_refused():
    row = row_of(make("trace", 3)[0])
    with pytest.raises(ValueError, match="`state` must be one of 1,1 up, .* for row trace-train-0-000003; got 'red'"):
        continue_from(row, "red", 1)
    with pytest.raises(ValueError, match=r"`num_steps` must be at most 1 from .* where its way ends; got 5"):
        continue_from(row, row["serial"]["way"][-2], 5)
    assert continue_from(row, row["serial"]["start"], None) == row["answer"]  # to the end, wherever that is
    with pytest.raises(
        ValueError, match="`num_steps` must be a number for row hops-train-0-000000: its way goes round"
    ):
        continue_from(row_of(make("hops", 0)[0]), "red", None)
    with pytest.raises(ValueError, match="`num_steps` must be >= 0, got -1"):
        continue_from(row, row["serial"]["start"], -1)
    with pytest.raises(ValueError, match="Row color-train-0-000000 must be of a serial task, but task color is none"):
        continue_from(row_of(generate_sample("color", 0, 0)), "red", 1)


def test_more_steps_than_tiles_are_refused():
    following = {"red": "blue", "blue": "green", "green": "red"}
    contents = {color: color for color in following}
    assert serial_answer(following, contents, "red", 2).way == ("red", "blue", "green")
    for number in (0, 3):
        with pytest.raises(ValueError, match=f"must be 1 to 2 from red, got {number}"):
            serial_answer(following, contents, "red", number)


# Every question about a picture


@pytest.mark.parametrize("questions, num_rows", [("steps", 4), ("all", 32)])
def test_every_question_about_a_picture_is_a_row(tmp_path, questions, num_rows):
    data = write_dataset("hops,arrows", 4, 0, tmp_path, image_size=112, questions=questions, split="val")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    assert (
        len(rows)
        == 4 * num_rows
        == len({row["id"] for row in rows})
        == len({row["question"] + row["image"] for row in rows})
    )
    pictures = Counter(row["image"] for row in rows)
    assert list(pictures.values()) == [num_rows] * 4
    for number, image in enumerate(pictures):
        alone = generate_sample("hops,arrows", 0, number, "val", 112)
        assert image == alone.record()["image"]
        with Image.open(tmp_path / image) as written:
            assert written.convert("RGB").tobytes() == alone.image.tobytes()
        mine = [row for row in rows if row["image"] == image]
        steps = Counter(row["serial"]["num_steps"] for row in mine)
        assert steps == dict.fromkeys(range(1, 5), num_rows // 4)
        assert len({json.dumps([row["serial"]["following"], row["serial"]["contents"]]) for row in mine}) == 1
        (same,) = [row for row in mine if row["question"] == alone.question]
        assert {**same, "id": alone.id} == row_of(alone)
    # The pictures between the steps are shared as well, and show what their row says.
    between = {path for row in rows for path in row["assistant_images"]}
    assert len(between) <= 4 * 8 < sum(len(row["assistant_images"]) for row in rows) or questions == "steps"
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.glob("images/*")} == {*pictures, *between}


def test_all_lines_of_a_picture_can_be_asked_for():
    for index in range(6):
        samples = make("trace", index, questions="all")
        assert len({sample.id for sample in samples}) == len(samples) > 1
        assert len(make("trace", index, questions="steps")) == 1  # a line has one number of crossings
        paths = {}
        for sample in samples:
            assert sample.serial.contents[sample.serial.way[-1]] == sample.answer
            for path, picture in zip(sample.record()["assistant_images"], sample.assistant_images, strict=True):
                assert paths.setdefault(path, picture.tobytes()) == picture.tobytes()


def test_questions_that_a_task_does_not_have_are_refused(tmp_path, capsys):
    for arguments, message in (
        ({"task": "hops", "questions": "every"}, "`questions` must be one of one, steps, all; got 'every'"),
        (
            {"task": "hops,color", "questions": "all"},
            "`questions` must be one for task color, which asks one question",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            write_dataset(n=1, seed=0, output=tmp_path / "set", **arguments)
        with pytest.raises(SystemExit):
            main(["--n", "1", "--output", str(tmp_path / "set"), *(f"--{k}={v}" for k, v in arguments.items())])
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="at least 224 pixels for task hops at level hard, got 112"):
        generate_questions("hops", 0, 0, image_size=112, level="hard", questions="all")


# Balance and shortcuts


@pytest.mark.parametrize(
    "task, level", [("hops", "easy"), ("arrows", "easy"), ("trace", "easy"), ("hops", "hard"), ("trace", "hard")]
)
def test_every_answer_comes_as_often_after_every_number_of_steps(task, level):
    count = len(TILE_COLORS[level]) * MOST_STEPS[level]
    rows = list(make_rows((task,), count, 5, "test", level, SIZES[level]))
    pairs = Counter((row["serial"]["num_steps"], row["answer"]) for row in rows)
    assert len(pairs) == count and set(pairs.values()) == {1}


@each_task
def test_no_clue_comes_near_the_answer(task):
    """With few rows, so that chance alone is some points; what 4,000 rows give is printed by the balance command."""
    rows = [list(make_rows((task,), 480, seed, "train", "easy", 112)) for seed in (0, 1)]
    by_steps = measure_shortcuts(*rows)[task]
    assert list(by_steps) == [1, 2, 3, 4]
    for number, scores in by_steps.items():
        for clue, score in scores.items():
            if number > 1 and "after 1" not in clue and not clue.startswith("together"):
                assert score < 1 / 6 + 0.12, (number, clue)


def test_shortcuts_are_found():
    """Pointers that are no ring, so that tiles differ in how many point to them; and answers that are the nearest tile."""
    rng, colors = Random(0), list(COLORS)
    pointed, nearest = [], []
    for _ in range(600):
        cells = dict(zip(colors, rng.sample([(row, column) for row in range(4) for column in range(4)], 8)))
        objects = [{"color": c, "box": [28 * x, 28 * y, 28 * x + 28, 28 * y + 28]} for c, (y, x) in cells.items()]
        order = rng.sample(colors, 8)
        start, answer = order[0], order[3]
        following = dict(zip(order, order[1:4])) | {color: rng.choice([answer, order[1]]) for color in order[3:]}
        row = {"task": "hops", "objects": objects, "answer": answer}
        pointed.append({**row, "serial": {"start": start, "num_steps": 3, "following": following}})
        ring = dict(zip(order, order[1:] + order[:1]))
        apart = {c: sum((a - b) ** 2 for a, b in zip(cells[c], cells[start])) for c in order[2:]}
        near = {**row, "answer": min(apart, key=apart.get)}
        nearest.append({**near, "serial": {"start": start, "num_steps": 3, "following": ring}})
    scores = {
        name: measure_shortcuts(rows[:300], rows[300:])["hops"][3]
        for name, rows in (("pointed", pointed), ("nearest", nearest))
    }
    assert scores["pointed"]["in-degree"] > 0.6 and scores["pointed"]["distance"] < 0.3
    assert scores["nearest"]["nearest"] > 0.6 and scores["nearest"]["in-degree"] < 0.3
    assert scores["pointed"]["together"] > 0.6 and scores["nearest"]["together"] > 0.6


def test_balance_prints_shortcuts_of_serial_tasks_only(tmp_path, capsys):
    data = write_dataset("hops,color", 128, 0, tmp_path, image_size=112)
    balance(["--data", str(data)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if "by steps" in line] == [["hops", "by", "steps", "1", "2", "3", "4"]]
    assert any(line.startswith("in-degree") and line.count("%") == 4 for line in lines)


# Pictures


@each_level
@pytest.mark.parametrize("task", ["hops", "arrows"])
def test_tiles_show_what_they_are(task, level):
    all_colors = COLORS | MORE_COLORS
    (sample,) = make(task, 3, level)
    for tile in sample.objects:
        left, top, right, _ = tile["box"]
        assert sample.image.getpixel((left + 5, top + 5)) == all_colors[tile["color"]]
        if task == "hops":
            assert sample.image.getpixel((left + 14, top + 14)) == all_colors[tile["next"]]
            continue
        ink = (0, 0, 0) if tile["color"] in LIGHT_COLORS else (255, 255, 255)
        down, right = DIRECTIONS[tile["arrow"]]
        length = (down**2 + right**2) ** 0.5
        # The head is wider than the shaft: its barbs are on the side to which the arrow points.
        for along, across, is_ink in ((0.5, 0.0, True), (0.12, 0.35, True), (-0.35, 0.38, False), (-0.45, 0.0, True)):
            x = left + 14 * (1 + (right * along - down * across) / length)
            y = top + 14 * (1 + (down * along + right * across) / length)
            assert (sample.image.getpixel((int(x), int(y))) == ink) == is_ink
    for step, picture in zip(sample.steps, sample.assistant_images):
        tile = sample.image.crop(step.box)
        for corner in ((6, 6), (34, 6), (6, 34), (34, 34)):
            assert (
                picture.crop((*corner, corner[0] + 16, corner[1] + 16)).tobytes()
                == tile.crop((6, 6, 22, 22)).tobytes()
            )


@each_level
def test_patches_show_their_lines_and_beads(level):
    (sample,) = make("trace", 5, level)
    dark = (40, 40, 60)
    for patch in sample.objects:
        left, top = patch["box"][:2]
        if patch["side_bead"]:
            color = (COLORS | MORE_COLORS)[patch["side_bead"].split()[0]]
            assert sample.image.getpixel((left + (6 if left == 0 else 22), top + 14)) == color
        if patch["side_bead"] or patch["end_bead"]:
            continue  # they cover the lines
        # A crossing passes the middle; a bend cuts off a corner.
        assert (sample.image.getpixel((left + 14, top + 14)) == dark) == (patch["lines"] == "crossing")
        assert (sample.image.getpixel((left + 10, top + 10)) == dark) == (patch["lines"] == "left up, right down")
        assert (sample.image.getpixel((left + 10, top + 17)) == dark) == (patch["lines"] == "left down, right up")
    last = sample.assistant_images[-1]
    assert any(last.getpixel((x, y)) == (40, 110, 230) for x in range(56) for y in range(56))  # the way so far


def test_parity_of_crossings_is_known_from_the_ends():
    """Also that the rule is needed: every second pair of ends is left out."""
    rng, seen = Random(0), Counter()
    for _ in range(200):
        lines = {(r, c): rng.choice(["crossing", *TURNS]) for r in range(1, 5) for c in range(1, 5)}
        for start in edges_of(4):
            crossings, end = trace_line(lines, start)
            assert trace_line(lines, end) == (crossings[::-1], start)
            if len(set(crossings)) == len(crossings):
                assert can_join(start, end, len(crossings), 4)
            seen[can_join(start, end, 1, 4)] += 1
    assert min(seen.values()) > 400


@each_level
def test_asked_lines_end_as_far_away_as_any_end_may_be(level):
    """Also with two crossings on a large board, where lines that are drawn at random end near their start."""
    side = len(TILE_COLORS[level]) // 2

    def apart(one, other) -> int:
        return sum(abs(line - other_line) for line, other_line in zip(end_point(one), end_point(other)))

    edges = edges_of(side)
    allowed = [apart(one, other) for one in edges for other in edges if can_join(one, other, 2, side)]
    drawn = []
    for index in range(120):
        lines, start = draw_line(Request("trace", "train", 0, index, SIZES[level], level), side, 2)
        crossings, end = trace_line(lines, start)
        assert len(set(crossings)) == len(crossings) == 2 and find_following(lines, side) is not None
        drawn.append(apart(start, end))
    assert sum(drawn) / len(drawn) == pytest.approx(sum(allowed) / len(allowed), rel=0.15)


def test_closed_lines_are_found():
    bend, other = TURNS
    closed = {(1, 1): bend, (1, 2): other, (2, 1): other, (2, 2): bend}
    assert find_following(dict.fromkeys(closed, "crossing"), 2) is not None
    kinds = [
        find_following(dict(zip(closed, kinds)), 2) is None
        for kinds in ((bend, other, other, bend), (other, bend, bend, other))
    ]
    assert sorted(kinds) == [False, True]


@each_task
def test_splits_of_all_questions_are_those_of_the_layout(task):
    deal, layout = {
        "hops": (deal_hops, hops_layout),
        "arrows": (deal_arrows, arrows_layout),
        "trace": (deal_trace, lambda board: lines_layout(board.lines)),
    }[task]
    for split in ("train", "val", "test"):
        for index in range(8):
            board, _, _ = deal(Request(task, split, 0, index, 112))
            assert split_of(layout(board)) == split


def test_towers_learn_more_colors_only_where_there_are_more():
    """What is learned from data without them is, number by number, what it was."""
    assert num_classes("color", torch.tensor([0, 8])) == 9
    assert num_classes("color", torch.tensor([0, 9])) == len(NAMES["color"]) == 17
    assert num_classes("digit", torch.tensor([0])) == 11
