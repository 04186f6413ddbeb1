"""Questions with an image, reasoning steps and an answer: reading, adapting and checking them.

A line of a JSONL file (`train.data.tasks` writes such files), or a row of a `datasets` dataset, becomes one sample:

| `--data_format` | image             | question                          | steps                                   | answer                |
|-----------------|-------------------|-----------------------------------|-----------------------------------------|-----------------------|
| `steps`         | `image`           | `question`                        | `rationale`, a list (or a text: split)  | `answer`              |
| `m3cot`         | `image`           | `context`, `question`, `choices`  | `rationale`, split into sentences       | `answer`, a letter    |
| `scienceqa`     | `image`           | `hint`, `question`, `choices`     | `lecture` and `solution`, split         | `answer`, an index    |

`image` is a path relative to the file, a PIL image, a list of either, or null for a question without one. Other fields are
left alone.
"""

import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from conversion.reading import is_file, read_json_lines
from processing_latentvlm.pictures import UNREADABLE, open_picture, read_size


@dataclass
class ReasoningSample:
    """One question. `origin` says where it stands, for messages."""

    images: list[str | Image.Image]
    question: str
    steps: list[str]
    answer: str
    origin: str

    def load_images(self) -> list[Image.Image]:
        """Decode the images.

        Raises:
            ValueError: one cannot be read.
        """
        return [self.load_image(image) for image in self.images]

    def load_image(self, image: str | bytes | Image.Image) -> Image.Image:
        return open_picture(image, self.name_of(image))

    def image_sizes(self) -> list[tuple[int, int]]:
        """(width, height) of the images in pixels, without decoding them.

        Raises:
            ValueError: one cannot be read.
        """
        return [self.read_size(image) for image in self.images]

    def read_size(self, image: str | Image.Image) -> tuple[int, int]:
        return read_size(image, self.name_of(image))

    def name_of(self, image: str | bytes | Image.Image) -> str:
        return f"{self.origin}: the image {image if isinstance(image, str) else 'in it'}"


def split_steps(text: str) -> list[str]:
    """Cut a rationale into lines, or a single line into sentences."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1:
        return lines
    return [part for line in lines for part in re.split(r"(?<=[.!?])\s+(?=[A-Z0-9(\"'])", line)]


def list_choices(choices: Iterable[Any]) -> str:
    return "\n".join(f"({chr(ord('A') + number)}) {choice}" for number, choice in enumerate(choices))


def join_texts(*parts: Any) -> str:
    return "\n".join(str(part).strip() for part in parts if part)


def instruct(samples: list[ReasoningSample], instruction: str | None) -> list[ReasoningSample]:
    """The samples with a text below every question, as `evaluation.evaluate --instruction` asks."""
    return [replace(sample, question=join_texts(sample.question, instruction)) for sample in samples]


def rationale_of(row: dict) -> list:
    rationale = row.get("rationale") or []
    return split_steps(rationale) if isinstance(rationale, str) else rationale


def from_steps(row: dict) -> tuple:
    return row.get("image"), row.get("question"), rationale_of(row), row.get("answer")


def from_m3cot(row: dict) -> tuple:
    question = join_texts(row.get("context"), row.get("question"), list_choices(row.get("choices") or []))
    return row.get("image"), question, rationale_of(row), row.get("answer")


def from_scienceqa(row: dict) -> tuple:
    choices, answer = row.get("choices") or [], row.get("answer")
    if isinstance(answer, int) and 0 <= answer < len(choices):
        answer = chr(ord("A") + answer)
    question = join_texts(row.get("hint"), row.get("question"), list_choices(choices))
    steps = [*split_steps(row.get("lecture") or ""), *split_steps(row.get("solution") or "")]
    return row.get("image"), question, steps, answer


FIELD_KINDS = {
    "context": str,
    "hint": str,
    "lecture": str,
    "solution": str,
    "choices": list,
    "rationale": (str, list),
}
ADAPTERS: dict[str, Callable[[dict], tuple]] = {
    "steps": from_steps,
    "m3cot": from_m3cot,
    "scienceqa": from_scienceqa,
}


class IncompleteRow(ValueError):
    """A row without steps or answer."""


def adapt(row: dict, data_format: str, folder: Path, origin: str, needs_steps: bool = True) -> ReasoningSample:
    """Make a sample of a row.

    Raises:
        IncompleteRow: it has no steps or no answer.
        ValueError: a field is missing or of the wrong kind, or an image file does not exist.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{origin} must be an object, got {type(row).__name__}.")
    for name, kind in FIELD_KINDS.items():
        if row.get(name) is not None and not isinstance(row[name], kind):
            raise ValueError(f"{origin}: `{name}` is of the wrong kind, got {row[name]!r}.")
    image, question, steps, answer = ADAPTERS[data_format](row)
    for name, value, error in (("question", question, ValueError), ("answer", answer, IncompleteRow)):
        if not isinstance(value, str) or not value.strip():
            raise error(f"{origin}: `{name}` must be a text that is not empty, got {value!r}.")
    steps = steps or []
    if (needs_steps and not steps) or not all(isinstance(one, str) and one.strip() for one in steps):
        raise IncompleteRow(f"{origin}: the rationale must give one or more steps, all of them text, got {steps!r}.")
    images = [] if image is None else image if isinstance(image, list) else [image]
    found = []
    for one in images:
        if isinstance(one, str):
            one = str(folder / one)
            if not is_file(one):
                raise ValueError(f"{origin}: the image {one[:500]} does not exist.")
        elif not isinstance(one, Image.Image):
            raise ValueError(f"{origin}: `image` must be a path or a PIL image, got {type(one).__name__}.")
        found.append(one)
    return ReasoningSample(found, question, steps, answer, origin)


class DatasetRows:
    """The rows of a parquet file, or of a folder that `datasets` wrote, each decoded when it is asked for."""

    def __init__(self, path: Path, split: str):
        from datasets import DatasetDict, load_dataset, load_from_disk

        if path.is_dir():
            data = load_from_disk(str(path))
        else:
            data = load_dataset("parquet", data_files=str(path), split="train")
        if isinstance(data, DatasetDict):
            if split not in data:
                raise ValueError(f"{path} has no split {split!r}; it has {sorted(data)}.")
            data = data[split]
        self.path, self.data = path, data

    @staticmethod
    def can_read(path: Path) -> bool:
        return os.path.isdir(path) or path.suffix == ".parquet"

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> tuple[str, Any]:
        if number >= len(self):
            raise IndexError(number)
        try:
            return f"Row {number} of {self.path}", self.data[number]  # decodes its images
        except UNREADABLE as error:
            raise ValueError(f"Row {number} of {self.path} holds an image that cannot be read: {error}") from error


def read_rows(path: Path, split: str) -> Iterable[tuple[str, Any]]:
    """(where it stands, row) of a JSONL file, a parquet file, or a folder that `datasets` wrote."""
    if DatasetRows.can_read(path):
        yield from DatasetRows(path, split)
        return
    yield from read_json_lines(path)


def read_reasoning(
    path: str | Path,
    data_format: str = "steps",
    split: str = "train",
    drop_incomplete: bool = False,
    check_images: bool = True,
    needs_steps: bool = True,
) -> list[ReasoningSample]:
    """Read and check a whole data set before any work is done with it.

    Args:
        drop_incomplete: leave out rows without steps or answer, and say how many; else they are errors.
        check_images: decode every image once, also one that several rows name.
        needs_steps: a row without a rationale cannot be used; reinforcement learning asks for none.

    Raises:
        ValueError: a row that cannot be used; the message names it.
    """
    if data_format not in ADAPTERS:
        raise ValueError(f"`data_format` must be one of {sorted(ADAPTERS)}, got {data_format!r}.")
    path, samples, dropped = Path(path), [], []
    for origin, row in read_rows(path, split):
        try:
            samples.append(adapt(row, data_format, path.parent, origin, needs_steps))
        except IncompleteRow:
            if not drop_incomplete:
                raise
            dropped.append(origin)
    if dropped:
        print(f"{len(dropped)} rows of {path} were left out as incomplete, the first: {dropped[0]}.")
    if not samples:
        raise ValueError(f"{path} holds no sample.")
    if check_images:
        images = {
            image if isinstance(image, str) else id(image): (sample, image)
            for sample in samples
            for image in sample.images
        }
        with ThreadPoolExecutor() as pool:
            checks = pool.map(lambda one: one[0].load_image(one[1]), images.values())
            for _ in tqdm(checks, total=len(images), desc="checking images", leave=False):
                pass
    return samples


def merge_steps(steps: list[str], count: int) -> list[str]:
    """Merge neighbours evenly until there are at most `count` steps."""
    if len(steps) <= count:
        return steps
    bounds = [number * len(steps) // count for number in range(count + 1)]
    return [" ".join(steps[start:end]) for start, end in zip(bounds, bounds[1:])]
