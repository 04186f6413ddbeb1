"""Trajectories to batches for each stage: the same sizes for a picture, its latent block and its teacher's states.

An assistant's picture is resized before anything else, to whole merged patches within the largest grid, its aspect kept. So
the teacher has one image token where the student has one latent, in the same raster order.
"""

import math
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from processing_latentvlm.pictures import open_picture, read_size
from train.common.chat_collator import TrajectoryCollator
from train.common.feature_cache import FeatureCache
from train.data.chats import fit_grid
from train.deeplatent.kept_features import KeptPicture, NumberingBlockProcessor
from train.deeplatent.teacher_states import TeacherCache, pool_states
from train.deeplatent.trajectories import drop_texts


@dataclass(frozen=True)
class PictureSizes:
    """What a picture is resized to.

    Args:
        patch: pixels along a side of a merged patch.
        largest: merged patches along a side of an assistant's picture.
        least: merged patches that the image processor leaves as they are; it enlarges smaller pictures.
        fixed: (height, width) of every assistant's picture, or None to keep its aspect.
        max_question_pixels: larger pictures of the question are shrunk; None leaves that to the image processor.
        question_size: pixels along a side of every picture of the question (`image_size` of the processor), or None.
    """

    patch: int
    largest: int
    least: int = 1
    fixed: tuple[int, int] | None = None
    max_question_pixels: int | None = None
    # Not in `repr`, from which fingerprints of teacher's states are made: those of earlier versions stay valid.
    question_size: int | None = field(default=None, repr=False)

    @classmethod
    def of(cls, config, processor, max_question_pixels: int | None = None) -> "PictureSizes":
        images = processor.image_processor
        patch = images.patch_size * images.merge_size
        fixed = tuple(config.fixed_latent_grid) if config.latent_scale == "fixed" else None
        least = math.ceil(images.size["shortest_edge"] / patch**2)  # in spite of its name an area
        return cls(
            patch, config.latent_grid_size, least, fixed, max_question_pixels, getattr(processor, "image_size", None)
        )

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in merged patches of an assistant's picture of (width, height) pixels."""
        return self.fixed or fit_grid(*size, self.largest, self.patch, self.least)

    def size_of(self, size: tuple[int, int], role: str) -> tuple[int, int]:
        """(width, height) in pixels of what a picture in a message of a role is resized to."""
        if role != "assistant":
            return self.question_size_of(size)
        height, width = self.grid_of(size)
        return width * self.patch, height * self.patch

    def resize(self, picture: Image.Image, role: str) -> Image.Image:
        target = self.size_of(picture.size, role)
        return picture if picture.size == target else picture.resize(target, Image.Resampling.BICUBIC)

    def question_size_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) in pixels of what a picture of the question is resized to."""
        if self.question_size is not None:
            return self.question_size, self.question_size
        width, height = size
        if self.max_question_pixels is None or width * height <= self.max_question_pixels:
            return size
        scale = math.sqrt(self.max_question_pixels / (width * height))
        return max(1, math.floor(width * scale)), max(1, math.floor(height * scale))


class DeepLatentCollator(TrajectoryCollator):
    """Batches of one stage.

    Args:
        assistant_images: "image" (SFT 1 and the teacher) or "latent" (SFT 2).
        teacher_states: where the teacher's states are read from; with "latent" only.
        has_live_teacher: add the teacher's own inputs as `teacher_inputs`; with "latent" only.

    In stage j of a curriculum the first j texts of an assistant's message are left out, and its pictures stay: what a model
    has put into words it learns to hold in its blocks. The teacher reads all texts, so that its states are the same in
    every stage.
    """

    def __init__(
        self,
        processor,
        config,
        assistant_images: str,
        max_question_pixels: int | None = None,
        teacher_states: TeacherCache | None = None,
        has_live_teacher: bool = False,
    ):
        super().__init__(processor, assistant_images, config.latent_grid_size)
        self.features: FeatureCache | None = None
        self.sizes = PictureSizes.of(config, processor, max_question_pixels)
        self.latents_of_block = config.num_autoregressive_latents if config.latent_mode == "autoregressive" else None
        self.cache, self.has_live_teacher = teacher_states, has_live_teacher
        # Shared, so that worker processes that live through several epochs follow it.
        self._stage = torch.zeros((), dtype=torch.long).share_memory_()
        # `open` has resized the pictures. A processor of an older checkpoint does not resize them, and knows no such argument.
        self.as_they_are = {"resize_images": False} if hasattr(processor, "trained_image_sizes") else {}
        # Never targets (eq. 5): the inside of a picture or block, and what closes it.
        names = (*processor.latent_tokens[1:], processor.image_token, "<|vision_end|>")
        self.not_text = torch.tensor(processor.tokenizer.convert_tokens_to_ids(list(names)))

    @property
    def stage(self) -> int:
        return int(self._stage)

    @stage.setter
    def stage(self, stage: int) -> None:
        self._stage.fill_(stage)

    def __call__(self, samples: list[dict]) -> dict:
        opened = [self.open(sample) for sample in samples]
        shown = [
            sample | {"messages": [drop_texts(message, self.stage) for message in sample["messages"]]}
            for sample in opened
        ]
        batch, grids = self.encode(shown, self.assistant_images)
        batch["labels"] = self.labels(batch["input_ids"], batch["attention_mask"])
        if self.assistant_images == "latent" and self.cache is not None:
            read = [self.read_states(sample, row) for sample, row in zip(samples, grids)]
            batch["teacher_states"] = (
                torch.cat([states for row in read for states in row], dim=1) if any(read) else None
            )
        if self.assistant_images == "latent" and self.has_live_teacher:
            batch["teacher_inputs"] = self.teacher_inputs(opened)
        return {name: value for name, value in batch.items() if value is not None}

    def look_up(self, features: FeatureCache) -> None:
        """Take the numbers of pictures, whose features are kept, in place of their pixels."""
        self.features, self.processor = features, NumberingBlockProcessor(self.processor, features)

    def teacher_inputs(self, opened: list[dict]) -> dict:
        """What the teacher reads, and where its assistant's pictures lie in it."""
        inputs, grids = self.encode(opened, "image")
        turns = super().labels(inputs["input_ids"], inputs["attention_mask"]) != -100
        lengths = [height * width for row in grids for height, width in row]
        return inputs | {
            "columns": turns & (inputs["input_ids"] == self.processor.image_token_id),
            "lengths": torch.tensor(lengths, dtype=torch.long),
        }

    def labels(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        labels = super().labels(input_ids, attention_mask)
        return labels.masked_fill(torch.isin(input_ids, self.not_text), -100)

    def open(self, sample: dict) -> dict:
        """Decode and resize the pictures of a sample, or name them where their features are kept.

        Raises:
            ValueError: one cannot be read any more; the message names the sample.
        """

        def read(image, role: str) -> Image.Image | KeptPicture:
            name = f"{sample['origin']}: the image {image if isinstance(image, str) else 'in it'}"
            if self.features is not None:
                return KeptPicture.of(role, image, self.sizes.size_of(read_size(image, name), role))
            return self.sizes.resize(open_picture(image, name), role)

        messages = []
        for message in sample["messages"]:
            content = message["content"]
            if not isinstance(content, str):
                content = [
                    item | {"image": read(item["image"], message["role"])} if item["type"] == "image" else item
                    for item in content
                ]
            messages.append(message | {"content": content})
        return sample | {"messages": messages}

    def encode(self, samples: list[dict], assistant_images: str) -> tuple[dict, list[list[tuple[int, int]]]]:
        """Tensors, and by sample the grids of its assistant's pictures.

        Raises:
            ValueError: the image processor resized an assistant's picture once more; the message names the sample.
        """
        pictures = [
            (sample, message["role"] == "assistant", item["image"])
            for sample in samples
            for message in sample["messages"]
            if not isinstance(message["content"], str)
            for item in message["content"]
            if item["type"] == "image"
        ]
        conversations = [
            [self.render_as(message, assistant_images) for message in sample["messages"]] for sample in samples
        ]
        inputs = dict(
            self.processor.apply_chat_template(
                conversations,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True} | self.as_they_are,
            )
        )
        if assistant_images == "image":
            merge = self.processor.image_processor.merge_size
            for (sample, is_assistants, picture), (_, *patches) in zip(pictures, inputs.get("image_grid_thw", [])):
                expected, got = self.sizes.grid_of(picture.size), tuple(int(side) // merge for side in patches)
                if is_assistants and got != expected:
                    raise ValueError(
                        f"{sample['origin']}: an assistant image of {expected[0]} x {expected[1]} merged patches was resized to "
                        f"{got[0]} x {got[1]} by the image processor, whose limits are {self.processor.image_processor.size}."
                    )
        grids = [
            [
                self.sizes.grid_of(picture.size)
                for owner, is_assistants, picture in pictures
                if owner is sample and is_assistants
            ]
            for sample in samples
        ]
        return inputs, grids

    def render_as(self, message: dict, assistant_images: str) -> dict:
        if message["role"] != "assistant" or assistant_images == "image" or isinstance(message["content"], str):
            return message
        content = [
            {"type": "latent", "grid": self.block_of(item["image"])} if item["type"] == "image" else item
            for item in message["content"]
        ]
        return message | {"content": content}

    def block_of(self, picture: Image.Image) -> tuple[int, int]:
        """The grid of a picture's latent block."""
        if self.latents_of_block is not None:
            return 1, self.latents_of_block
        return self.sizes.grid_of(picture.size)

    def read_states(self, sample: dict, grids: list[tuple[int, int]]) -> list[Tensor]:
        """By block of a sample, its teacher's states (layers, N, D).

        Raises:
            ValueError: the cache holds another number of states than the sample has latents.
        """
        if not grids:
            return []
        lengths = [height * width for height, width in grids]
        states = self.cache.read(sample["number"])
        if states.shape[1] != sum(lengths):
            raise ValueError(
                f"{sample['origin']}: its assistant images have {sum(lengths)} tokens, but the teacher's states are {states.shape[1]}."
            )
        blocks = states.split(lengths, dim=1)
        if self.latents_of_block is None:
            return list(blocks)
        return [pool_states(states, self.latents_of_block) for states in blocks]
