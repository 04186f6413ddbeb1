"""D2: what each latent does for an answer that stays as it is.

    u_t = ln pi(o* | x, z) - ln pi(o* | x, z with z_t -> z_mean)

o* is the clean answer, scored over its tokens behind the first latent; all other latents are served as they were in the
clean run, so nothing is generated again (ReaLVR). z_mean is the mean latent of the calibration set. The curve replaces the
k latents that the answer attends most (and, to compare, least), k = 0..K.
"""

import numpy as np
import torch

from evaluation.faithfulness.arms import Calibration, calibrate
from evaluation.faithfulness.columns import ANSWER
from evaluation.faithfulness.lending import Table, table_of
from evaluation.faithfulness.observation import Observed
from evaluation.faithfulness.result import Curve, Result
from evaluation.faithfulness.statistics import mean_interval
from evaluation.faithfulness.subject import CLEAN, Arm, Subject


MOST_UNITS = 16
MOST_POINTS = 9


def split_units(count: int, most: int = MOST_UNITS) -> list[list[int]]:
    """The numbers 0..count - 1 as units: single ones, or even runs of neighbours where there are more than `most`."""
    return [part.tolist() for part in np.array_split(np.arange(count), min(count, most))]


def replaced(table: Table, places: dict[int, set[int]], mean: torch.Tensor) -> Table:
    """Clean latents with those at some places (numbered through all steps of an item) replaced by `mean`."""
    steps = {}
    for number, rows in table.steps.items():
        changed, start = [], 0
        for grid, values in rows:
            hit = [place - start for place in places.get(number, ()) if start <= place < start + len(values)]
            start += len(values)
            values = values.clone()
            if hit:
                values[hit] = mean.to(values)
            changed.append((grid, values))
        steps[number] = changed
    return Table(steps)


def ranking(observed: Observed, count: int) -> list[int]:
    """Latents by the attention of the answer's tokens, summed over layers, most first."""
    total = torch.zeros(count)
    for (kind, _), attention in observed.attention.items():
        if kind == ANSWER and attention.latents is not None:
            total += attention.latents
    return total.argsort(descending=True, stable=True).tolist()


def measure_replacement(subject: Subject, observed: dict[int, Observed]) -> Result:
    calibration: Calibration = calibrate(subject)
    numbers = subject.with_latents
    clean = table_of(subject, {number: number for number in numbers})
    counts = {number: subject.clean[number].num_latents for number in numbers}
    units = {number: split_units(counts[number]) for number in numbers}
    most = max(len(parts) for parts in units.values())
    arms = [CLEAN, Arm("replay", "clean latents again", clean)]
    for unit in range(most):
        places = {number: set(parts[unit]) for number, parts in units.items() if unit < len(parts)}
        arms.append(Arm(f"u{unit}", f"latents {unit}", replaced(clean, places, calibration.mean)))
    shares = np.linspace(0, 1, min(MOST_POINTS, max(counts.values()) + 1))
    for share in shares:
        for order in ("most", "least"):
            places = {}
            for number in numbers:
                ranked = ranking(observed[number], counts[number])
                ranked = ranked if order == "most" else ranked[::-1]
                places[number] = set(ranked[: round(share * counts[number])])
            arms.append(Arm(f"{order}{share}", f"{order} attended", replaced(clean, places, calibration.mean)))
    scores = subject.score(arms, "reading with single latents replaced")
    return summarize(subject, scores, units, most, shares, counts)


def describe_units(subject: Subject, scores: dict, units: dict, most: int, members: list[int]) -> list[dict]:
    """u_t of some items, a row for each unit of latents that any of them has."""
    numbers, wanted, rows = subject.with_latents, set(members), []
    base = np.array([score.logprob for score in scores["replay"]])
    for unit in range(most):
        values = np.array([score.logprob for score in scores[f"u{unit}"]])
        has_unit = np.array([number in wanted and unit < len(units[number]) for number in numbers])
        if not has_unit.any():
            continue
        mean, low, high = mean_interval((base - values)[has_unit], subject.seed)
        example = next(units[number][unit] for number, kept in zip(numbers, has_unit) if kept)
        label = str(example[0] + 1) if len(example) == 1 else f"{example[0] + 1}-{example[-1] + 1}"
        rows.append({"latents": label, "items": int(has_unit.sum()), "u_t": mean, "low": low, "high": high})
    return rows


def summarize(subject: Subject, scores: dict, units: dict, most: int, shares, counts: dict) -> Result:
    numbers, seed = subject.with_latents, subject.seed
    base = np.array([score.logprob for score in scores["replay"]])
    drift = np.abs(base - np.array([score.logprob for score in scores["clean"]]))
    groups = subject.tasks(numbers)
    tables = {name: describe_units(subject, scores, units, most, members) for name, members in groups.items()}
    curves = {}
    for order in ("most", "least"):
        points = []
        for share in shares:
            values = np.array([score.logprob for score in scores[f"{order}{share}"]])
            mean, low, high = mean_interval(values - base, seed)
            points.append((100 * float(share), mean, low, high))
        curves[f"the {order} attended"] = points
    notes = ["u_t > 0: the answer leans on that latent. A flat curve: on none of them, in this context."]
    if subject.model.config.replays_image_tokens:
        notes.append(
            "Image tokens that later steps replay are picked anew, and may change with the latents before them."
        )
    if any(len(units[number]) < counts[number] for number in numbers):
        notes.append(f"More than {MOST_UNITS} latents: neighbours are replaced together.")
    notes.append(
        "Reading with the recorded latents served again differs from reading without by at most "
        f"{np.nanmax(drift):.2g} nats."
    )
    return Result(
        "D2",
        "D2: what each latent does for the answer that was given",
        "u_t = ln pi(o*|x, z) - ln pi(o*|x, z with z_t replaced by the mean latent), o* the clean "
        "answer, nats; other latents as recorded.",
        tables={
            "u_t": tables["all"],
            "u_t by task": [{"task": task} | row for task, rows in tables.items() if task != "all" for row in rows],
        },
        curves=[
            Curve(
                "replacing latents in the order of the answer's attention",
                "latents replaced, %",
                "change of ln pi(o*), nats",
                curves,
            )
        ],
        notes=notes,
    )
