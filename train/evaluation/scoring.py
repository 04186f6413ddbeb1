"""Whether what a model wrote is right.

`evaluation/final_answer.py` finds the answer in it. By format:

    choice   the text of the right choice, alone or before punctuation; where choices are listed also its letter: B, (B), B. red.
             An answer that names several choices is wrong
    text     the same text, letter case, blanks and a full stop at the end aside
    number   the same number; where the answer is marked as such, also as mathematics
    math     the same text or, where the answer is marked as such, the same mathematics (`math-verify` where it is installed)
    exact    the same characters between the first and the last that is no blank
"""

import math
import re
from collections.abc import Callable, Sequence

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


def is_correct(text: str, row) -> bool:
    """Whether what was written answers an `EvaluationRow` rightly."""
    return ANSWER_FORMATS[row.answer_format](*extract(text), row)
