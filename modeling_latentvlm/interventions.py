"""Replace latents before they enter the language model, to see whether they carry anything.

`generate(..., latent_intervention=X)` and `forward(..., latent_intervention=X)` take a name or a callable:

    "zero"     zeros
    "noise"    Gaussian noise of each latent's own norm
    "mean"     every latent becomes the mean of its block
    "shuffle"  the latents of a block change places
    "swap"     a row gets the latents of the next row, of another prompt, that opens a block at the same time, resized
    callable   `f(latents, step) -> latents`, (N, D) in and out; `step` is the `LatentStep` before the change. Autoregressive
               latents come one at a time: `step.offset` says which of its block

The changed latents are what the cache, the trace and the rest of the answer see.

"noise" and "shuffle" draw from PyTorch's global generator, so what a row gets depends on its batch. `draw_by_row("noise", seeds)`
is the same change as a callable that draws from one seed for each row:

    model.generate(**inputs, latent_intervention=draw_by_row("noise", seeds=[11, 12, 13]))
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_latentvlm.trace import LatentStep


Intervention = Callable[[Tensor, LatentStep], Tensor]


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


def check_intervention(intervention: str | Intervention | None, one_at_a_time: bool) -> None:
    """Raise unless `intervention` is one that can act.

    Args:
        one_at_a_time: whether latents come one by one (autoregressive), so that a block is never seen whole.
    """
    if intervention is None or callable(intervention):
        return
    if not isinstance(intervention, str) or intervention not in INTERVENTIONS:
        raise ValueError(
            f"`latent_intervention` must be a callable or one of {sorted(INTERVENTIONS)}, got {intervention!r}."
        )
    if one_at_a_time and intervention in NEEDS_A_WHOLE_BLOCK:
        raise ValueError(
            f"`latent_intervention={intervention!r}` needs a whole block at once, but autoregressive latents come one by one."
        )


def intervene(intervention: str | Intervention | None, steps: list[LatentStep], prompts: list[int]) -> list[Tensor]:
    """Return the latents of all blocks opened together, changed. `prompts` says which rows share one: beams do."""
    if intervention is None:
        return [step.latents for step in steps]
    if intervention == "swap":
        return [
            resize_latents(donor.latents, donor.grid, step.grid)
            for step, donor in zip(steps, (find_donor(index, steps, prompts) for index in range(len(steps))))
        ]
    change = INTERVENTIONS[intervention] if isinstance(intervention, str) else intervention
    return [checked(change(step.latents, step), step) for step in steps]


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
