"""The modules that DeepLatent adds to its backbone: from three hidden states and the image to a block of latents.

    (h, w)  = argmax of two categoricals over h_s                                              eq. 2, scale head
    Q~      = (1 + gamma_q) * resize(Q, (h, w)) + beta_q + sigma_q * eps                       eq. 3, query modulation
    V~      = (1 + gamma_v) * V + beta_v + sigma_v * eps                                       eq. 3, image modulation
    z       = latent_former(Q~, V~): self-attention, then cross-attention, both with 2-D RoPE  eq. 4

with (gamma_m, beta_m, log sigma_m) = MLP_m(h_m) and sigma_m relative to the root mean square of what it perturbs.

Shapes: R blocks built together, N latents of a block (h * w, padded to the largest of the R), M merged image features of
a row (padded likewise), G largest grid side, D hidden size, A attention heads, H head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .row_images import RowImages


class LatentBlocks(NamedTuple):
    """R blocks built together, each as long as its own grid. A tuple, so that FSDP finds the tensors in it."""

    latents: list[Tensor]  # R x (N, D)
    grids: list[tuple[int, int]]  # R x (height, width)
    height_logits: Tensor  # (R, G) float32
    width_logits: Tensor  # (R, G) float32
    image_attention: list[Tensor] | None  # R x (N, M) float32, head mean of the last cross-attention


class ScaleHead(nn.Module):
    """Two independent categoricals over 1..G, for the height and the width of a block (DeepLatent, eq. 2)."""

    def __init__(self, hidden_size: int, grid_size: int):
        super().__init__()
        self.height = nn.Linear(hidden_size, grid_size)
        self.width = nn.Linear(hidden_size, grid_size)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:  # (R, D) -> 2 x (R, G)
        return self.height(state).float(), self.width(state).float()


class LatentQueries(nn.Module):
    """The learned query grid Q, resized to a block's size."""

    def __init__(self, hidden_size: int, grid_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(grid_size, grid_size, hidden_size))

    def forward(self, height: int, width: int) -> Tensor:  # (height * width, D)
        # float32: bilinear weights in bfloat16 would lose the identity at the full size.
        grid = self.weight.permute(2, 0, 1)[None].float()
        resized = F.interpolate(grid, (height, width), mode="bilinear", antialias=True, align_corners=False)
        return resized[0].flatten(1).T.to(self.weight.dtype)


class ModulationOutput(nn.Linear):
    """Last layer of a modulation MLP: starts at gamma = beta = 0 and log sigma = `log_sigma_init`."""

    def __init__(self, in_features: int, hidden_size: int, log_sigma_init: float):
        super().__init__(in_features, 3 * hidden_size)
        self.log_sigma_init = log_sigma_init


class AffineModulation(nn.Module):
    """Predicts a channel-wise Gaussian around an affine map of a grid of features (DeepLatent, eq. 3)."""

    def __init__(self, hidden_size: int, inner_size: int, log_sigma_init: float):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, inner_size)
        self.down_proj = ModulationOutput(inner_size, hidden_size, log_sigma_init)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (R, D) -> gamma, beta, log_sigma, each (R, D)
        # Never in 16 bits: the densities of a million elements that these few numbers move would be all rounding.
        with torch.autocast(state.device.type, enabled=False):
            return self.down_proj(F.silu(self.up_proj(state))).chunk(3, dim=-1)


# (kind, base, gamma, beta, log_sigma) -> what takes the place of `modulate`, (N, D); kind is "query" or "image".
Modulator = Callable[[str, Tensor, Tensor, Tensor, Tensor], Tensor]


def root_mean_square(base: Tensor) -> Tensor:
    """Of all elements, detached: the width of the noise is an output of the MLP alone."""
    return base.detach().float().square().mean().sqrt().to(base.dtype)


def modulate(base: Tensor, gamma: Tensor, beta: Tensor, log_sigma: Tensor, noise: Tensor | None) -> Tensor:
    """Return `(1 + gamma) * base + beta + sigma * noise` with `sigma = exp(log_sigma) * rms(base)`."""
    modulated = (1 + gamma) * base + beta  # (N, D)
    if noise is not None:
        modulated = modulated + log_sigma.exp() * root_mean_square(base) * noise
    return modulated


def rotate_2d(states: Tensor, places: Tensor, theta: float) -> Tensor:
    """Rotary embedding over two axes: the first half of every head turns with y, the second with x.

    Args:
        states: (R, N, A, H), H a multiple of 4.
        places: (R, N, 2) as (y, x), in any common unit; need not be whole numbers.
    """
    quarter = states.shape[-1] // 4
    frequencies = theta ** -(torch.arange(quarter, device=states.device, dtype=torch.float32) / quarter)
    angles = (places.float()[..., None] * frequencies).flatten(-2)[:, :, None]  # (R, N, 1, H / 2): y then x
    first, second = states.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(states.dtype)


class LatentFormerRMSNorm(nn.Module):
    """Root mean square norm in float32, like the backbone's."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        normed = states.float() * torch.rsqrt(states.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(states.dtype)


class LatentFormerAttention(nn.Module):
    """Multi-head attention whose queries may sit at another place for each group of keys.

    An image has its own grid, so a latent's place differs from image to image. Rotating the query once per distinct
    grid and letting each key meet only its grid's rotation keeps one softmax over all images:
    `[q_1; q_2] . [k; 0] = q_1 . k`. With one grid, the usual case, that is plain attention.
    """

    def __init__(self, hidden_size: int, num_heads: int, theta: float):
        super().__init__()
        self.num_heads, self.theta = num_heads, theta
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self,
        states: Tensor,  # (R, N, D)
        context: Tensor,  # (R, M, D)
        query_places: Tensor,  # (R, N, S, 2), one place per distinct grid
        key_places: Tensor,  # (R, M, 2)
        key_grid: Tensor,  # (R, M) which of the S grids a key lies in
        key_mask: Tensor | None,  # (R, M) bool
        output_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        heads = (self.num_heads, -1)  # (R, *, D) -> (R, *, A, H)
        query, key = self.q_proj(states).unflatten(-1, heads), self.k_proj(context).unflatten(-1, heads)
        value = self.v_proj(context).unflatten(-1, heads).transpose(1, 2)
        scale = query.shape[-1] ** -0.5
        num_grids = query_places.shape[2]
        query = torch.cat([rotate_2d(query, query_places[:, :, s], self.theta) for s in range(num_grids)], dim=-1)
        key = rotate_2d(key, key_places, self.theta)
        if num_grids > 1:
            own = F.one_hot(key_grid, num_grids).to(key.dtype)  # (R, M, S)
            key = (own[:, :, None, :, None] * key[:, :, :, None]).flatten(-2)  # (R, M, A, S * H)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        mask = None if key_mask is None else key_mask[:, None, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        attention = mean_attention(query, key, mask, scale) if output_attention else None
        return self.o_proj(attended.transpose(1, 2).flatten(2)), attention


def mean_attention(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention averaged over heads, float32 (R, N, M), for the trace: one head at a time, so never (R, A, N, M)."""
    total = 0
    for head in range(query.shape[1]):
        scores = query[:, head].float() @ key[:, head].float().transpose(1, 2) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask[:, 0], float("-inf"))
        total = total + scores.softmax(-1)
    return total / query.shape[1]


class LatentFormerMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(states)) * self.up_proj(states))


class LatentFormerLayer(GradientCheckpointingLayer):
    """Self-attention over the grid, cross-attention to the image, pre-norm and residual (DeepLatent, eq. 4)."""

    def __init__(self, config):
        super().__init__()
        text_config = config.get_text_config()
        size, eps = text_config.hidden_size, text_config.rms_norm_eps
        self.self_norm = LatentFormerRMSNorm(size, eps)
        self.self_attention = LatentFormerAttention(size, config.latentformer_heads, config.latentformer_rope_theta)
        self.cross_norm = LatentFormerRMSNorm(size, eps)
        self.image_norm = LatentFormerRMSNorm(size, eps)
        self.cross_attention = LatentFormerAttention(size, config.latentformer_heads, config.latentformer_rope_theta)
        self.mlp = None
        if config.latentformer_mlp_ratio > 0:
            self.mlp_norm = LatentFormerRMSNorm(size, eps)
            self.mlp = LatentFormerMLP(size, max(1, int(size * config.latentformer_mlp_ratio)))

    def forward(
        self,
        latents: Tensor,  # (R, N, D)
        images: Tensor,  # (R, M, D)
        places: "AttentionGrid",
        output_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        normed = self.self_norm(latents)
        attended, _ = self.self_attention(
            normed, normed, places.own[:, :, None], places.own, places.one_grid, places.latent_mask
        )
        latents = latents + attended
        attended, attention = self.cross_attention(
            self.cross_norm(latents),
            self.image_norm(images),
            places.in_images,
            places.image,
            places.image_grid,
            places.image_mask,
            output_attention,
        )
        latents = latents + attended
        if self.mlp is not None:
            latents = latents + self.mlp(self.mlp_norm(latents))
        return latents, attention


@dataclass
class AttentionGrid:
    """Where latents and image features lie, as (y, x), and which of them are padding."""

    own: Tensor  # (R, N, 2) a latent in its own grid
    in_images: Tensor  # (R, N, S, 2) the same relative place in each of the row's S distinct image grids
    image: Tensor  # (R, M, 2) an image feature in its own image's grid
    image_grid: Tensor  # (R, M) the index of that grid among the S
    one_grid: Tensor  # (R, N) zeros: latents all lie in one grid
    latent_mask: Tensor | None  # (R, N) bool, None where nothing is padded
    image_mask: Tensor | None  # (R, M)


def grid_places(height: int, width: int, device: torch.device) -> Tensor:
    """(height * width, 2) as (y, x), in raster order."""
    return torch.cartesian_prod(
        torch.arange(height, device=device, dtype=torch.float32),
        torch.arange(width, device=device, dtype=torch.float32),
    ).view(-1, 2)


def move_places(places: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """AttentionGrid (N, 2) of one grid, at the same relative place in another."""
    # Axis by axis with plain numbers: a tensor of sizes would be copied to the device, which waits for it.
    axes = zip(places.unbind(-1), grid, target)
    return torch.stack([(place + 0.5) * wanted / size - 0.5 for place, size, wanted in axes], dim=-1)


def locate(grids: list[tuple[int, int]], images: list[RowImages], device: torch.device) -> AttentionGrid:
    """Place every latent and every image feature; the centre of a latent meets the same relative place of an image."""
    own, in_images, image, image_grid = [], [], [], []
    for (height, width), row in zip(grids, images):
        place = grid_places(height, width, device)
        distinct = sorted(set(row.grids))
        own.append(place)
        in_images.append(torch.stack([move_places(place, (height, width), grid) for grid in distinct], dim=1))
        image.append(torch.cat([grid_places(*grid, device) for grid in row.grids]))
        image_grid.append(
            torch.cat([torch.full((grid[0] * grid[1],), distinct.index(grid), device=device) for grid in row.grids])
        )
    num_grids = max(places.shape[1] for places in in_images)
    in_images = [F.pad(places, (0, 0, 0, num_grids - places.shape[1])) for places in in_images]
    own = pad_sequence(own, batch_first=True)
    return AttentionGrid(
        own=own,
        in_images=pad_sequence(in_images, batch_first=True),
        image=pad_sequence(image, batch_first=True),
        image_grid=pad_sequence(image_grid, batch_first=True),
        one_grid=torch.zeros(own.shape[:2], dtype=torch.long, device=device),
        latent_mask=length_mask([height * width for height, width in grids], device),
        image_mask=length_mask([len(row.features) for row in images], device),
    )


def length_mask(lengths: list[int], device: torch.device) -> Tensor | None:
    """(R, longest) bool, or None where all are equally long, so that attention keeps its fast path."""
    if len(set(lengths)) == 1:
        return None
    order = torch.arange(max(lengths), device=device)
    return torch.stack([order < length for length in lengths])


class ImageIndexEmbedding(nn.Module):
    """A learned, zero-initialised map of an image's number in the prompt: relative places collide between images.

    Over sinusoids and not a table, so that any number of images has an embedding. No `nn.Linear`: adapters that replace
    those call them with features, and this one takes numbers.
    """

    num_frequencies = 16

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, 2 * self.num_frequencies))

    def forward(self, index: Tensor) -> Tensor:  # (M,) -> (M, D)
        exponents = torch.arange(self.num_frequencies, device=index.device) / self.num_frequencies
        angles = index[:, None].float() * 1000.0**-exponents
        return F.linear(torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.weight.dtype), self.weight)


class LatentBlockBuilder(nn.Module):
    """Everything between the control states of a block and its latents."""

    def __init__(self, config):
        super().__init__()
        size = config.get_text_config().hidden_size
        self.config = config
        self.scale_head = ScaleHead(size, config.latent_grid_size)
        self.queries = LatentQueries(size, config.latent_grid_size)
        self.query_modulation = AffineModulation(size, config.modulation_hidden_size, config.log_sigma_init)
        self.image_modulation = AffineModulation(size, config.modulation_hidden_size, config.log_sigma_init)
        self.image_index = ImageIndexEmbedding(size)
        self.layers = nn.ModuleList(LatentFormerLayer(config) for _ in range(config.latentformer_layers))

    def forward(
        self,
        states: Tensor,  # (R, 3, D): h_s, h_q, h_v
        images: list[RowImages],
        grids: list[tuple[int, int] | None],
        noise: bool = False,
        output_attention: bool = False,
        modulators: list[Modulator] | None = None,
    ) -> LatentBlocks:
        """Build R blocks at the given grids, or at the predicted ones where a grid is None.

        Args:
            modulators: one per block, in place of `modulate`. Reinforcement learning draws its actions there, and later
                gives them back while it reads what the MLPs say of them now.
        """
        # The backbone may be in another dtype: quantized, or float16 with these weights kept in float32.
        states = states.to(self.queries.weight.dtype)
        height_logits, width_logits = self.scale_head(states[:, 0])
        if None in grids:
            grids = self.choose_grids(grids, height_logits, width_logits)
        queries = self.modulate_rows(
            self.query_modulation if self.config.modulate_queries else None,
            states[:, 1],
            [self.queries(*grid) for grid in grids],
            noise,
            None if modulators is None else [partial(modulator, "query") for modulator in modulators],
        )
        if not len(self.layers):
            return LatentBlocks(queries, grids, height_logits, width_logits, None)
        features = self.modulate_rows(
            self.image_modulation if self.config.modulate_images else None,
            states[:, 2],
            [row.features.to(states) for row in images],
            noise,
            None if modulators is None else [partial(modulator, "image") for modulator in modulators],
        )
        features = [values + self.embed_image_index(row, states.device) for values, row in zip(features, images)]
        places = locate(grids, images, states.device)
        latents, context = pad_sequence(queries, batch_first=True), pad_sequence(features, batch_first=True)
        attention = None
        for layer in self.layers:
            latents, attention = layer(latents, context, places, output_attention and layer is self.layers[-1])
        latents = [row[: height * width] for row, (height, width) in zip(latents, grids)]
        if attention is not None:
            attention = [row[: len(block), : len(seen)] for row, block, seen in zip(attention, latents, features)]
        return LatentBlocks(latents, grids, height_logits, width_logits, attention)

    def choose_grids(self, grids, height_logits: Tensor, width_logits: Tensor) -> list[tuple[int, int]]:
        """Fill in the predicted grid where none is given, which waits for the device."""
        if self.config.latent_scale == "fixed":
            return [grid or tuple(self.config.fixed_latent_grid) for grid in grids]
        predicted = torch.stack([height_logits.argmax(-1), width_logits.argmax(-1)], dim=-1).add(1).tolist()
        return [grid or tuple(guess) for grid, guess in zip(grids, predicted)]

    def embed_image_index(self, row: RowImages, device: torch.device) -> Tensor:  # (M, D), or (1, D) for all of them
        embedded = self.image_index(torch.arange(len(row.grids), device=device))
        if len(row.grids) == 1:
            return embedded  # (1, D)
        parts = zip(embedded, row.grids)
        return torch.cat([one.expand(height * width, -1) for one, (height, width) in parts])

    @staticmethod
    def modulate_rows(modulation, states: Tensor, bases: list[Tensor], noise: bool, modulators) -> list[Tensor]:
        if modulation is None:
            return bases
        if modulators is not None:
            statistics = zip(*modulation(states))
            return [modulator(base, *row) for modulator, base, row in zip(modulators, bases, statistics)]
        return [
            modulate(base, gamma, beta, log_sigma, torch.randn_like(base) if noise else None)
            for base, gamma, beta, log_sigma in zip(bases, *modulation(states))
        ]


def initialize_latent_module(module: nn.Module, query_rms: float) -> bool:
    """Initialise a module whose start is not the backbone's normal distribution; True if it was one."""
    if isinstance(module, LatentQueries):
        init.normal_(module.weight, std=query_rms)
    elif isinstance(module, ModulationOutput):
        init.zeros_(module.weight)
        bias = torch.zeros_like(module.bias)
        bias[2 * module.bias.shape[0] // 3 :] = module.log_sigma_init
        init.copy_(module.bias, bias)
    elif isinstance(module, ImageIndexEmbedding):
        init.zeros_(module.weight)
    else:
        return False
    return True
