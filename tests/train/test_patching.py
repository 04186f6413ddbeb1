"""D17 on models whose latents are known to hold the answer, one part of it, or nothing."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from evaluation.faithfulness.items import Item, NotApplicable, scored_row
from evaluation.faithfulness.patching import change_one, measure_patching, recolor
from evaluation.faithfulness.subject import Answer
from modeling_latentvlm.trace import LatentStep
from train.data.reasoning_data import ReasoningSample


BOX = (0, 0, 4, 4)


def item_of(sample: ReasoningSample, boxes: list, task: str) -> Item:
    return Item(sample, boxes, row=scored_row({"task": task}, sample, "steps", Path()))


def red_of(item: Item) -> float:
    return float(item.sample.images[0].getpixel((1, 1))[0] > 128)


class FakeSubject:
    """Two steps, whose latents are the redness of the picture. `reads` makes the answer of the served latents and the item."""

    def __init__(self, reads, boxes=(BOX,), count: int = 6):
        self.seed, self.reads = 0, reads
        self.items = []
        for number in range(count):
            picture = Image.new("RGB", (8, 8), (200, 20 + number, 20))
            sample = ReasoningSample([picture], "which?", [], "red", f"row {number}")
            self.items.append(item_of(sample, list(boxes), "ab"[number % 2]))
        self.with_latents = list(range(count))
        self.clean = self.answer(type("Clean", (), {"change": None})(), None)

    def answer(self, arm, numbers=None, edit=None):
        answers = []
        for number in range(len(self.items)) if numbers is None else numbers:
            item = self.items[number]
            asked = item if edit is None else item_of(edit(item), item.boxes, item.task)
            steps = []
            for index in range(2):
                step = LatentStep(0, index, 0, (1, 1), torch.full((1, 3), red_of(asked)), [])
                if arm.change is not None:
                    step.latents = arm.change(step.latents, step, number)
                steps.append(step)
            written = self.reads([float(step.latents[0, 0]) for step in steps], asked)
            answers.append(Answer([0], f"\\boxed{{{written}}}", steps, "eos"))
        return answers


def rows_of(reads, **settings) -> dict:
    result = measure_patching(FakeSubject(reads, **settings))
    return {
        (row["task"], row["run"][:4], row["patched"]): (row["follows"], row["stays"])
        for row in result.tables["patching"]
    }


def test_the_change_is_one_region():
    item = FakeSubject(lambda z, item: "x" if red_of(item) else "y").items[0]
    changed, own = recolor(item.sample.images[0], item), item.sample.images[0]
    assert changed.getpixel((5, 5)) == own.getpixel((5, 5)) and changed.getpixel((1, 1)) != own.getpixel((1, 1))
    assert changed.getpixel((1, 1))[0] < 60 and change_one(item).question == "which?"


def test_latents_that_hold_the_answer():
    found = rows_of(lambda z, item: "x" if z[1] else "y")
    for task in "ab":
        for run in ("true", "chan"):
            assert (
                found[task, run, "all"] == (1, 0)
                and found[task, run, "2"] == (1, 0)
                and found[task, run, "1"] == (0, 1)
            )


def test_latents_that_hold_nothing():
    found = rows_of(lambda z, item: "x" if red_of(item) else "y")
    assert set(found.values()) == {(0, 1)}


def test_what_cannot_be_patched_is_said():
    with pytest.raises(NotApplicable, match="no regions"):
        measure_patching(FakeSubject(lambda z, item: "x", boxes=()))
    with pytest.raises(NotApplicable, match="none of 6 answers"):
        measure_patching(FakeSubject(lambda z, item: "x"))
