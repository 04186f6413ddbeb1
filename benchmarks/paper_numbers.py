"""The paper's own figures, at its shape: milliseconds per latent, a block against what memory bandwidth allows, tokens/s.

DeepLatent's paper, table 3 (7B, the same hardware for both):

    |                                       | a latent | latents a thought | a thought |
    |---------------------------------------|----------|-------------------|-----------|
    | DeepLatent, in parallel               |   1.0 ms |              82.7 |   86.1 ms |
    | autoregressive (Monet), one by one    |  34.9 ms |               6.5 |    227 ms |

So a latent is 35x and a thought 2.6x faster in parallel, and a whole parallel thought takes as long as 2.5 latents one by one. The
floor of a block is two passes over the weights (the 4 tokens of `<latent>` and controls, then latents and `</latent>`) at the
bandwidth of a copy in the same run.
"""

import statistics

import torch

from benchmarks.latent_blocks import block_arm
from benchmarks.measuring import Setting, Times, decoding_steps, interleave, timed
from benchmarks.models import deeplatent, qwen_inputs, weight_bytes
from benchmarks.report import Row
from benchmarks.sizes import Sizes


PAPER_PARALLEL_MS, PAPER_PARALLEL_LATENTS, PAPER_PARALLEL_THOUGHT_MS = 1.0, 82.7, 86.1
PAPER_SERIAL_MS, PAPER_SERIAL_LATENTS, PAPER_SERIAL_THOUGHT_MS = 34.9, 6.5, 227.0
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
    """A block of `count` latents against the time its weights take to be read, and both ways against the paper's figures.

    A thought of the parallel way is the block; one of the other way is as many latents as the paper's has. The paper's figures are goals
    on a GPU alone, and those of a parallel thought for a block of its size alone.
    """
    block, serial = times.median("block"), times.median("one by one") / count  # of all latents, of one
    thought = PAPER_SERIAL_LATENTS * serial
    note = f"bandwidth {bandwidth / 1e6:.0f} GB/s"
    is_papers = count >= int(PAPER_PARALLEL_LATENTS)

    def goal(text: str, is_given: bool = True) -> str:
        return text if has_goals and is_given else ""

    def against(case: str, value: float, unit: str, paper: float, wanted: str) -> Row:
        return Row("paper", case, value, unit, paper, value / paper, wanted, "counterpart: the paper's figure")

    latents, speedup = PAPER_PARALLEL_THOUGHT_MS / PAPER_SERIAL_MS, PAPER_SERIAL_MS / PAPER_PARALLEL_MS
    shares = PAPER_PARALLEL_THOUGHT_MS / PAPER_SERIAL_THOUGHT_MS
    return [
        Row("paper", f"block of {count}, memory floor", block, "ms", floor, block / floor, goal("<= 1.5"), note),
        Row("paper", f"block of {count}, 15 ms", block, "ms", 15.0, block / 15.0, goal("<= 1")),
        against("one latent, parallel", block / count, "ms", PAPER_PARALLEL_MS, goal("<= 1", is_papers)),
        against("one latent, one by one", serial, "ms", PAPER_SERIAL_MS, goal("<= 1")),
        against(f"thought, parallel ({count})", block, "ms", PAPER_PARALLEL_THOUGHT_MS, goal("<= 1", is_papers)),
        against(f"thought, one by one ({PAPER_SERIAL_LATENTS})", thought, "ms", PAPER_SERIAL_THOUGHT_MS, goal("<= 1")),
        against("one latent, times faster in parallel", serial * count / block, "x", speedup, goal(">= 1", is_papers)),
        against("thought, parallel / one by one", block / thought, "", shares, goal("<= 1", is_papers)),
        against("block / autoregressive latents", block / serial, "latents", latents, goal("<= 1", is_papers)),
    ]


def text_row(times: Times) -> Row:
    ours, stock = (1000 / times.median(name) for name in ("token", "stock token"))
    return Row("paper", "text", ours, "tokens/s", stock, times.ratio("stock token", "token"), ">= 0.98")
