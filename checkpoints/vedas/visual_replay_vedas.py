"""Visual replay (Vedas, SCF-VR): which image tokens a latent step looks at again, and how they enter.

    I_t = the K image tokens with the most attention that no earlier step picked           eq. 5
    B_t = softmax(attention of I_t) * embeddings of I_t, in ascending position             eq. 6

Shapes: B rows, S prompt columns, M image tokens of a row (padded to the most), K picked tokens, D hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass
class ImageTokens:
    """The image tokens of every row, and which of them were picked already."""

    columns: Tensor  # (B, M) their columns in the prompt
    exists: Tensor  # (B, M) bool
    embeds: Tensor  # (B, M, D)
    positions: Tensor  # (3, B, M)
    visited: Tensor  # (B, M) bool
    fewest: int  # tokens that the row with fewest has left: on the host, so that no step waits for the device

    @classmethod
    def find(cls, is_image: Tensor, embeds: Tensor, positions: Tensor) -> "ImageTokens":
        """Collect them from a prompt: (B, S) bool, (B, S, D), (3, B, S)."""
        columns = [row.nonzero().flatten() for row in is_image]
        lengths = [len(row) for row in columns]
        columns = pad_sequence(columns, batch_first=True)
        order = torch.arange(columns.shape[1], device=columns.device)
        exists = torch.stack([order < length for length in lengths])
        index = columns[..., None].expand(-1, -1, embeds.shape[-1])
        return cls(
            columns=columns,
            exists=exists,
            embeds=embeds.gather(1, index),
            positions=positions.gather(2, columns.expand(3, -1, -1)),
            visited=torch.zeros_like(exists),
            fewest=min(lengths),
        )


@dataclass
class Replay:
    """What one step replays. Slots stay K wide; those that nothing fills are masked."""

    embeds: Tensor  # (B, K, D), weighted
    attended: Tensor  # (B, K) bool
    tokens: Tensor  # (B, K) numbers of the picked image tokens within their row, -1 where none
    positions: Tensor  # (3, B, K) of the picked tokens
    picked_embeds: Tensor  # (B, K, D) of the picked tokens themselves
    is_full: bool = False  # whether all of `attended` is known to be True


def pick_tokens(attention: Tensor, tokens: ImageTokens, count: int, scale: float, pattern: str) -> Replay:
    """Pick the tokens of one step and mark them as visited.

    Args:
        attention: (B, S) of the step's query to the prompt, float32.
        pattern: "tokens", or "soft_mix" for their weighted sum as one token.
    """
    scores = attention.gather(1, tokens.columns)
    open_scores = scores.masked_fill(~tokens.exists | tokens.visited, float("-inf"))
    # A stable sort: ties go to the earlier token.
    best = open_scores.detach().sort(dim=1, descending=True, stable=True).indices[:, :count]
    picked = best.sort(dim=1).values  # ascending position
    attended = open_scores.gather(1, picked).isfinite()
    tokens.visited = tokens.visited.scatter(1, picked, tokens.visited.gather(1, picked) | attended)
    weights = scores.gather(1, picked).masked_fill(~attended, torch.finfo(scores.dtype).min).softmax(dim=1) * attended
    index = picked[..., None].expand(-1, -1, tokens.embeds.shape[-1])
    picked_embeds = tokens.embeds.gather(1, index)
    embeds = picked_embeds * (scale * weights)[..., None].to(tokens.embeds.dtype)
    positions = tokens.positions.gather(2, picked.expand(3, -1, -1))
    numbers = picked.masked_fill(~attended, -1)
    width, left = picked.shape[1], tokens.fewest
    tokens.fewest = max(0, left - width)
    if pattern == "soft_mix":
        mixed = embeds.sum(dim=1, keepdim=True)
        is_any = attended.any(dim=1, keepdim=True)
        return Replay(mixed, is_any, numbers, positions[..., :1], picked_embeds, is_full=width > 0 and left > 0)
    return Replay(embeds, attended, numbers, positions, picked_embeds, is_full=left >= width)


def densest_window(
    picked: list[int], grids: list[tuple[int, int]], size: int
) -> tuple[int, int, int, int, int] | None:
    """Find the window with most picked tokens (eq. 7): (image, top, left, height, width), None if nothing was picked.

    Args:
        picked: numbers of image tokens, counted through the images of a row.
        grids: (height, width) of those images in merged patches.
        size: side of the window; clamped to each grid. Ties go to the first in raster order, and the first image.
    """
    best, most, first = None, 0, 0
    for image, (height, width) in enumerate(grids):
        counts = torch.zeros(height + 1, width + 1, dtype=torch.long)
        for token in picked:
            if first <= token < first + height * width:
                counts[(token - first) // width + 1, (token - first) % width + 1] += 1
        first += height * width
        total = counts.cumsum(0).cumsum(1)
        h, w = min(size, height), min(size, width)
        held = total[h:, w:] - total[:-h, w:] - total[h:, :-w] + total[:-h, :-w]
        if held.max() > most:
            most = held.max()
            best = (image, *(held == most).nonzero()[0].tolist(), h, w)
    return best
