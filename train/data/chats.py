"""Chats with pictures, as chat templates take them: one line of a JSONL file each.

A line holds `messages` (`train.data.tasks` writes such files); image paths are relative to the file. `train.common.chat_collator`
makes batches of them.
"""

from pathlib import Path

from conversion.reading import is_file, read_json_lines
from processing_latentvlm.pictures import ADDRESSES, read_size


PATCH = 28  # pixels of a merged patch
ITEM_KEYS = {"text": ("text",), "image": ("image",), "latent": ("grid", "steps")}  # beside `type`


def read_trajectories(path: str | Path) -> list[dict]:
    """Read a JSONL file and make its image paths absolute.

    Raises:
        ValueError: a line is no JSON object with `messages`; the message names the line.
    """
    path = Path(path)
    samples = []
    for origin, sample in read_json_lines(path):
        if not isinstance(sample, dict) or not isinstance(sample.get("messages"), list):
            raise ValueError(f"{origin} must be an object with a list of `messages`.")
        check_chat(sample["messages"], origin)
        for item in picture_items(sample["messages"]):
            if isinstance(item["image"], str):
                item["image"] = str(path.parent / item["image"])
                if not is_file(item["image"]):
                    raise ValueError(f"{origin} names an image that does not exist: {item['image'][:500]}.")
        samples.append(sample)
    return samples


def check_chat(messages: list, origin: str) -> None:
    """Refuse messages that no chat template could render, and what would fetch an address or open another file.

    transformers reads pictures and videos from several keys of an item; data name a picture by `image` alone.

    Raises:
        ValueError: it is no message with a `role` and texts or items; an item lacks what its `type` needs, is of another type
            or has another key; or a picture is named by an address.
    """
    for number, message in enumerate(messages):
        where = f"{origin}: message {number}"
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str | list) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where} must have a `role` and a `content`, got {str(message)[:200]!a}.")
        for item in content if isinstance(content, list) else []:
            kind = item.get("type") if isinstance(item, dict) else None
            known = ITEM_KEYS.get(kind) if isinstance(kind, str) else None
            is_complete = kind == "latent" or (known is not None and isinstance(item.get(kind), str))
            if not is_complete or not item.keys() <= {"type", *known}:
                raise ValueError(
                    f"{where}: an item of `content` must be {{type: text, text: ..}} or {{type: image, image: PATH}}, with no other "
                    f"key, got {str(item)[:200]!a}."
                )
            if kind == "image" and item["image"].startswith(ADDRESSES):
                raise ValueError(f"{where} names an address, but nothing is fetched: {item['image'][:200]!a}.")
    if not messages:
        raise ValueError(f"{origin} holds no message.")


def picture_items(messages: list[dict]) -> list[dict]:
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [item for content in contents for item in content if item.get("type") == "image"]


def fit_grid(width: int, height: int, largest: int, patch: int = PATCH, least: int = 1) -> tuple[int, int]:
    """The (height, width) in merged patches of a picture in pixels, shrunk into largest x largest with its aspect kept.

    Args:
        least: merged patches that it must have; a smaller picture is enlarged.

    Raises:
        ValueError: not even largest x largest has `least` patches.
    """
    if largest * largest < least:
        raise ValueError(f"Pictures of at most {largest} x {largest} merged patches cannot have {least}.")
    rows, columns = max(1.0, height / patch), max(1.0, width / patch)
    scale = min(1.0, largest / max(rows, columns))
    rows, columns = max(1, round(rows * scale)), max(1, round(columns * scale))
    while rows * columns < least:
        # The side that is shorter than its share grows.
        if columns == largest or (rows < largest and rows * width <= columns * height):
            rows += 1
        else:
            columns += 1
    return rows, columns


def question_image_sizes(sample: dict) -> list[tuple[int, int]]:
    """(width, height) in pixels of the pictures that are not the assistant's."""
    return [
        read_size(item["image"])
        for item in picture_items([one for one in sample["messages"] if one["role"] != "assistant"])
    ]
