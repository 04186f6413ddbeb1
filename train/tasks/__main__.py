"""Write a set of procedural questions.

python -m train.tasks --task color --n 1000 --seed 0 --output data/color
"""

import argparse

from train.tasks import MIN_IMAGE_SIZE, SPLITS, TASKS, write_dataset


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.tasks", description="Write procedural questions about pictures: data.jsonl and images/."
    )
    parser.add_argument("--task", required=True, help=f"{', '.join(TASKS)}, or all for an even mix")
    parser.add_argument("--n", type=int, required=True, help="number of samples")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same bytes (default: 0)")
    parser.add_argument("--output", required=True, help="new or empty folder")
    parser.add_argument("--split", default="train", help=f"{', '.join(SPLITS)}: they share no photo (default: train)")
    parser.add_argument(
        "--image-size", type=int, default=224, help=f"pixels, a multiple of 28, >= {MIN_IMAGE_SIZE} (default: 224)"
    )
    parser.add_argument("--force", action="store_true", help="write into a folder that is not empty")
    options = parser.parse_args(arguments)
    try:
        data = write_dataset(**vars(options), progress=True)
    except ValueError as error:
        parser.error(str(error))
    print(f"{options.n} samples in {data}")


if __name__ == "__main__":
    main()
