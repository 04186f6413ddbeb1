"""From answers to a summary: accuracy with 95 % intervals, and what the answers took."""

import math
from collections import Counter
from collections.abc import Iterable
from statistics import mean, median, stdev


Z95 = 1.959963984540054  # of the normal distribution


def wilson_interval(right: float, total: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share; within 0 and 1, and of width above 0 at both ends.

    Raises:
        ValueError: the counts cannot be.
    """
    if not 0 <= right <= total or total <= 0:
        raise ValueError(f"Wilson's interval needs 0 <= right <= total and total > 0, got {right} of {total}.")
    share, weight = right / total, z * z / total
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    low = 0.0 if right == 0 else centre - half
    high = 1.0 if right == total else centre + half
    return low, high


def share(values: list[bool], name: str, repeats: int = 1) -> dict:
    """A share with its Wilson interval, under `name`, `name_low` and `name_high`; None where there is nothing to count.

    Repeats of a question are alike, so the interval is that of the number of questions.
    """
    if not values:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    low, high = wilson_interval(sum(values) / repeats, len(values) / repeats)
    return {name: sum(values) / len(values), f"{name}_low": low, f"{name}_high": high}


def describe(records: list[dict]) -> dict:
    """The numbers of one group of answers.

    Rows that a swap could not swap are counted as `not_swapped`, those without the latents that an intervention names as
    `not_reached`, and neither are in any other number of right answers. Rows without latents
    are also shown by themselves: nothing that is done to latents can change them. `accuracy_valid` is that of the answers that
    the question allows.

    Where questions were asked several times, `accuracy_std` says how much the accuracy differs from repeat to repeat.
    """
    repeats = 1 + max(record.get("repeat", 0) for record in records)
    swapped = [record for record in records if not record.get("not_swapped", False)]
    counted = [record for record in swapped if not record.get("not_reached", False)]
    repeated = {}
    if repeats > 1 and counted:
        shares = [[record["correct"] for record in counted if record["repeat"] == one] for one in range(repeats)]
        repeated = {"repeats": repeats, "accuracy_std": stdev(mean(share) for share in shares)}
    return {
        "rows": len(counted) // repeats,
        **repeated,
        "correct": sum(record["correct"] for record in counted),
        **share([record["correct"] for record in counted], "accuracy", repeats),
        **describe_format(counted, repeats),
        "answer_tokens": mean(record["num_tokens"] for record in records),
        "latent_blocks": mean(record["num_latent_blocks"] for record in records),
        "latents": mean(record["num_latents"] for record in records),
        "rows_with_latents": sum(record["num_latents"] > 0 for record in records),
        **describe_latents(counted, repeats),
        # Results of an earlier version do not say: there such a row ended the evaluation.
        "not_swapped": (len(records) - len(swapped)) // repeats,
        "not_reached": (len(swapped) - len(counted)) // repeats,
        **describe_donors(counted, repeats),
        "stop_reasons": dict(sorted(Counter(record["stop_reason"] for record in records).items())),
        "seconds": mean(record["seconds"] for record in records),
        "median_seconds": median(record["seconds"] for record in records),
    }


def describe_format(counted: list[dict], repeats: int) -> dict:
    """Answers without a box or another mark, those outside of what the question allows, and the accuracy of the others."""
    if not all("is_valid" in record for record in counted):
        return {}  # an earlier version wrote some of them
    valid = [record["correct"] for record in counted if record["is_valid"]]
    return {
        "unmarked": sum(not record["is_marked"] for record in counted),
        "outside_choices": len(counted) - len(valid),
        **share(valid, "accuracy_valid", repeats),
    }


def describe_latents(counted: list[dict], repeats: int) -> dict:
    """Accuracy of the rows that took latents and of those that took none."""
    found = {}
    for name, is_wanted in (("with_latents", True), ("without_latents", False)):
        right = [record["correct"] for record in counted if (record["num_latents"] > 0) == is_wanted]
        found[f"accuracy_{name}"] = {"answers": len(right), **share(right, "accuracy", repeats)}
    return found


def describe_donors(counted: list[dict], repeats: int) -> dict:
    """How often the answers of rows that were swapped are their donors', and how often they would be by chance."""
    swapped = [record for record in counted if "donor_id" in record and record["num_latents"] > 0]
    if not swapped:
        return {}
    return {
        "swapped": {
            "answers": len(swapped),
            **share([record["follows_donor"] for record in swapped], "follows_donor", repeats),
            "follow_chance": mean(record["follow_chance"] for record in swapped),
            "same_answer": sum(record["same_answer"] for record in swapped),
        }
    }


def grouped(records: Iterable[dict], name: str) -> dict[str, dict]:
    groups: dict[str, list[dict]] = {}
    for record in records:
        groups.setdefault(record[name], []).append(record)
    return {group: describe(groups[group]) for group in sorted(groups)}


def summarize(records: list[dict]) -> dict:
    """In all, by family, by task and by file."""
    return {
        "all": describe(records),
        "families": grouped(records, "family"),
        "tasks": grouped(records, "task"),
        "data": grouped(records, "data"),
    }


def percent(value: float | None, width: int = 6) -> str:
    return f"{'-':>{width}s} %" if value is None else f"{100 * value:{width}.1f} %"


def draw_table(summary: dict) -> str:
    """The summary as text: families, tasks where they are others, and all."""
    groups = dict(summary["families"])
    groups |= {f"  {name}": numbers for name, numbers in summary["tasks"].items() if name not in groups}
    groups["all"] = summary["all"]
    width = max(map(len, groups))
    lines = [
        f"{'':{width}s}   rows  accuracy   95 % interval   no box  outside  of valid   tokens  blocks  latents  s/row  stopped by"
    ]
    for name, numbers in groups.items():
        low, high = (percent(numbers[f"accuracy_{end}"], 5) for end in ("low", "high"))
        reasons = ", ".join(f"{reason} {count}" for reason, count in numbers["stop_reasons"].items())
        lines.append(
            f"{name:{width}s} {numbers['rows']:6d}  {percent(numbers['accuracy'])}  {low[:-2]} - {high}  "
            f"{numbers.get('unmarked', '-'):>7}  {numbers.get('outside_choices', '-'):>7}  "
            f"{percent(numbers.get('accuracy_valid'))}  "
            f"{numbers['answer_tokens']:7.1f}  {numbers['latent_blocks']:6.2f}  {numbers['latents']:7.1f}  "
            f"{numbers['seconds']:5.2f}  {reasons}"
        )
    return "\n".join([*lines, *notes(summary["all"])])


def notes(numbers: dict) -> list[str]:
    """What the table of a summary has no column for."""
    lines = []
    if "repeats" in numbers:
        lines.append(
            f"Every question was asked {numbers['repeats']} times; the accuracy differs from time to time by "
            f"{100 * numbers['accuracy_std']:.1f} % (standard deviation)."
        )
    if kept := numbers.get("not_swapped", 0):
        lines.append(
            f"{kept} rows were not swapped and are not counted: the data hold no donor for them (another picture and another "
            "true answer, by `donors`) that takes latents."
        )
    if missed := numbers.get("not_reached", 0):
        lines.append(f"{missed} rows took no latent of those that the intervention names, and are not counted.")
    without = numbers.get("accuracy_without_latents", {"answers": 0})
    if without["answers"] > 0 and numbers["rows_with_latents"]:
        lines.append(
            f"{without['answers']} answers took no latents: {percent(without['accuracy']).strip()} of them are right, and "
            f"{percent(numbers['accuracy_with_latents']['accuracy']).strip()} of the others."
        )
    if swapped := numbers.get("swapped"):
        lines.append(
            f"{percent(swapped['follows_donor']).strip()} of {swapped['answers']} swapped answers are the donor's "
            f"({percent(swapped['follows_donor_low']).strip()} to {percent(swapped['follows_donor_high']).strip()}; by chance "
            f"{percent(swapped['follow_chance']).strip()})."
        )
    return lines
