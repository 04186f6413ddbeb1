"""D13: what the same weights do with the same compute and no latents, and with more or fewer of them.

as trained, latents disabled (K = 0), dummy tokens with the same budget of positions, and the sweep K = 0 .. 20
"""

from train.faithfulness.arms import dummy_arm
from train.faithfulness.items import NotApplicable
from train.faithfulness.result import Curve, Result
from train.faithfulness.statistics import mean_interval
from train.faithfulness.subject import Answer, Arm, Subject, without_latents


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
    sweep = []
    for label, count in subject.architecture.sweep():
        arm = Arm(f"sweep {count}", label, inside=lambda count=count: subject.architecture.with_latents(count))
        try:
            found = subject.ask(arm) if count else answers["latents disabled"]
        except ValueError as error:  # more latents than the context holds
            result.not_applicable[label] = str(error)
            continue
        sweep.append(describe(subject, label, found))
    result.tables["sweep"] = sweep
    points = [(row["mean latents"], row["accuracy"], row["low"], row["high"]) for row in sweep]
    result.curves = [Curve("accuracy by number of latents", "latents an item", "%", {"accuracy": points})]
    result.notes = ["Numbers of latents that training never used are outside of what the model has learned."]
    result.not_applicable |= {
        "same data, no latents in training": "needs a second training: `python -m train.evaluate` compares checkpoints",
        "repeated seeds": "needs further trainings: give each checkpoint a report of its own",
    }
    return result


def describe(subject: Subject, name: str, answers: list[Answer]) -> dict:
    accuracy, low, high = mean_interval(subject.is_right(answers), subject.seed)
    return {
        "arm": name,
        "accuracy": 100 * accuracy,
        "low": 100 * low,
        "high": 100 * high,
        "mean latents": sum(answer.num_latents for answer in answers) / len(answers),
        "mean answer tokens": sum(len(answer.tokens) for answer in answers) / len(answers),
    }
