"""Which question lends its latents to which: drawn by a seed from the whole data, whatever its order.

A swap asks whether the latents of *this* picture matter. That needs a donor that differs in the picture and its answer, and in
nothing else that latents may carry:

    task         another picture and another true answer, of the same task
    question     the same, and asked the same question
    other_task   another picture, of another task: what latents carry of task and form is wrong too

The donors of a question are put in an order that follows from the seed and from what the questions are (id, task, question,
answer, pictures), not from where they stand in a file: draw k takes the k-th. A question without any donor is not swapped, and
whoever asks has to count it.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from train.data.reasoning_data import ReasoningSample


KINDS = ("task", "question", "other_task")


def digest_images(sample: ReasoningSample) -> list[str]:
    """A hash of the pixels of every image, in order."""
    return [hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest() for image in sample.load_images()]


def draw_seed(*place: object) -> int:
    """A seed that follows from `place` alone."""
    return int.from_bytes(hashlib.blake2b("|".join(map(str, place)).encode(), digest_size=7).digest(), "big")


@dataclass(frozen=True)
class Candidate:
    """A question, as far as the choice of donors looks at it."""

    id: str
    task: str
    question: str
    answer: str  # the true one, in one form (`scoring.truth_form`)
    pictures: frozenset[str]  # hashes of its images

    @cached_property
    def identity(self) -> str:
        parts = (self.id, self.task, self.question, self.answer, *sorted(self.pictures))
        return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class Donors:
    """The donors of every question.

    Args:
        among: numbers of the candidates that can lend; by default all.
    """

    def __init__(self, candidates: Sequence[Candidate], seed: int, among: Iterable[int] | None = None):
        self.candidates, self.seed = candidates, seed
        lenders = range(len(candidates)) if among is None else among
        # Sorted by what they are, so that the order of a file changes nothing.
        self.lenders = sorted(lenders, key=lambda number: candidates[number].identity)

    def eligible(self, number: int, kind: str = "task") -> list[int]:
        """All that may lend to a question, in an order without meaning.

        Raises:
            ValueError: an unknown kind.
        """
        if kind not in KINDS:
            raise ValueError(f"Donors must be one of {list(KINDS)}, got {kind!r}.")
        own = self.candidates[number]
        found = []
        for other in self.lenders:
            one = self.candidates[other]
            if other == number or one.pictures & own.pictures or (one.task == own.task) == (kind == "other_task"):
                continue
            if kind != "other_task" and one.answer == own.answer:
                continue
            if kind != "question" or one.question == own.question:
                found.append(other)
        return found

    def order(self, number: int, kind: str = "task") -> list[int]:
        """All donors of a question in the order in which they are drawn."""
        found = self.eligible(number, kind)
        rng = np.random.default_rng(draw_seed(self.seed, kind, self.candidates[number].identity))
        return [found[place] for place in rng.permutation(len(found))]


def chance_to_follow(answer: str, donors_answers: Iterable[str]) -> float:
    """How often an answer is the donor's by chance: the share of all donors that might have been drawn whose answer it is.

    nan without donors.
    """
    counts = Counter(donors_answers)
    return counts[answer] / counts.total() if counts else float("nan")
