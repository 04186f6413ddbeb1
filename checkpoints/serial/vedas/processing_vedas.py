"""Processor of Vedas: text, images, videos and latent steps to tensors.

The steps behind a prompt stand in a message as `{"type": "latent", "steps": T}` at the start of an assistant turn, and in
rendered text as T times `<|latent|>`. `generate` needs none of them: it takes the steps behind any prompt.
"""

from .transformers_contract import check_contract
from .text_checks import is_whole_number


check_contract("processing")  # before the imports below: what they miss is said here


from typing import ClassVar

from .configuration_vedas import VedasConfig
from .processing_qwen import QwenLatentProcessor


LATENT_TOKEN = "<|latent|>"


class VedasProcessor(QwenLatentProcessor):
    """Qwen-VL's processor with latent steps. The arguments are those of `QwenLatentProcessor`."""

    hub_classes: ClassVar[dict[str, str]] = {"AutoProcessor": "processing_latentvlm.processing_vedas.VedasProcessor"}
    latent_tokens = (LATENT_TOKEN,)
    converter = "conversion.convert_vedas"
    config_class = VedasConfig

    # Written out, because what a processor saves are the arguments that its own `__init__` names.
    def __init__(
        self, image_processor=None, tokenizer=None, chat_template=None, image_size=None, trained_image_sizes=None
    ):
        super().__init__(image_processor, tokenizer, chat_template, image_size, trained_image_sizes)

    def render_latent(self, item: dict) -> str:
        steps = item.get("steps")
        if not is_whole_number(steps, 0):
            raise ValueError(f"`steps` of a latent item must be a whole number >= 0, got {steps!r}.")
        self.check_num_latents(steps, f"A latent item with `steps` {steps}")
        return LATENT_TOKEN * steps


__all__ = ["VedasProcessor"]
