"""What the processors on Qwen-VL backbones share: no need of torchvision."""

from .transformers_contract import check_contract
from .text_checks import as_rows


check_contract("processing")  # before the imports below: what they miss is said here


from transformers.feature_extraction_utils import BatchFeature
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.utils import is_torchvision_available

from .hub_code import HubCodeMixin
from .latent_messages import LatentProcessorMixin


class QwenLatentProcessor(HubCodeMixin, LatentProcessorMixin, Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor with tokens of ours, usable without torchvision (videos alone need it)."""

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
            self.check_image_count(as_rows(text), images)
        return super().__call__(images=images, text=text, videos=videos, **kwargs)
