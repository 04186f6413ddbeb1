"""Measure everything side by side with its stock counterpart: one command, one process, one table.

    python -m benchmarks.run --suite cpu                            (half an hour and more on one core)
    python -m benchmarks.run --suite cpu --quick --only text_tokens latent_blocks
    python -m benchmarks.run --suite gpu --output out/benchmarks    (7B shapes in bfloat16, random weights made on the device)

Writes `SUITE.json`, `SUITE.md` and `SUITE.png` after every subject. Off a GPU only ratios mean anything.
"""

import gc
import importlib
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.measuring import Setting, describe_machine, free_memory
from benchmarks.models import Shape, deeplatent, weight_bytes
from benchmarks.report import Row, to_markdown, write_report
from benchmarks.sizes import CPU, CPU_QUICK, GPU, GPU_QUICK, Sizes
from conversion.commands import CommandParser, exit_on_error


SUBJECTS = (
    "text_tokens",
    "device_reads",
    "latent_blocks",
    "latent_steps",
    "latent_memory",
    "training_steps",
    "scaling",
)
SUITES = {"cpu": SUBJECTS, "gpu": (*SUBJECTS, "paper_numbers")}
SIZES = {("cpu", False): CPU, ("cpu", True): CPU_QUICK, ("gpu", False): GPU, ("gpu", True): GPU_QUICK}


def gibibytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def weights_of(shape: Shape, setting: Setting) -> int:
    """Bytes of the largest model at this shape, without making it."""
    return weight_bytes(deeplatent(shape, replace(setting, device="meta")).ours)


def measure_subject(subject: str, sizes: Sizes, setting: Setting) -> list[Row]:
    """The rows of one subject; one that does not fit into memory is a row that says so."""
    needed, free = weights_of(sizes.shape, setting), free_memory(setting.device)
    # Training knows its own, smaller shape.
    if needed > free and subject != "training_steps":
        return [
            Row(subject, "all", None, "", note=f"the weights need {gibibytes(needed)}, {gibibytes(free)} are free")
        ]
    try:
        return importlib.import_module(f"benchmarks.{subject}").measure(sizes, setting)
    except torch.OutOfMemoryError:
        return [Row(subject, "all", None, "", note=f"out of memory; {gibibytes(free)} were free")]
    finally:
        gc.collect()
        if setting.device == "cuda":
            torch.cuda.empty_cache()


def run_suite(suite: str, sizes: Sizes, setting: Setting, only: list[str] | None, output: Path) -> list[Row]:
    """All rows. Tests call it for the gpu suite with tiny sizes on a CPU."""
    settings = describe_machine(setting.device)
    settings |= {"dtype": str(setting.dtype).removeprefix("torch."), "repeats": setting.repeats, "seed": 0}
    rows = []
    for subject in SUITES[suite]:
        if only and subject not in only:
            continue
        start = time.perf_counter()
        found = measure_subject(subject, sizes, setting)
        print(f"{subject}, {time.perf_counter() - start:.0f} s\n{to_markdown(found)}", flush=True)
        rows += found
        write_report(output, suite, settings, rows)
    return rows


def build_parser() -> CommandParser:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=SUITES, required=True, help="what is measured, and where")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SUITES["gpu"],
        metavar="NAME",
        help=f"these subjects alone: {', '.join(SUITES['gpu'])}",
    )
    parser.add_argument("--output", type=Path, default=Path("out/benchmarks"), help="folder for tables and plots")
    parser.add_argument("--repeats", type=int, default=7, help="times that each arm is measured")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller sizes")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of the cpu suite; one gives the steadiest times"
    )
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    if args.repeats < 1 or args.threads < 1:
        parser.error(f"--repeats and --threads must be >= 1, got {args.repeats} and {args.threads}")
    if args.suite == "gpu" and not torch.cuda.is_available():
        parser.error("--suite gpu needs a CUDA device, and there is none: use --suite cpu")
    missing = set(args.only or ()) - set(SUITES[args.suite])
    if missing:
        parser.error(f"{sorted(missing)} belong to --suite gpu")
    if args.suite == "cpu":
        torch.set_num_threads(args.threads)
        setting = Setting("cpu", torch.float32, args.repeats)
    else:
        setting = Setting("cuda", torch.bfloat16, args.repeats)
    run_suite(args.suite, SIZES[args.suite, args.quick], setting, args.only, args.output)
    print(f"written to {args.output}", file=sys.stderr)


if __name__ == "__main__":
    with exit_on_error():
        main()
