"""Every row gets another row's latents, number for number, at the norm of those that they replace.

The model's own "swap" exchanges blocks that open at the same time. Trained models open them in the middle of text, where
rows rarely agree, so here the donors' latents come from a first pass without a change. A row that takes latents where no other
row of its batch has any to give, or none of another picture, keeps its own, and is told apart: `Swap.kept`.
"""

from collections import Counter
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from modeling_latentvlm.interventions import resize_latents
from modeling_latentvlm.trace import LatentStep, LatentTrace


class Swap:
    """A `latent_intervention` with the latents of a first pass.

    Args:
        donors: by row the row whose latents it gets; a row without one keeps its own.
        latent_mode: of the model's config; "autoregressive" shows the latents of a block one by one.

    Attributes:
        kept: rows that took latents and were left their own.
    """

    def __init__(self, trace: LatentTrace, donors: dict[int, int], latent_mode: str | None):
        self.given = {row: trace.row(donor) for row, donor in donors.items()}
        self.is_one_by_one = latent_mode == "autoregressive"
        self.taken: Counter = Counter()
        self.kept: set[int] = set()

    def __call__(self, latents: Tensor, step: LatentStep) -> Tensor:
        if step.row not in self.given:
            self.kept.add(step.row)
            return latents
        blocks = self.given[step.row]
        # A row that now takes more blocks than its donor took gets the donor's last one again.
        donor = blocks[min(step.index, len(blocks) - 1)]
        if self.is_one_by_one:
            at = self.taken[step.row, step.index] % len(donor.latents)
            self.taken[step.row, step.index] += 1
            values = donor.latents[at : at + 1]
        else:
            values = resize_latents(donor.latents, donor.grid, step.grid)
        values = values.to(latents)
        return values * (latents.norm(dim=-1, keepdim=True) / values.norm(dim=-1, keepdim=True).clamp_min(1e-12))


def find_donors(trace: LatentTrace, conversations: Sequence) -> dict[int, int]:
    """For every row the next one, in turn, that takes latents and shows another picture; rows for which there is none are absent."""
    with_latents = sorted({step.row for step in trace.steps})
    pictures = [pictures_of(conversation) for conversation in conversations]
    donors = {}
    for row in range(len(conversations)):
        others = [other for other in with_latents if other > row] + [other for other in with_latents if other < row]
        others = [other for other in others if pictures[other] != pictures[row]]
        if others:
            donors[row] = others[0]
    return donors


def pictures_of(conversation: Sequence[dict]) -> list[Image.Image]:
    return [item["image"] for message in conversation for item in message["content"] if item["type"] == "image"]
