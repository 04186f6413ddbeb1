"""Features of LaRe's vision tower, computed once: a picture that is asked about many times is decoded and encoded once.

The tower is frozen in all stages, but the projector learns: what is kept are the features that the projector reads. A batch
holds the numbers of its pictures beside pixels that are all zero and take no memory. Losses and gradients stay what they were.
`train/common/feature_cache.py` does the same for models on a Qwen-VL backbone.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from train.common.feature_cache import check_dropout, check_room, picture_key, tell_kept
from train.data.reasoning_data import ReasoningSample
from train.lare.data import Conversation, image_key


BATCH = 32  # pictures that are encoded together


class TowerCache:
    """The features of pictures.

    Args:
        names: what tells pictures apart: paths, or the numbers of objects in memory (`picture_key`).
        features: (pictures, tokens, size), on the CPU.
        keys: by picture, equal where pictures are.
    """

    def __init__(self, names: Iterable, features: Tensor, keys: list[int]):
        self.numbers = {name: number for number, name in enumerate(names)}
        self.features, self.keys = features, keys
        self._shown: Tensor | None = None

    def find(self, images: list) -> list[int]:
        """The numbers of pictures."""
        return [self.numbers[picture_key(image)] for image in images]

    @contextmanager
    def showing(self, numbers: Tensor | None) -> Iterator[None]:
        """Let a forward see the pictures of these numbers, in place of its pixels; None: its pixels."""
        self._shown = numbers
        try:
            yield
        finally:
            self._shown = None

    def install(self, model: nn.Module) -> None:
        """Let a model look features up."""
        encode = model.model.get_image_features

        def look_up(pixel_values: Tensor, **kwargs):
            if self._shown is None:
                return encode(pixel_values, **kwargs)
            features = self.features[self._shown.cpu()].to(pixel_values)
            return BaseModelOutputWithPooling(pooler_output=list(model.model.multi_modal_projector(features)))

        model.model.get_image_features = look_up


@contextmanager
def without_projector(model: nn.Module) -> Iterator[None]:
    projector, model.model.multi_modal_projector = model.model.multi_modal_projector, nn.Identity()
    try:
        yield
    finally:
        model.model.multi_modal_projector = projector


@torch.no_grad()
def encode_pictures(
    model: nn.Module,
    image_processor,
    rows: Iterable[Conversation | ReasoningSample],
    limit_gib: float,
    context: Callable,
) -> TowerCache:
    """Compute the features of all pictures of rows.

    Args:
        limit_gib: memory that the features may take, in GiB.
        context: makes the context in which training computes (autocast).

    Raises:
        ValueError: there is no picture, the tower drops some of its attention, or the features take more memory.
    """
    owners = {picture_key(image): (row, number) for row in rows for number, image in enumerate(row.images)}
    if not owners:
        raise ValueError("There is no picture whose features could be kept.")
    check_dropout(model)
    pictures, features, keys, start = list(owners.values()), [], [], perf_counter()
    tower = next(model.model.vision_tower.parameters())
    for first in tqdm(range(0, len(pictures), BATCH), desc="encoding pictures", leave=False):
        images = [row.load_image(row.images[number]) for row, number in pictures[first : first + BATCH]]
        keys += [image_key([image]) for image in images]
        pixels = image_processor(images, return_tensors="pt")["pixel_values"].to(tower)
        with without_projector(model), context():
            found = torch.stack(list(model.model.get_image_features(pixels, return_dict=True).pooler_output)).cpu()
        needed = len(pictures) * found[0].nbytes
        check_room(len(pictures), needed, limit_gib)
        features.append(found)
    tell_kept(len(pictures), needed, start)
    return TowerCache(owners, torch.cat(features), keys)
