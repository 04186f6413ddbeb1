"""Processor of DeepLatent: text, images, videos and latent blocks to tensors.

A block of an earlier answer stands in a message as `{"type": "latent", "grid": [height, width]}` and in rendered text as
`<|latent_start|>4x6<|latent_end|>`: its size travels with the text, through chat templates and data files. The paper's
`<latent>` and `</latent>` are spelled with bars in the vocabulary, so that they stay plain text where somebody writes them.
"""

from .transformers_contract import check_contract
from .text_checks import as_rows, is_whole_number


check_contract("processing")  # before the imports below: what they miss is said here


import re
from typing import ClassVar

import torch
from transformers.feature_extraction_utils import BatchFeature

from .configuration_deeplatent import DeepLatentConfig
from .processing_qwen import QwenLatentProcessor


LATENT_START, LATENT_PAD, LATENT_END = LATENT_TOKENS = ("<|latent_start|>", "<|latent_pad|>", "<|latent_end|>")
_BLOCK = re.compile(rf"{re.escape(LATENT_START)}(\d+)x(\d+){re.escape(LATENT_END)}")
_ANY_TOKEN = re.compile("|".join(map(re.escape, LATENT_TOKENS)))


class DeepLatentProcessor(QwenLatentProcessor):
    """Qwen2.5-VL's processor with latent blocks.

    Args:
        num_control_tokens: placeholders of a block besides its latents: 3, or 0 for autoregressive latents. Read from the
            model's config where the processor is loaded with one.
        image_size, trained_image_sizes: see `QwenLatentProcessor`.
    """

    hub_classes: ClassVar[dict[str, str]] = {
        "AutoProcessor": "processing_latentvlm.processing_deeplatent.DeepLatentProcessor"
    }
    latent_tokens = LATENT_TOKENS
    converter = "conversion.convert_deeplatent"
    config_class = DeepLatentConfig
    model_numbers = ("num_control_tokens",)

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        num_control_tokens: int | None = 3,
        image_size=None,
        trained_image_sizes=None,
    ):
        self.num_control_tokens = num_control_tokens
        super().__init__(image_processor, tokenizer, chat_template, image_size, trained_image_sizes)

    @classmethod
    def numbers_of(cls, config: DeepLatentConfig) -> dict[str, int]:
        return {"num_control_tokens": config.num_control_tokens}

    def __call__(self, images=None, text=None, videos=None, **kwargs) -> BatchFeature:
        """As Qwen2.5-VL's, plus `latent_grid_hw` (blocks, 2) where the text holds blocks.

        Raises:
            ValueError: an image cannot be read or is empty, or a latent token stands outside a block.
        """
        grids: list[tuple[int, int]] = []
        rows = [] if text is None else as_rows(text)
        if text is not None:
            text = [self.expand_blocks(row, sample, grids) for row, sample in enumerate(rows)]
        features = super().__call__(images=images, text=text, videos=videos, **kwargs)
        if grids and "text_replacement_offsets" in features:
            offsets = features["text_replacement_offsets"] or [[] for _ in rows]
            features["text_replacement_offsets"] = [
                self.add_blocks(sample, replaced) for sample, replaced in zip(rows, offsets)
            ]
        if grids:
            features["latent_grid_hw"] = torch.tensor(grids) if "return_tensors" in kwargs else grids
        return features

    def expand_blocks(self, row: int, sample: str, grids: list[tuple[int, int]]) -> str:
        """Write out the placeholders of every block and collect the grids."""

        def expand(block: re.Match) -> str:
            height, width = int(block[1]), int(block[2])
            if not height * width:
                raise ValueError(
                    f"Row {row} of `text` holds a latent block of {height} x {width}; both must be at least 1."
                )
            self.check_num_latents(height * width, f"A latent block of {height} x {width} in row {row} of `text`")
            grids.append((height, width))
            controls = self.need_number("num_control_tokens")
            return LATENT_START + LATENT_PAD * (controls + height * width) + LATENT_END

        stray = _ANY_TOKEN.search(_BLOCK.sub("", sample))
        if stray:
            raise ValueError(
                f"Row {row} of `text` holds {stray[0]!r} outside a block. A block is written "
                f'"{LATENT_START}HEIGHTxWIDTH{LATENT_END}", or in a message as {{"type": "latent", "grid": [height, width]}}.'
            )
        return _BLOCK.sub(expand, sample)

    def add_blocks(self, sample: str, replaced: list[dict]) -> list[dict]:
        """Put a row's blocks among the images that were written out, for masks that are given by characters.

        `span` becomes the place in `sample`, as it was rendered; `new_span` is the place in what was tokenized.
        """
        expanded = [(block, len(self.expand_blocks(0, block[0], []))) for block in _BLOCK.finditer(sample)]
        gains = [(block.end(), length - len(block[0])) for block, length in expanded]
        merged = []
        for entry in replaced:  # images stand in the text with the blocks written out
            start, end = entry["span"]
            gained = 0
            for block_end, gain in gains:
                gained += gain if block_end + gained + gain <= start else 0
            merged.append(entry | {"span": (start - gained, end - gained)})
        for block, length in expanded:
            before = sum(gain for end, gain in gains if end <= block.start())
            before += sum(
                (entry["new_span"][1] - entry["new_span"][0]) - (entry["span"][1] - entry["span"][0])
                for entry in merged
                if entry["span"][1] <= block.start() and entry["type"] != "latent"
            )
            start = block.start() + before
            merged.append({"type": "latent", "span": block.span(), "new_span": (start, start + length)})
        return sorted(merged, key=lambda entry: entry["span"])

    def render_latent(self, item: dict) -> str:
        grid = item.get("grid")
        if not isinstance(grid, list | tuple) or len(grid) != 2 or not all(is_whole_number(side, 1) for side in grid):
            raise ValueError(
                f"`grid` of a latent item must be two whole numbers >= 1, height and width, got {grid!r}."
            )
        height, width = grid
        return f"{LATENT_START}{height}x{width}{LATENT_END}"

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "latent_grid_hw"]


__all__ = ["DeepLatentProcessor"]
