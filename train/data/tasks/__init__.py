"""Procedural questions about pictures, with a rationale and the pictures looked at on the way to the answer.

    python -m train.data.tasks --task all --n 1000 --seed 0 --split train --output data/tasks

writes `data.jsonl` and `images/`; `generate_sample` makes one sample in memory. A task is a function from a `Request`
to a `Sample`. To add one, write the function and name it in `TASKS` and in `families.py`: seeds, splits, files and the
command line follow. `python -m train.data.tasks.balance` measures what is known without looking.
"""

import json
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from conversion.writing import recover_folder, replaced_folder
from train.data.tasks.arrows import ARROWS
from train.data.tasks.chart import ask_compare, ask_largest, ask_value
from train.data.tasks.families import FAMILIES, LEVELS, SEARCH, SERIAL, SYNTHESIS, family_of, tasks_of
from train.data.tasks.hops import HOPS
from train.data.tasks.jigsaw import ask_jigsaw
from train.data.tasks.maze import ask_goal, ask_length, ask_move
from train.data.tasks.photos import PHOTOS
from train.data.tasks.relation import ask_beside, ask_side
from train.data.tasks.sample import PATCH_MULTIPLE, Request, Sample, SerialAnswer, Step, continue_from, join_pictures
from train.data.tasks.search import (
    ask_search_color,
    ask_search_count,
    ask_search_position,
    ask_search_text,
    describe_large_scene,
)
from train.data.tasks.serial import QUESTIONS, SerialTask
from train.data.tasks.shapes import ask_color, ask_count, ask_digit, ask_position, describe_scene
from train.data.tasks.trace import TRACE


__all__ = [
    "FAMILIES",
    "LEVELS",
    "MIN_IMAGE_SIZE",
    "PICTURES",
    "QUESTIONS",
    "SEARCH",
    "SERIAL",
    "SPLITS",
    "SYNTHESIS",
    "TASKS",
    "Request",
    "Sample",
    "SerialAnswer",
    "Step",
    "continue_from",
    "family_of",
    "generate_questions",
    "generate_sample",
    "tasks_of",
    "write_dataset",
]

TASKS: dict[str, Callable[[Request], Sample]] = {
    "color": ask_color,
    "digit": ask_digit,
    "count": ask_count,
    "position": ask_position,
    "search_color": ask_search_color,
    "search_count": ask_search_count,
    "search_position": ask_search_position,
    "search_text": ask_search_text,
    "jigsaw": ask_jigsaw,
    "maze_goal": ask_goal,
    "maze_move": ask_move,
    "maze_length": ask_length,
    "chart_value": ask_value,
    "chart_largest": ask_largest,
    "chart_compare": ask_compare,
    "relation_color": ask_beside,
    "relation_side": ask_side,
    "hops": HOPS,
    "arrows": ARROWS,
    "trace": TRACE,
}
PRETRAINING = {  # no part of "all"
    "describe": describe_scene,
    "describe_search": describe_large_scene,
}
ALL = "all"
SPLITS = tuple(PHOTOS)
PICTURES = ("steps", "joined")  # in the answers; see `write_dataset`
MIN_IMAGE_SIZE = 112  # pixels; below it the digits are no longer legible


def generate_sample(
    task: str, seed: int, index: int, split: str = "train", image_size: int = 224, level: str = "easy"
) -> Sample:
    """Return sample `index` of a task. The same arguments give the same sample.

    "all", the name of a family, or several names deal tasks in turn; the samples of each are those that it has alone.

    Args:
        image_size: side of the picture in pixels, a multiple of 28.
        level: "easy", for models of a few million weights, or "hard", which not every family has.

    Raises:
        ValueError: unknown task, split or level, a level that the task does not have, negative index, image size too
            small (for the level, too) or no multiple of 28.
    """
    return generate_questions(task, seed, index, split, image_size, level)[0]


def generate_questions(
    task: str,
    seed: int,
    index: int,
    split: str = "train",
    image_size: int = 224,
    level: str = "easy",
    questions: str = "one",
) -> list[Sample]:
    """Return samples that ask different questions about one picture, that of `generate_sample`.

    Args:
        questions: "one" is the question of `generate_sample`. Serial tasks can ask more: "steps" is one question for
            every number of moves from the same start, "all" is one for every number of moves from every start.

    Raises:
        ValueError: as for `generate_sample`; also unknown `questions`, or more than one of a task that is not serial.
    """
    _validate(task, split, image_size, level, questions)
    if index < 0:
        raise ValueError(f"`index` must be >= 0, got {index}.")
    dealt = tasks_of(task, level)
    rounds, turn = divmod(index, len(dealt))
    name = dealt[turn]
    index = rounds * dealt.count(name) + dealt[:turn].count(name)
    request, ask = Request(name, split, seed, index, image_size, level), (TASKS | PRETRAINING)[name]
    return [ask(request)] if questions == "one" else ask.questions(request, every_start=questions == "all")


def write_dataset(
    task: str,
    n: int,
    seed: int,
    output: str | Path,
    split: str = "train",
    image_size: int = 224,
    level: str = "easy",
    force: bool = False,
    progress: bool = False,
    questions: str = "one",
    pictures: str = "steps",
) -> Path:
    """Write samples 0 to `n - 1` as `output/data.jsonl` and `output/images/*.png`; return the path of the first.

    With more than one of the `questions` about a picture (see `generate_questions`) these are pictures 0 to `n - 1`, with
    one row for each question. A picture is saved once.

    The folder appears, or takes the place of the one that was there, when everything is written, and never before.

    Args:
        pictures: "steps" leaves every step its picture, "joined" makes one picture of them (`join_pictures`).
        force: write into a folder that is not empty. Files of the same names are replaced, others stay.

    Raises:
        ValueError: as for `generate_sample`; also when `n < 1`, or `output` is a file or, without `force`, not empty, or
            another process writes it.
    """
    _validate(task, split, image_size, level, questions)
    if pictures not in PICTURES:
        raise ValueError(f"`pictures` must be one of {', '.join(PICTURES)}; got {pictures!r}.")
    if n < 1:
        raise ValueError(f"`n` must be >= 1, got {n}.")
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"`output` must be a folder, but {output} is a file.")
    recover_folder(output)
    if output.exists() and any(output.iterdir()) and not force:
        raise ValueError(f"`output` must be empty or new, but {output} is not empty. Pass `force` to write into it.")
    # What a task itself refuses, a size too small for its level, is known before anything is written.
    for index in range(min(n, len(tasks_of(task, level)))):
        generate_sample(task, seed, index, split, image_size, level)
    with replaced_folder(output, keeps_others=True) as folder:
        (folder / "images").mkdir()
        with (folder / "data.jsonl").open("w", encoding="utf-8") as lines:
            for index in tqdm(range(n), desc=f"{task} {split}", unit="sample", disable=not progress):
                for sample in generate_questions(task, seed, index, split, image_size, level, questions):
                    sample = join_pictures(sample) if pictures == "joined" else sample
                    lines.write(json.dumps(_save(sample, folder)) + "\n")
    return output / "data.jsonl"


def _save(sample: Sample, output: Path) -> dict:
    record = sample.record()
    paths = [record["image"], *record["assistant_images"]]
    for path, image in zip(paths, [sample.image, *sample.assistant_images], strict=True):
        if not (output / path).exists():  # the folder is new: another question about the same picture has written it
            image.save(output / path)
    return record


def check_task(task: str) -> None:
    """Raise a ValueError unless `task` names tasks or families, with commas and shares or without."""
    known = (ALL, *FAMILIES, *TASKS, *PRETRAINING)
    known = tuple(dict.fromkeys(known))  # a family with one task may have its name
    named = [one.strip().partition(":") for one in task.split(",")]
    if any(name not in known for name, _, _ in named):
        raise ValueError(f"`task` must be one of {', '.join(known)}, or several with commas; got {task!r}.")
    if any(colon and not (share.isdecimal() and int(share)) for _, colon, share in named):
        raise ValueError(f"A task's share, as in `search_color:4,jigsaw`, must be a number above 0; got {task!r}.")


def _validate(task: str, split: str, image_size: int, level: str, questions: str = "one") -> None:
    check_task(task)
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}; got {split!r}.")
    if level not in LEVELS:
        raise ValueError(f"`level` must be one of {', '.join(LEVELS)}; got {level!r}.")
    for name in (one.strip().partition(":")[0] for one in task.split(",")):
        if not tasks_of(name, level):
            raise ValueError(f"`level` must be easy for task {name}, which has no other; got {level!r}.")
    if questions not in QUESTIONS:
        raise ValueError(f"`questions` must be one of {', '.join(QUESTIONS)}; got {questions!r}.")
    others = [name for name in tasks_of(task, level) if not isinstance(TASKS.get(name), SerialTask)]
    if questions != "one" and others:
        raise ValueError(
            f"`questions` must be one for task {others[0]}, which asks one question about a picture; got {questions!r}."
        )
    if image_size < MIN_IMAGE_SIZE or image_size % PATCH_MULTIPLE:
        raise ValueError(
            f"`image_size` must be a multiple of {PATCH_MULTIPLE} and at least {MIN_IMAGE_SIZE} pixels, "
            f"got {image_size}."
        )
