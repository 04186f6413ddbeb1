"""Questions that need one step after the other: the way to each answer, and which latents may hold it.

A row of the data says it in `serial` (`train/data/tasks/sample.py`, `SerialAnswer`): the start, the number of moves that are asked for (the
*need* k), the way through one's own picture, and what follows every state, so that it is known what the answer would be from anywhere.

A latent is a block or step where the model takes several, and a latent (or a run of neighbours) of the one block where it takes one.
Latents and moves count from 1 here, as on the page; `latent_intervention` counts from 0.
"""

from dataclasses import dataclass

from evaluation.faithfulness.items import Item, NotApplicable
from evaluation.faithfulness.replacement import MOST_UNITS, split_units
from evaluation.faithfulness.subject import Answer, Change, Subject
from modeling_latentvlm.interventions import ChangeAt, Place
from train.data.tasks.sample import continue_from


@dataclass(frozen=True)
class Way:
    """The way to the answer of one question."""

    item: Item

    @property
    def serial(self) -> dict:
        return self.item.serial

    @property
    def need(self) -> int:
        """The moves that are asked for: k."""
        return self.serial["num_steps"]

    @property
    def answer(self) -> str:
        return self.content(self.need)

    def state(self, moves: int) -> str:
        """Where one is after so many moves; who has arrived stays."""
        return self.serial["way"][min(moves, self.need)]

    def content(self, moves: int) -> str:
        """What stands there."""
        return self.serial["contents"][self.state(moves)]

    def continued(self, state: str, moves: int) -> str | None:
        """What the answer would be in this picture, had one been in `state` after `moves` moves; None where no way leads on from it."""
        serial = self.serial
        has_end = serial["way"][-1] not in serial["following"] and len(serial["way"]) == self.need + 1
        try:
            left = None if has_end else max(0, self.need - moves)  # where a way ends by itself, its end is asked for
            return continue_from({"id": self.item.name, "task": self.item.task, "serial": serial}, state, left)
        except ValueError:
            return None


@dataclass(frozen=True)
class Unit:
    """What is called a latent: a block or step, or some latents of the only block."""

    label: str  # counts from 1
    places: tuple[Place, ...]
    number: int  # from 1: the moves after which one is where it is expected to say

    def is_in(self, answer: Answer) -> bool:
        """Whether an answer took it."""
        step, position = self.places[-1]
        return step < len(answer.steps) and (position is None or position < len(answer.steps[step].latents))


def find_ways(subject: Subject) -> dict[int, Way]:
    """The ways of all items that have latents and say what they need.

    Raises:
        NotApplicable: none does.
    """
    found = {number: Way(subject.items[number]) for number in subject.with_latents if subject.items[number].serial}
    if not found:
        raise NotApplicable(
            "the data do not say how many steps a question needs (`serial`, as `python -m train.data.tasks --task hops` writes it)"
        )
    return found


def find_units(subject: Subject, numbers: list[int]) -> list[Unit]:
    """The latents of some items, in order: blocks or steps, or latents of the only one."""
    answers = [subject.clean[number] for number in numbers]
    most = max(len(answer.steps) for answer in answers)
    count = max(len(answer.steps[0].latents) for answer in answers)
    if most > 1 or count == 1:
        return [Unit(str(step + 1), ((step, None),), step + 1) for step in range(most)]
    units = []
    for number, positions in enumerate(split_units(count, MOST_UNITS), 1):
        first, last = positions[0] + 1, positions[-1] + 1
        label = str(first) if first == last else f"{first}-{last}"
        units.append(Unit(label, tuple((0, position) for position in positions), number))
    return units


def takes_steps(units: list[Unit]) -> bool:
    """Whether the latents are blocks or steps."""
    return units[0].places[0][1] is None


def at_unit(change: Change, unit: Unit) -> Change:
    """The change at one latent; those that the model makes afterwards are its own."""

    def changed(latents, step, number):
        return ChangeAt(lambda values, one: change(values, one, number), unit.places)(latents, step)

    return changed


def group_by_need(ways: dict[int, Way], numbers: list[int]) -> dict[str, list[int]]:
    """Items by their need, and all of them."""
    needs = sorted({ways[number].need for number in numbers})
    return {"all": numbers} | {str(need): [one for one in numbers if ways[one].need == need] for need in needs}
