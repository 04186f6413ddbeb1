"""Texts and chats that cannot be rendered or encoded, found where they are given."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def as_rows(text: Any) -> list[str]:
    """The texts of a batch.

    Raises:
        ValueError: a row is no text, or holds a lone surrogate, which no tokenizer can encode; the message names it.
    """
    if not isinstance(text, str | list | tuple):
        raise ValueError(f"`text` must be a text or a list of texts, got {type(text).__name__}.")
    rows = [text] if isinstance(text, str) else list(text)
    if not rows:
        raise ValueError("`text` must hold at least one text.")
    for row, one in enumerate(rows):
        if not isinstance(one, str):
            raise ValueError(f"Row {row} of `text` must be a text, got {type(one).__name__}.")
        check_encodable(one, f"Row {row} of `text`")
    return rows


@contextmanager
def template_errors() -> Iterator[None]:
    """What a chat template refuses is the caller's to mend: a `ValueError` in place of jinja's own."""
    try:
        from jinja2 import TemplateError
    except ImportError:  # transformers says that templates need it
        yield
        return
    try:
        yield
    except TemplateError as error:
        raise ValueError(f"The chat template cannot render this conversation: {error}") from error


def check_encodable(text: str, where: str) -> None:
    """Raises:
    ValueError: the text holds half of a surrogate pair, which is no character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds {text[error.start]!a} at character {error.start}, half of a surrogate pair, which is no character."
        ) from error


def check_conversation(conversation: Any) -> None:
    """Refuse what no chat template could render: a chat is a list of messages, a batch a list of chats.

    Raises:
        ValueError: a message lacks a `role`, or its `content` is neither a text nor a list of items with what their `type`
            needs; the message says which.
    """
    if not isinstance(conversation, list | tuple) or not conversation:
        raise ValueError(
            f"A conversation must be a list of messages, or of such lists, got {str(conversation)[:200]!a}."
        )
    is_batch = any(isinstance(one, list | tuple) for one in conversation)
    for row, messages in enumerate(conversation if is_batch else [conversation]):
        if not isinstance(messages, list | tuple) or not messages:
            raise ValueError(f"Conversation {row} must be a list of messages, got {str(messages)[:200]!a}.")
        for number, message in enumerate(messages):
            check_message(message, f"Message {number}{f' of conversation {row}' if is_batch else ''}")


def check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"{where} must be a dict with a `role` and a `content`, got {str(message)[:200]!a}.")
    check_encodable(message["role"], where)
    content = message.get("content")
    if isinstance(content, str):
        check_encodable(content, where)
        return
    if not isinstance(content, list | tuple | None):
        raise ValueError(f"{where}: `content` must be a text or a list of items, got {str(content)[:200]!a}.")
    for item in content or ():
        if not isinstance(item, dict) or not isinstance(item.get("type"), str):
            raise ValueError(f"{where}: an item of `content` must be a dict with a `type`, got {str(item)[:200]!a}.")
        if item["type"] == "text":
            if not isinstance(item.get("text"), str):
                raise ValueError(f"{where}: an item of type text needs a `text`, got {str(item)[:200]!a}.")
            check_encodable(item["text"], where)


def is_whole_number(value: Any, least: int) -> bool:
    """`True` is none, although Python counts it as 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
