"""One row of attention beside the fast path: where one position of each row looks, without attention maps.

LaRe and Vedas need the attention of a single query, averaged or summed over layers and heads. The full maps cost
O(S^2) memory and force the slow attention; one row costs O(S). `record_attention` puts a wrapper around the language
model's attention function that runs the same kernel as before (SDPA, FlashAttention, eager). A forward that is called
with `saliency=SaliencyRecorder()` also computes the recorder's row, from the very queries and keys that the kernel
got: after rotary embedding, with the whole KV cache. Without a recorder the wrapper only passes on; it stays, because
a layer that runs again under gradient checkpointing must find it.

Shapes: B rows, T new tokens, S keys (cached and new), A query heads, H head dim.
"""

import sys

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface


SUFFIX = "+saliency"


class SaliencyRecorder:
    """Collects the attention of one query per row, layer by layer.

    Args:
        columns: (B,) the query of each row among the new tokens; None: the last.
        has_gradients: False where the row only selects something, to spare the backward pass its graph.
    """

    def __init__(self, columns: Tensor | None = None, has_gradients: bool = True):
        self.columns = columns
        self.has_gradients = has_gradients
        self.num_heads = 0
        self.rows: dict[int, Tensor] = {}

    def record(self, layer: int, query: Tensor, key: Tensor, attention_mask: Tensor | None, scaling: float) -> None:
        """Compute the row of one layer. A layer that runs again under gradient checkpointing is not kept twice."""
        with torch.set_grad_enabled(self.has_gradients and torch.is_grad_enabled()):
            row = attention_row(query, key, attention_mask, scaling, self.columns)
            self.num_heads = row.shape[1]
            self.rows.setdefault(layer, row.mean(dim=1))

    def mean(self) -> Tensor:
        """(B, S) attention averaged over layers and heads, float32; it sums to one over S."""
        if not self.rows:
            raise RuntimeError("No layer recorded its attention: the attention function was not the recording one.")
        rows = list(self.rows.values())
        return torch.stack([row.to(rows[-1].device) for row in rows]).mean(dim=0)  # layers may lie on several devices

    def sum(self) -> Tensor:
        """(B, S) attention summed over layers and heads, float32."""
        return self.mean() * (len(self.rows) * self.num_heads)


def attention_row(
    query: Tensor,  # (B, A, T, H)
    key: Tensor,  # (B, A or fewer, S, H)
    attention_mask: Tensor | None,  # (B, 1, T, S) bool or additive, (B, S) padding, or None: causal
    scaling: float,
    columns: Tensor | None,
) -> Tensor:  # (B, A, S) float32
    """The softmax row of one query per batch row."""
    batch, heads, length, _ = query.shape
    keys = key.shape[-2]
    if columns is None:
        columns = torch.full((batch,), length - 1, device=query.device)
    index = torch.arange(batch, device=query.device)
    chosen = query[index, :, columns].float().unflatten(1, (key.shape[1], -1))  # (B, groups, A / groups, H)
    scores = (chosen @ key.float().transpose(-1, -2)).flatten(1, 2) * scaling  # (B, A, S)
    if attention_mask is not None and attention_mask.ndim == 4:
        mask = attention_mask[index.clamp(max=attention_mask.shape[0] - 1), 0, columns][:, None, :keys]
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.float()
    else:
        allowed = torch.arange(keys, device=query.device) <= (keys - length + columns)[:, None]
        if attention_mask is not None:
            allowed = allowed & attention_mask[:, :keys].bool()
        scores = scores.masked_fill(~allowed[:, None], float("-inf"))
    return scores.softmax(dim=-1)


def recording_attention(base: str) -> str:
    """Register the recording twin of an attention function, and of its mask, and return its name."""
    name = base + SUFFIX
    if name in ALL_ATTENTION_FUNCTIONS.valid_keys():
        return name

    def attend(module: nn.Module, query, key, value, attention_mask, *args, saliency=None, **kwargs):
        kernel = ALL_ATTENTION_FUNCTIONS.get_interface(base, eager_attention(module))
        if saliency is not None:
            saliency.record(module.layer_idx, query, key, attention_mask, kwargs["scaling"])
        return kernel(module, query, key, value, attention_mask, *args, **kwargs)

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def eager_attention(module: nn.Module):
    """The attention written out that stands beside a layer's attention, as in every model file of transformers."""
    return sys.modules[type(module).__module__].eager_attention_forward


def record_attention(text_model: nn.Module) -> None:
    """Make a language model's forward take `saliency=SaliencyRecorder(...)`. Calling it again changes nothing."""
    base = text_model.config._attn_implementation
    if not base.endswith(SUFFIX):
        text_model.config._attn_implementation = recording_attention(base)
