"""Serial questions: where is one after so many moves, each of which depends on the last?

No look-up but the last can be skipped, and every number of moves can be asked about the same picture. That separates models
that compute step by step from models that answer at once (tasks `hops`, `arrows` and `trace`). A task of this family deals a
board, asks about it, and knows all other questions that could have been asked.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from train.data.tasks.sample import Request, Sample, SerialAnswer


State = TypeVar("State")
QUESTIONS = ("one", "steps", "all")  # about each picture; see `train.data.tasks.generate_questions`


@dataclass(frozen=True)
class SerialTask:
    """A task whose pictures answer many questions. Called with a request it asks one of them, as every task does.

    Args:
        deal: draws what the request's picture shows (a board), and which question is asked about it: (board, start,
            number of moves).
        ask: (request, board, [(start, number of moves)]) to samples, in that order, which share one painted picture.
        starts: every state of a board from which can be asked.
        numbers: (board, start, level) to every number of moves that can be asked for.
    """

    deal: Callable[[Request], tuple[Any, str, int]]
    ask: Callable[[Request, Any, list[tuple[str, int]]], list[Sample]]
    starts: Callable[[Any], list[str]]
    numbers: Callable[[Any, str, str], Iterable[int]]

    def __call__(self, request: Request) -> Sample:
        board, start, num_steps = self.deal(request)
        return self.ask(request, board, [(start, num_steps)])[0]

    def questions(self, request: Request, every_start: bool) -> list[Sample]:
        """Every number of moves from the request's start, or from every start."""
        board, start, _ = self.deal(request)
        starts = self.starts(board) if every_start else [start]
        asked = [(one, number) for one in starts for number in self.numbers(board, one, request.level)]
        samples = self.ask(request, board, asked)
        for sample, (one, num_steps) in zip(samples, asked, strict=True):
            sample.variant = f"{file_name(one)}-{num_steps}"
        return samples


def file_name(state: str) -> str:
    """The name of a state as a part of the name of a file."""
    return state.replace(",", "-").replace(" ", "-")


def count_steps(request: Request, num_answers: int, most_steps: int) -> int:
    """The number of moves that a request asks for: every answer comes as often after every number of moves."""
    return 1 + request.index // num_answers % most_steps


def walk(following: dict[State, State], start: State, num_steps: int) -> tuple[State, ...]:
    """The states from `start` on, `num_steps` moves long or until there is no next one."""
    way = [start]
    while len(way) <= num_steps and way[-1] in following:
        way.append(following[way[-1]])
    return tuple(way)


def serial_answer(following: dict[str, str], contents: dict[str, str], start: str, num_steps: int) -> SerialAnswer:
    """What is known of a question, with the way as far as it can be without being in a place again.

    Raises:
        ValueError: the way ends, or comes back, before the asked number of moves: no answer, or one known without moving.
    """
    way = walk(following, start, len(contents))
    way = way[: next((number for number in range(1, len(way)) if way[number] in way[:number]), len(way))]
    if not 1 <= num_steps < len(way):
        raise ValueError(f"The number of moves must be 1 to {len(way) - 1} from {start}, got {num_steps}.")
    return SerialAnswer(start, num_steps, way, following, contents)
