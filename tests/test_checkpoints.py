"""What ships: weights that are what their hash says, that load as folders of the Hub do, and know what their cards say."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import run_strictly
from safetensors.torch import save
from transformers import AutoModel, AutoProcessor

from configuration_latentvlm import ARCHITECTURES
from configuration_latentvlm.hub_code import flat_code
from evaluation.loading import hash_model
from modeling_latentvlm.known_answers import FILE, FOLDER, KnownAnswers, digest_content, load_tensors, read_metadata
from train.data.tasks import write_dataset
from train.recipes import comparison, serial_card
from train.recipes import shipping as checkpoints
from train.recipes import small_models as recipes
from train.recipes.shipping import CHECKPOINTS, LARGEST, MOST, SERIAL, WEIGHTS, read_sums, ship, ship_serial, shipped


NAMES = sorted(read_sums(CHECKPOINTS))
SERIAL_NAMES = sorted(read_sums(CHECKPOINTS / SERIAL))
PLACES = [*NAMES, *(f"{SERIAL}/{name}" for name in SERIAL_NAMES)]  # of both sets, below CHECKPOINTS
TASKS = {"search_color": 0.5, "jigsaw": 0.45}  # least accuracy; chance is 0.125 and 0.25
SERIAL_TASKS = {"hops": 0.8}  # chance is 0.125


def set_of(place: str) -> tuple[Path, str]:
    """(the folder of a checkpoint's set, its name there)."""
    return (CHECKPOINTS / place).parent, Path(place).name


def test_what_ships_has_a_recipe():
    assert NAMES and set(NAMES) <= set(recipes.RECIPES)
    assert SERIAL_NAMES and set(SERIAL_NAMES) <= set(ARCHITECTURES)


def test_all_that_ships_is_small():
    """It is in git, and comes with every clone."""
    files = [path for path in CHECKPOINTS.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    known = {CHECKPOINTS / place / WEIGHTS for place in PLACES}
    assert {path for path in files if path.suffix == ".safetensors" and path.name == WEIGHTS} == known
    assert sum(path.stat().st_size for path in files) <= MOST


@pytest.mark.core
@pytest.mark.parametrize("name", PLACES)
def test_a_checkpoint_loads_elsewhere_and_answers_better_than_chance(name, tmp_path):
    """On 32 new questions of either kind and of another seed, and in a process that knows nothing of this repository."""
    place, name = set_of(name)
    folder = shipped(name, place)
    assert (folder / "model.safetensors").stat().st_size <= LARGEST
    assert "## What it scores" in (folder / "README.md").read_text(encoding="utf-8")
    for task, least in (SERIAL_TASKS if place.name == SERIAL else TASKS).items():
        data = write_dataset(task, 32, 77, tmp_path / task, "test", recipes.IMAGE_SIZE)
        assert recipes.score(folder, data, ("latents",))["latents"] >= least
    code = (
        "import torch; from transformers import AutoModel; "
        f"model = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True); "
        "assert model.dtype == torch.bfloat16 and 'transformers_modules' in type(model).__module__"
    )
    run_strictly("-c", code, cwd=tmp_path)


def test_missing_or_changed_weights_are_named_with_what_brings_them_back(tmp_path):
    with pytest.raises(ValueError, match=r"There is no checkpoint 'lare'.*make train-lare"):
        shipped("lare", tmp_path)
    (tmp_path / "lare").mkdir()
    (tmp_path / "lare" / "model.safetensors").write_bytes(b"other")
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  lare/model.safetensors\n")
    with pytest.raises(ValueError, match=r"is not what was shipped: its sha256 is [0-9a-f]{64}, SHA256SUMS says 0+\."):
        shipped("lare", tmp_path)


@pytest.mark.parametrize("name", PLACES)
def test_every_file_that_answers_follow_from_is_held_to_its_hash(name, tmp_path):
    place, name = set_of(name)
    tmp_path = tmp_path / place.name
    shutil.copytree(place, tmp_path, ignore=shutil.ignore_patterns("__pycache__", SERIAL))
    held = {path.relative_to(tmp_path / name).as_posix() for path in (tmp_path / name).rglob("*") if path.is_file()}
    files = sorted(held - {"README.md"})
    assert sorted(read_sums(place)[name]) == files
    assert {"config.json", "known_answers/answers.safetensors", f"modeling_{name}.py"} <= set(files)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert shipped(name, tmp_path) == tmp_path / name
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    for file in files:
        path = tmp_path / name / file
        path.write_bytes(before[path] + b" ")
        with pytest.raises(ValueError, match=f"{name}/{file} is not what was shipped.*git checkout"):
            shipped(name, tmp_path)
        path.unlink()
        with pytest.raises(ValueError, match=f"{name}/{file} is missing.*git checkout"):
            shipped(name, tmp_path)
        path.write_bytes(before[path])


@pytest.mark.core
@pytest.mark.parametrize("name", PLACES)
def test_the_code_that_ships_is_the_export_byte_for_byte(name):
    folder, expected = CHECKPOINTS / name, flat_code(ARCHITECTURES[Path(name).name].hub_classes)
    found = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    # Names alone: the texts of thirty files would fill the log.
    differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    assert differing == [], "run `make export`"


def test_shipping_needs_a_recipe_that_came_to_its_end(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="holds no trained model: run `python -m train.recipes lare"):
        ship("lare", tmp_path, tmp_path)


def test_refreshing_walks_over_both_sets(tmp_path, capsys):
    """Code of both, and known answers of an earlier form; weights and answers stay what they are."""
    places = (NAMES[0], f"{SERIAL}/{SERIAL_NAMES[0]}")
    for place in places:
        folder = tmp_path / place
        shutil.copytree(CHECKPOINTS / place, folder, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "trace.py").write_text("old = True\n")
        answers = folder / FOLDER / FILE
        content = answers.read_bytes()
        tensors = load_tensors(content)
        older = read_metadata(content) | {"format": "1", "content": digest_content(tensors)}
        older.pop("deflated", None)
        answers.write_bytes(save(tensors, older))
        checkpoints.write_sums(folder.name, folder.parent)
    before = {place: (tmp_path / place / WEIGHTS).read_bytes() for place in places}
    large = [(tmp_path / place / FOLDER / FILE).stat().st_size for place in places]
    known = [KnownAnswers.from_bytes((tmp_path / place / FOLDER / FILE).read_bytes(), place) for place in places]
    checkpoints.main(["--output", str(tmp_path)])
    told = capsys.readouterr().out
    for place, size, one in zip(places, large, known):
        path = tmp_path / place / FOLDER / FILE
        assert re.search(f"{place}: .*trace.py.*{FOLDER}/{FILE}", told)
        assert path.stat().st_size < size / 3 and (tmp_path / place / WEIGHTS).read_bytes() == before[place]
        again = KnownAnswers.from_bytes(path.read_bytes(), place)
        assert load_tensors(again.to_bytes()).keys() == load_tensors(one.to_bytes()).keys()
        assert read_metadata(again.to_bytes()) == read_metadata(
            one.to_bytes()
        )  # the digest of all tensors, among others
        assert shipped(Path(place).name, (tmp_path / place).parent) == tmp_path / place
    checkpoints.main(["--output", str(tmp_path)])
    assert capsys.readouterr().out.count("up to date") == 2


def write_serial_run(output: Path) -> Path:
    """What `train.recipes.serial_recipes` leaves of a LaRe, its words, and a model of another backbone; the folder was moved since."""
    folder, data = output / "seed0", output / "test" / "data.jsonl"
    data.parent.mkdir(parents=True)
    rows = [{"id": f"q{at}", "chance": 0.125, "serial": {"num_steps": 1 + at % 2}, "task": "hops"} for at in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipes.remember(output, task="hops", recipe="serial")
    commands = [
        ("train/data.jsonl", "train.data.tasks --task hops --output /old/out/train"),
        ("seed0/clip/vae/config.json", "train.recipes.small_clip --data /old/out/train/data.jsonl --output /old/out/seed0/clip"),
        ("seed0/lare_fresh/config.json", "conversion.convert_lare --vision-tower /old/out/seed0/clip/vision --output /old/out/seed0/lare_fresh"),
        ("seed0/words/config.json", "train.train_vedas --output_dir /old/out/seed0/words"),
        ("seed0/lare/config.json", "train.train_lare --model_path /old/out/seed0/lare_fresh --data_path /old/out/train/data.jsonl --output_dir /old/out/seed0/lare"),
        ("seed0/scores/lare/summary.json", "evaluation.evaluate --model /old/out/seed0/lare --output /old/out/seed0/scores/lare"),
    ]  # fmt: skip
    lines = [
        {"made": f"/old/out/{made}", "command": text, "seconds": 60.0, "cpu_seconds": 30.0, "hardware": "2 CPU cores"}
        for made, text in commands
    ]
    (output / "times.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, right in (("lare", 8), ("lare-swap", 2), ("lare_words-off", 6), ("words", 8)):
        scores = folder / "scores" / name
        scores.mkdir(parents=True)
        records = [{"id": f"q{at}", "correct": at < right} for at in range(8)]
        (scores / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (scores / "summary.json").touch()
        asked = hash_model(str(CHECKPOINTS / "lare")) if name.startswith("lare") else {}
        (scores / "run.json").write_text(json.dumps({"model": asked}))
    (folder / "scores" / "lare-zero").mkdir()  # was not finished
    return folder


def test_a_serial_checkpoint_says_how_it_was_trained_and_its_whole_table(tmp_path, monkeypatch):
    folder = write_serial_run(tmp_path / "serial")
    with pytest.raises(
        ValueError, match="holds no trained model: run `python -m train.recipes.serial_recipes --arms lare "
    ):
        ship_serial("lare", folder, tmp_path / "out")
    shutil.copytree(CHECKPOINTS / "lare", folder / "lare", ignore=shutil.ignore_patterns("__pycache__"))
    asked = [{"id": f"q{at}", "correct": at != 3} for at in range(8)]
    monkeypatch.setattr(serial_card, "ask_in_bfloat16", lambda source: asked)
    with pytest.raises(ValueError, match="must hold a model of type 'vedas' to ship it under that name, got 'lare'"):
        ship_serial("vedas", folder, tmp_path / "out", arm="lare")
    target = ship_serial("lare", folder, tmp_path / "out" / SERIAL)
    assert shipped("lare", tmp_path / "out" / SERIAL) == target
    card = (target / "README.md").read_text(encoding="utf-8")
    made = re.findall(r"^    python -m (.*)$", card, re.MULTILINE)
    assert [one.split()[0] for one in made] == [
        "train.data.tasks",
        "train.recipes.small_clip",
        "conversion.convert_lare",
        "train.train_lare",
    ]
    assert "/old/" not in card and "--output out/serial/train" in made[0]
    assert "on 2 CPU cores, in 2.0 CPU minutes" in card and "8 unseen pictures, chance 12.5 %" in card
    table = [line for line in card.splitlines() if line.startswith("| ") and " to " in line]
    assert [line.split(" | ")[0][2:] for line in table] == [
        "as trained",
        "as it ships, in bfloat16",
        "another picture's latents",
        "twin, reasoning in words",
    ]
    assert "| | k = 1 | k = 2 | all |" in card
    assert table[1].split(" | ")[1:3] == ["100.0 (51.0 to 100.0)", "75.0 (30.1 to 95.4)"]
    weights = (folder / "lare" / WEIGHTS).read_bytes()
    (folder / "lare" / WEIGHTS).write_bytes(weights[:-1] + b"7")  # trained again after it was asked
    with pytest.raises(
        ValueError, match="scores/lare holds answers of other weights than those in .*seed0/lare: delete it"
    ):
        ship_serial("lare", folder, tmp_path / "out" / SERIAL)
    (folder / "lare" / WEIGHTS).write_bytes(weights)
    (folder / "scores" / "lare" / "summary.json").unlink()
    with pytest.raises(ValueError, match="must be asked the test questions before it ships"):
        ship_serial("lare", folder, tmp_path / "out" / SERIAL)
    (folder.parent / "times.jsonl").write_text("")
    with pytest.raises(ValueError, match="must say what made seed0/lare"):
        ship_serial("lare", folder, tmp_path / "out" / SERIAL)


def write_times(run: Path, steps: list[dict]) -> None:
    lines = [json.dumps(step | {"made": f"{run}/{step['made']}"}) + "\n" for step in steps]
    (run / "times.jsonl").write_text("".join(lines))


def test_shipped_weights_are_those_of_the_recipe_in_bfloat16(tmp_path, monkeypatch):
    from test_lare import build

    build().save_pretrained(tmp_path / "run" / "lare-stage4")
    source = shipped(NAMES[0]) if NAMES else None
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    monkeypatch.setattr(checkpoints.AutoProcessor, "from_pretrained", lambda *args, **kwargs: processor)
    steps = [  # a machine each for backbone and stages; a line of an earlier version; one of another model
        {"made": "clip/vae/config.json", "seconds": 20.0, "hardware": "4 CPU cores"},
        {"made": "lare/config.json", "seconds": 10.0},
        {"made": "lare-stage3/config.json", "seconds": 30.0, "hardware": "one GPU"},
        {"made": "lare-stage4/config.json", "seconds": 30.0, "hardware": "one GPU"},
        {"made": "vedas-trained/config.json", "seconds": 900.0, "hardware": "another GPU"},
    ]
    recorded = []  # the processor above is not this model's
    monkeypatch.setattr(checkpoints, "record_answers", lambda folder, output: recorded.append(output))
    write_times(tmp_path / "run", steps)
    (tmp_path / "run" / "lare.md").write_text("| scores |\n")
    recipes.remember(tmp_path / "run", task="search_color", scale=1.0, language="small")
    (tmp_path / "run" / "train").mkdir()
    (tmp_path / "run" / "train" / "data.jsonl").write_text("{}\n" * 1200)
    target = ship("lare", tmp_path / "run", tmp_path / "out")
    assert recorded == [target]
    card = (target / "README.md").read_text(encoding="utf-8")
    assert "\non 4 CPU cores; one GPU, in 2 minutes" in card and "| scores |" in card
    assert "task `search_color`, 1,200 samples" in card and "train.recipes lare --task search_color" in card
    model = AutoModel.from_pretrained(shipped("lare", tmp_path / "out"), trust_remote_code=True)
    expected = build().to(torch.bfloat16).state_dict()
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    write_times(tmp_path / "run", steps[1:2])
    ship("lare", tmp_path / "run", tmp_path / "out")
    assert "\n\nin 0 minutes" in (target / "README.md").read_text(encoding="utf-8")


def summary(right: int) -> dict:
    numbers = {"accuracy": right / 4, "accuracy_low": 0.1, "accuracy_high": 0.9, "answer_tokens": 9.0, "latents": 8.0}
    return {"all": numbers | {"not_swapped": 2 * (right == 2)}, "tasks": {"jigsaw": numbers, "color": numbers}}


def test_the_comparison_asks_every_arm_and_trains_missing_twins(tmp_path, monkeypatch):
    """Direct twins at three rates: the one that is right most often on validation questions is asked the test's."""
    ran, trained = [], []
    recipes.remember(tmp_path, task="jigsaw:2,color", scale=1.0, language="small")
    for name in ("lare-stage4", "lare-stage0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()

    def evaluate(command, check):
        model, folder = (Path(command[command.index(flag) + 1]) for flag in ("--model", "--output"))
        ran.append((model.name, "val" if "val/data" in " ".join(command) else folder.name, "--latents" in command))
        right = {"clip-direct-3e-4": 1, "clip-direct-1e-3": 3, "clip-direct-3e-3": 2}.get(model.name, 4)
        right = 2 if folder.name == "swap" else right
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text(json.dumps(summary(right)))
        # Two tasks, color always right; every arm finishes its rows in another order.
        rows = [{"id": str(row), "task": "jigsaw", "correct": row < right} for row in (3, 1, 0, 2)]
        rows += [{"id": f"c{row}", "task": "color", "correct": True} for row in (1, 0)]
        (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[right:] + rows[:right]))

    def train(commands, times=None):
        trained.extend(Path(made).parent.name for made, _ in commands)
        state = tmp_path / trained[-1] / "checkpoint-2"
        state.mkdir(parents=True)
        history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
        (state / "trainer_state.json").write_text(json.dumps({"log_history": history}))

    monkeypatch.setattr(comparison.subprocess, "run", evaluate)
    monkeypatch.setattr(comparison, "run", train)
    comparison.main(["--run", str(tmp_path)])  # of all models the one that is trained there
    assert trained == ["val", "clip-direct-3e-4", "clip-direct-1e-3", "clip-direct-3e-3"]
    arms = ("as-trained", "latents-off", "swap", "swap-other-task", "noise")
    assert ran[:5] == [("lare-stage4", name, name == "latents-off") for name in arms]
    assert ran[5:8] == [(f"clip-direct-{rate}", "val", True) for rate in comparison.RATES]
    assert ran[8:] == [("clip-direct-1e-3", "direct", True), ("lare-stage0", "text-reasoning", True)]
    assert json.loads((tmp_path / "twins.json").read_text())["clip-direct"]["chosen"] == "1e-3"
    assert (tmp_path / "twins.png").stat().st_size > 5000
    table = (tmp_path / "comparison.md").read_text()
    assert "| lare | as trained | 100.0 (10.0 to 90.0) | 100.0 (10.0 to 90.0) | 9.0 | 8.0 | - | - |" in table
    assert "| 9.0 | 8.0 | +0.0 (+0.0 to +0.0) | +25.0 (+0.0 to +75.0) |" in table  # direct: color, jigsaw
    assert "| lare | swap (2 rows left out: no donor) |" in table
    with pytest.raises(ValueError, match="has no trained vedas"):
        comparison.main(["--run", str(tmp_path), "--models", "vedas"])
    with pytest.raises(ValueError, match="holds no recipe.json"):
        comparison.main(["--run", str(tmp_path / "val")])


def test_twins_take_the_steps_and_rates_of_their_models(tmp_path):
    from test_recipes import parses

    run = comparison.Run(tmp_path, "search_color:4,jigsaw", 1.0, "small")
    for folder, epochs in (("clip-direct-3e-4", 13.8), ("qwen-direct-3e-4", 7), ("qwen-text", 7)):
        *_, (made, command) = comparison.twin_commands(folder, run, "3e-4")
        assert made == f"{tmp_path}/{folder}/config.json" and parses(command)
        assert "--learning_rate 0.0003 " in command
        assert float(command.split("--num_train_epochs ")[1].split()[0]) == pytest.approx(epochs)
        assert f"--per_device_train_batch_size {32 if 'clip' in folder else 16} " in command
    *_, (_, command) = comparison.twin_commands("qwen-text", comparison.Run(tmp_path, "color", 1.0, "smollm2"), "1e-3")
    assert "--learning_rate 0.0001 " in command and "--num_train_epochs 4 " in command
