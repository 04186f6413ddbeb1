"""DeepLatent's block: against its latents one by one, and against what it cannot do without.

The floor of a block is one forward over 4 tokens (`<latent>` and the controls), one over N + 1 (latents and `</latent>`),
each on the prompt's cache and with the logits of one position, and the LatentFormer's matrix products.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache

from benchmarks.measuring import Arm, Setting, decoding_steps, interleave, timed
from benchmarks.models import Pair, deeplatent, qwen_inputs
from benchmarks.report import Row
from benchmarks.sizes import Sizes
from configuration_latentvlm.transformers_api import cache_keyword
from modeling_latentvlm.latent_former_deeplatent import LatentFormerAttention
from modeling_latentvlm.row_images import RowImages


def block_arm(model, inputs: dict, setting: Setting, grid: tuple[int, int]) -> Arm:
    """The step of an answer that takes in `<latent>` and gives the logits behind `</latent>`."""
    settings = {"min_latent_blocks": 1, "max_latent_blocks": 1, "latent_grid": grid}
    return lambda: decoding_steps(model, inputs, setting.device, 2, **settings)[0]


def forward_arm(pair: Pair, seen: int, count: int) -> Arm:
    """One forward of the language model over `count` tokens behind `seen` others, and the logits of the last."""
    setting, text_model = pair.setting, pair.text_model
    cache = DynamicCache(config=text_model.config)
    states = torch.randn(1, max(seen, count), pair.hidden_size, device=setting.device, dtype=setting.dtype) * 0.02
    positions = torch.arange(seen, seen + count, device=setting.device).expand(3, 1, -1)

    @torch.no_grad()
    def fill() -> None:
        if cache.get_seq_length() == 0:
            text_model(inputs_embeds=states[:, :seen], use_cache=True, **cache_keyword(cache))
        surplus = cache.get_seq_length() - seen
        if surplus:
            cache.crop(-surplus)

    @torch.no_grad()
    def run() -> None:
        new = text_model(
            inputs_embeds=states[:, :count], position_ids=positions, use_cache=True, **cache_keyword(cache)
        ).last_hidden_state
        pair.ours.lm_head(new[:, -1:])

    return timed(run, setting.device, fill)


def products_arm(pair: Pair, grid: tuple[int, int], image_side: int) -> Arm:
    """The matrix products of one LatentFormer run, alone: its linear maps and its attention, at their shapes."""
    builder, setting, calls = pair.ours.latent_blocks, pair.setting, []
    latents, seen = grid[0] * grid[1], image_side**2
    like = builder.queries.weight

    def note(module: nn.Module, args: tuple, output) -> None:
        calls.append(partial(F.linear, torch.randn_like(args[0]), module.weight))

    def note_attention(module: LatentFormerAttention, args: tuple, output) -> None:
        heads, size = module.num_heads, like.shape[-1] // module.num_heads
        query, key = (torch.randn(1, heads, part.shape[1], size).to(like) for part in args[:2])
        calls.append(partial(F.scaled_dot_product_attention, query, key, key))

    hooks = []
    for module in builder.modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(note))
        elif isinstance(module, LatentFormerAttention):
            hooks.append(module.register_forward_hook(note_attention))
    with torch.no_grad():
        image = RowImages(torch.randn(seen, like.shape[-1]).to(like), [(image_side, image_side)], [0])
        built = builder(torch.randn(1, 3, like.shape[-1]).to(like), [image], [grid])
    for hook in hooks:
        hook.remove()
    assert len(built.latents[0]) == latents

    @torch.no_grad()
    def run() -> None:
        for call in calls:
            call()

    return timed(run, setting.device)


def measure(sizes: Sizes, setting: Setting) -> list[Row]:
    pair, rows = deeplatent(sizes.shape, setting), []
    inputs, twin = qwen_inputs(pair, sizes.words), pair.twins["autoregressive"]
    seen = inputs["input_ids"].shape[1]
    for grid in sizes.grids:
        count = grid[0] * grid[1]
        arms = {
            "block": block_arm(pair.ours, inputs, setting, grid),
            "one by one": block_arm(twin, inputs, setting, (1, count)),
            "4 tokens": forward_arm(pair, seen, 4),
            "N + 1 tokens": forward_arm(pair, seen + 4, count + 1),
            "products": products_arm(pair, grid, sizes.shape.image_side),
        }
        times = interleave(arms, setting.repeats)
        floors = ("4 tokens", "N + 1 tokens", "products")
        times["floor"] = [sum(parts) for parts in zip(*(times[name] for name in floors))]
        block, serial = times.median("block"), times.median("one by one")
        parts = " + ".join(f"{times.median(name):.2f}" for name in floors)
        one = serial / count
        rows += [
            Row(
                "block, floor",
                f"N = {count}",
                block,
                "ms",
                times.median("floor"),
                times.ratio("block", "floor"),
                "<= 1.2",
                f"floor: {parts} ms",
            ),
            Row(
                "block, one by one",
                f"N = {count}",
                serial,
                "ms",
                block,
                times.ratio("one by one", "block"),
                ">= 35" if setting.device == "cuda" and count >= 82 else "",
                f"a block is {block / one:.2f} autoregressive latents, {block / count:.3f} ms per latent",
            ),
        ]
    return rows
