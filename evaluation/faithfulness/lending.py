"""Arms in which items get latents of others, or their own again: `swap`, `swap_question`, `cross_task`, `shared`, `sham`.

    swap            the latents of another picture with another true answer, of the same task; several donors an item, drawn by seed
                    from all items with latents (`evaluation/donors.py`). The arm that says whether content is used
    swap_question   the same, where the donor was asked the same question
    cross_task      the latents of an item of another task: their task and form are wrong too
    shared          at every place (step, and position in its grid) the task's mean there, over half of its other items, so one
                    vector a place and nothing of this picture; in 8 such halves, which the intervals resample with the items
    sham            one's own latents, recorded and served again: what changes then is the floor of what means anything

Items without a donor are not asked: an arm names how many (`Arm.only`).

Shapes: N latents of a step, D hidden size.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from evaluation.donors import draw_seed
from evaluation.faithfulness.items import NotApplicable
from evaluation.faithfulness.subject import Arm, Subject
from modeling_latentvlm.interventions import resize_latents
from modeling_latentvlm.trace import LatentStep


SWAPS = {
    "swap": ("task", "z of another picture with another answer, same task"),
    "swap_question": ("question", "z of another picture with another answer, same question"),
    "cross_task": ("other_task", "z of another picture, of another task"),
}
SHARED_SETS = 8


@dataclass
class Table:
    """Latents to be served in the place of a model's own, by item and step; resized where the grids differ."""

    steps: dict[int, list[tuple[tuple[int, int], Tensor]]]  # item -> (grid, (N, D)) of its steps

    def __call__(self, latents: Tensor, step: LatentStep, number: int) -> Tensor:
        return serve(self.steps[number], step, len(latents)).to(latents)


def serve(rows: list[tuple[tuple[int, int], Tensor]], step: LatentStep, count: int) -> Tensor:
    """The `count` latents that stand where a step wants some: (N, D). `rows` as in `Table`; the last serves again."""
    grid, values = rows[min(step.index, len(rows) - 1)]
    if count == 1 and grid != step.grid and grid[0] == 1:  # autoregressive: one of its block at a time
        return values[min(step.offset, len(values) - 1)][None]
    return resize_latents(values, grid, step.grid)


def table_of(subject: Subject, donors: dict[int, int]) -> Table:
    """The clean latents of each item's donor."""
    return Table(
        {
            number: [(step.grid, step.latents) for step in subject.clean[donor].steps]
            for number, donor in donors.items()
        }
    )


def swap_arm(subject: Subject, name: str, draws: int) -> Arm:
    """An arm of `SWAPS` with up to `draws` donors an item.

    Raises:
        NotApplicable: no item has a donor.
    """
    kind, title = SWAPS[name]
    orders = {number: subject.donors.order(number, kind) for number in subject.with_latents}
    drawn = []
    for draw in range(draws):
        donors = {number: order[draw] for number, order in orders.items() if draw < len(order)}
        if donors:
            label = name if draw == 0 else f"{name} {draw + 1}"
            drawn.append(Arm(label, title, table_of(subject, donors), only=set(donors), donors=donors))
    if not drawn:
        what = {"task": "of its task", "question": "asked the same", "other_task": "of another task"}[kind]
        answer = "" if kind == "other_task" else " and another true answer"
        raise NotApplicable(f"no item with latents has a donor: one {what} with another picture{answer}, and latents")
    return replace(drawn[0], more=tuple(drawn[1:]))


def sham_arm(subject: Subject) -> Arm:
    own = {number: number for number in subject.with_latents}
    return Arm("sham", "one's own z again", table_of(subject, own), only=set(own))


@dataclass
class Means:
    """At every place the mean latent there of half of the other items of one's task."""

    subject: Subject
    orders: dict[str, list[int]]  # by task its items, in the order in which they are taken
    sums: dict[tuple, Tensor] = field(default_factory=dict)

    def __call__(self, latents: Tensor, step: LatentStep, number: int) -> Tensor:
        order = self.orders[self.subject.items[number].task]
        half = max(1, (len(order) - 1) // 2)
        own = number in order[: half + 1]
        total = self.total(order[: half + 1 if own else half], step, len(latents))
        if own:
            total = total - self.value(number, step, len(latents))
        return (total / half).to(latents)

    def value(self, number: int, step: LatentStep, count: int) -> Tensor:
        """An item's latents at a place, in float64, so that the order of a sum does not show."""
        rows = [(one.grid, one.latents.double()) for one in self.subject.clean[number].steps]
        return serve(rows, step, count).double()

    def total(self, members: list[int], step: LatentStep, count: int) -> Tensor:
        key = (self.subject.items[members[0]].task, len(members), step.index, step.offset, step.grid, count)
        if key not in self.sums:
            self.sums[key] = torch.stack([self.value(number, step, count) for number in members]).sum(dim=0)
        return self.sums[key]


def shared_arm(subject: Subject) -> Arm:
    """One vector a place, in `SHARED_SETS` sets of them.

    Raises:
        NotApplicable: every task has one item with latents.
    """
    tasks = {}
    for number in subject.with_latents:
        tasks.setdefault(subject.items[number].task, []).append(number)
    tasks = {task: numbers for task, numbers in tasks.items() if len(numbers) > 1}
    if not tasks:
        raise NotApplicable("no task has two items with latents, so there is no mean of others")
    only = {number for numbers in tasks.values() for number in numbers}
    title = f"the task's mean z at every place, over half of its other items; {SHARED_SETS} halves"
    arms = []
    for draw in range(SHARED_SETS):
        orders = {
            task: sorted(
                numbers,
                key=lambda one, draw=draw: draw_seed(subject.seed, "shared", draw, subject.items[one].identity),
            )
            for task, numbers in tasks.items()
        }
        label = "shared" if draw == 0 else f"shared {draw + 1}"
        arms.append(Arm(label, title, Means(subject, orders), only=only, has_shared_draws=True))
    return replace(arms[0], more=tuple(arms[1:]))
