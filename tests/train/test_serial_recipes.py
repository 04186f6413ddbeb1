"""The recipes of serial questions: what arms share, what is missing, rates, the table, and the slow whole."""

import json
import shlex

import pytest
from test_recipes import parses
from transformers import HfArgumentParser

from evaluation.faithfulness import __main__ as faithfulness
from evaluation.faithfulness import run as faithfulness_run
from train import train_lare, train_vedas
from train.common.stages import StageArguments
from train.data.small_tokenizer import texts_of, train_tokenizer
from train.data.tasks import write_dataset
from train.lare.objective import LatentLossArguments
from train.recipes import serial_recipes
from train.recipes.serial import qwen
from train.recipes.serial.arms import ARMS, Model
from train.recipes.serial.plan import STEPS, Place, Stage, change_option, draw_again, option, serial_data, shrink
from train.recipes.serial.rates import choose_rate, missing_choices, models_of, models_there, read_chosen, try_rates
from train.recipes.serial.scoring import D1_ARMS, DIAGNOSTICS, fresh_scores, report_model, score_model
from train.recipes.serial.table import AS_IS, MANY, collect, draw, measure
from train.recipes.serial_recipes import describe_missing, stages_of


def write_lines(path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def value(command: str, flag: str) -> str:
    words = shlex.split(command)
    return words[words.index(flag) + 1]


def last_training(place: Place, name: str) -> str:
    return ARMS[name].build(place)[-1].command


@pytest.mark.parametrize("name", list(ARMS))
def test_commands_are_what_the_scripts_take_and_read_what_is_made(name, tmp_path):
    place = Place(tmp_path, "hops", 3)
    stages = stages_of(place, [Model(name)])
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
    alone = {name: {stage.made for stage in stages_of(place, [Model(name)])} for name in ARMS}
    together = [stage.made for stage in stages_of(place, [Model(name) for name in ARMS])]
    assert len(together) == len(set(together)) == len(set().union(*alone.values()))
    trained = {name: f"{place.folder}/{name}/config.json" for name in ARMS}
    for name in ("vedas", "direct", "shorter"):
        assert trained["words"] in alone[name]
    assert trained["words"] not in alone["direct_from_nothing"] | alone["direct_deep"] | alone["at_once"]
    # Twins differ from Vedas in what is learned, not in the pictures or the most that a stage takes.
    by_name = {
        name: next(one.command for one in stages_of(place, [Model(name)]) if one.made == trained[name])
        for name in ARMS
    }
    for name in ("direct", "shorter", "pauses"):
        for flag in ("--data_path", "--eval_data_path", "--model_path", "--seed", "--stage_accuracy"):
            assert value(by_name[name], flag) == value(by_name["vedas"], flag)
    # The tokens that all steps replay are in the picture: 16 of 112 pixels.
    (converted,) = (one.command for one in stages_of(place, [Model("vedas")]) if "convert_vedas" in one.command)
    overrides = dict(word.split("=") for word in shlex.split(converted) if "=" in word)
    assert int(overrides["num_latent_steps"]) * int(overrides["num_replay_tokens"]) <= 16
    seeds = [stages_of(Place(tmp_path, "hops", seed), [Model("vedas")]) for seed in (0, 1)]
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
    epochs = train_lare.plan_curriculum(args, stage_args, training_args, STEPS)
    stage_args.prepare(training_args, len(epochs), has_eval_data=True)
    assert args.curriculum[-1] == (0 if name == "lare_words" else STEPS)
    assert (args.stage == 4) == ARMS[name].has_latents == (losses.hidden_windows > 0) == args.start_delimiters


def test_what_is_missing_and_what_it_takes(tmp_path):
    (tmp_path / "a").touch()
    stages = [Stage(str(tmp_path / name), "c", minutes) for name, minutes in (("a", 5.0), ("b", 1.5), ("c", 2.0))]
    *lines, total = describe_missing(stages).splitlines()
    assert [line.rpartition("/")[2] for line in lines] == ["b", "c"]
    assert total == "  3.5 minutes of one CPU thread for 2 of 3 commands"


@pytest.mark.parametrize("name", list(ARMS))
def test_twins_are_asked_as_they_were_trained(name, tmp_path):
    """A LaRe that was trained without latents would take refocusing steps in `generate`; pauses stand below every question."""
    place = Place(tmp_path, "hops", 0)
    as_is = score_model(place, Model(name))[0].command
    is_lare_without = ARMS[name].backbone == "clip" and not ARMS[name].has_latents
    assert ("--latents off" in as_is) == is_lare_without
    tried = [stage.command for stage in try_rates(place, name) if stage.command.startswith("evaluation.evaluate")]
    assert len(tried) == 3
    for command in (as_is, *tried):
        assert ("--instruction" in command) == ("--instruction" in last_training(place, name))
        assert ("--latents off" in command) == is_lare_without


def test_pauses_are_as_many_tokens_as_latent_steps(tmp_path):
    for task in ("hops", "arrows", "trace"):
        texts = texts_of(write_dataset(task, 8, 0, tmp_path / task, image_size=112))
        ids = train_tokenizer(texts, 600)(qwen.PAUSES, add_special_tokens=False)["input_ids"]
        assert len(set(ids)) == len(ids) == STEPS
        assert not set(qwen.PAUSES) & set("".join(texts))


def test_an_instruction_stands_below_the_questions_of_a_training(tmp_path):
    data = str(write_dataset("hops", 2, 0, tmp_path / "data", image_size=112))
    args = train_vedas.ScriptArguments("model", data, eval_data_path=data, instruction="@^")
    for samples in train_vedas.read_data(args, StageArguments(), 0):
        assert [sample.question.partition("?")[2] for sample in samples] == ["\n@^", "\n@^"]
    plain, _ = train_vedas.read_data(train_vedas.ScriptArguments("model", data), StageArguments(), 0)
    assert all(sample.question.endswith("?") for sample in plain)


def test_budgets_and_rates_change_nothing_but_what_they_name(tmp_path):
    place = Place(tmp_path, "hops", 0)
    direct, twice = (last_training(place, name) for name in ("direct", "direct_twice"))
    assert option(twice, "--epochs_per_stage") == ["24", "60", "28", "28", "12"]
    back = change_option(twice, "--epochs_per_stage", lambda counts: [str(int(count) // 2) for count in counts])
    assert change_option(back, "--output_dir", lambda _: [f"{place.folder}/direct"]) == direct
    trained = [
        stage for stage in try_rates(place, "direct") if "/rates/direct-" in stage.made and parses(stage.command)
    ]
    assert [value(stage.command, "--learning_rate") for stage in trained] == ["3e-4", "1e-4", "1e-3"]
    assert {tuple(option(stage.command, "--epochs_per_stage")) for stage in trained} == {("3", "8", "4", "4", "2")}
    assert sum(stage.minutes for stage in trained) == pytest.approx(0.75 * ARMS["direct"].build(place)[-1].minutes)
    small = shrink(ARMS["direct"].build(place)[-1], 0.01).command
    assert option(small, "--epochs_per_stage") == ["1"] * 5 and option(small, "--samples_per_epoch") == ["32"]
    assert option(shrink(serial_data(place)[0], 0.01).command, "--n") == ["60"]


def test_only_trace_asks_from_every_start_and_fresh_pictures_are_of_another_seed(tmp_path):
    """In `trace` a start has one number of moves, so that its pictures would give one question each to learn from."""
    for task, questions in (("hops", "steps"), ("arrows", "steps"), ("trace", "all")):
        place = Place(tmp_path, task, 0)
        asked = [value(stage.command, "--questions") for stage in serial_data(place)]
        assert asked == [questions, questions, "one"]
    fresh = draw_again(place, 7)
    assert fresh.made == f"{tmp_path}/fresh7/data.jsonl"
    assert [value(fresh.command, flag) for flag in ("--seed", "--split", "--questions")] == ["7", "test", "one"]
    assert value(fresh.command, "--output") == f"{tmp_path}/fresh7"
    # The folders of answers are no model's: a converted Vedas of 4 layers lies in `fresh4`.
    models = [stage.made for name in ARMS for stage in ARMS[name].build(place)]
    for seed in (4, 8):
        (scored,) = score_model(place, Model("direct"), **fresh_scores(seed))
        assert not any(scored.made.startswith(f"{made.rpartition('/')[0]}/") for made in models)


def write_score(place: Place, name: str, accuracy: float) -> None:
    folder = place.folder / "rates" / "scores" / name
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"all": {"accuracy": accuracy}}))


def test_the_best_rate_counts_for_all_seeds_and_for_the_doubled_budget(tmp_path):
    place, other = (Place(tmp_path, "hops", seed) for seed in (0, 1))
    for rate, accuracy in (("3e-4", 0.5), ("1e-4", 0.4), ("1e-3", 0.7)):
        write_score(place, f"direct-{rate}", accuracy)
    for rate in ("3e-4", "1e-4", "1e-3"):
        write_score(place, f"vedas-{rate}", 0.9)
    names = ["direct", "direct_twice", "vedas"]
    assert missing_choices(place, names) == ["direct", "vedas"]
    assert choose_rate(place, "direct") == "1e-3" and choose_rate(place, "vedas") == "3e-4"  # equals: its own
    assert missing_choices(place, names) == [] and read_chosen(tmp_path)["direct"]["accuracy"]["1e-4"] == 0.4
    models = models_of(other, names, has_choice=True)
    assert [model.name for model in models] == ["direct-1e-3", "direct_twice-1e-3", "vedas"]
    assert models_of(other, names, has_choice=False) == [Model(name) for name in names]
    trained = models[1].build(other)[-1]
    assert trained.made == f"{other.folder}/direct_twice-1e-3/config.json"
    assert option(trained.command, "--learning_rate") == ["1e-3"]
    assert option(trained.command, "--epochs_per_stage") == ["24", "60", "28", "28", "12"]
    for folder in ("direct", "direct-1e-3", "vedas-9"):
        write_lines(other.folder / folder / "config.json", [])
    assert models_there(other, list(ARMS)) == [Model("direct"), Model("direct", "1e-3")]


NEEDS = [1, 2, 3, 4] * 3


def write_results(place: Place, name: str, right: list[int], folder: str = "scores", **more) -> None:
    """Results of 12 questions, of which those with a need in `right` are answered correctly."""
    rows = [
        {
            "id": str(number),
            "correct": need in right,
            "num_tokens": 9,
            "num_latent_blocks": 4,
            "num_latents": 4,
            "stop_reason": "eos",
            "seconds": 0.1,
            **more,
        }
        for number, need in enumerate(NEEDS)
    ]
    write_lines(place.folder / folder / name / "results.jsonl", rows)
    write_lines(place.folder / folder / name / "summary.json", [])
    model = name.partition("-")[0]
    write_lines(place.folder / model / "config.json", [])


def write_questions(place: Place, split: str = "test") -> None:
    rows = [{"id": str(number), "rationale": ["a"] * need, "chance": 0.125} for number, need in enumerate(NEEDS)]
    write_lines(place.output / split / "data.jsonl", rows)


def test_the_table_counts_by_number_of_moves(tmp_path):
    place = Place(tmp_path, "hops", 0)
    write_questions(place)
    write_results(place, "words", [1, 4])
    log = [{"loss": 1.0}, {"begins_stage": 0, "epoch": 2, "step": 100}]
    (place.folder / "words" / "trainer_state.json").write_text(json.dumps({"log_history": log, "global_step": 150}))
    spent = [
        (f"{place.folder}/words/config.json", 120),
        (place.data("train"), 60),
        ("of another arm", 600),
        (f"{place.folder}/rates/words-3e-4/config.json", 30),
    ]
    write_lines(tmp_path / "times.jsonl", [{"made": made, "cpu_seconds": seconds} for made, seconds in spent])
    one = measure(place, Model("words"))
    groups = one["answers"][AS_IS]
    assert {name: (group["accuracy"], group["rows"]) for name, group in groups.items()} == {
        "1": (1, 3),
        "2": (0, 3),
        "3": (0, 3),
        "4": (1, 3),
        MANY: (0.5, 6),
        "all": (0.5, 12),
    }
    assert all(group["accuracy_low"] < group["accuracy_high"] for group in groups.values())
    assert one["stages_began"] == [[0, 100]] and one["steps"] == 150 and one["chance"] == 0.125
    costs = [one[name] for name in ("cpu_minutes", "cpu_minutes_from_nothing", "cpu_minutes_of_rates")]
    assert costs == [2, 3, 0.5]


def test_the_table_has_twins_donors_fresh_draws_and_seeds(tmp_path):
    places = [Place(tmp_path, "hops", seed) for seed in (0, 1)]
    for split in ("test", "fresh7"):
        write_questions(places[0], split)
    for place, right in zip(places, ([1, 2, 3, 4], [1, 2, 3])):
        write_results(place, "vedas", right)
        write_results(place, "direct", [1])
    donor = {"donor_id": "5", "follows_donor": True, "follow_chance": 0.25, "same_answer": False}
    write_results(places[0], "vedas-swap", [], **donor)
    write_results(places[1], "vedas-swap", [])  # of an earlier version
    write_results(places[0], "shorter", [1, 3])
    write_results(places[0], "lare_direct-off", [1, 2, 3, 4])
    write_results(places[0], "lare_words", [1, 2, 3, 4])  # asked with latents that it never had: counts for nothing
    write_results(places[0], "vedas", [1, 2], "scores-fresh7")
    table = collect(places, list(ARMS))
    assert table["seeds"]["0"].keys() == {"vedas", "direct", "shorter", "lare_direct"}
    swap = table["seeds"]["0"]["vedas"]["answers"]["swap"]["all"]
    assert (swap["follows_donor"], swap["follow_chance"], swap["accuracy"]) == (1, 0.25, 0)
    assert table["seeds"]["0"]["vedas"]["fresh"]["7"][AS_IS]["all"]["accuracy"] == 0.5
    # Vedas: 100 and 50 % over k >= 3; shorter: 50 %, direct: none. The twin of another backbone does not count.
    assert table["above the best direct twin"] == {"vedas": {"twin": "shorter", "points": 25, "twin_accuracy": 0.5}}
    json.dumps(table)
    text = draw(table)
    assert "| vedas | 2 | 100.0 (100.0 to 100.0) |" in text and "87.5 (75.0 to 100.0)" in text
    assert "100.0 (75.8 to 100.0), by chance 25.0" in text and "seed 7: 50.0 (25.4 to 74.6)" in text
    assert "- vedas: +25.0 points from the best direct twin, shorter (50.0), over k >= 3." in text
    rows = [line for line in text.splitlines() if line.startswith("| vedas | 3e-4")]
    assert len(rows) == 2 and len({row.count("|") for row in rows}) == 1


def test_the_report_is_of_models_with_latents_and_its_notes_are_in_the_table(tmp_path):
    place = Place(tmp_path, "hops", 0)
    assert report_model(place, Model("direct")) == []
    (stage,) = report_model(place, Model("vedas"))
    module, *words = shlex.split(stage.command)
    options = faithfulness.build_parser().parse_args(words)
    assert module == "evaluation.faithfulness" and f"{options.output}/faithfulness.json" == stage.made
    assert set(options.diagnostics) == set(DIAGNOSTICS) <= set(faithfulness_run.DIAGNOSTICS)
    assert set(options.arms) == set(D1_ARMS) <= set(faithfulness.ARMS)
    write_questions(place)
    write_results(place, "vedas", [1])
    found = faithfulness_run.Result("D14", "t", "d", tables={"accuracy": [{"n": 1}]}, notes=["a staircase"])
    path = place.folder / "report" / "vedas" / "faithfulness.json"
    write_lines(path, [{"about": {}, "diagnostics": {"D14": found.record()}}])
    table = collect([place], ["vedas"])
    assert table["seeds"]["0"]["vedas"]["report"]["D14"]["tables"] == {"accuracy": [{"n": 1}]}
    assert "- vedas, seed 0, D14: a staircase" in draw(table)


def test_a_report_can_take_some_diagnostics(monkeypatch):
    made = {
        name: (name, lambda study, name=name: faithfulness_run.Result(name, name, "")) for name in ("D1", "D2", "D3")
    }
    monkeypatch.setattr(faithfulness_run, "DIAGNOSTICS", made)
    assert [one.name for one in faithfulness_run.take_all(None, (), names=("D3", "D1"))] == ["D1", "D3"]
    with pytest.raises(ValueError, match=r"`diagnostics` must be of .*, got \['D99'\]"):
        faithfulness.main(["--model", "m", "--data", "d", "--output", "o", "--diagnostics", "D1", "D99"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "0"], "`scale` must be above 0 and at most 1, got 0.0"),
        (["--fresh-seed", "0"], "`fresh_seed` must be >= 1"),
        (["--table"], "has none of these arms and seeds"),
    ],
)
def test_bad_input(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        serial_recipes.main(["--output", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_a_plan_makes_nothing_and_knows_the_task_of_its_folder(tmp_path, capsys):
    (tmp_path / "recipe.json").write_text(json.dumps({"task": "trace", "recipe": "serial"}))
    arguments = [
        "--output",
        str(tmp_path),
        "--arms",
        "direct",
        "direct_twice",
        "--rates",
        "--fresh-seed",
        "3",
        "--plan",
    ]
    serial_recipes.main(arguments)
    listed = capsys.readouterr().out.splitlines()
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]
    for made in ("rates/direct-1e-4/config.json", "direct_twice/config.json", "scores-fresh3/direct/summary.json"):
        assert any(line.endswith(f"{tmp_path}/seed0/{made}") for line in listed)
    assert not any("rates/direct_twice" in line for line in listed)


@pytest.mark.slow
def test_the_whole_recipe_in_small(tmp_path):
    output = tmp_path / "out"
    arguments = ["--output", str(output), "--arms", "vedas", "pauses", "--scale", "0.003", "--fresh-seed", "3"]
    serial_recipes.main(arguments)
    models = json.loads((output / "table.json").read_text())["seeds"]["0"]
    assert models.keys() == {"vedas", "pauses"}
    assert (
        models["vedas"]["answers"].keys() == {AS_IS, "swap", "zero", "noise"} == models["vedas"]["fresh"]["3"].keys()
    )
    assert models["vedas"]["cpu_minutes"] > 0 and models["vedas"]["steps"] == 10
    assert models["pauses"]["answers"][AS_IS]["all"]["latents"] == 0
    assert (output / "table.md").read_text().startswith("# `hops`")
    files = {path: path.stat().st_mtime for path in output.rglob("config.json")}
    serial_recipes.main(arguments)  # nothing is made again
    assert files == {path: path.stat().st_mtime for path in output.rglob("config.json")}
