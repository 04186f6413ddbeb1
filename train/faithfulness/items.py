"""The questions of a report: what `train/reasoning_data.py` reads, with the regions and pictures that the data bring."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from train.reasoning_data import ReasoningSample, adapt, read_rows


Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the first image


class NotApplicable(Exception):
    """A diagnostic, or an arm of one, that makes no sense here; the message says why and goes into the report."""


@dataclass
class Item:
    sample: ReasoningSample
    boxes: list[Box] = field(default_factory=list)  # what has to be looked at
    assistant_images: list[str] = field(default_factory=list)  # pictures looked at on the way, in order
    task: str = ""  # as the data name it; items of one task are compared with each other

    @property
    def answer(self) -> str:
        return self.sample.answer

    def image_digest(self) -> str:
        """Of all images together."""
        return hashlib.sha256("".join(self.image_digests()).encode()).hexdigest()

    def image_digests(self) -> list[str]:
        """Of every image by itself, in order."""
        images = self.sample.load_images()
        return [hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest() for image in images]


def read_items(path: str | Path, data_format: str, split: str, limit: int | None) -> list[Item]:
    """The first `limit` questions that have an image.

    Raises:
        ValueError: a row that cannot be used, one that names a picture of the assistant that is not there, or fewer than 4
            questions with an image.
    """
    path, items = Path(path), []
    for origin, row in read_rows(path, split):
        sample = adapt(row, data_format, path.parent, origin, needs_steps=False)
        if not sample.images:
            continue
        boxes = [tuple(box) for box in row.get("boxes") or []]
        pictures = [str(path.parent / name) for name in row.get("assistant_images") or [] if isinstance(name, str)]
        missing = [name for name in pictures if not Path(name).is_file()]
        if missing:
            raise ValueError(f"{origin}: `assistant_images` must name files that are there, but {missing[0]} is not.")
        items.append(Item(sample, boxes, pictures, str(row.get("task") or "")))
        if limit is not None and len(items) == limit:
            break
    if len(items) < 4:
        raise ValueError(f"The report needs 4 questions with an image or more; {path} gives {len(items)}.")
    return items
