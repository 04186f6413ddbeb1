"""D1 and the evaluation's arms on models of which it is known what their latents hold (`toy_subject.py`)."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from toy_subject import STEPS, TASKS, ToyModel, ToyProcessor, toy_rows, toy_subject

from evaluation.answering import AnswerSettings
from evaluation.evaluate_rows import evaluate_rows
from evaluation.faithfulness.__main__ import summary
from evaluation.faithfulness.arms import build_arms, calibrate
from evaluation.faithfulness.audit import measure_invocation
from evaluation.faithfulness.interventions_report import measure_interventions
from evaluation.faithfulness.items import Item, read_items
from evaluation.faithfulness.outcomes import describe_group, follow, observe_arms
from evaluation.faithfulness.report import write_report
from evaluation.faithfulness.subject import Answer, Arm
from evaluation.faithfulness.verdicts import verdict
from evaluation.report import summarize


ARMS = ("sham", "shared", "matched", "swap", "swap_question", "cross_task", "skip")
FEWER = ("sham", "shared", "swap", "cross_task", "skip")


@pytest.fixture(scope="module")
def found() -> dict:
    """D1 of every kind of model, 48 questions of each of two tasks."""
    arms = {"content": ARMS, "task": ARMS, "place": FEWER, "useless": FEWER}
    return {kind: measure_interventions(toy_subject(kind), names, 2) for kind, names in arms.items()}


def rows_of(result, task: str = "all") -> dict[str, dict]:
    rows = result.tables["arms"] if task == "all" else result.tables["arms by task"]
    return {row["arm"]: row for row in rows if row.get("task", "all") == task}


# By kind the accuracy under each arm.
TRUTH = {
    "content": {"sham": 100, "swap": 0, "swap_question": 0, "skip": 0},
    "task": {"sham": 100, "shared": 100, "swap": 100, "swap_question": 100, "cross_task": 0, "skip": 0},
    "place": {"sham": 100, "shared": 100, "swap": 100, "cross_task": 100, "skip": 0},
    "useless": dict.fromkeys(FEWER, 100),
}
SAYS = {
    "content": "The content of the latents is used: with another picture's of the same task -100.0 points",
    "task": "do not depend on what the latents hold of this picture: with another picture's of the same task no loss larger "
    "than 3.8 points",
    "place": "do not depend on what the latents hold of this picture",
    "useless": "do not depend on what the latents hold of this picture",
}


@pytest.mark.parametrize("kind", TRUTH)
def test_every_arm_finds_what_is_known(found, kind):
    for task in ("all", *TASKS):
        rows = rows_of(found[kind], task)
        assert {name: rows[name]["accuracy"] for name in TRUTH[kind]} == TRUTH[kind]
        count = 96 if task == "all" else 48
        assert all(row["items"] == count and row["excluded"] == 0 for row in rows.values())
        for name, accuracy in TRUTH[kind].items():
            lost = count if accuracy == 0 else 0
            assert (rows[name]["b"], rows[name]["c"]) == (lost, 0), name
            assert rows[name]["flip rate"] == lost / count and rows[name]["p (Holm)"] < 1e-9 or not lost
            assert (rows[name]["KL"] > 1) == (lost > 0)
    assert SAYS[kind] in found[kind].notes[0]
    assert ("They depend on the task or form" in found[kind].notes[0]) == (kind == "task")
    assert "0.0 % with one's own latents served again" in found[kind].notes[0]


def test_the_content_of_a_mean_is_chance(found):
    """One vector a place, the mean of others': a model that reads nothing else can only guess. Chance is 1 of 8."""
    row = rows_of(found["content"])["shared"]
    assert row["draws"] == 8 and row["answers"] == 8 * 96 and row["accuracy"] < 25 and row["high"] < -70


def test_answers_follow_the_donor_beyond_chance_where_latents_hold_them(found):
    """Of 7 other numbers each is as likely the donor's, so chance is 1 of 7."""
    for kind, followed in (("content", 1.0), ("task", 0.0), ("useless", 0.0)):
        rows = {(row["task"], row["arm"]): row for row in found[kind].tables["swap"]}
        for task in ("all", *TASKS):
            row = rows[task, "swap"]
            assert row["answer becomes the donor's"] == followed and row["answer stays"] == 1 - followed
            assert row["answers whose donor says otherwise"] == (192 if task == "all" else 96)
            assert row["by chance"] == pytest.approx(1 / 7 if kind == "content" else 0)
            assert row["low"] <= followed <= row["high"] and row["high"] - row["low"] > 0.01


def test_donors_that_said_the_same_are_no_chance_to_follow():
    """Three might have been drawn, and one of them said what the item says: of the other two both say what is now said."""
    said = ["red", "red", "blue", "blue"]
    arm = Arm("swap", "", donors={0: 2})
    outcome = SimpleNamespace(arm=arm, numbers=[0], right=np.zeros((1, 1)), answers=[{0: "blue"}])
    subject = SimpleNamespace(
        clean=said,
        readings=lambda answers: [SimpleNamespace(answer=answer) for answer in answers],
        donors=SimpleNamespace(eligible=lambda number, kind: [1, 2, 3]),
    )
    row = follow(subject, outcome)
    assert row["by chance"] == row["answer becomes the donor's"] == 1


def test_every_donor_is_recorded(found):
    donors = found["content"].details["donors"]
    assert len(donors) == 96 * 2 * 3  # two draws of three arms
    for row in donors:
        assert row["id"] != row["donor_id"] and (row["task"] == row["donor_task"]) == (row["arm"] != "cross_task")
        assert row["arm"] == "cross_task" or not row["same_answer"]
    swaps = [(row["id"], row["donor_id"]) for row in donors if row["arm"] == "swap"]
    assert len(set(swaps)) == len(swaps)  # another donor in every draw


def test_a_loss_of_form_is_told_from_one_of_content():
    result = measure_interventions(toy_subject("form", toy_rows(48)), ("swap",), 1)
    row = rows_of(result)["swap"]
    assert (row["accuracy"], row["no box"], row["outside choices"]) == (0, 48, 48) and math.isnan(
        row["accuracy of valid"]
    )
    assert "the answers lose their form" in result.notes[0] and "is used" not in result.notes[0]
    assert "Only 0 of 48 keep it, which says nothing of the content" in result.notes[0]


def test_without_swap_there_is_no_verdict():
    """`--arms shared` alone once printed that the content is used."""
    for names in (("shared",), ("shared", "matched", "cross_task")):
        result = measure_interventions(toy_subject("content", toy_rows(32)), names, 1)
        assert result.notes[0].startswith("No verdict: ") and "is used:" not in summary([result])
        assert rows_of(result)["shared"]["p (Holm)"] < 1e-4


def test_items_without_latents_are_shown_apart_and_lend_nothing():
    subject = toy_subject("content", toy_rows(64), silent=(6, 7))
    result = measure_interventions(subject, ("swap", "sham", "skip"), 3)
    rows = rows_of(result)
    assert rows["swap"]["items"] == rows["clean"]["items"] == 48 and rows["swap"]["accuracy"] == 0
    apart = {(row["arm"], row["items that are"]): row for row in result.tables["items without latents"]}
    assert apart["clean", "without latents"]["items"] == 16 and apart["clean", "without latents"]["accuracy"] == 100
    assert apart["skip", "with latents"]["accuracy"] == 0 and apart["skip", "without latents"]["accuracy"] == 100
    ids = {item.row.id: place // 2 % 8 for place, item in enumerate(subject.items)}
    assert {ids[row["donor_id"]] for row in result.details["donors"]} == set(range(6))
    audited = {row["task"]: row for row in measure_invocation(subject).tables["audit"]}
    assert audited["all"]["in latent mode"] == 0.75 and audited["color"]["items"] == 32
    assert audited["all"]["in latent mode, low"] < 0.75 < audited["all"]["in latent mode, high"]


def test_items_without_a_donor_are_excluded_and_counted():
    """Of one task all but two show one answer: those two have donors, and so have all others; the other task has one answer."""
    rows = [row for row in toy_rows(64) if row.task == "color" or row.answer == "one"]
    result = measure_interventions(toy_subject("content", rows), ("swap", "cross_task"), 2)
    swap, other = rows_of(result)["swap"], rows_of(result)["cross_task"]
    assert (swap["items"], swap["excluded"]) == (32, 4) and (other["items"], other["excluded"]) == (36, 0)
    assert "4 items without a donor are left out of swap." in result.notes[0]
    assert rows_of(result, "count").keys() == {"clean", "cross_task"}
    alone = measure_interventions(
        toy_subject("content", [row for row in rows if row.task == "count"]), ("swap", "sham"), 2
    )
    assert "no item with latents has a donor" in alone.not_applicable["swap"]
    assert alone.notes[0].startswith("No verdict: ")


def numbers_of(result) -> dict:
    tables = {name: rows for name, rows in result.tables.items() if name != "latents"}
    donors = sorted(map(json.dumps, result.details["donors"]))
    return json.loads(json.dumps({"tables": tables, "donors": donors, "notes": result.notes}))


def test_neither_batch_size_nor_order_change_a_number():
    rows = toy_rows(40)
    expected = numbers_of(measure_interventions(toy_subject("content", rows), ("matched", "shared", "swap"), 2))
    order = np.random.default_rng(0).permutation(40)
    for batch_size, given in ((1, rows), (7, rows), (32, [rows[place] for place in order])):
        found = measure_interventions(
            toy_subject("content", given, batch_size=batch_size), ("matched", "shared", "swap"), 2
        )
        assert numbers_of(found) == expected
    other = measure_interventions(toy_subject("content", rows, seed=1), ("matched", "shared", "swap"), 2)
    assert numbers_of(other)["donors"] != expected["donors"]


def test_the_page_shows_all_of_it_and_keeps_donors_to_the_json(found, tmp_path):
    page, data = write_report([found["task"]], {"model": "toy"}, tmp_path)
    text, record = page.read_text(), json.loads(data.read_text())["diagnostics"]["D1"]
    assert "cross_task" in text and "p (Holm)" in text and "donor_id" not in text
    assert len(record["details"]["donors"]) == 576


# Verdicts of numbers that no model here gives


def row_of(arm: str, **changes) -> dict:
    numbers = {"low": 0.0, "high": 0.0, "score low": -1.0, "score high": 1.0, "b": 0, "c": 0, "p (Holm)": 1.0}
    numbers |= {"b, both valid": 0, "c, both valid": 0, "both valid": 400, "items": 400, "answers": 400, "excluded": 0}
    numbers |= {"change of accuracy": 0.0, "detectable": 1.5, "flip rate": 0.0, "outside choices": 0}
    return {"arm": arm} | numbers | changes


LOSS = {"change of accuracy": -5.0, "low": -7.0, "high": -3.0, "score low": -7.5, "score high": -2.8, "p (Holm)": 1e-4}


@pytest.mark.parametrize(
    ("swap", "expected"),
    [
        (LOSS | {"b": 22, "c": 2, "b, both valid": 22, "c, both valid": 2}, "The content of the latents is used"),
        (
            LOSS | {"b": 9, "c": 0, "b, both valid": 9},
            "not decided: no loss larger than 7.5 points (9 of 400 items changed",
        ),
        (LOSS | {"b": 10, "c": 0, "b, both valid": 10}, "The content of the latents is used"),  # ten are enough
        (LOSS | {"b": 22, "c": 2, "b, both valid": 22, "p (Holm)": 0.06}, "not decided: no loss larger than 7.5"),
        # Three of twenty lost answers are lost in form and content: more than a tenth.
        (LOSS | {"b": 22, "c": 2, "b, both valid": 5, "c, both valid": 2}, "The content of the latents is used"),
        (LOSS | {"b": 22, "c": 2, "b, both valid": 4, "c, both valid": 2}, "lose their form: -5.0 points"),
        (LOSS | {"b": 22, "c": 2, "b, both valid": 2, "c, both valid": 2}, "lose their form: -5.0 points"),
        ({"low": -4.0, "score low": -3.0}, "no loss larger than 4.0 points (0 of 400 items changed; a loss of 1.5"),
        ({"low": -1.0, "score low": -4.5}, "no loss larger than 4.5 points"),
        ({"low": -1.0, "score low": -5.5}, "not decided: no loss larger than 5.5 points"),
        ({"low": 1.0, "high": 3.0, "score low": 0.5, "b": 2, "c": 20, "p (Holm)": 1e-4}, "no loss larger than 0.0"),
    ],
)
def test_a_verdict_says_what_the_numbers_carry(swap, expected):
    assert expected in verdict([row_of("clean"), row_of("swap", **swap)])
    assert ("is used:" in verdict([row_of("clean"), row_of("swap", **swap)])) == ("is used" in expected)


# The same in the evaluation


def evaluated(kind: str, rows=None, silent=(), **settings) -> list[dict]:
    settings = AnswerSettings(**{"batch_size": 16, "max_new_tokens": 4, "latent_intervention": "swap"} | settings)
    return evaluate_rows(ToyModel(kind, silent), ToyProcessor(), toy_rows(64) if rows is None else rows, settings)


@pytest.mark.parametrize(
    ("kind", "donors", "accuracy", "followed", "chance"),
    [
        ("content", "task", 0, 1, 1 / 7),
        ("content", "question", 0, 1, 1 / 7),
        ("task", "task", 1, 0, 0),
        ("task", "other_task", 0, 0, 0),
        ("place", "other_task", 1, 0, 0),
        ("useless", "task", 1, 0, 0),
    ],
)
def test_the_evaluation_finds_the_same(kind, donors, accuracy, followed, chance):
    records = evaluated(kind, donors=donors, repeats=2)
    numbers = summarize(records)
    for group in (numbers["all"], *numbers["tasks"].values()):
        assert group["accuracy"] == accuracy and group["not_swapped"] == 0
        assert group["swapped"]["follows_donor"] == followed
        assert group["swapped"]["follow_chance"] == pytest.approx(chance)
    assert numbers["all"]["rows"] == 64 and len(records) == 128
    assert all((record["donor_task"] == record["task"]) == (donors != "other_task") for record in records)
    assert donors == "other_task" or not any(record["same_answer"] for record in records)


def test_the_evaluation_is_the_same_in_any_order_and_batch():
    rows = toy_rows(40)
    for intervention in ("swap", "noise"):
        settings = {"latent_intervention": intervention, "repeats": 2}
        expected = {(one["id"], one["repeat"]): one | {"seconds": 0} for one in evaluated("content", rows, **settings)}
        for size, given in ((1, rows), (7, rows[::-1]), (32, sorted(rows, key=lambda row: row.task))):
            found = evaluated("content", given, batch_size=size, **settings)
            assert {(one["id"], one["repeat"]): one | {"seconds": 0} for one in found} == expected


def test_rows_without_latents_are_told_apart_in_the_evaluation():
    numbers = summarize(evaluated("content", silent=(0,)))["all"]
    assert numbers["accuracy_with_latents"] == {"answers": 56, "accuracy": 0, "accuracy_low": 0} | {
        "accuracy_high": numbers["accuracy_with_latents"]["accuracy_high"]
    }
    assert numbers["accuracy_without_latents"]["answers"] == 8 and numbers["accuracy_without_latents"]["accuracy"] == 1
    assert numbers["swapped"]["answers"] == 56


# One reader of answers


def test_the_report_reads_lettered_choices_and_numbers_as_the_evaluation_does(tmp_path):
    rows = [
        {"answer": "B", "choices": ["red", "blue"], "question": "which?\n(A) red\n(B) blue"},
        {"answer": "1250"},
        {"answer": "yes"},
        {"answer": "oak"},
    ]
    toy_rows(1)[0].images[0].save(tmp_path / "0.png")
    lines = [{"image": "0.png", "question": "q?", "rationale": ["I look."]} | row for row in rows]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    items = read_items(path, "steps", "train", None)
    subject = toy_subject("useless")
    subject.items = items
    right = ["\\boxed{(B)}", "\\boxed{1,250.0}", "Yes, there is.", "Oak."]
    assert subject.is_right([Answer([], text, [], "eos") for text in right]) == [True] * 4
    found = subject.readings(
        [Answer([], text, [], "eos") for text in ("\\boxed{A}", "1 250 or so", "green", "\\boxed{elm}")]
    )
    assert [(one.is_right, one.is_valid) for one in found] == [
        (False, True),
        (False, False),
        (False, False),
        (False, True),
    ]
    m3cot = {
        "id": "x",
        "image": "0.png",
        "question": "q?",
        "choices": ["red", "blue"],
        "answer": "B",
        "rationale": "I look. It is.",
    }
    path.write_text((json.dumps(m3cot) + "\n") * 4)
    items = read_items(path, "m3cot", "train", None)
    subject.items = items
    del subject.__dict__["known"]
    texts = ("\\boxed{B}", "blue", "\\boxed{(A)}", "(C)")
    assert subject.is_right([Answer([], text, [], "eos") for text in texts]) == [True, True, False, False]
    path.write_text((json.dumps(lines[0] | {"answer": "green"}) + "\n") * 4)
    with pytest.raises(ValueError, match=r"ine 1 of .*must be one of the choices \['red', 'blue'\], got 'green'"):
        read_items(path, "steps", "train", None)


def test_an_item_is_known_by_what_it_is():
    one, other = toy_rows(2)
    assert Item(one, row=one).identity == Item(replace(one, origin="elsewhere"), row=one).identity
    assert Item(one, row=one).identity != Item(other, row=other).identity
    bare = Item(replace(one, origin="somewhere"))
    assert bare.task == "all" and bare.row.answer == "red" and bare.row.answer_format == "text"


def test_several_draws_of_an_arm_are_one_row():
    subject = toy_subject("content", toy_rows(32))
    arms = build_arms(subject, calibrate(subject), 3, ("swap", "shared"))
    outcomes = observe_arms(subject, list(arms.values()))
    assert outcomes["swap"].right.shape == (32, 3) and outcomes["shared"].right.shape == (32, 8)
    rows = describe_group(subject, outcomes, subject.with_latents)
    assert [row["arm"] for row in rows] == ["clean", "shared", "swap"] and "p (Holm)" not in rows[0]
    assert all(len(answer.steps) == STEPS for answer in subject.clean)
