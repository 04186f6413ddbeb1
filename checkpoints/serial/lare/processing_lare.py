"""Processor of LaRe: text and images to tensors.

An image stands in rendered text as one `<|refocus_image|>`, which becomes one token per patch. `generate` takes the
refocusing steps behind any prompt; where an earlier answer had its own, `{"type": "latent"}` in a message stands for them.
The paper's `<bot>`, `<eot>` and LLaVA's `<image>` are spelled with bars, so that they stay plain text where somebody
writes them.
"""

from .transformers_contract import check_contract
from .text_checks import as_rows


check_contract("processing")  # before the imports below: what they miss is said here


from typing import ClassVar

from transformers.feature_extraction_utils import BatchFeature
from transformers.models.llava.processing_llava import LlavaProcessor

from .configuration_lare import LaReConfig
from .hub_code import HubCodeMixin
from .latent_messages import LatentProcessorMixin


BOT, EOT, IMAGE = REFOCUS_TOKENS = ("<|refocus_start|>", "<|refocus_end|>", "<|refocus_image|>")
# Put before a language model's own template: makes text of lists of text and images, which it does not know.
IMAGE_TEMPLATE = (
    "{%- set refocus = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- if message['content'] is string or not message['content'] -%}"
    "{%- set refocus.messages = refocus.messages + [message] -%}"
    "{%- else -%}{%- set parts = namespace(text='') -%}{%- for item in message['content'] -%}"
    f"{{%- if item['type'] == 'image' -%}}{{%- set parts.text = parts.text + '{IMAGE}\\n' -%}}"
    "{%- elif item['type'] == 'text' -%}{%- set parts.text = parts.text + item['text'] -%}"
    "{%- else -%}{{- raise_exception('LaRe takes text and images, got ' + item['type']) -}}{%- endif -%}"
    "{%- endfor -%}{%- set refocus.messages = refocus.messages + [dict(message, content=parts.text)] -%}"
    "{%- endif -%}{%- endfor -%}{%- set messages = refocus.messages %}"
)


def extend_chat_template(template: str | dict[str, str] | None) -> str | dict[str, str] | None:
    """Teach a language model's chat template images. Text renders as before."""
    if isinstance(template, dict):
        return {name: extend_chat_template(one) for name, one in template.items()}
    if template is None or template.startswith(IMAGE_TEMPLATE):
        return template
    return IMAGE_TEMPLATE + template


def processed_size(image_processor) -> tuple[int | None, int | None]:
    """(height, width) that every picture gets; None where it depends on the picture."""
    size = image_processor.crop_size if getattr(image_processor, "do_center_crop", False) else image_processor.size
    sides = size if isinstance(size, dict) else vars(size)
    return sides.get("height"), sides.get("width")


class LaReProcessor(HubCodeMixin, LatentProcessorMixin, LlavaProcessor):
    """An image processor and any language model's tokenizer.

    Args:
        patch_size: of the vision tower, in pixels. Read from the model's config where the processor is loaded with one.
        image_size: that the vision tower takes, in pixels. Read likewise; by default what the image processor gives.
    """

    hub_classes: ClassVar[dict[str, str]] = {"AutoProcessor": "processing_latentvlm.processing_lare.LaReProcessor"}
    latent_tokens = REFOCUS_TOKENS
    converter = "conversion.convert_lare"
    config_class = LaReConfig
    model_numbers = ("patch_size", "image_size")

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        patch_size: int | None = 14,
        image_size: int | None = None,
    ):
        height, width = processed_size(image_processor)
        wanted = height if image_size is None else image_size
        if height is None or height != width or height != wanted:
            raise ValueError(
                f"The vision tower takes pictures of {wanted} x {wanted} pixels, but the image processor gives "
                f"{'any size' if height is None else f'{height} x {width}'}."
            )
        known = tokenizer.get_vocab()
        missing = [token for token in self.latent_tokens if token not in known]
        if missing:
            raise ValueError(f"The tokenizer must know {missing}: convert the backbone with `{self.converter}`.")
        self.image_size, self.patch_size = wanted, patch_size
        self.image_token, self.image_token_id = IMAGE, known[IMAGE]
        # What LLaVA's counts by: patches alone, whichever other features the tower has.
        self.vision_feature_select_strategy, self.num_additional_image_tokens = "full", 0
        # Not the parent's `__init__`: it asks the tokenizer for its own image token.
        super(LlavaProcessor, self).__init__(
            image_processor, tokenizer, chat_template=extend_chat_template(chat_template or tokenizer.chat_template)
        )

    @classmethod
    def numbers_of(cls, config: LaReConfig) -> dict[str, int]:
        image_size, patch_size = config.tower_sizes
        return {"patch_size": patch_size, "image_size": image_size}

    def __call__(self, images=None, text=None, videos=None, **kwargs) -> BatchFeature:
        """As LLaVA's.

        Raises:
            ValueError: an image cannot be read or is empty, or images and placeholders do not match.
        """
        if videos is not None:
            raise ValueError("LaRe takes images, no videos.")
        if images is not None:
            self.need_number("patch_size")
            images = self.prepare_images(images, kwargs)
        if text is not None:
            self.check_image_count(as_rows(text), images)
        return super().__call__(images=images, text=text, **kwargs)

    def render_latent(self, item: dict) -> str:
        return BOT + EOT


__all__ = ["LaReProcessor"]
