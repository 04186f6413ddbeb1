"""Ask a batch of questions in one of the arms of a comparison, and account for every answer.

    latents="off"             the matched arm: the same weights without latent blocks or steps
    latent_intervention=X     latents are replaced before they enter the language model (`interventions.py`). "swap" is done
                              here (`swapping.py`): it needs no blocks that open at the same time, and keeps norms. An answer
                              with nobody in its batch to swap with keeps its latents and says so: `not_swapped`
    direct=True               no reasoning in words: the answer begins with `ANSWER_PREFIX`, behind the latents that come first
                              anyway (DeepLatent: those of min_latent_blocks), and ends where the box does

A model that was trained to answer directly needs no `direct`: asked the same question, it answers as it was taught.

Answers are greedy unless `generate` gives a setting of sampling: `temperature=0.5 top_p=0.5 top_k=5` is the papers' decoding.
Then `repeats` asks every question several times. What is drawn follows from the seed, the repeat and the batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from conversion.backbone import parse_overrides
from evaluation.final_answer import find_box
from modeling_latentvlm.interventions import INTERVENTIONS
from train.answers import encode_conversations
from train.config_overrides import fields_of
from train.evaluation.swapping import Swap, find_donors


ANSWER_PREFIX = "The answer is \\boxed{"
LATENT_STEPS = {"deeplatent": None, "lare": "num_refocus_steps", "vedas": "num_latent_steps"}  # 0: no latents
logger = logging.get_logger(__name__)
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
RANDOM_INTERVENTIONS = ("noise", "shuffle")
OURS = (
    "do_sample",  # follows from the settings of sampling
    "max_new_tokens",
    "num_return_sequences",  # one answer a question
    "latent_intervention",
    "return_dict_in_generate",
    "output_latents",
)


@dataclass
class AnswerSettings:
    """How the model is asked."""

    latents: str = field(default="on", metadata={"help": "on, or off: the same weights without latents."})
    latent_intervention: str | None = field(
        default=None, metadata={"help": f"Replace the latents: one of {sorted(INTERVENTIONS)}."}
    )
    direct: bool = field(
        default=False, metadata={"help": f"The answer begins with {ANSWER_PREFIX!r}: no reasoning in words."}
    )
    batch_size: int = field(default=16, metadata={"help": "Questions asked at once."})
    max_new_tokens: int = field(default=256, metadata={"help": "Most tokens of an answer."})
    generate: list[str] = field(
        default_factory=list, metadata={"help": "More of `generate`: name=value, such as min_latent_blocks=1."}
    )
    set: list[str] = field(
        default_factory=list, metadata={"help": "Config fields: name=value, such as num_refocus_steps=8."}
    )
    seed: int = field(default=0, metadata={"help": "Of what is drawn, sampled words and noise, batch by batch."})
    repeats: int = field(default=1, metadata={"help": "How often every question is asked, where answers are drawn."})

    def __post_init__(self):
        if self.latents not in ("on", "off"):
            raise ValueError(f"`latents` must be on or off, got {self.latents!r}.")
        if self.latent_intervention is not None and self.latent_intervention not in INTERVENTIONS:
            raise ValueError(
                f"`latent_intervention` must be one of {sorted(INTERVENTIONS)}, got {self.latent_intervention!r}."
            )
        if self.latents == "off" and self.latent_intervention is not None:
            raise ValueError(
                f"`latents=off` leaves none to change, but `latent_intervention` is {self.latent_intervention!r}."
            )
        for name in ("batch_size", "max_new_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1, got {getattr(self, name)}.")
        if self.latent_intervention == "swap" and self.batch_size < 2:
            raise ValueError("`latent_intervention=swap` needs a `batch_size` of 2 or more, got 1.")
        taken = [name for name in parse_overrides(self.generate) if name in OURS]
        if taken:
            raise ValueError(
                f"`generate` cannot give {taken}: the evaluation sets them, or has options for them (a `temperature` samples)."
            )
        is_drawn = is_sampled(parse_overrides(self.generate)) or self.latent_intervention in RANDOM_INTERVENTIONS
        if self.repeats > 1 and not is_drawn:
            raise ValueError(
                f"`repeats` is {self.repeats}, but greedy answers are all the same: `generate` must give a `temperature`."
            )

    def to_dict(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}


def is_sampled(generate: dict[str, Any]) -> bool:
    """Whether arguments of `generate` ask for sampling: they give one of its settings, and no temperature of 0.

    Raises:
        ValueError: a setting is no number, or has no meaning because of a temperature of 0.
    """
    given = {name: generate[name] for name in SAMPLING if generate.get(name) is not None}
    wrong = {n: v for n, v in given.items() if isinstance(v, bool) or not isinstance(v, int | float) or not v >= 0}
    if wrong:
        raise ValueError(f"`generate` must give numbers >= 0 for sampling, got {wrong}.")
    if given.get("temperature") == 0:
        others = sorted(given.keys() - {"temperature"})
        if others:
            raise ValueError(f"`generate` gives {others}, which mean nothing at temperature=0: that is greedy.")
        return False
    return bool(given)


def decoding_of(settings: AnswerSettings, generate: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `generate` that say how words are chosen; `generate` is stronger than the settings."""
    wanted = parse_overrides(settings.generate) | generate
    wanted = {"do_sample": is_sampled(wanted), "max_new_tokens": settings.max_new_tokens} | wanted
    if wanted.get("temperature") == 0:
        del wanted["temperature"]  # transformers takes none below 0; greedy needs none
    return wanted


@dataclass
class Answer:
    """What was written, and at what cost."""

    text: str
    num_tokens: int  # without latents and the end token
    num_latent_blocks: int
    num_latents: int
    stop_reason: str
    not_swapped: bool = False  # under "swap": no other row of the batch has another picture and takes latents


class AnswerPrefix(LogitsProcessor):
    """Makes every row write `prefix` first, behind the latent blocks it opens at once."""

    def __init__(self, prefix: list[int], prompt_length: int, latent_start_token_id: int):
        self.prefix, self.prompt_length, self.latent = prefix, prompt_length, latent_start_token_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        written = (input_ids[:, self.prompt_length :] != self.latent).sum(dim=1).tolist()
        for row, count in enumerate(written):
            if count < len(self.prefix):
                scores[row] = -float("inf")
                scores[row, self.prefix[count]] = 0
        return scores


class BoxClosed(StoppingCriteria):
    """Ends a row whose box is closed: a model that was taught to reason would go on, and give further answers."""

    def __init__(self, processor, prompt_length: int):
        self.processor, self.prompt_length = processor, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        texts = self.processor.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        return torch.tensor([find_box(text) is not None for text in texts], device=input_ids.device)


def check_settings(model, settings: AnswerSettings) -> None:
    """Raise where a model cannot be asked so.

    Raises:
        ValueError: the settings do not fit the model.
        StrictDataclassError: the config does not take a value of `set`.
    """
    if model.config.model_type not in LATENT_STEPS and (
        settings.latents == "off" or settings.latent_intervention is not None
    ):
        raise ValueError(
            f"`latents=off` and `latent_intervention` need a model with latents, one of {sorted(LATENT_STEPS)}; this is "
            f"{model.config.model_type!r}."
        )
    if settings.latents == "off":
        given = parse_overrides(settings.set) | parse_overrides(settings.generate)
        steps = LATENT_STEPS[model.config.model_type] or "max_latent_blocks"
        if given.get(steps, 0) != 0:
            raise ValueError(f"`latents=off` takes no latents, but `{steps}` is set to {given[steps]}.")
    with changed_config(model, settings):
        model.config.validate()  # a field that is set alone is held to its type, not to the other fields


@contextmanager
def changed_config(model, settings: AnswerSettings) -> Iterator[None]:
    """The config as the arm wants it; afterwards it is as before.

    Raises:
        ValueError: `set` names what is no field.
    """
    wanted = fields_of(model.config, settings.set, "set")
    steps = LATENT_STEPS.get(model.config.model_type)
    if settings.latents == "off" and steps is not None:
        wanted[steps] = 0
    before = {name: getattr(model.config, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(model.config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)


@torch.no_grad()
def answer_batch(
    model,
    processor,
    conversations: Sequence[list[dict]],
    settings: AnswerSettings | None = None,
    seed: int = 0,
    names: Sequence[str] | None = None,
    **generate,
) -> list[Answer]:
    """Answer conversations; greedily, and each as it would be alone up to rounding, unless the settings sample.

    Args:
        seed: of what the batch draws.
        names: of the conversations, for messages.
        generate: more arguments of the model's `generate`.

    Raises:
        ValueError: the model cannot be asked so.
    """
    settings = settings or AnswerSettings()
    check_settings(model, settings)
    inputs = encode_conversations(processor, conversations).to(model.device)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    length, kind = inputs["input_ids"].shape[1], model.config.model_type
    wanted = decoding_of(settings, generate)
    if settings.latents == "off" and kind == "deeplatent":
        wanted["max_latent_blocks"] = 0
    if settings.direct:
        prefix = processor.tokenizer(ANSWER_PREFIX, add_special_tokens=False)["input_ids"]
        start = getattr(model.config, "latent_start_token_id", -1)  # no token
        wanted["logits_processor"] = LogitsProcessorList([AnswerPrefix(prefix, length, start)])
        wanted["stopping_criteria"] = StoppingCriteriaList([BoxClosed(processor, length)])
        wanted["max_new_tokens"] += len(prefix)
    with changed_config(model, settings):
        if settings.latent_intervention == "swap":
            wanted["latent_intervention"] = find_swap(model, inputs, wanted, conversations, seed)
        elif settings.latent_intervention is not None:
            wanted["latent_intervention"] = settings.latent_intervention
        torch.manual_seed(seed)
        output = model.generate(**inputs, **wanted, return_dict_in_generate=True)
    answers = account(model, processor, output, length, settings.direct)
    if settings.latent_intervention == "swap":
        note_kept(answers, wanted["latent_intervention"], names)
    return answers


def find_swap(model, inputs, wanted: dict, conversations, seed: int) -> Swap:
    """Ask once without a change for the latents that the rows are going to exchange.

    Raises:
        ValueError: beams, of which the first pass keeps one a row.
    """
    beams = wanted.get("num_beams") or model.generation_config.num_beams or 1
    if beams > 1:
        raise ValueError(f"`latent_intervention=swap` is done without beams, but `num_beams` is {beams}.")
    torch.manual_seed(seed)
    trace = model.generate(**inputs, **wanted, return_dict_in_generate=True, output_latents=True).latent_trace
    return Swap(trace, find_donors(trace, conversations), getattr(model.config, "latent_mode", None))


def note_kept(answers: list[Answer], swap: Swap, names: Sequence[str] | None) -> None:
    """Mark the answers that kept their own latents, and warn of them by name."""
    for row in sorted(swap.kept):
        answers[row].not_swapped = True
        logger.warning(
            f"{names[row] if names else f'Row {row} of the batch'}: not swapped, it keeps its own latents: no other row of "
            "its batch has another picture and takes latents. A larger `batch_size`, or `generate` with "
            "min_latent_blocks=1, may help."
        )


def account(model, processor, output, prompt_length: int, is_direct: bool) -> list[Answer]:
    """Texts and counts of what `generate` returned."""
    written = output.sequences[:, prompt_length:].cpu()
    texts = processor.batch_decode(written, skip_special_tokens=True)
    settings = model.generation_config
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    start = getattr(model.config, "latent_start_token_id", None)
    blocks, latents = getattr(output, "num_latent_blocks", None), getattr(output, "num_latents", None)
    reasons = getattr(output, "stop_reason", None)
    answers = []
    for row, (tokens, text) in enumerate(zip(written.tolist(), texts)):
        end = next((at for at, token in enumerate(tokens) if token in ends), None)
        kept = [token for token in tokens[:end] if token != start]
        if end is None and settings.pad_token_id is not None:
            while kept and kept[-1] == settings.pad_token_id:
                kept.pop()
        reason = reasons[row] if reasons is not None else "max_length" if end is None else "eos"
        if is_direct and find_box(text) is not None:
            reason = "stopping_criteria"  # the padding behind it may be the end token
        answers.append(
            Answer(
                text=text.strip(),
                num_tokens=len(kept),
                num_latent_blocks=0 if blocks is None else int(blocks[row]),
                num_latents=0 if latents is None else int(latents[row]),
                stop_reason=reason,
            )
        )
    return answers
