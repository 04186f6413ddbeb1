"""The recipes: their commands are ones that the scripts take, what is made is not made again, and the slow whole."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from evaluation_material import save_checkpoint, write_jsonl

from conversion.dataclass_parser import DataclassParser
from train import train_deeplatent_rl, train_lare, train_vedas
from train.common.stages import StageArguments
from train.data.tasks.families import tasks_of
from train.deeplatent import sft
from train.deeplatent.rl.progress import first_and_last_quarter
from train.lare.objective import LatentLossArguments
from train.recipes import ablations
from train.recipes import small_models as recipes
from train.recipes.hardware import hardware
from train.vedas.crop_distillation import ReplayArguments


PARSERS = {
    "train.train_vedas": (
        train_vedas.ScriptArguments,
        ReplayArguments,
        train_vedas.VedasTrainingArguments,
        StageArguments,
    ),
    "train.train_lare": (
        train_lare.ScriptArguments,
        LatentLossArguments,
        train_lare.LaReTrainingArguments,
        StageArguments,
    ),
}


@pytest.mark.parametrize("name", sorted(recipes.RECIPES))
def test_commands_are_what_the_scripts_take(name, tmp_path):
    build, trained = recipes.RECIPES[name]
    commands = build(tmp_path, "color", 1.0)
    assert Path(commands[-1][0]).parent == tmp_path / trained
    assert (
        sum(parses(command) for _, command in commands)
        == {"deeplatent": 3, "lare": 5, "lare_blind": 5, "vedas": 2}[name]
    )
    commands = build(tmp_path, "search_color", 1.0)
    assert (
        sum(parses(command) for _, command in commands)
        == {"deeplatent": 3, "lare": 5, "lare_blind": 5, "vedas": 2}[name]
    )
    made = [made for made, _ in commands]
    read = {word for _, command in commands for word in command.split() if word.endswith("data.jsonl")}
    assert read <= set(made)  # what a command reads, one before it made


@pytest.mark.parametrize("task", ["color", "search_color", "shapes", recipes.TASK])
def test_rewards_are_for_questions_that_sft_has_not_shown(task, tmp_path):
    commands = [shlex.split(command) for _, command in recipes.RECIPES["deeplatent"][0](tmp_path, task, 1.0)]
    value = lambda words, flag: words[words.index(flag) + 1]  # noqa: E731
    stages = {value(words, "--stage"): words for words in commands if "--stage" in words}
    sets = {value(words, "--output"): words for words in commands if words[0] == "train.data.tasks"}
    read = {stage: str(Path(value(words, "--data_path")).parent) for stage, words in stages.items()}
    assert read["sft1"] == read["sft2"] != read["rl"]
    assert value(sets[read["rl"]], "--split") == "train"
    assert value(sets[read["rl"]], "--seed") != value(sets[read["sft1"]], "--seed")
    asked, seen = (value(sets[read[stage]], "--task") for stage in ("rl", "sft1"))
    assert ":" not in asked and set(tasks_of(asked)) == set(tasks_of(seen))
    # Towers see as much whatever the task: a pretraining of 18,000 pictures instead of 30,000 cost 20 points.
    (vision,) = (words for words in commands if words[0] == "train.recipes.vision_pretraining")
    teach = {str(Path(word).parent) for word in vision if word.endswith("data.jsonl")}
    pictures = sum(int(value(sets[folder], "--n")) for folder in teach) * int(value(vision, "--epochs"))
    assert pictures == pytest.approx(recipes.PICTURES_SEEN, rel=0.1)


def test_blind_answers_begin_with_the_first_stage_behind_stage_0(tmp_path):
    """What it saves, the later stages read; stage 0 is shared with `lare`, whose answers see the picture."""
    commands = [command for _, command in recipes.RECIPES["lare_blind"][0](tmp_path, "color", 1.0)]
    trained = [shlex.split(command) for command in commands if command.startswith("train.train_lare ")]
    assert [words[words.index("--stage") + 1] for words in trained] == ["0", "1", "2", "3", "4"]
    changed = [words[words.index("--config_overrides") + 1 :] for words in trained if "--config_overrides" in words]
    assert changed == [["answer_sees_image=false"]] and "--config_overrides" in trained[1]
    assert sum("config_overrides" in command for command in commands) == 1
    assert not any("config_overrides" in command for _, command in recipes.RECIPES["lare"][0](tmp_path, "color", 1.0))


@pytest.mark.parametrize("name", ["deeplatent", "vedas"])
def test_the_larger_variant_differs_in_backbone_and_rates(name, tmp_path):
    build, _ = recipes.RECIPES[name]
    small, large = (build(tmp_path, "color", 1.0, language) for language in ("small", "smollm2"))
    assert all(parses(command) or "train_" not in command for _, command in large)
    changed = [(one, two) for (_, one), (_, two) in zip(small, large, strict=True) if one != two]
    assert changed[0][1] == f"conversion.fetch_assets --output {tmp_path}/backbone"
    assert changed[1:] and all(
        "--learning_rate 0.001" in one and "--learning_rate 0.0001" in two for one, two in changed[1:2]
    )
    assert len(changed) == {"deeplatent": 3, "vedas": 3}[name]  # RL has its own rate


def parses(command: str) -> bool:
    """Whether it is a command of a training script; what the script does not take is an error of its parser."""
    module, *arguments = shlex.split(command)
    arguments.append("--use_cpu")
    if module == "train.train_deeplatent":
        if "rl" in arguments:
            arguments.remove("--stage")
            arguments.remove("rl")
            DataclassParser(train_deeplatent_rl.ARGUMENTS).parse_args_into_dataclasses(arguments)
        else:
            sft.build_parser().parse_args_into_dataclasses(arguments)
    elif module in PARSERS:
        DataclassParser(PARSERS[module]).parse_args_into_dataclasses(arguments)
    else:
        return False
    return True


@pytest.mark.parametrize("name", list(ablations.VARIANTS))
def test_ablations_are_what_the_scripts_take(name, tmp_path):
    folder, [(made, command)] = ablations.commands(
        name, tmp_path, tmp_path / "seed0", 0, "--max_steps 2", "--max_steps 1"
    )
    assert Path(made).parent == folder and parses(command)
    data = "questions" if "GRPO" in name else "train"
    assert f"--data_path {tmp_path}/{data}/data.jsonl " in command


def test_ablations_run_what_they_need_and_tabulate(tmp_path, monkeypatch):
    for needed in ("sft1/config.json", "train/data.jsonl", "questions/data.jsonl", "test/data.jsonl"):
        (tmp_path / needed).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / needed).touch()
    trained = []

    def train(todo):
        trained.append(Path(todo[0][0]).parent.name)
        Path(todo[0][0]).parent.mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(ablations, "run", train)
    monkeypatch.setattr(ablations, "score", lambda *arguments: {"latents": len(trained) / 10, "no latents": 0.1})
    ablations.main(
        ["--base", str(tmp_path), "--output", str(tmp_path / "out"), "--seeds", "0", "1", "--variants", "joint GRPO"]
    )
    assert trained == ["full", "joint-GRPO"] * 2
    table = (tmp_path / "out" / "ablations.md").read_text()
    assert (
        "| full | 20.0 ± 14.1 | 10.0 ± 0.0 | 2 |" in table and "| joint GRPO | 30.0 ± 14.1 | 10.0 ± 0.0 | 2 |" in table
    )
    with pytest.raises(ValueError, match="train.recipes deeplatent"):
        ablations.main(["--base", str(tmp_path / "no"), "--output", str(tmp_path / "out")])


def test_what_is_there_is_not_made_again(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(recipes.subprocess, "run", lambda command, check: ran.append(command[2:]))
    (tmp_path / "made").touch()
    recipes.run([(str(tmp_path / "made"), "a --x 1"), (str(tmp_path / "other"), "b --y '2 3'")])
    assert ran == [["b", "--y", "2 3"]]


def test_a_folder_is_gone_on_with_by_what_began_it_alone(tmp_path, monkeypatch):
    recipes.remember(tmp_path, task="color", scale=1.0, language="small")
    recipes.remember(tmp_path, task="color", scale=1.0, language="small")
    monkeypatch.setattr("sys.argv", ["recipes", "lare", "--output", str(tmp_path)])
    with pytest.raises(ValueError, match="was begun with .*'color'.*, not with .*search_color:4,jigsaw"):
        recipes.main()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(recipes.RECIPES))
def test_a_recipe_runs_from_nothing(name, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipes", name, "--output", str(tmp_path), "--scale", "0.004"])
    recipes.main()
    scores = json.loads((tmp_path / f"{name}-scores.json").read_text())
    further = {"before RL"} if name == "deeplatent" else set()
    assert set(scores) == {"latents", "noise", "swap", "no latents", "constant"} | further


def test_a_command_is_taken_down_with_what_it_ran_on(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes.subprocess, "run", lambda command, check: None)
    (tmp_path / "there").touch()
    commands = [(str(tmp_path / "there"), "train.data.tasks"), (str(tmp_path / "made"), "train.data.tasks --n 2")]
    recipes.run(commands, tmp_path / "times.jsonl")
    (line,) = map(json.loads, (tmp_path / "times.jsonl").read_text().splitlines())
    assert line["made"] == str(tmp_path / "made") and line["seconds"] >= 0
    assert line["hardware"] == hardware() and torch.__version__ in line["hardware"]


def test_progress_compares_quarters_of_the_steps_that_sampled():
    earned = [0.1, 0.3, 0.9, 0.9, 0.9, 0.9, 0.5, 0.7]
    history = [entry for value in earned for entry in ({"reward": value}, {"loss": 0.0})]
    first, last = first_and_last_quarter(history)
    assert first == pytest.approx((0.2, 0.1)) and last == pytest.approx((0.6, 0.1))
    assert str(first) == "0.200 ± 0.100"
    with pytest.raises(ValueError, match="At least 8 steps with 'reward' are needed, got 7"):
        first_and_last_quarter(history[2:])


def test_scores_need_no_block_opened_at_the_same_time(tmp_path):
    """The model's own "swap" refuses a row that opens a block alone, such as the 33rd of batches of 32."""
    rows = [json.loads(line) for line in write_jsonl(tmp_path, 33).read_text().splitlines()]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    model = save_checkpoint("vedas", tmp_path / "model")
    # Every task of these questions has one answer, so that nobody has a donor.
    assert recipes.score(model, tmp_path / "data.jsonl", names=("swap",))["swap"] is None
    rows = [row | {"task": "all"} for row in rows]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = recipes.score(model, tmp_path / "data.jsonl", names=("swap",))
    assert 0 <= found["swap"] <= 1 and found["constant"] == 11 / 33
