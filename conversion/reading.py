"""The one place where JSON that others wrote is read: whatever is wrong with it is a `ValueError` with file and line."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


# Where the commands of the documentation write: `out/lare` is never somebody's repository on the Hub.
OUTPUT_FOLDERS = ("out", "checkpoints")


def parse_json(text: str | bytes, origin: str, **options) -> Any:
    """Parse a JSON text.

    Args:
        origin: where it stands, for messages: "Line 3 of data.jsonl".

    Raises:
        ValueError: it is no JSON or no UTF-8, is nested too deeply, or holds a lone surrogate, which is no character.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(text, **options)
    except RecursionError:
        raise ValueError(f"{origin} is no JSON that can be read: it is nested too deeply.") from None
    except ValueError as error:
        raise ValueError(f"{origin} is no JSON: {error}") from error
    if "\\u" in text and (lone := find_lone_surrogate(value)):
        raise ValueError(f"{origin} holds {lone!a}, half of a surrogate pair, which is no character.")
    return value


def find_lone_surrogate(value: Any) -> str | None:
    """A surrogate in a text, or anywhere in lists and dicts, that has lost its other half."""
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False, default=str)
    return next((character for character in value if "\ud800" <= character <= "\udfff"), None)


def read_file(path: str | Path) -> bytes:
    """The content of a file.

    Raises:
        ValueError: there is no such file, or it cannot be read.
    """
    if not is_file(path):
        raise ValueError(f"There is no file {str(path)[:500]}.")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def is_file(path: str | Path) -> bool:
    """Whether there is such a file. `Path.is_file` raises where a name is too long."""
    return os.path.isfile(path)


def read_json(path: str | Path) -> Any:
    """Raises:
    ValueError: the file cannot be read, or holds no JSON.
    """
    return parse_json(read_file(path), str(path))


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Raises:
    ValueError: the file cannot be read, or holds no JSON object.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}.")
    return content


def read_json_lines(path: str | Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, value) of every line that is not empty. Line breaks that may stand in a text end no line.

    Raises:
        ValueError: the file cannot be read, or a line is no JSON; the message names it.
    """
    if not is_file(path):
        raise ValueError(f"There is no data file {str(path)[:500]}.")
    try:
        with Path(path).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    origin = f"Line {number} of {path}"
                    yield origin, parse_json(line, origin)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def is_local_path(model: str | Path) -> bool:
    """Whether a model is meant to be a folder on this machine, there or not, and no `owner/name` of the Hub."""
    text = str(model).rstrip("/")
    owner, _, _ = text.partition("/")
    # The Hub's names have one separator. A first part that is a folder here is no owner there.
    return text.count("/") != 1 or text[:1] in (".", "~") or owner in OUTPUT_FOLDERS or os.path.isdir(owner)


def check_model_folder(model: str | Path) -> None:
    """Refuse a folder that does not exist, which transformers would look for on the Hub; a Hub id passes.

    Raises:
        ValueError: there is no such folder.
    """
    if is_local_path(model) and not os.path.isdir(model):
        raise ValueError(
            f"There is no folder {str(model)[:500]}. A model is a folder on this machine, or `owner/name` on the Hub."
        )


def check_config_file(model: str | Path) -> None:
    """Refuse a folder that is not there, or whose config.json transformers would fail over without naming it; a Hub id passes.

    Raises:
        ValueError: there is no such folder, or its config.json holds no JSON object.
    """
    check_model_folder(model)
    path = Path(model) / "config.json"
    if is_file(path):
        read_json_object(path)
