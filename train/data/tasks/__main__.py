"""Write a set of procedural questions.

python -m train.data.tasks --task color --n 1000 --seed 0 --output data/color
python -m train.data.tasks --task all --n 2000 --split test --output data/test --gallery
python -m train.data.tasks --task hops --n 6000 --questions steps --image-size 112 --output data/hops
"""

from time import process_time

from conversion.commands import CommandParser, exit_on_error
from train.data.tasks import FAMILIES, LEVELS, MIN_IMAGE_SIZE, PICTURES, QUESTIONS, SPLITS, TASKS, write_dataset
from train.data.tasks.gallery import write_gallery


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m train.data.tasks",
        description="Write procedural questions about pictures: data.jsonl and images/.",
    )
    families = f"a family ({', '.join(FAMILIES)}) for an even mix of its tasks, or all; several with commas, and shares: search_color:4,jigsaw"
    parser.add_argument("--task", required=True, help=f"{', '.join(TASKS)}; {families}")
    parser.add_argument("--n", type=int, required=True, help="number of samples (of pictures, with --questions)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same bytes (default: 0)")
    parser.add_argument("--output", required=True, help="new or empty folder")
    parser.add_argument(
        "--split",
        default="train",
        help=f"{', '.join(SPLITS)}: they share no photo, and but for shapes no layout (default: train)",
    )
    parser.add_argument(
        "--image-size", type=int, default=224, help=f"pixels, a multiple of 28, >= {MIN_IMAGE_SIZE} (default: 224)"
    )
    parser.add_argument("--level", default="easy", help=f"{' or '.join(LEVELS)}; shapes is easy only (default: easy)")
    parser.add_argument(
        "--questions",
        default="one",
        help=f"{', '.join(QUESTIONS)}: about each picture of a serial task, one question, one for every number of moves from "
        "its start, or one for every number of moves from every start (default: one)",
    )
    parser.add_argument(
        "--pictures",
        default="steps",
        help=f"{' or '.join(PICTURES)}: every step of an answer has its picture, or they are one, side by side (default: steps)",
    )
    parser.add_argument("--force", action="store_true", help="write into a folder that is not empty")
    parser.add_argument("--gallery", action="store_true", help="also write gallery.html, one page to look at")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = vars(build_parser().parse_args(arguments))
    has_gallery, start = options.pop("gallery"), process_time()
    with exit_on_error():
        data = write_dataset(**options, progress=True)
        n, kind = options["n"], "samples" if options["questions"] == "one" else "pictures"
        print(f"{n} {kind} in {data} ({n / (process_time() - start):.0f} {kind}/s of one core)")
        if has_gallery:
            print(f"Gallery in {write_gallery(data)}")


if __name__ == "__main__":
    main()
