"""One row of attention beside the fast path: where one position of each row looks, without attention maps.

LaRe and Vedas need the attention of a single query, averaged or summed over layers and heads. The full maps cost
O(S^2) memory and force the slow attention; one row costs O(S). `record_attention` prepares a language model once, for
good: from then on a forward that is called with `saliency=SaliencyRecorder()` also computes the recorder's row, from the
very queries and keys that the kernel got (after rotary embedding, with the whole KV cache), and one that is called with
`last_states=LastStateRecorder()` keeps the last position of every layer's output. The kernel is the one that the config
names (SDPA, FlashAttention, eager), and a forward without a recorder is what it was.

What a call records lies in its recorders and nowhere else, so threads may share a model. The config is not renamed: the
attention layers see it through `RecordingConfig`, so models and configs can be copied, pickled and opened elsewhere.

Shapes: B rows, T new tokens, S keys (cached and new), A query heads, H head dim, D hidden size.
"""

import sys

import torch
from torch import Tensor, nn
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


class LastStateRecorder:
    """Collects the last position of every layer's output, where `output_hidden_states` would keep all positions."""

    def __init__(self):
        self.states: dict[int, Tensor] = {}

    def stack(self) -> Tensor:  # (B, layers, D)
        states = [self.states[layer] for layer in sorted(self.states)]
        return torch.stack([state.to(states[-1].device) for state in states], dim=1)


def keep_last_state(layer: nn.Module, args: tuple, kwargs: dict, output) -> None:
    """Forward hook of a decoder layer, which stays: fill the recorder that this very call brought, if it did."""
    recorder = kwargs.get("last_states")
    if recorder is not None:
        states = output[0] if isinstance(output, tuple) else output
        # A copy: a view would keep all positions of every layer in memory.
        recorder.states.setdefault(layer.self_attn.layer_idx, states[:, -1].clone())


def attention_row(
    query: Tensor,  # (B, A, T, H)
    key: Tensor,  # (B, A or fewer, S, H)
    attention_mask: Tensor | None,  # (B, 1, T, S) bool or additive, (B, S) padding, or None: causal
    scaling: float,
    columns: Tensor | None,
) -> Tensor:  # (B, A, S) float32
    """The softmax row of one query per batch row, in float32 also where the forward runs under autocast."""
    batch, heads, length, _ = query.shape
    keys = key.shape[-2]
    if columns is None:
        columns = torch.full((batch,), length - 1, device=query.device)
    index = torch.arange(batch, device=query.device)
    with torch.autocast(query.device.type, enabled=False):
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


class RecordingConfig:
    """The language model's config as its attention layers see it: all the same, but attention is the recording twin.

    A view and no copy: what is set on the config itself, the attention implementation too, holds here at once.
    """

    is_recording = True

    def __init__(self, shared):
        self.__dict__["shared"] = shared

    @property
    def _attn_implementation(self) -> str:
        return recording_attention(self.shared._attn_implementation or "eager")

    def __getattr__(self, name: str):
        if name == "shared" or name.startswith("__"):  # asked for while it is being copied or unpickled
            raise AttributeError(name)
        return getattr(self.shared, name)

    def __setattr__(self, name: str, value) -> None:
        setattr(self.shared, name, value)


class PlainAttention:
    """An attention layer as FlashAttention's kernel sees it, which reads off the config which kernel it is."""

    def __init__(self, module: nn.Module):
        self.module, self.config = module, getattr(module.config, "shared", module.config)

    def __getattr__(self, name: str):
        return getattr(self.module, name)


def recording_attention(base: str) -> str:
    """Register the recording twin of an attention function, and return its name.

    Raises:
        ValueError: FlexAttention, whose mask is a program and no tensor of which a row could be taken.
    """
    name = base + SUFFIX
    if name in ALL_ATTENTION_FUNCTIONS.valid_keys():
        return name
    if "flex" in base:
        raise ValueError(
            f"`attn_implementation={base!r}` cannot be used: latent steps need a row of attention, which FlexAttention's mask does "
            "not give. Use 'sdpa', 'flash_attention_2' or 'eager'."
        )

    def attend(module, query, key, value, attention_mask, *args, saliency=None, last_states=None, **kwargs):
        kernel = ALL_ATTENTION_FUNCTIONS.get_interface(base, eager_attention(module))
        if saliency is not None:
            saliency.record(module.layer_idx, query, key, attention_mask, kwargs["scaling"])
        seen = PlainAttention(module) if "flash" in base else module
        return kernel(seen, query, key, value, attention_mask, *args, **kwargs)

    AttentionInterface.register(name, attend)
    return name


def eager_attention(module: nn.Module):
    """The attention written out that stands beside a layer's attention, as in every model file of transformers."""
    return sys.modules[type(module).__module__].eager_attention_forward


def record_attention(text_model: nn.Module) -> None:
    """Make a language model's forward take `saliency=` and `last_states=`. Calling it again changes nothing."""
    for layer in text_model.layers:
        if not getattr(layer.self_attn.config, "is_recording", False):
            layer.self_attn.config = RecordingConfig(layer.self_attn.config)
            layer.register_forward_hook(keep_last_state, with_kwargs=True)
