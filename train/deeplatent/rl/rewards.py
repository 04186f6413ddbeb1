"""Rewards: what a trajectory is worth.

A reward is any callable that takes trajectories and returns one finite number for each. One with the attribute
`may_be_missing = True` may return None instead: the trajectory is then left out of its group. `--rewards` names them:

    accuracy         1 where the answer is right: the same choice, the same text, or the same mathematics
    format           1 where the answer ends in a box, `\\boxed{...}`
    latent           1 where a `<latent>` was written (the paper's ablation; meaningless blocks are what it brings)
    judge            1 where a language model behind an endpoint gives at least `--judge_threshold` (`judge.py`)
    module:function  yours; a trajectory has `text`, `tokens`, `grids` and `sample` (`question`, `answer`, `images`)

The reward of a trajectory is their weighted sum (DeepLatent, eq. 12).
"""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from evaluation.final_answer import CHOICE, as_number, find_box, is_right, is_same_mathematics, read_final_answer
from train.deeplatent.rl.judge import Judge, JudgeArguments
from train.deeplatent.rl.rollouts import Trajectory


Reward = Callable[[Sequence[Trajectory]], Sequence[float | None]]

__all__ = ["CHOICE", "as_number", "is_same_mathematics"]  # where they were before `evaluation.final_answer`


@dataclass
class RewardArguments:
    """Which rewards count, and how much. The defaults are the design's."""

    rewards: list[str] = field(
        default_factory=lambda: ["accuracy", "format"],
        metadata={"help": "accuracy, format, latent, judge, or module:function."},
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One per reward; by default 0.9 and 0.1 for two of them, else 1 each."}
    )
    latent_reward_weight: float = field(
        default=0.0, metadata={"help": "Of a further reward for writing `<latent>`; 0: none."}
    )


def accuracy(trajectories: Sequence[Trajectory]) -> list[float]:
    """1 where the final answer is the known one; without a box or a label, where the whole text is."""
    values = []
    for trajectory in trajectories:
        found = read_final_answer(trajectory.text)
        # An unmarked text is not searched for numbers: some right one is likely to stand in it.
        values.append(float(is_right(found.text, trajectory.sample.answer, may_calculate=found.is_marked)))
    return values


def boxed_format(trajectories: Sequence[Trajectory]) -> list[float]:
    """1 where the answer is put in a box that is closed and not empty."""
    return [float(bool(find_box(trajectory.text))) for trajectory in trajectories]


def latent_invocation(trajectories: Sequence[Trajectory]) -> list[float]:
    """1 where a `<latent>` was written."""
    return [float(trajectory.num_latent_tokens > 0) for trajectory in trajectories]


NAMED: dict[str, Reward] = {"accuracy": accuracy, "format": boxed_format, "latent": latent_invocation}


def find_reward(name: str, judge: JudgeArguments) -> Reward:
    """The reward of a name.

    Raises:
        ValueError: there is none, or the judge has no endpoint.
    """
    if name in NAMED:
        return NAMED[name]
    if name == "judge":
        return Judge(judge)
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"A reward is one of {sorted([*NAMED, 'judge'])} or module:function, got {name!r}.")
    try:
        reward = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"The reward {name!r} cannot be imported: {error}") from error
    if not callable(reward):
        raise ValueError(f"The reward {name!r} cannot be called: it is a {type(reward).__name__}.")
    return reward


class WeightedRewards:
    """Several rewards, each under its name and with its weight."""

    def __init__(self, arguments: RewardArguments, judge: JudgeArguments | None = None):
        names, weights = list(arguments.rewards), arguments.reward_weights
        if not names or len(set(names)) < len(names):
            raise ValueError(f"`rewards` must be one or more different names, got {names}.")
        if weights is None:
            weights = [0.9, 0.1] if len(names) == 2 else [1.0] * len(names)
        if len(weights) != len(names) or not all(map(math.isfinite, weights)):
            raise ValueError(f"`reward_weights` must be {len(names)} finite numbers, one per reward, got {weights}.")
        if arguments.latent_reward_weight:
            if "latent" in names:
                raise ValueError("`latent_reward_weight` cannot be given beside a reward named 'latent'.")
            names, weights = [*names, "latent"], [*weights, arguments.latent_reward_weight]
        self.weights = dict(zip(names, weights))
        self.rewards = {name: find_reward(name, judge or JudgeArguments()) for name in names}

    def __call__(self, trajectories: Sequence[Trajectory]) -> None:
        """Write `rewards` and `reward` into the trajectories; None where one of the rewards is missing.

        Raises:
            ValueError: a reward returned the wrong number of values, or one that is no finite number.
        """
        for name, reward in self.rewards.items():
            may_miss = getattr(reward, "may_be_missing", False)
            values = checked_values(name, reward(trajectories), trajectories, may_miss)
            for trajectory, value in zip(trajectories, values):
                trajectory.rewards[name] = value
        for trajectory in trajectories:
            is_missing = None in trajectory.rewards.values()
            total = 0.0 if is_missing else sum(w * trajectory.rewards[name] for name, w in self.weights.items())
            trajectory.reward = None if is_missing else total


def checked_values(
    name: str, values, trajectories: Sequence[Trajectory], may_be_missing: bool = False
) -> list[float | None]:
    """The values of a reward as floats, one for each trajectory, or None where it is missing and may be."""
    first = trajectories[0].sample.origin
    if not hasattr(values, "__len__") or isinstance(values, str | dict):
        raise ValueError(
            f"The reward {name!r} must return a list of numbers, got {type(values).__name__} (first sample: {first})."
        )
    if len(values) != len(trajectories):
        raise ValueError(
            f"The reward {name!r} returned {len(values)} values for {len(trajectories)} trajectories (first sample: {first})."
        )
    floats = []
    for trajectory, value in zip(trajectories, values):
        if value is None and may_be_missing:
            floats.append(None)
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"The reward {name!r} must be a finite number, got {value!r} for {trajectory.sample.origin}."
            )
        floats.append(number)
    return floats
