"""Training of Vedas: curriculum, what moves, checkpoints, and runs that go on after they were killed."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CHAT_TEMPLATE, build_tokenizer, picture
from helpers import assert_near
from safetensors.torch import load_file
from test_vedas import build
from transformers import AutoModel, AutoProcessor, HfArgumentParser
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from conversion.convert_vedas import convert_vedas
from processing_latentvlm import VedasProcessor
from processing_latentvlm.processing_vedas import LATENT_TOKEN
from train import train_vedas
from train.common import training_model
from train.common.stages import Curriculum, StageArguments
from train.common.training_model import OBJECTIVE_FILE, LatentTrainer, TrainingModel, last_complete_checkpoint
from train.data.reasoning_data import ReasoningSample, merge_steps, read_reasoning
from train.data.small_tokenizer import texts_of
from train.data.tasks import write_dataset
from train.recipes.small_backbone import write_backbone
from train.train_vedas import ScriptArguments, VedasTrainingArguments, plan_stages
from train.vedas.crop_distillation import ReplayArguments, ReplayObjective
from train.vedas.curriculum import CurriculumCollator


PARSER = HfArgumentParser((ScriptArguments, ReplayArguments, VedasTrainingArguments, StageArguments))
SMALL = {
    "num_latent_steps": 2,
    "num_replay_tokens": 4,
    "routed_layers": [0, 1],
    "num_routed_tokens": 6,
    "num_routed_step_tokens": 3,
}
LORA = {"lora": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.2}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer((LATENT_TOKEN,))


@pytest.fixture(scope="module")
def processor(tokenizer):
    return VedasProcessor(
        Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 64), tokenizer, chat_template=CHAT_TEMPLATE
    )


@pytest.fixture(scope="module")
def folder(tokenizer, processor, tmp_path_factory) -> Path:
    """A checkpoint to start from."""
    folder = tmp_path_factory.mktemp("vedas")
    build(tokenizer, **SMALL).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Six questions with one to four steps, and one, two or no pictures."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number in range(6):
        names = [f"{number}-{part}.png" for part in range((1, 2, 0)[number % 3])]
        for part, name in enumerate(names):
            picture(56 + 28 * (number % 2), 56 + 28 * part, number).save(folder / name)
        steps = [f"step {part} of {number}." for part in range(1 + number % 4)]
        rows.append({"image": names, "question": f"what is {number}?", "rationale": steps, "answer": f"red {number}"})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "data.jsonl"


def train(model_path, data_path, output_dir, **settings) -> LatentTrainer:
    """`train_vedas` with its own arguments."""
    defaults = {
        "per_device_train_batch_size": 2,
        "epochs_per_stage": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    paths = {"model_path": str(model_path), "data_path": str(data_path), "output_dir": str(output_dir)}
    return train_vedas.main(*PARSER.parse_dict(defaults | paths | settings))


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def state_of(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def logits_of(model, batch) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "original_images"}
    with torch.no_grad():
        return model.eval()(**inputs).logits


def load(folder):
    return AutoModel.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def batch(processor, data) -> dict:
    collator = CurriculumCollator(processor, 2)
    collator.stage = 2
    return collator(read_reasoning(data)[:3])


def test_merge_steps_evenly():
    for length in range(1, 10):
        steps = [str(number) for number in range(length)]
        for count in range(1, 6):
            merged = merge_steps(steps, count)
            sizes = [len(part.split()) for part in merged]
            assert " ".join(merged).split() == steps
            assert len(merged) == min(count, length) and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    "stage, texts",
    [
        (0, ["a b\\nc d e\\n", "a\\n"]),
        (1, ["c d e\\n", ""]),
        (2, ["", ""]),
        (3, ["", ""]),
    ],
)
def test_slots_labels_and_what_is_left_at_each_stage(processor, tokenizer, stage, texts):
    samples = [
        ReasoningSample([picture()], "what?", ["a", "b", "c", "d", "e"], "red", "1"),
        ReasoningSample([], "why?", ["a"], "it is blue", "2"),
    ]
    collator = CurriculumCollator(processor, 2)
    collator.stage = stage
    batch = collator(samples)
    assert [[image.size for image in images] for images in batch.pop("original_images")] == [[(56, 84)], []]
    slot, end = tokenizer.convert_tokens_to_ids([LATENT_TOKEN, "<|im_end|>"])
    for row, (sample, text) in enumerate(zip(samples, texts)):
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        assert int((ids == slot).sum()) == stage
        learned = (labels != -100).nonzero().flatten()
        assert torch.equal(labels[learned], ids[learned])
        assert learned.tolist() == list(range(int(learned[0]), int(learned[-1]) + 1))
        assert ids[learned[:stage]].tolist() == [slot] * stage and ids[learned[-1]] == end
        answer = text.replace("\\n", "\n") + f"The answer is \\boxed{{{sample.answer}}}."
        assert tokenizer.decode(ids[learned[stage:-1]]) == answer
        assert tokenizer.decode(ids[learned[-1] + 1 :]) == "\n"
        prompt = tokenizer.decode(ids[: learned[0]])
        assert prompt.endswith(f"{sample.question}<|im_end|>\n<|im_start|>assistant\n")
    assert "original_images" not in CurriculumCollator(processor, 2, keep_images=False)(samples)


def test_samples_bring_their_images_in_order(processor):
    images = [picture(56, 84, 1), picture(84, 56, 2), picture(28, 28, 3)]
    samples = [ReasoningSample(part, "q", ["a"], "b", "1") for part in (images[:2], [], images[2:])]
    batch = CurriculumCollator(processor, 2)(samples)
    assert batch["image_grid_thw"].tolist() == [[1, 6, 4], [1, 4, 6], [1, 2, 2]]
    assert [[image.size for image in row] for row in batch["original_images"]] == [
        [(56, 84), (84, 56)],
        [],
        [(28, 28)],
    ]


def test_a_bad_image_in_training_is_named(processor, tmp_path):
    sample = ReasoningSample([str(tmp_path / "p.png")], "q", ["a"], "b", "Line 7 of x")
    with pytest.raises(ValueError, match="Line 7 of x.*p.png"):
        CurriculumCollator(processor, 2)([sample])


@pytest.mark.parametrize("workers", [0, 1])
def test_the_stage_follows_the_epoch(tokenizer, processor, data, tmp_path, workers):
    """Also in a worker process that lives through all epochs."""
    model = build(tokenizer, **SMALL)
    collator, seen = CurriculumCollator(processor, 2), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            set((kwargs["input_ids"] == model.config.latent_token_id).sum(1).tolist())
        ),
        with_kwargs=True,
    )
    arguments = VedasTrainingArguments(
        str(tmp_path),
        num_train_epochs=5,
        per_device_train_batch_size=3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
    )
    trainer = LatentTrainer(
        model=TrainingModel(model, ReplayObjective(model.config, processor.image_processor, ReplayArguments())),
        args=arguments,
        train_dataset=read_reasoning(data),
        data_collator=collator,
        callbacks=[Curriculum(collator, [1, 0, 2], 1)],
    )
    trainer.train()
    stages = [1, 1, 0, 0, 2, 2, 2, 2, 2, 2]  # after the last stage nothing follows
    assert logged(trainer, "stage") == stages
    assert seen == [{stage} for stage in stages]
    terms = [logged(trainer, name) for name in ("loss", "ce_loss", "replay_loss")]
    for loss, ce_loss, replay_loss in zip(*terms, strict=True):
        assert loss == pytest.approx(ce_loss + replay_loss, rel=1e-4)
    assert [value > 0 for value in logged(trainer, "replay_loss")] == [stage > 0 for stage in stages]


def test_the_plan_of_stages():
    def plan(latents=2, max_steps=-1, epochs=0.0, **fields):
        training_args = VedasTrainingArguments("unused", num_train_epochs=epochs, max_steps=max_steps, use_cpu=True)
        stages = plan_stages(ScriptArguments("m", "d", **fields), training_args, latents)
        return stages, training_args.num_train_epochs

    assert plan() == ([0, 1, 2], 12.0)
    assert plan(stages=[1, 0, 2], epochs_per_stage=3) == ([1, 0, 2], 9.0)
    assert plan(latents=0) == ([0], 4.0)
    assert plan(epochs=9.0) == ([0, 1, 2], 9.0)
    assert plan(epochs=1.0, max_steps=5)[1] == 1.0
    for stages in ([0, 1], [0, 3], [3, 2], [-1, 2], []):
        with pytest.raises(ValueError, match=r"`stages` must lie within 0 and `num_latent_steps` \(2\)"):
            plan(stages=stages)
    with pytest.raises(ValueError, match="`epochs_per_stage`"):
        plan(epochs_per_stage=0)
    with pytest.raises(ValueError, match=r"`num_train_epochs` \(8.0\) ends before the last of 3 stages of 4"):
        plan(epochs=8.0)


def test_without_latent_steps_the_rationale_stays(folder, data, tmp_path, processor):
    trainer = train(folder, data, tmp_path, num_latent_steps=0, max_steps=1)
    sample = ReasoningSample([], "q", ["a", "b"], "x", "1")
    batch = trainer.data_collator([sample])
    assert "a b\nThe answer is" in processor.tokenizer.decode(batch["input_ids"][0])
    with pytest.raises(ValueError, match="`rationale_steps` must be >= 1, got 0"):
        train(folder, data, tmp_path, rationale_steps=0)


@pytest.fixture
def before(monkeypatch) -> dict[str, torch.Tensor]:
    """The weights of the last run as it began."""
    weights = {}

    def keep(self, args, state, control, model=None, **kwargs):
        weights.clear()
        weights.update({name: value.detach().clone() for name, value in model.named_parameters()})

    monkeypatch.setattr(Curriculum, "on_train_begin", keep)
    return weights


def moved(trainer, before) -> set[str]:
    after = dict(trainer.model.named_parameters())
    assert after.keys() == before.keys()
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("frozen", [False, True])
def test_one_step_moves_every_weight(folder, data, tmp_path, before, frozen):
    trainer = train(
        folder, data, tmp_path, stages=[2], max_steps=1, per_device_train_batch_size=6, freeze_vision=frozen
    )
    still = {name for name in before if name.startswith("model.model.visual.") and frozen}
    assert moved(trainer, before) == before.keys() - still
    for name in ("score.weight", "score.bias", "depth_scale"):
        assert f"model.model.language_model.layers.0.router.{name}" in before
    assert [name for name in before if name.startswith("objective.")]
    start = load(folder).state_dict()
    assert all(torch.equal(value, start[name[6:]]) for name, value in before.items() if name[:6] == "model.")


def test_lora_moves_adapters_routers_and_the_predictor(folder, data, tmp_path, before, monkeypatch):
    monkeypatch.setattr(training_model, "save_trained", lambda trainer: None)  # which merges
    # Two steps, since an adapter's A has no gradient before its B has moved.
    trainer = train(folder, data, tmp_path, stages=[2], max_steps=2, per_device_train_batch_size=6, **LORA)
    expected = {name for name in before if "lora_" in name or ".modules_to_save." in name or name[:10] == "objective."}
    assert moved(trainer, before) == expected
    trained = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert trained == expected
    adapted = {name.split(".lora_")[0].split(".layers.")[1] for name in expected if "lora_A" in name}
    assert len(adapted) == 3 * 7 and not [name for name in expected if "visual" in name]
    routers = {name.split(".router.")[1] for name in expected if ".router." in name}
    assert routers == {f"modules_to_save.default.{name}" for name in ("score.weight", "score.bias", "depth_scale")}


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "save_steps, killed_at, settings",
    [
        (4, 5, {}),
        (4, 5, LORA),
        (3, 4, LORA),  # saved between two epochs
        (2, 3, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}),
    ],
    ids=["full", "lora", "lora-epoch-end", "accumulated"],
)
def test_killed_and_resumed_equals_uninterrupted(folder, data, tmp_path, monkeypatch, save_steps, killed_at, settings):
    settings = {"save_strategy": "steps", "save_steps": save_steps, "seed": 5} | settings
    monkeypatch.setattr(training_model, "save_trained", lambda trainer: None)
    whole = train(folder, data, tmp_path / "whole", **settings)
    assert logged(whole, "stage") == [0, 0, 0, 1, 1, 1, 2, 2, 2]

    def kill(self, args, state, control, **kwargs):
        if state.global_step == killed_at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Curriculum, "on_step_end", kill)
        with pytest.raises(Killed):
            train(folder, data, tmp_path / "cut", **settings)
    saved = killed_at // save_steps * save_steps
    good, half = tmp_path / "cut" / f"checkpoint-{saved}", tmp_path / "cut" / f"checkpoint-{saved + 10}"
    shutil.copytree(good, half)
    (half / "trainer_state.json").unlink()
    next(half.glob("*.safetensors")).write_bytes(b"half")
    torn = tmp_path / "cut" / f"checkpoint-{saved + 20}"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"epoch": 1')
    assert last_complete_checkpoint(tmp_path / "cut") == str(good)
    resumed = train(folder, data, tmp_path / "cut", resume_from_checkpoint="last", **settings)
    assert logged(resumed, "stage") == logged(whole, "stage")
    for name in ("loss", "ce_loss", "replay_loss"):
        assert logged(resumed, name) == pytest.approx(logged(whole, name), abs=1e-6)
    expected, actual = state_of(whole), state_of(resumed)
    assert actual.keys() == expected.keys() and any(name.startswith("objective.") for name in actual)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("limits", [{"max_steps": 4}, {}], ids=["max_steps", "epochs"])
def test_a_run_that_was_at_its_end_takes_no_further_step(folder, data, tmp_path, monkeypatch, limits):
    """`max_steps` within an epoch, where transformers would begin it again; and the same command gives the same files."""
    settings = {"save_strategy": "steps", "save_steps": 2, "stages": [2], "resume_from_checkpoint": "last"} | limits
    whole = train(folder, data, tmp_path, **settings)
    files = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    files |= {path: path.read_bytes() for path in tmp_path.glob("training/*")}
    steps = []
    monkeypatch.setattr(LatentTrainer, "training_step", lambda *args, **kwargs: steps.append(args))
    again = train(folder, data, tmp_path, **settings)
    assert not steps and again.state.global_step == whole.state.global_step == len(logged(whole, "loss"))
    assert len(files) == 2 and all(path.read_bytes() == content for path, content in files.items())


def test_a_model_is_saved_with_its_config_last(folder, data, tmp_path, monkeypatch):
    """A recipe takes a folder with a config for a stage that is done."""

    def killed(*args, **kwargs):
        assert not (tmp_path / "config.json").exists()
        raise Killed

    train(folder, data, tmp_path, max_steps=1, stages=[2])
    before = {path.name for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(training_model, "record_answers", lambda folder: (folder / "config.json").stat())
        patch.setattr(training_model.LatentTrainer, "save_whole", killed)
        (tmp_path / "config.json").unlink()
        with pytest.raises(Killed):
            train(folder, data, tmp_path, max_steps=1, stages=[2])
    assert not (tmp_path / "config.json").exists()
    train(folder, data, tmp_path, max_steps=1, stages=[2])
    assert {path.name for path in tmp_path.iterdir()} == before


def test_the_last_checkpoint_is_the_one_of_most_steps(tmp_path):
    for step in (9, 10, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_last_without_a_checkpoint_starts_anew(folder, data, tmp_path):
    assert last_complete_checkpoint(tmp_path / "gone") is None
    trainer = train(folder, data, tmp_path, max_steps=1, resume_from_checkpoint="last")
    assert trainer.state.global_step == 1


def test_the_output_is_a_checkpoint_and_the_objective_lies_apart(folder, data, tmp_path, batch):
    out = tmp_path / "out"
    trainer = train(folder, data, out, stages=[2], max_steps=2)
    whole = trainer.model
    stored = load_file(out / OBJECTIVE_FILE)
    assert stored.keys() == whole.objective.state_dict().keys() and len(stored) == 4
    assert all(torch.equal(value, stored[name]) for name, value in whole.objective.state_dict().items())
    names = [name for file in out.glob("*.safetensors") for name in load_file(file)]
    assert names and not [name for name in names if "replay_predictor" in name or "objective" in name]
    expected = logits_of(whole.model, batch)
    assert (expected - logits_of(load(folder), batch)).abs().max() > 1e-2
    assert_near(logits_of(load(out), batch), expected)
    assert load(out).check_known_answers().worst < 0.5  # recorded at the end of training
    loaded = AutoProcessor.from_pretrained(out, trust_remote_code=True)
    assert loaded.tokenizer.get_vocab() == trainer.processing_class.tokenizer.get_vocab()

    again = train(out, data, tmp_path / "again", max_steps=1, learning_rate=0.0)
    assert all(torch.equal(value, stored[name]) for name, value in again.model.objective.state_dict().items())
    for predictor in ("linear", "pointwise_conv"):  # other names, other shapes
        with pytest.raises(ValueError, match="objective.safetensors does not fit the objective"):
            train(out, data, tmp_path / "wrong", max_steps=1, replay_predictor=predictor)


def test_lora_is_merged_into_the_output(folder, data, tmp_path, batch, monkeypatch):
    peft, seen = pytest.importorskip("peft"), {}

    def save(trainer, save_trained=training_model.save_trained):
        seen["logits"] = logits_of(trainer.model.model, batch)
        save_trained(trainer)

    monkeypatch.setattr(training_model, "save_trained", save)
    train(folder, data, tmp_path, stages=[2], max_steps=3, learning_rate=1e-2, **LORA)
    assert (seen["logits"] - logits_of(load(folder), batch)).abs().max() > 1e-2
    assert_near(logits_of(load(tmp_path), batch), seen["logits"], 1e-4)  # sums in another order
    assert load(tmp_path).check_known_answers().worst < 0.5
    adapted = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter")
    assert_near(logits_of(adapted, batch), seen["logits"])
    names = load_file(tmp_path / "model.safetensors").keys()
    assert names and not [name for name in names if "lora_" in name or "modules_to_save" in name]


@pytest.mark.parametrize("settings", [{}, LORA], ids=["full", "lora"])
def test_evaluation_and_the_best_model(folder, data, tmp_path, monkeypatch, settings):
    """A learning rate at which the first step is the best one."""
    monkeypatch.setattr(training_model, "save_trained", lambda trainer: None)
    trainer = train(
        folder,
        data,
        tmp_path,
        stages=[2],
        max_steps=3,
        learning_rate=0.5,
        eval_data_path=str(data),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=3,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        **settings,
    )
    losses, terms = logged(trainer, "eval_loss"), [logged(trainer, f"eval_{name}_loss") for name in ("ce", "replay")]
    assert len(losses) == 3 and len(logged(trainer, "ce_loss")) == 3
    for loss, ce_loss, replay_loss in zip(losses, *terms, strict=True):
        assert loss == pytest.approx(ce_loss + replay_loss, rel=1e-4) and replay_loss > 0
    best = 1 + losses.index(min(losses))
    assert best < 3
    fresh = train(folder, data, tmp_path / "fresh", stages=[2], max_steps=1, learning_rate=0.0, **settings)
    fresh._load_from_checkpoint(str(tmp_path / f"checkpoint-{best}"))
    actual = state_of(trainer)
    for name, value in state_of(fresh).items():
        assert torch.equal(actual[name], value), name
    stored, last = (load_file(tmp_path / f"checkpoint-{step}" / OBJECTIVE_FILE) for step in (best, 3))
    for name, value in trainer.model.objective.state_dict().items():
        assert torch.equal(value, stored[name]) and not torch.equal(value, last[name])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-4)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, Path]:
    """A backbone of random weights turned into Vedas, and procedural questions."""
    folder = tmp_path_factory.mktemp("small")
    questions = write_dataset("color", 8, 0, folder / "data", image_size=112)
    backbone = write_backbone(texts_of(questions), folder / "backbone", 64, 2, 400)
    overrides = {
        "num_latent_steps": 2,
        "num_replay_tokens": 4,
        "routed_layers": [0],
        "num_routed_tokens": 8,
        "num_routed_step_tokens": 3,
    }
    return convert_vedas(backbone, folder / "vedas", overrides=overrides), questions


def test_the_loss_falls_through_all_stages(small, tmp_path):
    """With a vision tower that stays: while one trains from nothing, the target of the crop branch grows with it."""
    settings = {"per_device_train_batch_size": 8, "learning_rate": 3e-3, "freeze_vision": True}
    trainer = train(*small, tmp_path, epochs_per_stage=10, **settings)
    stages = logged(trainer, "stage")
    assert sorted(set(stages)) == [0, 1, 2]
    for name, stage in (("loss", 0), ("loss", 1), ("loss", 2), ("ce_loss", 1), ("ce_loss", 2), ("replay_loss", 1)):
        losses = [loss for loss, at in zip(logged(trainer, name), stages) if at == stage]
        assert len(losses) == 10 and sum(losses[-3:]) < 0.8 * sum(losses[:3]), (name, stage, losses)


def test_the_command(small, tmp_path):
    """In bfloat16, with adapters, crops, checkpointing and gradient dynamics, then once more from where it was."""
    model, questions = small
    flags = f"""--model_path {model} --data_path {questions} --output_dir {tmp_path} --lora --lora_r 4 --bf16 --use_cpu
        --attn_implementation sdpa --stages 0 2 --epochs_per_stage 1 --per_device_train_batch_size 4 --logging_steps 1
        --save_strategy steps --save_steps 2 --gradient_checkpointing --gradient_dynamics_steps 1 --report_to none
        --replay_predictor linear --backprop_through_latents False --resume_from_checkpoint last --learning_rate 1e-2"""
    run = subprocess.run(
        [sys.executable, "-m", "train.train_vedas", *flags.split()],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert [entry["stage"] for entry in state["log_history"]] == [0, 0, 2, 2]
    assert all(math.isfinite(entry["loss"]) for entry in state["log_history"])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "gradient_dynamics.csv").is_file() and (tmp_path / "gradient_dynamics.png").is_file()
    assert load_file(tmp_path / OBJECTIVE_FILE).keys() == {"replay_predictor.0.weight", "replay_predictor.0.bias"}
    before, after = load(model), load(tmp_path)
    assert after.config.num_latent_steps == 2 and after.dtype == torch.float32
    changed = [name for name, value in before.state_dict().items() if not torch.equal(after.state_dict()[name], value)]
    assert len([name for name in changed if "_proj" in name]) == 2 * 7
    assert {name.split(".layers.")[1].split(".")[1] for name in changed} == {"self_attn", "mlp", "router"}


def test_a_bad_line_stops_the_run_before_it_starts(folder, data, tmp_path):
    bad = tmp_path / "data.jsonl"
    bad.write_text('{"question": "q", "rationale": ["a"], "answer": ""}\n')
    with pytest.raises(ValueError, match="Line 1 of .*`answer`"):
        train(folder, bad, tmp_path / "out")
    with pytest.raises(ValueError, match="Line 1 of .*`answer`"):
        train(folder, data, tmp_path / "out", eval_data_path=str(bad))
    assert not (tmp_path / "out").exists()
