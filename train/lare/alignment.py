"""Symmetric alignment (LaRe, eq. 6): latents near what the reasoning says and what the image shows.

    L_align = InfoNCE(latents, reasoning text) + InfoNCE(latents, image)

Each side is pooled (mean and maximum, concatenated), mapped to 256 numbers by a head of its own and normalised; targets
are detached. Negatives are those of the global batch. The states of the reasoning come from a forward over its text alone:
with the prompt before it, both sides would share the prompt, and recognising that would be enough.

Shapes: B rows of the global batch, T positions, D hidden size, E = 256.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather


EMBEDDING_SIZE = 256
TEMPERATURE = 0.07


def pool(states: Tensor, mask: Tensor) -> Tensor:
    """Mean and maximum of the positions that exist: (B, T, D) and (B, T) bool to (B, 2D) float32; zeros where none does."""
    states, mask = states.float(), mask[..., None]
    mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
    highest = states.masked_fill(~mask, float("-inf")).amax(1)
    return torch.cat([mean, highest.masked_fill(~mask.any(1), 0)], dim=-1)


def gather_rows(values: Tensor) -> Tensor:
    """The rows of all processes, with gradients; those of one process where there is but one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    if values.requires_grad:
        return torch.cat(all_gather(values.contiguous()))
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def symmetric_info_nce(
    first: Tensor, second: Tensor, exists: Tensor, keys: Tensor, temperature: float = TEMPERATURE
) -> Tensor:
    """Mean of both directions over the pairs that exist.

    Args:
        first, second: (B, E), normalised.
        exists: (B,) bool; other rows are neither pairs nor negatives.
        keys: (B,) what a row's target is made of; rows with equal keys are no negatives of each other.
    """
    scores = first @ second.T / temperature
    is_same = keys[:, None] == keys[None]
    excluded = (
        (is_same & ~torch.eye(len(keys), dtype=torch.bool, device=keys.device)) | ~exists[None] | ~exists[:, None]
    )
    excluded.fill_diagonal_(False)
    scores = scores.masked_fill(excluded, torch.finfo(scores.dtype).min)
    target = torch.arange(len(scores), device=scores.device)
    both = nn.functional.cross_entropy(scores, target, reduction="none") + nn.functional.cross_entropy(
        scores.T, target, reduction="none"
    )
    return (both * exists).sum() / (2 * exists.sum().clamp(min=1))


class Alignment(nn.Module):
    """The heads, and the loss over the global batch.

    Every process computes the whole loss; gathering adds up the gradients of all, and averaging over the processes, as
    DDP and FSDP do, gives that of the global batch.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.latent_head = nn.Linear(2 * hidden_size, EMBEDDING_SIZE)
        self.text_head = nn.Linear(2 * hidden_size, EMBEDDING_SIZE)
        self.image_head = nn.Linear(2 * hidden_size, EMBEDDING_SIZE)

    def forward(self, latents: Tensor, targets: dict[str, tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """Eq. 6 over all targets.

        Args:
            latents: (B, 2D) pooled.
            targets: "text" and "image": pooled states (B, 2D), (B,) bool whether a row has any, (B,) keys.
        """
        heads = {"text": self.text_head, "image": self.image_head}
        first = gather_rows(embed(self.latent_head, latents))
        loss = first.new_zeros(())
        for kind, (states, exists, keys) in targets.items():
            second = gather_rows(embed(heads[kind], states.detach()))
            loss = loss + symmetric_info_nce(first, second, gather_rows(exists), gather_rows(keys))
        return loss


def embed(head: nn.Linear, pooled: Tensor) -> Tensor:  # (B, E) float32
    return nn.functional.normalize(head(pooled.to(head.weight.dtype)).float(), dim=-1)
