"""The trained checkpoints that ship: what a recipe left, in bfloat16, with a card that says how it came about.

    python -m train.recipes.shipping lare --run out/small     # writes checkpoints/lare and its lines of checkpoints/SHA256SUMS
    python -m train.recipes.shipping lare --run out/serial/seed0 --serial     # checkpoints/serial/lare, of `train.recipes.serial_recipes`
    python -m train.recipes.shipping                          # `make export`: brings the code of all of them up to date

The code of a checkpoint is build output, and in git all the same: after `git clone`
`AutoModel.from_pretrained("checkpoints/lare", trust_remote_code=True)` works as it does for a folder of the Hub.

There are two sets, each with hashes of its own: models of the recipes in `checkpoints/`, and in `checkpoints/serial/` models of serial
questions, whose cards `train/recipes/serial_card.py` writes.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from configuration_latentvlm import ARCHITECTURES
from configuration_latentvlm.model_card import render_model_card
from conversion.commands import CommandParser, exit_on_error
from conversion.known_answers import record_answers, rewrite_answers
from conversion.refresh_code import refresh_code
from conversion.writing import replaced_folder, write_file
from train.recipes.serial_card import describe_training
from train.recipes.small_models import ENDS, RECIPES, SETTINGS


CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
SERIAL = "serial"  # folder of the second set, in that of the first
SUMS = "SHA256SUMS"
WEIGHTS = "model.safetensors"
LARGEST = 8_000_000  # bytes of weights that a shipped checkpoint may have
MOST = 22_000_000  # bytes of everything that ships: all of it is in git

TRAINING = """
## How it was trained

From nothing, with procedural questions about pictures (`python -m train.data.tasks`, task `{task}`, {samples:,} samples, seed 0), by

    python -m train.recipes {name} --task {task}{language} --output out/small

{hardware}in {minutes:.0f} minutes (data and backbone, which the recipes share, included). {num_weights:.2f}M weights. It knows
these questions and nothing else.

## What it scores

{scores}
"""


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_sums(folder: Path) -> dict[str, dict[str, str]]:
    """By checkpoint the hashes of its files."""
    path, sums = folder / SUMS, {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        value, file = line.split(maxsplit=1)
        name, _, file = file.partition("/")
        sums.setdefault(name, {})[file] = value
    return sums


def write_sums(name: str, folder: Path) -> None:
    """Take down what a checkpoint holds: all files but its card, which changes no answer."""
    target = folder / name
    files = [path for path in target.rglob("*") if path.is_file() and path.suffix not in (".md", ".pyc")]
    sums = read_sums(folder) | {name: {path.relative_to(target).as_posix(): digest(path) for path in files}}
    lines = [f"{sums[one][file]}  {one}/{file}\n" for one in sorted(sums) for file in sorted(sums[one])]
    write_file(folder / SUMS, "".join(lines))


def shipped(name: str, folder: Path = CHECKPOINTS) -> Path:
    """The folder of a checkpoint that is there and whole.

    Raises:
        ValueError: it is missing, or a file of it is missing or not what was shipped.
    """
    path, known = folder / name, read_sums(folder).get(name, {})
    is_serial = folder.name == SERIAL
    kept = f"{CHECKPOINTS.name}/{SERIAL}" if is_serial else folder.name
    anew = f"python -m train.recipes.serial_recipes --arms {name}" if is_serial else f"make train-{name}"
    repair = f"`git checkout {kept}` brings it back, `{anew}` trains it anew."
    if not path.is_dir() or WEIGHTS not in known:
        raise ValueError(f"There is no checkpoint {name!r} in {folder}: {repair}")
    for file, expected in known.items():
        if not (path / file).is_file():
            raise ValueError(f"{path / file} is missing, which {SUMS} lists: {repair}")
        found = digest(path / file)
        if found != expected:
            raise ValueError(
                f"{path / file} is not what was shipped: its sha256 is {found}, {SUMS} says {expected}. {repair}"
            )
    return path


def settle_image_size(processor) -> None:
    """Resize every picture as in training, where training knew one square size: of others such a model knows nothing."""
    least, most = getattr(processor, "trained_image_sizes", None) or (None, None)
    if least is not None and least == most and least[0] == least[1]:
        processor.image_size = least[0]


def ship(name: str, run: Path, folder: Path = CHECKPOINTS) -> Path:
    """Write what a recipe trained as a checkpoint that ships.

    Args:
        run: the recipe's output.

    Raises:
        ValueError: the recipe has not come to its end, or its weights are too large to ship.
    """
    source = run / ENDS[name]
    check_trained(source, f"train.recipes {name} --output {run}")
    steps = [json.loads(line) for line in (run / "times.jsonl").read_text(encoding="utf-8").splitlines()]
    settings = json.loads((run / SETTINGS).read_text(encoding="utf-8"))
    task, language = settings["task"], settings["language"]
    chosen = {} if language == "small" else {"language": language}
    made = [made for made, _ in RECIPES[name][0](run, task, settings["scale"], **chosen)]
    own = made[: made.index(f"{source}/config.json") + 1]
    steps = [step for step in steps if step["made"] in own]
    # RowText of earlier versions did not take it down, and where this runs says nothing about them.
    machines = dict.fromkeys(step["hardware"] for step in steps if "hardware" in step)
    table = run / f"{name}.md"
    training = TRAINING.format(
        task=task,
        samples=len((run / "train" / "data.jsonl").read_text(encoding="utf-8").splitlines()),
        name=name,
        language="".join(f" --language {one}" for one in chosen.values()),
        hardware=f"on {'; '.join(machines)}, " if machines else "",
        minutes=sum(step["seconds"] for step in steps) / 60,
        num_weights=count_weights(source) / 1e6,
        scores=table.read_text(encoding="utf-8") if table.is_file() else "Not measured.",
    )
    return write_shipped(name, source, folder, training)


def ship_serial(name: str, seed_folder: Path, folder: Path, arm: str | None = None) -> Path:
    """Write what a serial recipe trained as a checkpoint of the second set.

    Args:
        seed_folder: where the recipe put one seed, such as `out/serial/seed0`.
        arm: of the recipe, which names the folder of the model; by default as the architecture.

    Raises:
        ValueError: the recipe has not come to its end, the model is of another architecture, or its weights are too large to ship.
    """
    arm = arm or name
    source = seed_folder / arm
    check_trained(source, f"train.recipes.serial_recipes --arms {arm} --output {seed_folder.parent}")
    found = json.loads((source / "config.json").read_text(encoding="utf-8")).get("model_type")
    if found != name:
        raise ValueError(f"{source} must hold a model of type {name!r} to ship it under that name, got {found!r}.")
    return write_shipped(name, source, folder, describe_training(source, count_weights(source)))


def check_trained(source: Path, command: str) -> None:
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} holds no trained model: run `python -m {command}` first.")


def count_weights(source: Path) -> int:
    return sum(value.numel() for value in load_file(source / WEIGHTS).values())


def write_shipped(name: str, source: Path, folder: Path, training: str) -> Path:
    """Write a trained model in bfloat16, with its processor, a card that ends with `training`, and known answers; take down its hashes.

    Raises:
        ValueError: its weights are too large to ship.
    """
    target = folder / name
    size = sum(value.numel() * value.element_size() for value in load_file(source / WEIGHTS).values()) // 2
    if size > LARGEST:
        raise ValueError(f"The weights of {source} take {size} bytes in bfloat16; {LARGEST} may ship.")
    model = AutoModel.from_pretrained(source, trust_remote_code=True, dtype=torch.bfloat16)
    with replaced_folder(target, keeps_others=True) as partial:
        model.save_pretrained(partial)
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
        settle_image_size(processor)
        processor.save_pretrained(partial)
        (partial / "README.md").write_text(render_model_card(model.config) + training, encoding="utf-8")
        record_answers(partial, target)
    write_sums(name, folder)
    return target


def refresh(folder: Path) -> None:
    """Bring the code of a set up to date, and the files of its known answers to the form in which they are written today."""
    for name in sorted(read_sums(folder)):
        changed = refresh_code(folder / name)
        changed += rewrite_answers(folder / name)
        write_sums(name, folder)
        print(f"{folder / name}: {', '.join(changed) or 'up to date'}")


def build_parser() -> CommandParser:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "name", nargs="?", choices=sorted(ARCHITECTURES), help="without: bring the code of all up to date"
    )
    parser.add_argument(
        "--run", type=Path, help="output of `train.recipes`; with `--serial` a seed's folder in that of the recipe"
    )
    parser.add_argument(
        "--serial", action="store_true", help="ship what `train.recipes.serial_recipes` trained, into the second set"
    )
    parser.add_argument("--arm", help="of `train.recipes.serial_recipes`, where it is not called as the architecture")
    parser.add_argument("--output", type=Path, default=CHECKPOINTS, help="folder of both sets (default: checkpoints)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.name is None:
        for folder in (args.output, args.output / SERIAL):
            refresh(folder)
    elif args.run is None:
        parser.error("`--run` is needed to ship a checkpoint")
    elif args.serial:
        print(ship_serial(args.name, args.run, args.output / SERIAL, args.arm))
    elif args.arm is not None:
        parser.error("`--arm` is of `--serial`")
    else:
        print(ship(args.name, args.run, args.output))


if __name__ == "__main__":
    with exit_on_error():
        main()
