"""Part of D4: how far do latents move when the picture is edited, or exchanged?

1 - cos of the mean latent of a picture and of its edited self, raw and less the mean of all items of the task,
with the share of answers that change. Its scale is the row "another picture, same question": the question asked about another
item's picture. Augmentation consistency is the mean cosine over changes of the picture that mean nothing; one that changes more
than `MOST_CHANGED` of the answers does mean something, and is listed as an edit.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from evaluation.faithfulness.edits import AUGMENTATIONS, EDITS, check_edit, edit_sample
from evaluation.faithfulness.items import Item, NotApplicable
from evaluation.faithfulness.result import Curve, Result
from evaluation.faithfulness.statistics import mean_interval, share_interval
from evaluation.faithfulness.subject import CLEAN, Answer, Subject
from train.data.reasoning_data import ReasoningSample


MOST_CHANGED = 0.1  # share of answers that a change of the picture without meaning may change
OTHER_PICTURE = "another picture, same question"


def add_sensitivity(subject: Subject, tasks: dict[str, list[int]], result: Result) -> None:
    """What edits of the picture, and another picture, do to latents and answers, by task."""
    changes: dict[str, tuple[str, Callable[[Item], ReasoningSample]]] = {}
    for kind, edits in (("edit", EDITS), ("augmentation", AUGMENTATIONS)):
        for name, edit in edits.items():
            try:
                check_edit(name, subject.items)
            except NotApplicable as reason:
                result.not_applicable[name] = str(reason)
                continue
            changes[name] = (kind, lambda item, edit=edit: edit_sample(item, edit))
    rows = []
    for name, (kind, change) in changes.items():
        rows += sensitivity_rows(subject, tasks, name, kind, subject.answer(CLEAN, edit=change))
    lent = other_pictures(subject, tasks)
    if lent:
        numbers = sorted(lent)
        asked = {id(subject.items[number]): sample for number, sample in lent.items()}
        answers = subject.answer(CLEAN, numbers, edit=lambda item: asked[id(item)])
        rows += sensitivity_rows(subject, tasks, OTHER_PICTURE, "baseline", answers, numbers)
    else:
        result.not_applicable[OTHER_PICTURE] = "no task has questions about two pictures with different answers"
    for row in rows:
        if row["kind"] == "augmentation" and row["answers changed"] > MOST_CHANGED:
            row["kind"] = "edit (meant as an augmentation)"
    result.tables["sensitivity"] = rows
    result.tables["consistency"] = consistency_rows(rows)
    for task in tasks:
        points = [(row["picture"], row["1 - cos"], row["low"], row["high"]) for row in rows if row["task"] == task]
        title = "how far the mean latent moves" + (f", {task}" if len(tasks) > 1 else "")
        result.curves.append(Curve(title, "picture", "1 - cos", {"latents": points}, "bar"))


def other_pictures(subject: Subject, tasks: dict[str, list[int]]) -> dict[int, ReasoningSample]:
    """By item its question about the pictures of another item of its task: the first donor with as many of them."""
    lent = {}
    for numbers in tasks.values():
        for number in numbers:
            own = subject.items[number].sample
            donors = (subject.items[donor].sample for donor in subject.donors.order(number, "task"))
            donor = next((one for one in donors if len(one.images) == len(own.images)), None)
            if donor is not None:
                lent[number] = replace(own, images=donor.images)
    return lent


def consistency_rows(rows: list[dict]) -> list[dict]:
    """By task the mean cosine over what is left of the augmentations; NaN where all of them change answers."""
    found = []
    for task in dict.fromkeys(row["task"] for row in rows):
        kept = [row for row in rows if row["task"] == task and row["kind"] == "augmentation"]
        cosine = float(np.mean([1 - row["1 - cos"] for row in kept])) if kept else float("nan")
        found.append(
            {
                "task": task,
                "augmentation consistency (mean cosine)": cosine,
                "augmentations": len(kept),
                "left out: they change answers": sum(
                    row["task"] == task and row["kind"].startswith("edit (") for row in rows
                ),
            }
        )
    return found


def sensitivity_rows(
    subject: Subject,
    tasks: dict[str, list[int]],
    name: str,
    kind: str,
    answers: list[Answer],
    numbers: list[int] | None = None,
) -> list[dict]:
    """How far latents moved from those of the clean answers, and how many answers changed, by task.

    Args:
        numbers: of the items that were answered; all by default.
    """
    found = dict(zip(range(len(subject.items)) if numbers is None else numbers, answers, strict=True))
    rows = []
    for task, members in tasks.items():
        asked = [number for number in members if number in found]
        pairs = [(subject.clean[number], found[number]) for number in asked if found[number].steps]
        if not pairs:
            continue
        center = torch.stack([subject.clean[number].latents().mean(dim=0) for number in members]).mean(dim=0)
        raw, centred = zip(*(distances_of(one, other, center) for one, other in pairs))
        mean, low, high = mean_interval(raw, subject.seed)
        centred_mean, centred_low, centred_high = mean_interval(centred, subject.seed)
        flips = [subject.clean[number].text != found[number].text for number in asked]
        changed, changed_low, changed_high = share_interval([[flip] for flip in flips])
        rows.append(
            {
                "task": task,
                "picture": name,
                "kind": kind,
                "items": len(pairs),
                **{"1 - cos": mean, "low": low, "high": high},
                **{"centred 1 - cos": centred_mean, "centred low": centred_low, "centred high": centred_high},
                **{"answers changed": changed, "changed low": changed_low, "changed high": changed_high},
            }
        )
    return rows


def distances_of(one: Answer, other: Answer, center: Tensor) -> tuple[float, float]:
    """1 - cos of two answers' mean latents, raw and less `center`. NaN where one of them is `center` itself."""
    first, second = one.latents().mean(dim=0), other.latents().mean(dim=0)
    raw = 1 - float(torch.cosine_similarity(first, second, dim=0))
    first, second = (first - center).double(), (second - center).double()
    smallest = 1e-6 * max(1e-12, float(center.norm()))
    if min(float(first.norm()), float(second.norm())) < smallest:
        return raw, float("nan")
    return raw, 1 - float(torch.cosine_similarity(first, second, dim=0))
