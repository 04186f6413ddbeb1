"""Features of a frozen tower for trajectories: what `train/common/feature_cache.py` keeps, for pictures in the question and in answers.

A picture of the question and the same picture in an answer may be resized to different sizes, so that each role keeps its own.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image

from processing_latentvlm.pictures import open_picture, read_size
from train.common.feature_cache import FeatureCache, NumberingProcessor, encode_pictures
from train.deeplatent.trajectories import ROLES, picture_items


class KeptPicture(str):
    """A picture that is not decoded: its name in a `FeatureCache`.

    Attributes:
        size: (width, height) in pixels after resizing, as of a PIL image.
    """

    size: tuple[int, int]

    @classmethod
    def of(cls, role: str, image: str, size: tuple[int, int]) -> "KeptPicture":
        kept = cls(f"{'answer' if role == 'assistant' else 'question'}:{image}")
        kept.size = size
        return kept


class TrajectoryPictures:
    """The pictures of a sample, as `train.common.feature_cache.encode_pictures` asks for them.

    Args:
        roles: of the messages whose pictures are asked for.

    Raises:
        ValueError: a picture is no path: those that a file holds are told apart by nothing that outlives a batch.
    """

    def __init__(self, sample: dict, sizes, roles: tuple[str, ...] = ROLES):
        self.origin, self.sizes = sample["origin"], sizes
        self.opened: dict[KeptPicture, tuple[str, str]] = {}  # to the role and the path
        for message in sample["messages"]:
            for item in picture_items([message]) if message["role"] in roles else ():
                image = item["image"]
                if not isinstance(image, str):
                    raise ValueError(
                        f"{self.origin}: features can be kept of pictures that are files, not of those that lie in the data."
                    )
                size = read_size(image, self.name_of(image))
                kept = KeptPicture.of(message["role"], image, sizes.size_of(size, message["role"]))
                self.opened[kept] = message["role"], image

    @property
    def images(self) -> list[KeptPicture]:
        return list(self.opened)

    def name_of(self, image: str) -> str:
        return f"{self.origin}: the image {image}"

    def read_size(self, image: KeptPicture) -> tuple[int, int]:
        return image.size

    def load_image(self, image: KeptPicture) -> Image.Image:
        role, path = self.opened[image]
        return self.sizes.resize(open_picture(path, self.name_of(path)), role)


def distinct_pictures(
    samples: Iterable[TrajectoryPictures],
) -> tuple[list["OnePicture"], dict[KeptPicture, KeptPicture]]:
    """Every content once, and for every picture the one that stands for it: crops are often the same picture in many files."""
    first: dict[tuple, KeptPicture] = {}
    chosen, same = [], {}
    for sample in samples:
        for kept in sample.images:
            if kept in same:
                continue
            role, path = sample.opened[kept]
            content = hashlib.sha256(Path(path).read_bytes()).digest()
            same[kept] = first.setdefault((content, kept.size), kept)
            if same[kept] is kept:
                chosen.append(OnePicture(sample, kept))
    return chosen, same


class OnePicture:
    """A picture of a sample, as a sample of its own."""

    def __init__(self, sample: TrajectoryPictures, image: KeptPicture):
        self.images, self.read_size, self.load_image = [image], sample.read_size, sample.load_image


class UnresizedProcessor:
    """A processor that takes pictures as they are: they have been resized."""

    image_size = None

    def __init__(self, processor, settings: dict):
        self.processor, self.settings = processor, settings
        self.image_processor, self.image_token = processor.image_processor, processor.image_token

    def __call__(self, **kwargs):
        return self.processor(**kwargs, **self.settings)

    def fit_size(self, width: int, height: int) -> tuple[int, int]:
        return width, height


class NumberingBlockProcessor(NumberingProcessor):
    """`NumberingProcessor` for chats that may hold latent blocks."""

    def __init__(self, processor, cache: FeatureCache):
        super().__init__(processor, cache)
        self.image_processor, self.latent_tokens = processor.image_processor, processor.latent_tokens
        self.image_token, self.image_token_id = processor.image_token, processor.image_token_id

    def apply_chat_template(self, conversations: list[list[dict]], processor_kwargs: dict, **kwargs) -> dict:
        known = {name: value for name, value in processor_kwargs.items() if name != "resize_images"}
        return super().apply_chat_template(conversations, known, **kwargs)

    def expand(self, texts: Iterable[str]) -> tuple[list[str], dict]:
        """Write out the placeholders of blocks; return the texts, and the grids as inputs of the model."""
        grids: list[tuple[int, int]] = []
        expanded = [self.whole.expand_blocks(row, text, grids) for row, text in enumerate(texts)]
        return expanded, {"latent_grid_hw": torch.tensor(grids)} if grids else {}


def keep_features(
    model, collator, samples: Iterable[dict], limit_gib: float, training_args, others: tuple = ()
) -> FeatureCache:
    """Compute the features of all pictures that a collator shows, and let it, the model and a live teacher look them up.

    Args:
        limit_gib: memory that the features may take.
        training_args: say where and in which precision training computes.
        others: models with the same tower.

    Raises:
        ValueError: the tower trains, the features take more memory, or a picture lies in the data.
    """
    needs_answers = collator.assistant_images == "image" or collator.has_live_teacher
    roles = ROLES if needs_answers else tuple(role for role in ROLES if role != "assistant")
    found = (TrajectoryPictures(sample, collator.sizes, roles) for sample in samples)
    chosen, same = distinct_pictures(found)
    processor = UnresizedProcessor(collator.processor, collator.as_they_are)
    device, half = training_args.device, torch.bfloat16 if training_args.bf16 else torch.float16
    has_half = training_args.bf16 or training_args.fp16
    model.model.visual.to(device)
    cache = encode_pictures(
        model, processor, chosen, limit_gib, lambda: torch.autocast(device.type, half, enabled=has_half)
    )
    cache.numbers |= {kept: cache.numbers[one] for kept, one in same.items()}
    for one in (model, *others):
        cache.install(one)
    collator.look_up(cache)
    return cache
