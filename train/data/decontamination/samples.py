"""Read question-answer samples one at a time, and reduce their pairs to digests that ignore how they are spelled.

A file is JSONL, one object a line, or JSON, one array of objects as LLaVA has it; its first character tells them apart.
An object holds `question` and `answer`, or `conversations` of turns with `from` and `value`; and, if it has a picture,
`image`: one path or a list of them, relative to the file.
"""

import hashlib
import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, TextIO


BLOCK = 1 << 16  # characters of an array read at once
LARGEST_ITEM = 1 << 26  # characters; where no item ends in so many, the array is broken
DECODER = json.JSONDecoder()
ASKING, ANSWERING = ("human", "user"), ("gpt", "assistant")
IMAGE_PLACEHOLDER = "<image>"
LEADING_MINUS = re.compile(r"(?<!\w)-(?=\d)")
MINUS_SIGN = "\u2212"  # in Unicode a symbol, like "+", "=" and "<", which all stay


def replace_punctuation() -> dict[int, str]:
    """A table for `str.translate`: punctuation parts words like a space, invisible format characters vanish."""
    categories = {code: unicodedata.category(chr(code)) for code in range(sys.maxunicode + 1)}
    marks = {code: " " for code, category in categories.items() if category.startswith("P")}
    return marks | {code: "" for code, category in categories.items() if category == "Cf"}


PUNCTUATION = replace_punctuation()


@dataclass(frozen=True)
class Sample:
    """What decontamination reads of a sample, and its bytes as they stand in the file."""

    number: int  # of the line, or of the item of an array; from 1
    source: bytes
    image_names: tuple[str, ...]  # as written
    images: tuple[Path, ...]
    pairs: tuple[tuple[str, str], ...]  # (question, answer)


def read_samples(path: Path) -> Iterator[Sample]:
    """Yield the samples of a file; memory holds one of them and a block of the file.

    Raises:
        ValueError: a line or item is no sample; the message names it.
    """
    unit, sources = ("Item", read_array(path)) if is_array(path) else ("Line", read_lines(path))
    for number, source in enumerate(sources, 1):
        try:
            record = json.loads(source.decode("utf-8"))
        except ValueError as error:  # of JSON or of UTF-8
            raise ValueError(f"{unit} {number} of {path} is no JSON: {error}") from error
        where = f"{unit} {number} of {path}"
        if not isinstance(record, dict):
            raise ValueError(f"{where} must be an object, got {type(record).__name__}.")
        names = read_image_names(record, where)
        yield Sample(number, source, names, tuple(path.parent / name for name in names), read_pairs(record, where))


def read_image_names(record: dict, where: str) -> tuple[str, ...]:
    names = record.get("image")
    names = [] if names is None else names if isinstance(names, list) else [names]
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{where} must name its `image` by a path or a list of paths, got {record['image']!r}.")
    return tuple(names)


def read_pairs(record: dict[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    """Questions and answers of a sample; in a conversation, each answer with the question right before it."""
    if "conversations" not in record:
        pair = record.get("question"), record.get("answer")
        if not all(isinstance(text, str) for text in pair):
            kinds = " and ".join(type(text).__name__ for text in pair)
            raise ValueError(f"{where} must hold `conversations`, or `question` and `answer` as text, got {kinds}.")
        return (pair,)
    turns, pairs, question = record["conversations"], [], None
    if not isinstance(turns, list) or not all(is_turn(turn) for turn in turns):
        raise ValueError(f"{where} must hold `conversations` as a list of turns with `from` and `value` as text.")
    for turn in turns:
        if turn["from"] in ANSWERING and question is not None:
            pairs.append((question, turn["value"]))
        question = turn["value"] if turn["from"] in ASKING else None
    return tuple(pairs)


def is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)


def normalize_text(text: str) -> str:
    """Fold what two spellings of one text may differ in: Unicode form (NFKC), case, whitespace, punctuation.

    The sign of a number is no punctuation. A text of nothing but punctuation keeps it.
    """
    text = unicodedata.normalize("NFKC", text.replace(IMAGE_PLACEHOLDER, " ")).casefold()
    text = LEADING_MINUS.sub(MINUS_SIGN, text)
    return " ".join(text.translate(PUNCTUATION).split()) or " ".join(text.split())


def digest_pair(question: str, answer: str) -> bytes:
    """Sixteen bytes that stand for a normalised pair: the texts themselves need not be kept."""
    text = f"{normalize_text(question)}\n{normalize_text(answer)}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def is_array(path: Path) -> bool:
    """Whether the first character of a file that is no whitespace opens an array."""
    with path.open("rb") as file:
        return file.read(BLOCK).lstrip().startswith(b"[")


def read_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def read_array(path: Path) -> Iterator[bytes]:
    """Yield the text of every item of a JSON array.

    Raises:
        ValueError: the array is broken; the message names the item.
    """
    # Bytes that are no UTF-8 pass through, to be refused with the item that they stand in.
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rest = file.read(BLOCK).lstrip()
        if rest[1:].lstrip().startswith("]"):
            return
        for number in count(1):
            if rest.startswith("]"):
                break
            item, rest = split_item(rest[1:], file, f"Item {number} of {path}")
            yield item.encode("utf-8", "surrogateescape")
        if rest[1:].strip() or file.read(BLOCK).strip():
            raise ValueError(f"{path} must be one array, but goes on behind its end.")


def split_item(text: str, file: TextIO, where: str) -> tuple[str, str]:
    """Part the item that `text` begins with from what follows, a comma or the bracket; read on until both are there."""
    while True:
        text, reason = text.lstrip(), "neither a comma nor the end of the array follows"
        try:
            end = DECODER.raw_decode(text)[1]
        except json.JSONDecodeError as error:
            end, reason = len(text), error
        rest = text[end:].lstrip()
        if rest.startswith((",", "]")):
            return text[:end], rest
        more = file.read(max(BLOCK, len(text)))  # doubling: an item of any size is tried few times
        if not more or len(text) > LARGEST_ITEM:
            raise ValueError(f"{where} is no JSON: {reason}.")
        text += more


def batched(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` consecutive items, the last one shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch
