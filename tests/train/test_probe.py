"""D5 on latents whose content is known: the answer at one place, split over two, only the task, or nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.faithfulness.items import Item, NotApplicable, scored_row
from evaluation.faithfulness.observation import Observed
from evaluation.faithfulness.probe import (
    ALL,
    LAST,
    learning_curve,
    measure_probe,
    probe,
    shuffled_accuracy,
    split_folds,
)
from evaluation.faithfulness.subject import Answer
from modeling_latentvlm.trace import LatentStep
from train.data.reasoning_data import ReasoningSample


SIZE = 6
TASKS = {"search": ("red", "blue"), "puzzle": ("left", "right")}


def subject_of(latents, count: int = 80):
    """Every second item is of a task; answers in turn. `latents` is called with task, answer and a generator."""
    items, clean, observed = [], [], {}
    for number in range(count):
        rng = np.random.default_rng(number)
        task = list(TASKS)[number % 2]
        answer = TASKS[task][number // 2 % 2]
        sample = ReasoningSample([Image.new("RGB", (4, 4), (number, 0, 0))], "what?", [], answer, "row")
        items.append(Item(sample, row=scored_row({"task": task}, sample, "steps", Path())))
        values = torch.tensor(latents(task, answer, rng), dtype=torch.float32)
        clean.append(Answer([], answer, [LatentStep(0, 0, 0, (1, len(values)), values, [])], "eos"))
        noise = torch.from_numpy(rng.standard_normal(SIZE))
        observed[number] = Observed(emitting=noise, question=noise, visual=noise)
    return type("FakeSubject", (), {"items": items, "clean": clean, "seed": 0})(), observed


def sign_of(answer: str) -> float:
    return 1.0 if answer in ("red", "left") else -1.0


def at_second_place(task, answer, rng):
    values = rng.standard_normal((3, SIZE))
    values[1, 0] = 4 * sign_of(answer) + 0.1 * rng.standard_normal()
    return values


def over_two_places(task, answer, rng):
    """The sum of the two places is the answer; each alone hardly says it."""
    values, first = np.zeros((2, SIZE)), 3 * rng.standard_normal()
    values[0, 0], values[1, 0] = first, sign_of(answer) - first
    return values


def of_the_task(task, answer, rng):
    values = rng.standard_normal((2, SIZE))
    values[:, 0] = 5 if task == "search" else -5
    return values


def accuracies(latents) -> dict[tuple[str, str], dict]:
    result = measure_probe(*subject_of(latents))
    return {(row["task"], row["feature"]): row for row in result.tables["probes"]}, result


def test_the_place_that_holds_the_answer():
    found, result = accuracies(at_second_place)
    for task in TASKS:
        assert found[task, "(d) place 2"]["accuracy"] == 1 and found[task, ALL]["accuracy"] > 0.9
        assert found[task, "(d) place 1"]["accuracy"] < 0.8 and found[task, LAST]["accuracy"] < 0.8
        assert found[task, "(d) place 2"]["shuffled"] < 0.75 and found[task, "(d) place 2"]["chance"] == 0.5
    points = [row for row in result.tables["learning curve"] if row["feature"] == ALL and row["task"] == "search"]
    assert [row["learned from"] for row in points] == [8, 16, 32] and points[-1]["accuracy"] > 0.9


def test_what_only_all_places_together_say():
    found, _ = accuracies(over_two_places)
    for task in TASKS:
        assert found[task, ALL]["accuracy"] > 0.9
        assert max(found[task, f"(d) place {place}"]["accuracy"] for place in (1, 2)) < 0.85


def test_latents_that_hold_the_task_alone():
    """Pooled over tasks they would tell half of the answers apart; task by task they say nothing."""
    found, _ = accuracies(of_the_task)
    assert all(row["accuracy"] < 0.8 for (_, name), row in found.items() if name.startswith("(d)"))


def test_shuffled_labels_are_at_chance():
    rng = np.random.default_rng(0)
    labels = np.array(["a", "b"] * 100)
    features = rng.standard_normal((200, 4)) + 3 * (labels == "a")[:, None]
    assert probe(features, labels)["accuracy"] == 1
    folds = split_folds(labels, np.arange(200), 0)
    assert shuffled_accuracy(features, labels, folds, 0) == pytest.approx(0.5, abs=0.1)


def test_the_learning_curve_rises_with_the_items():
    rng = np.random.default_rng(1)
    labels = np.array(["a", "b"] * 60)
    features = rng.standard_normal((120, 40)) + 0.6 * (labels == "a")[:, None]
    points = learning_curve(features, labels)
    assert [size for size, _ in points] == [24, 48, 96] and points[0][1] < points[-1][1]


def test_a_task_with_one_answer_is_said():
    subject, observed = subject_of(at_second_place)
    for item in subject.items[::2]:
        item.sample.answer = "red"
    result = measure_probe(subject, observed)
    assert {row["task"] for row in result.tables["probes"]} == {"puzzle"}
    assert "two answers" in result.not_applicable["task search"]
    for item in subject.items:
        item.sample.answer = "red"
    with pytest.raises(NotApplicable, match="task puzzle"):
        measure_probe(subject, observed)
