"""The sliding window of LaRe: where a refocusing step looks, as pure functions.

A map of attention to the tokens of each image is sum-pooled over every place of a w x w window; the tokens at the best
place are what the step looks at. Ties go to the first place in raster order, the first image first.

Shapes: B rows, S columns of the prompt, I images of a row (padded to the most), G side of an image's grid, M = I * G * G
image tokens of a row, W windows of a step, w side of a window, D hidden size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class VisualTokens:
    """The image tokens of every row, in the order in which they stand."""

    columns: Tensor  # (B, M) their columns in the prompt
    exists: Tensor  # (B, M) bool
    prompt: Tensor  # (B, S, D) embeddings, of which theirs are taken when they are needed
    grid_size: int  # G

    @classmethod
    def find(cls, is_image: Tensor, embeds: Tensor, grid_size: int) -> "VisualTokens":
        """Collect them from a prompt: (B, S) bool, (B, S, D)."""
        counts = is_image.sum(dim=1)
        columns = (~is_image).int().argsort(dim=1, stable=True)[:, : int(counts.max())]
        exists = torch.arange(columns.shape[1], device=columns.device) < counts[:, None]
        return cls(columns, exists, embeds, grid_size)

    def take(self, numbers: Tensor) -> Tensor:
        """Embeddings of tokens by their numbers within their row: (B, T) to (B, T, D)."""
        rows = torch.arange(len(numbers), device=numbers.device)[:, None]
        return self.prompt[rows, self.columns.gather(1, numbers)]

    def maps(self, attention: Tensor) -> Tensor:
        """(B, I, G, G) of a row of attention over the prompt, (B, S); -inf where a row has no such image."""
        values = attention.to(self.columns.device).gather(1, self.columns).masked_fill(~self.exists, float("-inf"))
        return values.unflatten(1, (-1, self.grid_size, self.grid_size))


@dataclass
class Focus:
    """The image tokens that one step looks at."""

    tokens: Tensor  # (B, T) numbers of the tokens within their row
    exists: Tensor  # (B, T) bool; a token is in it once
    windows: Tensor | None = None  # (B, W, 3) image, top, left; -1 in a row without images


def pool_windows(maps: Tensor, size: int) -> Tensor:
    """Sum over every place of a window: (B, I, G, G) to (B, I, G - w + 1, G - w + 1)."""
    return F.avg_pool2d(maps, size, stride=1, divisor_override=1)


def find_window(maps: Tensor, size: int) -> Tensor:  # (B, 3) image, top, left
    """The best place of each row; (0, 0, 0) where a row has no image."""
    pooled = pool_windows(maps, size)
    side = pooled.shape[-1]
    best = pooled.flatten(1).argmax(dim=1)  # the first of equals
    return torch.stack([best // side**2, best // side % side, best % side], dim=1)


def window_tokens(window: Tensor, size: int, grid_size: int) -> Tensor:  # (B, 3) -> (B, w * w)
    """Numbers of the tokens in a window, in raster order."""
    image, top, left = window.unbind(dim=1)
    steps = torch.arange(size, device=window.device)
    rows, columns = top[:, None] + steps, left[:, None] + steps
    return ((image[:, None] * grid_size + rows)[:, :, None] * grid_size + columns[:, None]).flatten(1)


def focus_on_windows(maps: Tensor, size: int, count: int) -> Focus:
    """Take `count` windows, one after the other. A later one counts only the tokens that the earlier ones left.

    Args:
        maps: (B, I, G, G); I at least 1.
    """
    has_image = maps.isfinite().any(dim=(1, 2, 3))
    left, grid_size = maps, maps.shape[-1]
    windows, tokens, fresh = [], [], []
    taken = torch.zeros_like(maps.flatten(1), dtype=torch.bool)
    for _ in range(count):
        window = find_window(left, size)
        found = window_tokens(window, size, grid_size)
        windows.append(window.masked_fill(~has_image[:, None], -1))
        tokens.append(found)
        fresh.append(~taken.gather(1, found) & has_image[:, None])
        taken = taken.scatter(1, found, True)
        left = maps.masked_fill(taken.view_as(maps) & maps.isfinite(), 0)
    return Focus(torch.cat(tokens, dim=1), torch.cat(fresh, dim=1), torch.stack(windows, dim=1))


def focus_on_all(tokens: VisualTokens) -> Focus:
    numbers = torch.arange(tokens.exists.shape[1], device=tokens.exists.device)
    return Focus(numbers.expand_as(tokens.exists), tokens.exists)
