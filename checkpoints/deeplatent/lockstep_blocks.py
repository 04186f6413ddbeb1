"""Blocks in a sharded model: every process runs as many forwards as the one with most blocks and images (`lockstep.py`).

`run_in_lockstep` wraps a model's `forward`, which itself knows nothing of other processes.
"""

import inspect
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor, nn

from .block_latents import BlockLatents
from .block_segments import Segment
from .block_sites import BlockSite
from .decoding_blocks import BlockDecoder
from .lockstep import Lockstep, agree_on_work, is_sharded, keep_in_graph


PIXELS = ("pixel_values", "pixel_values_videos")
RETURNED = ("loss", "logits", "last_hidden_state", "latent_states")  # that a backward pass may start from


def run_in_lockstep(forward: Callable) -> Callable:
    """Wrap the `forward` of a `LatentBlocksMixin`: in a sharded model, run what other processes run more than this one."""
    signature = inspect.signature(forward)

    @wraps(forward)
    def in_step(self, *args, **kwargs):
        if kwargs.get("latent_context") is not None or not is_sharded(self):
            return forward(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        sites = self._find_sites(given.get("input_ids"), given.get("latent_grid_hw"), None)
        numbers = range(max((len(row) for row in sites), default=0))
        inner = self.block_latents.count_inner_forwards
        steps = [max(inner(row[number].grid) for row in sites if number < len(row)) for number in numbers]
        num_passes = sum(given.get(name) is not None for name in PIXELS)
        lockstep = agree_on_work(steps, num_passes, self.lm_head.weight.device)
        lockstep.idle += run_dummy_vision(self, lockstep.num_vision_passes - num_passes)
        output = forward(self, *args, **kwargs, lockstep=lockstep)
        for name in RETURNED:
            if output.get(name) is not None:
                output[name] = keep_in_graph(output[name], lockstep.idle)
        return output

    return in_step


def run_dummy_vision(model: nn.Module, num_passes: int) -> list[Tensor]:
    """Run the vision tower on an empty picture as often as another process runs it more than this one."""
    tower, device = model.config.vision_config, model.lm_head.weight.device
    side = tower.spatial_merge_size
    size = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
    seen = []
    for _ in range(num_passes):
        pixels = torch.zeros(side * side, size, device=device, dtype=model.dtype)
        grid = torch.tensor([[1, side, side]], device=device)
        seen += model.model.get_image_features(pixels, grid, return_dict=True).pooler_output
    return seen


class LockstepDecoder(BlockDecoder):
    """`BlockDecoder` that builds and runs nothing where other processes build blocks and run segments."""

    def __init__(self, lockstep: Lockstep, *args):
        super().__init__(*args)
        self.lockstep, self.always_in_segments = lockstep, bool(lockstep.block_steps)
        self.latents = LockstepLatents(self.latents, lockstep)

    def run_segments(self, embeds: Tensor, positions: Tensor, mask: Tensor | None, sites) -> list[Segment]:
        segments = super().run_segments(embeds, positions, mask, sites)
        layers = segments[-1].layers
        for number in range(len(segments) - 1, len(self.lockstep.block_steps)):
            self.lockstep.idle += self.latents.run_dummy(layers[0])
            for _ in range(self.lockstep.block_steps[number]):
                self.run_dummy_forward(layers)
            layers = self.run_dummy_forward(layers)
        return segments

    def run_dummy_forward(self, layers: list[Tensor]) -> list[Tensor]:
        """One forward over a masked token."""
        # From real states, so that the backward pass runs through it as it does elsewhere.
        embeds = 0 * layers[0][:, -1:]
        positions = torch.zeros(3, len(embeds), 1, dtype=torch.long, device=embeds.device)
        masked = torch.zeros(len(embeds), 1, dtype=torch.bool, device=embeds.device)
        decoded = self.decode(embeds, positions, masked, masked)
        self.lockstep.idle.append(decoded[0])
        return decoded


class LockstepLatents:
    """`BlockLatents` that runs as many forwards inside a block as the process with the largest one."""

    def __init__(self, latents: BlockLatents, lockstep: Lockstep):
        self.latents, self.lockstep = latents, lockstep

    def __getattr__(self, name: str):
        return getattr(self.latents, name)

    def build(self, decoder: LockstepDecoder, opened: dict[int, BlockSite], segment: Segment, number: int):
        blocks = self.latents.build(decoder, opened, segment, number)
        own = max(self.latents.count_inner_forwards(site.grid) for site in opened.values())
        for _ in range(self.lockstep.block_steps[number] - own):
            decoder.run_dummy_forward(segment.layers)
        return blocks
