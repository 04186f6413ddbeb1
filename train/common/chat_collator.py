"""Batches of chats: messages with pictures in the assistant's turn become training tensors.

What becomes of an assistant's pictures is the collator's `assistant_images`:

    "latent"   a latent block of the picture's grid stands in its place
    "image"    the picture itself stays
    "drop"     it is left out: the text alone
"""

from importlib import import_module

import torch
from torch import Tensor

from processing_latentvlm.pictures import read_size
from train.data.chats import fit_grid


ASSISTANT_IMAGES = ("latent", "image", "drop")


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
