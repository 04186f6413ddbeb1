"""Ask a batch of questions in one of the arms of a comparison, and account for every answer.

    latents="off"             the matched arm: the same weights without latent blocks or steps
    latent_intervention=X     latents are replaced before they enter the language model (`interventions.py`). "swap" is done
                              here (`swapping.py`): donors come from the whole data (`donors`), and norms are kept. A row
                              without a donor keeps its latents and says so: `not_swapped`. "noise" and "shuffle" are drawn for
                              each row by itself. With `repeats` other donors, or other noise, are drawn each time. "swap:2"
                              changes block or step 2 alone, counted from 0, "noise:1.3" latent 3 of block 1; an answer that took
                              no such latent keeps its own and says so: `not_reached`
    direct=True               no reasoning in words: the answer begins with `ANSWER_PREFIX`, behind the latents that come first
                              anyway (DeepLatent: those of min_latent_blocks), and ends where the box does

A model that was trained to answer directly needs no `direct`: asked the same question, it answers as it was taught.

Answers are greedy unless `generate` gives a setting of sampling: `temperature=0.5 top_p=0.5 top_k=5` is the papers' decoding.
Then `repeats` asks every question several times. Sampled words follow from the seed, the repeat and the batch; donors and noise
from the seed, the repeat and the row alone, so that batch size and order of the data do not matter.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from configuration_latentvlm import ARCHITECTURES
from configuration_latentvlm.latent_architecture import changed_fields, has_latents
from conversion.backbone import parse_overrides
from conversion.config_overrides import fields_of
from evaluation.answers import conversation_of, encode_conversations
from evaluation.donors import KINDS, draw_seed
from evaluation.final_answer import find_box
from evaluation.swapping import Swap, steps_of
from modeling_latentvlm.interventions import DRAWN, INTERVENTIONS, ChangeAt, draw_by_row, parse_intervention
from modeling_latentvlm.trace import LatentStep


ANSWER_PREFIX = "The answer is \\boxed{"
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
RANDOM_INTERVENTIONS = (*DRAWN, "swap")
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
        default=None,
        metadata={
            "help": f"Replace the latents: one of {sorted(INTERVENTIONS)}; of some blocks or steps alone (swap:2, zero:0,2, from 0 "
            "on) or of one latent in a block (noise:1.3)."
        },
    )
    donors: str = field(
        default="task",
        metadata={
            "help": f"Of a swap, one of {list(KINDS)}: another picture and answer of the same task, the same and of the same "
            "question, or another picture of another task."
        },
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
    seed: int = field(default=0, metadata={"help": "Of what is drawn: sampled words, donors, noise."})
    repeats: int = field(default=1, metadata={"help": "How often every question is asked, where answers are drawn."})

    def __post_init__(self):
        if self.latents not in ("on", "off"):
            raise ValueError(f"`latents` must be on or off, got {self.latents!r}.")
        if self.latent_intervention is not None:
            parse_intervention(self.latent_intervention)
        if self.latents == "off" and self.latent_intervention is not None:
            raise ValueError(
                f"`latents=off` leaves none to change, but `latent_intervention` is {self.latent_intervention!r}."
            )
        for name in ("batch_size", "max_new_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1, got {getattr(self, name)}.")
        if self.donors not in KINDS:
            raise ValueError(f"`donors` must be one of {list(KINDS)}, got {self.donors!r}.")
        if self.donors != "task" and self.intervention != "swap":
            raise ValueError(
                f"`donors` belong to `latent_intervention=swap`, but that is {self.latent_intervention!r} and `donors` is "
                f"{self.donors!r}."
            )
        taken = [name for name in parse_overrides(self.generate) if name in OURS]
        if taken:
            raise ValueError(
                f"`generate` cannot give {taken}: the evaluation sets them, or has options for them (a `temperature` samples)."
            )
        is_drawn = is_sampled(parse_overrides(self.generate)) or self.intervention in RANDOM_INTERVENTIONS
        if self.repeats > 1 and not is_drawn:
            raise ValueError(
                f"`repeats` is {self.repeats}, but greedy answers are all the same: `generate` must give a `temperature`, or "
                f"`latent_intervention` be one of {sorted(RANDOM_INTERVENTIONS)}."
            )

    @property
    def intervention(self) -> str | None:
        """The name of the intervention, without the places that it acts on."""
        return None if self.latent_intervention is None else parse_intervention(self.latent_intervention)[0]

    def to_dict(self) -> dict[str, Any]:
        """What the answers follow from. Where nothing is swapped or drawn it is what earlier versions wrote, whose runs go on."""
        settings = {one.name: getattr(self, one.name) for one in fields(self)}
        if self.intervention != "swap":
            del settings["donors"]
        if self.intervention in RANDOM_INTERVENTIONS:
            settings["draws"] = "by row"
        return settings


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
    not_swapped: bool = False  # under "swap": the data hold no donor for this row, which kept its own latents
    not_reached: bool = False  # the intervention names a latent that this answer did not take


class AnswerPrefix(LogitsProcessor):
    """Makes every row write `prefix` first, behind the latent blocks it opens at once."""

    def __init__(self, prefix: list[int], prompt_length: int, opening_token_id: int | None):
        self.prefix, self.prompt_length = prefix, prompt_length
        self.opening = -1 if opening_token_id is None else opening_token_id  # no token has the id -1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        written = (input_ids[:, self.prompt_length :] != self.opening).sum(dim=1).tolist()
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
    if not has_latents(model.config) and (settings.latents == "off" or settings.latent_intervention is not None):
        raise ValueError(
            f"`latents=off` and `latent_intervention` need a model with latents, one of {sorted(ARCHITECTURES)}; this is "
            f"{model.config.model_type!r}."
        )
    if settings.latents == "off":
        given = parse_overrides(settings.set) | parse_overrides(settings.generate)
        steps = model.config.latent_count_field
        if given.get(steps, 0) != 0:
            raise ValueError(f"`latents=off` takes no latents, but `{steps}` is set to {given[steps]}.")
    if settings.latent_intervention is not None:
        check_places(model, settings)
    with changed_config(model, settings):
        model.config.validate()  # a field that is set alone is held to its type, not to the other fields


def check_places(model, settings: AnswerSettings) -> None:
    """Raise where an intervention names a block or step that no answer can take.

    Raises:
        ValueError: it is not among those that the settings allow.
    """
    places = parse_intervention(settings.latent_intervention)[1]
    name = model.config.latent_count_field
    given = parse_overrides(settings.set) | parse_overrides(settings.generate)
    most = given.get(name, model.config.latent_count)
    beyond = [step for step, _ in places if isinstance(most, int) and step >= most]
    if beyond:
        raise ValueError(
            f"`latent_intervention={settings.latent_intervention}` acts on block or step {beyond[0]}, counted from 0, but `{name}` "
            f"is {most}."
        )


def changed_config(model, settings: AnswerSettings) -> AbstractContextManager[None]:
    """The config as the arm wants it; afterwards it is as before.

    Raises:
        ValueError: `set` names what is no field.
    """
    wanted = fields_of(model.config, settings.set, "set")
    if settings.latents == "off":
        wanted = model.config.limit_latents(0)[0] | wanted  # what is set too is still checked
    return changed_fields(model.config, **wanted)


@torch.no_grad()
def answer_batch(
    model,
    processor,
    conversations: Sequence[list[dict]],
    settings: AnswerSettings | None = None,
    seed: int = 0,
    names: Sequence[str] | None = None,
    lent: Sequence[list[LatentStep] | None] | None = None,
    **generate,
) -> list[Answer]:
    """Answer conversations; greedily, and each as it would be alone up to rounding, unless the settings sample.

    Args:
        seed: of the words that the batch samples.
        names: what noise is drawn by; by default what each conversation shows and asks.
        lent: for `latent_intervention="swap"`, by conversation the latents that it gets (None: it keeps its own). Who lends to
            whom follows from the whole data: `evaluate_rows` finds the donors.
        generate: more arguments of the model's `generate`.

    Raises:
        ValueError: the model cannot be asked so.
    """
    settings = settings or AnswerSettings()
    check_settings(model, settings)
    inputs = encode_for(model, processor, conversations)
    length = inputs["input_ids"].shape[1]
    wanted = arguments_of(model, processor, settings, length, generate)
    change = make_change(model, settings, conversations, names, lent, wanted)
    if change is not None:
        wanted["latent_intervention"] = change
    with changed_config(model, settings):
        torch.manual_seed(seed)
        output = model.generate(**inputs, **wanted, return_dict_in_generate=True)
    answers = account(model, processor, output, length, settings.direct)
    if settings.intervention == "swap":
        for answer, steps in zip(answers, lent):
            answer.not_swapped = steps is None
    if isinstance(change, ChangeAt):
        beams = num_beams(model, wanted)
        for row, answer in enumerate(answers):
            answer.not_reached = not any(change.has_reached(row * beams + beam) for beam in range(beams))
    return answers


def make_change(model, settings: AnswerSettings, conversations, names, lent, wanted: dict):
    """The `latent_intervention` of a batch, None where latents stay. Arguments as in `answer_batch`.

    Raises:
        ValueError: a swap without latents to lend.
    """
    if settings.latent_intervention is None:
        return None
    name, places = parse_intervention(settings.latent_intervention)
    if name == "swap":
        if lent is None or len(lent) != len(conversations):
            raise ValueError(
                f"`latent_intervention=swap` needs `lent`, the latents of a donor for each of {len(conversations)} conversations, "
                f"got {None if lent is None else len(lent)}. `evaluate_rows` and `evaluation.evaluate` find donors in their data."
            )
        given = {row: steps for row, steps in enumerate(lent) if steps is not None}
        change = Swap(given, model.config.shows_latents_one_by_one)
    elif name in DRAWN:
        names = names if names is not None else [describe_conversation(one) for one in conversations]
        seeds = [draw_seed(settings.seed, one) for one in names for _ in range(num_beams(model, wanted))]
        change = draw_by_row(name, seeds)
    elif not places:
        return name
    else:
        change = INTERVENTIONS[name]
    return ChangeAt(change, places) if places else change


def encode_for(model, processor, conversations: Sequence[list[dict]]):
    """Model inputs of conversations, on the model's device and in its dtype."""
    inputs = encode_conversations(processor, conversations).to(model.device)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return inputs


def arguments_of(model, processor, settings: AnswerSettings, prompt_length: int, generate: dict) -> dict[str, Any]:
    """The arguments of `generate` that the settings ask for, but for the intervention.

    Raises:
        ValueError: a swap with beams, of which the donor's pass keeps one a row.
    """
    wanted = decoding_of(settings, generate)
    if settings.intervention == "swap" and num_beams(model, wanted) > 1:
        raise ValueError(
            f"`latent_intervention=swap` is done without beams, but `num_beams` is {num_beams(model, wanted)}."
        )
    if settings.latents == "off":
        wanted |= model.config.limit_latents(0)[1]
    if settings.direct:
        prefix = processor.tokenizer(ANSWER_PREFIX, add_special_tokens=False)["input_ids"]
        start = model.config.opening_token_id if has_latents(model.config) else None
        wanted["logits_processor"] = LogitsProcessorList([AnswerPrefix(prefix, prompt_length, start)])
        wanted["stopping_criteria"] = StoppingCriteriaList([BoxClosed(processor, prompt_length)])
        wanted["max_new_tokens"] += len(prefix)
    return wanted


def num_beams(model, wanted: dict) -> int:
    return wanted.get("num_beams") or model.generation_config.num_beams or 1


def describe_conversation(conversation: Sequence[dict]) -> str:
    """What a conversation shows and asks, as a text that names it."""
    parts = [part for message in conversation for part in message["content"]]
    images = (part["image"] for part in parts if part["type"] == "image")
    shown = [image if isinstance(image, str) else str(draw_seed(image.size, image.tobytes())) for image in images]
    return "|".join([*shown, *(part["text"] for part in parts if part["type"] == "text")])


@torch.no_grad()
def take_latents(model, processor, rows: Sequence, settings: AnswerSettings) -> list[list[LatentStep]]:
    """What latents rows take as the model is, asked greedily: by row their steps, on the CPU."""
    kept = [one for one in settings.generate if one.partition("=")[0].strip() not in SAMPLING]
    settings = replace(settings, latent_intervention=None, donors="task", repeats=1, generate=kept)
    inputs = encode_for(model, processor, [conversation_of(row) for row in rows])
    wanted = arguments_of(model, processor, settings, inputs["input_ids"].shape[1], {})
    with changed_config(model, settings):
        output = model.generate(**inputs, **wanted, return_dict_in_generate=True, output_latents=True)
    return [steps_of(output.latent_trace, row) for row in range(len(rows))]


def account(model, processor, output, prompt_length: int, is_direct: bool) -> list[Answer]:
    """Texts and counts of what `generate` returned."""
    written = output.sequences[:, prompt_length:].cpu()
    texts = processor.batch_decode(written, skip_special_tokens=True)
    settings = model.generation_config
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    start = model.config.opening_token_id if has_latents(model.config) else None
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
