"""The modes of `same_numbers.py`: what is run on the models of `same_numbers_models.py`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from same_numbers_models import (
    ANSWERS,
    BEAMS,
    GREEDY,
    LARE_PROMPTS,
    LATENT_END,
    LATENT_START,
    QWEN_PROMPTS,
    QWEN_SIZES,
    SAMPLE,
    TRACED,
    VIDEO,
    OpenAt,
    block_rows,
    build_deeplatent,
    build_lare,
    build_vedas,
    gradients,
    lare_batch,
    lare_pixels,
    pad_rows,
    qwen_batch,
    qwen_image,
    qwen_pixels,
    trained,
)
from transformers.generation import LogitsProcessorList

from modeling_latentvlm import DeepLatentForConditionalGeneration, LaReForCausalLM, VedasForConditionalGeneration


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
