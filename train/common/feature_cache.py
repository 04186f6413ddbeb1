"""Features of a frozen vision tower, computed once: a picture that is asked about many times is decoded and encoded once.

The tower's features of all pictures are kept in main memory. A batch holds, in place of pixels, the number of each picture, and
the model's `get_image_features` looks them up. Losses and gradients stay what they were: a frozen tower gives the same features
every time. Pixels, such as the crops of `train/vedas/crop_distillation.py`, still go through the tower.

The memory is tokens of all pictures x width x bytes of a number, on every process: 48 MB for 6000 pictures of 16 tokens of width
128, but 9 MB a picture for 1280 tokens of width 3584 in bfloat16.
"""

import copy
from collections.abc import Callable, Iterable
from time import perf_counter

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from train.data.reasoning_data import ReasoningSample


BATCH = 16  # pictures that are encoded together


def picture_key(image: str | Image.Image):
    """What tells pictures apart: the path, or the object of one that a sample holds."""
    return image if isinstance(image, str) else id(image)


def check_room(count: int, needed: int, limit_gib: float) -> None:
    """Raise a `ValueError` where the features of `count` pictures take more than `limit_gib`; `needed` is in bytes."""
    if needed > limit_gib * 2**30:
        raise ValueError(
            f"The features of {count} pictures take {needed / 2**30:.3g} GiB, but `cache_image_features` is {limit_gib:g}."
        )


def check_dropout(model: nn.Module) -> None:
    """Raise a `ValueError` where the tower drops some of its attention: it would give other features at the next step."""
    if getattr(model.config.vision_config, "attention_dropout", 0):
        raise ValueError("Features cannot be kept of a vision tower with attention dropout.")


def tell_kept(count: int, needed: int, start: float) -> None:
    """Say what is kept, and how long that took since `start` (of `perf_counter`)."""
    seconds = perf_counter() - start
    print(f"Kept the features of {count} pictures: {needed / 2**20:.1f} MiB, {seconds:.0f} seconds.", flush=True)


class FeatureCache:
    """The features of numbered pictures.

    Args:
        features: by picture (tokens, D), on the CPU.
        grids: (pictures, 3) frames, rows and columns in patches.
        merge_size: patches along a side of one token.
    """

    def __init__(self, keys: Iterable, features: list[Tensor], grids: Tensor, merge_size: int):
        self.numbers = {key: number for number, key in enumerate(keys)}
        self.features, self.grids, self.merge_size = features, grids, merge_size

    def processor(self, processor) -> "NumberingProcessor":
        return NumberingProcessor(processor, self)

    def install(self, model: nn.Module) -> None:
        """Let a model on a Qwen-VL backbone look features up."""
        encode = model.model.get_image_features

        def look_up(pixel_values: Tensor, image_grid_thw: Tensor | None = None, **kwargs):
            if pixel_values.is_floating_point():
                return encode(pixel_values, image_grid_thw, **kwargs)
            firsts = image_grid_thw.prod(dim=-1).cumsum(0).roll(1)
            firsts[0] = 0
            found = [self.features[number] for number in pixel_values[firsts, 0].tolist()]
            return BaseModelOutputWithPooling(pooler_output=tuple(one.to(pixel_values.device) for one in found))

        model.model.get_image_features = look_up


class NumberingProcessor:
    """In place of a processor that makes batches of chats: the same tensors, but numbers of pictures in place of pixels."""

    def __init__(self, processor, cache: FeatureCache):
        self.whole, self.cache, self.tokenizer = processor, cache, processor.tokenizer

    def apply_chat_template(
        self, conversations: list[list[dict]], processor_kwargs: dict, **kwargs
    ) -> dict[str, Tensor]:
        contents = [message["content"] for messages in conversations for message in messages]
        items = [item for content in contents if not isinstance(content, str) for item in content]
        pictures = [picture_key(item["image"]) for item in items if item["type"] == "image"]
        numbers = torch.tensor([self.cache.numbers[key] for key in pictures], dtype=torch.long)
        grids = self.cache.grids[numbers]
        texts = self.whole.apply_chat_template(
            [list(map(without_image, one)) for one in conversations], tokenize=False
        )
        texts, more = self.expand(texts)
        counts = iter((grids.prod(dim=-1) // self.cache.merge_size**2).tolist())
        token = self.whole.image_token
        parts = [text.split(token) for text in texts]
        texts = ["".join([first, *(token * next(counts) + part for part in rest)]) for first, *rest in parts]
        inputs = dict(self.tokenizer(texts, return_tensors="pt", **processor_kwargs))
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.whole.image_token_id).long()
        if len(numbers):
            inputs["pixel_values"] = numbers.repeat_interleave(grids.prod(dim=-1))[:, None]
            inputs["image_grid_thw"] = grids
        return inputs | more

    def expand(self, texts: list[str]) -> tuple[list[str], dict[str, Tensor]]:
        """What the processor itself makes of rendered texts, and further inputs that it reads off them."""
        return texts, {}


def without_image(message: dict) -> dict:
    if isinstance(message["content"], str):
        return message
    content = [{"type": "image"} if item["type"] == "image" else item for item in message["content"]]
    return message | {"content": content}


def check_frozen(model: nn.Module) -> None:
    """Raise where the tower would give other features at the next step.

    Raises:
        ValueError: its weights train, or it drops some of its attention.
    """
    if any(parameter.requires_grad for parameter in model.model.visual.parameters()):
        raise ValueError("Features can be kept of a frozen vision tower only: add `--freeze_vision` (or `--lora`).")
    check_dropout(model)


def count_bytes(model: nn.Module, processor, sizes: Iterable[tuple[int, int]], itemsize: int) -> int:
    """What the features of pictures of (width, height) pixels take."""
    side = processor.image_processor.patch_size * processor.image_processor.merge_size
    square = processor.image_size and (processor.image_size, processor.image_size)
    areas = (square or processor.fit_size(*size) for size in sizes)
    tokens = sum(height * width // side**2 for height, width in areas)
    return tokens * model.config.get_text_config().hidden_size * itemsize


@torch.no_grad()
def encode_pictures(
    model: nn.Module,
    processor,
    samples: Iterable[ReasoningSample],
    limit_gib: float,
    context: Callable,
) -> FeatureCache:
    """Compute the features of all pictures of samples by a model on a Qwen-VL backbone.

    Args:
        limit_gib: memory that the features may take.
        context: makes the context in which training computes (autocast).

    Raises:
        ValueError: the tower trains, or the features take more memory.
    """
    check_frozen(model)
    owners = {picture_key(image): (sample, image) for sample in samples for image in sample.images}
    if not owners:
        raise ValueError("There is no picture whose features could be kept.")
    sizes = [sample.read_size(image) for sample, image in owners.values()]
    needed = count_bytes(model, processor, sizes, torch.finfo(model.dtype).bits // 8)
    check_room(len(owners), needed, limit_gib)
    start, features, grids = perf_counter(), [], []
    pictures, device = list(owners.values()), next(model.model.visual.parameters()).device
    # A copy: warnings about sizes, which a run says once, are for the batches of others.
    encoder = copy.copy(processor)
    for first in tqdm(range(0, len(pictures), BATCH), desc="encoding pictures", leave=False):
        images = [sample.load_image(image) for sample, image in pictures[first : first + BATCH]]
        inputs = encoder(images=images, text=[encoder.image_token] * len(images), return_tensors="pt", padding=True)
        pixels, grid = inputs["pixel_values"].to(device), inputs["image_grid_thw"].to(device)
        with context():
            output = model.model.get_image_features(pixels, grid, return_dict=True)
        features += [one.cpu() for one in output.pooler_output]
        grids.append(inputs["image_grid_thw"])
    tell_kept(len(features), needed, start)
    return FeatureCache(owners, features, torch.cat(grids), processor.image_processor.merge_size)
