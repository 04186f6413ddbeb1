"""Every row gets another row's latents, number for number, at the norm of those that they replace.

Who lends to whom: `donors.py`. The donors are asked first, without a change and greedily, whatever the batch of the row that
borrows; a donor that takes no latents is passed over for the next one. A row without a donor keeps its own latents, is marked
`not_swapped`, and does not count.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from evaluation.donors import Candidate, Donors, chance_to_follow, digest_images
from evaluation.rows import EvaluationRow
from evaluation.scoring import Reading, truth_form
from modeling_latentvlm.interventions import resize_latents
from modeling_latentvlm.trace import LatentStep


Take = Callable[[list[EvaluationRow]], list[list[LatentStep]]]
MOST_KEPT = 512  # rows whose latents stay in memory for the next one that borrows from them


class Swap:
    """A `latent_intervention` that gives rows the latents that others made.

    Args:
        given: by row the blocks or steps of its donor; a row without an entry keeps its own.
        is_one_by_one: whether the model shows the latents of a block one by one (`config.shows_latents_one_by_one`).
    """

    def __init__(self, given: dict[int, list[LatentStep]], is_one_by_one: bool):
        self.given, self.is_one_by_one = given, is_one_by_one

    def __call__(self, latents: Tensor, step: LatentStep) -> Tensor:
        if step.row not in self.given:
            return latents
        blocks = self.given[step.row]
        # A row that now takes more blocks than its donor took gets the donor's last one again.
        donor = blocks[min(step.index, len(blocks) - 1)]
        if self.is_one_by_one:
            at = step.offset % len(donor.latents)
            values = donor.latents[at : at + 1]
        else:
            values = resize_latents(donor.latents, donor.grid, step.grid)
        values = values.to(latents)
        return values * (latents.norm(dim=-1, keepdim=True) / values.norm(dim=-1, keepdim=True).clamp_min(1e-12))


def candidate_of(row: EvaluationRow) -> Candidate:
    return Candidate(row.id, row.task, row.question, truth_form(row), frozenset(digest_images(row)))


@dataclass
class Loan:
    """The latents that a row gets, and whose they are."""

    donor: EvaluationRow
    steps: list[LatentStep]  # on the CPU
    same_answer: bool  # the true answers of both are the same, which can be with a donor of another task alone
    answers: list[str]  # the true answers of all donors that might have been drawn

    def record(self, reading: Reading) -> dict:
        """What a result says of its donor."""
        return {
            "donor_id": self.donor.id,
            "donor_task": self.donor.task,
            "same_answer": self.same_answer,
            "follows_donor": reading.answer == truth_form(self.donor),
            "follow_chance": chance_to_follow(reading.answer, self.answers),
        }


class Lender:
    """Finds donors for rows and keeps their latents.

    Args:
        take: asks rows without any change and returns the steps of each.
    """

    def __init__(self, rows: Sequence[EvaluationRow], kind: str, seed: int, take: Take, batch_size: int):
        self.rows, self.kind, self.take, self.batch_size = rows, kind, take, batch_size
        self.donors = Donors([candidate_of(row) for row in rows], seed)
        self.numbers = {row.key: number for number, row in enumerate(rows)}
        self.kept: OrderedDict[int, list[LatentStep]] = OrderedDict()
        self.has_latents: dict[int, bool] = {}

    def lend(self, batch: Sequence[EvaluationRow], draw: int) -> list[Loan | None]:
        """For each row the latents of its `draw`-th donor that takes any; draws beyond the last one begin anew."""
        orders = [self.donors.order(self.numbers[row.key], self.kind) for row in batch]
        chosen = [self.choose(order, draw) for order in orders]
        while unknown := {asked for asked, _ in chosen if asked is not None}:
            self.ask(unknown)
            chosen = [self.choose(order, draw) for order in orders]
        lent = [number for _, number in chosen]
        self.ask({number for number in lent if number is not None and number not in self.kept})
        loans = [
            None if number is None else self.loan(row, number, order)
            for row, number, order in zip(batch, lent, orders)
        ]
        while len(self.kept) > MOST_KEPT:
            self.kept.popitem(last=False)
        return loans

    def choose(self, order: list[int], draw: int) -> tuple[int | None, int | None]:
        """(a donor that must be asked before it is known, the donor); one of them is None, or both."""
        found = []
        for number in order:
            if number not in self.has_latents:
                return number, None
            if self.has_latents[number]:
                found.append(number)
            if len(found) > draw:
                return None, found[draw]
        return None, found[draw % len(found)] if found else None

    def ask(self, numbers: set[int]) -> None:
        """Ask donors for their latents."""
        ordered = sorted(numbers)
        for start in range(0, len(ordered), self.batch_size):
            part = ordered[start : start + self.batch_size]
            for number, steps in zip(part, self.take([self.rows[number] for number in part])):
                self.has_latents[number], self.kept[number] = bool(steps), steps

    def loan(self, row: EvaluationRow, number: int, order: list[int]) -> Loan:
        own, lent = (self.donors.candidates[one] for one in (self.numbers[row.key], number))
        answers = [self.donors.candidates[other].answer for other in order]
        return Loan(self.rows[number], self.kept[number], lent.answer == own.answer, answers)


def steps_of(trace, row: int) -> list[LatentStep]:
    """The steps of one row with what a swap needs, on the CPU."""
    unused = dict.fromkeys(("image_attention", "saliency", "picked_tokens", "windows", "routed_tokens"))
    return [replace(step, **unused).to("cpu") for step in trace.row(row) if len(step.latents)]
