"""D16: which latent holds which step?

    probe      by latent i and step j: can what stands where one is after j moves be read off latent i by a linear map? Over the questions
               that need i moves or more, and j. "min(i, k)": over all questions, where one is after i moves or has arrived before.
               Held-out items that share no picture; shuffled: the same on labels dealt out anew; chance: the largest class
    replaced   latent i alone is the mean latent there of other items: accuracy by the need k. A latent that the answer needs costs
               those questions that need step i
    looked at  the share of what latent i looks at that lies on the tile of step i (`looked_at.py`)

A model that does one step in each latent has its probes on the diagonal.
"""

from collections import Counter

import numpy as np
import torch

from evaluation.faithfulness.collapse import stack
from evaluation.faithfulness.items import NotApplicable
from evaluation.faithfulness.lending import shared_arm
from evaluation.faithfulness.looked_at import measure_looks
from evaluation.faithfulness.outcomes import count_pairs
from evaluation.faithfulness.probe import group_by_pictures, probe
from evaluation.faithfulness.result import Curve, Result
from evaluation.faithfulness.serial_items import Unit, Way, at_unit, find_units, find_ways, group_by_need
from evaluation.faithfulness.statistics import mcnemar, share_interval
from evaluation.faithfulness.subject import Answer, Arm, Subject
from evaluation.report import wilson_interval


MOST_FEATURES = 4096  # of a latent; larger blocks are probed by their mean
MOST_STEPS = 8  # that are probed
ARRIVED = "min(i, k)"


def measure_step_content(subject: Subject) -> Result:
    """Probe every latent for every step, and replace each alone.

    Raises:
        NotApplicable: the data say of no question what it needs.
    """
    ways = find_ways(subject)
    units = find_units(subject, list(ways))
    result = Result(
        "D16",
        "D16: which step holds what",
        "Probes (StandardScaler and logistic regression, folds that share no picture, held out) of each latent for the content of each "
        "step; accuracy with each latent alone replaced by the mean of other items there; where latents look, against the tile of their "
        "step. Intervals by Wilson.",
    )
    add_probes(subject, ways, units, result)
    add_replaced(subject, ways, units, result)
    try:
        measure_looks(subject, ways, units, result)
    except NotApplicable as reason:
        result.not_applicable["where latents look"] = str(reason)
    return result


def features_of(answers: list[Answer], unit: Unit) -> np.ndarray:
    """(N, F) of one latent."""
    step = unit.places[0][0]
    if unit.places[0][1] is None:
        values = stack(
            [Answer([], "", [answer.steps[step]], "") for answer in answers]
        )  # (N, latents, D), in one grid
    else:
        positions = [position for _, position in unit.places]
        values = torch.stack([answer.steps[step].latents[positions].float() for answer in answers])
    flat = values.flatten(1)
    return (flat if flat.shape[1] <= MOST_FEATURES else values.mean(dim=1)).double().numpy()


def add_probes(subject: Subject, ways: dict[int, Way], units: list[Unit], result: Result) -> None:
    pictures = dict(zip(ways, group_by_pictures([subject.items[number].image_digests() for number in ways]).tolist()))
    steps = range(1, min(MOST_STEPS, max(way.need for way in ways.values())) + 1)
    rows = []
    for unit in units:
        having = [number for number in ways if unit.is_in(subject.clean[number])]
        targets = {
            str(step): {n: ways[n].content(step) for n in having if ways[n].need >= max(step, unit.number)}
            for step in steps
        }
        targets = {step: labels for step, labels in targets.items() if labels}
        targets[ARRIVED] = {number: ways[number].content(unit.number) for number in having}
        for step, labels in targets.items():
            try:
                row = probe_unit(subject, unit, labels, pictures)
            except NotApplicable as reason:
                result.not_applicable[f"probe of latent {unit.label} for step {step}"] = str(reason)
                continue
            rows.append({"latent i": unit.label, "step j": step} | row)
    result.tables["probes"] = rows
    series: dict[str, list] = {}
    for row in rows:
        if row["step j"] != ARRIVED:
            point = (int(row["step j"]), row["accuracy"], row["low"], row["high"])
            series.setdefault(f"latent {row['latent i']}", []).append(point)
    result.curves.append(Curve("probe of each latent for the content of each step", "step", "accuracy", series))
    result.notes.append(judge_probes(rows, units))


def probe_unit(subject: Subject, unit: Unit, labels: dict[int, str], pictures: dict[int, int]) -> dict:
    """The probe of one latent for some labels; those that occur with one picture alone are left out.

    Raises:
        NotApplicable: fewer than two labels remain, or they cannot be split.
    """
    counts = Counter(label for label, _ in {(label, pictures[number]) for number, label in labels.items()})
    kept = [number for number, label in labels.items() if counts[label] >= 2]
    if len({labels[number] for number in kept}) < 2:
        raise NotApplicable("a probe needs two contents, each in two different pictures or more")
    target, shown = (np.array([values[number] for number in kept]) for values in (labels, pictures))
    features = features_of([subject.clean[number] for number in kept], unit)
    found = probe(features, target, subject.seed, shown)
    accuracy = found["accuracy"]
    low, high = wilson_interval(min(accuracy * len(kept), len(kept)), len(kept))
    return {
        "items": len(kept),
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "chance": found["chance"],
        "shuffled": found["shuffled"],
    }


def judge_probes(rows: list[dict], units: list[Unit]) -> str:
    """The probes on the diagonal, and the best of those beside it."""
    numbers = {unit.label: str(unit.number) for unit in units}
    own = [row for row in rows if row["step j"] == numbers[row["latent i"]]]
    others = [row["accuracy"] for row in rows if row["step j"] not in (ARRIVED, numbers[row["latent i"]])]
    if not own:
        return "No latent could be probed for the content of its step."
    listed = ", ".join(
        f"{row['latent i']}: {100 * row['accuracy']:.1f} (shuffled {100 * row['shuffled']:.1f})" for row in own
    )
    beside = f"; at most {100 * max(others):.1f} % for another step" if others else ""
    return f"Probe of latent i for the content of step i, in %: {listed}{beside}."


def add_replaced(subject: Subject, ways: dict[int, Way], units: list[Unit], result: Result) -> None:
    """Accuracy with each latent alone replaced by the mean of half of the other items of the task there."""
    try:
        means = shared_arm(subject)
    except NotApplicable as reason:
        result.not_applicable["replaced by the mean"] = str(reason)
        return
    clean = np.array(subject.is_right(subject.clean), dtype=float)
    rows, series = [], {}
    for unit in units:
        only = {number for number in ways if number in means.only and unit.is_in(subject.clean[number])}
        arm = Arm(
            f"mean {unit.label}", f"latent {unit.label} is the mean there", at_unit(means.change, unit), only=only
        )
        right = np.array(subject.is_right(subject.ask(arm)), dtype=float)
        for need, members in group_by_need(ways, sorted(only)).items():
            accuracy, low, high = share_interval(right[members][:, None])
            _, lost, gained, _ = count_pairs(clean[members], right[members])
            rows.append(
                {
                    "replaced latent": unit.label,
                    "need k": need,
                    "items": len(members),
                    "clean accuracy": 100 * float(clean[members].mean()),
                    "accuracy": 100 * accuracy,
                    "low": 100 * low,
                    "high": 100 * high,
                    "b": lost,
                    "c": gained,
                    "p": mcnemar(lost, gained),
                }
            )
            if need != "all":
                series.setdefault(f"k = {need}", []).append((unit.number, 100 * accuracy, 100 * low, 100 * high))
    result.tables["replaced by the mean"] = rows
    result.curves.append(Curve("accuracy with one latent replaced by the mean", "replaced latent", "%", series))
