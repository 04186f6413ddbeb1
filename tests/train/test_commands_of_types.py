"""A command of one architecture refuses the checkpoint of another with one line, before it reads data or weights."""

import json
import subprocess
import sys

import pytest

from configuration_latentvlm import ARCHITECTURES
from conversion.own_models import check_model_type
from train.recipes import small_models as recipes


@pytest.mark.parametrize("wanted", ARCHITECTURES)
@pytest.mark.parametrize("found", ARCHITECTURES)
def test_another_architecture_is_refused(wanted, found):
    if wanted == found:
        return check_model_type(f"checkpoints/{found}", wanted)
    for trust in (False, True):
        command = f"python -m train.train_{found}"
        with pytest.raises(ValueError, match=f"must be a checkpoint of type {wanted!r}, got {found!r}.*{command}"):
            check_model_type(f"checkpoints/{found}", wanted, trust)


def test_a_stock_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    with pytest.raises(ValueError, match="got 'qwen2_5_vl'"):
        check_model_type(tmp_path, "vedas")
    check_model_type(tmp_path, "vedas", trust_remote_code=True)


COMMANDS = {
    "train.train_vedas": ("deeplatent", ["--model_path", "--data_path", "--output_dir"]),
    "train.train_lare --stage 2": ("vedas", ["--model_path", "--data_path", "--output_dir"]),
    "train.train_deeplatent --stage rl": ("vedas", ["--model_path", "--data_path", "--output_dir"]),
    "train.train_deeplatent --stage sft1": ("lare", ["--model_path", "--data_path", "--output_dir"]),
    "train.cache_teacher_states": ("lare", ["--model", "--data", "--output"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_ask(command, tmp_path):
    """They got as far as an AttributeError of the config."""
    found, names = COMMANDS[command]
    given = [f"checkpoints/{found}", "data.jsonl", str(tmp_path / "out")]
    words = [*command.split(), *(word for pair in zip(names, given) for word in pair)]
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: checkpoints/{found} must be a checkpoint of type")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [["--task", "nope"], ["--scale", "0"], ["--scale", "nan"]], ids=str)
def test_a_recipe_checks_its_settings_before_it_binds_the_folder(wrong, tmp_path, monkeypatch):
    """It trained a vision tower first, and the folder then refused every other task."""
    monkeypatch.setattr(sys, "argv", ["recipes", "lare", "--output", str(tmp_path / "out"), *wrong])
    monkeypatch.setattr(recipes, "run", lambda *_: pytest.fail("ran"))
    with pytest.raises((ValueError, SystemExit)):
        recipes.main()
    assert not (tmp_path / "out").exists()
