"""D1: replace the latents and ask again.

What is measured: `outcomes.py`. What takes the place of latents: `arms.py` and `lending.py`. What may be said of it:
`verdicts.py`. Items that took no latents are shown apart: nothing that is done to latents can change them.

(CapImagine 2602.22766; PRISM 2606.05753; Ablate-to-Validate 2605.21642; What's Holding Back 2605.18445.)
"""

from collections import Counter

from evaluation.faithfulness.arms import ARMS, DRAWS, build_arms, calibrate
from evaluation.faithfulness.lending import SWAPS
from evaluation.faithfulness.outcomes import Outcome, describe_group, follow, list_donors, observe_arms
from evaluation.faithfulness.result import Curve, Result
from evaluation.faithfulness.statistics import share_interval
from evaluation.faithfulness.subject import CLEAN, Arm, Subject, without_latents
from evaluation.faithfulness.verdicts import MARGIN, MIN_DISCORDANT, verdict
from evaluation.final_answer import normalize


TITLE = "D1: replace the latents"
DEFINITION = (
    "Other values take the place of all latents before the language model reads them; question, picture, budget and greedy decoding "
    "stay. Over items with latents. Change of accuracy in points, low and high by a paired bootstrap over items (and draws), score "
    "low and high by Newcombe of the first draw; b, c: items of the first draw that are right clean alone and under the arm alone, p: "
    "McNemar, exact, then raised by Holm for the number of arms; detectable: the loss that would be found in 4 of 5 cases. Intervals "
    "of accuracy and flip rate by Wilson. KL is teacher-forced on the clean answer, over its tokens behind the first latent, in nats "
    "per token. No box: answers without a box or another mark of the final answer."
)


def measure_interventions(subject: Subject, names: tuple[str, ...] = ARMS, draws: int = DRAWS) -> Result:
    """Ask all questions under every arm.

    Args:
        draws: donors of each item in the arms that swap.

    Raises:
        ValueError: an arm that does not exist, or no draw.
    """
    unknown = sorted(set(names) - set(ARMS))
    if unknown:
        raise ValueError(f"`arms` must be of {list(ARMS)}, got {unknown}.")
    if draws < 1:
        raise ValueError(f"`draws` must be >= 1, got {draws}.")
    numbers = subject.with_latents
    calibration = calibrate(subject)
    built = build_arms(subject, calibration, draws, names)
    outcomes = observe_arms(subject, [arm for arm in built.values() if isinstance(arm, Arm)])
    groups = {name: describe_group(subject, outcomes, part) for name, part in subject.tasks(numbers).items()}
    result = Result(
        "D1",
        TITLE,
        DEFINITION,
        tables={"arms": groups["all"], "latents": [latent_statistics(subject, calibration)]},
        not_applicable={name: arm for name, arm in built.items() if isinstance(arm, str)},
    )
    by_task = [{"task": task} | row for task, rows in groups.items() if task != "all" for row in rows]
    if by_task:
        result.tables["arms by task"] = by_task
    result.curves = draw_curves(groups["all"])
    add_swaps(subject, outcomes, result)
    if len(numbers) < len(subject.items):
        result.tables["items without latents"] = describe_others(subject)
    result.notes = [
        f"{'' if task == 'all' else f'{task}: '}{verdict(rows)}" for task, rows in groups.items() if len(rows) > 1
    ]
    result.notes += [margin_note(), chance_note(subject)]
    if subject.model.config.recomputes_sequence:
        result.notes.append(
            'With `routing_scope="reference"` later tokens change earlier ones, so KL is not that of the decoding loop.'
        )
    return result


def draw_curves(rows: list[dict]) -> list[Curve]:
    changes = [(row["arm"], row["change of accuracy"], row["low"], row["high"]) for row in rows[1:]]
    flips = [(row["arm"], row["flip rate"], row["flip low"], row["flip high"]) for row in rows[1:]]
    return [
        Curve("change of accuracy against the clean run", "arm", "points", {"change": changes}, "bar"),
        Curve("flip rate", "arm", "share of answers", {"flips": flips}, "bar"),
    ]


def add_swaps(subject: Subject, outcomes: dict[str, Outcome], result: Result) -> None:
    """How often answers become the donor's, in all and by task; in the JSON alone every donor."""
    rows, donors = [], []
    for name in SWAPS:
        if name not in outcomes:
            continue
        donors += list_donors(subject, outcomes[name])
        for task, numbers in subject.tasks(outcomes[name].numbers).items():
            rows.append({"task": task} | follow(subject, outcomes[name].of(numbers)))
    if rows:
        result.tables["swap"] = rows
        result.details["donors"] = donors


def describe_others(subject: Subject) -> list[dict]:
    """The items that took no latents, beside those that did: as they are, and with latents disabled."""
    numbers = set(subject.with_latents)
    groups = {"with latents": numbers, "without latents": set(range(len(subject.items))) - numbers}
    off = subject.ask(without_latents(subject.architecture))
    rows = []
    for name, found in ((CLEAN.name, subject.clean), ("skip", off)):
        right = subject.is_right(found)
        for group, members in groups.items():
            accuracy, low, high = share_interval([[right[number]] for number in sorted(members)])
            row = {"arm": name, "items that are": group, "items": len(members), "accuracy": 100 * accuracy}
            rows.append(row | {"accuracy low": 100 * low, "accuracy high": 100 * high})
    return rows


def latent_statistics(subject: Subject, calibration) -> dict:
    return {
        "items with latents": len(subject.with_latents),
        "items without": len(subject.items) - len(subject.with_latents),
        "calibration latents": calibration.num_latents,
        "RMS(z)": calibration.rms,
        "mean norm": calibration.rms * len(calibration.mean) ** 0.5,
        "RMS of the standard deviation by dimension": float(calibration.std.square().mean().sqrt()),
    }


def margin_note() -> str:
    return (
        f"A loss needs {MIN_DISCORDANT} items that are right in one of both alone, p < 0.05 after Holm and an interval below zero; no "
        f"loss needs that one of more than {MARGIN:g} points is excluded."
    )


def chance_note(subject: Subject) -> str:
    answers = Counter(normalize(item.answer) for item in subject.items)
    answer, count = min(answers.items(), key=lambda one: (-one[1], one[0]))  # in any order of the data
    return f"The best constant answer ({answer!r}) has {100 * count / len(subject.items):.1f} %."
