"""Processor of DeepLatent: text, images, videos and latent blocks to tensors.

A block of an earlier answer stands in a message as `{"type": "latent", "grid": [height, width]}` and in rendered text as
`<|latent_start|>4x6<|latent_end|>`: its size travels with the text, through chat templates and data files. The paper's
`<latent>` and `</latent>` are spelled with bars in the vocabulary, so that they stay plain text where somebody writes them.
"""

import re
from typing import Any, ClassVar

import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.utils import is_torchvision_available

from configuration_latentvlm.hub_code import HubCodeMixin


LATENT_START, LATENT_PAD, LATENT_END = LATENT_TOKENS = ("<|latent_start|>", "<|latent_pad|>", "<|latent_end|>")
_BLOCK = re.compile(rf"{re.escape(LATENT_START)}(\d+)x(\d+){re.escape(LATENT_END)}")
_ANY_TOKEN = re.compile("|".join(map(re.escape, LATENT_TOKENS)))


class DeepLatentProcessor(HubCodeMixin, Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor with latent blocks, usable without torchvision (videos alone need it).

    Args:
        num_control_tokens: placeholders of a block besides its latents: 3, or 0 for autoregressive latents.
    """

    hub_classes: ClassVar[dict[str, str]] = {
        "AutoProcessor": "processing_latentvlm.processing_deeplatent.DeepLatentProcessor"
    }

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, num_control_tokens: int = 3):
        self.num_control_tokens = num_control_tokens
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        known = tokenizer.get_vocab()
        missing = [token for token in (*LATENT_TOKENS, self.image_token) if token not in known]
        if missing:
            raise ValueError(
                f"The tokenizer must know {missing}: convert the backbone with `conversion.convert_deeplatent`."
            )
        self.image_token_id, self.video_token_id = known[self.image_token], known.get(self.video_token)
        # Not the parent's `__init__`: it asks for a video processor, which cannot be made without torchvision.
        super(Qwen2_5_VLProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def video_processor(self):
        if not is_torchvision_available():
            raise AttributeError("there is no video processor without torchvision")
        from transformers import Qwen2VLVideoProcessor

        shared = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
        return Qwen2VLVideoProcessor(**{name: getattr(self.image_processor, name) for name in shared})

    def __call__(self, images=None, text=None, videos=None, **kwargs) -> BatchFeature:
        """As Qwen2.5-VL's, plus `latent_grid_hw` (blocks, 2) where the text holds blocks.

        Raises:
            ValueError: an image cannot be read or is empty, or a latent token stands outside a block.
        """
        if videos is not None and not is_torchvision_available():
            raise ImportError("Videos need torchvision, which is not installed; images do not.")
        if images is not None:
            images = self.load_images(images)
        grids: list[tuple[int, int]] = []
        if text is not None:
            rows = [text] if isinstance(text, str) else list(text)
            self.check_image_count(rows, images)
            text = [self.expand_blocks(row, sample, grids) for row, sample in enumerate(rows)]
        features = super().__call__(images=images, text=text, videos=videos, **kwargs)
        if grids:
            features["latent_grid_hw"] = torch.tensor(grids) if "return_tensors" in kwargs else grids
        return features

    def check_image_count(self, rows: list[str], images: Any) -> None:
        """Every placeholder of the text needs an image, and every image a placeholder."""
        asked = [sample.count(self.image_token) for sample in rows]
        nested = isinstance(images, list) and images and all(isinstance(row, list) for row in images)
        given = (
            [len(row) for row in images]
            if nested
            else [len(images) if isinstance(images, list) else 0 if images is None else 1]
        )
        wrong = asked != given if nested and len(given) == len(asked) else sum(asked) != sum(given)
        if wrong:
            raise ValueError(f"The rows of `text` have {asked} image placeholders, but {given} images were given.")

    def expand_blocks(self, row: int, sample: str, grids: list[tuple[int, int]]) -> str:
        """Write out the placeholders of every block and collect the grids."""

        def expand(block: re.Match) -> str:
            height, width = int(block[1]), int(block[2])
            if not height * width:
                raise ValueError(
                    f"Row {row} of `text` holds a latent block of {height} x {width}; both must be at least 1."
                )
            grids.append((height, width))
            return LATENT_START + LATENT_PAD * (self.num_control_tokens + height * width) + LATENT_END

        stray = _ANY_TOKEN.search(_BLOCK.sub("", sample))
        if stray:
            raise ValueError(
                f"Row {row} of `text` holds {stray[0]!r} outside a block. A block is written "
                f'"{LATENT_START}HEIGHTxWIDTH{LATENT_END}", or in a message as {{"type": "latent", "grid": [height, width]}}.'
            )
        return _BLOCK.sub(expand, sample)

    def load_images(self, images: Any, where: str = "") -> Any:
        """Read paths and URLs, keeping the nesting, and refuse what cannot be seen."""
        if isinstance(images, list | tuple):
            return [self.load_images(image, f"{where}[{index}]") for index, image in enumerate(images)]
        try:
            image = self.image_processor.fetch_images(images)
            if isinstance(image, Image.Image):
                image.load()
        except (OSError, ValueError) as error:
            raise ValueError(f"`images{where}` ({str(images)[:200]!r}) cannot be read: {error}") from error
        size = getattr(image, "size", None)
        shape = size if isinstance(size, tuple) else tuple(getattr(image, "shape", (1,)))
        if 0 in shape:
            raise ValueError(f"`images{where}` must have at least one pixel, its size is {shape}.")
        return image

    def apply_chat_template(self, conversation, *args, **kwargs):
        """As in transformers, with `{"type": "latent", "grid": [height, width]}` in assistant messages."""
        batched = bool(conversation) and isinstance(conversation[0], list | tuple)
        rendered = [
            [self.render_message(message) for message in messages]
            for messages in (conversation if batched else [conversation])
        ]
        return super().apply_chat_template(rendered if batched else rendered[0], *args, **kwargs)

    def render_message(self, message: dict) -> dict:
        content = message.get("content")
        if isinstance(content, str):
            check_reserved(content, message)
            return message
        items = []
        for item in content or []:
            if item.get("type") == "latent":
                height, width = item["grid"]
                items.append({"type": "text", "text": f"{LATENT_START}{height}x{width}{LATENT_END}"})
            else:
                check_reserved(item.get("text"), message)
                items.append(item)
        return message | {"content": items}

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "latent_grid_hw"]


def check_reserved(text: Any, message: dict) -> None:
    """Refuse latent tokens in what somebody else than the model wrote: they would act, not be read."""
    if message.get("role") != "assistant" and isinstance(text, str) and (found := _ANY_TOKEN.search(text)):
        raise ValueError(f"A {message.get('role')} message holds {found[0]!r}, which is reserved for the model.")


__all__ = ["DeepLatentProcessor"]
