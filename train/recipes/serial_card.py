"""What the card of a model of serial questions says: how it was trained, what that took, and the table of its run.

Everything is read off what `train.recipes.serial_recipes` left: `times.jsonl` of its output, and the answers in the seed's `scores/`.
"""

import json
from collections import defaultdict
from pathlib import Path

from evaluation.answering import AnswerSettings
from evaluation.evaluate_rows import evaluate_rows
from evaluation.loading import load_model, load_processor
from evaluation.report import wilson_interval
from evaluation.rows import read_evaluation
from train.data.decontamination.journal import hash_file
from train.recipes.small_models import SETTINGS


MOST_TOKENS = 64  # as the recipe asks
WEIGHTS = "model.safetensors"

ARMS = {  # of a model's latents
    "": "as trained",
    "-swap": "another picture's latents",
    "-zero": "zeros",
    "-noise": "noise",
}
TWINS = {  # folders of the recipe: what they are. A model without latents on the same backbone, from the same data
    "words": "twin, reasoning in words",
    "direct": "twin, direct: from the words' checkpoint, easy k first",
    "shorter": "twin, the same curriculum without latents",
    "direct_deep": "twin, direct, twice the layers",
    "direct_twice": "twin, direct, twice the budget",
    "direct_from_nothing": "twin, direct, without the words before",
    "pauses": "twin, as many learned pause tokens as latents",
    "at_once": "all latents from the start, without words",
}
CARD = """
## How it was trained

From nothing, with questions of the task `{task}` (`python -m train.data.tasks --task {task}`), by `python -m train.recipes.serial_recipes --task
{task} --arms {arm}`, that is

{commands}

{hardware}in {minutes:.1f} CPU minutes. {num_weights:.2f}M weights. It knows these questions and nothing else.

## What it scores

Accuracy in % by the number k of moves that a question asks for, with Wilson's 95 % intervals; {questions} unseen pictures, chance {chance:.1f} %;
weights in float32 where nothing else is said. Twins have the same backbone, and were trained in the same run.

{table}
"""


def describe_training(source: Path, num_weights: int) -> str:
    """The part of the card below what every card says.

    Args:
        source: the trained model, in the folder of a seed.

    Raises:
        ValueError: the run does not say how it was made, or the model has not been asked yet.
    """
    output = source.parent.parent
    settings = json.loads((output / SETTINGS).read_text(encoding="utf-8"))
    steps = find_origin(output, f"{source.parent.name}/{source.name}")
    machines = dict.fromkeys(step["hardware"] for step in steps if "hardware" in step)
    data = read_lines(output / "test" / "data.jsonl")
    return CARD.format(
        task=settings["task"],
        arm=source.name,
        commands="\n".join(f"    python -m {step['command']}" for step in steps),
        hardware=f"on {'; '.join(machines)}, " if machines else "",
        minutes=sum(step["cpu_seconds"] for step in steps) / 60,
        num_weights=num_weights / 1e6,
        questions=len(data),
        chance=100 * sum(row["chance"] for row in data) / len(data),
        table=draw_scores(source, data),
    )


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def find_origin(output: Path, made: str) -> list[dict]:
    """The commands that a model came from, in their order: its own, and those that made a folder which one of them names.

    Commands and folders are given relative to `output`, which may have been moved since.

    Raises:
        ValueError: no command made it.
    """
    lines = read_lines(output / "times.jsonl") if (output / "times.jsonl").is_file() else []
    steps: dict[str, dict] = {}  # a command that was run again counts as it was the last time
    for line in lines:
        first = next(
            (one for one in Path(line["made"]).parts if one.startswith(("seed", "train", "val", "test"))), None
        )
        before, cut, _ = line["made"].partition(f"/{first}/")
        if cut:
            text = line["command"].replace(f"{before}/", "out/serial/")
            steps[line["made"].removeprefix(f"{before}/")] = line | {"command": text}
    wanted, found = [made], []
    while wanted:
        folder = wanted.pop()
        for place in [one for one, step in steps.items() if one not in found and has_made(step, one, folder)]:
            found.append(place)
            named = {word for word in steps[place]["command"].split() if word.startswith("out/serial/")}
            wanted += [word.removeprefix("out/serial/").removesuffix("/data.jsonl") for word in named]
    if not found:
        raise ValueError(f"{output / 'times.jsonl'} must say what made {made}, which ships; it names {sorted(steps)}.")
    return [step for place, step in steps.items() if place in found]


def has_made(step: dict, place: str, folder: str) -> bool:
    """Whether a command wrote into a folder: into it, or (parts of a backbone) into the whole of which it is one."""
    words = step["command"].split()
    whole = words[words.index("--output") + 1].removeprefix("out/serial/") if "--output" in words else None
    return str(Path(place).parent) == folder or (whole is not None and Path(folder).is_relative_to(whole))


def accuracy_by_moves(records: list[dict], data: list[dict]) -> dict[str, list[bool]]:
    """By number of moves, and for all, which answers are right."""
    moves = {row["id"]: str(row["serial"]["num_steps"]) for row in data}
    groups = defaultdict(list)
    for record in records:
        for group in (moves[record["id"]], "all"):
            groups[group].append(bool(record["correct"]))
    return dict(sorted(groups.items()))


def draw_scores(source: Path, data: list[dict]) -> str:
    """The table of the model, its latents replaced, and its twins, as far as they were asked.

    Raises:
        ValueError: the model itself was not, or answers are of weights that were trained anew since.
    """
    scores, name = source.parent / "scores", source.name
    # LaRe's twins keep the steps in their config, and are asked without them.
    prefix, ending = ("lare_", "-off") if name.startswith("lare") else ("", "")
    asked = {f"{name}{arm}": (name, what) for arm, what in ARMS.items()}
    asked |= {
        f"{prefix}{twin}{ending}": (f"{prefix}{twin}", what)
        for twin, what in TWINS.items()
        if f"{prefix}{twin}" != name
    }
    rows = {}
    for folder, (model, what) in asked.items():
        if (scores / folder / "summary.json").is_file():  # written last
            check_asked(scores / folder, source.parent / model)
            rows[what] = accuracy_by_moves(read_lines(scores / folder / "results.jsonl"), data)
            if folder == name:
                rows["as it ships, in bfloat16"] = accuracy_by_moves(ask_in_bfloat16(source), data)
    if ARMS[""] not in rows:
        raise ValueError(
            f"{source} must be asked the test questions before it ships, but {scores / name} is not finished."
        )
    groups = list(next(iter(rows.values())))
    lines = [
        f"| | {' | '.join(f'k = {one}' if one.isdigit() else one for one in groups)} |",
        "|---" * (len(groups) + 1) + "|",
    ]
    lines += [f"| {what} | {' | '.join(draw_share(found[one]) for one in groups)} |" for what, found in rows.items()]
    return "\n".join(lines)


def check_asked(scores: Path, model: Path) -> None:
    """Raise unless answers are those of the weights that are there now."""
    asked = json.loads((scores / "run.json").read_text(encoding="utf-8"))["model"]
    if (model / WEIGHTS).is_file() and asked.get(WEIGHTS) != hash_file(model / WEIGHTS):
        raise ValueError(
            f"{scores} holds answers of other weights than those in {model}: delete it, and the recipe asks again."
        )


def ask_in_bfloat16(source: Path) -> list[dict]:
    """The answers to the test questions with the weights rounded as they ship."""
    rows = read_evaluation([source.parent.parent / "test" / "data.jsonl"])
    settings = AnswerSettings(batch_size=32, max_new_tokens=MOST_TOKENS)
    return evaluate_rows(load_model(str(source), "bfloat16"), load_processor(str(source)), rows, settings)


def draw_share(right: list[bool]) -> str:
    low, high = wilson_interval(sum(right), len(right))
    return f"{100 * sum(right) / len(right):.1f} ({100 * low:.1f} to {100 * high:.1f})"
