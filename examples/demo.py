"""What `make demo` runs: the checkpoints that ship answer questions about pictures that they have never seen.

    python -m examples.demo --n 20 --seed 1

In turn the color of one shape among many is asked for, and which piece of a puzzle belongs where. Where the latents of an answer looked is drawn to out/demo.
"""

import argparse
import sys
from pathlib import Path
from textwrap import shorten

from transformers.utils import logging

from conversion.commands import exit_on_error
from examples.demo_common import (
    KINDS,
    NAMES,
    answer_with_trace,
    ask_about,
    check_checkpoints,
    count_latents,
    draw_sample,
    is_right,
    load_checkpoint,
    told,
)
from processing_latentvlm import draw_trace
from train.data.tasks import Sample
from train.recipes.shipping import CHECKPOINTS


SEED = 2026  # chosen before any checkpoint was trained
LEAST_RIGHT = 2 / 3  # share of right answers below which the demo fails


def show(name: str, folder: Path, samples: list[Sample], output: Path) -> int:
    """Ask one checkpoint, print its answers, draw its traces; return how many are right."""
    model, processor = load_checkpoint(name, folder)
    answers, trace = answer_with_trace(
        model, processor, [ask_about(sample.image, sample.question) for sample in samples]
    )
    print(f"\n{name}")
    right = 0
    for row, (sample, answer) in enumerate(zip(samples, answers)):
        is_this = is_right(answer.text, sample.answer)
        right += is_this
        verdict = "right" if is_this else f"wrong, it is {sample.answer}"
        print(f"  Question: {sample.question}")
        print(f"  Answer:   {shorten(told(answer.text), 60)} ({verdict}; {count_latents(name, answer)})")
        if trace.row(row):
            path = output / f"{name}-{row + 1}.png"
            draw_trace(trace, [sample.image], path, row=row)
            print(f"  Trace:    {path}")
    return right


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=6, help="questions to each checkpoint")
    parser.add_argument("--seed", type=int, default=SEED, help="of the pictures")
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS)
    parser.add_argument("--output", type=Path, default=Path("out/demo"))
    args = parser.parse_args(arguments)
    if args.n < 1:
        raise ValueError(f"`--n` must be >= 1, got {args.n}.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kinds = list(KINDS)
    samples = [draw_sample(kinds[at % len(kinds)], args.seed, at // len(kinds)) for at in range(args.n)]
    args.output.mkdir(parents=True, exist_ok=True)
    for old in args.output.glob("*-*.png"):
        old.unlink()  # a trace of an earlier run would pass for one of this
    check_checkpoints(args.checkpoints)
    right = {name: show(name, args.checkpoints, samples, args.output) for name in NAMES}
    print("\n" + "\n".join(f"{name}: {count} of {args.n} right" for name, count in right.items()))
    total = args.n * len(NAMES)
    if sum(right.values()) < LEAST_RIGHT * total:
        print(f"Only {sum(right.values())} of {total} are right: something is wrong here. Chance is about 1 in 6.")
        sys.exit(1)


if __name__ == "__main__":
    with exit_on_error():
        main()
