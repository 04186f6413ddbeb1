"""D14: do as many latents serve as the question needs steps?

The same questions with n = 0, 1, 2, .. latents at inference (steps, or blocks that may be opened; of a model that opens one block, its
size), by the need k of the question. Where every latent does one step, n latents serve the questions with k <= n, and no others: a
staircase. A model that does a further step while it answers serves k <= n + 1. Latents that do nothing give the same accuracy at
every n. "Serves k up to" is the largest k up to which every need has an accuracy of `SERVED` or more.
"""

import numpy as np

from evaluation.faithfulness.result import Curve, Result
from evaluation.faithfulness.serial_items import Way, find_units, find_ways, group_by_need, takes_steps
from evaluation.faithfulness.statistics import share_interval
from evaluation.faithfulness.subject import Arm, Subject


SERVED = 85.0  # per cent


def measure_need(subject: Subject) -> Result:
    """Ask all serial questions with every number of latents.

    Raises:
        NotApplicable: the data say of no question what it needs.
    """
    ways = find_ways(subject)
    numbers, rows, steps = list(ways), [], []
    units = find_units(subject, numbers)
    result = Result(
        "D14",
        "D14: count against need",
        "Accuracy by the number n of latents that the model is given at inference and by the number k of steps that the question "
        "needs; intervals by Wilson. Chance is one of the choices.",
    )
    for label, count, arm in give_latents(subject, len(units) if takes_steps(units) else None):
        try:
            answers = subject.ask(arm)
        except ValueError as error:  # more latents than the context holds
            result.not_applicable[label] = str(error)
            continue
        right = dict(zip(numbers, subject.is_right([answers[number] for number in numbers], numbers)))
        mean_latents = float(np.mean([answers[number].num_latents for number in numbers]))
        for need, members in group_by_need(ways, numbers).items():
            rows.append({"given": label, "need k": need} | describe(subject, members, right))
            rows[-1]["mean latents"] = mean_latents
        if takes_steps(units):
            steps.append({"latents n": count} | compare_with_need(subject, ways, right, count))
    result.tables["accuracy"] = rows
    has_steps = bool(steps)
    result.curves = [draw(rows, has_steps)]
    if has_steps:
        result.tables["staircase"] = steps
        result.notes.append(judge(rows, subject, numbers))
    else:
        result.notes.append(
            "The model opens one block; n is its size, which need not be the number of steps that it does."
        )
    result.notes.append("Numbers of latents that training never used are outside of what the model has learned.")
    if len(numbers) < len(subject.items):
        result.notes.append(
            f"{len(subject.items) - len(numbers)} items say no need or took no latents, and are left out."
        )
    return result


def give_latents(subject: Subject, most: int | None) -> list[tuple[str, int, Arm]]:
    """(label, number, arm) of every number of latents: steps or blocks up to `most`, or sizes of the one block (None)."""
    architecture = subject.architecture
    if most is None:
        sizes = architecture.sweep()
        return [
            (label, count, Arm(f"sweep {count}", label, inside=lambda count=count: architecture.with_latents(count)))
            for label, count in sizes
        ]
    found = []
    for count in range(most + 1):
        title = f"{count} of {most} blocks or steps"
        found.append(
            (
                str(count),
                count,
                Arm(f"given {count}", title, inside=lambda count=count: architecture.with_steps(count)),
            )
        )
    return found


def chance_of(subject: Subject, numbers: list[int]) -> float:
    """The share of right answers of one who draws among the choices; nan where the data list none."""
    counts = [len(subject.items[number].row.choices) for number in numbers]
    return float(np.mean([1 / count if count else np.nan for count in counts])) if counts else float("nan")


def describe(subject: Subject, members: list[int], right: dict[int, bool]) -> dict:
    accuracy, low, high = share_interval([[right[number]] for number in members])
    row = {"items": len(members), "accuracy": 100 * accuracy, "low": 100 * low, "high": 100 * high}
    return row | {"chance": 100 * chance_of(subject, members)}


def compare_with_need(subject: Subject, ways: dict[int, Way], right: dict[int, bool], count: int) -> dict:
    """Accuracy of the questions that need at most `count` steps, and of those that need more."""
    row = {}
    for name, is_served in (("k <= n", True), ("k > n", False)):
        members = [number for number, way in ways.items() if (way.need <= count) == is_served]
        found = describe(subject, members, right)
        row |= {name: found["accuracy"], **{f"{name}, {part}": found[part] for part in ("low", "high", "items")}}
    served = 0
    for need, members in list(group_by_need(ways, list(ways)).items())[1:]:
        if describe(subject, members, right)["accuracy"] < SERVED:
            break
        served = int(need)
    return row | {"serves k up to": served}


def judge(rows: list[dict], subject: Subject, numbers: list[int]) -> str:
    """The staircase in a sentence: the worst of what should be served and the best of what should not."""
    cells = [(int(row["given"]), int(row["need k"]), row["accuracy"]) for row in rows if row["need k"] != "all"]
    served = [accuracy for count, need, accuracy in cells if need <= count]
    others = [accuracy for count, need, accuracy in cells if need > count]
    if not served or not others:
        return "No number of latents serves some questions and not others, so there is no staircase to see."
    return (
        f"n latents serve questions that need k <= n steps with {min(served):.1f} % or more, and those that need more with "
        f"{max(others):.1f} % or less; chance is {100 * chance_of(subject, numbers):.1f} %."
    )


def draw(rows: list[dict], has_steps: bool) -> Curve:
    series: dict[str, list] = {}
    for row in rows:
        if row["need k"] != "all":
            x = int(row["given"]) if has_steps else row["mean latents"]
            series.setdefault(f"k = {row['need k']}", []).append((x, row["accuracy"], row["low"], row["high"]))
    label = "latents given (blocks or steps)" if has_steps else "latents an item"
    return Curve("accuracy by the number of latents and what questions need", label, "%", series)
