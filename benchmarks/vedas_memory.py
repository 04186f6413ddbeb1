"""Peak memory of Vedas' prefill and latent steps against the stock backbone's forward over the same prompt.

    python -m benchmarks.vedas_memory --length 8192

Both run without gradients, keep a KV cache and compute one row of logits; the peak is what tensors hold above the weights.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.deeplatent_blocks import SHAPES, TOKENS
from benchmarks.peak_memory import peak_memory
from benchmarks.vedas_steps import IMAGE_SIDE, build, prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192, help="tokens of the prompt, image and text")
    parser.add_argument("--output", default="out/vedas_memory.json")
    args = parser.parse_args()
    inputs = prompt(args.length - IMAGE_SIDE**2 - 2)
    inputs["input_ids"] = inputs["input_ids"].where(inputs["input_ids"] < 200, 100)
    fields = SHAPES["small"] | TOKENS
    fields["text_config"] |= {"max_position_embeddings": 2 * args.length}
    stock = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**fields)).eval()
    peaks = {}
    with torch.no_grad():
        peaks["stock"] = peak_memory(lambda: stock(**inputs, logits_to_keep=1, use_cache=True))
        for scope in ("incremental", "context"):
            model = build(scope)
            model.config.get_text_config().max_position_embeddings = 2 * args.length
            peaks[scope] = peak_memory(partial(model.generate, **inputs, max_new_tokens=1, do_sample=False))
    print(f"{args.length} prompt tokens, float32, {torch.__version__}: peak above the weights")
    for name, value in peaks.items():
        print(f"  {name:12s} {value / 2**20:9.1f} MiB  {value / peaks['stock']:6.3f} x stock")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps({"settings": vars(args), "bytes": peaks}, indent=2))


if __name__ == "__main__":
    main()
