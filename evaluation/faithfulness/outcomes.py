"""What the answers under an arm are beside the clean ones, item by item, and what they are together.

Over N items in K draws (one for most arms), for a group of items such as a task:

    change of accuracy   mean of [a^ right] - [a right] of the items' answers under the arm and clean, in points: by a paired
                         bootstrap, and by Newcombe's interval of the first draw, which has a width where no item changed
    b, c, p              items that are right clean alone and under the arm alone in the first draw, and McNemar's exact p;
                         p (Holm) is raised for the number of arms
    flip rate            share of answers that say something else than the clean ones, by Wilson
    KL                   mean over items of the mean over answer tokens of KL(clean || arm), nats, by bootstrap
    format               answers without a box or another mark, answers outside of what is allowed, accuracy of the others

Wilson's intervals of several draws are those of N items: draws of one item are alike.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from evaluation.donors import chance_to_follow
from evaluation.faithfulness.lending import SWAPS
from evaluation.faithfulness.statistics import (
    draws_interval,
    holm,
    mcnemar,
    newcombe_interval,
    share_interval,
    smallest_detectable,
)
from evaluation.faithfulness.subject import CLEAN, Arm, Subject
from evaluation.scoring import Reading


@dataclass
class Outcome:
    """The answers to some items under an arm: arrays (N, K), nan where an item has fewer draws."""

    arm: Arm
    numbers: list[int]
    right: np.ndarray
    is_marked: np.ndarray
    is_valid: np.ndarray
    is_changed: np.ndarray
    kl: np.ndarray
    clean_right: np.ndarray  # (N,)
    clean_valid: np.ndarray  # (N,)
    answers: list[dict[int, str]]  # by draw, by item: what was said

    def of(self, numbers: list[int]) -> "Outcome":
        """The same of some items alone."""
        wanted = set(numbers)
        rows = [place for place, number in enumerate(self.numbers) if number in wanted]
        names = ("right", "is_marked", "is_valid", "is_changed", "kl", "clean_right", "clean_valid")
        chosen = {name: getattr(self, name)[rows] for name in names}
        return replace(self, numbers=[self.numbers[place] for place in rows], **chosen)


def observe_arms(subject: Subject, arms: list[Arm]) -> dict[str, Outcome]:
    """Ask the items that have latents under every arm, the clean one first."""
    draws = [CLEAN] + [draw for arm in arms for draw in arm.draws]
    scores = subject.score([confined(arm) for arm in draws], "reading the clean answers")
    kl = {
        name: {number: score.kl for number, score in zip(subject.with_latents, found)}
        for name, found in scores.items()
    }
    return {arm.name: observe_arm(subject, arm, kl) for arm in (CLEAN, *arms)}


def confined(arm: Arm) -> Arm:
    """An arm that leaves the items alone which it cannot be asked about."""
    if arm.only is None or arm.change is None:
        return arm
    return replace(
        arm,
        change=lambda latents, step, number: arm.change(latents, step, number) if number in arm.only else latents,
    )


def observe_arm(subject: Subject, arm: Arm, kl: dict[str, dict[int, float]]) -> Outcome:
    numbers = [number for number in subject.with_latents if arm.only is None or number in arm.only]
    clean = dict(zip(range(len(subject.items)), subject.readings(subject.clean)))
    shape = (len(numbers), len(arm.draws))
    found = {name: np.full(shape, np.nan) for name in ("right", "is_marked", "is_valid", "is_changed", "kl")}
    answers: list[dict[int, str]] = []
    for place, draw in enumerate(arm.draws):
        readings = clean if draw is CLEAN else dict(enumerate(subject.readings(subject.ask(draw))))
        asked = [(row, n) for row, n in enumerate(numbers) if draw.only is None or n in draw.only]
        answers.append({number: readings[number].answer for _, number in asked})
        for row, number in asked:
            one = readings[number]
            values = (one.is_right, one.is_marked, one.is_valid, one.answer != clean[number].answer)
            for name, value in zip(found, (*values, kl[draw.name][number])):
                found[name][row, place] = value
    return Outcome(
        arm,
        numbers,
        **found,
        clean_right=np.array([clean[number].is_right for number in numbers], dtype=float),
        clean_valid=np.array([clean[number].is_valid for number in numbers], dtype=float),
        answers=answers,
    )


def describe(outcome: Outcome, excluded: int, seed: int) -> dict:
    """The row of an arm in a table; `p (Holm)` comes when all arms are there."""
    arm, first = outcome.arm, outcome.right[:, 0]
    accuracy, low_accuracy, high_accuracy = share_interval(outcome.right)
    change, low, high = draws_interval(outcome.right - outcome.clean_right[:, None], seed, arm.has_shared_draws)
    table = count_pairs(outcome.clean_right, first)
    _, low_score, high_score = newcombe_interval(*table)
    flips, low_flips, high_flips = share_interval(outcome.is_changed)
    kl, low_kl, high_kl = draws_interval(outcome.kl, seed, arm.has_shared_draws)
    both_valid = (outcome.is_valid[:, 0] == 1) & (outcome.clean_valid == 1)
    in_form = count_pairs(outcome.clean_right[both_valid], first[both_valid])
    answers = ~np.isnan(outcome.right)
    valid = outcome.right[answers & (outcome.is_valid == 1)]
    return {
        "arm": arm.name,
        "what": arm.title,
        "items": len(outcome.numbers),
        "draws": len(arm.draws),
        "excluded": excluded,
        "clean accuracy": 100 * float(outcome.clean_right.mean()),
        "accuracy": 100 * accuracy,
        "accuracy low": 100 * low_accuracy,
        "accuracy high": 100 * high_accuracy,
        "change of accuracy": 100 * change,
        "low": 100 * low,
        "high": 100 * high,
        "score low": 100 * low_score,
        "score high": 100 * high_score,
        "b": table[1],
        "c": table[2],
        "p": mcnemar(table[1], table[2]),
        "both valid": int(both_valid.sum()),
        "b, both valid": in_form[1],
        "c, both valid": in_form[2],
        "detectable": 100 * smallest_detectable(table[1] + table[2], len(first)),
        "flip rate": flips,
        "flip low": low_flips,
        "flip high": high_flips,
        "KL": kl,
        "KL low": low_kl,
        "KL high": high_kl,
        "answers": int(answers.sum()),
        "no box": int((outcome.is_marked[answers] == 0).sum()),
        "outside choices": int((outcome.is_valid[answers] == 0).sum()),
        "accuracy of valid": 100 * float(valid.mean()) if len(valid) else float("nan"),
    }


def describe_form(readings: Iterable[Reading]) -> dict:
    """Answers without a box or another mark, those that the questions do not allow, and the accuracy of the others, in percent."""
    readings = list(readings)
    valid = [reading.is_right for reading in readings if reading.is_valid]
    return {
        "no box": sum(not reading.is_marked for reading in readings),
        "outside choices": len(readings) - len(valid),
        "accuracy of valid": 100 * sum(valid) / len(valid) if valid else float("nan"),
    }


def count_pairs(before: np.ndarray, after: np.ndarray) -> tuple[int, int, int, int]:
    """Items right both times, before alone, afterwards alone, never; those that were not asked again are left out."""
    kept = ~np.isnan(after)
    before, after = before[kept] == 1, after[kept] == 1
    return (
        int((before & after).sum()),
        int((before & ~after).sum()),
        int((~before & after).sum()),
        int((~before & ~after).sum()),
    )


def describe_group(subject: Subject, outcomes: dict[str, Outcome], numbers: list[int]) -> list[dict]:
    """The rows of all arms for some items; an arm that can be asked about none of them has none."""
    rows = []
    for outcome in outcomes.values():
        part = outcome.of(numbers)
        if part.numbers:
            rows.append(describe(part, len(numbers) - len(part.numbers), subject.seed))
    compared = [row for row in rows if row["arm"] != CLEAN.name]
    for row, raised in zip(compared, holm([row["p"] for row in compared])):
        row["p (Holm)"] = raised
    return rows


def follow(subject: Subject, outcome: Outcome) -> dict:
    """Does the answer become the donor's? Over answers whose donor said something else than the item, both clean.

    Chance: the answers as they are, had any other of the item's donors been drawn.
    """
    clean = [reading.answer for reading in subject.readings(subject.clean)]
    followed, kept, chances = (np.full(outcome.right.shape, np.nan) for _ in range(3))
    for place, draw in enumerate(outcome.arm.draws):
        for row, number in enumerate(outcome.numbers):
            donor = draw.donors.get(number)
            if donor is None or clean[donor] == clean[number]:
                continue
            said = outcome.answers[place][number]
            others = (clean[other] for other in subject.donors.eligible(number, SWAPS[outcome.arm.name][0]))
            followed[row, place] = said == clean[donor]
            kept[row, place] = said == clean[number]
            chances[row, place] = chance_to_follow(said, (other for other in others if other != clean[number]))
    share, low, high = share_interval(followed)
    return {
        "arm": outcome.arm.name,
        "answers whose donor says otherwise": int((~np.isnan(followed)).sum()),
        "answer becomes the donor's": share,
        "low": low,
        "high": high,
        "by chance": share_interval(chances)[0],
        "answer stays": share_interval(kept)[0],
    }


def list_donors(subject: Subject, outcome: Outcome) -> list[dict]:
    """By item and draw whose latents it got, and what it said then."""
    rows = []
    for place, draw in enumerate(outcome.arm.draws):
        for number in outcome.numbers:
            if (donor := draw.donors.get(number)) is None:
                continue
            own, lent = subject.items[number], subject.items[donor]
            rows.append(
                {
                    "arm": outcome.arm.name,
                    "draw": place,
                    "id": own.name,
                    "task": own.task,
                    "donor_id": lent.name,
                    "donor_task": lent.task,
                    "same_answer": own.candidate.answer == lent.candidate.answer,
                    "answer": outcome.answers[place][number],
                }
            )
    return rows
