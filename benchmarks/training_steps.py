"""Forward and backward of every training stage against a stock SFT step over equally many positions. Goal: 1.2.

The vision tower is frozen in both. Where ours has latents the stock model reads words in their place, and the loss covers the
same words in both. Peaks are above the weights, without gradients from before.
"""

from dataclasses import replace

import torch

from benchmarks.measuring import Setting, free_memory, interleave, peak_memory, timed
from benchmarks.models import (
    BOT,
    EOT,
    LATENT_END,
    LATENT_PAD,
    LATENT_START,
    VEDAS_SLOT,
    Pair,
    Shape,
    deeplatent,
    lare,
    lare_inputs,
    qwen_inputs,
    spell,
    vedas,
    weight_bytes,
)
from benchmarks.report import Row
from benchmarks.sizes import Sizes
from train.deeplatent.distillation import SftObjective
from train.deeplatent.rl.objective import GRPOObjective, ObjectiveArguments
from train.deeplatent.rl.rollouts import Prompt, RolloutArguments, Trajectory
from train.deeplatent.teacher_states import choose_layers
from train.lare.objective import LaReObjective, LatentLossArguments
from train.train_lare import STAGES, freeze
from train.vedas.crop_distillation import ReplayArguments, ReplayObjective


MEBIBYTE = 2**20


def with_labels(inputs: dict, question: int, never: tuple[int, ...] = ()) -> dict:
    """Everything behind the question is learned, but for some tokens."""
    ids = inputs["input_ids"]
    is_learned = torch.arange(ids.shape[1], device=ids.device) >= question
    for token in never:
        is_learned = is_learned & (ids != token)
    return inputs | {"labels": ids.masked_fill(~is_learned, -100)}


def compare(case: str, pair: Pair, ours, stock, setting: Setting, note: str = "", trained=None) -> list[Row]:
    """Rows of time and of memory.

    Args:
        ours, stock: return a loss.
        trained: an objective with weights of its own.
    """
    modules = [pair.ours, *([] if trained is None else [trained])]

    def step(loss_of) -> None:
        for module in modules:
            module.zero_grad()
        loss_of().backward()

    calls = {"ours": lambda: step(ours), "stock": lambda: step(stock)}
    times = interleave({name: timed(call, setting.device) for name, call in calls.items()}, setting.repeats)
    peaks = {}
    for name, call in calls.items():
        for module in modules:
            module.zero_grad()  # or freed gradients would count as less than nothing
        peaks[name] = peak_memory(call, setting.device) / MEBIBYTE
    ratio = peaks["ours"] / peaks["stock"]
    return [
        Row(
            "training step",
            case,
            times.median("ours"),
            "ms",
            times.median("stock"),
            times.ratio("ours", "stock"),
            "<= 1.2",
            note,
        ),
        Row("training memory", case, peaks["ours"], "MiB", peaks["stock"], ratio, note=note),
    ]


def start_training(pair: Pair) -> None:
    for model in (pair.ours, pair.stock):
        model.train()
        model.requires_grad_(True)
        tower = getattr(model.model, "visual", None) or model.model.vision_tower
        tower.requires_grad_(False)


def deeplatent_rows(sizes: Sizes, shape: Shape, setting: Setting) -> list[Row]:
    pair, words = deeplatent(shape, setting), sizes.train_words
    start_training(pair)
    height, width = sizes.paper_grid
    question = qwen_inputs(pair, words)["input_ids"].shape[1]
    block = [LATENT_START, *[LATENT_PAD] * (3 + height * width), LATENT_END]
    answer = spell(words) + 2 * (block + spell(words))
    plain = spell(words) + 2 * (spell(len(block)) + spell(words))
    ours = with_labels(qwen_inputs(pair, words, ids=answer), question, (LATENT_PAD, LATENT_END))
    stock = with_labels(qwen_inputs(pair, words, ids=plain), question)
    stock["labels"] = torch.where(ours["labels"] == -100, -100, stock["labels"])  # as many words are learned
    positions = f"{stock['input_ids'].shape[1]} positions, 2 x {height * width} latents"

    def stock_loss():
        return pair.stock(**stock).loss

    layers = choose_layers(shape.text["num_hidden_layers"])
    teacher = torch.randn(len(layers), 2 * height * width, pair.hidden_size, dtype=torch.bfloat16).to(setting.device)
    ours |= {"latent_grid_hw": torch.tensor([[height, width]] * 2), "teacher_states": teacher}
    objective = SftObjective(pair.ours.config, 4.0, layers)
    rows = compare("DeepLatent SFT 1", pair, lambda: objective(pair.ours, **stock)["loss"], stock_loss, setting)
    rows += compare(
        "DeepLatent SFT 2", pair, lambda: objective(pair.ours, **ours)["loss"], stock_loss, setting, positions
    )
    pair.ours.latent_blocks.layers.requires_grad_(False)
    note = "with a forward of the reference, which no SFT step has; one backward pass, as with latent_gradient_limit=0"
    return rows + compare(
        "DeepLatent RL", pair, rl_loss(pair, answer, words, (height, width)), stock_loss, setting, note
    )


def rl_loss(pair: Pair, answer: list[int], words: int, grid: tuple[int, int]):
    """GRPO's loss of one trajectory: the answer with lone `<latent>`s, as it is written."""
    prompt = qwen_inputs(pair, words)
    with torch.no_grad():
        images, _ = pair.ours._encode_images(
            prompt["input_ids"], prompt | {"pixel_values_videos": None, "video_grid_thw": None}
        )
    written = torch.tensor([token for token in answer if token not in (LATENT_PAD, LATENT_END)])
    statistics = torch.zeros(3, pair.hidden_size)
    statistics[2] = pair.ours.config.log_sigma_init
    drawn = {(block, kind): statistics.clone() for block in range(2) for kind in ("query", "image")}
    source = Prompt(None, prompt["input_ids"][0].cpu(), images[0])
    trajectory = Trajectory(source, written, "", 0, [grid] * 2, drawn, 2, advantage=1.0)
    objective = GRPOObjective(ObjectiveArguments(), RolloutArguments(), reference=pair.ours)
    return lambda: objective(pair.ours, [trajectory])["loss"]


def vedas_rows(sizes: Sizes, shape: Shape, setting: Setting) -> list[Row]:
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    steps, words = sizes.vedas_steps, sizes.train_words
    pair = vedas(shape, setting, num_latent_steps=steps, num_replay_tokens=sizes.replayed)
    start_training(pair)
    processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * shape.image_side**2)
    objective = ReplayObjective(pair.ours.config, processor, ReplayArguments())
    objective = objective.to(setting.device, setting.dtype)
    side = 28 * shape.image_side
    picture, rows = [[Image.new("RGB", (side, side), "gray")]], []
    question = qwen_inputs(pair, words)["input_ids"].shape[1]
    for case, slots, pictures in (
        ("Vedas stage 0", 0, None),
        (f"Vedas stage {steps}", steps, None),
        (f"Vedas stage {steps} with crops", steps, picture),
    ):
        taken = slots * (sizes.replayed + 1)
        ours = with_labels(qwen_inputs(pair, words, ids=[VEDAS_SLOT] * slots + spell(words)), question, (VEDAS_SLOT,))
        stock = with_labels(qwen_inputs(pair, words, ids=spell(taken + words)), question + taken)
        rows += compare(
            case,
            pair,
            lambda ours=ours, pictures=pictures: objective(pair.ours, pictures, **ours)["loss"],
            lambda stock=stock: pair.stock(**stock).loss,
            setting,
            f"{stock['input_ids'].shape[1]} positions",
            objective,
        )
    return rows


def lare_rows(sizes: Sizes, shape: Shape, setting: Setting) -> list[Row]:
    rows = []
    for number in STAGES:
        rows += lare_stage(number, sizes.train_words, shape, setting)
    return rows


def lare_stage(number: int, words: int, shape: Shape, setting: Setting) -> list[Row]:
    stage, pair = STAGES[number], lare(shape, setting)
    start_training(pair)
    config = pair.ours.config
    taken = config.num_refocus_steps * config.num_step_latents + 2 if stage.has_latents else 0
    question = lare_inputs(pair, words)["input_ids"].shape[1]
    pair_tokens = [BOT, EOT] if stage.has_latents else []
    ours = with_labels(lare_inputs(pair, words, ids=pair_tokens + spell(words)), question, (BOT, EOT))
    stock = with_labels(lare_inputs(pair, words, ids=spell(taken + words)), question + taken)
    reasoning = torch.tensor([spell(words)], device=setting.device)
    ours |= {
        "reasoning_ids": reasoning,
        "reasoning_mask": torch.ones_like(reasoning, dtype=torch.bool),
        "reasoning_keys": torch.zeros(1, dtype=torch.long, device=setting.device),
        "image_keys": torch.zeros(1, dtype=torch.long, device=setting.device),
    }
    arguments = LatentLossArguments(image_loss_weight=0.0)  # its U-Net has no counterpart in a stock step
    objective = LaReObjective(pair.ours, None, arguments, stage.has_latents, stage.trains == ("refocus.",))
    objective = objective.to(setting.device)
    freeze(pair.ours, stage)
    note = f"{stock['input_ids'].shape[1]} positions, {'all but tower' if stage.trains is None else stage.trains[0]} trained in both"
    if stage.trains == ("refocus.",):
        # The stock model has no Extractor: its backward pass goes through as many layers by way of the projector.
        note = "stock trains its projector"
    return compare(
        f"LaRe stage {number}",
        pair,
        lambda: objective(pair.ours, **ours)["loss"],
        stock_step(pair, stock, stage.trains == ("refocus.",)),
        setting,
        note,
        objective,
    )


def stock_step(pair: Pair, inputs: dict, trains_projector: bool):
    """The stock loss; weights are shared, so what trains is switched around it."""
    projector = pair.ours.model.multi_modal_projector

    def loss():
        if trains_projector:
            projector.requires_grad_(True)
        try:
            return pair.stock(**inputs).loss
        finally:
            if trains_projector:
                projector.requires_grad_(False)

    return loss


def measure(sizes: Sizes, setting: Setting) -> list[Row]:
    shape, rows = sizes.training_shape, []
    for rows_of in (deeplatent_rows, vedas_rows, lare_rows):
        name = rows_of.__name__.removesuffix("_rows")
        needed, free = estimate(shape, setting), free_memory(setting.device)
        if needed > free:
            rows.append(
                Row(
                    "training step",
                    name,
                    None,
                    "ms",
                    note=f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free",
                )
            )
            continue
        rows += rows_of(sizes, shape, setting)
    return rows


def estimate(shape: Shape, setting: Setting) -> int:
    """Weights and gradients, with a quarter more for activations."""
    pair = deeplatent(shape, replace(setting, device="meta"))
    return int(2.5 * weight_bytes(pair.ours))
