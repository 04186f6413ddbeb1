"""Whether what a model wrote is right.

`evaluation/final_answer.py` finds the answer in it. By format:

    choice   the text of the right choice, alone or before punctuation; where choices are listed also its letter: B, (B), B. red.
             An answer that names several choices is wrong
    text     the same text, letter case, blanks and a full stop at the end aside
    number   the same number; where the answer is marked as such, also as mathematics
    math     the same text or, where the answer is marked as such, the same mathematics (`math-verify` where it is installed)
    exact    the same characters between the first and the last that is no blank

`read_answer` also says what else is to be known of an answer: whether it was marked as the answer at all (a box, or one of the
other forms), and whether it is one that the question allows. A model whose latents are broken often loses the form of its
answers first, which must not be taken for a wrong look at the picture.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from evaluation.final_answer import (
    MARKED,
    as_number,
    is_right,
    is_same_mathematics,
    normalize,
    plain_text,
    read_choice,
    read_final_answer,
)


__all__ = ["MARKED"]  # where it was before `evaluation.final_answer`


def extract(text: str) -> tuple[str, bool]:
    """The answer in a text, and whether it was marked as the answer."""
    found = read_final_answer(text)
    return found.text, found.is_marked


def is_choice(told: str, is_marked: bool, row) -> bool:
    told = plain_text(told)
    said, right = normalize(told), normalize(row.answer)
    if len(said) > 1 and said in map(normalize, row.choices):  # "C. elegans" is a text, and not choice C
        return said == right
    letter = read_choice(told, row.choices) if row.is_lettered else None
    if letter is not None:
        return row.choices[ord(letter) - ord("A")] == row.answer
    return said == right or begins_with(said, right, row.choices)


def begins_with(said: str, right: str, choices: Sequence[str]) -> bool:
    """Whether an answer is the right choice and an explanation: "yes, it is", but not "yes, no"."""
    found = re.match(re.escape(right) + r"[.,;:)](?=\s|$)", said)
    if found is None:
        return False
    parts = re.split(r"[,;:)/&|]|\.(?=\s|$)|\b(?:and|or)\b", said[found.end() :])
    others = set(map(normalize, choices)) - {right}
    return not others & set(map(normalize, parts))


def is_text(told: str, is_marked: bool, row) -> bool:
    return is_right(told, row.answer, may_calculate=False)


def is_number(told: str, is_marked: bool, row) -> bool:
    value = as_number(told)
    if value is not None:
        return math.isclose(value, as_number(row.answer), rel_tol=1e-9)
    return is_marked and is_same_mathematics(told, row.answer)


def is_mathematics(told: str, is_marked: bool, row) -> bool:
    is_same_text = normalize(plain_text(told)) == normalize(plain_text(row.answer))
    return is_same_text or (is_marked and is_same_mathematics(told, row.answer))


def is_exact(told: str, is_marked: bool, row) -> bool:
    return told == row.answer.strip()


ANSWER_FORMATS: dict[str, Callable] = {
    "choice": is_choice,
    "text": is_text,
    "number": is_number,
    "math": is_mathematics,
    "exact": is_exact,
}


@dataclass(frozen=True)
class Reading:
    """What an answer says."""

    answer: str  # in one form: two answers say the same where these are equal
    is_right: bool
    is_marked: bool  # it stands in a box, or behind a label
    is_valid: bool  # it is one that the question allows


def truth_form(row) -> str:
    """The true answer in the form of `Reading.answer`."""
    return form_of(row.answer, row)


def form_of(told: str, row) -> str:
    value = as_number(told) if row.answer_format == "number" else None
    return repr(value) if value is not None else normalize(plain_text(told))


def known_answers(rows: Iterable) -> dict[str, frozenset[str]]:
    """By task the true answers of all its rows."""
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row.task, set()).add(truth_form(row))
    return {task: frozenset(answers) for task, answers in found.items()}


def read_answer(text: str, row, known: Collection[str] = ()) -> Reading:
    """Read an answer to an `EvaluationRow`.

    It is valid where it names one of the choices, where it is a number and a number is asked for, and in the other formats where
    it is marked as the answer or is one of the `known` ones (true answers to questions of this kind).
    """
    told, is_marked = extract(text)
    if ANSWER_FORMATS[row.answer_format](told, is_marked, row):
        return Reading(truth_form(row), True, is_marked, True)
    answer, is_valid = form_of(told, row), False
    if row.answer_format == "choice":
        choice = name_choice(told, row)
        answer, is_valid = (answer, False) if choice is None else (normalize(plain_text(choice)), True)
    elif row.answer_format == "number":
        is_valid = as_number(told) is not None
    else:
        is_valid = (is_marked and bool(answer)) or answer in known
    return Reading(answer, False, is_marked, is_valid)


def name_choice(told: str, row) -> str | None:
    """The text of the choice that an answer names, by its text or its letter; None where it names none."""
    told = plain_text(told)
    said = normalize(told)
    by_text = {normalize(choice): choice for choice in row.choices}
    if len(said) > 1 and said in by_text:  # as in `is_choice`
        return by_text[said]
    letter = read_choice(told, row.choices) if row.is_lettered else None
    if letter is not None:
        return row.choices[ord(letter) - ord("A")]
    found = [choice for text, choice in by_text.items() if said == text or begins_with(said, text, row.choices)]
    return found[0] if found else None
