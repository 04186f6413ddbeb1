"""D4 on latents whose truth is known: the same for every picture, for every picture of a task, or a picture's own."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.donors import Donors
from evaluation.faithfulness import sensitivity
from evaluation.faithfulness.collapse import cosines, less_place_means, measure_collapse, share_between, spectrum
from evaluation.faithfulness.items import Item, NotApplicable, scored_row
from evaluation.faithfulness.sensitivity import OTHER_PICTURE, other_pictures
from evaluation.faithfulness.subject import Answer
from modeling_latentvlm.trace import LatentStep
from train.data.reasoning_data import ReasoningSample


TASKS = ("search", "puzzle")
PLACES, SIZE = 3, 8
PLACE = torch.randn(PLACES, SIZE, generator=torch.Generator().manual_seed(0))
TASK = torch.randn(len(TASKS), PLACES, SIZE, generator=torch.Generator().manual_seed(1))


def gray(item: Item) -> int:
    return item.sample.images[0].getpixel((0, 0))[0]


def item_of(sample: ReasoningSample, task: str) -> Item:
    return Item(sample, [(0, 0, 4, 4)], row=scored_row({"task": task}, sample, "steps", Path()))


def items(count: int = 12) -> list[Item]:
    """Pictures of one gray each, none twice; the tasks alternate."""
    found = []
    for number in range(count):
        picture = Image.new("RGB", (8, 8), (10 + 10 * number,) * 3)
        sample = ReasoningSample([picture], "what?", [], f"answer {number}", f"row {number}")
        found.append(item_of(sample, TASKS[number % 2]))
    return found


class FakeSubject:
    """Latents and answers are functions of the item, asked about the picture that it then has."""

    def __init__(self, latents, answer=gray, count: int = 12):
        self.items, self.seed = items(count), 0
        self.latents, self.answer_of = latents, answer
        self.clean = self.answer(None)
        self.with_latents = list(range(count))
        self.donors = Donors([item.candidate for item in self.items], 0)

    def answer(self, arm, numbers=None, edit=None):
        numbers = range(len(self.items)) if numbers is None else numbers
        asked = [self.items[number] for number in numbers]
        if edit is not None:
            asked = [item_of(edit(item), item.task) for item in asked]
        return [
            Answer([0], f"\\boxed{{{self.answer_of(item)}}}", [step_of(self.latents(item))], "eos") for item in asked
        ]


def step_of(latents: torch.Tensor) -> LatentStep:
    return LatentStep(0, 0, 0, (1, len(latents)), latents, [])


def picture_vector(item: Item) -> torch.Tensor:
    return torch.randn(PLACES, SIZE, generator=torch.Generator().manual_seed(gray(item)))


def by_place(item):
    return PLACE


def by_task(item):
    return TASK[TASKS.index(item.task)]


def by_picture(item):
    return by_task(item) + picture_vector(item)


def rows_of(subject) -> list[dict]:
    result = measure_collapse(subject, {})
    return [row for row in result.tables["collapse"] if row["vectors"] == "latents"], result


@pytest.mark.parametrize("latents", [by_place, by_task])
def test_latents_that_no_picture_moves(latents):
    """Pooled over tasks those of `by_task` differ between items; task by task nothing does."""
    rows, result = rows_of(FakeSubject(latents))
    assert [row["task"] for row in rows] == list(TASKS) and [row["items"] for row in rows] == [6, 6]
    for row in rows:
        assert row["share between pictures"] == pytest.approx(0, abs=1e-12)
        assert row["inter, raw"] == pytest.approx(1, abs=1e-6)
        assert row["Rank99"] == 0 and row["participation ratio"] == 0
    for row in result.tables["sensitivity"]:
        assert row["1 - cos"] == pytest.approx(0, abs=1e-6) and math.isnan(row["centred 1 - cos"])


def test_latents_of_the_picture():
    rows, result = rows_of(FakeSubject(by_picture))
    values = {task: torch.stack([by_picture(item) for item in items() if item.task == task]) for task in TASKS}
    for row in rows:
        found = values[row["task"]].double()
        within = (found - found.mean(dim=0)).square().sum()
        total = (found - found.mean(dim=(0, 1))).square().sum()
        assert row["share between pictures"] == pytest.approx(float(within / total)) and 0.2 < within / total < 0.8
        assert row["participation ratio"] > 4
    far = [row for row in result.tables["sensitivity"] if row["picture"] == OTHER_PICTURE]
    assert [row["task"] for row in far] == list(TASKS)
    assert all(row["centred 1 - cos"] > 0.7 and row["answers changed"] == 1 for row in far)


def test_an_augmentation_that_changes_answers_is_none(monkeypatch):
    """10 % brighter changes every answer of a model that reads the gray; a crop of one gray changes nothing."""
    subject = FakeSubject(by_picture)
    rows, result = rows_of(subject)
    kinds = {(row["picture"], row["task"]): row["kind"] for row in result.tables["sensitivity"]}
    assert kinds["10 % brighter", "search"].startswith("edit (") and kinds["crop to 95 %", "search"] == "augmentation"
    for row in result.tables["consistency"]:
        assert row["augmentations"] == 1 and row["left out: they change answers"] == 1
        assert row["augmentation consistency (mean cosine)"] == pytest.approx(1)
    monkeypatch.setattr(sensitivity, "MOST_CHANGED", 1.0)
    assert rows_of(subject)[1].tables["consistency"][0]["augmentations"] == 2


def test_another_picture_is_of_the_same_task():
    subject = FakeSubject(by_picture)
    lent = other_pictures(
        subject, {task: [n for n in range(12) if n % 2 == index] for index, task in enumerate(TASKS)}
    )
    assert sorted(lent) == list(range(12))
    tasks = {gray(item): item.task for item in subject.items}
    for number, sample in lent.items():
        other = sample.images[0].getpixel((0, 0))[0]
        assert other != gray(subject.items[number]) and tasks[other] == subject.items[number].task
        assert sample.question == "what?"


def test_one_question_of_a_task_is_said():
    subject = FakeSubject(by_picture)
    subject.with_latents = [0, 2, 4, 1]
    rows, result = rows_of(subject)
    assert [row["task"] for row in rows] == ["search"] and "task puzzle" in result.not_applicable
    subject.with_latents = [0, 1]
    with pytest.raises(NotApplicable, match="two questions of one task"):
        measure_collapse(subject, {})


def test_the_share_by_hand():
    """Two places at +-1, two items at +-2 around them: 4 of 5 parts of the variance lie between items."""
    places, pictures = torch.tensor([1.0, -1.0]), torch.tensor([2.0, -2.0])
    values = (pictures[:, None] + places)[..., None]
    assert share_between(values) == pytest.approx(4 / 5)
    assert share_between(values * 0) != share_between(values * 0)  # NaN: nothing varies
    assert torch.equal(less_place_means(values)[..., 0], pictures[:, None].expand(2, 2).double())
    assert spectrum(values) == pytest.approx([4 * 4 / 3])
    assert np.isnan(cosines(values[:, :1])["intra, raw"])
