"""The recipes: their commands are ones that the scripts take, what is made is not made again, and the slow whole."""

import json
import shlex
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from train import recipes, train_lare, train_vedas
from train.lare.objective import LatentLossArguments
from train.replay import ReplayArguments


PARSERS = {
    "train.train_vedas": (train_vedas.ScriptArguments, ReplayArguments, train_vedas.VedasTrainingArguments),
    "train.train_lare": (train_lare.ScriptArguments, LatentLossArguments, train_lare.LaReTrainingArguments),
}


@pytest.mark.parametrize("name", sorted(recipes.RECIPES))
def test_commands_are_what_the_scripts_take(name, tmp_path):
    build, trained, _ = recipes.RECIPES[name]
    commands = build(tmp_path, "color", 1.0)
    assert Path(commands[-1][0]).parent == tmp_path / trained
    parsed = 0
    for _, command in commands:
        module, *arguments = shlex.split(command)
        if module in PARSERS:
            HfArgumentParser(PARSERS[module]).parse_args_into_dataclasses([*arguments, "--use_cpu"])
            parsed += 1
    assert parsed == {"vedas": 1, "lare": 4}[name]


def test_what_is_there_is_not_made_again(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(recipes.subprocess, "run", lambda command, check: ran.append(command[2:]))
    (tmp_path / "made").touch()
    recipes.run([(str(tmp_path / "made"), "a --x 1"), (str(tmp_path / "other"), "b --y '2 3'")])
    assert ran == [["b", "--y", "2 3"]]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(recipes.RECIPES))
def test_a_recipe_runs_from_nothing(name, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipes", name, "--output", str(tmp_path), "--scale", "0.004"])
    recipes.main()
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores) == {"latents", "noise", "swap", "no steps", "constant"}
