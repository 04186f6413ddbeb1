"""Compare a model with its known answers, and say what differs.

The processor is compared by the tensors that it makes of the recorded picture and question, the model by what it makes
of the recorded tensors: so a changed processor and a changed model are told apart.
"""

import copy
import io
import json
import os
from dataclasses import dataclass, field

import torch
from PIL import Image

from .transformers_contract import is_untested
from .known_answers import (
    PIXEL_TOLERANCE,
    RESIZED_TOLERANCE,
    TOLERANCES,
    Answer,
    KnownAnswers,
    compute_answer,
    deviation,
    dtype_name,
    encode,
    find_changed_weight,
    lasting_fields,
    pad_left,
    versions_here,
)
from .lockstep import is_scattered


LARGEST_COPY = 1_000_000_000  # parameters of a model that is checked by a copy in float32
SWITCH = "LATENTVLM_CHECK"


@dataclass
class Row:
    """One line of a report."""

    what: str
    deviation: float  # over tolerance; above 1 it differs
    note: str = ""

    @property
    def differs(self) -> bool:
        return not self.deviation <= 1


@dataclass
class AnswerReport:
    """What `check_known_answers` found. `str` of it is the table."""

    where: str
    recorded: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not any(row.differs for row in self.rows)

    @property
    def worst(self) -> float:
        """The largest deviation over tolerance."""
        return max(row.deviation for row in self.rows)

    def __str__(self) -> str:
        here = versions_here()
        changed = [
            f"{name} {then} (here {here.get(name)})" for name, then in self.recorded.items() if here.get(name) != then
        ]
        lines = [
            f"Known answers of {self.where}: {'as recorded' if self.passed else 'NOT as recorded'}",
            f"Recorded with {', '.join(changed)}."
            if changed
            else "Recorded with the versions that are installed here.",
        ]
        width = max(len(row.what) for row in self.rows)
        lines.append(f"  {'':{width}}  deviation / tolerance")
        for row in self.rows:
            verdict = "DIFFERS" if row.differs else "ok"
            lines.append(
                f"  {row.what:{width}}  {row.deviation:>21.4g}  {verdict}{'  ' + row.note if row.note else ''}"
            )
        return "\n".join(lines + self.remarks)


def check_answers(model, processor, known: KnownAnswers, where: str) -> AnswerReport:
    """Recompute the answers and compare.

    Raises:
        ValueError: the answers are of another model, or the model is in a dtype that they were not recorded in.
    """
    check_origin(model, known, where)
    report = AnswerReport(where, known.versions)
    report.rows += compare_inputs(processor, known, where)
    tried, dtype = model, dtype_name(model)
    if dtype != "float32" and model.num_parameters() <= LARGEST_COPY and "float32" in known.answers:
        tried, dtype = copy.deepcopy(model).float(), "float32"
    expected = known.answers[dtype]
    actual = compute_answer(tried, known.inputs, expected, force_grids=dtype != "float32")
    report.rows += compare_answers(actual, expected, dtype)
    report.remarks += [
        f"Greedy tokens: {describe(processor, actual)}",
        f"     recorded: {describe(processor, expected)}",
    ]
    fields = changed_fields(model.config, known)
    if fields:
        report.remarks.append(f"The config is not the one that the answers were recorded with: {', '.join(fields)}.")
    if not report.passed and dtype_name(model) == known.dtype and known.weights:
        changed = find_changed_weight(known.weights, model.state_dict())
        if changed is not None:
            report.remarks.append(f"The weights are not those that the answers were recorded from: {changed} differs.")
    return report


def changed_fields(config, known: KnownAnswers) -> list[str]:
    """Fields of the config that answers follow from and that have other values than when they were recorded.

    A field that only one version of transformers has says nothing.
    """
    here = json.loads(json.dumps(lasting_fields(config), default=str))
    then = known.config
    return sorted(name for name in here.keys() & then.keys() if differs(here[name], then[name]))


def differs(one, other) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return any(differs(one[name], other[name]) for name in one.keys() & other.keys())
    return one != other


def check_origin(model, known: KnownAnswers, where: str) -> None:
    """Raise unless the answers can be this model's."""
    if known.model_type != model.config.model_type:
        raise ValueError(
            f"The known answers in {where} are of a model of type {known.model_type!r}, but this one is of type "
            f"{model.config.model_type!r}."
        )
    answer = next(iter(known.answers.values()))
    text = model.config.get_text_config()
    sizes = {"vocabulary": (answer.logits.shape[1], text.vocab_size)}
    if answer.latents is not None:
        sizes["hidden size"] = (answer.latents.shape[1], text.hidden_size)
    for name, (recorded, own) in sizes.items():
        if recorded != own:
            raise ValueError(
                f"The known answers in {where} are of another model: their {name} is {recorded}, this model's is {own}."
            )
    dtype = dtype_name(model)
    if dtype not in known.answers or dtype not in (known.dtype, "float32"):
        raise ValueError(
            f"The known answers in {where} are of weights in {known.dtype}, but the model was loaded in {dtype}, which "
            'rounds them. Load it with `dtype="auto"`.'
        )


def open_picture(content: bytes, where: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(content)) as picture:
            return picture.convert("RGB")
    except OSError as error:
        raise ValueError(f"The known answers in {where} are damaged: a picture cannot be read ({error}).") from error


def compare_inputs(processor, known: KnownAnswers, where: str) -> list[Row]:
    """What the processor makes of the recorded pictures and question, against what it made."""
    made = encode(processor, open_picture(known.picture, where), known.question)
    pad = known.inputs["input_ids"][0, 0]  # that of the recording
    made, rows = pad_left(made, int(pad)), []
    resized = encode(processor, open_picture(known.resized, where), known.question)["pixel_values"]
    if resized.shape != known.resized_pixels.shape:
        note = f"shape {tuple(resized.shape)} instead of {tuple(known.resized_pixels.shape)}"
        rows.append(Row("processor, resized picture", float("inf"), note))
    else:
        value = deviation(resized, known.resized_pixels, RESIZED_TOLERANCE)
        rows.append(Row("processor, resized picture", value))
    for name in sorted(known.inputs.keys() | made.keys()):
        expected, actual = known.inputs.get(name), made.get(name)
        if expected is None or actual is None:
            note = "is not made any more" if actual is None else "was not made"
            rows.append(Row(f"processor, {name}", float("inf"), note))
        elif actual.shape != expected.shape:
            note = f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
            rows.append(Row(f"processor, {name}", float("inf"), note))
        elif expected.is_floating_point():
            rows.append(Row(f"processor, {name}", deviation(actual, expected, PIXEL_TOLERANCE)))
        else:
            count = int((actual != expected).sum())
            rows.append(Row(f"processor, {name}", float("inf") if count else 0.0, f"{count} differ" if count else ""))
    return rows


def compare_answers(actual: Answer, expected: Answer, dtype: str) -> list[Row]:
    tolerance, rows = TOLERANCES[dtype], []
    pairs = {"latents": (actual.latents, expected.latents), "logits": (actual.logits, expected.logits)}
    for name, (now, then) in pairs.items():
        what = f"model, {name} ({dtype})"
        if now is None and then is None:
            continue
        if now is None or then is None or now.shape != then.shape:
            shapes = [None if one is None else tuple(one.shape) for one in (now, then)]
            rows.append(Row(what, float("inf"), f"shape {shapes[0]} instead of {shapes[1]}"))
        else:
            rows.append(Row(what, deviation(now, then, tolerance)))
    return rows


def describe(processor, answer: Answer) -> str:
    return repr(processor.tokenizer.decode(answer.greedy))


def is_check_wanted() -> bool:
    """Whether a checkpoint is checked when it is loaded: on a transformers newer than tested, or as the user says.

    Raises:
        ValueError: the environment variable `LATENTVLM_CHECK` is neither 0 nor 1.
    """
    chosen = os.environ.get(SWITCH, "")
    if chosen not in ("", "0", "1"):
        raise ValueError(f"{SWITCH} must be 0 (never check known answers) or 1 (always), got {chosen!r}.")
    return is_untested() if chosen == "" else chosen == "1"


def reason_against_check(model) -> str | None:
    """Why the answers cannot be recomputed here, or None."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return "several processes share the model"
    if getattr(model, "hf_quantizer", None) is not None:
        return "its weights are quantised"
    if torch.compiler.is_compiling():
        return "it is being compiled"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    if any(is_scattered(weight) for weight in model.parameters()):
        return "its weights are sharded"
    devices = {weight.device for weight in model.parameters()}
    if len(devices) > 1 or any(device.type == "meta" for device in devices):
        return "its weights lie on several devices"
    return None
