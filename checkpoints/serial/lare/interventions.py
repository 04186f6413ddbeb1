"""Replace latents before they enter the language model, to see whether they carry anything.

`generate(..., latent_intervention=X)` and `forward(..., latent_intervention=X)` take a name or a callable:

    "zero"     zeros
    "noise"    Gaussian noise of each latent's own norm
    "mean"     every latent becomes the mean of its block
    "shuffle"  the latents of a block change places
    "swap"     a row gets the latents of the next row, of another prompt, that opens a block at the same time, resized
    callable   `f(latents, step) -> latents`, (N, D) in and out; `step` is the `LatentStep` before the change. Autoregressive
               latents come one at a time: `step.offset` says which of its block

A name alone acts on all latents. Behind a colon it says which, by the numbers of `LatentStep`, which count from 0:

    "swap:2"       block or step 2 alone; those that the model makes afterwards are its own, made with the changed one before them
    "zero:0,2"     blocks or steps 0 and 2
    "noise:1.3"    latent 3 of block 1: of a grid in reading order, of autoregressive latents the fourth

`ChangeAt` does the same for a callable. A latent that no row has is a `ValueError`; where some rows have it and others do not, the
others keep what they have, and how many do is logged (`num_latent_blocks` of the output says which).

The changed latents are what the cache, the trace and the rest of the answer see.

"noise" and "shuffle" draw from PyTorch's global generator, so what a row gets depends on its batch. `draw_by_row("noise", seeds)`
is the same change as a callable that draws from one seed for each row:

    model.generate(**inputs, latent_intervention=draw_by_row("noise", seeds=[11, 12, 13]))
"""

import hashlib
import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from .trace import LatentStep


logger = logging.get_logger(__name__)
Intervention = Callable[[Tensor, LatentStep], Tensor]
Place = tuple[int, int | None]  # (block or step, latent in it or None for all of it), both from 0
PLACE = re.compile(r"([0-9]+)(?:\.([0-9]+))?")


def zero(latents: Tensor, step: LatentStep) -> Tensor:
    return torch.zeros_like(latents)


def noise(latents: Tensor, step: LatentStep, generator: torch.Generator | None = None) -> Tensor:
    if generator is None:
        drawn = torch.randn_like(latents)
    else:
        drawn = torch.randn(latents.shape, generator=generator).to(latents)
    return drawn * (latents.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True))


def mean(latents: Tensor, step: LatentStep) -> Tensor:
    return latents.mean(dim=0, keepdim=True).expand_as(latents)


def shuffle(latents: Tensor, step: LatentStep, generator: torch.Generator | None = None) -> Tensor:
    device = latents.device if generator is None else generator.device
    return latents[torch.randperm(len(latents), device=device, generator=generator).to(latents.device)]


def generator_of(*place: object) -> torch.Generator:
    """A CPU generator that depends on nothing but `place`: the same on every device and in every process."""
    digest = hashlib.blake2b("|".join(map(str, place)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def draw_by_row(name: str, seeds: Sequence[int]) -> Intervention:
    """The intervention "noise" or "shuffle", drawn for each row from a seed of its own and from the place of the latents.

    Neither the other rows of a batch nor their order change what a row gets.

    Args:
        seeds: one for each row that is decoded; with beams, one for each beam, equal for those of one prompt.

    Raises:
        ValueError: an intervention that draws nothing, or (when latents are made) fewer seeds than rows.
    """
    if name not in DRAWN:
        raise ValueError(f"`draw_by_row` knows the interventions {sorted(DRAWN)}, got {name!r}.")

    def change(latents: Tensor, step: LatentStep) -> Tensor:
        if step.row >= len(seeds):
            raise ValueError(
                f"`seeds` must give one seed for each row, but row {step.row} makes latents and there are {len(seeds)}."
            )
        return DRAWN[name](latents, step, generator_of(seeds[step.row], step.index, step.offset))

    return change


def resize_latents(latents: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Bilinearly resize (h * w, D) latents from one grid to another."""
    if grid == target:
        return latents
    field = latents.float().T.unflatten(1, grid)[None]
    resized = F.interpolate(field, target, mode="bilinear", antialias=True, align_corners=False)
    return resized[0].flatten(1).T.to(latents.dtype)


INTERVENTIONS: dict[str, Intervention | None] = {
    "zero": zero,
    "noise": noise,
    "mean": mean,
    "shuffle": shuffle,
    "swap": None,  # needs the other rows: `intervene` does it
}
DRAWN: dict[str, Callable] = {"noise": noise, "shuffle": shuffle}
NEEDS_A_WHOLE_BLOCK = ("mean", "shuffle")


class ChangeAt:
    """An intervention that acts on some latents alone; all others stay what they are.

    Args:
        change: what is done to them: a callable, or (inside a model) a name.
        name: the text that named the places, for the messages of `check_reached`.

    Attributes:
        reached: (row, place) of every place that there was.
        num_steps: the blocks or steps that a row has taken, at most.
    """

    def __init__(self, change: str | Intervention, places: Sequence[Place], name: str | None = None):
        self.change, self.places, self.name = change, tuple(places), name
        self.reached: set[tuple[int, Place]] = set()
        self.num_steps = 0

    def __call__(self, latents: Tensor, step: LatentStep) -> Tensor:
        return self.apply(latents, step, lambda: self.change(latents, step))

    def apply(self, latents: Tensor, step: LatentStep, make: Callable[[], Tensor]) -> Tensor:
        """(N, D) with those of `make()` at the places of this step; it is not called for a step without any."""
        self.num_steps = max(self.num_steps, step.index + 1)
        chosen = torch.zeros(len(latents), dtype=torch.bool)
        for place in self.places:
            first = 0 if place[1] is None else place[1] - step.offset  # autoregressive latents come one at a time
            if place[0] == step.index and 0 <= first < len(latents):
                chosen[first : None if place[1] is None else first + 1] = True
                self.reached.add((step.row, place))
        if not bool(chosen.any()):
            return latents
        return torch.where(chosen.to(latents.device)[:, None], checked(make(), step), latents)

    def has_reached(self, row: int) -> bool:
        """Whether a row had all of the places."""
        return all((row, place) in self.reached for place in self.places)


def parse_intervention(text: str) -> tuple[str, tuple[Place, ...]]:
    """The name of an intervention and the places that it acts on, none for all latents.

    Raises:
        ValueError: an unknown name, or places that are no numbers.
    """
    name, colon, listed = text.partition(":") if isinstance(text, str) else (None, "", "")
    if name not in INTERVENTIONS:
        raise ValueError(
            f"`latent_intervention` must be a callable or one of {sorted(INTERVENTIONS)}, which may name blocks or steps from 0 on "
            f'("swap:2", "zero:0,2") and a latent in them ("noise:1.3"); got {text!r}.'
        )
    found = [PLACE.fullmatch(part.strip()) for part in listed.split(",")] if colon else []
    if None in found:
        raise ValueError(
            f"`latent_intervention` must name blocks or steps by numbers from 0 on, as in {name + ':2'!r}, {name + ':0,2'!r} or (latent "
            f"3 of block 1) {name + ':1.3'!r}; got {text!r}."
        )
    return name, tuple((int(one[1]), None if one[2] is None else int(one[2])) for one in found)


def prepare_intervention(
    intervention: str | Intervention | None, one_at_a_time: bool
) -> str | Intervention | ChangeAt | None:
    """What a call was given, as `intervene` takes it.

    Args:
        one_at_a_time: whether latents come one by one (autoregressive), so that a block is never seen whole.

    Raises:
        ValueError: it cannot act.
    """
    if intervention is None or callable(intervention):
        return intervention
    name, places = parse_intervention(intervention)
    if one_at_a_time and name in NEEDS_A_WHOLE_BLOCK:
        raise ValueError(
            f"`latent_intervention={intervention!r}` needs a whole block at once, but autoregressive latents come one by one."
        )
    return ChangeAt(name, places, intervention) if places else name


def check_reached(intervention: str | Intervention | None, num_rows: int) -> None:
    """Hold the places that a text named against those that there were.

    Raises:
        ValueError: no row has such a latent.
    """
    if not isinstance(intervention, ChangeAt) or intervention.name is None:
        return
    for place in intervention.places:
        count = len({row for row, reached in intervention.reached if reached == place})
        what = f"block or step {place[0]}" if place[1] is None else f"latent {place[1]} of block or step {place[0]}"
        if count == 0:
            raise ValueError(
                f"`latent_intervention={intervention.name!r}` acts on {what}, counted from 0, which no row has: at most "
                f"{intervention.num_steps} blocks or steps were taken."
            )
        if count < num_rows:
            logger.warning_once(
                f"`latent_intervention={intervention.name!r}`: {num_rows - count} of {num_rows} rows have no {what}, counted from 0, "
                "and keep their latents."
            )


def intervene(
    intervention: str | Intervention | ChangeAt | None, steps: list[LatentStep], prompts: list[int]
) -> list[Tensor]:
    """Return the latents of all blocks opened together, changed. `prompts` says which rows share one: beams do."""
    if intervention is None:
        return [step.latents for step in steps]
    return [checked(change_step(intervention, index, steps, prompts), step) for index, step in enumerate(steps)]


def change_step(
    intervention: str | Intervention | ChangeAt, index: int, steps: list[LatentStep], prompts: list[int]
) -> Tensor:
    """The latents of one of the steps, changed."""
    step = steps[index]
    if isinstance(intervention, ChangeAt):
        change = intervention.change
        return intervention.apply(step.latents, step, lambda: change_step(change, index, steps, prompts))
    if intervention == "swap":
        donor = find_donor(index, steps, prompts)
        return resize_latents(donor.latents, donor.grid, step.grid)
    change = INTERVENTIONS[intervention] if isinstance(intervention, str) else intervention
    return change(step.latents, step)


def find_donor(index: int, steps: list[LatentStep], prompts: list[int]) -> LatentStep:
    """The next step, in turn, of another prompt."""
    for step, prompt in zip(steps[index + 1 :] + steps[:index], prompts[index + 1 :] + prompts[:index]):
        if prompt != prompts[index]:
            return step
    raise ValueError(
        f'`latent_intervention="swap"` needs two prompts that open a block at the same time, but that of row '
        f"{steps[index].row} opens one alone. Batch prompts with `min_latent_blocks=1`, or pass a callable that holds the "
        "other sample's latents."
    )


def checked(changed: Tensor, step: LatentStep) -> Tensor:
    if not isinstance(changed, Tensor) or changed.shape != step.latents.shape:
        got = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
        raise ValueError(
            f"`latent_intervention` must return latents of shape {tuple(step.latents.shape)} for block {step.index} of row "
            f"{step.row}, got {got}."
        )
    return changed.to(step.latents)
