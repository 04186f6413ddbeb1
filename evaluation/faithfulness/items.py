"""The questions of a report: what `train/data/reasoning_data.py` reads, with the regions and pictures that the data bring."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from dataclasses import fields as fields_of_class
from functools import cached_property
from pathlib import Path

from evaluation.donors import Candidate, digest_images
from evaluation.rows import EvaluationRow, build_row, fields_of
from evaluation.scoring import truth_form
from train.data.reasoning_data import ReasoningSample, adapt, read_rows
from train.data.tasks.sample import SerialAnswer


NO_ID = "-"
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the first image


class NotApplicable(Exception):
    """A diagnostic, or an arm of one, that makes no sense here; the message says why and goes into the report."""


@dataclass
class Item:
    """One question.

    Attributes:
        row: how its answers are read and compared, as in `evaluation.evaluate`; without one the answer is a text of the task "all".
        serial: what the data say of the way to its answer (`train/data/tasks/sample.py`, `SerialAnswer`).
    """

    sample: ReasoningSample
    boxes: list[Box] = field(default_factory=list)  # what has to be looked at
    assistant_images: list[str] = field(default_factory=list)  # pictures looked at on the way, in order
    row: EvaluationRow | None = None
    serial: dict | None = None

    def __post_init__(self):
        if self.row is None:
            self.row = scored_row({"task": "all"}, self.sample, "steps", Path())

    @property
    def answer(self) -> str:
        return self.sample.answer

    @property
    def task(self) -> str:
        return self.row.task

    @property
    def name(self) -> str:
        """The id that the data give, or else where the question stands."""
        return self.row.id if self.row.id != NO_ID else self.sample.origin

    @property
    def identity(self) -> str:
        """What the question is, wherever it stands in a file: what is drawn for it follows from this."""
        return self.candidate.identity

    @cached_property
    def candidate(self) -> Candidate:
        """The question as the choice of donors sees it."""
        pictures = frozenset(self.image_digests())
        return Candidate(self.row.id, self.task, self.sample.question, truth_form(self.row), pictures)

    def image_digest(self) -> str:
        """Of all images together."""
        return hashlib.sha256("".join(self.image_digests()).encode()).hexdigest()

    def image_digests(self) -> list[str]:
        """Of every image by itself, in order."""
        return digest_images(self.sample)


def in_order(items: Iterable[Item]) -> list[Item]:
    """Items in an order that follows from what they are: folds of probes, sums, and what is taken first then do not depend on the
    order of a file."""
    return sorted(items, key=lambda item: item.identity)


def scored_row(row: dict, sample: ReasoningSample, data_format: str, path: Path) -> EvaluationRow:
    """A row of the data as `evaluation.evaluate` reads it: which answers it allows, and when one is right.

    Raises:
        ValueError: its answer is none of its choices, or no number where one is asked for.
    """
    fields = fields_of(row, path, sample.origin)
    if data_format != "steps":
        fields["is_lettered"] = bool(fields["choices"])  # they stand in the question
    given = fields["id"]
    fields |= {
        "id": str(given) if isinstance(given, str | int) and str(given).strip() else NO_ID,
        "question": sample.question,
        "answer": sample.answer,
        "above": [],
        "images": [],
    }
    return build_row(fields, path, sample.origin, None, None)


def read_serial(row: dict, origin: str) -> dict | None:
    """What a row says of the way to its answer; None where it says nothing.

    Raises:
        ValueError: it does not say it as `SerialAnswer` does, or the way does not lead to the answer.
    """
    serial = row.get("serial")
    if serial is None:
        return None
    wanted = {one.name for one in fields_of_class(SerialAnswer)}
    if not isinstance(serial, dict) or set(serial) != wanted:
        got = sorted(serial) if isinstance(serial, dict) else type(serial).__name__
        raise ValueError(f"{origin}: `serial` must hold {sorted(wanted)}, got {got}.")
    way, need = serial["way"], serial["num_steps"]
    if not isinstance(need, int) or not 1 <= need < len(way) or not set(way) <= set(serial["contents"]):
        raise ValueError(
            f"{origin}: `serial` must have a `num_steps` from 1 to the moves of its `way`, whose states all are in `contents`; got "
            f"{need!r} and a way of {len(way) - 1} moves."
        )
    if serial["contents"][way[need]] != row.get("answer"):
        raise ValueError(
            f"{origin}: `serial` must lead to the answer {row.get('answer')!r}, but after {need} moves there is "
            f"{serial['contents'][way[need]]!r}."
        )
    return serial


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
        serial = read_serial(row, origin)
        items.append(Item(sample, boxes, pictures, scored_row(row, sample, data_format, path), serial))
        if limit is not None and len(items) == limit:
            break
    if len(items) < 4:
        raise ValueError(f"The report needs 4 questions with an image or more; {path} gives {len(items)}.")
    return items
