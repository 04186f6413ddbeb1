"""Modules of version 0.1 under their old names: the same objects, and `python -m` runs them."""

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import train
from train import MOVED, MOVED_ATTRIBUTES, new_name


ROOT = Path(__file__).resolve().parents[2]
# They read arguments of other libraries or need a harness when they are imported.
NOT_HERE = {"train.adapters"}
OLD_ATTRIBUTES = {
    "train.data": ("TrajectoryCollator", "collator_for", "fit_grid", "question_image_sizes", "read_trajectories"),
    "train.recipes": ("RECIPES", "IMAGE_SIZE", "run", "remember", "score"),
}


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_name_gives_the_same_module(old, monkeypatch):
    monkeypatch.setattr(train, "WARNED", set())
    for name in [name for name in sys.modules if name == old or name.startswith(f"{old}.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.warns(FutureWarning, match=f"`{old}` is called `{MOVED[old]}`"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(MOVED[old])
    assert module.__spec__.name == module.__name__ == MOVED[old]


def test_modules_inside_of_a_moved_package_are_found():
    with warnings.catch_warnings(action="ignore"):
        from train.faithfulness import arms
        from train.tasks.sample import Sample
    assert arms is importlib.import_module("evaluation.faithfulness.arms")
    assert Sample is importlib.import_module("train.data.tasks.sample").Sample


def test_every_moved_module_is_there_and_no_old_file_is():
    for old, new in MOVED.items():
        assert importlib.util.find_spec(new) is not None, new
        path = ROOT / old.replace(".", "/")
        assert not path.with_suffix(".py").exists() and not list(path.glob("*.py")), old


@pytest.mark.parametrize("package", sorted(MOVED_ATTRIBUTES))
def test_what_a_module_held_whose_name_is_a_package_now(package, monkeypatch):
    monkeypatch.setattr(train, "WARNED", set())
    module = importlib.import_module(package)
    for name in OLD_ATTRIBUTES[package]:
        with pytest.warns(FutureWarning, match=f"`{package}.{name}` is called"):
            assert getattr(module, name).__module__ != package if callable(getattr(module, name)) else True
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_other_names_are_left_alone():
    assert new_name("train.train_vedas") is new_name("train.tasksome") is new_name("json") is None
    with pytest.raises(ModuleNotFoundError, match="train.tasksome"):
        importlib.import_module("train.tasksome")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("train.tasks.nothing_of_the_kind")


@pytest.mark.parametrize("old", ["train.evaluate", "train.tasks", "train.checkpoints"])
def test_old_commands_run(old):
    command = [sys.executable, "-m", old, "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert ended.returncode == 0 and "usage:" in ended.stdout, ended.stderr
    assert f"`{old}` is called `{MOVED[old]}`" in ended.stderr
