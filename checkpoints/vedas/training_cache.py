"""Keys and values in training: one cache object per segment, so that gradient checkpointing can run a segment's layers again.

Shapes: B rows, S new tokens, D hidden size.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class SegmentLayer(DynamicLayer):
    """Keys and values of one segment beside those of the earlier ones, never written twice.

    Under gradient checkpointing a layer runs again in the backward pass. Then it must see what it saw before: the
    pieces before its own segment, as the tensors they were, and its own result must not be appended a second time.
    """

    def __init__(self, pieces: tuple[tuple[Tensor, Tensor], ...] = ()):
        super().__init__()
        self.pieces, self.own = pieces, None

    def update(self, key_states: Tensor, value_states: Tensor, kwargs: dict | None = None) -> tuple[Tensor, Tensor]:
        # `kwargs` are those of the attention (transformers >= 5.24), of which a layer of plain tensors needs none.
        if self.own is None:
            self.own = (key_states, value_states)
        keys, values = zip(*self.pieces, (key_states, value_states))
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)

    def get_seq_length(self) -> int:
        return sum(keys.shape[-2] for keys, _ in self.pieces)

    def following(self) -> "SegmentLayer":
        return SegmentLayer((*self.pieces, self.own))


def first_segment_cache(num_layers: int) -> Cache:
    """A cache for training: one object per segment, so that every segment can be run again on its own."""
    return Cache(layers=[SegmentLayer() for _ in range(num_layers)])


def next_segment_cache(cache: Cache) -> Cache:
    return Cache(layers=[layer.following() for layer in cache.layers])
