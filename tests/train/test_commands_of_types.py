"""A command of one architecture refuses the checkpoint of another with one line, before it reads data or weights."""

import json
import sys

import pytest

from train import cache_teacher_states, recipes, train_deeplatent_rl, train_lare, train_vedas
from train.deeplatent import sft
from train.own_models import OWN_TYPES, check_model_type


MODULES = {
    sft: "deeplatent",
    cache_teacher_states: "deeplatent",
    train_deeplatent_rl: "deeplatent",
    train_lare: "lare",
    train_vedas: "vedas",
}


@pytest.mark.parametrize("wanted", OWN_TYPES)
@pytest.mark.parametrize("found", OWN_TYPES)
def test_another_architecture_is_refused(wanted, found):
    if wanted == found:
        return check_model_type(f"checkpoints/{found}", wanted)
    for trust in (False, True):
        with pytest.raises(ValueError, match=f"must be a checkpoint of type {wanted!r}, got {found!r}"):
            check_model_type(f"checkpoints/{found}", wanted, trust)


def test_a_stock_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    with pytest.raises(ValueError, match="got 'qwen2_5_vl'"):
        check_model_type(tmp_path, "vedas")
    check_model_type(tmp_path, "vedas", trust_remote_code=True)


@pytest.mark.parametrize("command", [train_vedas, train_lare, cache_teacher_states], ids=lambda one: one.__name__)
def test_the_commands_ask(command, tmp_path):
    """They got as far as an AttributeError of the config, or into the data."""
    given = ["checkpoints/deeplatent", "data.jsonl", str(tmp_path / "out")]
    names = ["--model_path", "--data_path", "--output_dir"]
    if command is cache_teacher_states:
        given[0], names = "checkpoints/lare", ["--model", "--data", "--output"]
    stage = ["--stage", "2"] if command is train_lare else []
    arguments = [word for pair in zip(names, given) for word in pair] + stage
    with pytest.raises(ValueError, match=f"must be a checkpoint of type {MODULES[command]!r}"):
        command.main(*command.PARSER.parse_args_into_dataclasses(arguments))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [["--task", "nope"], ["--scale", "0"], ["--scale", "nan"]], ids=str)
def test_a_recipe_checks_its_settings_before_it_binds_the_folder(wrong, tmp_path, monkeypatch):
    """It trained a vision tower first, and the folder then refused every other task."""
    monkeypatch.setattr(sys, "argv", ["recipes", "lare", "--output", str(tmp_path / "out"), *wrong])
    monkeypatch.setattr(recipes, "run", lambda *_: pytest.fail("ran"))
    with pytest.raises((ValueError, SystemExit)):
        recipes.main()
    assert not (tmp_path / "out").exists()
