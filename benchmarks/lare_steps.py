"""Time LaRe's latent phase against its language model's prefill and as many cached forwards of as many tokens.

    python -m benchmarks.lare_steps
    python -m benchmarks.lare_steps --shape qwen0.5b

One interleaved run over the same embeddings: 256 image tokens and 60 of text, then 4 steps of L tokens on the cache. LaRe
does the rest besides: the saliency row of every layer, window, Extractor, `<bot>` and `<eot>`. The peaks are those of the
allocator: what one arm holds at most at a time beyond weights and inputs.
"""

import argparse
import gc
import json
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

from benchmarks.deeplatent_blocks import interleave
from configuration_latentvlm import LaReConfig
from modeling_latentvlm import LaReForCausalLM
from modeling_latentvlm.refocus_decoding import Places, RefocusContext, RefocusDecoder


TEXT_TOKENS, STEPS, GRID = 60, 4, 16
SHAPES = {
    "small": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "extractor": 384,
    },
    "qwen0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "extractor": 1536,
    },
    "qwen7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "extractor": 1536,
    },
}
TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 224,
    "patch_size": 14,
}


def build(shape: str, device: str, dtype: torch.dtype) -> LaReForCausalLM:
    fields = dict(SHAPES[shape])
    extractor = fields.pop("extractor")
    text = {"model_type": "qwen2", "vocab_size": 1024, "eos_token_id": 1, "pad_token_id": 0, **fields}
    config = LaReConfig(
        text_config=text,
        vision_config=TOWER,
        vision_feature_layer=-1,
        image_token_index=1000,
        bot_token_id=1001,
        eot_token_id=1002,
        num_refocus_steps=STEPS,
        extractor_hidden_size=extractor,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LaReForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def stock(model: LaReForCausalLM, embeds: torch.Tensor, step: torch.Tensor) -> None:
    """Prefill, then four forwards on the cache."""
    text, cache = model.model.language_model, DynamicCache(config=model.config.text_config)
    text(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    for _ in range(STEPS):
        text(inputs_embeds=step, past_key_values=cache, use_cache=True)


@torch.no_grad()
def refocused(model: LaReForCausalLM, input_ids: torch.Tensor, embeds: torch.Tensor) -> None:
    """Prefill, then four refocusing steps."""
    end = torch.full((len(embeds),), embeds.shape[1], device=embeds.device)
    decoder = RefocusDecoder(model, RefocusContext([None]), None, True, {})
    decoder.run(input_ids, embeds, torch.ones_like(input_ids, dtype=torch.bool), Places(end, end))


def peak(call, device: str) -> int:
    """Most bytes that are allocated at a time during a call, beyond those allocated before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", default="out/lare_steps.json")
    args = parser.parse_args()
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = build(args.shape, device, dtype)
    ids = torch.tensor([[*[1000] * GRID**2, *range(100, 100 + TEXT_TOKENS)]], device=device)
    embeds = torch.randn(1, ids.shape[1], model.config.text_config.hidden_size, device=device, dtype=dtype) * 0.02
    step = torch.randn(1, model.config.num_step_latents, embeds.shape[-1], device=device, dtype=dtype) * 0.02
    arms = {"stock": lambda: stock(model, embeds, step), "lare": lambda: refocused(model, ids, embeds)}
    median = interleave(arms, args.repeats)
    peaks = {name: peak(call, device) for name, call in arms.items()}
    result = {
        "milliseconds": median,
        "time ratio": median["lare"] / median["stock"],
        "peak bytes": peaks,
        "peak ratio": peaks["lare"] / peaks["stock"],
        "peak ratio with weights": (peaks["lare"] + weights(model)) / (peaks["stock"] + weights(model)),
    }
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.shape}, {STEPS} steps of {step.shape[1]} latents, {machine}, medians of {args.repeats}")
    for name, value in median.items():
        print(
            f"  {name:6s} {value:9.1f} ms  {value / median['stock']:5.2f} x stock  {peaks[name] / 2**20:8.1f} MiB at most"
        )
    print(f"  peak memory {result['peak ratio']:.3f} x, with the weights {result['peak ratio with weights']:.3f} x")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps({"settings": vars(args), "machine": machine, "result": result}, indent=2))


def weights(model: LaReForCausalLM) -> int:
    return sum(weight.nbytes for weight in model.parameters())


if __name__ == "__main__":
    main()
