"""Whether what a model wrote is right.

The answer is what stands in the last `\\boxed{...}`; without one, what follows the last "answer is" or "Answer:" on its
line; without that, the whole text. By format:

    choice   the text of the right choice, alone or before punctuation; where choices are listed also its letter: B, (B), B. red
    text     the same text, letter case, blanks and a full stop at the end aside
    number   the same number; where the answer is marked as such, also as mathematics
    math     the same text or, where the answer is marked as such, the same mathematics (`math-verify` where it is installed)
    exact    the same characters between the first and the last that is no blank
"""

import math
import re
from collections.abc import Callable

from train.answers import find_box, normalize
from train.deeplatent_rl.rewards import CHOICE, as_number, is_right, is_same_mathematics


MARKED = re.compile(r".*\banswer(?:\s+is\s*:?|\s*:)\s*(\S.*)", re.IGNORECASE)  # `.*` first: the last of a line


def extract(text: str) -> tuple[str, bool]:
    """The answer in a text, and whether it was marked as the answer."""
    box = find_box(text)
    if box is not None:
        return box, True
    marked = MARKED.findall(text)
    return (marked[-1].strip(), True) if marked else (text.strip(), False)


def is_choice(told: str, is_marked: bool, row) -> bool:
    said, right = normalize(told), normalize(row.answer)
    if len(said) > 1 and said in map(normalize, row.choices):  # "C. elegans" is a text, and not choice C
        return said == right
    letter = CHOICE.fullmatch(told) if row.is_lettered else None
    if letter is not None and ord(letter[1]) - ord("A") < len(row.choices):
        return row.choices[ord(letter[1]) - ord("A")] == row.answer
    return said == right or re.match(re.escape(right) + r"[.,;:)](\s|$)", said) is not None


def is_text(told: str, is_marked: bool, row) -> bool:
    return is_right(told, row.answer, may_calculate=False)


def is_number(told: str, is_marked: bool, row) -> bool:
    value = as_number(told)
    if value is not None:
        return math.isclose(value, as_number(row.answer), rel_tol=1e-9)
    return is_marked and is_same_mathematics(told, row.answer)


def is_mathematics(told: str, is_marked: bool, row) -> bool:
    return normalize(told) == normalize(row.answer) or (is_marked and is_same_mathematics(told, row.answer))


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
