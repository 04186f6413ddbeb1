"""What `make demo` runs: the checkpoints that ship answer questions about pictures that they have never seen.

    python -m examples.demo --n 20 --seed 1

In turn the color of one shape among many is asked for, and which piece of a puzzle belongs where. Where the latents of an answer looked is
drawn to out/demo. Then those that were trained on serial questions are asked for the tile that is 1, 2, 3, 4 hops after another; what is
drawn of it is the tile that every latent is about.
"""

import sys
from pathlib import Path
from textwrap import shorten

from transformers.utils import logging

from conversion.commands import CommandParser, exit_on_error
from evaluation.answering import Answer
from examples.chase import MOST, chase_all, draw_question, load_serial, serial_names
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
from train.recipes.shipping import CHECKPOINTS, SERIAL


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
        right += tell(name, sample, answer)
        if trace.row(row):
            path = output / f"{name}-{row + 1}.png"
            draw_trace(trace, [sample.image], path, row=row)
            print(f"  Trace:    {path}")
    return right


def tell(name: str, sample: Sample, answer: Answer) -> bool:
    """Print a question and its answer; return whether it is right."""
    is_this = is_right(answer.text, sample.answer)
    verdict = "right" if is_this else f"wrong, it is {sample.answer}"
    print(f"  Question: {sample.question}")
    print(f"  Answer:   {shorten(told(answer.text), 60)} ({verdict}; {count_latents(name, answer)})")
    return is_this


def show_chase(name: str, folder: Path, samples: list[Sample], output: Path) -> int:
    """As `show`, of a checkpoint of serial questions: the way of its latents is drawn hop by hop."""
    model, processor = load_serial(name, folder)
    print(f"\n{SERIAL}/{name}")
    right = 0
    for number, chase in enumerate(chase_all(model, processor, samples), 1):
        right += tell(name, chase.sample, chase.answer)
        if chase.stops:
            path = output / f"{name}-chase-{number}.png"
            chase.draw().save(path)
            print(f"  Trace:    {path}")
    return right


def judge(right: dict[str, int], count: int, chance: int) -> str:
    """What is wrong where fewer answers are right than should be, of `count` to each checkpoint; "" where all is well."""
    total = count * len(right)
    if sum(right.values()) >= LEAST_RIGHT * total:
        return ""
    return f"Only {sum(right.values())} of {total} are right: something is wrong here. Chance is about 1 in {chance}."


def build_parser() -> CommandParser:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=6, help="questions to each checkpoint")
    parser.add_argument(
        "--chases", type=int, default=MOST, help="serial questions to each checkpoint that knows those"
    )
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the pictures")
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="folder of the checkpoints that ship")
    parser.add_argument("--output", type=Path, default=Path("out/demo"), help="folder for the drawings")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    for option in ("n", "chases"):
        if getattr(args, option) < 1:
            raise ValueError(f"`--{option}` must be >= 1, got {getattr(args, option)}.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kinds = list(KINDS)
    samples = [draw_sample(kinds[at % len(kinds)], args.seed, at // len(kinds)) for at in range(args.n)]
    args.output.mkdir(parents=True, exist_ok=True)
    for old in args.output.glob("*-*.png"):
        old.unlink()  # a trace of an earlier run would pass for one of this
    check_checkpoints(args.checkpoints)
    right = {name: show(name, args.checkpoints, samples, args.output) for name in NAMES}
    serial = [draw_question(1 + at % MOST, args.seed, at // MOST) for at in range(args.chases)]
    chased = {name: show_chase(name, args.checkpoints, serial, args.output) for name in serial_names(args.checkpoints)}
    lines = [f"{name}: {count} of {args.n} right" for name, count in right.items()]
    lines += [f"{SERIAL}/{name}: {count} of {args.chases} right" for name, count in chased.items()]
    print("\n" + "\n".join(lines))
    faults = [fault for fault in (judge(right, args.n, 6), judge(chased, args.chases, 8)) if fault]
    if faults:
        print("\n".join(faults))
        sys.exit(1)


if __name__ == "__main__":
    with exit_on_error():
        main()
