"""Time text tokens and latent blocks of a random DeepLatent model against its stock backbone, in one interleaved run.

    python -m benchmarks.deeplatent_blocks --shape small        (a CPU is enough)
    python -m benchmarks.deeplatent_blocks --shape 7b           (Qwen2.5-VL-7B's shape in bfloat16, made on the GPU)

Prints a table and writes JSON. A text token is what `generate` takes for one more token; a block is what it takes for a
step that opens a block of the given grid, less a text token. Medians over repeats after a warm-up.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from configuration_latentvlm import DeepLatentConfig
from modeling_latentvlm import DeepLatentForConditionalGeneration


SHAPES = {
    "small": {
        "text_config": {
            "vocab_size": 32000,
            "hidden_size": 512,
            "intermediate_size": 1376,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 160,
            "intermediate_size": 480,
            "num_heads": 4,
            "out_hidden_size": 512,
        },
    },
    "7b": {
        "text_config": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {"depth": 32, "hidden_size": 1280, "out_hidden_size": 3584},
    },
}
TOKENS = {"image_token_id": 10, "video_token_id": 11, "vision_start_token_id": 12, "vision_end_token_id": 13}
LATENT_TOKENS = {"latent_start_token_id": 14, "latent_pad_token_id": 15, "latent_end_token_id": 16}
IMAGE_SIDE = 16  # merged patches of the picture: 256 image tokens
TEXT_TOKENS = 64


def build(shape: str, device: str, dtype: torch.dtype):
    """The model, and the stock class around the same weights."""
    fields = SHAPES[shape] | TOKENS
    fields["text_config"] |= {
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "max_position_embeddings": 32768,
    }
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        ours = DeepLatentForConditionalGeneration(DeepLatentConfig(**fields, **LATENT_TOKENS)).eval()
        with torch.device("meta"):
            stock = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**fields)).eval()
    torch.set_default_dtype(default)
    stock.model, stock.lm_head = ours.model, ours.lm_head
    return ours, stock


def prompt(batch: int, device: str, dtype: torch.dtype) -> dict:
    """One picture and some words per row."""
    ids = [12, *[10] * IMAGE_SIDE**2, 13, *range(100, 100 + TEXT_TOKENS)]
    patches = 4 * IMAGE_SIDE**2 * batch
    ids = torch.tensor([ids] * batch, device=device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == TOKENS["image_token_id"]).int(),
        "pixel_values": torch.randn(patches, 3 * 2 * 14 * 14, device=device, dtype=dtype),
        "image_grid_thw": torch.tensor([[1, 2 * IMAGE_SIDE, 2 * IMAGE_SIDE]] * batch, device=device),
    }


def seconds(call) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleave(arms: dict, repeats: int) -> dict[str, float]:
    """Median milliseconds of every arm; each runs once a round, and the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for round_number in tqdm(range(repeats + 1)):
        for name, call in arms.items():
            spent = seconds(call)
            if round_number:
                times[name].append(1000 * spent)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(ours, stock, inputs: dict, grid: tuple[int, int], tokens: int, repeats: int) -> dict[str, float]:
    """What a text token and a block take, in milliseconds and as ratios."""

    def run(model, new_tokens: int, **kwargs):
        return model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, **kwargs)

    block = {"min_latent_blocks": 1, "max_latent_blocks": 1, "latent_grid": grid}
    arms = {
        "stock first": lambda: run(stock, 1),
        "stock": lambda: run(stock, 1 + tokens),
        "ours first": lambda: run(ours, 1, max_latent_blocks=0),
        "ours": lambda: run(ours, 1 + tokens, max_latent_blocks=0),
        "block": lambda: run(ours, 1 + tokens, **block),
    }
    median = interleave(arms, repeats)
    stock_token = (median["stock"] - median["stock first"]) / tokens
    our_token = (median["ours"] - median["ours first"]) / tokens
    one_block = median["block"] - median["ours"]
    return {
        "stock ms per text token": stock_token,
        "our ms per text token": our_token,
        "text token, ours / stock": our_token / stock_token,
        "ms per block": one_block,
        "ms per latent": one_block / (grid[0] * grid[1]),
        "block / text token": one_block / our_token,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--grid", type=int, nargs=2, default=(9, 9), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", default="out/deeplatent_blocks.json")
    args = parser.parse_args()
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    if args.shape == "7b" and device == "cpu":
        parser.error("the 7b shape needs a CUDA device, and there is none: use --shape small")
    ours, stock = build(args.shape, device, dtype)
    result = measure(ours, stock, prompt(args.batch, device, dtype), tuple(args.grid), args.tokens, args.repeats)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.shape} shape, {dtype}, batch {args.batch}, {args.grid[0]} x {args.grid[1]} latents, {machine}")
    for name, value in result.items():
        print(f"  {name:28s} {value:10.3f}")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps({"settings": vars(args), "machine": machine, "result": result}, indent=2))


if __name__ == "__main__":
    main()
