"""Texts that a tokenizer cannot take, found where they are given."""

from typing import Any


def check_texts(rows: Any) -> None:
    """Refuse what is no text, and texts with lone surrogates, which no tokenizer can encode.

    Raises:
        ValueError: such a row; the message names it.
    """
    for row, text in enumerate(rows):
        if not isinstance(text, str):
            raise ValueError(f"Row {row} of `text` must be a text, got {type(text).__name__}.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Row {row} of `text` holds {text[error.start]!a} at character {error.start}, half of a surrogate pair, which is "
                "no character."
            ) from error


def is_whole_number(value: Any, least: int) -> bool:
    """`True` is none, although Python counts it as 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
