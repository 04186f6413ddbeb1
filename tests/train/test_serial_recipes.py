"""The recipes of serial questions: what arms share, what is missing, the table, and the slow whole."""

import json
import shlex
import sys

import pytest
from test_recipes import parses
from transformers import HfArgumentParser

from train import train_lare
from train.common.stages import StageArguments
from train.lare.objective import LatentLossArguments
from train.recipes import serial_recipes
from train.recipes.serial_recipes import ARMS, Place, Stage, describe_missing, stages_of, summarize


def write_lines(path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def value(command: str, flag: str) -> str:
    words = shlex.split(command)
    return words[words.index(flag) + 1]


@pytest.mark.parametrize("name", list(ARMS))
def test_commands_are_what_the_scripts_take_and_read_what_is_made(name, tmp_path):
    place = Place(tmp_path, "hops", 3)
    stages = stages_of(place, [name])
    trained = [stage for stage in stages if parses(stage.command)]
    assert trained[-1].made == str(place.folder / name / "config.json")
    made = set()
    for stage in stages:
        words = shlex.split(stage.command)
        read = {
            f"{value(stage.command, flag)}/config.json" for flag in ("--model_path", "--backbone") if flag in words
        }
        assert read <= made and {word for word in words if word.endswith("data.jsonl")} <= made
        made.add(stage.made)
    assert all(value(stage.command, "--seed") == "3" for stage in trained)
    kinds = [value(one.command, "--latent_intervention") for one in stages if "--latent_intervention" in one.command]
    assert kinds == (["swap", "zero", "noise"] if ARMS[name].has_latents else [])


def test_arms_share_data_backbone_and_words(tmp_path):
    place = Place(tmp_path, "hops", 0)
    alone = {name: {stage.made for stage in stages_of(place, [name])} for name in ARMS}
    together = [stage.made for stage in stages_of(place, list(ARMS))]
    assert len(together) == len(set(together)) == len(set().union(*alone.values()))
    trained = {name: f"{place.folder}/{name}/config.json" for name in ARMS}
    for name in ("vedas", "direct", "shorter"):
        assert trained["words"] in alone[name]
    assert trained["words"] not in alone["direct_from_nothing"] | alone["direct_deep"] | alone["at_once"]
    # Twins differ from Vedas in what is learned, not in the pictures or the most that a stage takes.
    by_name = {
        name: next(one.command for one in stages_of(place, [name]) if one.made == trained[name]) for name in ARMS
    }
    for name in ("direct", "shorter"):
        for flag in ("--data_path", "--eval_data_path", "--model_path", "--seed", "--stage_accuracy"):
            assert value(by_name[name], flag) == value(by_name["vedas"], flag)
    # The tokens that all steps replay are in the picture: 16 of 112 pixels.
    (converted,) = (one.command for one in stages_of(place, ["vedas"]) if "convert_vedas" in one.command)
    overrides = dict(word.split("=") for word in shlex.split(converted) if "=" in word)
    assert int(overrides["num_latent_steps"]) * int(overrides["num_replay_tokens"]) <= 16
    seeds = [stages_of(Place(tmp_path, "hops", seed), ["vedas"]) for seed in (0, 1)]
    shared = {one.made for one in seeds[0]} & {one.made for one in seeds[1]}
    assert shared == {place.data(split) for split in ("train", "val", "test")}


@pytest.mark.parametrize("name", [name for name in ARMS if name.startswith("lare")])
def test_curricula_of_lare_fit_its_stages_and_end_without_words(name, tmp_path):
    place = Place(tmp_path, "hops", 0)
    (command,) = (one.command for one in ARMS[name].build(place) if one.made == f"{place.folder}/{name}/config.json")
    kinds = (
        train_lare.ScriptArguments,
        LatentLossArguments,
        train_lare.LaReTrainingArguments,
        StageArguments,
    )
    words = [*shlex.split(command)[1:], "--use_cpu"]
    args, losses, training_args, stage_args = HfArgumentParser(kinds).parse_args_into_dataclasses(words)
    epochs = train_lare.plan_curriculum(args, stage_args, training_args, serial_recipes.STEPS)
    stage_args.prepare(training_args, len(epochs), has_eval_data=True)
    assert args.curriculum[-1] == (0 if name == "lare_words" else serial_recipes.STEPS)
    assert (args.stage == 4) == ARMS[name].has_latents == (losses.hidden_windows > 0) == args.start_delimiters


def test_what_is_missing_and_what_it_takes(tmp_path):
    (tmp_path / "a").touch()
    stages = [Stage(str(tmp_path / name), "c", minutes) for name, minutes in (("a", 5.0), ("b", 1.5), ("c", 2.0))]
    *lines, total = describe_missing(stages).splitlines()
    assert [line.rpartition("/")[2] for line in lines] == ["b", "c"]
    assert total == "  3.5 minutes of one CPU thread for 2 of 3 commands"


def test_the_table_counts_by_number_of_moves(tmp_path):
    place = Place(tmp_path, "hops", 0)
    rows = [{"id": str(number), "rationale": ["a"] * (1 + number % 2)} for number in range(6)]
    write_lines(tmp_path / "test" / "data.jsonl", rows)
    results = [{"id": str(number), "correct": number in (0, 2, 1)} for number in range(6)]
    folder = place.folder / "scores" / "words"
    write_lines(folder / "results.jsonl", results)
    (place.folder / "words").mkdir()
    log = [{"loss": 1.0}, {"begins_stage": 0, "epoch": 2, "step": 100}]
    (place.folder / "words" / "trainer_state.json").write_text(json.dumps({"log_history": log, "global_step": 150}))
    spent = [(f"{place.folder}/words/config.json", 120), (place.data("train"), 60), ("of another arm", 600)]
    write_lines(tmp_path / "times.jsonl", [{"made": made, "cpu_seconds": seconds} for made, seconds in spent])
    (arm,) = summarize(place, ["words"]).values()
    shares = {group: (values[0], values[3]) for group, values in arm["accuracy"]["words"].items()}
    assert shares == {"1": (2 / 3, 3), "2": (1 / 3, 3), "all": (0.5, 6)}
    assert all(low < share < high for share, low, high, _ in arm["accuracy"]["words"].values())
    assert arm["stages_began"] == [[0, 100]] and arm["steps"] == 150
    assert arm["cpu_minutes"] == 2 and arm["cpu_minutes_from_nothing"] == 3
    assert "1  66.7  2  33.3  all  50.0" in serial_recipes.draw({"words": arm})


@pytest.mark.slow
def test_the_whole_recipe_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(serial_recipes, "PICTURES", {"train": 16, "val": 2, "test": 8})
    monkeypatch.setattr(serial_recipes, "LONG", "--epochs_per_stage 1")
    short = serial_recipes.TRAINING.replace("samples_per_epoch 800", "samples_per_epoch 16")
    monkeypatch.setattr(serial_recipes, "TRAINING", short)
    arguments = ["serial_recipes", "--output", str(tmp_path / "out"), "--arms", "vedas", "direct"]
    monkeypatch.setattr(sys, "argv", arguments)
    serial_recipes.main()
    scores = json.loads((tmp_path / "out" / "seed0" / "scores.json").read_text())
    assert scores.keys() == {"vedas", "direct"}
    assert scores["vedas"]["accuracy"].keys() == {"vedas", "vedas-swap", "vedas-zero", "vedas-noise"}
    assert scores["vedas"]["cpu_minutes"] > 0 and scores["vedas"]["steps"] == 5
    files = {path: path.stat().st_mtime for path in (tmp_path / "out").rglob("config.json")}
    serial_recipes.main()  # nothing is made again
    assert files == {path: path.stat().st_mtime for path in (tmp_path / "out").rglob("config.json")}
