"""Routing depth scaling (Vedas): layers that a router runs deeper for some tokens.

    s          = router(x)                                              eq. 10, x the layer's ordinary output
    T          = the num_tokens best of the competing tokens
    h_0        = x[T];  h_d = layer(h_(d-1)), attending to selected tokens only, causally      eq. 11
    x[T]      += sum over d of  g(s[T]) * h_d * e_d                     eq. 12

with the same weights in every pass, a gate g and a learned scale e_d per depth. In a new segment the selected tokens
also attend to those selected in earlier segments (`RoutedMemory`), whose own states stay as they were refined.

Shapes: B rows, T tokens of this forward, k selected tokens, P remembered ones, D hidden size, H head dim.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLDecoderLayer

from .transformers_api import cache_keyword
from .saliency import SUFFIX


GATE_BIAS = -4.0  # of a fresh router: a new model starts near its backbone


class TokenScore(nn.Linear):
    """The router's linear map to one score. A class of its own, because its bias starts apart (`GATE_BIAS`)."""

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, 1)

    def forward(self, states: Tensor) -> Tensor:
        """In float32, whatever the weights are in and whether or not autocast is on: near scores decide what runs deeper."""
        with torch.autocast(states.device.type, enabled=False):
            return nn.functional.linear(states.float(), self.weight.float(), self.bias.float())


class DepthRouter(nn.Module):
    """Scores tokens, and scales each further pass. Both come out of one call: offloaded weights are there only within it."""

    def __init__(self, hidden_size: int, depth: int):
        super().__init__()
        self.score = TokenScore(hidden_size)
        self.depth_scale = nn.Parameter(torch.ones(depth, hidden_size))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:  # (B, T, D) -> (B, T) float32, (depth, D)
        return self.score(states)[..., 0], self.depth_scale


@dataclass
class RoutedKeyValues:
    """Keys and values that one segment selected in one layer and depth."""

    keys: Tensor  # (B, heads, k, H)
    values: Tensor
    attended: Tensor  # (B, k) bool


class RoutedMemory:
    """The second-pass keys and values of earlier segments; one object per segment, so that a layer can run again."""

    def __init__(self, earlier: dict[tuple[int, int], list[RoutedKeyValues]] | None = None):
        self.earlier = earlier or {}
        self.own: dict[tuple[int, int], RoutedKeyValues] = {}

    def following(self) -> "RoutedMemory":
        places = self.earlier.keys() | self.own.keys()
        own = {place: [piece] for place, piece in self.own.items()}
        return RoutedMemory({place: self.earlier.get(place, []) + own.get(place, []) for place in places})

    def view(self, layer: int, depth: int, attended: Tensor) -> "MemoryView":
        return MemoryView(self, (layer, depth), attended)


class MemoryView:
    """What one pass of one layer sees in place of a KV cache."""

    def __init__(self, memory: RoutedMemory, place: tuple[int, int], attended: Tensor):
        self.memory, self.place, self.own_mask = memory, place, attended
        self.pieces = memory.earlier.get(place, [])

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, kwargs: dict | None = None
    ) -> tuple[Tensor, Tensor]:
        # `kwargs` are those of the attention (transformers >= 5.24), of which plain tensors need none.
        self.memory.own.setdefault(self.place, RoutedKeyValues(keys, values, self.own_mask))
        return (
            torch.cat([*(piece.keys for piece in self.pieces), keys], dim=-2),
            torch.cat([*(piece.values for piece in self.pieces), values], dim=-2),
        )

    def attended(self) -> Tensor:  # (B, P + k)
        return torch.cat([*(piece.attended for piece in self.pieces), self.own_mask], dim=1)


@dataclass
class Routing:
    """What one forward of the language model routes. Layers without a router ignore it."""

    competing: Tensor  # (B, T) bool
    num_tokens: list[int]  # per layer
    gate: str  # "sigmoid" or "softmax"
    memory: RoutedMemory | None = None
    rotary: nn.Module | None = None  # given: selected tokens are numbered anew
    aligned: bool = True  # False: each refined token lands where the published code puts it
    picked: dict[int, Tensor] = field(default_factory=dict)  # layer -> (B, k) selected columns, -1 where none


def select_tokens(scores: Tensor, competing: Tensor, num_tokens: int) -> Tensor:
    """The columns of the best tokens, best first; ties go to the lowest column: (B, k)."""
    scores = scores.masked_fill(~competing, float("-inf"))
    return scores.sort(dim=1, descending=True, stable=True).indices[:, : min(num_tokens, scores.shape[1])]


def gate_values(scores: Tensor, competing: Tensor, gate: str) -> Tensor:
    """(B, T) float32."""
    if gate == "sigmoid":
        return scores.sigmoid()
    # A row in which nothing competes gets no NaN: its tokens are not selected either.
    return scores.masked_fill(~competing, torch.finfo(scores.dtype).min).softmax(dim=1)


def gather_tokens(values: Tensor, columns: Tensor) -> Tensor:
    """Take columns (B, k) of (B, T, *) or of rotary tables (3, B, T, *)."""
    index = columns[..., None].expand(*columns.shape, values.shape[-1])
    return values.gather(-2, index.expand(*values.shape[:-3], *index.shape))


def selected_mask(attended: Tensor, length: int, implementation: str, dtype: torch.dtype) -> Tensor | None:
    """The mask of a pass over `length` selected tokens behind those remembered, as the kernel takes it.

    Args:
        attended: (B, P + length) bool, the selected tokens that are tokens and not filling.
    """
    base = implementation.removesuffix(SUFFIX)
    if "flash" in base:
        return attended.long()
    past = attended.shape[1] - length
    causal = torch.ones(length, past + length, dtype=torch.bool, device=attended.device).tril(past)
    # A filling query sees itself, so that no softmax is empty; nothing reads it.
    own = torch.eye(length, dtype=torch.bool, device=attended.device)
    own = nn.functional.pad(own, (past, 0))
    allowed = ((causal & attended[:, None]) | own)[:, None]  # (B, 1, length, P + length)
    if base == "eager":
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )
    return allowed


class RoutedLayerMixin:
    """A decoder layer that may run again over the tokens its router selects."""

    def __init__(self, config, layer_idx: int, depth: int):
        super().__init__(config, layer_idx)
        self.router = DepthRouter(config.hidden_size, depth)

    def forward(self, hidden_states: Tensor, *args, routing: Routing | None = None, **kwargs) -> Tensor:
        states = super().forward(hidden_states, *args, **kwargs)
        if routing is None:
            return states
        return self.deepen(states, kwargs["position_embeddings"], routing)

    def deepen(self, states: Tensor, position_embeddings: tuple[Tensor, Tensor], routing: Routing) -> Tensor:
        layer, implementation = self.self_attn.layer_idx, self.self_attn.config._attn_implementation
        scores, scales = self.router(states)
        best = select_tokens(scores, routing.competing, routing.num_tokens[layer])
        columns = best.sort(dim=1).values
        attended = routing.competing.gather(1, columns)
        routing.picked.setdefault(layer, columns.masked_fill(~attended, -1).detach())
        tables = self.selected_tables(states, position_embeddings, columns, attended, routing)
        gates = gate_values(scores, routing.competing, routing.gate).to(states.dtype)
        target = columns if routing.aligned else best
        gates = (gates.gather(1, target) * routing.competing.gather(1, target))[..., None]
        refined = gather_tokens(states, columns)
        change = torch.zeros_like(refined)
        for depth, scale in enumerate(scales):
            view = None if routing.memory is None else routing.memory.view(layer, depth, attended)
            seen = attended if view is None else view.attended()
            mask = selected_mask(seen, columns.shape[1], implementation, states.dtype)
            refined = super().forward(
                refined, attention_mask=mask, position_embeddings=tables, use_cache=False, **cache_keyword(view)
            )
            change = change + gates * refined * scale
        index = target[..., None].expand_as(change)
        return states.scatter_add(1, index, change.to(states.dtype))

    def selected_tables(self, states: Tensor, tables, columns: Tensor, attended: Tensor, routing: Routing):
        """Rotary tables of the selected tokens: at their own positions, or numbered anew.

        Numbers go on from segment to segment, and filling takes none: a row's are the same in every batch.
        """
        if routing.rotary is None:
            return tuple(gather_tokens(table, columns) for table in tables)
        numbers = attended.long().cumsum(dim=1) - 1
        if routing.memory is not None:
            earlier = routing.memory.view(self.self_attn.layer_idx, 0, attended).pieces
            numbers = numbers + sum(piece.attended.sum(dim=1, keepdim=True) for piece in earlier)
        return routing.rotary(states, numbers.clamp(min=0).expand(3, -1, -1))


class RoutedQwen2_5_VLDecoderLayer(RoutedLayerMixin, Qwen2_5_VLDecoderLayer):
    """Qwen2.5-VL's decoder layer with a router."""


class RoutedQwen2VLDecoderLayer(RoutedLayerMixin, Qwen2VLDecoderLayer):
    """Qwen2-VL's decoder layer with a router."""
