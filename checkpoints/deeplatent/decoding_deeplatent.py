"""DeepLatent's latents: all of a block at once, from three control states and the image (`latent_former_deeplatent.py`).

Shapes: R blocks built together, N latents of a block, D hidden size, G largest grid side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_latents import BlockLatents
from .block_segments import Block, Segment
from .block_sites import BlockSite
from .decoding_blocks import BlockContext
from .latent_former_deeplatent import grid_places
from .row_images import RowImages


@dataclass
class DeepLatentContext(BlockContext):
    """`BlockContext` with what the modulation may be told."""

    noise: bool = False  # the stochastic term of eq. 3
    modulator: Callable | None = None  # (row, number of the block in it, ...), then as `Modulator` of the LatentFormer


class ParallelLatents(BlockLatents):
    """A block of height x width latents, from the hidden states of e_s, e_q, e_v."""

    num_controls = 3

    def check_grid(self, grid: Sequence[int], where: str) -> None:
        super().check_grid(grid, where)
        if not all(1 <= side <= self.config.latent_grid_size for side in grid):
            raise ValueError(
                f"A latent grid must lie within 1..{self.config.latent_grid_size} (`latent_grid_size`) in height and width, "
                f"got {grid[0]} x {grid[1]} in {where}."
            )

    def largest_grid(self) -> tuple[int, int]:
        return (self.config.latent_grid_size, self.config.latent_grid_size)

    def embed_controls(self, device: torch.device) -> Tensor:
        return self.model.latent_control(torch.arange(self.num_controls, device=device))

    def build(self, decoder, opened: dict[int, BlockSite], segment: Segment, number: int) -> dict[int, Block]:
        context = decoder.context
        ends = torch.stack([segment.layers[0][row, len(segment.rows[row].embeds) - 3 :][:3] for row in opened])
        images = {row: decoder.images_of(row, site) for row, site in opened.items()}
        rows_without_image = [row for row in opened if images[row] is None]
        if rows_without_image:
            row = rows_without_image[0]
            raise ValueError(
                f"Row {row} opens a latent block at column {opened[row].column}, but has no image before it."
            )
        built = self.model.latent_blocks(
            ends,
            list(images.values()),
            [site.grid or context.grid for site in opened.values()],
            context.noise,
            context.output_latents,
            None if context.modulator is None else self.modulators(context, list(opened)),
        )
        steps = [
            decoder.describe(row, site, grid, latents.to(ends), images[row])
            for (row, site), grid, latents in zip(opened.items(), built.grids, built.latents)
        ]
        for step, attention in zip(steps, built.image_attention or ()):
            step.image_attention = attention.detach()
        blocks = {}
        for index, (step, latents) in enumerate(
            zip(steps, context.intervene(steps, len(decoder.state.attention_mask)))
        ):
            decoder.record(step, latents)
            row, (height, width) = step.row, step.grid
            first = segment.rows[row].open_position + 1 + self.num_controls
            offsets = F.pad(grid_places(height, width, first.device).long(), (1, 0))
            blocks[row] = decoder.bind_block(segment.rows[row], latents, first + offsets, max(height, width))
            blocks[row].scale_logits = (built.height_logits[index], built.width_logits[index])
        return blocks

    def modulators(self, context: DeepLatentContext, rows: list[int]) -> list[Callable]:
        """The caller's modulator for each row, told which block of the row it is."""
        numbers = [sum(step.row == row for step in context.steps) for row in rows]
        return [partial(context.modulator, row, number) for row, number in zip(rows, numbers)]

    def run_dummy(self, states: Tensor) -> list[Tensor]:
        """One block of a single latent from an empty image."""
        image = RowImages(states.new_zeros(1, states.shape[-1]), [(1, 1)], [0])
        built = self.model.latent_blocks(states[:1, -1:].expand(-1, 3, -1), [image], [(1, 1)])
        is_predicted = self.config.latent_scale == "predicted"
        return [*built.latents, *([built.height_logits, built.width_logits] if is_predicted else [])]


def collect_scales(blocks: list[Block], config) -> tuple[Tensor, Tensor] | None:
    """The logits of height and width of all blocks, 2 x (blocks, G), where the model predicts them."""
    if config.latent_scale != "predicted" or not blocks or blocks[0].scale_logits is None:
        return None
    return tuple(torch.stack([block.scale_logits[axis] for block in blocks]) for axis in (0, 1))


def scale_loss(logits: tuple[Tensor, Tensor], blocks: list[Block]) -> Tensor:
    """Cross-entropy of height plus that of width, averaged over blocks (DeepLatent, eq. 7)."""
    targets = torch.tensor([block.site.grid for block in blocks]).to(logits[0].device) - 1
    return sum(F.cross_entropy(one, targets[:, axis]) for axis, one in enumerate(logits))
