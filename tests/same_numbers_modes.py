"""The modes of `same_numbers.py`: tiny models of every architecture, and what is run on them.

Everything is made of token ids and random pixels, without a processor, so that only the models are compared.

Shapes: B rows, S columns of `input_ids`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers.generation import LogitsProcessor, LogitsProcessorList

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


def deeplatent_modes(name: str, **fields) -> dict[str, Callable]:
    build = partial(build_deeplatent, **fields)
    controls = 0 if fields.get("latent_mode") == "autoregressive" else 3
    batch, pair = qwen_batch(), pad_rows(QWEN_PROMPTS[:2]) | qwen_pixels(QWEN_SIZES)
    length = batch["input_ids"].shape[1]
    answers, grids = block_rows(controls)
    rows = trained(QWEN_PROMPTS, answers, ()) | qwen_pixels(QWEN_SIZES) | {"latent_grid_hw": grids}
    plan = {"logits_processor": LogitsProcessorList([OpenAt([[0, 4], [2], []], length)])}
    forced = {"min_latent_blocks": 2, "max_latent_blocks": 2}
    grid = (2, 3) if controls else (1, 2)
    modes = {
        "no blocks": lambda: build().generate(**batch, **GREEDY, max_latent_blocks=0),
        "blocks at unequal steps": lambda: build().generate(**batch, **plan, **TRACED),
        "min_latent_blocks": lambda: build().generate(**batch, **TRACED, **forced),
        "latent_grid": lambda: build().generate(**batch, **TRACED, **forced, latent_grid=grid),
        "one row": lambda: build().generate(
            **pad_rows(QWEN_PROMPTS[:1]), **qwen_pixels(QWEN_SIZES[:1]), **TRACED, **forced
        ),
        "beams": lambda: build().generate(**batch, **BEAMS, **plan),
        "beams, min_latent_blocks": lambda: build().generate(**batch, **BEAMS, min_latent_blocks=1),
        "sampling": lambda: build().generate(**batch, **SAMPLE, min_latent_blocks=1),
        "static cache": lambda: build().generate(**batch, **GREEDY, **plan, cache_implementation="static").logits,
        "inputs_embeds": lambda: generate_from_embeds(build(), batch, **GREEDY, min_latent_blocks=1),
        "videos": lambda: build().generate(**video_batch(), **TRACED, **forced),
        "continued cache": lambda: continue_cache(build(), batch, plan),
        "prompt with blocks": lambda: prompt_with_blocks(build(), controls),
        "forward, no blocks": lambda: build()(**batch, output_hidden_states=True),
        "forward, labels, no blocks": lambda: gradients(
            build(), **trained(QWEN_PROMPTS, ANSWERS, ()), **qwen_pixels(QWEN_SIZES)
        ),
        "forward, states": lambda: build()(
            **rows, output_latents=True, output_hidden_states=True, latent_state_layers=(0, 2)
        ),
        "forward, layers alone": lambda: build()(**rows, latent_state_layers=(1, 3)),
        "forward, cached": lambda: forward_on_cache(build(), rows),
        "gradients, evaluation": lambda: gradients(build(), training=False, **rows),
        "gradients": lambda: gradients(build(), output_latents=True, **rows),
        "gradients, left padding": lambda: gradients(
            build(), **trained(QWEN_PROMPTS, answers, (), "left"), **qwen_pixels(QWEN_SIZES), latent_grid_hw=grids
        ),
        "gradients, checkpointing": lambda: gradients(build(), checkpointing=True, **rows),
        "logits_to_keep": lambda: build()(**{k: v for k, v in rows.items() if k != "labels"}, logits_to_keep=3),
        "swap": lambda: build().generate(**pair, **TRACED, **forced, latent_intervention="swap"),
        "forward, zero": lambda: build()(**rows, output_latents=True, latent_intervention="zero"),
    }
    names = ("zero", "noise", "zero:1") + (("mean", "shuffle") if controls else ())
    for change in (*names, "zero:0.1", double_first):
        label = change if isinstance(change, str) else change.__name__
        modes[f"intervention {label}"] = lambda change=change: build().generate(
            **pair, **TRACED, **forced, latent_intervention=change
        )
    if controls:
        modes["latent_noise"] = lambda: build().generate(**pair, **TRACED, **forced, latent_noise=True)
        modes["latent_modulator"] = lambda: generate_modulated(build(), pair, forced)
    return {f"deeplatent {name}, {mode}": run for mode, run in modes.items()}


def double_first(latents: torch.Tensor, step) -> torch.Tensor:
    """An intervention that is a callable and depends on the step."""
    return latents * (2.0 if step.index == 0 and step.offset == 0 else 1.0)


def generate_modulated(model, inputs: dict, forced: dict):
    seen: list = []

    def modulate(row, number, kind, base, gamma, beta, log_sigma):
        seen.append([row, number, kind, base, gamma, beta, log_sigma])
        return (1 + gamma) * base + 0.5 * beta

    return [model.generate(**inputs, **TRACED, **forced, latent_modulator=modulate), seen]


def generate_from_embeds(model, inputs: dict, **settings):
    inputs = dict(inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    return model.generate(inputs_embeds=embeds, **inputs, **settings)


def video_batch() -> dict[str, torch.Tensor]:
    rows = [
        [5, 6, *qwen_image(2, 2, VIDEO, 2), 7, 8],
        [9, *qwen_image(3, 2), 10, 11, 12, *qwen_image(1, 2, VIDEO, 2), 13],
    ]
    videos = qwen_pixels([(2, 2), (1, 2)], "video", 2) | {"second_per_grid_ts": torch.tensor([1.0, 0.5])}
    return pad_rows(rows) | qwen_pixels([(3, 2)]) | videos


def continue_cache(model, batch: dict, plan: dict) -> list:
    """Two turns: the second gets the cache of the first, a new image, and blocks of its own."""
    first = model.generate(**batch, **plan, **GREEDY)
    turn = pad_rows([[60, 61, *qwen_image(2, 2), 62], [63], [64, *qwen_image(1, 3), 65]])
    inputs = {
        "input_ids": torch.cat([first.sequences, turn["input_ids"]], dim=1),
        "attention_mask": torch.cat(
            [
                batch["attention_mask"],
                torch.ones_like(first.sequences[:, batch["input_ids"].shape[1] :]),
                turn["attention_mask"],
            ],
            dim=1,
        ),
    }
    settings = TRACED | {"min_latent_blocks": 1}
    again = model.generate(
        **inputs, **qwen_pixels([(2, 2), (1, 3)]), **settings, past_key_values=first.past_key_values
    )
    return [first.logits, again]


def prompt_with_blocks(model, controls: int):
    answers, grids = block_rows(controls)
    rows = pad_rows([prompt + answer[:-1] for prompt, answer in zip(QWEN_PROMPTS, answers)])
    return model.generate(**rows, **qwen_pixels(QWEN_SIZES), **TRACED, latent_grid_hw=grids, min_latent_blocks=1)


def forward_on_cache(model, rows: dict) -> list:
    """Prompt with blocks, then more columns on the cache that came back, without gradients."""
    inputs = {name: value for name, value in rows.items() if name not in ("labels", "attention_mask")}
    with torch.no_grad():
        first = model(**inputs, use_cache=True)
        more = torch.tensor([[70, 71], [72, 73], [74, 75]])
        return [first, model(input_ids=more, past_key_values=first.past_key_values, use_cache=True)]


def vedas_modes(name: str, build: Callable, single: bool = False) -> dict[str, Callable]:
    """`single`: only rows with one image each, all that the scope "reference" takes."""
    prompts, sizes = (QWEN_PROMPTS, QWEN_SIZES) if not single else (
        [[5, 6, *qwen_image(3, 4), 7, 8, 9], [10, *qwen_image(4, 4), 11, 12]],
        [(3, 4), (4, 4)],
    )  # fmt: skip
    batch = pad_rows(prompts) | qwen_pixels(sizes)
    rows = trained(prompts, ANSWERS[: len(prompts)], ()) | qwen_pixels(sizes)
    slots = [[*prompt, LATENT_START, LATENT_START] for prompt in prompts]
    with_slots = trained(slots, ANSWERS[: len(prompts)], ()) | qwen_pixels(sizes)
    starts = torch.tensor([len(prompt) for prompt in prompts])
    unlabelled = {key: value for key, value in rows.items() if key != "labels"}
    modes = {
        "greedy": lambda: build().generate(**batch, **TRACED),
        "greedy, untraced": lambda: build().generate(**batch, **GREEDY),
        "beams": lambda: build().generate(**batch, **BEAMS),
        "sampling": lambda: build().generate(**batch, **SAMPLE),
        "slots in the prompt": lambda: build().generate(**pad_rows(slots), **qwen_pixels(sizes), **TRACED),
        "inputs_embeds": lambda: generate_from_embeds(build(), batch, **GREEDY),
        "forward": lambda: build()(**unlabelled, answer_starts=starts, output_latents=True),
        "forward, prompt": lambda: build()(**batch, output_latents=True),
        "forward, three steps": lambda: build()(**unlabelled, num_latent_steps=3, logits_to_keep=2),
        "gradients": lambda: gradients(build(), output_latents=True, **rows),
        "gradients, slots": lambda: gradients(build(), **with_slots),
        "gradients, checkpointing": lambda: gradients(build(), checkpointing=True, **rows),
        "gradients, left padding": lambda: gradients(
            build(), **trained(prompts, ANSWERS[: len(prompts)], (), "left"), **qwen_pixels(sizes)
        ),
    }
    for change in ("zero", "noise", "swap", "zero:1", double_first):
        label = change if isinstance(change, str) else change.__name__
        modes[f"intervention {label}"] = lambda change=change: build().generate(
            **batch, **TRACED, latent_intervention=change
        )
    return {f"vedas {name}, {mode}": run for mode, run in modes.items()}


def vedas_variants() -> dict[str, Callable]:
    """Every field that changes the path, once each: an answer and a training step."""
    modes = {}
    rows = trained(QWEN_PROMPTS, ANSWERS, ()) | qwen_pixels(QWEN_SIZES)
    for fields in (
        {"num_latent_steps": 0},
        {"num_latent_steps": 0, "routed_layers": []},
        {"routed_layers": []},
        {"routing_depth": 2},
        {"routing_gate": "softmax"},
        {"routing_positions": "renumbered"},
        {"alpha_schedule": "cosine", "alpha_start": 8, "alpha_end": 2},
        {"replay_pattern": "soft_mix"},
        {"replay_positions": "grid"},
        {"replay_scale": 3.0},
        {"replay_at_inference": False},
        {"backprop_through_latents": False},
    ):
        label = ", ".join(f"{key}={value}" for key, value in fields.items())
        for scope in ("incremental", "context"):
            build = partial(build_vedas, routing_scope=scope, **fields)
            modes[f"vedas {scope}, {label}, greedy"] = lambda build=build: build().generate(**qwen_batch(), **TRACED)
            modes[f"vedas {scope}, {label}, gradients"] = lambda build=build: gradients(build(), **rows)
    modes["vedas incremental, videos"] = lambda: build_vedas().generate(**video_batch(), **TRACED)
    return modes


def lare_modes(name: str, **fields) -> dict[str, Callable]:
    build = partial(build_lare, **fields)
    batch = lare_batch()
    rows = trained(LARE_PROMPTS, ANSWERS, ()) | lare_pixels(3)
    paired = [
        [*prompt, LATENT_START, LATENT_END] if number < 2 else prompt for number, prompt in enumerate(LARE_PROMPTS)
    ]
    own = trained(paired, ANSWERS, ()) | lare_pixels(3)
    starts = torch.tensor([len(prompt) for prompt in LARE_PROMPTS])
    unlabelled = {key: value for key, value in rows.items() if key != "labels"}
    modes = {
        "greedy": lambda: build().generate(**batch, **TRACED),
        "greedy, scores": lambda: build().generate(**batch, **GREEDY, output_scores=True),
        "forward": lambda: build()(**unlabelled, answer_starts=starts, output_latents=True),
        "forward, prompt": lambda: build()(**batch, output_latents=True, logits_to_keep=1),
        "gradients": lambda: gradients(build(), output_latents=True, **rows),
        "gradients, own delimiters": lambda: gradients(build(), **own),
        "gradients, checkpointing": lambda: gradients(build(), checkpointing=True, **rows),
        "gradients, evaluation": lambda: gradients(build(), training=False, **rows),
    }
    if name == "plain" or "answer_sees_image" in fields:
        modes |= {
            "beams": lambda: build().generate(**batch, **BEAMS),
            "sampling": lambda: build().generate(**batch, **SAMPLE),
            "inputs_embeds": lambda: generate_from_embeds(build(), batch, **GREEDY),
            "one row": lambda: build().generate(**lare_batch(slice(1)), **TRACED),
            "no picture in training": lambda: gradients(build(), **trained(LARE_PROMPTS[2:], ANSWERS[2:], ())),
            "gradients, left padding": lambda: gradients(
                build(), **trained(LARE_PROMPTS, ANSWERS, (), "left"), **lare_pixels(3)
            ),
            "own delimiters in the prompt": lambda: build().generate(
                **pad_rows([[*row[:-1], row[-1], LATENT_START, LATENT_END] for row in LARE_PROMPTS]),
                **lare_pixels(3),
                **TRACED,
            ),
        }
        # Rows that stop by themselves do not all have a partner to swap with.
        swap = () if "adaptive_stop" in fields else ("swap",)
        for change in (*swap, "zero", "noise", "mean", "shuffle", "zero:1", "zero:0.1", double_first):
            label = change if isinstance(change, str) else change.__name__
            modes[f"intervention {label}"] = lambda change=change: build().generate(
                **batch, **TRACED, latent_intervention=change
            )
    return {f"lare {name}, {mode}": run for mode, run in modes.items()}


LARE_VARIANTS: dict[str, dict] = {
    "plain": {},
    "answer without image": {"answer_sees_image": False},
    "no steps": {"num_refocus_steps": 0},
    "no window": {"use_window": False},
    "no extractor": {"use_extractor": False},
    "two windows": {"num_windows": 2},
    "pooled latents": {"latent_tokens_per_step": 2},
    "no gradients through latents": {"backprop_through_latents": False},
    "stop by cosine": {"adaptive_stop": "cosine", "stop_threshold": 0.05, "max_refocus_steps": 5},
    "stop by l1": {"adaptive_stop": "l1", "stop_threshold": 0.6, "max_refocus_steps": 4},
    "stop by l2, answer without image": {"adaptive_stop": "l2", "stop_threshold": 0.5, "answer_sees_image": False},
    "llama": {"decoder": "llama"},
    "qwen3": {"decoder": "qwen3"},
    "siglip": {"vision": "siglip_vision_model"},
}


def shipped_modes(tree: Path) -> dict[str, Callable]:
    """The checkpoints beside the code, in float32, on prompts made of their own placeholders."""
    load = {"dtype": torch.float32}

    def ask(kind: str, **settings):
        classes = (DeepLatentForConditionalGeneration, LaReForCausalLM, VedasForConditionalGeneration)
        model_class = dict(zip(("deeplatent", "lare", "vedas"), classes))[kind]
        model = model_class.from_pretrained(tree / "checkpoints" / kind, **load)
        image, start = model.config.image_token_id, getattr(model.config, "vision_start_token_id", None)
        around = ([], []) if start is None else ([start], [model.config.vision_end_token_id])
        rows = [
            [40, 41, *around[0], *[image] * 16, *around[1], 42, 43, 44],
            [50, *around[0], *[image] * 16, *around[1], 51],
        ]
        pixels = lare_pixels(2, 112) if kind == "lare" else qwen_pixels([(4, 4), (4, 4)])
        inputs = pad_rows(rows) | pixels
        return [model.generate(**inputs, **TRACED, **settings), model(**inputs).logits]

    return {
        "shipped deeplatent": lambda: ask("deeplatent", min_latent_blocks=2),
        "shipped lare": lambda: ask("lare"),
        "shipped vedas": lambda: ask("vedas"),
    }


def collect_modes(tree: Path) -> dict[str, Callable]:
    """Name of a mode -> a function that runs it and returns whatever holds its tensors.

    Args:
        tree: the checkout whose packages are imported, for its shipped checkpoints.
    """
    modes = deeplatent_modes("parallel") | deeplatent_modes("autoregressive", latent_mode="autoregressive")
    fixed = partial(build_deeplatent, latent_scale="fixed", fixed_latent_grid=[2, 3])
    plain = partial(build_deeplatent, modulate_queries=False, modulate_images=False, latentformer_mlp_ratio=1.0)
    blind = partial(build_deeplatent, latentformer_layers=0)
    for name, build in (("fixed grid", fixed), ("no modulation, MLP", plain), ("no LatentFormer", blind)):
        modes[f"deeplatent {name}"] = lambda build=build: build().generate(
            **qwen_batch(), **TRACED, min_latent_blocks=2
        )
    for name, fields in LARE_VARIANTS.items():
        modes |= lare_modes(name, **fields)
    for scope in ("incremental", "context"):
        for backbone in ("qwen2_5_vl", "qwen2_vl"):
            modes |= vedas_modes(f"{scope} {backbone}", partial(build_vedas, backbone, routing_scope=scope))
    modes |= vedas_modes("full", partial(build_vedas, routing_scope="reference"), single=True)
    for backbone in ("qwen2_5_vl", "qwen2_vl"):
        modes |= vedas_modes(f"preset reference {backbone}", partial(build_vedas, backbone, "reference"), single=True)
    return modes | vedas_variants() | shipped_modes(tree)
