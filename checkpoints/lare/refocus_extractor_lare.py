"""The Extractor of LaRe: from the states of one refocusing step and the image tokens it looks at to latents.

    X     = in_proj(norm(H)) + layer embedding                 one state per decoder layer
    X    += self_attention(linear(norm(X)))                    eq. 3, each layer
    X    += cross_attention(norm(X), visual tokens)            eq. 4, each layer
    X    += GLU(norm(X));  X += FFN(norm(X))                   eq. 5
    Z     = rms-normalised out_proj(X) * latent_rms

States of deep layers are orders larger than those of early ones, and attention does not know which layer a state came
from: hence the first line. The last puts latents among token embeddings, where the language model expects its inputs.

The formulas of the paper's text are lost; this is its appendix B read with pre-norm and residuals throughout.

Shapes: B rows, L decoder layers, K latents, T visual tokens of a step, D hidden size, E extractor hidden size, N heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


EPSILON = 1e-6


def normalize_rms(states: Tensor) -> Tensor:
    """Scale the last dimension to a root mean square of one, in float32."""
    exact = states.float()
    return (exact * torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + EPSILON)).to(states.dtype)


class RefocusNorm(nn.Module):
    """RMS norm with a learned gain."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, states: Tensor) -> Tensor:
        return normalize_rms(states) * self.weight


class RefocusEmbedding(nn.Module):
    """One learned vector per place."""

    def __init__(self, count: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, size))

    def forward(self) -> Tensor:  # (count, size); a call, since offloaded weights come only to those that are called
        return self.weight


class RefocusAttention(nn.Module):
    """Multi-head attention of states to others, without biases."""

    def __init__(self, size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(
        self,
        states: Tensor,  # (B, Q, E)
        others: Tensor,  # (B, T, E)
        attended: Tensor | None = None,  # (B, T) bool
        output_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (B, Q, E), zero in rows that may attend nothing, and (B, Q, T) float32, the mean over heads, if asked."""

        def split_heads(values: Tensor) -> Tensor:  # (B, *, E) -> (B, N, *, E / N)
            return values.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        query, key = split_heads(self.q_proj(states)), split_heads(self.k_proj(others))
        value, mask, is_open = split_heads(self.v_proj(others)), None, None
        if attended is not None:
            is_open = attended.any(dim=1)[:, None, None]
            mask = (attended | ~is_open[:, 0])[:, None, None]  # a softmax over nothing would be no number
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        output, weights = self.o_proj(mixed.transpose(1, 2).flatten(2)), None
        if output_weights:
            scores = query.detach().float() @ key.detach().float().transpose(-1, -2) * query.shape[-1] ** -0.5
            scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
            weights = scores.softmax(dim=-1).mean(dim=1)
        if is_open is not None:
            output = output.masked_fill(~is_open, 0)
            weights = None if weights is None else weights.masked_fill(~is_open, 0)
        return output, weights


class RefocusLayer(GradientCheckpointingLayer):
    """Internal logic over the layers' states, then refocusing on the image (LaRe, eq. 3-4)."""

    def __init__(self, size: int, num_heads: int):
        super().__init__()
        self.input_norm = RefocusNorm(size)
        self.linear = nn.Linear(size, size)
        self.self_attention = RefocusAttention(size, num_heads)
        self.cross_norm = RefocusNorm(size)
        self.cross_attention = RefocusAttention(size, num_heads)

    def forward(
        self,
        states: Tensor,  # (B, L, E)
        visual: Tensor,  # (B, T, E)
        attended: Tensor,  # (B, T) bool
        output_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        linear = self.linear(self.input_norm(states))
        states = states + self.self_attention(linear, linear)[0]
        seen, weights = self.cross_attention(self.cross_norm(states), visual, attended, output_weights)
        return states + seen, weights


class RefocusPooling(nn.Module):
    """K learned queries that attend to the states of all layers."""

    def __init__(self, count: int, size: int, num_heads: int):
        super().__init__()
        self.queries = RefocusEmbedding(count, size)
        self.norm = RefocusNorm(size)
        self.attention = RefocusAttention(size, num_heads)

    def forward(self, states: Tensor) -> Tensor:  # (B, L, E) -> (B, K, E)
        queries = self.queries().expand(len(states), -1, -1)
        return queries + self.attention(queries, self.norm(states))[0]


class RefocusExtractor(nn.Module):
    """Fuses what the language model thinks with what it looks at into latents."""

    def __init__(self, config):
        super().__init__()
        text, size, heads = config.get_text_config(), config.extractor_hidden_size, config.extractor_num_heads
        self.latent_rms = config.latent_rms
        self.state_norm = RefocusNorm(text.hidden_size)
        self.state_proj = nn.Linear(text.hidden_size, size)
        self.layer_embedding = RefocusEmbedding(text.num_hidden_layers, size)
        self.visual_norm = RefocusNorm(text.hidden_size)
        self.visual_proj = nn.Linear(text.hidden_size, size)
        self.layers = nn.ModuleList([RefocusLayer(size, heads) for _ in range(config.extractor_num_layers)])
        count = config.latent_tokens_per_step
        self.pooling = None if count is None else RefocusPooling(count, size, heads)
        self.glu_norm = RefocusNorm(size)
        self.glu_proj = nn.Linear(size, 2 * size)
        self.ffn_norm = RefocusNorm(size)
        self.ffn_up = nn.Linear(size, config.extractor_intermediate_size)
        self.ffn_down = nn.Linear(config.extractor_intermediate_size, size)
        self.out_proj = nn.Linear(size, text.hidden_size)

    def forward(
        self,
        states: Tensor,  # (B, L, D) the last position at every decoder layer
        visual: Tensor,  # (B, T, D) the image tokens in focus; T at least 1
        attended: Tensor,  # (B, T) bool; a row with none takes nothing from the image
        output_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the latents (B, K, D) and, if asked, the last cross-attention (B, L, T) float32, the mean over heads."""
        dtype = self.out_proj.weight.dtype  # beside a quantized model it may be float32
        states, visual = states.to(dtype), visual.to(dtype)
        states = self.state_proj(self.state_norm(states)) + self.layer_embedding()
        visual, weights = self.visual_proj(self.visual_norm(visual)), None
        for layer in self.layers:
            states, weights = layer(states, visual, attended, output_weights)
        if self.pooling is not None:
            states = self.pooling(states)
        states = states + F.glu(self.glu_proj(self.glu_norm(states)))
        states = states + self.ffn_down(F.gelu(self.ffn_up(self.ffn_norm(states))))
        return normalize_rms(self.out_proj(states)) * self.latent_rms, weights
