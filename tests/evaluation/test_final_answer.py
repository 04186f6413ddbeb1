"""The one reader of final answers, on written cases: what models write, and the conventions of published evaluations."""

import pytest

import evaluation.answers
import evaluation.scoring
import train.deeplatent.rl.rewards
from evaluation.final_answer import (
    as_fraction,
    as_number,
    find_box,
    is_right,
    normalize,
    plain_text,
    read_choice,
    read_final_answer,
)
from evaluation.harnesses.answerer import shorten
from examples import demo_common as looking


# What was written, and the answer in it.
MARKED = [
    # Boxes: MATH, Qwen, InternVL, our own models
    (r"so \boxed{red}", "red"),
    (r"\boxed{B}", "B"),
    (r"\boxed{B}.", "B"),
    (r"$\boxed{B}$", "B"),
    (r"$$\boxed{B}$$", "B"),
    (r"\[\boxed{B}\]", "B"),
    (r"**\boxed{B}**", "B"),
    (r"The answer is \boxed{B}.", "B"),
    (r"The answer is \boxed{B}, and not C.", "B"),
    (r"Answer: C. No: \boxed{B}", "B"),
    (r"\boxed{B} The answer is C", "B"),
    (r"\boxed{\text{B}}", "B"),
    (r"\boxed{\text{ B }}", "B"),
    (r"\boxed{\textbf{B}}", "B"),
    (r"\boxed{\textbf{(B)}}", "(B)"),
    (r"\boxed{\textbf{(B) } 32}", "(B)  32"),
    (r"\boxed{\textbf{(B)}\ 32}", "(B) 32"),
    (r"\boxed{\mathrm{B}}", "B"),
    (r"\boxed{\mathbf{B}}", "B"),
    (r"\boxed{\mathsf{B}}", "B"),
    (r"\boxed{\mathit{B}}", "B"),
    (r"\boxed{\textit{B}}", "B"),
    (r"\boxed{\texttt{B}}", "B"),
    (r"\boxed{\textrm{B}}", "B"),
    (r"\boxed{\textsf{B}}", "B"),
    (r"\boxed{\emph{B}}", "B"),
    (r"\boxed{\mbox{B}}", "B"),
    (r"\boxed{\operatorname{B}}", "B"),
    (r"\boxed{\boldsymbol{B}}", "B"),
    (r"\boxed{\textbf{\text{B}}}", "B"),
    (r"\boxed{$B$}", "B"),
    (r"\boxed{$\text{B}$}", "B"),
    (r"\boxed{**B**}", "B"),
    (r"\boxed{`B`}", "B"),
    (r'\boxed{"B"}', "B"),
    (r"\boxed{{B}}", "B"),
    (r"\boxed {B}", "B"),
    (r"\boxed B", "B"),
    (r"so it is \boxed 7.", "7"),
    (r"\fbox{B}", "B"),
    (r"\boxed{\boxed{B}}", "B"),
    (r"\boxed{\fbox{B}}", "B"),
    (r"\boxed{a} no, \boxed{ \frac{1}{2} }", r"\frac{1}{2}"),
    (r"\boxed{a} and \boxed{never closed", "a"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{a \} b}", r"a \} b"),
    (r"x} \boxed{3}", "3"),
    (r"\boxed{}", ""),
    (r"\boxed{\text{dark red}}", "dark red"),
    (r"\boxed{3\text{ cm}}", "3 cm"),
    (r"\boxed{50\%}", "50%"),
    (r"\boxed{\$3.50}", "$3.50"),
    (r"\boxed{1{,}000}", "1,000"),
    (r"\boxed{1\,000}", "1,000"),
    (r"\boxed{1,\!000}", "1,000"),
    (r"\boxed{\left(1, 2\right)}", "(1, 2)"),
    (r"\boxed{x\_1}", "x_1"),
    (r"\boxed{\dfrac{3}{4}}", r"\dfrac{3}{4}"),
    # DeepSeek-R1, and models that think first
    ("<think>It may be A.</think><answer>B</answer>", "B"),
    ("<answer> B </answer>", "B"),
    ("<answer>A</answer> no <answer>B</answer>", "B"),
    ("<ANSWER>\nB\n</ANSWER>", "B"),
    (r"<answer>\boxed{B}</answer>", "B"),
    (r"<think>\boxed{A}</think> The answer is B", "B"),
    (r"<think>\boxed{A}</think>\boxed{B}", "B"),
    (r"<think>\boxed{A}</think>", "A"),
    # GSM8K
    ("3 + 4 = <<3+4=7>>7\n#### 7", "7"),
    ("#### 1,250", "1,250"),
    ("#### 7\n", "7"),
    # simple-evals, MMMU, VLMEvalKit's prompts
    ("Answer: B", "B"),
    ("answer: B", "B"),
    ("ANSWER: B", "B"),
    ("Answer:B", "B"),
    ("Answer : B", "B"),
    ("Answer: $B$", "B"),
    ("Answer: **B**", "B"),
    ("**Answer:** B", "B"),
    ("**Answer: B**", "B"),
    ("**Answer**: B", "B"),
    ("__Answer:__ B", "B"),
    ("Answer:\nB", "B"),
    ("Answer = B", "B"),
    ("Answer is B", "B"),
    ("Final Answer: B", "B"),
    ("**Final Answer**\nB", "B"),
    ("### Final Answer\n\nB", "B"),
    ("## Answer\n**B**", "B"),
    ("Correct answer: B", "B"),
    ("Step 1: look.\nStep 2: think.\nAnswer: B\nThanks.", "B"),
    # MMLU-Pro
    ("The answer is (B).", "(B)."),
    ("the answer is (B)", "(B)"),
    ("The answer is: B.\nFor sure", "B."),
    ("the best answer is B", "B"),
    ("The correct answer is B", "B"),
    ("The correct option is B", "B"),
    ("The right choice is B", "B"),
    ("The best option: B", "B"),
    ("The final answer is **B**.", "B"),
    ("The answer should be B", "B"),
    ("The answer would be B", "B"),
    ("The answer must be: B", "B"),
    ("The answer to the question is B", "B"),
    ("The answer to this problem is: B", "B"),
    ("an answer is red, no: the answer is blue", "blue"),
    ("The answer is red. So my answer: blue", "blue"),
    # Minerva, ScienceQA
    ("Final Answer: The final answer is $42$. I hope it is correct.", "42"),
    ("The answer is B. BECAUSE: plants are green.", "B."),
    ("Answer: red", "red"),
    ("The answer is B.\nIs that the answer:", "B."),
]
UNMARKED = [
    ("red", "red"),
    (" red ", "red"),
    ("B", "B"),
    ("(B)", "(B)"),
    ("**B**", "B"),
    ("$B$.", "B"),
    (r"\text{B}", "B"),
    (r"red \boxed{blue", r"red \boxed{blue"),
    (r"\boxed{{a}", r"\boxed{{a}"),
    ("I see a red ball.", "I see a red ball."),
    ("#### Step 1\nLook.", "#### Step 1\nLook."),
    ("answers differ", "answers differ"),
    ("I cannot answer this.", "I cannot answer this."),
    ("~5", "~5"),
    ("", ""),
]

# What was answered, and the letter of the choice it names.
CHOICES = [
    *((text, "B") for text in ("B", "B.", " B ", "(B)", "[B]", "(B).", "B)", "B:", "B,", "b", "b.", "(b)", "b)")),
    *((text, "B") for text in (r"\text{B}", r"\textbf{B}", r"\mathrm{B}", "$B$", "$(B)$", r"\(B\)", "**B**", "*B*")),
    *((text, "B") for text in ("`B`", '"B"', "'B'", r"\text{(B)}", r"\textbf{(B) } 32", r"\left(B\right)", "{B}")),
    *((text, "B") for text in ("B. red", "B) red", "B: red", "(B) red", "B, red", "B - red", "[B] red", "(B): red")),
    *((text, "B") for text in ("option B", "Option B", "choice B.", "Option (B)", "option B: red", "letter B")),
    *(
        (text, "B")
        for text in ("B because it is red", "B, since it is red", "(B) because A is not", "B. Because it is")
    ),
    *(
        (text, "B")
        for text in ("B. A dog", "B. a cat, a dog", "B) Plan A", "B. points A and C", "B, A dog", "B. f(A)")
    ),
    *((text, "B") for text in ("B. John F. Kennedy", "(B) J. Edgar Hoover", "B\nIt is red.", "B.\nThe ball is red.")),
    *(
        (text, "A")
        for text in ("A", "(A)", "A.", "A. red", "(A) red", r"\text{A}", "A, I think", "A: B", "A. Vitamin B")
    ),
    *((text, "D") for text in ("D", "d)", "(D) none of these", "D. All of the above")),
    *(
        (text, None)
        for text in (
            "A, B",
            "A,B",
            "A, B, C",
            "A and B",
            "A or B",
            "A/B",
            "A & B",
            "A B",
            "AB",
            "A; B",
            "A\nB",
            "A \nB.",
        )
    ),
    *((text, None) for text in ("A, B.", "(A), (B)", "(A)(B)", "(A) and (C)", "(A) or (B)", "A, C and D", "[A] [B]")),
    *(
        (text, None)
        for text in ("A) x, B) y", "A. x, B. y", "A. red B. blue", "A: x; B: y", "(A) x (B) y", "A) x\nB) y")
    ),
    *(
        (text, None)
        for text in (r"\text{A, B}", r"\textbf{A} and \textbf{B}", "$A$ or $B$", "A. x and B. y", "A) B) C)")
    ),
    *(
        (text, None)
        for text in ("A dog", "a dog", "Both", "Certainly", "not A", "neither A nor B", "", "red", "1", "?")
    ),
    *(
        (text, None)
        for text in ("All of them", "A-team", "Apple", "I am not sure", "C is wrong", "e.g. red", "both A and B")
    ),
]

# What was answered, the truth, and whether it is right.
RIGHT = [
    ("A", "A", True),
    ("(A)", "A", True),
    ("A", "(A)", True),
    ("a", "A", True),
    ("A. red", "A", True),
    (r"\text{A}", "A", True),
    (r"\textbf{B}", "B", True),
    (r"\mathrm{C}", "C", True),
    ("$B$", "B", True),
    ("B.", "B", True),
    ("A, B", "A", False),
    ("A, B", "B", False),
    ("A) x, B) y", "A", False),
    ("A and B", "A", False),
    ("A or B", "B", False),
    ("B", "A", False),
    ("A dog", "A", False),
    ("(A) B", "B", False),
    ("Red.", "red", True),
    (r"\text{red}", "red", True),
    (r"\textbf{Red}", "red", True),
    ("**red**", "red", True),
    ("dark  red", "dark red", True),
    ("dark red", "red", False),
    ("red, blue", "red", False),
    ("red", r"\text{red}", True),
    ("yes", "Yes", True),
    ("no", "Yes", False),
    ("1,000", "1000", True),
    ("3.50", "3.5", True),
    (r"50\%", "50%", True),
    ("4", "3", False),
    ("none", "3", False),
    ("0.5", "1/2", True),
    (r"\frac{1}{2}", "0.5", True),
    (r"\dfrac{1}{2}", "1/2", True),
    (r"\frac{1}{3}", "0.5", False),
    (".5", "0.5", True),
    (".5", "5", False),
    ("-3", "3", False),
    ("", "3", False),
    ("", "red", False),
]
NUMBERS = [
    *(("1250", 1250), ("1,250", 1250), ("1,250,000.5", 1250000.5), ("$3.50", 3.5), ("50 %", 50), (r"50\%", 50)),
    *(("-3", -3), ("\u22123", -3), ("+3", 3), (".5", 0.5), ("5.", 5), ("1e3", 1000), (r"\text{7}", 7), ("$7$", 7)),
    *(
        (text, None)
        for text in ("1,2", "0,5", "12,34", "1 2", "1_000", "nan", "inf", "", ".", "e5", "1/2", "3 cm", "x")
    ),
]


def test_there_are_enough_cases():
    assert len(MARKED) + len(UNMARKED) + len(CHOICES) + len(RIGHT) + len(NUMBERS) >= 200


@pytest.mark.parametrize("text, answer", MARKED)
def test_a_marked_answer_is_found(text, answer):
    found = read_final_answer(text)
    assert (found.text, found.is_marked) == (answer, True)


@pytest.mark.parametrize("text, answer", UNMARKED)
def test_without_a_mark_the_whole_text_is_the_answer(text, answer):
    found = read_final_answer(text)
    assert (found.text, found.is_marked) == (answer, False)


@pytest.mark.parametrize("text, letter", CHOICES)
def test_a_choice_is_one_letter_or_none(text, letter):
    assert read_choice(text) == letter


@pytest.mark.parametrize("answer, truth, right", RIGHT)
@pytest.mark.parametrize("has_math_verify", [True, False])
def test_what_is_right(monkeypatch, answer, truth, right, has_math_verify):
    if has_math_verify:
        pytest.importorskip("math_verify")
    else:
        monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    assert is_right(answer, truth) == right


@pytest.mark.parametrize("text, number", NUMBERS)
def test_a_number_is_all_of_the_text(text, number):
    assert as_number(text) == number


def test_fractions_are_numbers_where_mathematics_is_compared_without_math_verify():
    assert [as_fraction(text) for text in ("1/2", r"-\frac{3}{4}", r"\dfrac{1}{4}", "3", "1/0", "1/2/3")] == [
        *(0.5, -0.75, 0.25, 3, None, None)
    ]


@pytest.mark.parametrize(
    "text, letter",
    [
        ("A. Vitamin C. It heals", "A"),  # is the text of the choice, and what follows names none
        ("A", "A"),
        ("(B) points A and B", "B"),
        ("A. points A and B", None),  # the text of another choice
        ("D", None),  # there is none
        ("A. Vitamin C, B. points A and B", None),
    ],
)
def test_known_choices_decide_what_a_text_may_hold(text, letter):
    assert read_choice(text, ["Vitamin C", "points A and B", "C. elegans"]) == letter


def test_everyone_reads_the_same_answer():
    """Rewards, evaluation, harness adapters and demo, on every case."""
    for text, answer in [*MARKED, *UNMARKED]:
        assert evaluation.answers.extract_answer(text) == looking.told(text) == answer
        assert evaluation.scoring.extract(text)[0] == answer
    for text, answer in MARKED:
        assert shorten(text) == (answer or text)
    for text, _ in UNMARKED:
        assert shorten(text) == text


def test_the_old_names_are_the_new_functions():
    assert evaluation.answers.find_box is find_box and evaluation.answers.normalize is normalize
    assert train.deeplatent.rl.rewards.is_right is is_right and train.deeplatent.rl.rewards.as_number is as_number


def test_a_long_text_is_read_in_little_time():
    """Linear: a loop that opens boxes for ever, and a line without any label."""
    assert find_box(r"\boxed{" * 100_000) is None
    assert not read_final_answer("word " * 100_000).is_marked
    assert plain_text("{" * 20_000) == "{" * 20_000
