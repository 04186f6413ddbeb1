"""The comparison: its twins are trained by commands that the scripts take, from what a recipe leaves."""

import shlex
from pathlib import Path

import pytest
from test_recipes import parses

from train.recipes import small_models as recipes
from train.recipes.comparison import Run, arms_of, twin_commands


@pytest.mark.parametrize("model", sorted(recipes.RECIPES))
def test_twins_can_be_trained_where_this_model_alone_was(model, tmp_path):
    """Every folder that a twin starts from is left by the model's own recipe, or made by a command before."""
    made = {Path(file).parent for file, _ in recipes.RECIPES[model][0](tmp_path, "color", 1.0)}
    for name in ("direct", "text reasoning"):
        folder = tmp_path / arms_of(model)[name].folder
        if folder in made:
            continue
        commands = twin_commands(folder.name, Run(tmp_path, "color", 1.0, "small"))
        assert Path(commands[-1][0]).parent == folder and parses(commands[-1][1])
        there = set(made)
        for file, command in commands:
            words = shlex.split(command)
            for flag in ("--model_path", "--backbone"):
                if flag in words:
                    assert Path(words[words.index(flag) + 1]) in there
            there.add(Path(file).parent)
