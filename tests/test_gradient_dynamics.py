"""The record of gradients equals a naive one, in every setting in which it is taken, and training does not see it."""

import copy
import csv
from pathlib import Path

import pytest
import torch
from conftest import CHAT_TEMPLATE, build_tokenizer, picture
from helpers import CHECKPOINTING
from PIL import Image
from test_vedas import build

from processing_latentvlm import VedasProcessor
from processing_latentvlm.processing_vedas import LATENT_TOKEN
from train.common.gradient_dynamics import GradientDynamics, find_base
from train.common.training_model import LatentTrainer, TrainingModel
from train.data.reasoning_data import ReasoningSample
from train.train_vedas import ScriptArguments, VedasTrainingArguments, prepare_weights
from train.vedas.crop_distillation import ReplayArguments, ReplayObjective
from train.vedas.curriculum import CurriculumCollator


LAYERS = range(3)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer((LATENT_TOKEN,))


@pytest.fixture(scope="module")
def processor(tokenizer, image_processor):
    return VedasProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def samples() -> list[ReasoningSample]:
    """Prompts of unequal length, with one picture, two, and none."""
    images = [[picture(84, 112, 1)], [picture(56, 56, 2), picture(28, 56, 3)], []]
    questions = ["what colour?", "which of the two is it, left or right?", "hello"]
    return [
        ReasoningSample(part, question, ["it is round", "it is red"], "red", "here")
        for part, question in zip(images, questions)
    ]


def make_whole(tokenizer, processor, lora: bool = False, **fields) -> TrainingModel:
    model = build(tokenizer, routed_layers=[0, 1], **fields)
    torch.manual_seed(3)
    arguments = ScriptArguments("unused", "unused", lora=lora, lora_r=4, lora_dropout=0.0)
    objective = ReplayObjective(model.config, processor.image_processor, ReplayArguments())
    model = prepare_weights(model, arguments, VedasTrainingArguments("unused", use_cpu=True))
    with torch.no_grad():  # adapters that matter
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return TrainingModel(model, objective)


def train(whole, samples, processor, folder, callbacks, stage: int = 2, **settings) -> LatentTrainer:
    collator = CurriculumCollator(processor, 2)
    collator.stage = stage
    defaults = {
        "max_steps": 1,
        "per_device_train_batch_size": len(samples),
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = LatentTrainer(
        model=whole,
        args=VedasTrainingArguments(str(folder), **(defaults | settings)),
        train_dataset=samples,
        data_collator=collator,
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


def read(folder: Path) -> dict[tuple[int, int, str], float]:
    with (folder / "gradient_dynamics.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    table = {(int(row["step"]), int(row["layer"]), row["what"]): float(row["norm"]) for row in rows}
    assert len(table) == len(rows)
    return table


def naive(whole, samples, processor, stage: int) -> dict[tuple[int, str], float]:
    """Kept gradients of the first pass over the prompt, and whole singular value decompositions."""
    collator = CurriculumCollator(processor, 2)
    collator.stage = stage
    batch, hidden = collator(samples), {}
    base = find_base(whole)

    def keep(number):
        def hook(layer, args, output):
            if number not in hidden:
                output.retain_grad()
                hidden[number] = output

        return hook

    handles = [
        layer.register_forward_hook(keep(number)) for number, layer in enumerate(base.model.language_model.layers)
    ]
    whole.train()(**batch)["loss"].backward()
    for handle in handles:
        handle.remove()
    table = {}
    ids, columns = batch["input_ids"], {"visual": [], "text": []}
    for row in range(len(samples)):
        first = int((batch["labels"][row] != -100).nonzero()[0])  # a slot, or the first word of the answer
        for column in range(first):
            if batch["attention_mask"][row, column]:
                kind = "visual" if ids[row, column] == base.config.image_token_id else "text"
                columns[kind].append((row, column))
    assert batch["attention_mask"][2, 0] == 0 and len(columns["visual"]) == 12 + 6
    for number, layer in enumerate(base.model.language_model.layers):
        for kind, places in columns.items():
            norms = [hidden[number].grad[row, column].norm() for row, column in places]
            table[number, kind] = float(sum(norms) / len(norms))
        for name in PROJECTIONS:
            module = getattr(layer.self_attn, name)
            weights = {name: module.weight}
            if hasattr(module, "lora_A"):
                factors = {"lora_A": module.lora_A, "lora_B": module.lora_B}
                weights = {f"{name}.{factor}": part["default"].weight for factor, part in factors.items()}
            for label, weight in weights.items():
                table[number, label] = float(torch.linalg.matrix_norm(weight.grad, ord="nuc"))
    whole.zero_grad()
    return table


@pytest.mark.parametrize(
    "stage, lora, fields, settings",
    [
        (0, False, {}, {}),
        (2, False, {}, {}),
        (2, True, {}, {}),
        (2, False, {}, {CHECKPOINTING: True}),
        (2, True, {}, {CHECKPOINTING: True}),
        (2, False, {}, {"max_grad_norm": 0.0}),
        (2, False, {"routing_scope": "context"}, {}),
    ],
    ids=["stage0", "stage2", "lora", "checkpointing", "lora-checkpointing", "unclipped", "context"],
)
def test_norms_equal_naive_ones(tokenizer, processor, samples, tmp_path, stage, lora, fields, settings):
    """Also where gradients are clipped behind: here to a thousandth of the usual bound."""
    whole = make_whole(tokenizer, processor, lora, **fields)
    expected = naive(copy.deepcopy(whole), samples, processor, stage)
    names = [f"{name}.lora_{factor}" for name in PROJECTIONS for factor in "AB"] if lora else PROJECTIONS
    assert expected.keys() == {(layer, what) for layer in LAYERS for what in ("visual", "text", *names)}
    settings = {"max_grad_norm": 1e-3} | settings
    train(whole, samples, processor, tmp_path, [GradientDynamics(tmp_path, 1)], stage, **settings)
    actual = read(tmp_path)
    assert actual.keys() == {(0, *place) for place in expected}
    for (layer, what), norm in expected.items():
        assert norm > 0 or (layer, what[0]) == (2, "v")  # the last layer's images matter only to what looks at them
        assert actual[0, layer, what] == pytest.approx(norm, rel=1e-4, abs=1e-7), (layer, what)


def test_accumulated_batches_are_averaged(tokenizer, processor, samples, tmp_path):
    """Tokens: the mean of the batches, each counted by its share of the loss. Weights: the whole gradient."""
    whole = make_whole(tokenizer, processor)
    collator = CurriculumCollator(processor, 2)
    collator.stage = 2
    found = copy.deepcopy(whole)
    for _ in range(2):
        (found.train()(**collator(samples[:1]))["loss"] / 2).backward()
    weight = find_base(found).model.language_model.layers[0].self_attn.v_proj.weight
    once = tmp_path / "once"
    train(copy.deepcopy(whole), samples[:1], processor, once, [GradientDynamics(once, 1)])
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    train(whole, samples[:1] * 2, processor, tmp_path, [GradientDynamics(tmp_path, 1)], **settings)
    norm = float(torch.linalg.matrix_norm(weight.grad, ord="nuc"))
    assert read(tmp_path)[0, 0, "v_proj"] == pytest.approx(norm, rel=1e-4)
    assert read(tmp_path)[0, 0, "visual"] == pytest.approx(read(once)[0, 0, "visual"] / 2, rel=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_training_does_not_see_it(tokenizer, processor, samples, tmp_path, lora):
    """Same parameters, no hook left behind; a row every second step, and a plot."""
    first = make_whole(tokenizer, processor, lora)
    second = copy.deepcopy(first)
    plain = train(first, samples, processor, tmp_path / "plain", [], max_steps=4)
    recorded = tmp_path / "recorded"
    trainer = train(second, samples, processor, recorded, [GradientDynamics(recorded, 2)], max_steps=4)
    expected = plain.model.state_dict()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    base = find_base(trainer.model)
    assert not base._forward_pre_hooks
    layers, untouched = base.model.language_model.layers, find_base(plain.model).model.language_model.layers
    assert [len(one._forward_hooks) for one in layers] == [len(one._forward_hooks) for one in untouched]
    assert {step for step, _, _ in read(recorded)} == {0, 2}
    with Image.open(recorded / "gradient_dynamics.png") as plot:
        assert plot.format == "PNG" and plot.width > 1000
    assert not (tmp_path / "plain").exists() or not list((tmp_path / "plain").glob("gradient_dynamics*"))


def test_batches_of_text_alone(tokenizer, processor, samples, tmp_path):
    train(make_whole(tokenizer, processor), samples[2:], processor, tmp_path, [GradientDynamics(tmp_path, 1)])
    assert {what for _, _, what in read(tmp_path)} == {"text", *PROJECTIONS}


def test_a_resumed_run_writes_no_step_twice(tokenizer, processor, samples, tmp_path):
    settings = {"per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 2}

    class Killed(Exception):
        pass

    class KilledRun(GradientDynamics):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise Killed

    with pytest.raises(Killed):
        train(
            make_whole(tokenizer, processor),
            samples,
            processor,
            tmp_path,
            [KilledRun(tmp_path, 1)],
            max_steps=4,
            **settings,
        )
    assert {step for step, _, _ in read(tmp_path)} == {0, 1, 2}
    kept = {place: norm for place, norm in read(tmp_path).items() if place[0] < 2}
    assert (tmp_path / "gradient_dynamics.png").is_file()  # drawn at the save
    resumed = GradientDynamics(tmp_path, 1)
    arguments = VedasTrainingArguments(str(tmp_path), use_cpu=True)
    state = train(make_whole(tokenizer, processor), samples, processor, tmp_path / "other", []).state
    state.global_step = 2
    resumed.on_train_begin(arguments, state, None)
    assert read(tmp_path) == kept
    state.global_step = 0
    resumed.on_train_begin(arguments, state, None)  # a new run starts a new table
    assert read(tmp_path) == {}


def test_every_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="`every` must be >= 1, got 0"):
        GradientDynamics(tmp_path, 0)
