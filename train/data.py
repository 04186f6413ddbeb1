"""Trajectories to batches: chat messages with pictures in the assistant's turn become training tensors.

A line of a JSONL file holds `messages` as chat templates take them (`train.tasks` writes such files); image paths are
relative to the file. What becomes of an assistant's pictures is the collator's `assistant_images`:

    "latent"   a latent block of the picture's grid stands in its place
    "image"    the picture itself stays
    "drop"     it is left out: the text alone
"""

from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from conversion.reading import is_file, read_json_lines
from processing_latentvlm.pictures import ADDRESSES, read_size


PATCH = 28  # pixels of a merged patch
ITEM_KEYS = {"text": ("text",), "image": ("image",), "latent": ("grid", "steps")}  # beside `type`
ASSISTANT_IMAGES = ("latent", "image", "drop")


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


class TrajectoryCollator:
    """Renders, encodes and pads trajectories; the labels are the assistant's turns.

    Args:
        processor: of the model that is trained.
        assistant_images: "latent", "image" or "drop", see the module.
        latent_grid_size: the model's largest grid side, for "latent".
        block: the grid of every block, where a model has but one; by default a block has the aspect of its picture.
        num_steps: latent steps that stand before an assistant's turn, of Vedas. A row then has one such turn.
    """

    def __init__(
        self,
        processor,
        assistant_images: str = "latent",
        latent_grid_size: int = 16,
        block: tuple[int, int] | None = None,
        num_steps: int = 0,
    ):
        if assistant_images not in ASSISTANT_IMAGES:
            raise ValueError(f"`assistant_images` must be one of {ASSISTANT_IMAGES}, got {assistant_images!r}.")
        self.processor, self.assistant_images, self.latent_grid_size = processor, assistant_images, latent_grid_size
        self.block, self.num_steps = block, num_steps
        tokenizer = processor.tokenizer
        self.header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    @classmethod
    def for_model(cls, processor, config) -> "TrajectoryCollator":
        """As a model's `generate` will meet the chats: assistant pictures become its blocks, or are left out for its steps."""
        if config.latent_unit == "block":
            return cls(processor, "latent", config.latent_grid_limit or 1, config.given_latent_grid)
        return cls(processor, "drop", num_steps=config.latent_count)

    def __call__(self, samples: list[dict]) -> dict[str, Tensor]:
        conversations = [[self.render(message) for message in sample["messages"]] for sample in samples]
        if self.num_steps:
            conversations = [self.add_steps(row, messages) for row, messages in enumerate(conversations)]
        inputs = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        inputs["labels"] = self.labels(inputs["input_ids"], inputs["attention_mask"])
        return dict(inputs)

    def render(self, message: dict) -> dict:
        """Put what stands for a picture in the place of each picture of an assistant message."""
        if message["role"] != "assistant" or self.assistant_images == "image" or isinstance(message["content"], str):
            return message
        content = []
        for item in message["content"]:
            if item.get("type") != "image":
                content.append(item)
            elif self.assistant_images == "latent":
                content.append({"type": "latent", "grid": self.grid_of(item["image"])})
        return message | {"content": content}

    def add_steps(self, row: int, messages: list[dict]) -> list[dict]:
        """Put the latent steps in front of the assistant's turn, as `generate` takes them behind the prompt.

        Raises:
            ValueError: there is more than one such turn.
        """
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if len(turns) > 1:
            raise ValueError(
                f"Row {row} of the batch has {len(turns)} assistant turns; latent steps are taken before one."
            )
        for number in turns:
            content = messages[number]["content"]
            items = [{"type": "text", "text": content}] if isinstance(content, str) else content
            messages[number] = messages[number] | {"content": [{"type": "latent", "steps": self.num_steps}, *items]}
        return messages

    def grid_of(self, image) -> tuple[int, int]:
        return self.block or fit_grid(*read_size(image), self.latent_grid_size)

    def labels(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Keep what follows an assistant header, to the end of its turn; -100 elsewhere.

        Raises:
            ValueError: a row holds no assistant turn, so nothing could be learned from it.
        """
        header = torch.tensor(self.header)
        windows = input_ids.unfold(1, len(header), 1)
        labels = torch.full_like(input_ids, -100)
        for row, column in (windows == header).all(dim=-1).nonzero().tolist():
            first = column + len(header)
            ends = (input_ids[row, first:] == self.end).nonzero().flatten()
            last = first + int(ends[0]) + 1 if len(ends) else input_ids.shape[1]
            labels[row, first:last] = input_ids[row, first:last]
        labels = labels.masked_fill(attention_mask == 0, -100)
        empty = (labels == -100).all(dim=1).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"Rows {empty} of the batch hold no assistant turn to learn from.")
        return labels


def collator_for(processor, config):
    """What makes batches of chats for a model of any architecture, as its `generate` will meet them.

    An assistant's pictures become the blocks of a model that opens some. The others take their steps wherever they answer;
    the pictures are left out.
    """
    module, _, name = config.chat_collator.rpartition(".")
    processor.check_model(config)
    return getattr(import_module(module), name).for_model(processor, config)


def question_image_sizes(sample: dict) -> list[tuple[int, int]]:
    """(width, height) in pixels of the pictures that are not the assistant's."""
    return [
        read_size(item["image"])
        for item in picture_items([one for one in sample["messages"] if one["role"] != "assistant"])
    ]
