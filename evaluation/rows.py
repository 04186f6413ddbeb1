"""Questions with known answers, from our tasks' JSONL, a simple JSONL, or VLMEvalKit's TSV (`tables.py`).

A line of a JSONL file becomes one row:

| field               | what it is                                                                                         |
|---------------------|----------------------------------------------------------------------------------------------------|
| `id` (or `index`)   | a text or a number, unique in its file                                                             |
| `question`          | a text; `hint` and `context`, where they are given, stand above it                                 |
| `image` or `images` | a path relative to the file, a list of them, or null                                               |
| `answer`            | a text or a number; with `choices` the text of one, its letter, or its index                       |
| `choices`           | optional; where there are no `messages` they are listed below the question, as (A), (B), ...       |
| `answer_format`     | optional: choice, text, number, math or exact (`scoring.py`); else it follows from the answer      |
| `task`, `family`    | optional; each stands in for the other, the file's folder for both                                 |

Rows with `messages` are our tasks': the model is asked as it was trained, and `choices` says which answers there are.
"""

import hashlib
import string
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from conversion.reading import is_file
from evaluation.final_answer import as_number, normalize
from evaluation.scoring import ANSWER_FORMATS
from train.data.reasoning_data import ReasoningSample, join_texts, list_choices, read_rows


LETTERS = string.ascii_uppercase
YES_NO = ("Yes", "No")


@dataclass
class EvaluationRow(ReasoningSample):
    """One question of a file; `steps` stay empty, and an image may be the bytes of a file."""

    id: str
    data: str  # the file as it was given
    family: str
    task: str
    choices: tuple[str, ...]
    is_lettered: bool  # the choices are listed in the question, and a letter is an answer
    answer_format: str

    @property
    def key(self) -> tuple[str, str]:
        return self.data, self.id

    def digest(self) -> bytes:
        """What the row asks and expects, its images included.

        Raises:
            ValueError: an image cannot be read.
        """
        parts = [self.id, self.question, self.answer, self.answer_format, str(self.choices), str(self.is_lettered)]
        digest = hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=16)
        for image, pixels in zip(self.images, self.load_images()):
            content = pixels.tobytes() if isinstance(image, Image.Image) else image
            digest.update(content if isinstance(content, bytes) else Path(content).read_bytes())
        return digest.digest()


def answer_key(key: tuple[str, str], repeat: int) -> tuple:
    """Names an answer: its row and, from the second time that it is asked on, which time that is."""
    return (*key, repeat) if repeat else key


def read_evaluation(
    paths: Iterable[str | Path],
    answer_format: str | None = None,
    instruction: str | None = None,
    limit: int | None = None,
) -> list[EvaluationRow]:
    """Read the rows of all files. Images are looked for, but not yet opened (`check_images`).

    Args:
        answer_format: of rows that give none.
        instruction: stands below every question.
        limit: rows of each file, from its start.

    Raises:
        ValueError: a file or a row that cannot be used; the message names it.
    """
    if answer_format is not None and answer_format not in ANSWER_FORMATS:
        raise ValueError(f"`answer_format` must be one of {sorted(ANSWER_FORMATS)}, got {answer_format!r}.")
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be >= 1, got {limit}.")
    rows, seen = [], set()
    for path in map(Path, paths):
        if path.resolve() in seen:
            raise ValueError(f"`data` names {path} twice.")
        seen.add(path.resolve())
        rows += read_file(path, answer_format, instruction)[:limit]
    return rows


def read_file(path: Path, answer_format: str | None, instruction: str | None) -> list[EvaluationRow]:
    """All rows of one file, checked: an error behind the limit is an error too."""
    from evaluation.tables import read_table

    if not is_file(path):
        raise ValueError(f"There is no data file {str(path)[:500]}.")
    if path.suffix == ".tsv":
        fields = read_table(path)
    elif path.suffix == ".jsonl":
        fields = ((origin, fields_of(row, path, origin)) for origin, row in read_rows(path, ""))
    else:
        raise ValueError(f"`data` must be .jsonl or .tsv files, got {path}.")
    rows: list[EvaluationRow] = []
    places: dict[str, str] = {}
    for origin, given in fields:
        row = build_row(given, path, origin, answer_format, instruction)
        if row.id in places:
            raise ValueError(f"{origin} has the id {row.id!r}, which {places[row.id]} has too. Ids must be unique.")
        places[row.id] = origin
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no row.")
    return rows


def fields_of(row: Any, path: Path, origin: str) -> dict:
    """A line of JSON in the terms of `build_row`."""
    if not isinstance(row, dict):
        raise ValueError(f"{origin} must be an object, got {type(row).__name__}.")
    if row.get("image") is not None and row.get("images") is not None:
        raise ValueError(f"{origin} gives `image` and `images`; give one.")
    choices = row.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(one, str | int | float) for one in choices):
        raise ValueError(f"{origin}: `choices` must be a list of texts or numbers, got {choices!r}.")
    images = row.get("image") if row.get("images") is None else row["images"]
    folder = path.resolve().parent.name
    return {
        "id": row.get("id", row.get("index")),
        "question": row.get("question"),
        "above": [row.get("hint"), row.get("context")],
        "answer": row.get("answer"),
        "images": [] if images is None else images if isinstance(images, list) else [images],
        "choices": tuple(map(str, choices)),
        "is_lettered": bool(choices) and not row.get("messages"),
        "answer_format": row.get("answer_format"),
        "family": str(row.get("family") or row.get("task") or folder),
        "task": str(row.get("task") or row.get("family") or folder),
    }


def build_row(fields: dict, path: Path, origin: str, answer_format: str | None, instruction: str | None):
    """Check the fields of a row, and find out in which format it is answered."""
    fields = dict(fields)
    for name in ("id", "question", "answer"):
        value = fields[name]
        if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
            raise ValueError(f"{origin} must have `{name}`, a text or a number, got {value!r}.")
    fields["id"], choices, lettered = str(fields["id"]), fields["choices"], fields["is_lettered"]
    for image in fields["images"]:
        if not isinstance(image, str | bytes | Image.Image):
            raise ValueError(f"{origin}: `image` must be a path or a list of paths, got {type(image).__name__}.")
    fields["images"] = [str(path.parent / image) if isinstance(image, str) else image for image in fields["images"]]
    lost = [image for image in fields["images"] if isinstance(image, str) and not is_file(image)]
    if lost:
        raise ValueError(f"{origin}: the image {lost[0][:500]} does not exist.")
    kind, answer = fields["answer_format"] or answer_format, fields["answer"]
    if kind is not None and kind not in ANSWER_FORMATS:
        raise ValueError(f"{origin}: `answer_format` must be one of {sorted(ANSWER_FORMATS)}, got {kind!r}.")
    if kind is None and not choices and normalize(str(answer)) in map(str.lower, YES_NO):
        choices = YES_NO  # as in POPE and MME: "Yes, there is." is an answer too
    kind = kind or ("choice" if choices else "text" if as_number(str(answer)) is None else "number")
    if kind == "choice":
        answer = find_choice(answer, choices, lettered, origin)
    if kind == "number" and as_number(str(answer)) is None:
        raise ValueError(f"{origin}: `answer` must be a number where the answer format is number, got {answer!r}.")
    question = join_texts(*fields.pop("above"), fields["question"], list_choices(choices) if lettered else None)
    fields |= {"question": join_texts(question, instruction), "answer": str(answer), "choices": choices}
    return EvaluationRow(**(fields | {"answer_format": kind}), steps=[], origin=origin, data=str(path))


def find_choice(answer: str | int | float, choices: tuple[str, ...], lettered: bool, origin: str) -> str:
    """The text of the right choice, which may be given as such, by its letter or by its index."""
    if not choices:
        raise ValueError(f"{origin}: the answer format choice needs `choices`.")
    named = [one for one in choices if one == str(answer)] or [
        one for one in choices if normalize(one) == normalize(str(answer))
    ]
    if not named and isinstance(answer, int) and 0 <= answer < len(choices):
        named = [choices[answer]]
    if not named and lettered and isinstance(answer, str) and len(letter := answer.strip(" ().")) == 1:
        named = [one for one, its in zip(choices, LETTERS) if its == letter]
    if not named:
        raise ValueError(f"{origin}: `answer` must be one of the choices {list(choices)}, got {answer!r}.")
    return named[0]


def check_images(rows: list[EvaluationRow], progress: bool = False) -> dict[str, str]:
    """Open every image once, and return by file the number of its rows and a digest of them with their images.

    Raises:
        ValueError: an image cannot be read; the message names row and file.
    """
    digests: dict[str, Any] = {}
    with ThreadPoolExecutor() as pool:
        found = pool.map(EvaluationRow.digest, rows)
        for row, digest in zip(rows, tqdm(found, "checking images", len(rows), disable=not progress)):
            digests.setdefault(row.data, hashlib.blake2b(digest_size=16)).update(digest)
    counts = Counter(row.data for row in rows)
    return {path: f"{counts[path]} rows, {digest.hexdigest()}" for path, digest in digests.items()}
