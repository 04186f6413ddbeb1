"""Tiny models of every architecture, prompts and training rows for `same_numbers_modes.py`, made without a processor.

Shapes: B rows, S columns of `input_ids`.
"""

from functools import partial

import torch
from transformers.generation import LogitsProcessor

from configuration_latentvlm import DeepLatentConfig, LaReConfig, VedasConfig
from modeling_latentvlm import DeepLatentForConditionalGeneration, LaReForCausalLM, VedasForConditionalGeneration


IMAGE, VIDEO, VISION_START, VISION_END, EOS, PAD = 300, 301, 302, 303, 307, 0
LATENT_START, LATENT_PAD, LATENT_END = 304, 305, 306  # DeepLatent's; the first is Vedas' slot and LaRe's <bot>
GREEDY = {
    "do_sample": False,
    "max_new_tokens": 8,
    "eos_token_id": None,
    "pad_token_id": PAD,
    "return_dict_in_generate": True,
    "output_logits": True,
}
TRACED = GREEDY | {"output_latents": True}
BEAMS = GREEDY | {"num_beams": 3, "num_return_sequences": 2, "output_scores": True, "output_latents": True}
SAMPLE = GREEDY | {
    "do_sample": True,
    "temperature": 1.3,
    "top_k": 40,
    "num_return_sequences": 2,
    "output_scores": True,
}
QWEN_TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
VISION = {
    "qwen2_5_vl": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    },
    "qwen2_vl": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2, "patch_size": 14},
}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
# Renamed; the script runs with both names, on old and new code.
ROUTED, ROUTED_STEP = (
    ("num_routed_tokens", "num_routed_step_tokens")
    if hasattr(VedasConfig, "num_routed_tokens")
    else ("alpha", "step_alpha")
)


def fill_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Weights of a size at which each of them moves the logits."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if name.endswith("depth_scale"):
                parameter.copy_(1 + 0.3 * drawn)
            elif "norm" not in name:
                large = 0.5 if "router" in name else 0.2 if "refocus" in name or "latent_blocks" in name else 0.12
                parameter.copy_(drawn * large)
    return model.eval()


def build_deeplatent(**fields) -> DeepLatentForConditionalGeneration:
    config = DeepLatentConfig(
        **TOKENS,
        text_config=dict(QWEN_TEXT),
        vision_config=dict(VISION["qwen2_5_vl"]),
        latent_start_token_id=LATENT_START,
        latent_pad_token_id=LATENT_PAD,
        latent_end_token_id=LATENT_END,
        **({"latent_grid_size": 4, "num_autoregressive_latents": 3} | fields),
    )
    return fill_weights(DeepLatentForConditionalGeneration(config))


def build_vedas(backbone: str = "qwen2_5_vl", preset: str | None = None, **fields) -> VedasForConditionalGeneration:
    small = {"num_latent_steps": 2, "num_replay_tokens": 3, ROUTED: 6, ROUTED_STEP: 3, "routed_layers": [0, 2]}
    make = VedasConfig if preset is None else partial(VedasConfig.preset, preset)
    config = make(
        **TOKENS,
        text_config=dict(QWEN_TEXT),
        vision_config=dict(VISION[backbone]),
        backbone=backbone,
        latent_token_id=LATENT_START,
        **(small | fields),
    )
    return fill_weights(VedasForConditionalGeneration(config))


def build_lare(decoder: str = "qwen2", vision: str = "clip_vision_model", **fields) -> LaReForCausalLM:
    text = {name: value for name, value in QWEN_TEXT.items() if name != "rope_parameters"}
    text |= {"model_type": decoder, "tie_word_embeddings": False} | ({"head_dim": 16} if decoder == "qwen3" else {})
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    small = {"num_refocus_steps": 3, "window_size": 2, "extractor_hidden_size": 24, "extractor_num_heads": 2}
    config = LaReConfig(
        text_config=text,
        vision_config={"model_type": vision, "image_size": 56, "patch_size": 14, **tower},
        vision_feature_select_strategy="default" if vision == "clip_vision_model" else "full",
        image_token_index=IMAGE,
        bot_token_id=LATENT_START,
        eot_token_id=LATENT_END,
        **(small | {"latent_rms": 0.3} | fields),
    )
    return fill_weights(LaReForCausalLM(config))


class OpenAt(LogitsProcessor):
    """Makes row r of the prompts write `<latent>` at the given answer positions and nowhere else."""

    def __init__(self, plan: list[list[int]], prompt_length: int, token: int = LATENT_START):
        self.plan, self.prompt_length, self.token = plan, prompt_length, token

    def __call__(self, input_ids, scores):
        at, copies = input_ids.shape[1] - self.prompt_length, len(input_ids) // len(self.plan)
        rows = torch.tensor([at in self.plan[row // copies] for row in range(len(input_ids))])
        scores = scores.clone()
        scores[:, self.token] = -1e9
        forced = torch.full_like(scores, -1e9)
        forced[:, self.token] = 0
        return torch.where(rows[:, None], forced, scores)


def pad_rows(rows: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    pads = [width - len(row) for row in rows]
    ids = [[PAD] * pad + row if side == "left" else row + [PAD] * pad for row, pad in zip(rows, pads)]
    mask = [
        [0] * pad + [1] * len(row) if side == "left" else [1] * len(row) + [0] * pad for row, pad in zip(rows, pads)
    ]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def qwen_image(height: int, width: int, token: int = IMAGE, frames: int = 1) -> list[int]:
    return [VISION_START, *[token] * (frames * height * width), VISION_END]


# Rows of unequal length with one image, two images of unequal size, and none; sizes in merged patches.
QWEN_SIZES = [(3, 2), (4, 4), (1, 2)]
QWEN_PROMPTS = [
    [5, 6, *qwen_image(3, 2), 7, 8, 9],
    [10, *qwen_image(4, 4), 11, 12, *qwen_image(1, 2), 13, 14, 15, 16, 17],
    [20, 21, 22, 23],
]
LARE_PROMPTS = [[5, 6, *[IMAGE] * 16, 7, 8], [10, *[IMAGE] * 16, 11, 12, *[IMAGE] * 16, 13, 14, 15], [20, 21, 22]]


def qwen_pixels(sizes: list[tuple[int, int]], kind: str = "image", frames: int = 1) -> dict[str, torch.Tensor]:
    grids = torch.tensor([[frames, 2 * height, 2 * width] for height, width in sizes])
    pixels = torch.randn(int(grids.prod(dim=1).sum()), 1176, generator=torch.Generator().manual_seed(2))
    return {"pixel_values" if kind == "image" else "pixel_values_videos": pixels, f"{kind}_grid_thw": grids}


def lare_pixels(count: int, side: int = 56) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(2))}


def qwen_batch() -> dict[str, torch.Tensor]:
    return pad_rows(QWEN_PROMPTS) | qwen_pixels(QWEN_SIZES)


def lare_batch(rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    return pad_rows(LARE_PROMPTS[rows]) | lare_pixels(sum(row.count(IMAGE) for row in LARE_PROMPTS[rows]) // 16)


def gradients(model, checkpointing: bool = False, training: bool = True, **inputs) -> dict:
    """One training step: the output, and the gradient of every weight."""
    model.train(training)
    if checkpointing:
        name = next(name for name in ("activation", "gradient") if hasattr(model, f"{name}_checkpointing_enable"))
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    output = model(**inputs)
    output.loss.backward()
    return {"output": output, "gradient": {name: weight.grad for name, weight in model.named_parameters()}}


def trained(rows: list[list[int]], answers: list[list[int]], never: tuple[int, ...], side: str = "right") -> dict:
    """Rows of prompt and answer with labels on the answers."""
    inputs = pad_rows([row + answer for row, answer in zip(rows, answers)], side)
    labels = torch.full_like(inputs["input_ids"], -100)
    for number, (row, answer) in enumerate(zip(rows, answers)):
        first = len(row) + (int(inputs["attention_mask"][number].argmax()) if side == "left" else 0)
        labels[number, first : first + len(answer)] = torch.tensor(answer)
    return inputs | {"labels": labels.masked_fill(torch.isin(labels, torch.tensor(never)), -100)}


ANSWERS = [[30, 31, 32, 33, EOS], [40, 41, EOS], [50, 51, 52, EOS]]


def whole_block(height: int, width: int, controls: int) -> list[int]:
    return [LATENT_START, *[LATENT_PAD] * (controls + height * width), LATENT_END]


def block_rows(controls: int) -> tuple[list[list[int]], torch.Tensor]:
    """Answers with blocks of unequal number, size and place; the last of row 0 stands as `<latent>` alone."""
    shape = (lambda h, w: (h, w)) if controls else (lambda h, w: (1, w))
    first, second, third = shape(2, 3), shape(1, 2), shape(3, 4)
    answers = [
        [30, *whole_block(*first, controls), 31, 32, LATENT_START, 33, EOS],
        [*whole_block(*third, controls), 41, EOS],
        [50, 51, EOS],
    ]
    return answers, torch.tensor([first, second, third])
