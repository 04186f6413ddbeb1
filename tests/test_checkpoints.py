"""What ships: weights that are what their hash says, that load as folders of the Hub do, and know what their cards say."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoProcessor

from train import checkpoints, comparison, recipes
from train.checkpoints import CHECKPOINTS, LARGEST, read_sums, ship, shipped
from train.tasks import write_dataset


NAMES = sorted(read_sums(CHECKPOINTS))


def test_what_ships_has_a_recipe():
    assert NAMES and set(NAMES) <= set(recipes.RECIPES)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_loads_elsewhere_and_answers_better_than_chance(name, tmp_path):
    """On 32 new pictures of another seed, in a process that knows nothing of this repository."""
    folder = shipped(name)
    assert (folder / "model.safetensors").stat().st_size <= LARGEST
    assert "## What it scores" in (folder / "README.md").read_text(encoding="utf-8")
    data = write_dataset("search_color", 32, 77, tmp_path / "data", "test", recipes.IMAGE_SIZE)
    assert recipes.score(folder, data, ("latents",))["latents"] >= 0.5  # chance is 0.125
    code = (
        "import torch; from transformers import AutoModel; "
        f"model = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True); "
        "assert model.dtype == torch.bfloat16 and 'transformers_modules' in type(model).__module__"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_missing_or_changed_weights_are_named_with_what_brings_them_back(tmp_path):
    with pytest.raises(ValueError, match=r"There is no checkpoint 'lare'.*make train-lare"):
        shipped("lare", tmp_path)
    (tmp_path / "lare").mkdir()
    (tmp_path / "lare" / "model.safetensors").write_bytes(b"other")
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  lare/model.safetensors\n")
    with pytest.raises(ValueError, match=r"is not what was shipped: its sha256 is [0-9a-f]{64}, SHA256SUMS says 0+\."):
        shipped("lare", tmp_path)


def test_shipping_needs_a_recipe_that_came_to_its_end(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="holds no trained model: run `python -m train.recipes lare"):
        ship("lare", tmp_path, "color", tmp_path)


def test_shipped_weights_are_those_of_the_recipe_in_bfloat16(tmp_path, monkeypatch):
    from test_lare import build

    build().save_pretrained(tmp_path / "run" / "lare-stage4")
    source = shipped(NAMES[0]) if NAMES else None
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    monkeypatch.setattr(checkpoints.AutoProcessor, "from_pretrained", lambda *args, **kwargs: processor)
    made = f"{tmp_path / 'run'}/lare-stage4/config.json"
    (tmp_path / "run" / "times.jsonl").write_text(json.dumps({"made": made, "seconds": 90.0}) + "\n")
    (tmp_path / "run" / "lare.md").write_text("| scores |\n")
    target = ship("lare", tmp_path / "run", "search_color", tmp_path / "out")
    card = (target / "README.md").read_text(encoding="utf-8")
    assert "in 2 minutes" in card and "| scores |" in card
    model = AutoModel.from_pretrained(shipped("lare", tmp_path / "out"), trust_remote_code=True)
    expected = build().to(torch.bfloat16).state_dict()
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def summary(right: int) -> dict:
    numbers = {"accuracy": right / 4, "accuracy_low": 0.1, "accuracy_high": 0.9, "answer_tokens": 9.0, "latents": 8.0}
    return {"all": numbers, "tasks": {"jigsaw": numbers}}


def test_the_comparison_asks_every_arm_and_trains_missing_twins(tmp_path, monkeypatch):
    ran, trained = [], []
    (tmp_path / "lare-stage4").mkdir()
    (tmp_path / "lare-stage4" / "config.json").touch()
    (tmp_path / "lare-stage0").mkdir()
    (tmp_path / "lare-stage0" / "config.json").touch()

    def evaluate(command, check):
        ran.append(command)
        folder = tmp_path / "scores" / "lare" / command[command.index("--output") + 1].rsplit("/", 1)[1]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text(json.dumps(summary(len(ran) % 5)))

    monkeypatch.setattr(comparison.subprocess, "run", evaluate)
    monkeypatch.setattr(comparison, "run", lambda commands, times: trained.extend(commands))
    comparison.main(["--run", str(tmp_path), "--models", "lare"])
    assert [made for made, _ in trained] == [f"{tmp_path}/clip-direct/config.json"]
    models = [command[command.index("--model") + 1].rsplit("/", 1)[1] for command in ran]
    assert models == ["lare-stage4"] * 4 + ["clip-direct", "lare-stage0"]
    assert [command[command.index("--latents") + 1] for command in ran if "--latents" in command] == ["off"] * 3
    table = (tmp_path / "comparison.md").read_text()
    assert "| lare | as trained | 25.0 (10.0 to 90.0) | 9.0 | 8.0 |" in table and "| lare | text reasoning |" in table
    with pytest.raises(SystemExit):
        comparison.main(["--run", str(tmp_path), "--models", "vedas"])


def test_twins_are_trained_by_commands_that_the_scripts_take(tmp_path):
    from test_recipes import parses

    for folder in ("clip-direct", "qwen-direct", "qwen-text"):
        *_, (made, command) = comparison.twin_commands(folder, tmp_path, 1.0)
        assert made == f"{tmp_path}/{folder}/config.json" and parses(command)
