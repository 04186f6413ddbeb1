"""D1's arms: what takes the place of the latents z_1 .. z_K before the language model reads them.

Each is a `Change`, so that the changed value enters the KV cache, under the same prompt, picture, token budget and greedy
decoding. What is drawn at random depends on seed, arm, item (by what it is) and place alone: not on the batch or the order of
the data, and the same in an answer and in its teacher-forced reading. Arms of other items' latents: `lending.py`.

Shapes: N latents of a step, D hidden size, M image tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaluation.donors import draw_seed
from evaluation.faithfulness.items import NotApplicable
from evaluation.faithfulness.lending import SWAPS, Table, sham_arm, shared_arm, swap_arm
from evaluation.faithfulness.subject import Arm, Change, Subject, without_latents
from modeling_latentvlm.interventions import generator_of, resize_latents
from modeling_latentvlm.trace import LatentStep
from processing_latentvlm.pictures import open_picture
from train.data.chats import PATCH, fit_grid


SMALL_CONSTANT = 0.01
SIGMAS = (0.1, 0.3, 1.0)
CALIBRATION = 256  # items, at most
DRAWS = 4  # donors of an item


def drawn(latents: Tensor, *place) -> Tensor:
    """Standard normal values of the shape of `latents`."""
    return torch.randn(latents.shape, generator=generator_of(*place)).to(latents)


@dataclass
class Calibration:
    """Statistics of clean latents over the items that have any (at most `CALIBRATION` of them, drawn by their identities)."""

    mean: Tensor  # (D,)
    std: Tensor  # (D,)
    rms: float  # sqrt of the mean square of an element
    num_latents: int


def calibrate(subject: Subject) -> Calibration:
    drawn = sorted(subject.with_latents, key=lambda number: subject.items[number].identity)[:CALIBRATION]
    values = torch.cat([subject.clean[number].latents() for number in drawn])
    return Calibration(
        values.mean(dim=0), values.std(dim=0, correction=0), float(values.square().mean().sqrt()), len(values)
    )


def first_repeat() -> Change:
    """z_t = z_1 of the same answer."""
    first: dict[int, Tensor] = {}

    def change(latents: Tensor, step: LatentStep, number: int) -> Tensor:
        if step.index == 0 and step.offset == 0:
            first[number] = latents[:1]
        return first[number].to(latents).expand_as(latents)

    return change


def region_table(subject: Subject) -> Table:
    """Features of a random window of the item's own picture, of the grid of its latents (resized where it does not fit)."""
    steps = {}
    for batch in subject.batches("reading image features"):
        for number, features in zip(batch, subject.image_features(batch)):
            rng = np.random.default_rng(draw_seed(subject.seed, subject.items[number].identity))
            steps[number] = [
                (step.grid, random_window(features, step, rng)) for step in subject.clean[number].steps
            ] or [((1, 1), features[:1])]
    return Table(steps)


def random_window(features: Tensor, step: LatentStep, rng: np.random.Generator) -> Tensor:
    """(N, D) of a window of the first image: features (M, D) of all images in raster order."""
    height, width = step.image_grids[0]
    field = features[: height * width].unflatten(0, (height, width))
    size = (min(step.grid[0], height), min(step.grid[1], width))
    top, left = rng.integers(height - size[0] + 1), rng.integers(width - size[1] + 1)
    window = field[top : top + size[0], left : left + size[1]].flatten(0, 1)
    return resize_latents(window, size, step.grid)


def oracle_table(subject: Subject) -> Table:
    """What the teacher reads where the latents stand: the features of the assistant's pictures, in order.

    Raises:
        NotApplicable: an architecture that no assistant's picture taught, or data without any.
    """
    if not subject.architecture.config.learns_from_assistant_images:
        raise NotApplicable(
            f"{subject.model.config.model_type} learns its latents from no picture of the assistant, so "
            "there is no teacher "
            "feature to put in their place"
        )
    most = subject.architecture.config.latent_grid_limit
    if most is None:
        raise NotApplicable("autoregressive latents stand for no grid of a picture")
    numbers = [number for number in subject.with_latents if subject.items[number].assistant_images]
    if not numbers:
        raise NotApplicable("the data bring no pictures of the assistant (`assistant_images`)")
    steps = {}
    for batch in subject.batches("reading assistant images", numbers):
        for number in batch:
            pictures = [load_fitted(path, most) for path in subject.items[number].assistant_images]
            encoded = subject.processor.image_processor(pictures, return_tensors="pt").to(subject.model.device)
            merge = subject.model.model.visual.spatial_merge_size
            grids = [(h // merge, w // merge) for _, h, w in encoded["image_grid_thw"].tolist()]
            features = subject.features_of(dict(encoded), [1] * len(pictures))
            steps[number] = list(zip(grids, features))
    return Table(steps)


def load_fitted(path: str, largest: int) -> Image.Image:
    """A picture as SFT shows it to the teacher: resized so that its grid fits the largest block."""
    picture = open_picture(path, f"the image {path}")
    height, width = fit_grid(*picture.size, largest)
    return picture.resize((width * PATCH, height * PATCH), Image.Resampling.BICUBIC)


def pad_embedding(subject: Subject) -> Tensor:  # (D,)
    token = subject.tokenizer.pad_token_id
    return subject.model.get_input_embeddings().weight[0 if token is None else token].detach().float()


def constant(value: Tensor | float) -> Change:
    def change(latents: Tensor, step: LatentStep, number: int) -> Tensor:
        return torch.as_tensor(value, dtype=latents.dtype, device=latents.device).expand_as(latents)

    return change


def dummy_arm(subject: Subject) -> Arm:
    title = "the padding token's embedding, as often as there are latents"
    return Arm("dummy", title, constant(pad_embedding(subject)))


def build_arms(
    subject: Subject, calibration: Calibration, draws: int = DRAWS, names: tuple[str, ...] | None = None
) -> dict[str, Arm | str]:
    """Arms by name, by default all; in the place of one that makes no sense here the reason.

    Args:
        draws: donors of each item in the arms that swap.
    """
    random = random_arms(subject, calibration)
    makers: dict[str, Callable[[], Arm]] = {
        "sham": lambda: sham_arm(subject),
        "zero": lambda: Arm("zero", "zeros", constant(0.0)),
        "constant": lambda: Arm("constant", f"every element {SMALL_CONSTANT}", constant(SMALL_CONSTANT)),
        "shared": lambda: shared_arm(subject),
        **{name: lambda arm=arm: arm for name, arm in random.items()},
        "first_repeat": lambda: Arm("first_repeat", "z_1 of the same answer at every place", first_repeat()),
        **{name: lambda name=name: swap_arm(subject, name, draws) for name in SWAPS},
        "region": lambda: Arm(
            "region", "features of a random window of the item's own picture", region_table(subject)
        ),
        "oracle": lambda: oracle(subject),
        "skip": lambda: without_latents(subject.architecture),
        "dummy": lambda: dummy_arm(subject),
    }
    return {name: attempt(makers[name]) for name in ARMS if names is None or name in names}


def random_arms(subject: Subject, calibration: Calibration) -> dict[str, Arm]:
    """The arms that draw noise, each value by what the item is and by its place."""
    names, rms = [item.identity for item in subject.items], calibration.rms

    def place(name: str, step: LatentStep, number: int) -> tuple:
        return subject.seed, name, names[number], step.index, step.offset

    def noisy(name: str, sigma: float) -> Change:
        return lambda latents, step, number: latents + sigma * drawn(latents, *place(name, step, number))

    def gaussian(name: str, mean: Tensor | float, std: Tensor | float) -> Change:
        def change(latents: Tensor, step: LatentStep, number: int) -> Tensor:
            values = drawn(latents.float(), *place(name, step, number))
            return torch.as_tensor(mean).to(values) + torch.as_tensor(std).to(values) * values

        return change

    arms = {}
    for sigma in SIGMAS:
        name = f"noise_{sigma}"
        title = f"z + N(0, {sigma}^2), that is {sigma / max(rms, 1e-12):.2g} RMS(z)"
        arms[name] = Arm(name, title, noisy(name, sigma))
    for sigma in SIGMAS:
        name = f"noise_{sigma}_rms"
        title = f"z + N(0, ({sigma} RMS(z))^2), sigma {sigma * rms:.2g}"
        arms[name] = Arm(name, title, noisy(name, sigma * rms))
    matched = gaussian("matched", calibration.mean, calibration.std)
    arms["gaussian"] = Arm("gaussian", "N(0, 1)", gaussian("gaussian", 0.0, 1.0))
    arms["matched"] = Arm("matched", "Gaussian with mean and variance of each dimension of the latents", matched)
    return arms


def oracle(subject: Subject) -> Arm:
    table = oracle_table(subject)
    return Arm("oracle", "features of the assistant's picture (teacher)", table, only=set(table.steps))


def attempt(build) -> Arm | str:
    try:
        return build()
    except NotApplicable as reason:
        return str(reason)


ARMS = (
    *("sham", "zero", "constant", "shared", *(f"noise_{sigma}" for sigma in SIGMAS)),
    *(f"noise_{sigma}_rms" for sigma in SIGMAS),
    *("gaussian", "matched", "first_repeat", *SWAPS, "region", "oracle", "skip", "dummy"),
)
