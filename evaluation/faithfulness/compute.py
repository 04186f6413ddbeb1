"""D13: what the same weights do with the same compute and no latents, and with more or fewer of them.

as trained, latents disabled (K = 0), dummy tokens with the same budget of positions, and the sweep K = 0 .. 20
"""

import numpy as np

from evaluation.faithfulness.arms import dummy_arm
from evaluation.faithfulness.items import NotApplicable
from evaluation.faithfulness.outcomes import count_pairs, describe_form
from evaluation.faithfulness.result import Curve, Result
from evaluation.faithfulness.statistics import mcnemar, share_interval
from evaluation.faithfulness.subject import Answer, Arm, Subject, without_latents


def measure_compute(subject: Subject) -> Result:
    result = Result(
        "D13",
        "D13: matched compute",
        "The same weights with their latents, without, with dummies in as many positions, and with "
        "other numbers of latents.",
    )
    answers: dict[str, list[Answer]] = {
        "as trained": subject.clean,
        "latents disabled": subject.ask(without_latents(subject.architecture)),
    }
    try:
        answers["dummy tokens, same budget"] = subject.ask(dummy_arm(subject))
    except NotApplicable as reason:
        result.not_applicable["dummy tokens"] = str(reason)
    result.tables["arms"] = [describe(subject, name, found) for name, found in answers.items()]
    sweep, by_task = [], []
    for label, count in subject.architecture.sweep():
        arm = Arm(f"sweep {count}", label, inside=lambda count=count: subject.architecture.with_latents(count))
        try:
            found = subject.ask(arm) if count else answers["latents disabled"]
        except ValueError as error:  # more latents than the context holds
            result.not_applicable[label] = str(error)
            continue
        sweep.append(describe(subject, label, found))
        by_task += describe_tasks(subject, label, found)
    result.tables["sweep"] = sweep
    result.tables["arms by task"] = [
        row for name, found in answers.items() for row in describe_tasks(subject, name, found)
    ]
    result.tables["sweep by task"] = by_task
    points = [(row["mean latents"], row["accuracy"], row["low"], row["high"]) for row in sweep]
    result.curves = [Curve("accuracy by number of latents", "latents an item", "%", {"accuracy": points})]
    result.notes = ["Numbers of latents that training never used are outside of what the model has learned."]
    result.not_applicable |= {
        "same data, no latents in training": "needs a second training: `python -m evaluation.evaluate` compares checkpoints",
        "repeated seeds": "needs further trainings: give each checkpoint a report of its own",
    }
    return result


def describe_tasks(subject: Subject, name: str, answers: list[Answer]) -> list[dict]:
    """A row for each task, none where there is one task."""
    groups = {task: numbers for task, numbers in subject.tasks().items() if task != "all"}
    return [{"task": task} | describe(subject, name, answers, numbers) for task, numbers in groups.items()]


def describe(subject: Subject, name: str, answers: list[Answer], numbers: list[int] | None = None) -> dict:
    """What the answers to some items are, by default to all: accuracy by Wilson, against the clean run by McNemar."""
    numbers = list(range(len(answers))) if numbers is None else numbers
    answers = [answers[number] for number in numbers]
    readings = subject.readings(answers, numbers)
    right = np.array([reading.is_right for reading in readings], dtype=float)
    clean = np.array(subject.is_right([subject.clean[number] for number in numbers], numbers), dtype=float)
    accuracy, low, high = share_interval(right[:, None])
    _, lost, gained, _ = count_pairs(clean, right)
    return {
        "arm": name,
        "items": len(numbers),
        "accuracy": 100 * accuracy,
        "low": 100 * low,
        "high": 100 * high,
        "b": lost,
        "c": gained,
        "p": mcnemar(lost, gained),
        **describe_form(readings),
        "mean latents": sum(answer.num_latents for answer in answers) / len(answers),
        "mean answer tokens": sum(len(answer.tokens) for answer in answers) / len(answers),
    }
