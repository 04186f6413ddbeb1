"""Configuration of DeepLatent: every number of the architecture, validated.

Paper: DeepLatent: Think with Images via Parallel Latent Visual Reasoning (`modeling_deeplatent.py` says how it works).
"""

from .transformers_contract import check_contract


check_contract("configuration")  # before the imports below: what they miss is said here


from pathlib import Path
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig

from .backbone_fields import check_backbone_fields
from .hub_code import HubCodeMixin, __version__
from .latent_architecture import LatentArchitectureMixin
from .model_card import write_model_card
from .transformers_api import CACHE_NAMES


_MODEL = "modeling_latentvlm.modeling_deeplatent.DeepLatentForConditionalGeneration"


@strict
class DeepLatentConfig(LatentArchitectureMixin, HubCodeMixin, Qwen2_5_VLConfig):
    r"""
    Configuration of [`DeepLatentForConditionalGeneration`]. Every Qwen2.5-VL field keeps its meaning.

    A block in the language model's input is `<latent> e_s e_q e_v z_1 ... z_N </latent>`, N = height * width.

    Args:
        latent_start_token_id (`int`, *optional*, defaults to 151665):
            `<latent>`: emitting it opens a block.
        latent_pad_token_id (`int`, *optional*, defaults to 151666):
            Placeholder of a position inside a block whose grid is given (`latent_grid_hw`).
        latent_end_token_id (`int`, *optional*, defaults to 151667):
            `</latent>`: closes a block; never sampled, always inserted.
        latent_mode (`str`, *optional*, defaults to `"parallel"`):
            `"parallel"` builds a block by the LatentFormer; `"autoregressive"` feeds the previous position's last hidden
            state back, `num_autoregressive_latents` times (the paper's Fig. 4, and most of the field).
        num_autoregressive_latents (`int`, *optional*, defaults to 8):
            Latents of a block when `latent_mode="autoregressive"`.
        max_latent_blocks (`int`, *optional*, defaults to 5):
            Blocks that one answer may open. `0` is the plain backbone.
        latent_grid_size (`int`, *optional*, defaults to 16):
            G: the largest height and width of a block, in merged patches.
        latent_scale (`str`, *optional*, defaults to `"predicted"`):
            `"predicted"` takes height and width from the scale head, `"fixed"` always takes `fixed_latent_grid`.
        fixed_latent_grid (`list[int]`, *optional*):
            (height, width) for `latent_scale="fixed"`; defaults to (G, G).
        latent_query_rms (`float`, *optional*, defaults to 1.0):
            Root mean square the query grid is initialised with: that of the merged image features, measured at conversion.
        modulation_hidden_size (`int`, *optional*):
            Width of the two modulation MLPs; defaults to a quarter of the hidden size.
        modulate_queries (`bool`, *optional*, defaults to `True`):
            Latent-query modulation (Table 5 switches it off).
        modulate_images (`bool`, *optional*, defaults to `True`):
            Image-feature modulation (Table 5 switches it off).
        log_sigma_init (`float`, *optional*, defaults to -4.0):
            Initial log standard deviation of the modulation noise, relative to the root mean square of what it is added to.
        latentformer_layers (`int`, *optional*, defaults to 1):
            LatentFormer blocks. `0` feeds the modulated queries straight in (an ablation that never sees the image).
        latentformer_heads (`int`, *optional*):
            Attention heads; defaults to those of the language model.
        latentformer_mlp_ratio (`float`, *optional*, defaults to 0.0):
            Width of an optional SwiGLU MLP per block, relative to the hidden size; 0 is none, as in the paper.
        latentformer_rope_theta (`float`, *optional*, defaults to 10000.0):
            Base of the LatentFormer's 2-D rotary embedding.
        scale_loss_weight (`float`, *optional*, defaults to 0.5):
            Weight of the cross-entropy of height and width in the loss that `forward` returns (eq. 8).
        base_model (`str`, *optional*):
            Hub id or folder name of the backbone, for the model card.
        base_model_license (`str`, *optional*):
            Its licence, for the model card.
        latentvlm_version (`str`, *optional*):
            Version of this library that wrote the checkpoint.
    """

    model_type = "deeplatent"
    keys_to_ignore_at_inference = [
        *CACHE_NAMES,
        "scale_loss",
        "scale_logits",
        "latent_trace",
        "latent_states",
    ]
    hub_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_latentvlm.configuration_deeplatent.DeepLatentConfig",
        "AutoProcessor": "processing_latentvlm.processing_deeplatent.DeepLatentProcessor",
        "AutoModel": _MODEL,
        "AutoModelForCausalLM": _MODEL,
        "AutoModelForImageTextToText": _MODEL,
    }

    latent_unit = "block"
    latent_count_field = "max_latent_blocks"
    latent_count_argument = "max_latent_blocks"
    least_count_argument = "min_latent_blocks"
    latent_grid_argument = "latent_grid"
    latent_modules = ("latent_control", "latent_blocks")
    frozen_modules = ("visual",)
    latent_token_fields = ("latent_start_token_id", "latent_pad_token_id", "latent_end_token_id")
    latent_marker_fields = ("latent_start_token_id", "latent_end_token_id")
    training_command = "train.train_deeplatent"
    learns_from_assistant_images = True

    latent_start_token_id: int = 151665
    latent_pad_token_id: int = 151666
    latent_end_token_id: int = 151667
    latent_mode: str = "parallel"
    num_autoregressive_latents: int = 8
    max_latent_blocks: int = 5
    latent_grid_size: int = 16
    latent_scale: str = "predicted"
    fixed_latent_grid: list[int] | tuple[int, ...] | None = None
    latent_query_rms: float = 1.0
    modulation_hidden_size: int | None = None
    modulate_queries: bool = True
    modulate_images: bool = True
    log_sigma_init: float = -4.0
    latentformer_layers: int = 1
    latentformer_heads: int | None = None
    latentformer_mlp_ratio: float = 0.0
    latentformer_rope_theta: float = 10000.0
    scale_loss_weight: float = 0.5
    base_model: str | None = None
    base_model_license: str | None = None
    latentvlm_version: str = __version__

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        text_config = self.get_text_config()
        if self.latentformer_heads is None:
            self.latentformer_heads = text_config.num_attention_heads
        if self.modulation_hidden_size is None:
            self.modulation_hidden_size = max(1, text_config.hidden_size // 4)
        if self.fixed_latent_grid is None:
            self.fixed_latent_grid = [self.latent_grid_size, self.latent_grid_size]

    def to_json_file(self, json_file_path, *args, **kwargs) -> None:
        self.latentvlm_version = __version__  # whichever wrote the checkpoint that this config was read from
        super().to_json_file(json_file_path, *args, **kwargs)
        write_model_card(self, Path(json_file_path).parent)

    @property
    def num_control_tokens(self) -> int:
        """Learned embeddings between `<latent>` and the latents: e_s, e_q, e_v, or none in autoregressive mode."""
        return 3 if self.latent_mode == "parallel" else 0

    @property
    def opening_token_id(self) -> int:
        return self.latent_start_token_id

    @property
    def latent_grid_limit(self) -> int | None:
        return self.latent_grid_size if self.latent_mode == "parallel" else None

    @property
    def given_latent_grid(self) -> tuple[int, int] | None:
        if self.latent_mode == "autoregressive":
            return 1, self.num_autoregressive_latents
        return tuple(self.fixed_latent_grid) if self.latent_scale == "fixed" else None

    @property
    def shows_latents_one_by_one(self) -> bool:
        return self.latent_mode == "autoregressive"

    @property
    def unused_token_id(self) -> int:
        return self.video_token_id

    def validate_latent_sizes(self):
        """Part of `@strict`-powered validation."""
        at_least = {
            "num_autoregressive_latents": 1,
            "max_latent_blocks": 0,
            "latent_grid_size": 1,
            "modulation_hidden_size": 1,
            "latentformer_layers": 0,
            "latentformer_heads": 1,
            "latentformer_mlp_ratio": 0.0,
            "scale_loss_weight": 0.0,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if not least <= value < float("inf"):  # so that NaN fails too
                raise ValueError(f"`{name}` must be >= {least}{' and finite' * (value == float('inf'))}, got {value}.")
        for name in ("latent_query_rms", "latentformer_rope_theta"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must be > 0 and finite, got {getattr(self, name)}.")
        if not abs(self.log_sigma_init) < float("inf"):
            raise ValueError(f"`log_sigma_init` must be finite, got {self.log_sigma_init}.")
        grid = list(self.fixed_latent_grid)
        if len(grid) != 2 or not all(1 <= side <= self.latent_grid_size for side in grid):
            raise ValueError(
                f"`fixed_latent_grid` must be (height, width) within 1..`latent_grid_size` ({self.latent_grid_size}), got {grid}."
            )

    def validate_latent_choices(self):
        """Part of `@strict`-powered validation."""
        for name, choices in {
            "latent_mode": ("parallel", "autoregressive"),
            "latent_scale": ("predicted", "fixed"),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")

    def validate_latentformer_heads(self):
        """Part of `@strict`-powered validation."""
        check_backbone_fields(self)
        hidden_size = self.get_text_config().hidden_size
        if self.latentformer_heads < 1 or hidden_size % (4 * self.latentformer_heads):
            raise ValueError(
                f"`latentformer_heads` ({self.latentformer_heads}) must divide `text_config.hidden_size` ({hidden_size}) "
                "into heads whose size is a multiple of 4, for rotary embedding over two axes."
            )

    def validate_latent_tokens(self):
        """Part of `@strict`-powered validation."""
        vocab_size = self.get_text_config().vocab_size
        tokens = {
            name: getattr(self, name)
            for name in ("latent_start_token_id", "latent_pad_token_id", "latent_end_token_id", "image_token_id")
        }
        for name, token in tokens.items():
            if not 0 <= token < vocab_size:
                raise ValueError(f"`{name}` must lie within `text_config.vocab_size` ({vocab_size}), got {token}.")
        if len(set(tokens.values())) != len(tokens):
            raise ValueError(f"The token ids {tokens} must differ from each other.")


__all__ = ["DeepLatentConfig"]
