"""Autoregressive latents: the last hidden state of a position is the input of the next.

    z_1 = decoder(.. <latent>)[-1];  z_i+1 = decoder(z_i)[-1]

Each latent is one forward of the language model. The last one is left to the next segment, together with the text behind it.

Shapes: B rows, N latents of a block, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .block_latents import BlockLatents
from .block_segments import Block, Segment
from .block_sites import BlockSite


class AutoregressiveLatents(BlockLatents):
    """A block of 1 x N latents, N by default `config.num_autoregressive_latents`."""

    is_one_at_a_time = True

    def check_grid(self, grid: Sequence[int], where: str) -> None:
        super().check_grid(grid, where)
        if grid[0] != 1 or grid[1] < 1:
            raise ValueError(f"An autoregressive block is 1 x K latents, got {grid[0]} x {grid[1]} in {where}.")

    def largest_grid(self) -> tuple[int, int]:
        return (1, self.config.num_autoregressive_latents)

    def count_inner_forwards(self, grid: tuple[int, int]) -> int:
        return grid[1] - 1

    def build(self, decoder, opened: dict[int, BlockSite], segment: Segment, number: int) -> dict[int, Block]:
        context, state = decoder.context, decoder.state
        grids = {row: site.grid or context.grid or self.largest_grid() for row, site in opened.items()}
        images = {row: decoder.images_of(row, site) for row, site in opened.items()}
        latents = {row: segment.layers[0][row, len(segment.rows[row].embeds) - 1][None] for row in opened}
        first = {row: segment.rows[row].open_position + 1 for row in opened}
        collected: dict[int, list[Tensor]] = {row: [] for row in opened}
        decoded: dict[int, list[list[Tensor]]] = {row: [] for row in opened}
        for index in range(max(width for _, width in grids.values())):
            # What an intervention makes of a latent is what the next one follows from.
            active = [row for row in opened if index < grids[row][1]]
            steps = [
                replace(decoder.describe(row, opened[row], (1, 1), latents[row], images[row]), offset=index)
                for row in active
            ]
            for row, changed in zip(active, context.intervene(steps, len(state.attention_mask))):
                collected[row].append(changed)
            following = [row for row in active if index + 1 < grids[row][1]]
            if not following:
                continue
            layers = self.decode_one(
                decoder, {row: (collected[row][-1], first[row] + index, opened[row]) for row in following}
            )
            for row in following:
                latents[row] = layers[0][row]
                decoded[row].append([layer[row] for layer in layers])
        blocks = {}
        for row, site in opened.items():
            step = decoder.describe(row, site, grids[row], latents[row], images[row])
            decoder.record(step, torch.cat(collected[row]))
            width = grids[row][1]
            last = (first[row] + width - 1)[None]
            blocks[row] = decoder.bind_block(segment.rows[row], collected[row][-1], last, width)
            blocks[row].decoded = decoded[row]
        return blocks

    def decode_one(self, decoder, latents: dict[int, tuple[Tensor, Tensor, BlockSite]]) -> list[Tensor]:
        """One forward over a single latent of some rows; the others are masked."""
        values, place, site = next(iter(latents.values()))
        nothing = (torch.zeros_like(values), torch.zeros_like(place), replace(site, num_pads=0))
        rows = range(decoder.state.attention_mask.shape[0])
        values, places, sites = zip(*(latents.get(row, nothing) for row in rows))
        # Stacked from what is on the device: a list of rows would be copied there, and waited for, at every latent.
        flags = [values[0].new_full((1,), flag, dtype=torch.bool) for flag in (False, True)]
        is_token = torch.stack([flags[site.num_pads > 0] for site in sites])
        attended = None
        if len(latents) < len(rows):
            attended = torch.stack([flags[row in latents] for row in rows])
        positions = torch.stack(places)[:, None].permute(2, 0, 1)
        return decoder.decode(torch.stack(values), positions, attended, is_token, **decoder.wanted)
