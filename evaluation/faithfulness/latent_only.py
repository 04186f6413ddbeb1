"""D6: can the question be answered from the latents alone? (CapImagine 2602.22766: below chance; CVRR 2609.06746)

The latents of the clean run are served again, and the picture is taken away:

    blank      the question is asked about a gray picture of the same size; latents that are served come from the true one
    image cut  the answer does not attend to image tokens (`attention_cut.py`)
    prompt cut the answer attends to latents and to itself alone
    vectors    so do the columns of the latents: nothing is left of the picture but the vectors that went in

each with own latents, and with those of another item. Right with its own and not with another's: the content passes through the
latents. Right with both: it passes by them.
"""

from collections import Counter
from dataclasses import replace

from PIL import Image

from evaluation.faithfulness.attention_cut import answer_cut
from evaluation.faithfulness.collapse import tasks_of
from evaluation.faithfulness.items import Item, NotApplicable
from evaluation.faithfulness.lending import table_of
from evaluation.faithfulness.outcomes import describe_form
from evaluation.faithfulness.result import Curve, Result
from evaluation.faithfulness.statistics import share_interval
from evaluation.faithfulness.subject import Answer, Arm, Subject
from evaluation.final_answer import normalize
from train.data.reasoning_data import ReasoningSample


GRAY = (128, 128, 128)
BLANK, CUTS = "blank picture", {"image cut": "image", "prompt cut": "prompt", "vectors alone": "vectors"}


def blank(item: Item) -> ReasoningSample:
    """The question about gray pictures of the same sizes."""
    return replace(item.sample, images=[Image.new("RGB", image.size, GRAY) for image in item.sample.load_images()])


def served_arms(subject: Subject) -> dict[str, tuple[Arm, dict[int, int]]]:
    """By whose latents are served the arm, and by item the item that lends them."""
    numbers = subject.with_latents
    arms = {"own": {number: number for number in numbers}}
    orders = {number: subject.donors.order(number, "task") for number in numbers}
    lent = {number: order[0] for number, order in orders.items() if order}
    if lent:
        arms["another's"] = lent
    return {
        name: (Arm(f"latents {name}", f"{name} latents", table_of(subject, donors)), donors)
        for name, donors in arms.items()
    }


def measure_latent_only(subject: Subject) -> Result:
    """Ask with own and others' latents, without the picture in three ways.

    Raises:
        NotApplicable: no question has latents, or no other item can lend any.
    """
    found: dict[tuple[str, str], dict[int, Answer]] = {
        ("as it is", "own"): {number: subject.clean[number] for number in subject.with_latents}
    }
    result = Result(
        "D6",
        "D6: answers from the latents alone",
        "Accuracy where the picture is taken away from the answer and latents of the clean run are served: on a gray picture, "
        "with the answer's attention to image tokens cut, with its attention to the whole prompt cut, and with that of the "
        "latents cut as well; with own latents and with another item's.",
        notes=[
            "Right with own latents and not with another's: the content passes through the latents. Right with both: it passes "
            "by them. Wrong with both: the latents do not hold it, or the answer needs the picture beside them.",
            "What is emitted at the last latent itself is not cut: that column has seen all.",
        ],
    )
    for whose, (arm, donors) in served_arms(subject).items():
        numbers = list(donors)
        found[BLANK, whose] = dict(zip(numbers, subject.answer(arm, numbers, edit=blank)))
        for name, what in CUTS.items():
            served = {number: subject.clean[donor].steps for number, donor in donors.items()}
            try:
                found[name, whose] = dict(zip(numbers, answer_cut(subject, arm, served, what)))
            except NotApplicable as reason:
                result.not_applicable[name] = str(reason)
    tasks = tasks_of(subject, subject.with_latents)
    result.tables["latents alone"] = [
        row
        for task, members in tasks.items()
        for (picture, whose), answers in found.items()
        if (row := describe(subject, task, members, picture, whose, answers)) is not None
    ]
    for task in tasks:
        rows = [row for row in result.tables["latents alone"] if row["task"] == task]
        bars = {
            whose: [
                (row["picture"], row["accuracy"], row["low"], row["high"]) for row in rows if row["latents"] == whose
            ]
            for whose in dict.fromkeys(row["latents"] for row in rows)
        }
        title = "accuracy without the picture" + (f", {task}" if len(tasks) > 1 else "")
        result.curves.append(Curve(title, "picture", "accuracy, %", bars, "bar"))
    return result


def describe(
    subject: Subject, task: str, members: list[int], picture: str, whose: str, answers: dict[int, Answer]
) -> dict | None:
    """One row: accuracy in percent, and how many answers are still those of the clean run. None without items."""
    numbers = [number for number in members if number in answers]
    if not numbers:
        return None
    readings = subject.readings([answers[number] for number in numbers], numbers)
    accuracy, low, high = (100 * value for value in share_interval([[reading.is_right] for reading in readings]))
    counts = Counter(normalize(subject.items[number].answer) for number in numbers)
    same = [answers[number].text == subject.clean[number].text for number in numbers]
    return {
        "task": task,
        "picture": picture,
        "latents": whose,
        "items": len(numbers),
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "best constant answer": 100 * counts.most_common(1)[0][1] / len(numbers),
        "answer as in the clean run": sum(same) / len(same),
        **describe_form(readings),
    }
