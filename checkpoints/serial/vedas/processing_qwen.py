"""What the processors on Qwen-VL backbones share: no need of torchvision."""

from .transformers_contract import check_contract
from .text_checks import as_rows


check_contract("processing")  # before the imports below: what they miss is said here


from collections.abc import Iterable
from typing import Any

from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.utils import is_torchvision_available, logging

from .hub_code import HubCodeMixin
from .latent_messages import LatentProcessorMixin


logger = logging.get_logger(__name__)


class QwenLatentProcessor(HubCodeMixin, LatentProcessorMixin, Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor with tokens of ours, usable without torchvision (videos alone need it).

    Args:
        image_size: pixels, a multiple of a merged patch: every picture is resized as a whole to a square of so many, as a
            model wants it that has seen no other size. By default a picture keeps its size within the image processor's limits.
        trained_image_sizes: the least and the largest (height, width) in pixels, as the model gets them, of the pictures of
            questions in training. Other sizes are warned of once. None: not known.
    """

    def __init__(
        self, image_processor=None, tokenizer=None, chat_template=None, image_size=None, trained_image_sizes=None
    ):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        known = tokenizer.get_vocab()
        missing = [token for token in (*self.latent_tokens, self.image_token) if token not in known]
        if missing:
            raise ValueError(f"The tokenizer must know {missing}: convert the backbone with `{self.converter}`.")
        self.image_token_id, self.video_token_id = known[self.image_token], known.get(self.video_token)
        # Not the parent's `__init__`: it asks for a video processor, which cannot be made without torchvision.
        super(Qwen2_5_VLProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_size, self.trained_image_sizes, self._has_warned = image_size, trained_image_sizes, False
        if image_size is not None:
            self.check_image_size(image_size)
        if trained_image_sizes is not None:
            self.check_trained_sizes(trained_image_sizes)

    def check_image_size(self, size: Any) -> None:
        """Raise unless the image processor leaves a square of `size` pixels as it is."""
        if (
            not isinstance(size, int)
            or isinstance(size, bool)
            or size < 1
            or self.fit_size(size, size) != (size, size)
        ):
            factor = self.image_processor.patch_size * self.image_processor.merge_size
            raise ValueError(
                f"`image_size` must be a multiple of {factor} pixels within the image processor's limits "
                f"({self.image_processor.size}), got {size!r}."
            )

    @staticmethod
    def check_trained_sizes(sizes: Any) -> None:
        is_pair = isinstance(sizes, list | tuple) and len(sizes) == 2
        if not is_pair or not all(
            isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(side, int) for side in size)
            for size in sizes
        ):
            raise ValueError(
                f"`trained_image_sizes` must be the least and the largest [height, width], got {str(sizes)[:200]}."
            )

    def fit_size(self, width: int, height: int) -> tuple[int, int]:
        """The (height, width) in pixels that the image processor makes of a picture."""
        images = self.image_processor
        limits = images.size if isinstance(images.size, dict) else vars(images.size)
        factor = images.patch_size * images.merge_size
        return smart_resize(height, width, factor, limits["shortest_edge"], limits["longest_edge"])

    def add_trained_sizes(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Take down that the model is trained with pictures of (width, height) pixels."""
        found = set(sizes)
        if self.image_size is not None and found:
            found = {(self.image_size, self.image_size)}
        pairs = [self.fit_size(*size) for size in found] + [tuple(size) for size in self.trained_image_sizes or []]
        if pairs:
            heights, widths = zip(*pairs)
            self.trained_image_sizes = [[min(heights), min(widths)], [max(heights), max(widths)]]

    def resize_to_square(self, images: Any) -> Any:
        """All pictures as squares of `image_size`; arrays that the caller wants untouched stay."""
        if isinstance(images, list):
            return [self.resize_to_square(image) for image in images]
        target = (self.image_size, self.image_size)
        if not isinstance(images, Image.Image) or images.size == target:
            return images
        return images.resize(target, Image.Resampling.BICUBIC)

    def warn_of_sizes(self, grids: Any) -> None:
        """Say once that a picture is larger or smaller than any in training: answers may be wrong, and nothing else shows it.

        Args:
            grids: (frames, height, width) in patches, for every picture.
        """
        if self._has_warned or self.trained_image_sizes is None:
            return
        (low, left), (high, right) = self.trained_image_sizes
        for _, *patches in grids.tolist() if hasattr(grids, "tolist") else grids:
            height, width = (int(side) * self.image_processor.patch_size for side in patches)
            if not (low <= height <= high and left <= width <= right):
                self._has_warned = True
                trained = f"{low} x {left}" + (f" to {high} x {right}" if (low, left) != (high, right) else "")
                logger.warning(
                    f"A picture reaches the model with {height} x {width} pixels, but the model was trained with {trained}: its "
                    "answers may be wrong. `processor.image_size = SIDE` resizes every picture to a square."
                )
                return

    @property
    def video_processor(self):
        if not is_torchvision_available():
            raise AttributeError("there is no video processor without torchvision")
        from transformers import Qwen2VLVideoProcessor

        shared = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
        return Qwen2VLVideoProcessor(**{name: getattr(self.image_processor, name) for name in shared})

    def __call__(self, images=None, text=None, videos=None, resize_images: bool = True, **kwargs) -> BatchFeature:
        """As Qwen2.5-VL's.

        Args:
            resize_images: to `image_size`, where the processor has one. False is for who has resized them.

        Raises:
            ValueError: an image cannot be read or is empty, or images and placeholders do not match.
        """
        if videos is not None and not is_torchvision_available():
            raise ImportError("Videos need torchvision, which is not installed; images do not.")
        if images is not None:
            images = self.prepare_images(images, kwargs)
            if resize_images and self.image_size is not None:
                images = self.resize_to_square(images)
        if text is not None:
            self.check_image_count(as_rows(text), images)
        features = super().__call__(images=images, text=text, videos=videos, **kwargs)
        if resize_images and "image_grid_thw" in features:
            self.warn_of_sizes(features["image_grid_thw"])
        return features
