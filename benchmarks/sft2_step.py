"""Time and peak memory of an SFT-2 step against a stock SFT step of the same backbone over equally long sequences.

    python -m benchmarks.sft2_step --shape small                 (a CPU is enough)
    python -m benchmarks.sft2_step --shape 7b --layers 8         (as many layers of Qwen2.5-VL-7B's shape as fit, on a GPU)

A step is forward and backward; the vision tower is frozen. Ours has blocks in its answer and aligns four layers to cached
teacher states; the stock model reads as many positions of text. The loss covers the same number of words in both.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks.deeplatent_blocks import IMAGE_SIDE, LATENT_TOKENS, SHAPES, TOKENS, build, interleave
from benchmarks.peak_memory import peak_memory
from train.deeplatent.distillation import SftObjective
from train.deeplatent.teacher_states import choose_layers


def samples(args, device: str, dtype: torch.dtype, hidden_size: int, num_layers: int) -> tuple[dict, dict]:
    """Our batch and the stock model's: a picture, a question, and an answer with blocks or with words in their place."""
    start, pad, end = LATENT_TOKENS.values()
    height, width = args.grid
    question = [12, *[10] * IMAGE_SIDE**2, 13, *range(100, 100 + args.words)]
    words = [*range(200, 200 + args.words)]
    block = [start, *[pad] * (3 + height * width), end]
    ours, stock = question + words, question + words
    for _ in range(args.blocks):
        ours = ours + block + words
        stock = stock + [*range(300, 300 + len(block))] + words
    batches = []
    for ids in (ours, stock):
        ids = torch.tensor([ids] * args.batch, device=device)
        is_target = (ids >= 200) & (ids < 300)
        batches.append(
            {
                "input_ids": ids,
                "labels": ids.masked_fill(~is_target, -100),
                "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": (ids == TOKENS["image_token_id"]).int(),
                "pixel_values": torch.randn(
                    4 * IMAGE_SIDE**2 * args.batch, 3 * 2 * 14 * 14, device=device, dtype=dtype
                ),
                "image_grid_thw": torch.tensor([[1, 2 * IMAGE_SIDE, 2 * IMAGE_SIDE]] * args.batch, device=device),
            }
        )
    count = args.batch * args.blocks
    batches[0]["latent_grid_hw"] = torch.tensor([[height, width]] * count)
    batches[0]["teacher_states"] = torch.randn(
        num_layers, count * height * width, hidden_size, device=device, dtype=torch.bfloat16
    )
    return tuple(batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--layers", type=int, help="in place of the shape's")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--grid", type=int, nargs=2, default=(9, 9), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--words", type=int, default=96, help="of the question, and before, between and after blocks")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in both")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", default="out/sft2_step.json")
    args = parser.parse_args()
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    if args.layers:
        SHAPES[args.shape]["text_config"]["num_hidden_layers"] = args.layers
    ours, stock = build(args.shape, device, dtype)
    text_config = ours.config.get_text_config()
    for model in (ours, stock):
        model.train()
        model.model.visual.requires_grad_(False)
        if args.checkpointing:
            model.gradient_checkpointing_enable()
    layers = choose_layers(text_config.num_hidden_layers)
    objective = SftObjective(ours.config, 4.0, layers)
    with_blocks, plain = samples(args, device, dtype, text_config.hidden_size, len(layers))

    def step(loss_of) -> None:
        ours.zero_grad()
        loss_of().backward()

    arms = {
        "stock": lambda: step(lambda: stock(**plain).loss),
        "SFT 2": lambda: step(lambda: objective(ours, **with_blocks)["loss"]),
    }
    median = interleave(arms, args.repeats)
    peaks = {}
    for name, run in arms.items():
        ours.zero_grad()  # or freed gradients would count as less than nothing
        peaks[name] = peak_memory(run)
    length = plain["input_ids"].numel()
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{args.shape} shape, {dtype}, {args.batch} x {length // args.batch} positions, {args.blocks} blocks, {machine}"
    )
    for name in arms:
        print(
            f"  {name:8s} {median[name]:9.1f} ms {median[name] / median['stock']:6.3f} x   {1000 * length / median[name]:9.0f} "
            f"tokens/s   {peaks[name] / 2**20:9.1f} MiB {peaks[name] / peaks['stock']:6.3f} x"
        )
    result = {"settings": vars(args), "machine": machine, "milliseconds": median, "bytes": peaks}
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
