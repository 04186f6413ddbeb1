"""The curriculum of Vedas: in stage k the first k reasoning steps become k latent steps.

Stage 0 is plain chain of thought, the last stage thinks in latents alone. Rationales that are longer than the model has
latent steps are merged evenly into as many, shorter ones are used up earlier: stage k is k latents for every sample.
"""

import torch
from transformers import TrainerCallback

from train.data import TrajectoryCollator
from train.reasoning_data import ReasoningSample


def merge_steps(steps: list[str], count: int) -> list[str]:
    """Merge neighbours evenly until there are at most `count` steps."""
    if len(steps) <= count:
        return steps
    bounds = [number * len(steps) // count for number in range(count + 1)]
    return [" ".join(steps[start:end]) for start, end in zip(bounds, bounds[1:])]


def answer_text(answer: str) -> str:
    return f"The answer is \\boxed{{{answer}}}."


class CurriculumCollator:
    """Samples to batches at the current stage.

    Args:
        processor: of the model that is trained.
        rationale_steps: how many steps a longer rationale is merged into.
        keep_images: hand the images on as `original_images`, for the crop branch.
    """

    def __init__(self, processor, rationale_steps: int, keep_images: bool = True):
        self.collate = TrajectoryCollator(processor, "drop")
        self.rationale_steps, self.keep_images = rationale_steps, keep_images
        # Shared, so that worker processes that live through several epochs follow it.
        self._stage = torch.zeros((), dtype=torch.long).share_memory_()

    @property
    def stage(self) -> int:
        return int(self._stage)

    @stage.setter
    def stage(self, stage: int) -> None:
        self._stage.fill_(stage)

    def __call__(self, samples: list[ReasoningSample]) -> dict:
        images = [sample.load_images() for sample in samples]
        batch = self.collate([self.conversation(sample, image) for sample, image in zip(samples, images)])
        if self.keep_images:
            batch["original_images"] = images
        if self.stage == 0:
            batch["num_latent_steps"] = 0  # without slots the model would take its own number of steps
        return batch

    def conversation(self, sample: ReasoningSample, images: list) -> dict:
        steps = merge_steps(sample.steps, self.rationale_steps)[self.stage :]
        text = "\n".join([*steps, answer_text(sample.answer)])
        question = [
            *({"type": "image", "image": image} for image in images),
            {"type": "text", "text": sample.question},
        ]
        answer = [{"type": "latent", "steps": self.stage}, {"type": "text", "text": text}]
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


class Curriculum(TrainerCallback):
    """Sets the collator's stage at every epoch; a resumed run finds its stage by its epoch.

    Args:
        stages: the stages in their order.
        epochs_per_stage: after the last of them, the last stage goes on.
    """

    def __init__(self, collator: CurriculumCollator, stages: list[int], epochs_per_stage: int):
        self.collator, self.stages, self.epochs_per_stage = collator, stages, epochs_per_stage

    def stage_of(self, epoch: float) -> int:
        return self.stages[min(int(epoch) // self.epochs_per_stage, len(self.stages) - 1)]

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.stage = self.stage_of(state.epoch or 0)

    def log_terms(self) -> dict[str, float]:
        return {"stage": self.collator.stage}
