"""Procedural questions about pictures, with a rationale and the pictures looked at on the way to the answer.

    python -m train.tasks --task all --n 1000 --seed 0 --split train --output data/tasks

writes `data.jsonl` and `images/`; `generate_sample` makes one sample in memory. A task is a function from a `Request`
to a `Sample`. To add one, write the function and name it in `TASKS`: seeds, splits, files and the command line follow.
"""

import json
from pathlib import Path

from tqdm import tqdm

from train.tasks.photos import PHOTOS
from train.tasks.sample import PATCH_MULTIPLE, Request, Sample, Step
from train.tasks.shapes import ask_color, ask_count, ask_digit, ask_position, describe_scene


__all__ = ["MIN_IMAGE_SIZE", "SPLITS", "TASKS", "Request", "Sample", "Step", "generate_sample", "write_dataset"]

TASKS = {"color": ask_color, "digit": ask_digit, "count": ask_count, "position": ask_position}
PRETRAINING = {"describe": describe_scene}  # no part of "all"
ALL = "all"
SPLITS = tuple(PHOTOS)
MIN_IMAGE_SIZE = 112  # pixels; below it the digits are no longer legible


def generate_sample(task: str, seed: int, index: int, split: str = "train", image_size: int = 224) -> Sample:
    """Return sample `index` of a task. The same arguments give the same sample.

    `"all"` deals the tasks in turn: its sample `index` is sample `index // len(TASKS)` of one of them.

    Args:
        image_size: side of the picture in pixels, a multiple of 28.

    Raises:
        ValueError: unknown task or split, negative index, image size too small or no multiple of 28.
    """
    _validate(task, split, image_size)
    if index < 0:
        raise ValueError(f"`index` must be >= 0, got {index}.")
    if task == ALL:
        index, turn = divmod(index, len(TASKS))
        task = tuple(TASKS)[turn]
    return (TASKS | PRETRAINING)[task](Request(task, split, seed, index, image_size))


def write_dataset(
    task: str,
    n: int,
    seed: int,
    output: str | Path,
    split: str = "train",
    image_size: int = 224,
    force: bool = False,
    progress: bool = False,
) -> Path:
    """Write samples 0 to `n - 1` as `output/data.jsonl` and `output/images/*.png`; return the path of the first.

    `data.jsonl` appears under its name when everything is written, never before.

    Args:
        force: write into a folder that is not empty. Its `data.jsonl` is replaced, other files stay.

    Raises:
        ValueError: as for `generate_sample`; also when `n < 1`, or `output` is a file or, without `force`, not empty.
    """
    _validate(task, split, image_size)
    if n < 1:
        raise ValueError(f"`n` must be >= 1, got {n}.")
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"`output` must be a folder, but {output} is a file.")
    if output.exists() and any(output.iterdir()) and not force:
        raise ValueError(f"`output` must be empty or new, but {output} is not empty. Pass `force` to write into it.")
    (output / "images").mkdir(parents=True, exist_ok=True)
    data, unfinished = output / "data.jsonl", output / "data.jsonl.unfinished"
    data.unlink(missing_ok=True)  # it would name images that are about to change
    try:
        with unfinished.open("w", encoding="utf-8") as lines:
            for index in tqdm(range(n), desc=f"{task} {split}", unit="sample", disable=not progress):
                lines.write(json.dumps(_save(generate_sample(task, seed, index, split, image_size), output)) + "\n")
        unfinished.rename(data)
    finally:
        unfinished.unlink(missing_ok=True)
    return data


def _save(sample: Sample, output: Path) -> dict:
    record = sample.record()
    sample.image.save(output / record["image"])
    for path, image in zip(record["assistant_images"], sample.assistant_images):
        image.save(output / path)
    return record


def _validate(task: str, split: str, image_size: int) -> None:
    if task not in (*TASKS, *PRETRAINING, ALL):
        raise ValueError(f"`task` must be one of {', '.join((*TASKS, *PRETRAINING, ALL))}; got {task!r}.")
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}; got {split!r}.")
    if image_size < MIN_IMAGE_SIZE or image_size % PATCH_MULTIPLE:
        raise ValueError(
            f"`image_size` must be a multiple of {PATCH_MULTIPLE} and at least {MIN_IMAGE_SIZE} pixels, "
            f"got {image_size}."
        )
