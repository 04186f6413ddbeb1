"""What an architecture that opens latent blocks says of them. The machinery of blocks is written over these two hooks:

    block_tokens     what opens a block: the tokens of `BlockTokens`
    block_latents    what the latents of a block are: an object of a subclass of `BlockLatents`

Both are properties of the model class (`modeling_blocks.py`). `decoding_deeplatent.py` builds all latents of a block in parallel,
`decoding_autoregressive.py` feeds the last hidden state back, one latent a forward.

Shapes: C controls, N latents of a block, D hidden size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class BlockTokens(NamedTuple):
    """The token ids of a block: `start` opens it, `pad` stands for each control and latent, `end` closes it."""

    start: int
    pad: int
    end: int


class BlockLatents:
    """What the latents of a block are. Holds no state of a call, so threads may share it."""

    is_one_at_a_time = False  # whether an intervention is shown the latents one by one, never a whole block
    num_controls = 0  # learned embeddings between the opening token and the latents

    def __init__(self, model):
        self.model, self.config = model, model.config

    def check_grid(self, grid: Sequence[int], where: str) -> None:
        """Raise unless `grid` is a (height, width) that the model can build."""
        if len(grid) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) for side in grid):
            raise ValueError(f"A latent grid is (height, width) in whole numbers, got {grid} in {where}.")

    def largest_grid(self) -> tuple[int, int]:
        """(height, width) of the largest block that the model opens by itself."""
        raise NotImplementedError

    def embed_controls(self, device: torch.device) -> Tensor:
        """(C, D), what stands between the opening token and the latents."""
        raise NotImplementedError

    def build(self, decoder, opened: dict, segment, number: int) -> dict:
        """Build the blocks that rows open at the end of a segment.

        Args:
            decoder: the `BlockDecoder` that runs.
            opened: row -> its `BlockSite`, at least one.
            segment: the `Segment` that the language model has just run; its last columns are the opening token and the controls.
            number: of the block in its row.

        Returns:
            Row -> `Block`, made by `decoder.bind_block`.
        """
        raise NotImplementedError

    def count_inner_forwards(self, grid: tuple[int, int]) -> int:
        """Forwards of the language model inside a block of this size: processes that share a sharded model agree on them."""
        return 0

    def run_dummy(self, states: Tensor) -> list[Tensor]:
        """Run the modules of `build` on nothing, because another process builds a block: whatever they return."""
        return []
