"""How time and memory grow: with the prompt, the batch, the size of the image and the number of blocks.

A row's ratio on a curve is the slope from the point before, on logarithmic axes: 1 is linear, 2 quadratic. Batched latents are
held against stock `generate`: their throughput gain over one row, as a share of stock's. Goal: 0.8.
"""

import math
from collections.abc import Callable

from benchmarks.measuring import Setting, free_memory, interleave, peak_memory, timed
from benchmarks.models import Pair, deeplatent, qwen_inputs
from benchmarks.report import Row
from benchmarks.sizes import Sizes


MEBIBYTE = 2**20
GREEDY = {"do_sample": False, "eos_token_id": None}


def slope(before: Row | None, x: float, value: float) -> float | None:
    if before is None or before.value is None:
        return None
    return math.log(value / before.value) / math.log(x / before.x)


def curve(
    name: str,
    points: tuple[int, ...],
    calls_at: Callable[[int], dict],
    needed_at: Callable[[int], int],
    setting: Setting,
) -> list[Row]:
    """Time and memory of ours and of stock at every point; a point that would not fit is skipped with the figures."""
    rows, last = [], {}
    for point in points:
        needed, free = needed_at(point), free_memory(setting.device)
        if needed > free:
            note = f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
            rows.append(Row(f"{name}, time", f"ours, {point}", None, "ms", note=note))
            continue
        calls = calls_at(point)
        times = interleave({arm: timed(call, setting.device) for arm, call in calls.items()}, min(setting.repeats, 3))
        for arm, call in calls.items():
            for kind, unit, value in (
                ("time", "ms", times.median(arm)),
                ("memory", "MiB", peak_memory(call, setting.device) / MEBIBYTE),
            ):
                grown = slope(last.get((arm, kind)), point, value)
                note = "" if grown is None else f"slope {grown:.2f}"
                row = Row(f"{name}, {kind}", f"{arm}, {point}", value, unit, note=note, x=point)
                last[arm, kind] = row
                rows.append(row)
    return rows


def activations(pair: Pair, tokens: int) -> int:
    """Bytes of a prompt's cache and of its widest layer, generously."""
    text = pair.shape.text
    head = text["hidden_size"] // text["num_attention_heads"]
    cache = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * head
    widest = 4 * text["intermediate_size"] + 12 * text["hidden_size"]
    size = pair.ours.lm_head.weight.element_size()
    # Keys and values are copied for every group of query heads, layer by layer.
    return tokens * size * (2 * cache + widest)


def measure(sizes: Sizes, setting: Setting) -> list[Row]:
    pair = deeplatent(sizes.shape, setting)
    grid, block = sizes.paper_grid, {"min_latent_blocks": 1, "max_latent_blocks": 1, "latent_grid": sizes.paper_grid}
    extra = 5 + grid[0] * grid[1]
    side = max(2, pair.shape.image_side // 2)  # a small picture, so that there are short prompts
    own = side**2 + 2

    def arms(blocks: int = 1, words: int = sizes.words, batch: int = 1, image_side: int = side) -> dict:
        ours, stock = (qwen_inputs(pair, count, batch, image_side) for count in (words, words + blocks * extra))
        limits = block | {"min_latent_blocks": blocks, "max_latent_blocks": blocks}
        return {
            "ours": lambda: pair.ours.generate(**ours, max_new_tokens=1 + blocks, **limits, **GREEDY),
            "stock": lambda: pair.stock.generate(**stock, max_new_tokens=1 + blocks, **GREEDY),
        }

    def needs(tokens: int, batch: int = 1) -> int:
        return batch * activations(pair, tokens + extra)

    rows = curve("prompt length", sizes.lengths, lambda length: arms(words=length - own), needs, setting)
    rows += curve(
        "image size",
        sizes.image_sides,
        lambda side: arms(image_side=side),
        lambda side: needs(side**2 + sizes.words) + 4 * side**2 * 1176 * 4,
        setting,
    )
    rows += curve(
        "number of blocks",
        sizes.block_counts,
        arms,
        lambda blocks: needs(own + sizes.words + blocks * extra),
        setting,
    )
    batched = curve(
        "batch",
        sizes.batches,
        lambda batch: arms(batch=batch),
        lambda batch: needs(own + sizes.words, batch),
        setting,
    )
    return rows + batched + throughput(batched)


def throughput(rows: list[Row]) -> list[Row]:
    """Rows per second over those of one row alone, ours as a share of stock's."""
    times = {
        arm: {row.x: row.value for row in rows if row.unit == "ms" and row.value and row.case.startswith(arm)}
        for arm in ("ours", "stock")
    }
    found = []
    for batch in times["ours"]:
        if batch > 1:
            gains = [batch * times[arm][1] / times[arm][batch] for arm in ("ours", "stock")]
            case, note = f"{batch} rows with one block each", "throughput over that of one row"
            found.append(Row("batched latents", case, gains[0], "x", gains[1], gains[0] / gains[1], ">= 0.8", note))
    return found
