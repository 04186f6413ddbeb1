"""All arms by name, and the models that come of them."""

from collections.abc import Callable
from typing import NamedTuple

from train.recipes.serial import clip, deeplatent, qwen
from train.recipes.serial.plan import STEPS, Place, Stage, option, vary


class Arm(NamedTuple):
    """A way to learn the questions. What `build` returns ends with the training whose folder has the arm's name.

    Args:
        has_latents: whether there are latents to replace.
        is_direct: whether it answers at once, by nothing but the backbone: what a model with latents is compared with.
        asked: options of `evaluation.evaluate` and `train.train_vedas` alike.
        rate_of: the arm whose learning rate it takes; by default its own.
    """

    build: Callable[[Place], list[Stage]]
    about: str
    has_latents: bool = False
    is_direct: bool = False
    backbone: str = "qwen"
    asked: str = ""
    rate_of: str | None = None


def doubled(name: str, arm: Arm) -> Arm:
    """The arm with twice the epochs in its last training."""

    def build(place: Place) -> list[Stage]:
        *before, last = arm.build(place)
        return [*before, vary(last, place, f"{name}_twice", share=2)]

    return arm._replace(build=build, about=f"as {name}, with twice the budget", rate_of=name)


ARMS = {
    "vedas": Arm(qwen.vedas, f"{STEPS} latent steps, by the curriculum", True),
    "deeplatent": Arm(deeplatent.deeplatent, "a latent block for every move", True),
    "deeplatent_drawn": Arm(deeplatent.deeplatent_drawn, "one latent block that draws the way", True),
    "words": Arm(qwen.words, "chain of thought"),
    "direct": Arm(qwen.direct, "answers at once, from the words' checkpoint, easy questions first", is_direct=True),
    "shorter": Arm(qwen.shorter, "the same curriculum without latents", is_direct=True),
    "direct_deep": Arm(qwen.direct_deep, "as direct, with twice the layers", is_direct=True),
    "direct_from_nothing": Arm(qwen.direct_from_nothing, "as direct, without the words before", is_direct=True),
    "pauses": Arm(
        qwen.pauses,
        f"as direct, with {STEPS} learned tokens below the question",
        is_direct=True,
        asked=qwen.ASK_WITH_PAUSES,
    ),
    "at_once": Arm(qwen.at_once, "all latent steps from the start, without words", True),
    "lare": Arm(clip.lare, f"{STEPS} refocusing steps, by the curriculum", True, backbone="clip"),
    "lare_words": Arm(clip.lare_words, "chain of thought, on LaRe's backbone", backbone="clip"),
    "lare_direct": Arm(clip.lare_direct, "as direct, on LaRe's backbone", is_direct=True, backbone="clip"),
    "lare_shorter": Arm(clip.lare_shorter, "as shorter, on LaRe's backbone", is_direct=True, backbone="clip"),
    "lare_direct_deep": Arm(
        clip.lare_direct_deep, "as direct_deep, on LaRe's backbone", is_direct=True, backbone="clip"
    ),
}
ARMS |= {f"{name}_twice": doubled(name, arm) for name, arm in ARMS.items() if arm.is_direct}


class Model(NamedTuple):
    """An arm, trained at a learning rate."""

    arm: str
    rate: str | None = None  # None: the arm's own

    @property
    def name(self) -> str:
        """Of its folder in those of a seed."""
        return self.arm if self.rate is None else f"{self.arm}-{self.rate}"

    def build(self, place: Place) -> list[Stage]:
        *before, last = ARMS[self.arm].build(place)
        return [*before, last if self.rate is None else vary(last, place, self.name, self.rate)]


def own_rate(arm: str, place: Place) -> str:
    """The learning rate of an arm's last training."""
    (rate,) = option(ARMS[arm].build(place)[-1].command, "--learning_rate")
    return rate
