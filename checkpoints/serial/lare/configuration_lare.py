"""Configuration of LaRe: every number of the architecture, validated.

Paper: Multimodal Reasoning via Latent Refocusing (`modeling_lare.py` says how it works).
"""

from .transformers_contract import check_contract


check_contract("configuration")  # before the imports below: what they miss is said here


from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.models.llava.configuration_llava import LlavaConfig

from .backbone_fields import check_backbone_fields
from .hub_code import HubCodeMixin, __version__
from .latent_architecture import LatentArchitectureMixin
from .model_card import write_model_card


_MODEL = "modeling_latentvlm.modeling_lare.LaReForCausalLM"
LANGUAGE_MODELS = ("llama", "qwen2", "qwen3")
NUM_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}  # features of a tower that belong to no patch
CLIP_VIT_L_14 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 768,
}


@strict
class LaReConfig(LatentArchitectureMixin, HubCodeMixin, LlavaConfig):
    r"""
    Configuration of [`LaReForCausalLM`]. Every field of LLaVA keeps its meaning.

    Between prompt and answer stand N refocusing steps, `<bot> Z_1 .. Z_N <eot>`, each of K latents.

    Args:
        bot_token_id (`int`, *optional*, defaults to 32001), eot_token_id (`int`, *optional*, defaults to 32002):
            Ids of `<bot>` and `<eot>`, which enclose the latents. Side by side in `input_ids` they say where latents go.
        num_refocus_steps (`int`, *optional*, defaults to 4):
            N. `0` is the plain backbone: no latents, and neither `<bot>` nor `<eot>`. May be set after loading.
        max_refocus_steps (`int`, *optional*, defaults to 8):
            Most steps that a model may take; with `adaptive_stop`, where a row that does not converge is cut off.
        adaptive_stop (`str`, *optional*):
            `"cosine"`, `"l1"` or `"l2"`: a row stops when its mean latent changes less than `stop_threshold` from one step
            to the next, by one minus the cosine or by the distance relative to the norm of the earlier one. `None`: never.
        stop_threshold (`float`, *optional*, defaults to 0.1):
            See `adaptive_stop`.
        use_window (`bool`, *optional*, defaults to `True`):
            Whether a step looks at a window of the image, or at all of its tokens.
        window_size (`int`, *optional*, defaults to 8):
            Side of the window in image tokens.
        num_windows (`int`, *optional*, defaults to 1):
            Windows per step; each further one counts only tokens that the earlier ones left.
        use_extractor (`bool`, *optional*, defaults to `True`):
            Whether the Extractor makes the latents. Without, they are the hidden states: `Z_i = H_i`.
        extractor_hidden_size (`int`, *optional*, defaults to 1536), extractor_num_heads (`int`, *optional*, defaults to 12),
        extractor_num_layers (`int`, *optional*, defaults to 2):
            Size of the Extractor.
        extractor_intermediate_size (`int`, *optional*):
            Width of its feed-forward network; four times `extractor_hidden_size` by default.
        latent_tokens_per_step (`int`, *optional*):
            K, by attention pooling. `None`: one latent per decoder layer.
        latent_rms (`float`, *optional*):
            Root mean square of what the Extractor gives: that of the token embeddings, which conversion measures; by
            default the one they start with.
        backprop_through_latents (`bool`, *optional*, defaults to `True`):
            Whether gradients flow from a step into the forward that its hidden states came from.
        answer_sees_image (`bool`, *optional*, defaults to `True`):
            Whether the answer attends to the images that stand before the latents. Without, it starts on a cache of its own that
            holds the prompt's text and the latents, so that the latents are all it knows of those images. With no steps taken
            the model is the plain backbone, whose answer sees the images, whatever this says. Not in the paper.
        base_model (`str`, *optional*), base_model_license (`str`, *optional*), base_vision_tower (`str`, *optional*),
        latentvlm_version (`str`, *optional*):
            For the model card and the record.
    """

    model_type = "lare"
    hub_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_latentvlm.configuration_lare.LaReConfig",
        "AutoProcessor": "processing_latentvlm.processing_lare.LaReProcessor",
        "AutoModel": _MODEL,
        "AutoModelForCausalLM": _MODEL,
        "AutoModelForImageTextToText": _MODEL,
    }
    latent_unit = "step"
    latent_count_field = "num_refocus_steps"
    latent_modules = ("refocus",)
    frozen_modules = ("vision_tower",)
    latent_token_fields = ("bot_token_id", "eot_token_id")
    latent_marker_fields = ("bot_token_id", "eot_token_id")
    training_command = "train.train_lare"
    chat_collator = "train.lare.data.RefocusingChatCollator"
    reconstructs_images = True

    bot_token_id: int = 32001
    eot_token_id: int = 32002
    num_refocus_steps: int = 4
    max_refocus_steps: int = 8
    adaptive_stop: str | None = None
    stop_threshold: float = 0.1
    use_window: bool = True
    window_size: int = 8
    num_windows: int = 1
    use_extractor: bool = True
    extractor_hidden_size: int = 1536
    extractor_num_heads: int = 12
    extractor_num_layers: int = 2
    extractor_intermediate_size: int | None = None
    latent_tokens_per_step: int | None = None
    latent_rms: float | None = None
    backprop_through_latents: bool = True
    answer_sees_image: bool = True
    base_model: str | None = None
    base_model_license: str | None = None
    base_vision_tower: str | None = None
    latentvlm_version: str = __version__

    def __post_init__(self, **kwargs):
        if self.vision_config is None:
            self.vision_config = dict(CLIP_VIT_L_14)
        if self.text_config is None:
            self.text_config = {"model_type": "llama", "vocab_size": 32064}
        super().__post_init__(**kwargs)
        if self.extractor_intermediate_size is None:
            self.extractor_intermediate_size = 4 * self.extractor_hidden_size
        if self.latent_rms is None:
            self.latent_rms = float(getattr(self.text_config, "initializer_range", 0.02))
        if self.vision_config.model_type in NUM_CLASS_TOKENS:
            self.image_seq_length = self.image_grid_size**2

    def to_json_file(self, json_file_path, *args, **kwargs) -> None:
        self.latentvlm_version = __version__  # whichever wrote the checkpoint that this config was read from
        super().to_json_file(json_file_path, *args, **kwargs)
        write_model_card(self, Path(json_file_path).parent)

    @property
    def latent_count_limit(self) -> int:
        return self.max_refocus_steps

    def step_tokens(self) -> list[int]:
        return self.marker_ids  # side by side they say where latents go, whatever their number

    def limit_latents(self, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
        most = max(count, self.max_refocus_steps)
        return {"max_refocus_steps": most, "num_refocus_steps": count, "adaptive_stop": None}, {}

    @property
    def tower_sizes(self) -> tuple[int, int]:
        """Side of the vision tower's images and of its patches, in pixels.

        Raises:
            ValueError: the tower's images or patches are not square.
        """
        sides = []
        for name in ("image_size", "patch_size"):
            size = getattr(self.vision_config, name)
            height, width = (size, size) if isinstance(size, int) else size
            if height != width:
                raise ValueError(f"`vision_config.{name}` must be square, got {height} x {width}.")
            if height < 1:
                raise ValueError(f"`vision_config.{name}` must be >= 1, got {height}.")
            sides.append(height)
        return tuple(sides)

    @property
    def image_grid_size(self) -> int:
        """Side of an image's grid of tokens."""
        image, patch = self.tower_sizes
        return image // patch

    @property
    def num_step_latents(self) -> int:
        """K: latents of one step."""
        return self.latent_tokens_per_step or self.text_config.num_hidden_layers

    @property
    def step_limit(self) -> int:
        """Steps that no row exceeds."""
        if self.adaptive_stop is None or self.num_refocus_steps == 0:
            return self.num_refocus_steps
        return self.max_refocus_steps

    def validate_refocus_sizes(self):
        """Part of `@strict`-powered validation."""
        at_least = {
            "num_refocus_steps": 0,
            "max_refocus_steps": 1,
            "window_size": 1,
            "num_windows": 1,
            "extractor_hidden_size": 1,
            "extractor_num_heads": 1,
            "extractor_num_layers": 1,
            "extractor_intermediate_size": 1,
            "latent_tokens_per_step": 1,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be >= {least}, got {value}.")
        if self.num_refocus_steps > self.max_refocus_steps:
            raise ValueError(
                f"`num_refocus_steps` ({self.num_refocus_steps}) must be at most `max_refocus_steps` "
                f"({self.max_refocus_steps})."
            )
        for name in ("latent_rms", "stop_threshold"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must be > 0 and finite, got {getattr(self, name)}.")

    def validate_extractor(self):
        """Part of `@strict`-powered validation."""
        # Validators run in no order of ours: the sizes may not have been looked at yet.
        if self.extractor_num_heads < 1 or self.extractor_hidden_size % self.extractor_num_heads:
            raise ValueError(
                f"`extractor_num_heads` ({self.extractor_num_heads}) must divide `extractor_hidden_size` "
                f"({self.extractor_hidden_size})."
            )
        if not self.use_extractor and self.latent_tokens_per_step is not None:
            raise ValueError(
                f"`latent_tokens_per_step` ({self.latent_tokens_per_step}) needs `use_extractor`: without it the latents "
                "are the hidden states of all layers."
            )

    def validate_adaptive_stop(self):
        """Part of `@strict`-powered validation."""
        if self.adaptive_stop not in (None, "cosine", "l1", "l2"):
            raise ValueError(
                f"`adaptive_stop` must be one of (None, 'cosine', 'l1', 'l2'), got {self.adaptive_stop!r}."
            )

    def validate_language_model(self):
        """Part of `@strict`-powered validation."""
        check_backbone_fields(self)
        kind = self.text_config.model_type
        if kind not in LANGUAGE_MODELS:
            raise ValueError(f"`text_config.model_type` must be one of {LANGUAGE_MODELS}, got {kind!r}.")
        kinds = set(getattr(self.text_config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(
                f"`text_config.layer_types` must all be 'full_attention': saliency needs every image token, got {sorted(kinds)}."
            )

    def validate_vision_tower(self):
        """Part of `@strict`-powered validation."""
        kind = self.vision_config.model_type
        if kind not in NUM_CLASS_TOKENS:
            raise ValueError(f"`vision_config.model_type` must be one of {tuple(NUM_CLASS_TOKENS)}, got {kind!r}.")
        wanted = "default" if NUM_CLASS_TOKENS[kind] else "full"
        if self.vision_feature_select_strategy != wanted:
            raise ValueError(
                f"`vision_feature_select_strategy` must be {wanted!r} for a {kind!r}, whose other features are no square grid, "
                f"got {self.vision_feature_select_strategy!r}."
            )
        if self.use_window and self.window_size > self.image_grid_size:
            raise ValueError(
                f"`window_size` ({self.window_size}) must be at most the side of the image's grid of tokens "
                f"({self.image_grid_size})."
            )

    def validate_refocus_tokens(self):
        """Part of `@strict`-powered validation."""
        vocab_size = self.text_config.vocab_size
        tokens = {name: getattr(self, name) for name in ("bot_token_id", "eot_token_id", "image_token_id")}
        for name, token in tokens.items():
            if not 0 <= token < vocab_size:
                raise ValueError(f"`{name}` must lie within `text_config.vocab_size` ({vocab_size}), got {token}.")
        if len(set(tokens.values())) != len(tokens):
            raise ValueError(f"The token ids {tokens} must differ from each other.")


__all__ = ["LaReConfig"]
