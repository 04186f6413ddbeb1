"""LaRe's training data: LLaVA-format conversations (stages 1 and 3), questions with reasoning (stages 2 and 4), and batches.

LLaVA's format is a JSON list, or JSONL, of objects with `conversations` ([{"from": "human", "value": "<image>\\n.."},
{"from": "gpt", "value": ".."}, ..]) and, where a value names `<image>`, `image`: a path relative to the file, or a list of
them. Questions with reasoning are read by `train.data.reasoning_data`.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from conversion.reading import is_file, read_file, read_json, read_json_lines
from train.common.stages import answer_text
from train.data.reasoning_data import ReasoningSample


IGNORED = -100
LONG_ROWS = ("error", "drop", "truncate")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGE_WORD = "<image>"
MODEL_INPUTS = ("input_ids", "attention_mask", "labels", "pixel_values")


@dataclass
class Conversation:
    """Messages with texts and image numbers, the images, and the reasoning that latents stand for."""

    messages: list[dict]
    images: list[str | Image.Image]
    reasoning: str
    origin: str

    def load_images(self) -> list[Image.Image]:
        """Decode the images.

        Raises:
            ValueError: one cannot be read.
        """
        return ReasoningSample(self.images, "", [], "", self.origin).load_images()

    def load_image(self, image: str | Image.Image) -> Image.Image:
        """As `load_images`, of one of them."""
        return ReasoningSample(self.images, "", [], "", self.origin).load_image(image)

    def image_sizes(self) -> list[tuple[int, int]]:
        """(width, height) of the images in pixels, without decoding them.

        Raises:
            ValueError: one cannot be read.
        """
        return ReasoningSample(self.images, "", [], "", self.origin).image_sizes()


def from_reasoning(sample: ReasoningSample, is_direct: bool = False) -> Conversation:
    """A question whose answer is the reasoning and the boxed result, or the result alone."""
    question = [*({"type": "image"} for _ in sample.images), {"type": "text", "text": sample.question}]
    answer = "\n".join([*([] if is_direct else sample.steps), answer_text(sample.answer)])
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(messages, sample.images, "\n".join(sample.steps), sample.origin)


def split_image_words(text: str) -> list[dict]:
    """The parts of a LLaVA text: pictures where it says `<image>`."""
    content: list[dict] = []
    for number, part in enumerate(text.split(IMAGE_WORD)):
        content += [{"type": "image"}] * (number > 0)
        content += [{"type": "text", "text": part.strip("\n")}] * bool(part.strip())
    return content


def from_llava(row: Any, folder: Path, origin: str) -> Conversation:
    """A conversation of LLaVA's format; its reasoning is its first response.

    Raises:
        ValueError: a field is missing or of the wrong kind, or images and `<image>` words do not match.
    """
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{origin} must be an object with a list of `conversations`.")
    messages, count = [], 0
    for turn in turns:
        role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or role not in ROLES or not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"{origin}: a turn needs `from` out of {sorted(ROLES)} and a `value` that is not empty: {turn!r}."
            )
        content: Any = text
        if ROLES[role] == "user":
            content = split_image_words(text)
            count += sum(item["type"] == "image" for item in content)
        messages.append({"role": ROLES[role], "content": content})
    first = next((message["role"] for message in messages if message["role"] != "system"), None)
    if first == "assistant":
        raise ValueError(f"{origin}: the conversation begins with an answer ({turns[0]!r:.200}), to no question.")
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        raise ValueError(f"{origin}: nobody answers, so nothing can be learned.")
    given = row.get("image")
    images = [] if given is None else given if isinstance(given, list) else [given]
    if len(images) != count:
        raise ValueError(f"{origin}: {len(images)} images, but {count} times {IMAGE_WORD}.")
    paths = [str(folder / image) if isinstance(image, str) else image for image in images]
    for path in paths:
        if not isinstance(path, str) or not is_file(path):
            raise ValueError(f"{origin}: the image {str(path)[:500]} does not exist.")
    return Conversation(messages, paths, answers[0], origin)


def read_llava(path: str | Path, drop_incomplete: bool = False) -> list[Conversation]:
    """Read a JSON list or JSONL, and open every image's header.

    Args:
        drop_incomplete: leave out rows that cannot be used, and say how many; else they are errors.

    Raises:
        ValueError: a row that cannot be used; the message names it.
    """
    path = Path(path)
    if not is_file(path):
        raise ValueError(f"There is no data file {str(path)[:500]}.")
    conversations, dropped = [], []
    for origin, row in rows_of(path):
        try:
            conversation = from_llava(row, path.parent, origin)
            conversation.image_sizes()  # opens their headers
            conversations.append(conversation)
        except ValueError as error:
            if not drop_incomplete:
                raise
            dropped.append(str(error))
    if dropped:
        print("\n".join([f"{len(dropped)} rows of {path} were left out:", *dropped]))
    if not conversations:
        raise ValueError(f"{path} holds no sample.")
    return conversations


def rows_of(path: Path) -> Iterable[tuple[str, Any]]:
    """(where it stands, row)."""
    if read_file(path).lstrip()[:1] == b"[":
        yield from ((f"Entry {number} of {path}", row) for number, row in enumerate(read_json(path)))
    else:
        yield from read_json_lines(path)


def key_of(data: bytes) -> int:
    """A number that stands for content, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


def image_key(images: list[Image.Image]) -> int:
    """A number that stands for what pictures show."""
    return key_of(b"".join(image.tobytes() for image in images))


class RowTooLong(ValueError):
    """A row has more tokens than `max_length`."""


class LaReCollator:
    """Conversations to batches.

    A text is cut where a turn of the assistant begins and ends, and every piece is tokenised by itself: so the prompt has the
    tokens that `generate` is given, whatever the template and the tokenizer.

    Args:
        processor: a `LaReProcessor`.
        max_length: longest row in tokens.
        long_rows: "truncate" cuts what is longer at its end; otherwise it is an error ("drop" is `check_rows`').
    """

    def __init__(self, processor, max_length: int | None = None, long_rows: str = "error"):
        self.cache = None  # a `TowerCache` of all pictures, which are then not decoded
        if long_rows not in LONG_ROWS:
            raise ValueError(f"`long_rows` must be one of {LONG_ROWS}, got {long_rows!r}.")
        if max_length is not None and max_length < 1:
            raise ValueError(f"`max_length` must be >= 1, got {max_length}.")
        if max_length is None and long_rows != "error":
            raise ValueError(f"`long_rows` {long_rows!r} needs a `max_length`: without one, no row is too long.")
        self.processor, self.tokenizer, self.max_length = processor, processor.tokenizer, max_length
        self.long_rows = long_rows

    def __call__(self, conversations: list[Conversation]) -> dict[str, Tensor]:
        rows = [self.encode(conversation) for conversation in conversations]
        reasoning = [torch.tensor(self.tokens(one.reasoning), dtype=torch.long) for one in conversations]
        pad, one = self.tokenizer.pad_token_id, torch.zeros(1, dtype=torch.long)  # at least a column, of padding
        batch = {
            "input_ids": pad_sequence([ids for ids, _ in rows], batch_first=True, padding_value=pad),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids, _ in rows], batch_first=True),
            "labels": pad_sequence([labels for _, labels in rows], batch_first=True, padding_value=IGNORED),
            "reasoning_ids": pad_sequence([*reasoning, one], batch_first=True, padding_value=pad)[:-1],
            "reasoning_mask": pad_sequence([*map(torch.ones_like, reasoning), one], batch_first=True)[:-1].bool(),
            "reasoning_keys": torch.tensor([key_of(one.reasoning.encode()) for one in conversations]),
        }
        return batch | (self.read_pictures if self.cache is None else self.look_up_pictures)(conversations)

    def read_pictures(self, conversations: list[Conversation]) -> dict[str, Tensor]:
        images = [conversation.load_images() for conversation in conversations]
        batch = {"image_keys": torch.tensor([image_key(row) for row in images])}
        flat = [image for row in images for image in row]
        if flat:
            batch["pixel_values"] = self.processor.image_processor(flat, return_tensors="pt")["pixel_values"]
        return batch

    def look_up_pictures(self, conversations: list[Conversation]) -> dict[str, Tensor]:
        """The numbers of the pictures in the cache, and pixels that are zero."""
        numbers = [self.cache.find(conversation.images) for conversation in conversations]
        keys = [[self.cache.keys[number] for number in row] for row in numbers]
        batch = {"image_keys": torch.tensor([key_of(repr(row).encode()) for row in keys])}
        flat = [number for row in numbers for number in row]
        if flat:
            batch["image_numbers"] = torch.tensor(flat)
            size = self.processor.image_size
            batch["pixel_values"] = torch.zeros(len(flat), 1, 1, 1).expand(-1, 3, size, size)
        return batch

    def tokens(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]

    def encode(self, conversation: Conversation) -> tuple[Tensor, Tensor]:
        """Tokens and labels of one row, images expanded, cut where it is too long and may be cut.

        Raises:
            RowTooLong: it is longer than `max_length`, and may not be cut, or would lose an image or every answer.
            ValueError: its messages cannot be rendered.
        """
        ids, labels = self.encode_whole(conversation)
        if self.max_length is not None and len(ids) > self.max_length:
            is_too_long = f"{conversation.origin} has {len(ids)} tokens, but `max_length` is {self.max_length}"
            if self.long_rows != "truncate":
                raise RowTooLong(f"{is_too_long}.")
            loses_image = self.processor.image_token_id in ids[self.max_length :]
            ids, labels = ids[: self.max_length], labels[: self.max_length]
            if loses_image or all(label == IGNORED for label in labels):
                raise RowTooLong(f"{is_too_long}, and cut there it would lose an image or every answer.")
        return torch.tensor(ids), torch.tensor(labels)

    def encode_whole(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Tokens and labels of a row, however long."""
        ids, labels, bos = [], [], self.tokenizer.bos_token
        for text, is_answer in self.pieces(conversation):
            # As the processor does for `generate`: a template either writes the first token itself or leaves it out.
            has_first = bool(ids) or (bos is not None and text.startswith(bos))
            piece = self.expand(self.tokens(text, add_special_tokens=not has_first))
            ids += piece
            labels += piece if is_answer else [IGNORED] * len(piece)
        return ids, labels

    def is_too_long(self, conversation: Conversation) -> bool:
        """Raises:
        ValueError: its messages cannot be rendered.
        """
        length = len(self.encode_whole(conversation)[0])
        return self.max_length is not None and length > self.max_length

    def expand(self, ids: list[int]) -> list[int]:
        image, count = self.processor.image_token_id, (self.processor.image_size // self.processor.patch_size) ** 2
        return [token for one in ids for token in ([one] * count if one == image else [one])]

    def pieces(self, conversation: Conversation) -> list[tuple[str, bool]]:
        """The rendered conversation in pieces, and which of them the assistant says.

        Raises:
            ValueError: the chat template renders a conversation otherwise than its beginning.
        """
        render, messages = self.processor.apply_chat_template, conversation.messages
        pieces, done = [], ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            for upto, is_answer in ((messages[:number], False), (messages[: number + 1], True)):
                try:
                    text = render(upto, tokenize=False, add_generation_prompt=not is_answer)
                except ValueError as error:  # such as roles that do not alternate, which some templates refuse
                    raise ValueError(f"{conversation.origin}: {error}") from error
                if not text.startswith(done):
                    raise ValueError(
                        f"{conversation.origin}: the chat template changes what it rendered before when a turn is added."
                    )
                pieces.append((text[len(done) :], is_answer))
                done = text
        return pieces


def check_rows(conversations: list[Conversation], collator: LaReCollator) -> list[Conversation]:
    """Encode every row once, before the first step, and return those to train on; say how many were dropped or are cut.

    Raises:
        ValueError: a row cannot be rendered, is too long (unless it is dropped or cut), or none is left.
    """
    long, kept = [], []
    for conversation in tqdm(conversations, desc="checking rows", leave=False):
        if collator.is_too_long(conversation):
            long.append(conversation.origin)
            if collator.long_rows == "drop":
                continue
            collator.encode(conversation)  # which raises where it may not be cut
        kept.append(conversation)
    if long:
        done = "dropped" if collator.long_rows == "drop" else "cut at their end"
        print(
            f"{len(long)} of {len(conversations)} rows have more than {collator.max_length} tokens (`max_length`) and are "
            f"{done}, the first: {long[0]}."
        )
    if not kept:
        raise ValueError(f"All {len(conversations)} rows have more tokens than `max_length` {collator.max_length}.")
    return kept


class RefocusingChatCollator:
    """Chats with pictures, as `train.data` reads them, to batches of the model's own inputs; an assistant's pictures are left out.

    Any language model's chat template works: turns are found as in `LaReCollator`.
    """

    def __init__(self, processor):
        self.collate = LaReCollator(processor)

    @classmethod
    def for_model(cls, processor, config) -> "RefocusingChatCollator":
        return cls(processor)

    def __call__(self, samples: list[dict]) -> dict[str, Tensor]:
        batch = self.collate([self.conversation(sample) for sample in samples])
        return {name: batch[name] for name in MODEL_INPUTS if name in batch}

    def conversation(self, sample: dict) -> Conversation:
        """Raises:
        ValueError: there is no assistant turn to learn from.
        """
        messages, images, answers = [], [], 0
        for message in sample["messages"]:
            is_answer, content = message["role"] == "assistant", message["content"]
            answers += is_answer
            if not isinstance(content, str):
                shown = [item for item in content if not (is_answer and item["type"] == "image")]
                images += [item["image"] for item in shown if item["type"] == "image"]
                content = [{"type": "image"} if item["type"] == "image" else item for item in shown]
            messages.append({"role": message["role"], "content": content})
        origin = sample.get("origin", "A row of the data")
        if not answers:
            raise ValueError(f"{origin} holds no assistant turn to learn from.")
        return Conversation(messages, images, "", origin)
