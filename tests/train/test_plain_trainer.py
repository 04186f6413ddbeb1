"""`transformers.Trainer` by itself resumes, and loads the best model, of every architecture: nothing stays as it was."""

import copy

import pytest
import torch
from conftest import shake
from helpers import CHECKPOINTING, assert_near
from shipped import CLASSES, encode_rows, load, load_shaken, question, training_batch
from transformers import Trainer, TrainerCallback, TrainingArguments


ALL = pytest.mark.parametrize("name", list(CLASSES))
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    CHECKPOINTING: False,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "save_strategy": "steps",
    "save_steps": 1,
    "remove_unused_columns": False,
    "seed": 3,
}


def make_trainer(name: str, model, processor, folder, **settings) -> Trainer:
    batch = training_batch(name, processor)
    arguments = TrainingArguments(str(folder), **{**SETTINGS, **settings})
    return Trainer(
        model, arguments, train_dataset=[0, 1], eval_dataset=[0, 1], data_collator=lambda rows: copy.copy(batch)
    )


def differing(one, other: dict) -> list[str]:
    return [name for name, values in one.state_dict().items() if not torch.equal(values, other[name])]


@ALL
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    model, processor = load_shaken(name)
    start = copy.deepcopy(model)
    make_trainer(name, model, processor, tmp_path / "whole", max_steps=2).train()
    resumed = shake_otherwise(start)
    trainer = make_trainer(name, resumed, processor, tmp_path / "resumed", max_steps=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert differing(resumed, model.state_dict()) == []


def shake_otherwise(model):
    """Other weights everywhere, so that each one that is not restored shows."""
    with torch.no_grad():
        for values in model.parameters():
            values.add_(0.01)
    return model


class Worsen(TrainerCallback):
    """After the first checkpoint, which so stays the best."""

    def on_save(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            self.best = {name: values.clone() for name, values in model.state_dict().items()}
            with torch.no_grad():
                for values in model.parameters():
                    values.mul_(3)


@ALL
def test_the_best_model_is_loaded_whole(name, tmp_path):
    model, processor = load_shaken(name)
    trainer = make_trainer(
        name, model, processor, tmp_path, max_steps=3, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1
    )
    worsen = Worsen()
    trainer.add_callback(worsen)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert differing(model, worsen.best) == []


@ALL
def test_a_sharded_checkpoint_is_resumed_too(name, tmp_path):
    model, processor = load_shaken(name)
    make_trainer(name, model, processor, tmp_path, max_steps=1).train()
    folder = tmp_path / "checkpoint-1"
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    other = shake_otherwise(copy.deepcopy(model))
    trainer = make_trainer(name, other, processor, tmp_path / "again", max_steps=1)
    trainer.train(resume_from_checkpoint=str(folder))
    assert differing(other, model.state_dict()) == []


@pytest.mark.parametrize("name", ["deeplatent", "vedas"])
def test_both_names_of_a_weight_are_understood_and_no_third(name, tmp_path):
    model = load(name)
    state = model.state_dict()
    hub = {
        key.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1): value
        for key, value in state.items()
    }
    assert hub.keys() != state.keys()
    for names in (state, hub):
        other = shake(copy.deepcopy(model))
        assert other.load_state_dict(names) == ([], [])  # strict: neither missing nor unexpected
        assert differing(other, state) == []
    assert hub.keys() & {"visual.patch_embed.proj.weight", "model.norm.weight"}  # the caller's own dict is left alone
    wrong = {**hub, "model.unknown.weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="model.language_model.unknown.weight"):
        model.load_state_dict(wrong)


@ALL
def test_loaded_again_the_run_gives_the_same_logits(name, tmp_path):
    model, processor = load_shaken(name)
    make_trainer(name, model, processor, tmp_path, max_steps=1).train()
    inputs = encode_rows(processor, [question("what?", 1)], add_generation_prompt=True)
    with torch.no_grad():
        assert_near(load(name, tmp_path / "checkpoint-1")(**inputs).logits, model.eval()(**inputs).logits)
