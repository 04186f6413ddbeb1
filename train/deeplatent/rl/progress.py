"""Whether a run of reinforcement learning earned more in the end than in the beginning, and beyond noise.

    python -m train.deeplatent.rl.progress out/deeplatent-rl

Reads the `trainer_state.json` that the run leaves. Every step has its own questions, some harder than others, so the
standard error is that of means over steps.
"""

import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

from conversion.commands import CommandParser, exit_on_error


class Mean(NamedTuple):
    value: float
    error: float  # standard

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


def mean_of(values: list[float]) -> Mean:
    return Mean(statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)))


def first_and_last_quarter(history: list[dict], name: str = "reward") -> tuple[Mean, Mean]:
    """Means of a logged value over the first and the last quarter of the steps that sampled.

    Raises:
        ValueError: there are fewer than eight, too few for an error.
    """
    values = [entry[name] for entry in history if name in entry]
    size = len(values) // 4
    if size < 2:
        raise ValueError(f"At least 8 steps with {name!r} are needed, got {len(values)}.")
    return mean_of(values[:size]), mean_of(values[-size:])


def describe_progress(
    folder: Path, names: tuple[str, ...] = ("reward", "reward_accuracy", "reward_format")
) -> list[str]:
    """One line for each value that the run logged."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    lines = []
    for name in names:
        if any(name in entry for entry in history):
            first, last = first_and_last_quarter(history, name)
            lines.append(f"{name:16s} {first} in the first quarter of the steps, {last} in the last")
    return lines


def build_parser() -> CommandParser:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="`--output` of the training, with its trainer_state.json")
    return parser


def main() -> None:
    print("\n".join(describe_progress(build_parser().parse_args().folder)))


if __name__ == "__main__":
    with exit_on_error():
        main()
