"""Measure everything side by side with its stock counterpart: one command, one process, one table.

    python -m benchmarks.run --suite cpu                            (half an hour and more on one core)
    python -m benchmarks.run --suite cpu --quick --only text_tokens latent_blocks
    python -m benchmarks.run --suite gpu --output out/benchmarks    (7B shapes in bfloat16, random weights made on the device)

Writes `SUITE.json`, `SUITE.md` and `SUITE.png` after every subject. Off a GPU only ratios mean anything.
"""

import sys
from pathlib import Path

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
    # Imported here: they take seconds, which `--help` and a wrong option need not wait for.
    import torch

    from benchmarks.measuring import Setting
    from benchmarks.suites import SIZES, run_suite

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
