"""D17: activation patching between minimal pairs, two pictures that differ in one object.

The region that a question is about (`boxes`) has its hues turned by half the circle; where the model answers the two pictures
differently, the latents of one run are served in the other:

    follows   share of pairs in which the answer becomes that of the picture which lent the latents
    stays     share in which it remains that of the picture which is shown

all latents at once, and each step or block by itself. Everything but one object is the same in both pictures, so an answer that
follows was carried by the latents; one that stays was read from the picture beside them.
"""

from collections.abc import Callable

from PIL import Image

from evaluation.faithfulness.collapse import tasks_of
from evaluation.faithfulness.edits import edit_sample, turn_hues
from evaluation.faithfulness.items import Item, NotApplicable
from evaluation.faithfulness.lending import Table
from evaluation.faithfulness.result import Curve, Result
from evaluation.faithfulness.statistics import share_interval
from evaluation.faithfulness.subject import CLEAN, Answer, Arm, Subject
from train.data.reasoning_data import ReasoningSample


MOST_STEPS = 8  # that are patched one by one


def recolor(picture: Image.Image, item: Item) -> Image.Image:
    """Turn the hues of the regions that the question is about, and of nothing else."""
    changed, turned = picture.copy(), turn_hues(picture, item)
    for box in item.boxes:
        sides = tuple(round(side) for side in box)
        changed.paste(turned.crop(sides), sides)
    return changed


def change_one(item: Item) -> ReasoningSample:
    return edit_sample(item, recolor)


def patch_arm(name: str, lenders: dict[int, Answer], step: int | None) -> Arm:
    """Serve the latents of other runs, of all steps or of one."""
    table = Table({number: [(one.grid, one.latents) for one in answer.steps] for number, answer in lenders.items()})

    def change(latents, taken, number: int):
        return table(latents, taken, number) if step is None or taken.index == step else latents

    return Arm(name, name, change)


def measure_patching(subject: Subject) -> Result:
    """Patch both ways, by task.

    Raises:
        NotApplicable: the data bring no regions, or no answer changes with the object.
    """
    numbers = [number for number in subject.with_latents if subject.items[number].boxes]
    if not numbers:
        raise NotApplicable("the data bring no regions (`boxes`) of the objects that questions are about")
    edited = dict(zip(numbers, subject.answer(CLEAN, numbers, edit=change_one)))
    shown = {number: subject.clean[number] for number in numbers}
    pairs = [number for number in numbers if edited[number].steps and edited[number].text != shown[number].text]
    if not pairs:
        raise NotApplicable(
            f"none of {len(numbers)} answers changes when the object that it is about changes its color"
        )
    ways: dict[str, tuple[dict[int, Answer], dict[int, Answer], Callable | None]] = {
        "true picture, latents of the changed one": (shown, edited, None),
        "changed picture, latents of the true one": (edited, shown, change_one),
    }
    count = min(len(answer.steps) for number in pairs for answer in (shown[number], edited[number]))
    steps = [None, *range(min(count, MOST_STEPS))] if count > 1 else [None]
    rows = []
    for title, (own, lent, edit) in ways.items():
        for step in steps:
            arm = patch_arm(title, {number: lent[number] for number in pairs}, step)
            found = dict(zip(pairs, subject.answer(arm, pairs, edit=edit)))
            rows += describe(subject, title, step, found, own, lent)
    return Result(
        "D17",
        "D17: patching between minimal pairs",
        "Pairs of pictures that differ in the color of the object that is asked about, and are answered differently: the latents "
        "of one run are served in the other.",
        tables={"patching": rows, "pairs": pair_rows(subject, numbers, pairs)},
        curves=curves_of(rows),
        notes=[
            "An answer that follows was carried by the latents; one that stays was read from the picture beside them."
        ],
    )


def describe(subject: Subject, title: str, step: int | None, found: dict, own: dict, lent: dict) -> list[dict]:
    """A row a task."""
    rows = []
    for task, members in tasks_of(subject, list(found)).items():
        follows = [found[number].text == lent[number].text for number in members]
        stays = [found[number].text == own[number].text for number in members]
        share, low, high = share_interval([[one] for one in follows])
        where = {
            "task": task,
            "run": title,
            "patched": "all" if step is None else str(step + 1),
            "pairs": len(members),
        }
        rows.append(where | {"follows": share, "low": low, "high": high, "stays": sum(stays) / len(stays)})
    return rows


def pair_rows(subject: Subject, numbers: list[int], pairs: list[int]) -> list[dict]:
    """How many pictures could be changed, and how many changes changed the answer."""
    chosen = set(pairs)
    return [
        {"task": task, "changed pictures": len(members), "other answer": len(chosen.intersection(members))}
        for task, members in tasks_of(subject, numbers).items()
    ]


def curves_of(rows: list[dict]) -> list[Curve]:
    """By task, how many answers follow the latents of each step."""
    curves = []
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    for task in tasks:
        series: dict[str, list] = {}
        for row in rows:
            if row["task"] == task:
                series.setdefault(row["run"], []).append((row["patched"], row["follows"], row["low"], row["high"]))
        title = "answers that follow the patched latents" + (f", {task}" if len(tasks) > 1 else "")
        curves.append(Curve(title, "patched", "share of pairs", series, "bar"))
    return curves
