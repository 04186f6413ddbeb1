"""The two kinds of action of a trajectory as distributions: a word among words, a modulated tensor under a Gaussian.

A block's actions are the sampled tensors Q~ ("query") and V~ ("image") of DeepLatent, eq. 3. With base = Q_hw or V,

    a ~ N((1 + gamma) * base + beta, (exp(log_sigma) * rms(base))^2), independent over elements           eq. 9, 13

A tensor of 10^7 elements is not stored. It is its base (frozen), the statistics it was drawn from, and the number of its
noise: `act` makes it again, bit for bit. Densities are compared by differences of elements, summed in float64: two sums
of 10^7 float32 terms subtracted would be all rounding.

Shapes: N elements' places (latents or image features), D hidden size, P packed positions of text, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_latentvlm.latent_former_deeplatent import modulate, root_mean_square
from train.data.seeds import mix


LOG_RATIO_LIMIT = 20.0  # of any action, before it is exponentiated


def draw_noise(shape: torch.Size, seed: int, block: int, kind: str, device: torch.device) -> Tensor:
    """Standard normal noise of one action: a function of its numbers, whatever was drawn before."""
    generator = torch.Generator(device).manual_seed(mix(seed, block, kind))
    return torch.randn(shape, generator=generator, device=device)


def act(base: Tensor, statistics: Tensor, seed: int, block: int, kind: str) -> Tensor:
    """Draw an action, or draw it again: (N, D) float32.

    Args:
        statistics: (3, D) float32: gamma, beta and log sigma.
        seed: of the trajectory.
        block: number of the block in its trajectory.
    """
    base, statistics = base.detach().float(), statistics.detach().to(base.device)
    return modulate(base, *statistics, draw_noise(base.shape, seed, block, kind, base.device))


def gaussian(base: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (N, D) and log standard deviation (D,) of an action."""
    gamma, beta, log_sigma = statistics.float()
    return (1 + gamma) * base + beta, log_sigma + root_mean_square(base).log()


def log_density(action: Tensor, base: Tensor, statistics: Tensor) -> Tensor:
    """Log-density of an action, summed over all elements (DeepLatent, eq. 9): float64 scalar."""
    mean, log_std = gaussian(base.float(), statistics)
    error = (action - mean) * torch.exp(-log_std)
    elements = -0.5 * error.square() - log_std - 0.5 * math.log(2 * math.pi)
    return elements.sum(dtype=torch.float64)


def log_density_ratio(action: Tensor, base: Tensor, statistics: Tensor, old: Tensor) -> Tensor:
    """Log of the ratio of two densities at an action, summed over all elements (eq. 14-15): float64 scalar.

    What differs is computed from the differences of the statistics, never as a difference of two large numbers. So it is
    exactly zero where the statistics are equal, and right to some digits where they nearly are.
    """
    base = base.float()
    mean, log_std = gaussian(base, statistics)
    widening = statistics[2] - old[2]  # log of the ratio of the standard deviations
    shift = (statistics[0] - old[0]) * base + (statistics[1] - old[1])  # of the mean
    error = (action - mean) * torch.exp(-log_std)
    # (a - old mean) / old std = error + excess
    excess = error * torch.expm1(widening) + shift * torch.exp(widening - log_std)
    elements = excess * (error + 0.5 * excess) - widening
    return elements.sum(dtype=torch.float64)


def gaussian_divergence(base: Tensor, statistics: Tensor, reference: Tensor) -> Tensor:
    """KL(policy || reference) in closed form, summed over channels, averaged over positions (eq. 16): float64 scalar."""
    base = base.float()
    _, reference_log_std = gaussian(base, reference)
    gamma, beta, widening = statistics - reference
    distance = (gamma * base + beta) * torch.exp(-reference_log_std)
    elements = 0.5 * (torch.expm1(2 * widening) + distance.square()) - widening
    return elements.sum(dtype=torch.float64) / len(base)


def limit_logits(
    logits: Tensor,  # (P, V) float32
    config,
    is_full: Tensor,  # (P,) bool: `<latent>` may not be written there
    is_forced: Tensor,  # (P,) bool: nothing else may
) -> Tensor:
    """What `LatentBlockLimits` leaves of the logits, for tokens that are known."""
    inner = torch.tensor([config.latent_pad_token_id, config.latent_end_token_id], device=logits.device)
    start = F.one_hot(torch.tensor(config.latent_start_token_id, device=logits.device), logits.shape[-1]).bool()
    logits = logits.index_fill(1, inner, -float("inf"))
    logits = logits.masked_fill(is_full[:, None] & start, -float("inf"))
    if is_forced.any():
        forced = torch.zeros_like(logits).masked_fill(~start, -float("inf"))
        logits = torch.where(is_forced[:, None], forced, logits)
    return logits


def categorical_divergence(log_probs: Tensor, reference: Tensor) -> Tensor:
    """KL(policy || reference) over the vocabulary, (P,); words that are forbidden to both count nothing."""
    allowed = log_probs > -float("inf")
    difference = (log_probs.masked_fill(~allowed, 0.0) - reference.masked_fill(~allowed, 0.0)).masked_fill(~allowed, 0)
    return (log_probs.exp() * difference).sum(-1)


def ratio_of(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def clipped_objective(ratio: Tensor, advantage: Tensor, clip: float, dual_clip: float | None) -> tuple[Tensor, Tensor]:
    """The surrogate of every action (to be maximized, eq. 11), and whether a clip is what holds it.

    Args:
        dual_clip: bounds the loss of an action with negative advantage whose ratio explodes; None: unbounded.
    """
    free = ratio * advantage
    bounded = torch.minimum(free, ratio.clamp(1 - clip, 1 + clip) * advantage)
    if dual_clip is not None:
        bounded = torch.where(advantage < 0, torch.maximum(bounded, dual_clip * advantage), bounded)
    return bounded, bounded != free


def group_advantages(rewards: Tensor) -> Tensor:
    """`(R - mean) / (std + 1e-4)` within the last axis; 0 in a group whose rewards are all equal (eq. 10).

    A reward that is missing (NaN) counts for nothing: the others compete among themselves, and its advantage is 0.
    """
    is_there = ~rewards.isnan()
    number = is_there.sum(-1, keepdim=True)
    known = rewards.masked_fill(~is_there, 0.0)
    centred = (known - known.sum(-1, keepdim=True) / number.clamp(min=1)).masked_fill(~is_there, 0.0)
    spread = (centred.square().sum(-1, keepdim=True) / (number - 1).clamp(min=1)).sqrt()
    return (centred / (spread + 1e-4)).masked_fill(has_no_signal(rewards)[..., None], 0.0)


def has_no_signal(rewards: Tensor) -> Tensor:
    """Whether the rewards of a group, the last axis, are all equal, those that are missing (NaN) aside."""
    is_there = ~rewards.isnan()
    highest = rewards.masked_fill(~is_there, -float("inf")).amax(-1)
    lowest = rewards.masked_fill(~is_there, float("inf")).amin(-1)
    return highest <= lowest  # also where none is there, or one alone
