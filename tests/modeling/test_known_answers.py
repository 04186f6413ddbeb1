"""Known answers stop every fault that was tried, and nothing that is no fault; a checkpoint carries them while they fit.

The mutations are applied to the shipped checkpoints, whose weights matter: on random weights many a fault shows little.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save_file
from safetensors.torch import save as save_bytes
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import conversion.known_answers
import modeling_latentvlm  # noqa: F401 (registers the models)
import processing_latentvlm  # noqa: F401
from configuration_latentvlm import transformers_contract
from configuration_latentvlm.transformers_api import CACHE
from conversion import check
from modeling_latentvlm import answered_model
from modeling_latentvlm.answer_check import check_answers
from modeling_latentvlm.known_answers import (
    FILE,
    FOLDER,
    FORMAT,
    TOLERANCES,
    KnownAnswers,
    compute_answer,
    deviation,
    digest_content,
    load_tensors,
    read_metadata,
    record,
    save_tensors,
)
from modeling_latentvlm.latent_state import LatentState


pytestmark = pytest.mark.core
CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
NAMES = ("deeplatent", "lare", "vedas")
PLACES = (
    *NAMES,
    *(str(path.parent.relative_to(CHECKPOINTS)) for path in sorted(CHECKPOINTS.glob("serial/*/config.json"))),
)


def load(folder, **kwargs):
    arguments = {"dtype": "auto"} | kwargs
    return AutoModelForImageTextToText.from_pretrained(folder, **arguments).eval()


@pytest.fixture(scope="module", params=PLACES)
def shipped(request):
    return request.param, load(CHECKPOINTS / request.param)


@pytest.fixture(scope="module", params=NAMES)
def one_of_each(request):
    return load(CHECKPOINTS / request.param)


@pytest.fixture
def model(one_of_each):
    """What is carried follows from the architecture, not from what a model has learned."""
    return copy.deepcopy(one_of_each)


def known_answers(name: str) -> KnownAnswers:
    path = CHECKPOINTS / name / FOLDER / FILE
    return KnownAnswers.from_bytes(path.read_bytes(), str(path))


def row(report, what: str) -> float:
    return next(row.deviation for row in report.rows if row.what.startswith(what))


# --- what is no fault ---


@pytest.mark.parametrize("name", PLACES)
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
    """As a model too large for a copy in float32 is checked.

    Not the second set: a LaRe looks at the window with the largest attention, which bfloat16 may choose anew, and these models are
    small enough to be checked in float32.
    """
    name, _ = shipped
    if name.startswith("serial/"):
        pytest.skip("models of this size are checked in float32")
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
    used = KnownAnswers.from_bytes(model.known_answers, "here").inputs["input_ids"][0, -4:-2].tolist()
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


@contextmanager
def ignored_padding(model):
    """Masks are made as if no column were padding."""
    kept = dict(ALL_MASK_ATTENTION_FUNCTIONS.items())

    def forget(make):
        return lambda *args, **kwargs: make(*args, **(kwargs | {"attention_mask": None}))

    for name, make in kept.items():
        ALL_MASK_ATTENTION_FUNCTIONS[name] = forget(make)
    try:
        yield
    finally:
        for name, make in kept.items():
            ALL_MASK_ATTENTION_FUNCTIONS[name] = make


FAULTS = {
    "inverted mask": inverted_mask,
    "padding that is attended": ignored_padding,
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
    # Three columns of padding lie within the noise of bfloat16, and so does more where a model has never learned such a question:
    # those of serial questions are small enough to be checked in float32.
    if fault != "padding that is attended" and name in NAMES:
        assert deviation(coarse.logits, expected.logits, TOLERANCES["bfloat16"]) > 1
    assert row(report, "processor, pixel_values") < 0.5  # told apart from a changed processor


@contextmanager
def swapped_grid(model):
    """Height and width change places where the positions of an image are made."""
    index = model.model.get_rope_index

    def swap(*args, image_grid_thw=None, **kwargs):
        positions, deltas = index(*args, image_grid_thw=image_grid_thw, **kwargs)
        return positions[[0, 2, 1]], deltas

    model.model.get_rope_index = swap
    yield


@contextmanager
def windows_everywhere(model):
    """No layer of the vision tower sees the whole picture."""
    model.model.visual.fullatt_block_indexes = []
    yield


@pytest.mark.parametrize("fault", [swapped_grid, windows_everywhere])
def test_pictures_that_are_no_squares_of_one_window_show_more(fault, shared_model, processor):
    """Of a checkpoint whose processor keeps the shape of pictures, as the papers' models do."""
    model = copy.deepcopy(shared_model)
    known = record(model, processor)
    height, width = known.inputs["image_grid_thw"][0, 1:].tolist()
    assert height != width and min(height, width) * 14 > 112  # more than one window
    assert check_answers(model, processor, known, "here").worst < 0.5
    with fault(model):
        report = check_answers(model, processor, known, "here")
    print(f"{fault.__name__}: {row(report, 'model, logits'):.4g}")
    assert row(report, "model, logits") >= 10


def test_another_way_of_resizing_shows_and_another_backend_may_round(lare_folder):
    processor, known = AutoProcessor.from_pretrained(lare_folder), known_answers("lare")
    model = load(lare_folder)
    processor.image_processor.resample = 0  # nearest
    assert row(check_answers(model, processor, known, "here"), "processor, resized picture") > 1
    known.resized_pixels = known.resized_pixels + 0.02  # about one step of 255
    processor.image_processor.resample = 3
    assert row(check_answers(model, processor, known, "here"), "processor, resized picture") < 0.5


@pytest.mark.parametrize("name", PLACES)
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


# --- carried while they fit ---


def recorded(name: str) -> bytes:
    return (CHECKPOINTS / name / FOLDER / FILE).read_bytes()


@pytest.fixture
def told(monkeypatch):
    """What our loggers say, every time: `warning_once` says each line once a process."""
    messages = []
    for level in ("warning_once", "warning", "info"):
        monkeypatch.setattr(
            answered_model.logger, level, lambda message, level=level: messages.append((level, message))
        )
    return messages


@pytest.mark.parametrize("as_state", [False, True])
def test_answers_are_carried_through_save_and_load(model, as_state, tmp_path, told):
    known = model.known_answers
    model.save_pretrained(tmp_path / "one", **({"state_dict": model.state_dict()} if as_state else {}))
    assert (tmp_path / "one" / FOLDER / FILE).read_bytes() == known
    again = load(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    again.save_pretrained(tmp_path / "one")  # onto itself
    assert (tmp_path / "two" / FOLDER / FILE).read_bytes() == known == again.known_answers
    assert not told


def change_weight(model):
    next(model.lm_head.parameters()).data[3, 5] += 0.5


def change_config(model):
    field = {"deeplatent": "max_latent_blocks", "lare": "num_refocus_steps", "vedas": "num_latent_steps"}
    name = field[model.config.model_type]
    setattr(model.config, name, getattr(model.config, name) + 1)


def damage_answers(model):
    model.known_answers = model.known_answers[:-7]


@pytest.mark.parametrize(
    "change, reason",
    [
        (change_weight, "weights are not those that were loaded"),
        (change_config, "the config is not the one that was loaded"),
        (lambda model: model.float(), "weights are not those that were loaded"),
        (damage_answers, "are damaged"),
    ],
)
def test_answers_that_do_not_fit_are_not_carried_and_stale_ones_go(model, change, reason, tmp_path, told):
    model.save_pretrained(tmp_path)
    (tmp_path / FOLDER / "note.txt").write_text("of the user")
    change(model)
    model.save_pretrained(tmp_path)
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["note.txt"]
    assert [level for level, _ in told] == ["warning_once"]
    assert reason in told[0][1] and "python -m conversion.check CHECKPOINT --write" in told[0][1]


def test_a_model_that_never_had_answers_is_saved_without_and_quietly(model, tmp_path, told):
    model.known_answers = None
    model.save_pretrained(tmp_path)
    assert not (tmp_path / FOLDER).exists()
    assert [level for level, _ in told] == ["info"]
    with pytest.raises(ValueError, match=r"holds no known answers\. Write them: python -m conversion\.check"):
        model.check_known_answers()


def test_answers_are_pushed(model, tmp_path, monkeypatch):
    from test_remote_code import FakeHub

    hub = FakeHub()
    for module in (transformers.utils.hub, transformers.modeling_utils):
        monkeypatch.setattr(module, "hf_api", lambda: hub)
    monkeypatch.setattr(transformers.utils.hub.ModelCard, "load", hub.load_card)
    model.push_to_hub("me/one")
    assert hub.files.pop(f"{FOLDER}/{FILE}") == model.known_answers
    hub.files.clear()
    model.save_pretrained(tmp_path / "two", push_to_hub=True, repo_id="me/two")
    assert hub.files[f"{FOLDER}/{FILE}"] == model.known_answers
    hub.files.clear()
    state = {name: value + 1 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "two", state_dict=state, push_to_hub=True, repo_id="me/two")
    assert f"{FOLDER}/{FILE}" not in hub.files and "model.safetensors" in hub.files


def test_saving_takes_what_transformers_takes(model, tmp_path):
    model.save_pretrained(tmp_path, True, None, False, "2MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1


def test_what_a_user_set_for_generation_does_not_matter(model):
    model.generation_config.update(num_return_sequences=2, num_beams=2, use_cache=False, stop_strings=["e"])
    settings = model.generation_config
    model.model.language_model.train()
    modes = [module.training for module in model.modules()]
    assert model.check_known_answers().worst < 0.5
    assert model.generation_config is settings and [module.training for module in model.modules()] == modes


# --- damaged and foreign files ---


def replace_answers(folder, content: bytes):
    (folder / FOLDER / FILE).write_bytes(content)
    return load(folder)


@pytest.fixture
def lare_folder(tmp_path):
    shutil.copytree(CHECKPOINTS / "lare", tmp_path / "lare")
    return tmp_path / "lare"


def test_a_damaged_file_is_named(lare_folder):
    good = recorded("lare")
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 64
    for content in (good[:100], b"", b"\xff" * 64, good[:-5], bytes(flipped)):
        with pytest.raises(ValueError, match=r"lare/known_answers/answers\.safetensors are damaged"):
            replace_answers(lare_folder, content).check_known_answers()
    tensors, metadata = load_tensors(good), read_metadata(good)
    for name in ("picture", "inputs.input_ids", "bfloat16.tokens"):
        without = {other: value for other, value in tensors.items() if other != name}
        with pytest.raises(ValueError, match="are damaged"):
            replace_answers(lare_folder, save_tensors(without, metadata)).check_known_answers()
    broken = tensors | {"picture": tensors["picture"][:50].contiguous()}
    with pytest.raises(ValueError, match="a picture cannot be read"):
        replace_answers(lare_folder, save_tensors(broken, metadata)).check_known_answers()
    with pytest.raises(ValueError, match="must have format 1 or 2, got '3'"):
        replace_answers(lare_folder, save_tensors(tensors, metadata | {"format": "3"})).check_known_answers()


def test_pixels_are_deflated_without_loss_and_older_files_are_read():
    tensors = load_tensors(recorded("lare"))
    tensors["inputs.pixel_values"][0, 0, 0, 0] = float("nan")  # bits are kept, whatever they mean
    tensors["inputs.pixel_values"][0, 0, 0, 1] = -0.0
    metadata = read_metadata(recorded("lare")) | {"format": FORMAT}
    content = save_tensors(tensors, metadata)
    assert set(json.loads(read_metadata(content)["deflated"])) >= {"inputs.pixel_values", "resized_pixels"}
    large = sum(value.numel() * value.element_size() for name, value in tensors.items() if "pixel" in name)
    assert len(content) < large / 3
    again = load_tensors(content)
    assert again.keys() == tensors.keys() and digest_content(again) == digest_content(tensors)
    assert all(again[name].dtype == tensors[name].dtype for name in tensors)
    first = {name: value for name, value in metadata.items() if name != "deflated"}
    older = save_bytes(tensors, first | {"format": "1", "content": digest_content(tensors)})
    read = [KnownAnswers.from_bytes(one, "here").to_bytes() for one in (older, content)]
    assert read_metadata(read[0]) == read_metadata(read[1]) and read_metadata(read[0])["format"] == FORMAT
    assert digest_content(load_tensors(read[0])) == digest_content(tensors)


def test_deflated_tensors_of_another_size_are_damage():
    tensors, metadata = load_tensors(recorded("lare")), read_metadata(recorded("lare")) | {"format": FORMAT}
    content = save_tensors(tensors, metadata)
    stored, metadata = load_bytes(content), read_metadata(content)
    for shape, dtype in (([1, 3, 112, 111], "float32"), ([1, 3, 112, 113], "float32"), ([1], "complex64")):
        deflated = json.loads(metadata["deflated"]) | {"resized_pixels": [dtype, shape]}
        with pytest.raises(ValueError, match="are damaged"):
            KnownAnswers.from_bytes(save_bytes(stored, metadata | {"deflated": json.dumps(deflated)}), "here")
    stored["resized_pixels"][20] ^= 255
    with pytest.raises(ValueError, match="are damaged"):
        KnownAnswers.from_bytes(save_bytes(stored, metadata), "here")


def test_answers_of_another_model_are_foreign(lare_folder):
    with pytest.raises(ValueError, match="are of a model of type 'vedas', but this one is of type 'lare'"):
        replace_answers(lare_folder, recorded("vedas")).check_known_answers()
    tensors, metadata = load_tensors(recorded("lare")), read_metadata(recorded("lare"))
    narrow = tensors | {name: value[:, :7].contiguous() for name, value in tensors.items() if name.endswith("logits")}
    content = save_tensors(narrow, metadata)
    with pytest.raises(ValueError, match="are of another model: their vocabulary is 7, this model's is"):
        replace_answers(lare_folder, content).check_known_answers()


def test_a_dtype_that_rounds_the_weights_is_refused():
    with pytest.raises(
        ValueError, match=r"of weights in bfloat16, but the model was loaded in float16.*dtype=\"auto\""
    ):
        load(CHECKPOINTS / "lare", dtype="float16").check_known_answers()


def test_weights_that_are_not_the_recorded_ones_are_named(lare_folder):
    weights = load_file(lare_folder / "model.safetensors")
    weights["refocus.out_proj.weight"] = weights["refocus.out_proj.weight"].flip(0).contiguous()
    save_file(weights, lare_folder / "model.safetensors", {"format": "pt"})
    report = load(lare_folder).check_known_answers()
    assert not report.passed
    assert "not those that the answers were recorded from: refocus.out_proj.weight differs." in str(report)


# --- by itself, when a checkpoint is loaded ---


def test_a_checkpoint_is_checked_when_loaded_under_an_untested_version(lare_folder, monkeypatch):
    weights = load_file(lare_folder / "model.safetensors")
    weights["refocus.out_proj.weight"] = weights["refocus.out_proj.weight"].flip(0).contiguous()
    save_file(weights, lare_folder / "model.safetensors", {"format": "pt"})
    load(lare_folder)  # tested: no check
    monkeypatch.setattr(transformers_contract.transformers, "__version__", "5.99.0")
    with pytest.raises(RuntimeError, match=r"NOT as recorded[^$]*DIFFERS[^$]*LATENTVLM_CHECK=0"):
        load(lare_folder)
    load(CHECKPOINTS / "lare")
    monkeypatch.setenv("LATENTVLM_CHECK", "0")
    load(lare_folder)
    monkeypatch.setattr(transformers_contract.transformers, "__version__", "5.23.0")
    monkeypatch.setenv("LATENTVLM_CHECK", "1")
    with pytest.raises(RuntimeError, match="NOT as recorded"):
        load(lare_folder)
    monkeypatch.setenv("LATENTVLM_CHECK", "yes")
    with pytest.raises(ValueError, match="LATENTVLM_CHECK must be 0 .* or 1 .*, got 'yes'"):
        load(lare_folder)


@pytest.mark.parametrize(
    "cause",
    [
        "quantised",
        "several devices",
        "several processes",
        "no answers",
        "are damaged",
        "another config",
        "float16",
        "autocast",
    ],
)
def test_where_no_check_is_possible_the_command_is_told_instead(cause, lare_folder, monkeypatch, told):
    monkeypatch.setenv("LATENTVLM_CHECK", "1")
    monkeypatch.setattr(answered_model.KnownAnswersMixin, "check_known_answers", lambda model: pytest.fail("checked"))
    if cause == "quantised":
        monkeypatch.setattr(transformers.PreTrainedModel, "hf_quantizer", object(), raising=False)
    if cause == "several processes":
        for name, value in (("is_initialized", True), ("get_world_size", 2)):
            monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    if cause == "no answers":
        shutil.rmtree(lare_folder / FOLDER)
    if cause == "are damaged":
        (lare_folder / FOLDER / FILE).write_bytes(b"damaged")
    arguments = {"another config": {"num_refocus_steps": 3}, "float16": {"dtype": "float16"}}.get(cause, {})
    if cause == "float16":
        monkeypatch.undo()
        monkeypatch.setenv("LATENTVLM_CHECK", "1")
        monkeypatch.setattr(
            answered_model.logger, "warning_once", lambda message: told.append(("warning_once", message))
        )
    if cause == "several devices":
        parts = ("model.vision_tower", "model.language_model", "lm_head", "refocus")
        device_map = dict.fromkeys(parts, "cpu") | {"model.multi_modal_projector": "disk"}
        arguments = {"device_map": device_map, "offload_folder": str(lare_folder / "offload")}
    with torch.autocast("cpu", torch.bfloat16, enabled=cause == "autocast"):
        load(lare_folder, **arguments)
    assert len(told) == 1 and told[0][0] == "warning_once"
    assert f"python -m conversion.check {lare_folder}" in told[0][1]
    assert cause in told[0][1] or cause == "no answers"


# --- the command ---


def test_the_command_checks_and_writes(lare_folder, capsys, monkeypatch):
    monkeypatch.delenv("LATENTVLM_CHECK", raising=False)
    monkeypatch.setenv("LATENTVLM_CHECK", "0")  # the command sets it; this restores it afterwards
    with pytest.raises(SystemExit) as ended:
        check.main([str(lare_folder)])
    assert ended.value.code == 0 and "as recorded" in capsys.readouterr().out
    (lare_folder / FOLDER / FILE).unlink()
    with pytest.raises(SystemExit) as ended:
        check.main([str(lare_folder)])
    assert ended.value.code == 2 and "holds no known answers" in capsys.readouterr().err
    check.main([str(lare_folder), "--write"])
    known = KnownAnswers.from_bytes((lare_folder / FOLDER / FILE).read_bytes(), "here")
    shipped = known_answers("lare")
    for dtype in ("float32", "bfloat16"):
        assert deviation(known.answers[dtype].logits, shipped.answers[dtype].logits, TOLERANCES[dtype]) < 0.5
    assert known.weights == shipped.weights and known.versions["transformers"] == transformers.__version__
    with pytest.raises(SystemExit) as ended:
        check.main([str(lare_folder / "nowhere"), "--write"])
    assert ended.value.code == 2 and "error: Known answers are recorded of a checkpoint" in capsys.readouterr().err


def test_too_little_memory_is_told(lare_folder, monkeypatch, capsys):
    monkeypatch.setattr(conversion.known_answers.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    before = (lare_folder / FOLDER / FILE).read_bytes()
    conversion.known_answers.record_answers(lare_folder, lare_folder / "later")
    told = capsys.readouterr().err
    assert "No known answers were recorded: that takes" in told and f"check {lare_folder / 'later'} --write" in told
    assert (lare_folder / FOLDER / FILE).read_bytes() == before


@pytest.mark.parametrize("name", PLACES)
def test_a_clone_answers_where_the_package_is_not_installed(name, tmp_path):
    """The checkpoint's own code, in a process that cannot import ours."""
    folder = tmp_path / name
    shutil.copytree(CHECKPOINTS / name, folder)
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['configuration_latentvlm', 'modeling_latentvlm', "
        "'processing_latentvlm', 'conversion', 'train']))\n"
        "from transformers import AutoModel\n"
        f"model = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        "report = model.check_known_answers()\n"
        "print(type(model).__module__, report)\n"
        "assert report.passed and report.worst < 0.5\n"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.startswith("transformers_modules.")
