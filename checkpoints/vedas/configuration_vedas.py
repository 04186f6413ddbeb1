"""Configuration of Vedas: every number of the architecture, validated.

Paper: Visual Enhanced Depth Scaling for Multimodal Latent Reasoning (`modeling_vedas.py` says how it works).
"""

from .transformers_contract import check_contract


check_contract("configuration")  # before the imports below: what they miss is said here


import math
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig, Qwen2VLVisionConfig

from .backbone_fields import check_backbone_fields
from .hub_code import HubCodeMixin, __version__
from .latent_architecture import LatentArchitectureMixin
from .model_card import write_model_card


_MODEL = "modeling_latentvlm.modeling_vedas.VedasForConditionalGeneration"
SUB_CONFIGS = {
    "qwen2_vl": {"text_config": Qwen2VLTextConfig, "vision_config": Qwen2VLVisionConfig},
    "qwen2_5_vl": {"text_config": Qwen2_5_VLTextConfig, "vision_config": Qwen2_5_VLVisionConfig},
}
PRESETS: dict[str, dict[str, Any]] = {
    "reference": {
        "num_latent_steps": 3,
        "routing_scope": "reference",
        "routing_gate": "softmax",
        "routing_depth": 1,
        "alpha_schedule": "constant",
        "num_routed_tokens": 32,
        "num_replay_tokens": 32,
        "replay_scale": 1.0,
        "replay_window": 4,
        "backprop_through_latents": False,
    }
}


@strict
class VedasConfig(LatentArchitectureMixin, HubCodeMixin, Qwen2_5_VLConfig):
    r"""
    Configuration of [`VedasForConditionalGeneration`]. Every field of the backbone keeps its meaning.

    Between prompt and answer stand T latent steps, each `[B_t ; z_t]`: replayed image tokens, then a latent.

    Args:
        backbone (`str`, *optional*, defaults to `"qwen2_5_vl"`):
            `"qwen2_vl"` or `"qwen2_5_vl"`.
        latent_token_id (`int`, *optional*, defaults to 151665):
            Placeholder of one latent step in `input_ids`: T of them between prompt and answer. May be set after loading.
        num_latent_steps (`int`, *optional*, defaults to 4):
            T_r. `0` is the plain backbone (with its routed layers).
        num_replay_tokens (`int`, *optional*, defaults to 32):
            K: image tokens replayed per step.
        replay_pattern (`str`, *optional*, defaults to `"tokens"`):
            `"tokens"` replays the K tokens, `"soft_mix"` their weighted sum as one token.
        replay_scale (`float`, *optional*):
            Factor on the replayed embeddings; 1 as in the paper. The softmax shrinks each K-fold: `K` undoes that.
        replay_positions (`str`, *optional*, defaults to `"sequential"`):
            `"sequential"` numbers replayed tokens like text, `"grid"` gives them the positions of the tokens they repeat.
        replay_window (`int`, *optional*, defaults to 3):
            W: side, in merged patches, of the window that holds most tokens picked at a step (eq. 7): for traces, and for the
            crop branch of training.
        replay_at_inference (`bool`, *optional*, defaults to `True`):
            Whether steps replay image tokens outside training too.
        routed_layers (`list[int]`, *optional*):
            Layers with a router; the odd ones by default (the published code's; the paper routes all).
        routing_depth (`int`, *optional*, defaults to 1):
            D: further passes of a selected token through its layer.
        routing_gate (`str`, *optional*, defaults to `"sigmoid"`):
            `"sigmoid"`, with a bias that starts at -4, or the published code's `"softmax"` over the competing tokens.
        routing_scope (`str`, *optional*, defaults to `"incremental"`):
            Which tokens compete. `"incremental"`: those of the new segment; earlier ones stay as refined, everything runs on
            the KV cache. `"context"` (the paper): prompt and latents, computed anew at each latent step; the answer runs on the
            cache. `"reference"` (the published code): the whole sequence, answer included, at every forward, without a cache.
        routing_positions (`str`, *optional*, defaults to `"kept"`):
            `"kept"` or `"renumbered"` positions in the further passes.
        num_routed_tokens (`int`, *optional*, defaults to 32):
            Tokens that a routed layer selects from the prompt (or, in the wider scopes, from all that compete); called alpha in the
            paper. The field was `alpha` until 0.1, a name that is still read and accepted.
        num_routed_step_tokens (`int`, *optional*, defaults to 8):
            Tokens selected from a latent step in scope `"incremental"`. Until 0.1 the field was `step_alpha`, which is still accepted.
        alpha_schedule (`str`, *optional*, defaults to `"constant"`):
            `"constant"`, or `"cosine"` from `alpha_start` in the first layer to `alpha_end` in the last (eq. 15).
        alpha_start (`int`, *optional*, defaults to 64), alpha_end (`int`, *optional*, defaults to 16):
            Ends of the cosine schedule.
        backprop_through_latents (`bool`, *optional*, defaults to `True`):
            Whether gradients flow through z_t; the published code stops them.
        base_model (`str`, *optional*), base_model_license (`str`, *optional*), latentvlm_version (`str`, *optional*):
            For the model card and the record.
    """

    model_type = "vedas"
    # Names of 0.1, which old config.json files and callers may still use.
    attribute_map: ClassVar[dict[str, str]] = {"alpha": "num_routed_tokens", "step_alpha": "num_routed_step_tokens"}
    hub_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_latentvlm.configuration_vedas.VedasConfig",
        "AutoProcessor": "processing_latentvlm.processing_vedas.VedasProcessor",
        "AutoModel": _MODEL,
        "AutoModelForCausalLM": _MODEL,
        "AutoModelForImageTextToText": _MODEL,
    }

    latent_unit = "step"
    latent_count_field = "num_latent_steps"
    latent_modules = ("router",)
    frozen_modules = ("visual",)
    latent_token_fields = ("latent_token_id",)
    training_command = "train.train_vedas"
    replays_image_tokens = True

    backbone: str = "qwen2_5_vl"
    latent_token_id: int = 151665
    num_latent_steps: int = 4
    num_replay_tokens: int = 32
    replay_pattern: str = "tokens"
    replay_scale: float = 1.0
    replay_positions: str = "sequential"
    replay_window: int = 3
    replay_at_inference: bool = True
    routed_layers: list[int] | tuple[int, ...] | None = None
    routing_depth: int = 1
    routing_gate: str = "sigmoid"
    routing_scope: str = "incremental"
    routing_positions: str = "kept"
    num_routed_tokens: int = 32
    num_routed_step_tokens: int = 8
    alpha_schedule: str = "constant"
    alpha_start: int = 64
    alpha_end: int = 16
    backprop_through_latents: bool = True
    base_model: str | None = None
    base_model_license: str | None = None
    latentvlm_version: str = __version__

    def __post_init__(self, **kwargs):
        for old, name in self.attribute_map.items():
            given = getattr(self, name)
            if old in kwargs and given not in (getattr(type(self), name), kwargs[old]):
                raise ValueError(
                    f"`{old}` is the old name of `{name}`: give one of them, got {kwargs[old]} and {given}."
                )
        for name, kind in SUB_CONFIGS.get(self.backbone, {}).items():
            fields = getattr(self, name)
            if fields is None or isinstance(fields, dict):
                fields = {key: value for key, value in (fields or {}).items() if key != "model_type"}
                setattr(self, name, kind(**fields))
        super().__post_init__(**kwargs)
        if self.routed_layers is None:
            self.routed_layers = list(range(1, self.get_text_config().num_hidden_layers, 2))

    @property
    def recomputes_sequence(self) -> bool:
        return self.routing_scope == "reference"

    def step_tokens(self) -> list[int]:
        return [self.latent_token_id] * self.num_latent_steps

    @classmethod
    def preset(cls, name: str, **fields) -> "VedasConfig":
        """A named set of fields. `"reference"` is the authors' published code.

        What it does otherwise than the paper, and a new model of ours: the whole sequence, pads and answer included,
        competes in the router at every forward (so a later token moves earlier logits, and there is no KV cache); the
        gate is a softmax over the sequence (about 1 / S; its bias has no effect); a refined token lands where the token
        of the same rank by score stands, not on itself; positions are one-dimensional; picked tokens enter in ascending
        order, weighted to about 1 / K; gradients stop at z.
        """
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}; there are {sorted(PRESETS)}.")
        return cls(**(PRESETS[name] | fields))

    def to_json_file(self, json_file_path, *args, **kwargs) -> None:
        self.latentvlm_version = __version__  # whichever wrote the checkpoint that this config was read from
        super().to_json_file(json_file_path, *args, **kwargs)
        write_model_card(self, Path(json_file_path).parent)

    def routed_token_counts(self, step: bool = False) -> list[int]:
        """Tokens to select per layer. Deviates from the paper's eq. 15, whose printed form has a slip."""
        layers = self.get_text_config().num_hidden_layers
        if step:
            return [self.num_routed_step_tokens] * layers
        if self.alpha_schedule == "constant":
            return [self.num_routed_tokens] * layers
        half = (self.alpha_start - self.alpha_end) / 2
        return [round(self.alpha_end + half * (1 + math.cos(math.pi * layer / layers))) for layer in range(layers)]

    def validate_vedas_sizes(self):
        """Part of `@strict`-powered validation."""
        at_least = {
            "num_latent_steps": 0,
            "num_replay_tokens": 1,
            "replay_window": 1,
            "routing_depth": 1,
            "num_routed_tokens": 1,
            "num_routed_step_tokens": 1,
            "alpha_start": 1,
            "alpha_end": 1,
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be >= {least}, got {getattr(self, name)}.")
        if not 0 < self.replay_scale < float("inf"):
            raise ValueError(f"`replay_scale` must be > 0 and finite, got {self.replay_scale}.")

    def validate_vedas_choices(self):
        """Part of `@strict`-powered validation."""
        for name, choices in {
            "backbone": tuple(SUB_CONFIGS),
            "replay_pattern": ("tokens", "soft_mix"),
            "replay_positions": ("sequential", "grid"),
            "routing_gate": ("sigmoid", "softmax"),
            "routing_scope": ("incremental", "context", "reference"),
            "routing_positions": ("kept", "renumbered"),
            "alpha_schedule": ("constant", "cosine"),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")

    def validate_vedas_token(self):
        """Part of `@strict`-powered validation."""
        vocab_size = self.get_text_config().vocab_size
        if not 0 <= self.latent_token_id < vocab_size:
            raise ValueError(
                f"`latent_token_id` must lie within `text_config.vocab_size` ({vocab_size}), got {self.latent_token_id}."
            )
        for name in ("image_token_id", "video_token_id"):
            if self.latent_token_id == getattr(self, name):
                raise ValueError(f"`latent_token_id` and `{name}` must differ, both are {self.latent_token_id}.")

    def validate_routed_layers(self):
        """Part of `@strict`-powered validation."""
        check_backbone_fields(self)
        layers = self.get_text_config().num_hidden_layers
        wrong = [layer for layer in self.routed_layers if not 0 <= layer < layers]
        if wrong or len(set(self.routed_layers)) != len(self.routed_layers):
            raise ValueError(
                f"`routed_layers` must be distinct layers within 0..{layers - 1}, got {list(self.routed_layers)}."
            )


__all__ = ["VedasConfig"]
