"""The curriculum of Vedas: in stage k the first k reasoning steps become k latent steps.

Stage 0 is plain chain of thought, the last stage thinks in latents alone. Rationales that are longer than the model has
latent steps are merged evenly into as many, shorter ones are used up earlier: stage k is k latents for every sample. A model
that has its answer before the last of them learns to hold it. `train/common/stages.py` says when stages end.
"""

import torch

from train.common.chat_collator import TrajectoryCollator
from train.common.feature_cache import FeatureCache
from train.common.stages import answer_text
from train.data.reasoning_data import ReasoningSample, merge_steps


class CurriculumCollator:
    """Samples to batches at the current stage.

    Args:
        processor: of the model that is trained.
        rationale_steps: how many steps a longer rationale is merged into.
        keep_images: hand the images on as `original_images`, for the crop branch.
        latents_per_step: latent steps in place of a reasoning step; with 0 nothing stands in its place.
        features: of all images, which are then not decoded.
    """

    def __init__(
        self,
        processor,
        rationale_steps: int,
        keep_images: bool = True,
        latents_per_step: int = 1,
        features: FeatureCache | None = None,
    ):
        self.collate = TrajectoryCollator(processor if features is None else features.processor(processor), "drop")
        self.rationale_steps, self.keep_images = rationale_steps, keep_images
        self.latents_per_step, self.features = latents_per_step, features
        # Shared, so that worker processes that live through several epochs follow it.
        self._stage = torch.zeros((), dtype=torch.long).share_memory_()

    @property
    def stage(self) -> int:
        return int(self._stage)

    @stage.setter
    def stage(self, stage: int) -> None:
        self._stage.fill_(stage)

    @property
    def num_latents(self) -> int:
        """Latent steps before the answer of every sample, however short its rationale is."""
        return self.latents_per_step * self.stage

    def __call__(self, samples: list[ReasoningSample]) -> dict:
        is_decoded = self.features is None or self.keep_images
        images = [sample.load_images() if is_decoded else sample.images for sample in samples]
        shown = images if self.features is None else [sample.images for sample in samples]
        batch = self.collate([self.conversation(sample, image) for sample, image in zip(samples, shown)])
        if self.keep_images:
            batch["original_images"] = images
        if self.num_latents == 0:
            batch["num_latent_steps"] = 0  # without slots the model would take its own number of steps
        return batch

    def conversation(self, sample: ReasoningSample, images: list) -> dict:
        steps = merge_steps(sample.steps, self.rationale_steps)[self.stage :]
        text = "\n".join([*steps, answer_text(sample.answer)])
        question = [
            *({"type": "image", "image": image} for image in images),
            {"type": "text", "text": sample.question},
        ]
        answer = [{"type": "latent", "steps": self.num_latents}, {"type": "text", "text": text}]
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
