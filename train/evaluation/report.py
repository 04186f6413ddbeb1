"""From answers to a summary: accuracy with 95 % intervals, and what the answers took."""

import math
from collections import Counter
from collections.abc import Iterable
from statistics import mean, median, stdev


Z95 = 1.959963984540054  # of the normal distribution


def wilson_interval(right: float, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share; within 0 and 1, and of width above 0 at both ends.

    Raises:
        ValueError: the counts cannot be.
    """
    if not 0 <= right <= total or total < 1:
        raise ValueError(f"Wilson's interval needs 0 <= right <= total and total >= 1, got {right} of {total}.")
    share, weight = right / total, z * z / total
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    low = 0.0 if right == 0 else centre - half
    high = 1.0 if right == total else centre + half
    return low, high


def describe(records: list[dict]) -> dict:
    """The numbers of one group of answers.

    Where questions were asked several times, the interval is that of their number, since repeats of a question are alike;
    `accuracy_std` says how much the accuracy differs from repeat to repeat.
    """
    right = sum(record["correct"] for record in records)
    repeats = 1 + max(record.get("repeat", 0) for record in records)
    repeated = {}
    if repeats > 1:
        shares = [[record["correct"] for record in records if record["repeat"] == one] for one in range(repeats)]
        repeated = {"repeats": repeats, "accuracy_std": stdev(mean(share) for share in shares)}
    low, high = wilson_interval(right / repeats, len(records) // repeats)
    return {
        "rows": len(records) // repeats,
        **repeated,
        "correct": right,
        "accuracy": right / len(records),
        "accuracy_low": low,
        "accuracy_high": high,
        "answer_tokens": mean(record["num_tokens"] for record in records),
        "latent_blocks": mean(record["num_latent_blocks"] for record in records),
        "latents": mean(record["num_latents"] for record in records),
        "rows_with_latents": sum(record["num_latents"] > 0 for record in records),
        # Results of an earlier version do not say: there such a row ended the evaluation.
        "not_swapped": sum(record.get("not_swapped", False) for record in records),
        "stop_reasons": dict(sorted(Counter(record["stop_reason"] for record in records).items())),
        "seconds": mean(record["seconds"] for record in records),
        "median_seconds": median(record["seconds"] for record in records),
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


def draw_table(summary: dict) -> str:
    """The summary as text: families, tasks where they are others, and all."""
    groups = dict(summary["families"])
    groups |= {f"  {name}": numbers for name, numbers in summary["tasks"].items() if name not in groups}
    groups["all"] = summary["all"]
    width = max(map(len, groups))
    lines = [f"{'':{width}s}   rows  accuracy   95 % interval   tokens  blocks  latents  s/row  stopped by"]
    for name, numbers in groups.items():
        low, high = 100 * numbers["accuracy_low"], 100 * numbers["accuracy_high"]
        reasons = ", ".join(f"{reason} {count}" for reason, count in numbers["stop_reasons"].items())
        lines.append(
            f"{name:{width}s} {numbers['rows']:6d}  {100 * numbers['accuracy']:6.1f} %  {low:5.1f} - {high:5.1f} %  "
            f"{numbers['answer_tokens']:7.1f}  {numbers['latent_blocks']:6.2f}  {numbers['latents']:7.1f}  "
            f"{numbers['seconds']:5.2f}  {reasons}"
        )
    if "repeats" in summary["all"]:
        lines.append(
            f"Every question was asked {summary['all']['repeats']} times; the accuracy differs from time to time by "
            f"{100 * summary['all']['accuracy_std']:.1f} % (standard deviation)."
        )
    if kept := summary["all"].get("not_swapped", 0):
        lines.append(
            f"{kept} rows were not swapped: they kept their own latents, as no other row of their batch has another picture "
            "and takes latents."
        )
    return "\n".join(lines)
