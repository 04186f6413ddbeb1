"""The examples run as written, on a tiny checkpoint: asking, fine-tuning, LoRA."""

import os
import sys

import pytest
import torch
from conftest import build_model, encode, picture, user_turn
from helpers import step_logits, vision
from torch.testing import assert_close
from transformers import AutoModel

from train.tasks import write_dataset


TRAINING = {"max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 3e-3, "use_cpu": True, "seed": 0}


@pytest.fixture(scope="module")
def checkpoint(tokenizer, processor, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    build_model(tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tasks")
    return str(write_dataset("color", 4, 0, folder / "data", image_size=112))


def test_asking_prints_the_answer_and_draws(checkpoint, tmp_path, monkeypatch, capsys):
    from examples import ask

    picture(112, 112).save(tmp_path / "photo.png")
    trace = tmp_path / "trace.png"
    arguments = [checkpoint, str(tmp_path / "photo.png"), "what?", "--min-blocks", "2", "--draw", str(trace)]
    monkeypatch.setattr(sys, "argv", ["ask", *arguments])
    ask.main()
    printed = capsys.readouterr().out
    assert "Answer: " in printed and "blocks: " in printed and trace.stat().st_size > 1000


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_finetuning_learns_and_the_checkpoint_loads_again(checkpoint, data, processor, tmp_path):
    from examples.finetune import finetune

    trainer = finetune(checkpoint, data, str(tmp_path / "tuned"), **TRAINING)
    found = losses(trainer)
    assert sum(found[-2:]) < 0.8 * sum(found[:2])
    again = AutoModel.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    assert (tmp_path / "tuned" / "chat_template.jinja").is_file()


def test_lora_trains_loads_and_merges(checkpoint, data, processor, tmp_path):
    from examples.lora import merge_adapter, train_adapter

    trainer = train_adapter(checkpoint, data, str(tmp_path / "adapter"), **TRAINING)
    found = losses(trainer)
    assert sum(found[-2:]) < sum(found[:2])
    merged = merge_adapter(checkpoint, str(tmp_path / "adapter"), str(tmp_path / "merged"))
    inputs = encode(processor, [user_turn("what?", picture(112, 112))])
    settings = {"max_new_tokens": 4, "min_latent_blocks": 1, "return_dict_in_generate": True, "output_logits": True}
    adapted = step_logits(trainer.model.eval().generate(**inputs, do_sample=False, **settings))
    assert_close(step_logits(merged.generate(**inputs, do_sample=False, **settings)), adapted, atol=1e-4, rtol=1e-4)
    again = AutoModel.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert_close(step_logits(again.generate(**inputs, do_sample=False, **settings)), adapted, atol=1e-4, rtol=1e-4)
    base = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
    assert (
        base(inputs["input_ids"], **vision(inputs)).logits - again(inputs["input_ids"], **vision(inputs)).logits
    ).abs().max() > 1e-3


def test_the_demo_answers_in_english(capsys, monkeypatch, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    from conversion.fetch_assets import find_cache_root, is_complete
    from examples import demo

    if not is_complete(find_cache_root() / "smollm2-135m-qwen2_5_vl"):
        pytest.skip("the demo's language weights are not cached: run `make demo` once")
    monkeypatch.setattr(demo, "TRACE", tmp_path / "trace.png")
    monkeypatch.setattr(demo, "PHOTO", os.path.abspath(demo.PHOTO))
    demo.main()
    printed = capsys.readouterr().out
    assert "Answer: The animal in the picture is a" in printed
    assert "blocks: 1" in printed and "untrained" in printed
    assert (tmp_path / "trace.png").stat().st_size > 1000
