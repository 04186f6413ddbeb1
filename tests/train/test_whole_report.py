"""Every diagnostic on models of which it is known what their latents hold (`whole_toy.py`): each number and each sentence of the report."""

import json
import math

import numpy as np
import pytest
from whole_toy import whole_items, whole_subject

from evaluation.faithfulness.arms import ARMS
from evaluation.faithfulness.items import in_order
from evaluation.faithfulness.report import write_report
from evaluation.faithfulness.run import take_all


KINDS = ("content", "task", "place", "useless")
TASKS = ("color", "count")
FEWER = ("sham", "shared", "noise_0.3_rms", "matched", "swap", "cross_task", "region", "skip")


@pytest.fixture(scope="module", params=KINDS)
def found(request) -> tuple[str, dict]:
    """A kind of model, and the whole report on 32 questions."""
    return request.param, {
        one.name: one for one in take_all(whole_subject(request.param, whole_items(32)), ARMS, draws=2)
    }


def rows_of(result, table: str, *names: str) -> dict[tuple, dict]:
    return {tuple(row[name] for name in names): row for row in result.tables[table]}


def test_the_verdict_of_every_kind(found):
    """32 items are enough for a loss of 100 points, and too few to exclude one of 5: then the report says so."""
    kind, results = found
    notes = results["D1"].notes[:3]
    for task, note in zip(("", "color: ", "count: "), notes, strict=True):
        if kind == "content":
            assert note.startswith(
                f"{task}The content of the latents is used: with another picture's of the same task -100.0 points"
            )
        else:
            bound = 10.7 if not task else 19.4  # Wilson's margin of 32 of 32, and of 16 of 16
            said = f"{task}With another picture's latents of the same task: not decided: no loss larger than {bound} points (0 of "
            assert note.startswith(said), note
    rows = rows_of(results["D1"], "arms by task", "task", "arm")
    for task in TASKS:
        for name, by_kind in {
            "sham": "yyyy",
            "zero": "nnny",
            "swap": "nyyy",
            "swap_question": "nyyy",
            "cross_task": "nnyy",
            "first_repeat": "yyny",
            "skip": "nnny",
            "dummy": "nnny",
        }.items():
            is_right = by_kind[KINDS.index(kind)] == "y"
            row = rows[task, name]
            if (kind, name) == ("content", "cross_task"):  # the other task has the same eight numbers
                assert row["accuracy"] <= 25 and row["b"] >= 12
                continue
            assert (row["accuracy"], row["b"]) == (100 * is_right, 16 * (not is_right)), (name, task)
            assert row["accuracy high"] - row["accuracy low"] > 15 and row["score low"] < row["score high"]


def test_single_latents(found):
    """D2: in the content and the task each of three latents says a third; the mean of a place is what stands there anyway."""
    kind, results = found
    for table in ("u_t", "u_t by task"):
        for row in results["D2"].tables[table]:
            assert row["u_t"] > 0.01 if kind in ("content", "task", "place") else row["u_t"] == 0, row


def test_slots_and_compute(found):
    """D3, D13: dummies and no latents break all but the useless ones; fewer latents break those that need their places."""
    kind, results = found
    for table, name in (
        ("D3", "slots only"),
        ("D3", "nothing"),
        ("D13", "dummy tokens, same budget"),
        ("D13", "latents disabled"),
    ):
        for task in (None, *TASKS):
            rows = results[table].tables["arms" if task is None else "arms by task"]
            (row,) = [one for one in rows if one["arm"] == name and one.get("task") == task]
            assert row["accuracy"] == (100 if kind == "useless" else 0)
            # Against the clean run, which is right, in D13; against nothing, which is wrong where latents are needed, in D3.
            asked = len(whole_items(32)) // (1 if task is None else 2)
            assert (row["b"], row["c"]) == (asked if table == "D13" and kind != "useless" else 0, 0)
            # The task kind still answers in form, with another word.
            lost = asked if kind in ("content", "place") else 0
            assert (row["no box"], row["outside choices"]) == (lost, lost)
            assert math.isnan(row["accuracy of valid"]) if lost else row["accuracy of valid"] == row["accuracy"]
    gained = results["D3"].tables["arms"][0]
    assert (gained["arm"], gained["b"], gained["c"]) == ("with latents", 0, 0 if kind == "useless" else 32)
    sweep = {row["arm"]: row["accuracy"] for row in results["D13"].tables["sweep"]}
    one_is_enough = kind in ("content", "useless")
    assert sweep["1 steps"] == (100 if one_is_enough else 0) and sweep["3 steps"] == 100
    kept = {row["arm"]: row["share of gain kept"] for row in results["D3"].tables["arms"]}
    assert (
        math.isnan(kept["slots only"]) if kind == "useless" else kept["slots only"] == 0 and kept["with latents"] == 1
    )


def test_collapse_and_probes(found):
    """D4, D5: latents that hold the number differ between pictures of a task and are read by a probe, used or not; others are not."""
    kind, results = found
    holds = kind in ("content", "useless")
    for row in results["D4"].tables["collapse"]:
        if row["vectors"] == "latents":
            assert row["participation ratio"] == (pytest.approx(7) if holds else 0)
            assert row["share between pictures"] == pytest.approx(21 / 37 if holds else 0)
    for row in results["D4"].tables["sensitivity"]:
        if row["picture"] == "another picture, same question":
            assert row["answers changed"] == 1 and row["changed low"] < 0.85  # Wilson of 16 of 16
            assert row["1 - cos"] == (
                pytest.approx({"content": 3 / 7, "useless": 3 / 4}[kind]) if holds else pytest.approx(0, abs=1e-6)
            )
    probes = rows_of(results["D5"], "probes", "task", "feature")
    for task in TASKS:
        for feature in ("(b) last latent", "(d) place 1", "(d) place 3", "(d) all places"):
            row = probes[task, feature]
            assert row["accuracy"] == (1 if holds else pytest.approx(1 / 8)) and row["chance"] == 1 / 8
            assert row["shuffled"] < 0.3 and row["high"] - row["low"] > 0.1


def test_answers_from_the_latents_alone(found):
    """D6: only content is right without the picture, and wrong with another's latents; a blank picture is taken for its number."""
    kind, results = found
    rows = rows_of(results["D6"], "latents alone", "task", "picture", "latents")
    for task in TASKS:
        assert rows[task, "as it is", "own"]["accuracy"] == 100
        for picture in ("image cut", "prompt cut", "vectors alone"):
            row = rows[task, picture, "own"]
            assert row["accuracy"] == (100 if kind == "content" else 0) and row["high"] - row["low"] > 15
            assert row["outside choices"] == (0 if kind == "content" else 16)
            assert rows[task, picture, "another's"]["accuracy"] == 0
        blank = rows[task, "blank picture", "own"]
        assert blank["accuracy"] == (100 if kind == "content" else 12.5)


def test_gradients_and_patches(found):
    """D11, D17: nothing depends on useless latents, and only content lets an answer follow what is patched in."""
    kind, results = found
    for row in results["D11"].tables["latents"]:
        assert row["with a gradient"] == (0 if kind == "useless" else 1) and row["least free cosine"] == pytest.approx(
            1
        )
    for row in results["D17"].tables["patching"]:
        follows = kind == "content" and row["patched"] == "all"
        assert (row["follows"], row["stays"]) == (follows, not follows) and row["high"] - row["low"] > 0.1


def numbers_of(kind: str, folder, items: list, batch_size: int) -> str:
    results = take_all(whole_subject(kind, in_order(items), batch_size), FEWER, draws=2)
    return write_report(results, {}, folder)[1].read_text()


@pytest.mark.parametrize(
    ("batch_size", "count"),
    [
        (7, 16),
        *(pytest.param(size, 32, marks=pytest.mark.slow) for size in (1, 7, 32)),
    ],  # 32 are enough for D5's folds
)
def test_the_whole_json_is_the_same_in_any_order_and_batch(batch_size, count, tmp_path):
    """To the character; what the command does with its data is `in_order`."""
    items = whole_items(count)
    order = np.random.default_rng(0).permutation(count)
    expected = numbers_of("content", tmp_path, items, 16)
    assert numbers_of("content", tmp_path, [items[place] for place in order], batch_size) == expected
    assert json.loads(expected)["diagnostics"]["D1"]["details"]["donors"]
