"""Rewards: what a trajectory is worth.

A reward is any callable that takes trajectories and returns one finite number for each. `--rewards` names them:

    accuracy         1 where the answer is right: the same choice, the same text, or the same mathematics
    format           1 where the answer ends in a box, `\\boxed{...}`
    latent           1 where a `<latent>` was written (the paper's ablation; meaningless blocks are what it brings)
    judge            1 where a language model behind an endpoint gives at least `--judge_threshold` (`judge.py`)
    module:function  yours; a trajectory has `text`, `tokens`, `grids` and `sample` (`question`, `answer`, `images`)

The reward of a trajectory is their weighted sum (DeepLatent, eq. 12).
"""

import importlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from train.answers import find_box, normalize
from train.deeplatent_rl.judge import Judge, JudgeArguments
from train.deeplatent_rl.rollouts import Trajectory


Reward = Callable[[Sequence[Trajectory]], Sequence[float]]

CHOICE = re.compile(r"\(?([A-Z])(?:[).:,].*)?", re.DOTALL)  # A, (A), A. red, (A) red


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


def is_right(answer: str, truth: str, may_calculate: bool = True) -> bool:
    """Whether an answer says what the truth says: as a text, as a choice, or as mathematics."""
    truth = truth.strip()
    if normalize(answer) == normalize(truth):
        return True
    if re.fullmatch(r"\(?[A-Z]\)?", truth):
        choice = CHOICE.fullmatch(answer.strip())
        return choice is not None and choice[1] == truth.strip("()")
    return may_calculate and any(map(str.isdigit, truth)) and is_same_mathematics(answer, truth)


def is_same_mathematics(answer: str, truth: str) -> bool:
    """As `math-verify` sees it; where it is not installed, as numbers."""
    try:
        from math_verify import parse, verify
    except ImportError:
        return as_number(answer) is not None and as_number(answer) == as_number(truth)
    # Without its time limits, which need the main thread.
    told, known = (parse(f"${text}$", parsing_timeout=None) for text in (answer, truth))
    return bool(verify(known, told, timeout_seconds=None))


def as_number(text: str) -> float | None:
    try:
        value = float(text.strip(" $.%").replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def accuracy(trajectories: Sequence[Trajectory]) -> list[float]:
    """1 where the box, or without one the whole text, holds the answer."""
    values = []
    for trajectory in trajectories:
        box, truth = find_box(trajectory.text), trajectory.sample.answer
        # A text without a box is not searched for numbers: some right one is likely to stand in it.
        right = is_right(trajectory.text, truth, may_calculate=False) if box is None else is_right(box, truth)
        values.append(float(right))
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
        """Write `rewards` and `reward` into the trajectories.

        Raises:
            ValueError: a reward returned the wrong number of values, or one that is no finite number.
        """
        for name, reward in self.rewards.items():
            for trajectory, value in zip(trajectories, checked_values(name, reward(trajectories), trajectories)):
                trajectory.rewards[name] = value
        for trajectory in trajectories:
            trajectory.reward = sum(weight * trajectory.rewards[name] for name, weight in self.weights.items())


def checked_values(name: str, values, trajectories: Sequence[Trajectory]) -> list[float]:
    """The values of a reward as floats, one for each trajectory."""
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
