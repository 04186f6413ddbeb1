"""The paper's own figures, at its shape: milliseconds per latent, a block against what memory bandwidth allows, tokens/s.

DeepLatent's paper: 1.0 ms per latent in parallel and 86.1 ms one by one, 82 latents. The floor of a block is two passes over the
weights (the 4 tokens of `<latent>` and controls, then latents and `</latent>`) at the bandwidth of a copy in the same run.
"""

import statistics

import torch

from benchmarks.latent_blocks import block_arm
from benchmarks.measuring import Setting, Times, decoding_steps, interleave, timed
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
    return [*block_rows(times, count, floor, bandwidth, setting.device == "cuda"), text_row(times)]


def block_rows(times: Times, count: int, floor: float, bandwidth: float, has_goals: bool) -> list[Row]:
    """A block of `count` latents against the time its weights take to be read, the paper's figures, and latents one by one."""
    block, serial = times.median("block"), times.median("one by one")
    theirs = "counterpart: the paper's figure"
    parallel = ("ms", PAPER_PARALLEL_MS, block / count / PAPER_PARALLEL_MS)
    one_by_one = ("ms", PAPER_SERIAL_MS, serial / count / PAPER_SERIAL_MS)
    goals = ("<= 1.5", "<= 1", "<= 1") if has_goals else ("", "", "")
    note = f"bandwidth {bandwidth / 1e6:.0f} GB/s"
    latents = block * count / serial
    return [
        Row("paper", f"block of {count}, memory floor", block, "ms", floor, block / floor, goals[0], note),
        Row("paper", f"block of {count}, 15 ms", block, "ms", 15.0, block / 15.0, goals[1]),
        Row("paper", "one latent, parallel", block / count, *parallel, note=theirs),
        Row("paper", "one latent, one by one", serial / count, *one_by_one, note=theirs),
        Row("paper", "block / autoregressive latents", latents, "latents", 3.0, latents / 3, goals[2]),
    ]


def text_row(times: Times) -> Row:
    ours, stock = (1000 / times.median(name) for name in ("token", "stock token"))
    return Row("paper", "text", ours, "tokens/s", stock, times.ratio("stock token", "token"), ">= 0.98")
