"""What the latents of one `generate` or `forward` call were: one structure for all architectures.

A step is one latent block (DeepLatent) or one latent step (LaRe, Vedas). Fields that an architecture does not have stay
None. Tensors are detached and stay on the model's device; `LatentTrace.to("cpu")` moves them.

Shapes: N latents of a step, D hidden size, M image tokens of the row (all its images, in order), L decoder layers.
"""

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from .transformers_api import BothCacheNames


@dataclass
class LatentStep:
    """One block or step of one row."""

    row: int  # of the returned `sequences` (in `forward`: of `input_ids`)
    index: int  # number of the block or step in its row, from 0
    column: int  # of the token that opened it in `sequences` (steps without a token: the column they come before)
    grid: tuple[int, int]  # (height, width) of the latents; (1, N) where they form no grid
    latents: Tensor  # (N, D) as they entered the language model, after any intervention
    image_grids: list[tuple[int, int]]  # (height, width) of each image of the row, in merged patches
    image_attention: Tensor | None = None  # (N, M) or (1, M): where the latents looked; rows sum to one
    saliency: Tensor | None = None  # (M,) where the language model looked, summed over layers and heads (LaRe)
    picked_tokens: Tensor | None = None  # (K,) image tokens replayed (Vedas)
    windows: list[tuple[int, int, int, int, int]] | None = None  # (image, top, left, height, width)
    routed_tokens: dict[int, Tensor] | None = (
        None  # layer -> columns that ran deeper in the forward of the step (Vedas)
    )
    decode_step: int = 0  # which generated token opened it, from 0
    offset: int = 0  # of `latents` in the block, where they come to an intervention one at a time (autoregressive)

    def to(self, device: torch.device | str) -> "LatentStep":
        moved = {f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        if self.routed_tokens is not None:
            moved["routed_tokens"] = {layer: tokens.to(device) for layer, tokens in self.routed_tokens.items()}
        return replace(self, **moved)


@dataclass
class LatentTrace:
    """All steps of a call, ordered by row, then by index."""

    num_rows: int
    steps: list[LatentStep] = field(default_factory=list)

    def row(self, row: int) -> list[LatentStep]:
        return [step for step in self.steps if step.row == row]

    def to(self, device: torch.device | str) -> "LatentTrace":
        return LatentTrace(self.num_rows, [step.to(device) for step in self.steps])

    @property
    def latent_grid_hw(self) -> Tensor:
        """(blocks, 2), what `forward` and `generate` take to build the same blocks in `sequences` again."""
        return torch.tensor([step.grid for step in self.steps], dtype=torch.long).view(-1, 2)


@dataclass
class LatentGenerateOutput(BothCacheNames, GenerateDecoderOnlyOutput):
    """What `generate(..., return_dict_in_generate=True)` returns of a model with latent blocks, with an account of them.

    Args:
        num_latent_blocks (`torch.LongTensor` of shape `(batch_size,)`): blocks that each answer opened.
        num_latents (`torch.LongTensor` of shape `(batch_size,)`): latent positions in all of them.
        latent_grid_hw (`torch.LongTensor` of shape `(num_blocks, 2)`): grid of every block in `sequences`, by row; those of
            the prompt and of a continued cache included.
        latents_unused (`bool`): blocks could have been opened and none was.
        stop_reason (`list[str]`): per row `"eos"`, `"stop_string"`, `"stopping_criteria"` or `"max_length"`.
        latent_trace (`LatentTrace`, *optional*): with `output_latents=True`.
    """

    num_latent_blocks: torch.LongTensor | None = None
    num_latents: torch.LongTensor | None = None
    latent_grid_hw: torch.LongTensor | None = None
    latents_unused: bool | None = None
    stop_reason: list | None = None
    latent_trace: LatentTrace | None = None


@dataclass
class LatentGenerateBeamOutput(BothCacheNames, GenerateBeamDecoderOnlyOutput):
    """[`LatentGenerateOutput`] for beam search."""

    num_latent_blocks: torch.LongTensor | None = None
    num_latents: torch.LongTensor | None = None
    latent_grid_hw: torch.LongTensor | None = None
    latents_unused: bool | None = None
    stop_reason: list | None = None
    latent_trace: LatentTrace | None = None


class OldStepNames:
    """The names of 0.1, which called a step a block: attributes and items, for one release."""

    latent_grid_hw = None  # steps have no grid

    @property
    def num_latent_blocks(self) -> torch.LongTensor:
        return self.num_latent_steps

    def __getitem__(self, key):
        return super().__getitem__("num_latent_steps" if key == "num_latent_blocks" else key)

    def __contains__(self, key) -> bool:
        return super().__contains__("num_latent_steps" if key == "num_latent_blocks" else key)


@dataclass
class LatentStepsGenerateOutput(OldStepNames, BothCacheNames, GenerateDecoderOnlyOutput):
    """What `generate(..., return_dict_in_generate=True)` returns of a model that takes latent steps before its answer.

    Args:
        num_latent_steps (`torch.LongTensor` of shape `(batch_size,)`): steps that were taken before each answer.
        num_latents (`torch.LongTensor` of shape `(batch_size,)`): latent positions in all of them.
        latents_unused (`bool`): always False: the steps are taken before every answer.
        stop_reason (`list[str]`): per row `"eos"`, `"stop_string"`, `"stopping_criteria"` or `"max_length"`.
        latent_trace (`LatentTrace`, *optional*): with `output_latents=True`.
    """

    num_latent_steps: torch.LongTensor | None = None
    num_latents: torch.LongTensor | None = None
    latents_unused: bool | None = None
    stop_reason: list | None = None
    latent_trace: LatentTrace | None = None


@dataclass
class LatentStepsGenerateBeamOutput(OldStepNames, BothCacheNames, GenerateBeamDecoderOnlyOutput):
    """[`LatentStepsGenerateOutput`] for beam search."""

    num_latent_steps: torch.LongTensor | None = None
    num_latents: torch.LongTensor | None = None
    latents_unused: bool | None = None
    stop_reason: list | None = None
    latent_trace: LatentTrace | None = None


def follow_rows(steps: list[LatentStep], num_rows: int, beam_indices: Tensor | None) -> list[LatentStep]:
    """Give the steps of a decoding loop to the rows of its returned sequences.

    A step is recorded under the row it was computed in. Without beams that is the row of the answer. In beam search the
    row that consumed generated token t is the one that predicted token t + 1: `beam_indices[answer, t + 1]`.
    """
    if beam_indices is None:
        followed = list(steps)
    else:
        by_place = {(step.decode_step, step.row): step for step in steps}
        followed = []
        for answer, rows in enumerate(beam_indices.tolist()):
            found = [by_place.get((decoded, row)) for decoded, row in enumerate(rows[1:])]
            prompt = [step for step in steps if step.decode_step < 0 and rows and step.row == rows[0]]
            chosen = prompt + [step for step in found if step is not None]
            followed += [replace(step, row=answer, index=index) for index, step in enumerate(chosen)]
    followed = [step for step in followed if step.row < num_rows]
    return sorted(followed, key=lambda step: (step.row, step.index))


def follow_prompt_rows(steps: list[LatentStep], num_rows: int, beam_indices: Tensor | None) -> list[LatentStep]:
    """Give the steps taken behind the prompts to the rows of the returned sequences: a beam has those of its prompt."""
    computed = 1 + max((step.row for step in steps), default=0)
    followed = []
    for answer in range(num_rows):
        source = int(beam_indices[answer, 0]) if beam_indices is not None else answer * computed // num_rows
        followed += [replace(step, row=answer) for step in steps if step.row == source]
    return sorted(followed, key=lambda step: (step.row, step.index))
