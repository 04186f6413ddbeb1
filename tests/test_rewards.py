"""Rewards: which answers are right, what a reward may not return, and a judge that is asked only when it should be."""

import threading
from types import SimpleNamespace

import pytest
import torch

from evaluation.answers import extract_answer, find_box
from evaluation.scoring import extract
from train.data.reasoning_data import ReasoningSample
from train.deeplatent.rl import rewards
from train.deeplatent.rl.judge import JudgeArguments
from train.deeplatent.rl.rewards import RewardArguments, WeightedRewards, is_right


def written(text: str, answer: str = "red", line: int = 1, latents: int = 0) -> SimpleNamespace:
    sample = ReasoningSample([], "what colour?", [], answer, f"Line {line} of data.jsonl")
    return SimpleNamespace(text=text, sample=sample, num_latent_tokens=latents, rewards={}, reward=None)


@pytest.mark.parametrize(
    "text, box",
    [
        (r"so \boxed{red}", "red"),
        (r"\boxed{a} no, \boxed{ \frac{1}{2} }", r"\frac{1}{2}"),
        (r"\boxed{a} and \boxed{never closed", "a"),
        (r"\boxed{}", ""),
        ("red", None),
        (r"\boxed{{a}", None),
    ],
)
def test_the_last_closed_box_counts(text, box):
    assert find_box(text) == box
    whole = text if box is None else box  # recipes and the report, then the evaluation: the same box
    assert extract_answer(text) == extract(text)[0] == whole


@pytest.mark.parametrize(
    "answer, truth, right",
    [
        ("Red.", "red", True),
        ("dark red", "red", False),
        ("B", "B", True),
        ("(B)", "B", True),
        ("b", "B", True),
        ("B. a dog", "B", True),
        ("(B) a dog", "(B)", True),
        ("A dog", "A", False),
        ("Both", "B", False),
        ("(A) B", "B", False),
        ("1,000", "1000", True),
        ("3.50", "3.5", True),
        ("4", "3", False),
        ("none", "3", False),
    ],
)
@pytest.mark.parametrize("has_math_verify", [True, False])
def test_right_answers(monkeypatch, answer, truth, right, has_math_verify):
    if has_math_verify:
        pytest.importorskip("math_verify")
    else:
        monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    assert is_right(answer, truth) == right


def test_mathematics_is_compared_by_value():
    pytest.importorskip("math_verify")
    assert is_right(r"\frac{1}{2}", "0.5") and is_right("2x + 1", "1 + 2x")
    assert not is_right(r"\frac{1}{3}", "0.5")
    found = []  # in a thread, as trainers may call it, where no alarm can be set
    thread = threading.Thread(target=lambda: found.append(is_right(r"\frac{2}{4}", "1/2")))
    thread.start()
    thread.join()
    assert found == [True]


def test_the_default_reward_is_that_of_the_paper():
    texts = [r"\boxed{red}", "red", r"\boxed{blue}", "blue", r"\boxed{}"]
    found = [written(text) for text in texts]
    WeightedRewards(RewardArguments())(found)
    assert [one.reward for one in found] == pytest.approx([1.0, 0.9, 0.1, 0.0, 0.0])
    assert found[0].rewards == {"accuracy": 1.0, "format": 1.0}


def test_a_number_in_a_text_without_a_box_is_no_answer():
    assert rewards.accuracy([written("first 3, then 4, then 5", "4"), written("4", "4")]) == [0.0, 1.0]


def test_writing_latents_pays_only_when_asked_for():
    found = [written(r"\boxed{red}", latents=2), written(r"\boxed{red}")]
    WeightedRewards(RewardArguments(latent_reward_weight=0.5))(found)
    assert [one.reward for one in found] == pytest.approx([1.5, 1.0])
    assert "latent" not in WeightedRewards(RewardArguments()).weights


def constant(trajectories):
    return torch.full((len(trajectories),), 2.0)


def test_a_callable_of_the_user_is_found_by_name():
    found = [written("x"), written("y")]
    WeightedRewards(RewardArguments(rewards=["test_rewards:constant", "format"], reward_weights=[3.0, 1.0]))(found)
    assert [one.reward for one in found] == [6.0, 6.0]


@pytest.mark.parametrize(
    "returned, message",
    [
        ([1.0], "returned 1 values for 3 trajectories.*Line 1 of data"),
        ([1.0] * 4, "returned 4 values for 3"),
        ([0.0, float("nan"), 0.0], "finite number, got nan for Line 2 of data"),
        ([0.0, 0.0, float("inf")], "got inf for Line 3"),
        ([0.0, None, 0.0], "got None for Line 2"),
        ([0.0, "good", 0.0], "got 'good' for Line 2"),
        (1.0, "must return a list of numbers, got float"),
        (None, "got NoneType"),
    ],
)
def test_bad_values_name_the_sample(monkeypatch, returned, message):
    monkeypatch.setitem(rewards.NAMED, "own", lambda trajectories: returned)
    weighted = WeightedRewards(RewardArguments(rewards=["own"]))
    with pytest.raises(ValueError, match=message):
        weighted([written("x", line=line) for line in (1, 2, 3)])


def test_a_reward_that_says_so_may_be_missing(monkeypatch):
    def own(trajectories):
        return [1.0, None, 0.0]

    own.may_be_missing = True
    monkeypatch.setitem(rewards.NAMED, "own", own)
    found = [written(r"\boxed{red}", line=line) for line in (1, 2, 3)]
    WeightedRewards(RewardArguments(rewards=["own", "format"]))(found)
    assert [one.reward for one in found] == pytest.approx([1.0, None, 0.1])
    assert found[1].rewards == {"own": None, "format": 1.0}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rewards": []}, "one or more"),
        ({"rewards": ["format", "format"]}, "different"),
        ({"rewards": ["style"]}, "accuracy.*module:function, got 'style'"),
        ({"rewards": ["no_such_module:f"]}, "cannot be imported"),
        ({"rewards": ["test_rewards:no_such_name"]}, "cannot be imported"),
        ({"rewards": ["test_rewards:__name__"]}, "cannot be called"),
        ({"rewards": ["format"], "reward_weights": [1.0, 2.0]}, "1 finite numbers"),
        ({"rewards": ["format"], "reward_weights": [float("nan")]}, "finite"),
        ({"rewards": ["latent"], "latent_reward_weight": 0.1}, "beside"),
        ({"rewards": ["judge"]}, "judge_url"),
    ],
)
def test_rewards_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        WeightedRewards(RewardArguments(**fields))


def test_nobody_is_asked_by_default(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr("urllib.request.OpenerDirector.open", fail)
    WeightedRewards(RewardArguments(), JudgeArguments(judge_url="http://localhost", judge_model="m"))([written("x")])
