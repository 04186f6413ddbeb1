"""Chats whose answers interleave text and pictures: reading, adapting and checking them.

A line of a JSONL file, an element of a JSON list, or a row of a `datasets` folder or parquet file becomes one trajectory,
`{"messages": [{"role": .., "content": [{"type": "text", ..} | {"type": "image", "image": ..}]}]}`:

| `--data_format` | layout                                                                                              |
|-----------------|-----------------------------------------------------------------------------------------------------|
| `messages`      | `messages` as above (`train.data.tasks` writes such files)                                               |
| `zebra_cot`     | `Question`, `Text Reasoning Trace`, `Final Answer`; `<image_start>[reasoning_image_2]<image_end>`    |
|                 | in a text stands for the column `reasoning_image_2`. From the dataset card of Zebra-CoT.            |
| `thyme`         | `image`, a list of paths or base64 texts, `question`, `response`; the k-th `<image>` in the two is   |
|                 | the k-th image. From section 2 and 3 of the README of github.com/yfzhang114/Thyme.                  |
| `monet`         | `data`, messages as above, whose images are paths from the set's root folder (`--image_folder`).     |
|                 | From `src/task.py` of github.com/NOVAglow646/Monet.                                                 |

An image is a path relative to `--image_folder` (by default the folder of the file), bytes, `{"bytes": .., "path": ..}` as
`datasets` stores it, or a PIL image. Pictures in the assistant's turns are what latent blocks learn from.
"""

import base64
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from conversion.reading import read_json
from processing_latentvlm.pictures import open_picture, read_size
from train.data.reasoning_data import DatasetRows, read_rows


ROLES = ("system", "user", "assistant")
CHAINS_OF_THOUGHT = ("interleaved", "text", "visual", "none")
WITHOUT_PICTURES = ("text", "none")
ZEBRA_IMAGE = re.compile(r"(?:<image_start>)?\[((?:problem|reasoning)_image_\d+)\](?:<image_end>)?")
ZEBRA_STEP = re.compile(r"^\s*THOUGHT[ _]?\d+:[ \t]*", re.MULTILINE)
MONET_MARKS = re.compile(r"<abs_vis_token></abs_vis_token>|</?observation>")


def text_item(text: str) -> list[dict]:
    return [{"type": "text", "text": text}] if text.strip() else []


def image_item(image: Any) -> dict:
    return {"type": "image", "image": image}


def interleave(pattern: re.Pattern, text: str, find: Callable[[re.Match], Any]) -> list[dict]:
    """Put `find(match)` in the place of every match in a text."""
    items, at = [], 0
    for match in pattern.finditer(text):
        items += [*text_item(text[at : match.start()]), image_item(find(match))]
        at = match.end()
    return items + text_item(text[at:])


def chat(question: list[dict], answer: list[dict]) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def from_messages(row: dict) -> list[dict]:
    return require(row, "messages", list)


def from_zebra_cot(row: dict) -> list[dict]:
    def find(match: re.Match):
        if row.get(match[1]) is None:
            raise ValueError(f"the text names {match[1]}, which the row lacks")
        return row[match[1]]

    asked, trace = require(row, "Question", str), require(row, "Text Reasoning Trace", str)
    shown = {match[1] for match in ZEBRA_IMAGE.finditer(asked + trace)}
    unnamed = [name for name in sorted(row) if name.startswith("problem_image_") and row[name] is not None]
    question = [image_item(row[name]) for name in unnamed if name not in shown] + interleave(ZEBRA_IMAGE, asked, find)
    answer = interleave(ZEBRA_IMAGE, ZEBRA_STEP.sub("", trace), find)
    return chat(
        question, answer + text_item(f"\nThe answer is \\boxed{{{require(row, 'Final Answer', str).strip()}}}.")
    )


def from_thyme(row: dict) -> list[dict]:
    images = [decode_base64(image) for image in require(row, "image", list)]
    texts = require(row, "question", str), require(row, "response", str)
    named = sum(text.count("<image>") for text in texts)
    if named != len(images):
        raise ValueError(f"the texts hold {named} times `<image>`, but there are {len(images)} images")
    pending = iter(images)
    return chat(*(interleave(re.compile("<image>"), text, lambda _: next(pending)) for text in texts))


def from_monet(row: dict) -> list[dict]:
    messages = []
    for message in require(row, "data", list):
        content = [
            item | {"text": MONET_MARKS.sub("", require(item, "text", str))}
            if require(item, "type", str) == "text"
            else item
            for item in require(message, "content", list)
        ]
        messages.append(message | {"content": content})
    return messages


ADAPTERS: dict[str, Callable[[dict], list[dict]]] = {
    "messages": from_messages,
    "zebra_cot": from_zebra_cot,
    "thyme": from_thyme,
    "monet": from_monet,
}


def require(row: Any, name: str, kind: type) -> Any:
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"`{name}` must be a {kind.__name__}, got {str(value)[:80]!r}")
    return value


def decode_base64(image: Any) -> Any:
    """Bytes of a base64 text; anything else, a path too, stays."""
    if not isinstance(image, str) or len(image) < 1024:
        return image
    try:
        return base64.b64decode(image, validate=True)
    except ValueError as error:  # `binascii.Error` is one, and letters beyond ASCII are another
        raise ValueError(f"an image is neither a path nor base64: {error}") from error


def picture_items(messages: list[dict], role: str | None = None) -> list[dict]:
    """The image items of messages, of one role or of all, in order."""
    chosen = [message["content"] for message in messages if role in (None, message["role"])]
    return [item for content in chosen if isinstance(content, list) for item in content if item["type"] == "image"]


def normalize_image(image: Any, folder: Path) -> str | bytes | Image.Image:
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(image, str):
        image = str(folder / image)
        if not os.path.isfile(image):  # not `Path.is_file`, which raises where a name is too long
            raise ValueError(f"the image {image[:200]} does not exist")
    elif not isinstance(image, bytes | Image.Image):
        raise ValueError(f"an image must be a path, bytes or a PIL image, got {type(image).__name__}")
    return image


def normalize_message(message: Any, folder: Path) -> dict:
    """A message of a role and either a text or a list of text and image items.

    Raises:
        ValueError: it is none.
    """
    role, content = require(message, "role", str), message.get("content")
    if role not in ROLES:
        raise ValueError(f"a `role` must be one of {ROLES}, got {role!r}")
    if isinstance(content, str):
        return {"role": role, "content": content}
    items = []
    for item in require(message, "content", list):
        kind = require(item, "type", str)
        if kind == "image":
            items.append(image_item(normalize_image(item.get("image"), folder)))
        elif kind == "text":
            items.append({"type": "text", "text": require(item, "text", str)})
        else:
            raise ValueError(f"an item's `type` must be text or image, got {kind!r}")
    return {"role": role, "content": items}


def shorten(message: dict, chain_of_thought: str) -> dict:
    """Leave out an assistant's pictures ("text"), all of its texts but the last ("visual"), or both ("none")."""
    content = message["content"]
    if message["role"] != "assistant" or chain_of_thought == "interleaved" or isinstance(content, str):
        return message
    if chain_of_thought == "text":
        return message | {"content": [item for item in content if item["type"] == "text"]}
    last = [item for item in content if item["type"] == "text"][-1:]
    if chain_of_thought == "none":
        return message | {"content": last}
    return message | {
        "content": [item for item in content if item["type"] == "image" or any(item is text for text in last)]
    }


def drop_texts(message: dict, count: int) -> dict:
    """Leave out the first `count` texts of an assistant's message, but never its last one. All pictures stay.

    Of a trajectory in which every step is a text and a picture, that leaves the pictures alone of the first steps.
    """
    content = message["content"]
    if message["role"] != "assistant" or not count or isinstance(content, str):
        return message
    texts = [number for number, item in enumerate(content) if item["type"] == "text"]
    dropped = set(texts[: min(count, len(texts) - 1)])
    return message | {"content": [item for number, item in enumerate(content) if number not in dropped]}


def count_steps(messages: list[dict]) -> int:
    """The steps of a trajectory's answers: texts but the last of each, or pictures where these are more."""
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    kinds = [[item["type"] for item in content] for content in answers if isinstance(content, list)]
    return sum(max(one.count("text") - 1, one.count("image")) for one in kinds)


def check_messages(messages: list[dict], max_blocks: int, reserved: Sequence[str]) -> None:
    """Raise unless a model can learn from these messages.

    Args:
        max_blocks: pictures that one answer may hold.
        reserved: tokens that no text may hold, since they act.

    Raises:
        ValueError: it cannot; the message says why.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("there is no assistant message to learn from")
    seen = 0
    for message in messages:
        pictures = picture_items([message])
        content = message["content"]
        texts = [content] if isinstance(content, str) else [item["text"] for item in content if item["type"] == "text"]
        found = [token for token in reserved for text in texts if token in text]
        if found:
            raise ValueError(f"a text holds the reserved {found[0]!r}")
        if message["role"] != "assistant":
            seen += len(pictures)
            continue
        if not any(text.strip() for text in texts):
            what = f"{len(pictures)} assistant images with no text around them" if pictures else "no text"
            raise ValueError(f"an assistant message holds {what}")
        if pictures and not seen:
            raise ValueError("an assistant image comes before any image of the question, which its latents look at")
        if len(pictures) > max_blocks:
            raise ValueError(
                f"an answer holds {len(pictures)} assistant images, but may open {max_blocks} blocks (`max_latent_blocks`)"
            )


def digest_messages(messages: list[dict], opened: set[str] | None = None) -> str:
    """A hash of the texts, and of the images' content whatever file it comes from.

    Args:
        opened: paths of images that were decoded before, which is not done again; others are added.

    Raises:
        ValueError: an image cannot be read.
    """
    digest = hashlib.sha256()

    def add(part: bytes) -> None:
        digest.update(len(part).to_bytes(8, "big") + part)

    for message in messages:
        add(message["role"].encode())
        for item in message["content"] if isinstance(message["content"], list) else text_item(message["content"]):
            if item["type"] == "text":
                add(item["text"].encode())
                continue
            image = item["image"]
            if isinstance(image, str) and opened is not None and image in opened:
                add(Path(image).read_bytes())
                continue
            name = image if isinstance(image, str) else "given as bytes or pixels"
            pixels = open_picture(image, f"the image {name}")
            content = Path(image).read_bytes() if isinstance(image, str) else image
            add(content if isinstance(content, bytes) else repr(pixels.size).encode() + pixels.tobytes())
            if isinstance(image, str) and opened is not None:
                opened.add(image)
    return digest.hexdigest()


def open_rows(path: Path, split: str) -> Sequence[tuple[str, Any]]:
    """(where it stands, row) of everything in a file or folder; images that `datasets` holds are decoded when asked for."""
    if DatasetRows.can_read(path):
        return DatasetRows(path, split)
    if path.suffix != ".json":
        return list(read_rows(path, split))
    rows = read_json(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list, got {type(rows).__name__}.")
    return [(f"Element {number} of {path}", row) for number, row in enumerate(rows, 1)]


class Trajectories(Dataset):
    """A checked data set. Every image is decoded once, however many rows name it, and again when its sample is asked for.

    `num_steps` says of how many steps each answer is: its texts but the last, or its pictures where these are more.

    Args:
        chain_of_thought: "interleaved", "text", "visual" or "none", see `shorten`.
        max_blocks, reserved: see `check_messages`.
        drop_invalid: leave out what does not pass, and say how many; else it is an error.

    Raises:
        ValueError: a row cannot be used, no row is left, or none has an assistant image.
    """

    def __init__(
        self,
        path: str | Path,
        data_format: str = "messages",
        split: str = "train",
        image_folder: str | Path | None = None,
        chain_of_thought: str = "interleaved",
        max_blocks: int = 5,
        reserved: Sequence[str] = (),
        drop_invalid: bool = False,
    ):
        for name, value, known in (
            ("data_format", data_format, ADAPTERS),
            ("chain_of_thought", chain_of_thought, CHAINS_OF_THOUGHT),
        ):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {sorted(known)}, got {value!r}.")
        path = Path(path)
        self.adapt, self.chain_of_thought = ADAPTERS[data_format], chain_of_thought
        self.folder = Path(path.parent if image_folder is None else image_folder)
        self.max_blocks, self.reserved = max_blocks, tuple(reserved)
        self.rows = open_rows(path, split)
        self.kept = range(len(self.rows))  # numbers of the rows that are used
        self._opened: set[str] = set()  # paths of images, which several rows may name
        with ThreadPoolExecutor() as pool:
            inspected = pool.map(self.inspect, self.kept)
            found = list(tqdm(inspected, total=len(self.rows), desc="checking trajectories", leave=False))
        wrong = [error for _, _, error in found if error]
        if wrong and not drop_invalid:
            raise ValueError(wrong[0])
        if wrong:
            print(f"{len(wrong)} of {len(found)} rows of {path} were left out, the first: {wrong[0]}")
        self.kept = [number for number, (_, _, error) in enumerate(found) if not error]
        self.digests = [found[number][0] for number in self.kept]
        self.num_steps = [count_steps(self[number]["messages"]) for number in range(len(self.kept))]
        if not self.kept:
            raise ValueError(f"{path} holds no trajectory.")
        if chain_of_thought not in WITHOUT_PICTURES and not any(found[number][1] for number in self.kept):
            raise ValueError(
                f"No answer in {path} holds an image, so no latent block could be learned. "
                "Text alone is trained with `--chain_of_thought text`."
            )

    def inspect(self, number: int) -> tuple[str, int, str]:
        """The hash of a row, its assistant images, and what is wrong with it."""
        try:
            origin, _ = self.rows[number]
        except ValueError as error:
            return "", 0, str(error)
        try:
            messages = self[number]["messages"]
            check_messages(messages, self.max_blocks, self.reserved)
            return digest_messages(messages, self._opened), len(picture_items(messages, "assistant")), ""
        except ValueError as error:
            return "", 0, f"{origin}: {error}."

    def question_image_sizes(self, number: int) -> list[tuple[int, int]]:
        """(width, height) in pixels of the pictures of a sample that are not the assistant's."""
        messages = [message for message in self[number]["messages"] if message["role"] != "assistant"]
        return [read_size(item["image"]) for item in picture_items(messages)]

    @property
    def digest(self) -> str:
        """A hash of all samples in their order."""
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, number: int) -> dict:
        origin, row = self.rows[self.kept[number]]
        messages = [normalize_message(message, self.folder) for message in self.adapt(row)]
        messages = [shorten(message, self.chain_of_thought) for message in messages]
        return {"messages": messages, "origin": origin, "number": number}
