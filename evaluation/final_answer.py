"""Read the final answer in what a model wrote, and compare it with the known one.

The one reader of answers: rewards, evaluation, harness adapters, recipes, faithfulness and the demo all call
`read_final_answer`. It looks behind the reasoning (`</think>`) for, in this order,

    \\boxed{B}, \\fbox{B}, \\boxed B            the last one that is closed (MATH, and what our models are taught)
    <answer>B</answer>                        the last one (DeepSeek-R1)
    #### B                                    on the last line (GSM8K)
    Answer: B, the answer is B, the correct option is B, **Final Answer** above a line
                                              the last one, up to the end of its line (MMLU-Pro, simple-evals, ScienceQA,
                                              Minerva)

and takes the whole text where there is none of them. Markup around the answer is taken off: `\\text{B}`, `\\textbf{(B)}`,
`\\mathrm{B}`, `$B$`, `**B**`. Labels are English.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.mathematics import compare_mathematics


BOX = "\\boxed{"
BRACES = re.compile(r"\\\\|\\[{}]|\\(?:boxed|fbox)\s*\{|[{}]")  # `\{` is a character and no bracket
BARE_BOX = re.compile(r"\\boxed\s+([^\s{}$\\]+)")
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
HASHES = re.compile(r"(?:^|\n)[ \t]*####[ \t]*(\S[^\n]*?)\s*\Z")
MARKED = re.compile(
    r"(?<![^\W_])(?:answer(?:\s+to\s+(?:the|this)\s+(?:question|problem))?|(?:correct|right|best|final)\s+(?:option|choice))(?![^\W_])"
    r"[*_]*\s*(?:(?:is|would\s+be|should\s+be|must\s+be)\b\s*(?:[:=][*_]*)?|[:=][*_]*)\s*"
    r"|^[ \t#*_]*(?:final[ \t]+)?answer[ \t*_]*\n\s*",
    re.IGNORECASE | re.MULTILINE,
)
TRAILER = re.compile(r"\s*(?:I hope it is correct\.?|BECAUSE:.*)\s*\Z")  # Minerva's, and ScienceQA's

COMMAND = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|up|md|sc|sl|normal)?|math(?:bf|it|rm|sf|tt|normal)|mbox|hbox|emph|underline|boldsymbol|bm"
    r"|operatorname\*?)\s*\{([^{}]*)\}"
)
REPLACED = (
    (re.compile(r"(?<=\d)(?:\\[,;:! ]|\{,\}|,\\!)(?=\d{3})"), ","),  # 1\,000 and 1{,}000
    (re.compile(r"\\(?:[,;:! ]|quad\b|qquad\b)"), " "),
    (re.compile(r"\\(?:left|right)\s*(?=[()\[\]])"), ""),
    (re.compile(r"\\([%$#&_])"), r"\1"),
)
WRAPPERS = (
    *(("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("{", "}")),
    *(("**", "**"), ("__", "__"), ("*", "*"), ("_", "_"), ("`", "`"), ('"', '"'), ("'", "'")),
)

NUMBER = re.compile(r"[+-]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?")
CHOICE = re.compile(  # the letter, and whether a label, a list or nothing follows
    r"(?:(?i:option|choice|letter)\s+)?"
    r"(?:\(\s*(?P<round>[A-Za-z])\s*\)|\[\s*(?P<square>[A-Za-z])\s*\]|\(?(?P<closed>[A-Za-z])\)"
    r"|\(?(?P<bare>[A-Z])(?=[.:,]|\s*(?:\n|\Z)|\s+-\s|\s+(?:because|since|which)\b)|(?P<small>[a-z])(?=[.:]?\s*\Z))"
)
LISTED = re.compile(r"(?:\A|[,;/&|\n]|\b(?:and|or)\b)\s*\(?([A-Z])(?=[).:,;/&|\n]|\s*\Z|\s+(?:and|or)\b)")
LABELLED = re.compile(
    r"(?<!\w)[(\[]([A-Z])[)\]]|(?:[,;/&|\n]|\b(?:and|or)\b)\s*([A-Z])[).:](?=\s*\S)|(?:\A([A-Z])[):]|(?<=\s)([A-Z])[).:])(?=\s+\S)"
)


@dataclass(frozen=True)
class FinalAnswer:
    """An answer without the markup around it."""

    text: str
    is_marked: bool  # in a box, or behind a label; False: it is all that was written


def find_box(text: str) -> str | None:
    """What the last closed `\\boxed{...}` holds, braces inside it included; None without one."""
    opened: list[int | None] = []  # for every open brace: where the content of the box begins, None if it is no box's
    begin, end = -1, -1
    for found in BRACES.finditer(text):
        token = found[0]
        if token == "}" and opened:
            start = opened.pop()
            if start is not None and start > begin:
                begin, end = start, found.start()
        elif token == "{" or len(token) > 2:
            opened.append(found.end() if len(token) > 2 else None)
    bare = list(BARE_BOX.finditer(text))
    if bare and bare[-1].start(1) > begin:
        return bare[-1][1].rstrip(".,;")
    return text[begin:end].strip() if begin >= 0 else None


def plain_text(text: str) -> str:
    """The text without what only lays it out, such as `\\text{...}`, `$...$` or `**...**`; mathematics stays as it is."""
    before = None
    while text != before:
        before, text = text, COMMAND.sub(r"\1", text.strip())
        for pattern, by in REPLACED:
            text = pattern.sub(by, text)
        text = take_off_wrapper(text.strip())
    return text


def take_off_wrapper(text: str) -> str:
    """Take off one pair of marks around the whole text, or a mark whose other half stands before the label."""
    for opening, closing in WRAPPERS:
        body = text[:-1] if text[-1:] in (".", ",", ";", ":") else text
        inside = body[len(opening) : len(body) - len(closing)]
        is_wrapped = inside and body.startswith(opening) and body.endswith(closing)
        if is_wrapped and opening not in inside and closing not in inside:
            return inside
    for mark in ("**", "__", "`"):
        if text.count(mark) == 1 and len(text) > len(mark):
            text = text.removeprefix(mark).removesuffix(mark).removesuffix(mark + ".")
    return text


def read_final_answer(text: str) -> FinalAnswer:
    """Find the answer in a text, by the conventions that the module lists."""
    text = text.rpartition("</think>")[2].strip() or text.strip()
    box = find_box(text)
    if box is not None:
        return FinalAnswer(plain_text(box), True)
    for pattern in (TAGGED, HASHES):
        found = pattern.findall(text)
        if found and found[-1].strip():
            return FinalAnswer(plain_text(found[-1]), True)
    for label in reversed(list(MARKED.finditer(text))):
        line = TRAILER.sub("", text[label.end() :].partition("\n")[0]).strip()
        if line.strip("*_ "):
            return FinalAnswer(plain_text(line), True)
    return FinalAnswer(plain_text(text), False)


def normalize(answer: str) -> str:
    """Letter case, blanks and full stops at the end do not count; one at the beginning does: .5 is not 5."""
    return " ".join(answer.lower().strip().rstrip(" .").split())


def read_choice(text: str, choices: Sequence[str] = ()) -> str | None:
    """The letter of the one choice that an answer names: B, (B), B. red, option B. None where it names none, or several.

    Args:
        choices: the texts of the choices, if they are known. An answer that gives a letter and the text of another choice
            names none of the two.
    """
    text = plain_text(text)
    found = CHOICE.match(text)
    if found is None:
        return None
    letter = next(part for part in found.groups() if part).upper()
    rest = text[found.end() :]
    is_list = found["bare"] is not None and rest.lstrip(" ").startswith((",", "\n"))
    rest = rest.lstrip(".:,-) \n\t")
    if choices:
        if ord(letter) - ord("A") >= len(choices):
            return None
        own, said = normalize(choices[ord(letter) - ord("A")]), normalize(rest)
        if said and said != own and said in map(normalize, choices):
            return None
        rest = said[len(own) :].upper() if own and said.startswith(own) else rest
    return None if names_another(rest, letter, is_list) else letter


def names_another(rest: str, letter: str, is_list: bool) -> bool:
    """Whether the text behind the letter of a choice gives the letter of another: `A, B` and `A) x, B) y`."""
    if is_list and any(other != letter for other in LISTED.findall(rest)):
        return True
    for bracketed, separated, first, spaced in LABELLED.findall(rest):
        other = bracketed or separated or first
        # Behind a blank alone it may be an initial (John F. Kennedy): only the next letter continues a list.
        if (other and other != letter) or (spaced and abs(ord(spaced) - ord(letter)) == 1):
            return True
    return False


def is_right(answer: str, truth: str, may_calculate: bool = True) -> bool:
    """Whether an answer says what the truth says: as a text, as a choice, or as mathematics.

    Args:
        may_calculate: also compare as mathematics. Only what is marked as the answer should be: some right number is likely
            to stand anywhere in a long text.
    """
    plain, known = plain_text(answer), plain_text(truth)
    if normalize(plain) == normalize(known):
        return True
    if re.fullmatch(r"\(?[A-Z]\)?\.?", known):
        return read_choice(plain) == known.strip("().")
    return may_calculate and any(map(str.isdigit, known)) and is_same_mathematics(answer, truth)


def is_same_mathematics(answer: str, truth: str) -> bool:
    """As `math-verify` sees it, in a process that can be stopped; where it is not installed, as numbers and fractions."""
    same = compare_mathematics(plain_text(answer), plain_text(truth))
    if same is not None:
        return same
    values = [as_fraction(text) for text in (answer, truth)]
    return None not in values and math.isclose(*values, rel_tol=1e-9)


def as_number(text: str) -> float | None:
    """The number that a text is, else None: 1250, 1,250, $3.50, 50 %. A comma separates thousands and nothing else."""
    text = plain_text(text).replace("\u2212", "-").strip().rstrip(".").strip(" $%")
    if not NUMBER.fullmatch(text):
        return None
    value = float(text.replace(",", ""))
    return value if math.isfinite(value) else None


def as_fraction(text: str) -> float | None:
    """The value of a number or of a fraction of two numbers, `1/2` or `\\frac{1}{2}`; else None."""
    plain = plain_text(text)
    found = re.fullmatch(r"(-?)\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}", plain) or re.fullmatch(
        r"()([^/]+)/([^/]+)", plain
    )
    if found is None:
        return as_number(text)
    above, below = as_number(found[2]), as_number(found[3])
    if above is None or not below:
        return None
    return (-1 if found[1] else 1) * above / below
