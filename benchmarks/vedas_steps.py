"""Time Vedas' latent steps and answer against stock generation over the same final context, in one interleaved run.

    python -m benchmarks.vedas_steps

The shape of the published code's own measurement: hidden 512, 8 layers, 100 image tokens, 60 of text, 3 steps of 32
replayed tokens, 32 new tokens. The stock arm gets 99 more prompt tokens, so that both answer over equally much.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.deeplatent_blocks import SHAPES, TOKENS, interleave
from configuration_latentvlm import VedasConfig
from modeling_latentvlm import VedasForConditionalGeneration


IMAGE_SIDE, TEXT_TOKENS, STEPS, REPLAYED = 10, 60, 3, 32


def build(scope: str) -> VedasForConditionalGeneration:
    fields = SHAPES["small"] | TOKENS
    fields["text_config"] |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    config = VedasConfig(
        **fields, latent_token_id=14, num_latent_steps=STEPS, num_replay_tokens=REPLAYED, routing_scope=scope
    )
    return VedasForConditionalGeneration(config).eval()


def prompt(text_tokens: int) -> dict:
    ids = torch.tensor([[12, *[10] * IMAGE_SIDE**2, 13, *range(100, 100 + text_tokens)]])
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == TOKENS["image_token_id"]).int(),
        "pixel_values": torch.randn(4 * IMAGE_SIDE**2, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 2 * IMAGE_SIDE, 2 * IMAGE_SIDE]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", default="out/vedas_steps.json")
    args = parser.parse_args()
    settings = {"max_new_tokens": args.new_tokens, "do_sample": False, "eos_token_id": None}
    scopes = {scope: build(scope) for scope in ("incremental", "context", "reference")}
    fields = SHAPES["small"] | TOKENS
    stock = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**fields)).eval()
    short, long = prompt(TEXT_TOKENS), prompt(TEXT_TOKENS + STEPS * (REPLAYED + 1))
    arms = {"stock": lambda: stock.generate(**long, **settings)}
    for scope, model in scopes.items():
        arms[scope] = lambda model=model: model.generate(**short, **settings)
    median = interleave(arms, args.repeats)
    print(f"{args.new_tokens} new tokens, CPU, {torch.get_num_threads()} threads, medians of {args.repeats}")
    for name, value in median.items():
        print(f"  {name:12s} {value:9.1f} ms  {value / median['stock']:6.2f} x stock")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps({"settings": vars(args), "milliseconds": median}, indent=2))


if __name__ == "__main__":
    main()
