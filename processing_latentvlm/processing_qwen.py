"""What the processors on Qwen-VL backbones share: images that can be seen, and no need of torchvision."""

from typing import Any

from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.utils import is_torchvision_available

from configuration_latentvlm.hub_code import HubCodeMixin


class QwenLatentProcessor(HubCodeMixin, Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor with tokens of ours, usable without torchvision (videos alone need it).

    A subclass names them in `latent_tokens`. They act, so nobody but the model may write them.
    """

    latent_tokens: tuple[str, ...] = ()
    converter = ""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        known = tokenizer.get_vocab()
        missing = [token for token in (*self.latent_tokens, self.image_token) if token not in known]
        if missing:
            raise ValueError(f"The tokenizer must know {missing}: convert the backbone with `{self.converter}`.")
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
        """As Qwen2.5-VL's.

        Raises:
            ValueError: an image cannot be read or is empty, or images and placeholders do not match.
        """
        if videos is not None and not is_torchvision_available():
            raise ImportError("Videos need torchvision, which is not installed; images do not.")
        if images is not None:
            images = self.load_images(images)
        if text is not None:
            self.check_image_count([text] if isinstance(text, str) else list(text), images)
        return super().__call__(images=images, text=text, videos=videos, **kwargs)

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
        """As in transformers, with the items of `render_latent` in assistant messages."""
        batched = bool(conversation) and isinstance(conversation[0], list | tuple)
        rendered = [
            [self.render_message(message) for message in messages]
            for messages in (conversation if batched else [conversation])
        ]
        return super().apply_chat_template(rendered if batched else rendered[0], *args, **kwargs)

    def render_message(self, message: dict) -> dict:
        content = message.get("content")
        if isinstance(content, str):
            self.check_reserved(content, message)
            return message
        items = []
        for item in content or []:
            if item.get("type") == "latent":
                items.append({"type": "text", "text": self.render_latent(item)})
            else:
                self.check_reserved(item.get("text"), message)
                items.append(item)
        return message | {"content": items}

    def render_latent(self, item: dict) -> str:
        """The text of a `{"type": "latent", ...}` item."""
        raise NotImplementedError

    def check_reserved(self, text: Any, message: dict) -> None:
        """Refuse latent tokens in what somebody else than the model wrote: they would act, not be read."""
        if message.get("role") == "assistant" or not isinstance(text, str):
            return
        found = [token for token in self.latent_tokens if token in text]
        if found:
            raise ValueError(f"A {message.get('role')} message holds {found[0]!r}, which is reserved for the model.")
