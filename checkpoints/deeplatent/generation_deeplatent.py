"""`generate` of DeepLatent: that of every model with blocks, and what the modulation of its latents may be told."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from .decoding_deeplatent import DeepLatentContext
from .interventions import Intervention
from .trace import LatentGenerateBeamOutput, LatentGenerateOutput


class DeepLatentGenerationMixin:
    """Lies before `LatentBlocksMixin`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config=None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        latents: str | None = None,
        min_latent_blocks: int | None = None,
        max_latent_blocks: int | None = None,
        latent_grid: tuple[int, int] | None = None,
        latent_grid_hw: Tensor | None = None,
        latent_intervention: str | Intervention | None = None,
        latent_noise: bool = False,
        latent_modulator: Callable | None = None,
        output_latents: bool = False,
        **kwargs,
    ) -> LatentGenerateOutput | LatentGenerateBeamOutput | torch.LongTensor:
        """Generate text with latent blocks. Takes everything that `BlockGenerationMixin.generate` takes, and:

        Args:
            latent_noise: draw the stochastic term of the modulation.
            latent_modulator: takes the place of the modulation, and may record it (rollouts of reinforcement learning):
                `f(row, number of the block in the row, kind, base, gamma, beta, log_sigma)`, see `latent_former_deeplatent.py`.

        Raises:
            ValueError: a decoding mode that cannot work with latents, or inputs that do not fit together.
        """
        self._check_modulation(latent_noise, latent_modulator)
        context = DeepLatentContext(images=[], noise=latent_noise, modulator=latent_modulator)
        wishes = {
            "latents": latents,
            "latent_grid": latent_grid,
            "latent_grid_hw": latent_grid_hw,
            "output_latents": output_latents,
        }
        wishes |= {"low": min_latent_blocks, "high": max_latent_blocks, "intervention": latent_intervention}
        arguments = (inputs, generation_config, logits_processor, stopping_criteria)
        return self._generate_with_blocks(context, wishes, *arguments, **kwargs)

    def _check_modulation(self, noise: bool, modulator: Callable | None) -> None:
        """Raise for what would change the modulation of a model that has none."""
        if not isinstance(noise, bool | None):
            raise ValueError(f"`latent_noise` must be True or False, got {noise!r}.")
        given = ["latent_noise"] * bool(noise) + ["latent_modulator"] * (modulator is not None)
        is_autoregressive = self.config.latent_mode == "autoregressive"
        if given and (is_autoregressive or not (self.config.modulate_queries or self.config.modulate_images)):
            reason = "autoregressive latents are hidden states" if is_autoregressive else "both kinds are switched off"
            raise ValueError(f"{given} would do nothing: there is no modulation, since {reason}.")
