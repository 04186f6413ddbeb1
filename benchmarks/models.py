"""Random models of every architecture and the stock class around the same weights, with prompts for them."""

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from benchmarks.measuring import Setting
from configuration_latentvlm import DeepLatentConfig, LaReConfig, VedasConfig
from modeling_latentvlm import DeepLatentForConditionalGeneration, LaReForCausalLM, VedasForConditionalGeneration


IMAGE, LATENT_START, LATENT_PAD, LATENT_END = 10, 14, 15, 16
VEDAS_SLOT, BOT, EOT = 14, 14, 15
FIRST_WORD = 100  # prompts are made of words from here on
ROPE = {"rope_type": "default", "rope_theta": 1e6}


@dataclass(frozen=True)
class Shape:
    """What a model looks like. The tower of LaRe is as small as can be: its pictures count, it does not."""

    text: dict
    vision: dict
    lare_tower: dict
    extractor_hidden_size: int
    vocab_size: int = 32000
    image_side: int = 16  # merged patches of a picture


TINY = Shape(
    {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64},
    {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56},
    extractor_hidden_size=48,
    vocab_size=512,
    image_side=4,
)
SMALL = Shape(
    {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    {"depth": 2, "hidden_size": 160, "intermediate_size": 480, "num_heads": 4, "out_hidden_size": 512},
    {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 224},
    extractor_hidden_size=384,
)
SEVEN_B = Shape(
    {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    {"depth": 32, "hidden_size": 1280, "out_hidden_size": 3584},
    {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 224},
    extractor_hidden_size=1536,
    vocab_size=152064,
)


@dataclass
class Pair:
    """A model of ours and its backbone's own class around the same weights."""

    ours: nn.Module
    stock: nn.Module
    shape: Shape
    setting: Setting
    twins: dict = field(default_factory=dict)  # other modes around the same weights

    @property
    def text_model(self) -> nn.Module:
        return self.ours.model.language_model

    @property
    def hidden_size(self) -> int:
        return self.shape.text["hidden_size"]


def create(model_class, config, setting: Setting, is_empty: bool = False) -> nn.Module:
    """A random model, made where it is used; an empty one is about to be given weights."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(setting.dtype)
    try:
        with torch.device("meta" if is_empty else setting.device):
            return model_class(config).eval()
    finally:
        torch.set_default_dtype(default)


def share(model: nn.Module, weights_of: nn.Module) -> nn.Module:
    """Give a model of another class or mode the very modules of the first.

    The backbone itself is its own, with the first's parts: that of ours answers to nobody but our `forward`.
    """
    for name, child in weights_of.named_children():
        if name == "model":
            share(model.model, child)
        elif name in dict(model.named_children()):
            setattr(model, name, child)
    return model


def qwen_fields(shape: Shape) -> dict:
    heads = shape.text["num_attention_heads"]
    half = shape.text["hidden_size"] // heads // 2
    section = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    text = shape.text | {
        "vocab_size": shape.vocab_size,
        "rope_parameters": ROPE | {"mrope_section": section},
        "max_position_embeddings": 65536,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    tokens = {"image_token_id": IMAGE, "video_token_id": 11, "vision_start_token_id": 12, "vision_end_token_id": 13}
    return {"text_config": text, "vision_config": dict(shape.vision)} | tokens


def deeplatent(shape: Shape, setting: Setting, latent_grid_size: int = 41) -> Pair:
    """With the twin whose latents are autoregressive. A grid of 41 holds blocks of exactly 82 latents."""
    fields = qwen_fields(shape) | {
        "latent_start_token_id": LATENT_START,
        "latent_pad_token_id": LATENT_PAD,
        "latent_end_token_id": LATENT_END,
        "latent_grid_size": latent_grid_size,
    }
    ours = create(DeepLatentForConditionalGeneration, DeepLatentConfig(**fields), setting)
    config = DeepLatentConfig(**fields, latent_mode="autoregressive")
    twin = share(create(DeepLatentForConditionalGeneration, config, setting, is_empty=True), ours)
    return Pair(ours, stock_qwen(ours, shape, setting), shape, setting, {"autoregressive": twin})


def stock_qwen(ours: nn.Module, shape: Shape, setting: Setting) -> nn.Module:
    config = Qwen2_5_VLConfig(**qwen_fields(shape))
    return share(create(Qwen2_5_VLForConditionalGeneration, config, setting, is_empty=True), ours)


def vedas(shape: Shape, setting: Setting, **fields) -> Pair:
    """Its layers are of the routed class; without a `routing` they run as the stock ones do."""
    config = VedasConfig(**qwen_fields(shape), latent_token_id=VEDAS_SLOT, **fields)
    ours = create(VedasForConditionalGeneration, config, setting)
    return Pair(ours, stock_qwen(ours, shape, setting), shape, setting)


def lare(shape: Shape, setting: Setting, **fields) -> Pair:
    text = shape.text | {
        "model_type": "qwen2",
        "vocab_size": shape.vocab_size,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "max_position_embeddings": 65536,
    }
    both = {
        "text_config": text,
        "vision_config": {"model_type": "clip_vision_model", "patch_size": 14} | shape.lare_tower,
        "vision_feature_layer": -1,
        "image_token_index": IMAGE,
    }
    heads = 12 if shape.extractor_hidden_size % 12 == 0 else 4
    size = shape.extractor_hidden_size
    window = min(8, shape.lare_tower["image_size"] // 14)
    own = {"bot_token_id": BOT, "eot_token_id": EOT, "extractor_hidden_size": size, "extractor_num_heads": heads}
    ours = create(LaReForCausalLM, LaReConfig(**both, **({"window_size": window} | own | fields)), setting)
    stock = share(create(LlavaForConditionalGeneration, LlavaConfig(**both), setting, is_empty=True), ours)
    return Pair(ours, stock, shape, setting)


def qwen_inputs(
    pair: Pair, words: int, batch: int = 1, image_side: int | None = None, ids: list[int] | None = None
) -> dict:
    """One picture and some words per row; `ids` stand behind them."""
    side, setting = image_side or pair.shape.image_side, pair.setting
    prompt = [12, *[IMAGE] * side**2, 13, *spell(words), *(ids or [])]
    input_ids = torch.tensor([prompt] * batch, device=setting.device)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(4 * side**2, 3 * 2 * 14 * 14, generator=generator).repeat(batch, 1)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == IMAGE).int(),
        "pixel_values": pixels.to(setting.device, setting.dtype),
        "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]] * batch, device=setting.device),
    }


def lare_inputs(pair: Pair, words: int, batch: int = 1, ids: list[int] | None = None) -> dict:
    config, setting = pair.ours.config, pair.setting
    prompt = [*[IMAGE] * config.image_seq_length, *spell(words), *(ids or [])]
    input_ids = torch.tensor([prompt] * batch, device=setting.device)
    size = config.vision_config.image_size
    pixels = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": pixels.to(setting.device, setting.dtype),
    }


def spell(count: int) -> list[int]:
    """So many words."""
    return [FIRST_WORD + index % 100 for index in range(count)]


def weight_bytes(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())
