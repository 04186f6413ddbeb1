"""Symmetric alignment (LaRe, eq. 6): latents near what the reasoning says and what the image shows.

    L_align = InfoNCE(latents, reasoning text) + InfoNCE(latents, image)

Each side is pooled (mean and maximum, concatenated), mapped to 256 numbers by a head of its own and normalised; targets
are detached. Negatives are those of the global batch, whatever it is cut into. The states of the reasoning come from a forward over its text alone:
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


def find_contrasts(exists: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """What every row is told apart from: (B, B) bool, its own pair included; and (B,) bool, whether it has any negative.

    Args:
        exists: (B,) bool; other rows are neither pairs nor negatives.
        keys: (B,) what a row's target is made of; rows with equal keys are no negatives of each other.
    """
    is_own = torch.eye(len(keys), dtype=torch.bool, device=keys.device)
    is_negative = (keys[:, None] != keys[None]) & exists[None] & exists[:, None]
    return is_negative | is_own, is_negative.any(dim=1)


def symmetric_info_nce(
    first: Tensor, second: Tensor, exists: Tensor, keys: Tensor, temperature: float = TEMPERATURE
) -> Tensor:
    """Mean of both directions over the pairs that exist and have a negative; without one there is nothing to learn.

    Args:
        first, second: (B, E), normalised.
        exists, keys: as of `find_contrasts`.
    """
    scores = first @ second.T / temperature
    contrasts, counts = find_contrasts(exists, keys)
    scores = scores.masked_fill(~contrasts, torch.finfo(scores.dtype).min)
    target = torch.arange(len(scores), device=scores.device)
    both = nn.functional.cross_entropy(scores, target, reduction="none") + nn.functional.cross_entropy(
        scores.T, target, reduction="none"
    )
    return (both * counts).sum() / (2 * counts.sum().clamp(min=1))


# Embeddings of the rows of all processes: of their latents as "latents", and by kind of target (embeddings, exists, keys).
AlignmentRows = dict[str, Tensor | tuple[Tensor, Tensor, Tensor]]


def join_rows(parts: list[AlignmentRows]) -> AlignmentRows:
    """The rows of several micro-batches as one batch."""
    if len(parts) == 1:
        return parts[0]
    return {
        kind: torch.cat([part[kind] for part in parts])
        if isinstance(rows, Tensor)
        else tuple(torch.cat(values) for values in zip(*(part[kind] for part in parts)))
        for kind, rows in parts[0].items()
    }


class Alignment(nn.Module):
    """The heads, and the loss over the global batch: all rows of all processes and of all micro-batches of a step.

    Every process computes the whole loss; gathering adds up the gradients of all, and averaging over the processes, as
    DDP and FSDP do, gives that of the global batch. Over micro-batches likewise: each computes the whole loss with
    gradients to its own rows, the others being known from a pass before (https://huggingface.co/papers/2101.06983), and the
    mean over them, which is what accumulation takes, is that of one batch with all rows.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.latent_head = nn.Linear(2 * hidden_size, EMBEDDING_SIZE)
        self.text_head = nn.Linear(2 * hidden_size, EMBEDDING_SIZE)
        self.image_head = nn.Linear(2 * hidden_size, EMBEDDING_SIZE)

    def rows(self, latents: Tensor, targets: dict[str, tuple[Tensor, Tensor, Tensor]]) -> AlignmentRows:
        """Embed a micro-batch and gather those of all processes; the arguments are those of `forward`."""
        heads = {"text": self.text_head, "image": self.image_head}
        rows: AlignmentRows = {"latents": gather_rows(embed(self.latent_head, latents))}
        for kind, (states, exists, keys) in targets.items():
            second = gather_rows(embed(heads[kind], states.detach()))
            rows[kind] = second, gather_rows(exists), gather_rows(keys)
        return rows

    def forward(
        self,
        latents: Tensor,
        targets: dict[str, tuple[Tensor, Tensor, Tensor]],
        others: list[AlignmentRows] | None = None,
    ) -> tuple[Tensor, int]:
        """Eq. 6 over all targets, and how many of them were left out because they have no negative.

        Args:
            latents: (B, 2D) pooled.
            targets: "text" and "image": pooled states (B, 2D), (B,) bool whether a row has any, (B,) keys.
            others: the rows of the other micro-batches of the step, detached.
        """
        rows = join_rows([self.rows(latents, targets), *(others or [])])
        loss, left_out = rows["latents"].new_zeros(()), 0
        for kind in targets:
            second, exists, keys = rows[kind]
            loss = loss + symmetric_info_nce(rows["latents"], second, exists, keys)
            left_out += int((exists & ~find_contrasts(exists, keys)[1]).sum())
        if others:
            # The mean over micro-batches divides by their number, but each has gradients for its own rows alone.
            loss = loss.detach() + (len(others) + 1) * (loss - loss.detach())
        return loss, left_out


def embed(head: nn.Linear, pooled: Tensor) -> Tensor:  # (B, E) float32
    return nn.functional.normalize(head(pooled.to(head.weight.dtype)).float(), dim=-1)
