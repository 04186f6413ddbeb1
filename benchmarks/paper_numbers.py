"""The paper's own figures, at its shape: milliseconds per latent, a block against what memory bandwidth allows, tokens/s.

DeepLatent's paper: 1.0 ms per latent in parallel and 86.1 ms one by one, 82 latents. The floor of a block is two passes over the
weights (the 4 tokens of `<latent>` and controls, then latents and `</latent>`) at the bandwidth of a copy in the same run.
"""

import statistics

import torch

from benchmarks.latent_blocks import block_arm
from benchmarks.measuring import Setting, decoding_steps, interleave, timed
from benchmarks.models import deeplatent, qwen_inputs, weight_bytes
from benchmarks.report import Row
from benchmarks.sizes import Sizes


PAPER_PARALLEL_MS, PAPER_SERIAL_MS = 1.0, 86.1
COPIED_BYTES = {"cuda": 2**31, "cpu": 2**24}


def measure(sizes: Sizes, setting: Setting) -> list[Row]:
    pair, grid = deeplatent(sizes.shape, setting), sizes.paper_grid
    inputs, count, twin = qwen_inputs(pair, sizes.words), grid[0] * grid[1], pair.twins["autoregressive"]
    source = torch.zeros(COPIED_BYTES[setting.device], dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)

    def token_arm(model):
        return lambda: statistics.median(decoding_steps(model, inputs, setting.device, sizes.new_tokens))

    arms = {
        "copy": timed(lambda: target.copy_(source), setting.device),
        "block": block_arm(pair.ours, inputs, setting, grid),
        "one by one": block_arm(twin, inputs, setting, (1, count)),
        "token": token_arm(pair.ours),
        "stock token": token_arm(pair.stock),
    }
    times = interleave(arms, setting.repeats)
    bandwidth = 2 * source.nbytes / times.median("copy")  # bytes per millisecond, read and written
    passes = 2 * weight_bytes(pair.text_model.layers) + weight_bytes(pair.ours.lm_head)
    floor = (passes + weight_bytes(pair.ours.latent_blocks)) / bandwidth
    block, serial = times.median("block"), times.median("one by one")
    stock = times.median("stock token")
    on_gpu = setting.device == "cuda"
    return [
        Row(
            "paper",
            f"block of {count}, memory floor",
            block,
            "ms",
            floor,
            block / floor,
            "<= 1.5" if on_gpu else "",
            f"bandwidth {bandwidth / 1e6:.0f} GB/s",
        ),
        Row("paper", f"block of {count}, 15 ms", block, "ms", 15.0, block / 15.0, "<= 1" if on_gpu else ""),
        Row(
            "paper",
            "one latent, parallel",
            block / count,
            "ms",
            PAPER_PARALLEL_MS,
            block / count / PAPER_PARALLEL_MS,
            note="counterpart: the paper's figure",
        ),
        Row(
            "paper",
            "one latent, one by one",
            serial / count,
            "ms",
            PAPER_SERIAL_MS,
            serial / count / PAPER_SERIAL_MS,
            note="counterpart: the paper's figure",
        ),
        Row(
            "paper",
            "block / autoregressive latents",
            block * count / serial,
            "latents",
            3.0,
            block * count / serial / 3,
            "<= 1" if on_gpu else "",
        ),
        Row(
            "paper",
            "text",
            1000 / times.median("token"),
            "tokens/s",
            1000 / stock,
            times.ratio("stock token", "token"),
            ">= 0.98",
        ),
    ]
