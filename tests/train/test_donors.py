"""Who lends latents to whom in a swap: another picture, another answer, the same task, whatever the order of the data."""

import math

import numpy as np
import pytest

from evaluation.donors import Candidate, Donors, chance_to_follow
from evaluation.rows import EvaluationRow
from evaluation.scoring import Reading
from evaluation.swapping import Lender, Loan


def candidate(
    number: int, task: str = "color", answer: str | None = None, picture: str | None = None, question="what?"
):
    pictures = frozenset([picture or f"picture {number}"])
    return Candidate(f"q{number}", task, question, answer or f"answer {number % 3}", pictures)


def test_donors_differ_in_picture_and_answer_alone():
    rows = [
        candidate(0, answer="red"),
        candidate(1, answer="red"),  # the same answer
        candidate(2, answer="blue", picture="picture 0"),  # the same picture
        candidate(3, answer="blue", question="which?"),
        candidate(4, answer="green"),
        candidate(5, task="count", answer="3"),
        candidate(6, task="count", answer="red"),
    ]
    donors = Donors(rows, seed=0)
    assert set(donors.eligible(0)) == {3, 4} and set(donors.eligible(0, "question")) == {4}
    assert set(donors.eligible(0, "other_task")) == {5, 6}  # whatever their answers
    assert donors.eligible(5) == [6] and donors.order(3, "question") == []
    assert set(Donors(rows, 0, among=[3, 5]).eligible(0)) == {3}
    with pytest.raises(ValueError, match="must be one of .*got 'near'"):
        donors.eligible(0, "near")


def test_a_picture_of_several_is_enough_to_be_the_same():
    rows = [candidate(0), candidate(1)]
    rows[1] = Candidate("q1", "color", "what?", "answer 1", rows[0].pictures | {"another"})
    assert Donors(rows, 0).eligible(0) == []


def test_draws_follow_from_what_the_questions_are_and_not_from_where_they_stand():
    rows = [candidate(number) for number in range(40)]
    expected = {rows[n].id: [rows[d].id for d in Donors(rows, 3).order(n)] for n in range(40)}
    order = np.random.default_rng(0).permutation(40)
    shuffled = [rows[place] for place in order]
    donors = Donors(shuffled, 3)
    assert {shuffled[n].id: [shuffled[d].id for d in donors.order(n)] for n in range(40)} == expected
    other = Donors(rows, 4)
    assert [rows[d].id for d in other.order(0)] != expected["q0"]
    # Every one of the 26 donors is drawn first about equally often: 40 items, none more than 6 times.
    first = [ids[0] for ids in expected.values()]
    assert len(set(first)) > 15 and max(map(first.count, first)) <= 6


def test_the_chance_to_follow_is_the_share_of_donors_with_that_answer():
    assert chance_to_follow("red", ["red", "blue", "red", "green"]) == 0.5
    assert chance_to_follow("white", ["red"]) == 0 and math.isnan(chance_to_follow("red", []))


def row_of(number: int, answer: str) -> EvaluationRow:
    fields = {"data": "data.jsonl", "family": "color", "task": "color", "choices": (), "is_lettered": False}
    return EvaluationRow([], "what?", [], answer, f"Line {number}", f"q{number}", **fields, answer_format="text")


def test_a_donor_without_latents_is_passed_over_for_the_next():
    rows = [row_of(number, "red" if number < 3 else "blue") for number in range(6)]
    asked = []

    def take(batch):
        asked.append([row.id for row in batch])
        return [["latents of " + row.id] if row.id in ("q1", "q5") else [] for row in batch]

    lender = Lender(rows, "task", 0, take, batch_size=2)
    loans = lender.lend(rows, 0)
    assert [loan.donor.id for loan in loans] == ["q5"] * 3 + ["q1"] * 3
    assert [loan.steps for loan in loans] == [["latents of q5"]] * 3 + [["latents of q1"]] * 3
    assert sorted(sum(asked, [])) == sorted(set(sum(asked, []))) and max(map(len, asked)) <= 2  # each once, by batches
    asked.clear()
    assert [loan.donor.id for loan in lender.lend(rows[:1], 1)] == ["q5"]  # the only one, again
    assert lender.lend([rows[0]], 0)[0].answers == ["blue"] * 3
    assert Lender(rows[:3], "task", 0, take, 2).lend(rows[:3], 0) == [None] * 3  # all have one answer
    assert Lender(rows[2:5], "task", 0, take, 2).lend(rows[2:5], 0) == [None] * 3  # no donor takes latents


def test_latents_that_were_pushed_out_are_asked_for_again(monkeypatch):
    monkeypatch.setattr("evaluation.swapping.MOST_KEPT", 1)
    rows = [row_of(number, str(number)) for number in range(4)]
    lender = Lender(rows, "task", 0, lambda batch: [[row.id] for row in batch], batch_size=4)
    for draw in range(6):
        for row, loan in zip(rows, lender.lend(rows, draw)):
            assert loan.steps == [loan.donor.id] != [row.id]
    assert len({lender.lend(rows[:1], draw)[0].donor.id for draw in range(3)}) == 3
    for draw in range(3):  # from the start again
        assert lender.lend(rows[:1], draw)[0].donor.id == lender.lend(rows[:1], draw + 3)[0].donor.id


def test_a_loan_says_whether_it_was_followed():
    loan = Loan(row_of(1, "blue"), [], False, ["blue", "green", "blue", "white"])
    found = loan.record(Reading("blue", False, True, True))
    assert found == {
        "donor_id": "q1",
        "donor_task": "color",
        "same_answer": False,
        "follows_donor": True,
        "follow_chance": 0.5,
    }
    assert loan.record(Reading("green", False, True, True))["follow_chance"] == 0.25
