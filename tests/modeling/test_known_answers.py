"""Known answers stop every fault that was tried, and nothing that is no fault; a checkpoint carries them while they fit.

The mutations are applied to the shipped checkpoints, whose weights matter: on random weights many a fault shows little.
"""

import copy
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import modeling_latentvlm  # noqa: F401 (registers the models)
import processing_latentvlm  # noqa: F401
from configuration_latentvlm.transformers_api import CACHE
from modeling_latentvlm.answer_check import check_answers
from modeling_latentvlm.known_answers import FILE, FOLDER, TOLERANCES, KnownAnswers, compute_answer, deviation
from modeling_latentvlm.segments import LatentState


pytestmark = pytest.mark.core
CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
NAMES = ("deeplatent", "lare", "vedas")


def load(folder, **kwargs):
    arguments = {"dtype": "auto"} | kwargs
    return AutoModelForImageTextToText.from_pretrained(folder, **arguments).eval()


@pytest.fixture(scope="module", params=NAMES)
def shipped(request):
    return request.param, load(CHECKPOINTS / request.param)


@pytest.fixture
def model(shipped):
    return copy.deepcopy(shipped[1])


def known_answers(name: str) -> KnownAnswers:
    path = CHECKPOINTS / name / FOLDER / FILE
    return KnownAnswers.from_bytes(path.read_bytes(), str(path))


def row(report, what: str) -> float:
    return next(row.deviation for row in report.rows if row.what.startswith(what))


# --- what is no fault ---


@pytest.mark.parametrize("name", NAMES)
def test_shipped_checkpoints_answer_as_recorded(name):
    report = load(CHECKPOINTS / name).check_known_answers()
    print(report)
    assert report.passed
    assert report.worst < 0.5


@pytest.mark.parametrize("change", ["threads", "eager", "float32"])
def test_other_kernels_and_thread_counts_stay_below_half(shipped, change):
    name, _ = shipped
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if change == "threads" else threads)
        kwargs = {"attn_implementation": "eager"} if change == "eager" else {}
        report = load(
            CHECKPOINTS / name, dtype="float32" if change == "float32" else "auto", **kwargs
        ).check_known_answers()
    finally:
        torch.set_num_threads(threads)
    print(name, change, report.worst)
    assert report.worst < 0.5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_stored_dtype_stays_below_half(shipped, attention):
    """As a model too large for a copy in float32 is checked."""
    name, _ = shipped
    known, model = known_answers(name), load(CHECKPOINTS / name, attn_implementation=attention)
    assert known.dtype == "bfloat16" == str(model.dtype).removeprefix("torch.")
    expected = known.answers["bfloat16"]
    actual = compute_answer(model, known.inputs, expected, force_grids=True)
    worst = max(
        deviation(actual.logits, expected.logits, TOLERANCES["bfloat16"]),
        deviation(actual.latents, expected.latents, TOLERANCES["bfloat16"]),
    )
    print(name, attention, worst)
    assert worst < 0.5


# --- faults ---


@contextmanager
def inverted_mask(model):
    """The kernel attends where it must not, and not where it must."""
    kernel = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module, query, key, value, attention_mask, **kwargs):
        inverted = (
            None
            if attention_mask is None
            else ~attention_mask
            if attention_mask.dtype == torch.bool
            else -attention_mask
        )
        return kernel(module, query, key, value, inverted, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = kernel


@contextmanager
def swapped_rows(model):
    """Two rows of the embedding that the prompt uses."""
    weight = model.get_input_embeddings().weight.data
    used = known_answers(model.config.model_type).inputs["input_ids"][0, -4:-2].tolist()
    weight[used] = weight[used[::-1]].clone()
    yield


@contextmanager
def one_dimensional_positions(model):
    """Qwen's models without M-RoPE; LaRe, which has none, with latents that take no positions."""
    decoder = model.model.language_model
    forward = decoder.forward

    def run(*args, position_ids=None, **kwargs):
        length = position_ids.shape[-1]
        if position_ids.ndim == 2:
            flat = position_ids if length == 1 or not run.seen else torch.full_like(position_ids, run.seen)
        else:
            flat = (torch.arange(length) + run.seen).expand_as(position_ids)
        run.seen += length
        return forward(*args, position_ids=flat, **kwargs)

    run.seen = 0
    decoder.forward = run
    yield


@contextmanager
def unread_latents(model):
    """What follows a segment of latents does not attend to it."""
    append = LatentState.append

    def append_unread(state, attended, is_token, length):
        held = state.attention_mask.shape[1]
        mask = append(state, attended, is_token, length)
        if held and length > 1:
            state.attention_mask = state.attention_mask.clone()
            state.attention_mask[:, -length:] = False
            state.has_holes = True
        return mask

    LatentState.append = append_unread
    try:
        yield
    finally:
        LatentState.append = append


@contextmanager
def dropped_cache(model):
    """What transformers 5.24 did to code written before it: later forwards do not get the cache."""
    prepare = model.prepare_inputs_for_generation

    def prepare_without(*args, **kwargs):
        inputs = prepare(*args, **kwargs)
        prepare_without.calls += 1
        if prepare_without.calls > 2:  # DeepLatent's block is built in the second forward
            inputs[CACHE] = None
        return inputs

    prepare_without.calls = 0

    model.prepare_inputs_for_generation = prepare_without
    yield


FAULTS = {
    "inverted mask": inverted_mask,
    "swapped rows of the embedding": swapped_rows,
    "positions without M-RoPE": one_dimensional_positions,
    "latents that the answer does not read": unread_latents,
    "a cache dropped after the latents": dropped_cache,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_exceeds_the_tolerance_ten_times(shipped, fault):
    name, healthy = shipped
    model = copy.deepcopy(healthy).float()
    processor = AutoProcessor.from_pretrained(CHECKPOINTS / name)
    known = known_answers(name)
    with FAULTS[fault](model):
        report = check_answers(model, processor, known, name)
    narrow, expected = copy.deepcopy(healthy), known.answers["bfloat16"]
    with FAULTS[fault](narrow):
        coarse = compute_answer(narrow, known.inputs, expected, force_grids=True)
    print(f"{name}, {fault}: {row(report, 'model, logits'):.4g}")
    assert not report.passed
    assert row(report, "model, logits") >= 10
    assert deviation(coarse.logits, expected.logits, TOLERANCES["bfloat16"]) > 1
    assert row(report, "processor, pixel_values") < 0.5  # told apart from a changed processor


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_processor_is_told_from_a_changed_model(name, tmp_path):
    folder = tmp_path / name
    shutil.copytree(CHECKPOINTS / name, folder)
    config = folder / "processor_config.json"
    text = config.read_text()
    mean = AutoProcessor.from_pretrained(folder).image_processor.image_mean
    assert str(mean[0]) in text
    config.write_text(text.replace(str(mean[0]), str(mean[0] + 0.02), 1))
    report = load(folder).check_known_answers()
    print(f"{name}, image mean: {row(report, 'processor, pixel_values'):.4g}")
    assert row(report, "processor, pixel_values") >= 10
    assert row(report, "model, logits") < 0.5
