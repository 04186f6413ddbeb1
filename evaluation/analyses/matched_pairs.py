"""Pairs of latents and features, matched and not, for probes (LaRe, appendix B).

Each question gives one matched pair, of its latents and its own feature, and one mismatched pair, of its latents and the
feature of another question of the same side of the split. There are three kinds of mismatch, taken equally often:

    same_image      another question about the same image
    same_question   the same question about another image
    random          another question about another image

Deviates from the paper, which gives every probe all three: a pair is mismatched only if what is probed differs. The
latents are not wrong about an image that two questions share, and no probe could tell such a pair from a matched one. So
`same_image` is no mismatch of images, and equal texts are none of texts. A kind that the data lack is made up by others.

Questions are split before they are paired, all of one image to the same side, so that a probe has seen neither the latents
nor the image of a pair that it is tested on. The kinds are then equally common on both sides, which is the paper's
stratification.

Shapes: N questions, P pairs.
"""

from dataclasses import dataclass

import numpy as np


KINDS = ("same_image", "same_question", "random")
TRAIN_SHARE = 0.7


@dataclass
class Questions:
    """Codes that are equal where questions have the same image, the same wording."""

    images: np.ndarray  # (N,)
    wordings: np.ndarray  # (N,)
    is_train: np.ndarray  # (N,) bool


@dataclass
class Pairs:
    """Rows of one side of the split."""

    latents: np.ndarray  # (P,) the question whose latents these are
    features: np.ndarray  # (P,) the question whose feature this is
    kinds: np.ndarray  # (P,) "matched" or one of `KINDS`

    @property
    def labels(self) -> np.ndarray:
        return (self.kinds == "matched").astype(int)


def choose_questions(images: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw `count` questions, those of an image together, and say which of them train: (count,) each.

    Raises:
        ValueError: there are not so many, or they have too few images for two sides.
    """
    if count > len(images):
        raise ValueError(f"{2 * count} pairs need {count} questions with an image, but there are {len(images)}.")
    groups = [np.flatnonzero(images == image) for image in rng.permutation(np.unique(images))]
    last = int(np.searchsorted(np.cumsum([len(group) for group in groups]), count)) + 1
    groups = np.split(np.concatenate(groups[:last])[:count], np.cumsum([len(group) for group in groups[: last - 1]]))
    wanted = {True: TRAIN_SHARE * count, False: (1 - TRAIN_SHARE) * count}
    left, sides = dict(wanted), []
    for group in sorted(groups, key=len, reverse=True):
        side = max(left, key=lambda side: left[side] / wanted[side])
        left[side] -= len(group)
        sides.append((group, side))
    chosen = np.concatenate([group for group, _ in sides])
    is_train = np.concatenate([np.full(len(group), side) for group, side in sides])
    if is_train.all():
        raise ValueError(f"The {count} questions are about one image: the two sides of the split would share it.")
    return chosen, is_train


def pair_up(questions: Questions, contents: np.ndarray, train: bool, rng: np.random.Generator) -> Pairs:
    """Pair every question of one side with itself and with one that mismatches.

    Args:
        contents: (N,) codes that are equal where what is probed is the same.

    Raises:
        ValueError: a question for which nothing mismatches.
    """
    side = np.flatnonzero(questions.is_train == train)
    same_image = equal(questions.images[side])
    same_wording = equal(questions.wordings[side])
    differs = ~equal(contents[side])
    usable = {  # (questions, questions) bool
        "same_image": same_image & ~same_wording & differs,
        "same_question": ~same_image & same_wording & differs,
        "random": ~same_image & ~same_wording & differs,
    }
    kinds = share_out({kind: mask.any(axis=1) for kind, mask in usable.items()}, rng)
    stuck = side[kinds == ""]
    if len(stuck):
        raise ValueError(
            f"{len(stuck)} of {len(side)} questions of one side of the split mismatch none of the others: the data vary too "
            "little for this probe."
        )
    partners = [rng.choice(np.flatnonzero(usable[kind][row])) for row, kind in enumerate(kinds)]
    return Pairs(
        latents=np.concatenate([side, side]),
        features=np.concatenate([side, side[partners]]),
        kinds=np.concatenate([np.full(len(side), "matched"), kinds]),
    )


def equal(codes: np.ndarray) -> np.ndarray:  # (N,) -> (N, N) bool
    return codes[:, None] == codes


def share_out(has_kind: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Give every row one of the kinds that it has, all kinds equally often as far as they go; "" where it has none."""
    rows = len(next(iter(has_kind.values())))
    given = np.full(rows, "", dtype="<U16")
    scarcest_first = sorted((kind for kind in has_kind if has_kind[kind].any()), key=lambda kind: has_kind[kind].sum())
    for place, kind in enumerate(scarcest_first):
        free = rng.permutation(np.flatnonzero((given == "") & has_kind[kind]))
        given[free[: (given == "").sum() // (len(scarcest_first) - place)]] = kind
    for kind in scarcest_first:
        given[(given == "") & has_kind[kind]] = kind
    return given
