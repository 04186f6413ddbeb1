"""VLMEvalKit's table: tab-separated, a row a question, images as base64 in the table or as paths beside it.

    index  image (or image_path)  question  A  B  C  D  answer  hint  category

`A` and the letters behind it are the choices of a question, empty from where it has no more; a question without any has
its answer as a text. `image` may hold a list, or instead of an image the index of the row whose image it shares.
Quotes are doubled inside quotes, as `pandas` writes them.
"""

import ast
import base64
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from evaluation.rows import LETTERS


LONGEST_INDEX = 64  # characters; a longer `image` is an image, as VLMEvalKit has it
REQUIRED = ("index", "question", "answer")


def read_table(path: Path) -> Iterator[tuple[str, dict]]:
    """(where it stands, fields as `rows.build_row` takes them) of every row.

    Raises:
        ValueError: a column is missing, or a row is not what it must be; the message names it.
    """
    csv.field_size_limit(sys.maxsize)  # images are long
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, delimiter="\t", strict=True)
        try:
            columns = table.fieldnames or []
            missing = [name for name in REQUIRED if name not in columns]
            missing += ["image (or image_path)"] * (not {"image", "image_path"} & set(columns))
            if missing or len(set(columns)) < len(columns):
                raise ValueError(f"{path} must have each column once and lacks {missing}; its columns are {columns}.")
            rows = [(f"Row {number} of {path}", row) for number, row in enumerate(table, 1)]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no table in UTF-8: row {table.line_num} cannot be read: {error}") from error
    for origin, row in rows:
        if None in row or None in row.values():
            raise ValueError(f"{origin} must have {len(columns)} columns, as the first line does.")
    inline = {row["index"]: row.get("image", "") for _, row in rows}
    for origin, row in rows:
        yield origin, fields_of(row, inline, path, origin)


def fields_of(row: dict[str, str], inline: dict[str, str], path: Path, origin: str) -> dict:
    texts = [row.get(letter, "").strip() for letter in LETTERS]
    choices = tuple(texts[: texts.index("") if "" in texts else None])
    if any(texts[len(choices) :]):
        raise ValueError(f"{origin} has no choice {LETTERS[len(choices)]}, but one behind it.")
    answer = row["answer"].strip()
    if choices and len(answer) == 1 and answer in LETTERS[: len(choices)]:
        answer = choices[LETTERS.index(answer)]  # a letter first, where a choice's text is a letter too
    category = row.get("category", "").strip()
    family = f"{path.stem}/{category}" if category else path.stem
    return {
        "id": row["index"],
        "question": row["question"],
        "above": [row.get("hint")],
        "answer": answer,
        "images": find_images(row, inline, origin),
        "choices": choices,
        "is_lettered": bool(choices),
        "answer_format": row.get("answer_format") or None,
        "family": family,
        "task": family,
    }


def find_images(row: dict[str, str], inline: dict[str, str], origin: str) -> list[str | bytes]:
    """Bytes of the images in the table, else paths of those beside it."""
    image = row.get("image", "")
    if 0 < len(image) <= LONGEST_INDEX:
        if len(inline.get(image, "")) <= LONGEST_INDEX:
            raise ValueError(
                f"{origin}: `image` is {image!r}, which is neither base64 nor the index of a row with an image."
            )
        image = inline[image]
    if image:
        return [decode(one, origin) for one in listed(image, origin)]
    if row.get("image_path"):
        return listed(row["image_path"], origin)
    return []


def listed(text: str, origin: str) -> list[str]:
    """The parts of a list that was written as text, or the text alone."""
    if not text.startswith("["):
        return [text]
    try:
        parts = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{origin}: a list of images cannot be read: {error}") from error
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{origin}: a list of images must hold texts alone.")
    return parts


def decode(text: str, origin: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:  # `binascii.Error` is one, and letters beyond ASCII are another
        raise ValueError(f"{origin}: `image` is no base64: {error}") from error
