"""D1: replace the latents and ask again.

For an arm with replacements z^ of the latents z, over N items with answers a (clean) and a^ (arm), right or wrong:

    change of accuracy   mean of [a^ right] - [a right], with a paired bootstrap interval over items
    flip rate            share of items with a^ != a
    KL                   mean over items of the mean over answer tokens i of KL(p(.|x, z, a_<i) || p(.|x, z^, a_<i)), in nats:
                         teacher-forced on the clean answer a, over its tokens behind the first latent

(CapImagine 2602.22766; PRISM 2606.05753; Ablate-to-Validate 2605.21642; What's Holding Back 2605.18445.)
"""

import math
from collections import Counter

from evaluation.final_answer import normalize
from train.faithfulness.arms import ARMS, build_arms, calibrate, choose_donors
from train.faithfulness.result import Curve, Result
from train.faithfulness.statistics import mean_interval, paired
from train.faithfulness.subject import CLEAN, Answer, Arm, Score, Subject


TITLE = "D1: replace the latents"
CONTENT_ARMS = ("shared", "matched", "swap")  # as the latents in size and distribution, but nothing of this picture


def measure_interventions(subject: Subject, names: tuple[str, ...] = ARMS) -> Result:
    """Ask all questions under every arm.

    Raises:
        ValueError: an arm that does not exist.
    """
    unknown = sorted(set(names) - set(ARMS))
    if unknown:
        raise ValueError(f"`arms` must be of {list(ARMS)}, got {unknown}.")
    subject.with_latents  # noqa: B018 - raises where there is nothing to replace
    calibration = calibrate(subject)
    built = {name: arm for name, arm in build_arms(subject, calibration).items() if name in names}
    arms = [arm for arm in built.values() if isinstance(arm, Arm)]
    answers = {CLEAN.name: subject.clean} | {arm.name: subject.ask(arm) for arm in arms}
    scores = score_arms(subject, arms)
    rows = [describe(subject, CLEAN, answers, scores)] + [describe(subject, arm, answers, scores) for arm in arms]
    result = Result(
        "D1",
        TITLE,
        "Other values take the place of all latents before the language model reads them; "
        "question, picture, budget and greedy "
        "decoding stay. KL is teacher-forced on the clean answer, over its tokens behind the first "
        "latent, in nats per token.",
        tables={"arms": rows, "latents": [latent_statistics(subject, calibration)]},
        not_applicable={name: arm for name, arm in built.items() if isinstance(arm, str)},
    )
    changes = [(row["arm"], row["change of accuracy"], row["low"], row["high"]) for row in rows[1:]]
    result.curves = [
        Curve("change of accuracy against the clean run", "arm", "points", {"change": changes}, "bar"),
        Curve(
            "flip rate",
            "arm",
            "share of items",
            {"flips": [(row["arm"], row["flip rate"]) for row in rows[1:]]},
            "bar",
        ),
    ]
    if "swap" in answers:
        result.tables["swap"] = [follow(subject, answers["swap"])]
    result.notes = [verdict(rows), chance_note(subject)]
    if getattr(subject.model.config, "routing_scope", None) == "reference":
        result.notes.append(
            'With `routing_scope="reference"` later tokens change earlier ones, so KL is not that of the decoding loop.'
        )
    return result


def score_arms(subject: Subject, arms: list[Arm]) -> dict[str, list[Score]]:
    everywhere = [arm for arm in arms if arm.only is None]
    scores = subject.score([CLEAN, *everywhere], "reading the clean answers")
    for arm in arms:
        if arm.only is not None:
            own = Arm(
                arm.name,
                arm.title,
                lambda latents, step, number, arm=arm: (
                    arm.change(latents, step, number) if number in arm.only else latents
                ),
            )
            scores[arm.name] = subject.score([CLEAN, own])[arm.name]
    return scores


def describe(subject: Subject, arm: Arm, answers: dict[str, list[Answer]], scores: dict[str, list[Score]]) -> dict:
    numbers = sorted(arm.only) if arm.only is not None else list(range(len(subject.items)))
    mine, clean = ([answers[name][number] for number in numbers] for name in (arm.name, CLEAN.name))
    right, clean_right = subject.is_right(mine, numbers), subject.is_right(clean, numbers)
    accuracy, low_accuracy, high_accuracy = mean_interval(right, subject.seed)
    change, low, high = paired(right, clean_right, subject.seed)
    flips = [one.text != other.text for one, other in zip(mine, clean)]
    asked = set(numbers)
    kl, _, _ = mean_interval(
        [score.kl for number, score in zip(subject.with_latents, scores[arm.name]) if number in asked], subject.seed
    )
    return {
        "arm": arm.name,
        "what": arm.title,
        "items": len(numbers),
        "accuracy": 100 * accuracy,
        "accuracy low": 100 * low_accuracy,
        "accuracy high": 100 * high_accuracy,
        "change of accuracy": 100 * change,
        "low": 100 * low,
        "high": 100 * high,
        "flip rate": sum(flips) / len(flips),
        "KL": kl,
    }


def follow(subject: Subject, swapped: list[Answer]) -> dict:
    """Does the answer become the donor's? Over items that took latents, and whose donor answered otherwise."""
    donors = choose_donors(subject)
    differing = [
        number for number in subject.with_latents if subject.clean[donors[number]].text != subject.clean[number].text
    ]
    followed = [swapped[number].text == subject.clean[donors[number]].text for number in differing]
    kept = [swapped[number].text == subject.clean[number].text for number in differing]
    return {
        "items whose donor answers otherwise": len(differing),
        "answer becomes the donor's": sum(followed) / len(differing) if differing else math.nan,
        "answer stays": sum(kept) / len(differing) if differing else math.nan,
    }


def latent_statistics(subject: Subject, calibration) -> dict:
    return {
        "items with latents": len(subject.with_latents),
        "calibration latents": calibration.num_latents,
        "RMS(z)": calibration.rms,
        "mean norm": calibration.rms * len(calibration.mean) ** 0.5,
        "RMS of the standard deviation by dimension": float(calibration.std.square().mean().sqrt()),
    }


def verdict(rows: list[dict]) -> str:
    """What the arms that keep size and distribution say about the content of the latents."""
    content = [row for row in rows if row["arm"] in CONTENT_ARMS]
    if not content:
        return "None of the arms that keep size and distribution of the latents was asked for."
    lost = [row for row in content if row["high"] < 0]
    if len(lost) == len(content):
        return "The content of the latents is used: every arm that keeps their size or distribution and not their content loses."
    if not lost:
        moved = max(row["flip rate"] for row in content)
        change = "hardly an answer changes" if moved < 0.05 else f"up to {100 * moved:.1f} % of the answers change"
        return (
            f"No loss was measured where latents keep size or distribution and lose their content "
            f"({', '.join(row['arm'] for row in content)}): {change}."
        )
    return f"Mixed: {', '.join(row['arm'] for row in lost)} lose(s), the other arms that keep the distribution do not."


def chance_note(subject: Subject) -> str:
    answers = Counter(normalize(item.answer) for item in subject.items)
    answer, count = answers.most_common(1)[0]
    return f"The best constant answer ({answer!r}) has {100 * count / len(subject.items):.1f} %."
