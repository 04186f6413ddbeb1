"""`generate` for models that take latent steps between the prompt and the answer: one frame for all of them.

The steps themselves are taken in `forward`, when the decoding loop of transformers hands it the prompt. A subclass brings three
hooks: `_prepare_steps`, `_reserved_tokens` and `_count_steps_taken`.

Shapes: B rows, S columns of the prompt.
"""

import torch
from torch import Tensor
from transformers.generation import LogitsProcessorList

from .transformers_api import take_cache
from .decoding_common import DecodingContext
from .generation_checks import NeverWritten, check_settings, infer_attention_mask, stop_reasons
from .generation_common import LatentGenerationMixin
from .interventions import Intervention, prepare_intervention
from .latent_counts import are_off, check_latent_arguments, with_steps
from .trace import (
    LatentStepsGenerateBeamOutput,
    LatentStepsGenerateOutput,
    LatentTrace,
    follow_prompt_rows,
)


class StepGenerationMixin(LatentGenerationMixin):
    """For a class that brings `forward(..., latent_context=...)` and lies before `GenerationMixin`."""

    step_name = "Latent steps"  # for messages, at the start of a sentence
    _is_one_at_a_time = False  # whether a step is a single latent, so that an intervention never sees several at once

    def _prepare_steps(self, input_ids: Tensor, config, settings, kwargs: dict) -> DecodingContext:
        """Check the prompt, encode its images and say what is to be done. Takes the vision inputs out of `kwargs`.

        Args:
            input_ids: (B, S) of the prompt, also where it is given as embeddings.
            config: the model's, with the number of steps that this call takes.
            kwargs: of `generate`; `attention_mask` is in it, None where nothing is masked.
        """
        raise NotImplementedError

    def _reserved_tokens(self, config) -> list[int]:
        """Tokens that an answer never holds. `config` is that of the call."""
        raise NotImplementedError

    def _count_steps_taken(
        self, context: DecodingContext, num_rows: int, beam_indices: Tensor | None
    ) -> tuple[Tensor, int]:
        """(num_rows,) the steps before every answer, and the latents of one step."""
        raise NotImplementedError

    def _take_loss(self, logits: Tensor, labels: Tensor | None, input_ids: Tensor, kwargs: dict) -> Tensor | None:
        """The next-token loss of `labels`, of which tokens that stand for latents are no part; None without labels."""
        if labels is None:
            return None
        return self.loss_function(
            logits=logits,
            labels=labels.masked_fill(self.never_labels(input_ids), -100),
            vocab_size=self.config.get_text_config().vocab_size,
            **kwargs,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config=None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria=None,
        *,
        latents: str | None = None,
        latent_intervention: str | Intervention | None = None,
        output_latents: bool = False,
        **kwargs,
    ) -> LatentStepsGenerateOutput | LatentStepsGenerateBeamOutput | torch.LongTensor:
        """Take the latent steps and generate an answer. Takes everything that `GenerationMixin.generate` takes, and:

        Args:
            latents: "off" takes no steps; "on", the default, takes as many as the counts say.
            num_..._steps: steps of this call, by the name of the config's field (`config.latent_count_field`), which they take
                the place of. Every row then takes exactly so many.
            latent_intervention: replaces latents before they enter the language model (`interventions.py`).
            output_latents: return a `latent_trace`; needs `return_dict_in_generate=True`.

        Raises:
            ValueError: a decoding mode that cannot work with latents, or inputs that do not fit together.
        """
        # What can work at all.
        cache = take_cache(kwargs)
        settings, _ = self._prepare_generation_config(generation_config, **kwargs)
        check_settings(settings, kwargs, output_latents, self.device)
        config = self._config_of_call(latents, settings, kwargs)
        intervention = prepare_intervention(latent_intervention, self._is_one_at_a_time)
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        input_ids = self._check_prompt(input_ids, kwargs)
        prompt_ids = self._find_ids(input_ids, kwargs.get("inputs_embeds"))
        if cache is not None or settings.cache_implementation is not None:
            raise ValueError(
                f"{self.step_name} start on a cache of their own: give neither `past_key_values` nor `cache_implementation`."
            )
        if kwargs.get("position_ids") is not None:
            raise ValueError("`position_ids` cannot be given to `generate`: latents take positions of their own.")
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = infer_attention_mask(prompt_ids, settings)
        # What this call wants of its latents.
        context = self._prepare_steps(prompt_ids, config, settings, kwargs)
        context.config = config
        context.intervention, context.output_latents, context.finite = intervention, output_latents, []
        reserved = self._reserved_tokens(config)
        never = [NeverWritten(reserved)] if reserved else []
        # The decoding loop of transformers, whose first forward takes the steps.
        output = super().generate(
            input_ids,
            generation_config,
            LogitsProcessorList([*(logits_processor or []), *never]),
            stopping_criteria,
            latent_context=context,
            **kwargs,
        )
        if isinstance(output, Tensor):
            return output
        prompt_length = 0 if input_ids is None else input_ids.shape[1]
        return self._account_for_steps(output, context, prompt_length, settings, kwargs.get("tokenizer"))

    def _config_of_call(self, latents: str | None, settings, kwargs: dict):
        """The config with the number of steps that a call of `generate` takes; takes that number out of `kwargs`.

        Raises:
            ValueError: what says how many steps there are contradicts itself, or belongs to another architecture.
        """
        name = self.config.latent_count_field
        count = kwargs.pop(name, None)
        others = {key for key, value in (vars(settings) | kwargs).items() if value is not None}
        check_latent_arguments(others - set(self._only_of_forward), (name,), "step", self.config.model_type)
        latents = getattr(settings, "latents", None) if latents is None else latents
        if are_off(latents, **{name: count}):
            return with_steps(self.config, 0)
        return with_steps(self.config, getattr(settings, name, None) if count is None else count)

    def _account_for_steps(self, output, context: DecodingContext, prompt_length: int, settings, tokenizer):
        """Add latent counts, stop reasons and the trace to what the decoding loop returned."""
        rows, beams = output.sequences.shape[0], getattr(output, "beam_indices", None)
        steps, num_step_latents = self._count_steps_taken(context, rows, beams)
        kind = LatentStepsGenerateOutput if beams is None else LatentStepsGenerateBeamOutput
        trace = LatentTrace(rows, follow_prompt_rows(context.steps, rows, beams)) if context.output_latents else None
        return kind(
            **output,
            num_latent_steps=steps,
            num_latents=steps * num_step_latents,
            latents_unused=False,
            stop_reason=stop_reasons(output.sequences[:, prompt_length:], settings, tokenizer, prompt_length),
            latent_trace=trace,
        )
