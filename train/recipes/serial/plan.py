"""What a recipe of serial questions is made of: commands, the folders that they write, and the data that all arms share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from train.recipes.small_models import IMAGE_SIZE, SHARED


STEPS = 4  # the largest number of moves that is asked for, and the latent steps of every question
LAYERS = 4  # of the language models
PICTURES = {"train": 6000, "val": 64, "test": 480}
# How long a tower learns what stands in each cell: passes over the pictures and learning rate, of Qwen's tower and of CLIP's. Where an
# arrow leads is a matter of several cells, and at 2e-3 some seeds have not learned it after 12 passes.
TOWER_TRAINING = {
    "hops": ("--epochs 1", "--epochs 5 --batch-size 64 --learning-rate 1e-3"),
    "arrows": ("--epochs 10 --learning-rate 1e-3", "--epochs 24 --batch-size 64 --learning-rate 1e-3"),
    "trace": ("--epochs 1", "--epochs 5 --batch-size 64 --learning-rate 1e-3"),
}
# Questions about a picture to learn from. In `trace` a start has one number of moves only, so that every start is asked for.
LEARNED_QUESTIONS = {"trace": "all"}
TRAINED_ALIKE = SHARED.replace(" --seed 0", "")  # options of all training scripts
LEAST_PICTURES, SMALL_EPOCH = 16, 32  # of a run that only tries the commands out


class Stage(NamedTuple):
    """A command: the file that it writes last, and what it is expected to take on one thread of a CPU."""

    made: str
    command: str
    minutes: float


class Place(NamedTuple):
    """Where a run writes: the data are shared by all seeds."""

    output: Path
    task: str
    seed: int

    @property
    def folder(self) -> Path:
        return self.output / f"seed{self.seed}"

    def data(self, split: str) -> str:
        return f"{self.output}/{split}/data.jsonl"


def serial_data(place: Place) -> list[Stage]:
    """Every number of moves is asked about a picture to learn from; one is asked about an unseen picture."""
    made = []
    for split, count in PICTURES.items():
        questions = "one" if split == "test" else LEARNED_QUESTIONS.get(place.task, "steps")
        command = (
            f"train.data.tasks --task {place.task} --n {count} --split {split} --image-size {IMAGE_SIZE} --questions {questions} "
            f"--output {place.output}/{split} --force"
        )
        made.append(Stage(place.data(split), command, 0.1 + 0.5 * count / PICTURES["train"]))
    return made


def draw_again(place: Place, seed: int) -> Stage:
    """Other pictures of the split "test", by another seed of the task."""
    (test,) = (stage for stage in serial_data(place) if stage.made == place.data("test"))
    command = change_option(test.command, "--output", lambda _: [f"{place.output}/fresh{seed}", "--seed", str(seed)])
    return Stage(place.data(f"fresh{seed}"), command, test.minutes)


def option(command: str, flag: str) -> list[str]:
    """The values of an option that the command has."""
    words = command.split(" ")
    start, end = _find_values(words, flag)
    return words[start:end]


def change_option(command: str, flag: str, change: Callable[[list[str]], Sequence[str]]) -> str:
    """The command with other values of an option that it has."""
    words = command.split(" ")
    start, end = _find_values(words, flag)
    return " ".join([*words[:start], *change(words[start:end]), *words[end:]])


def _find_values(words: list[str], flag: str) -> tuple[int, int]:
    start = words.index(flag) + 1
    return start, next((number for number in range(start, len(words)) if words[number].startswith("--")), len(words))


def vary(stage: Stage, place: Place, name: str, rate: str | None = None, share: float = 1) -> Stage:
    """A training as another folder of the seed, at another learning rate or with another number of epochs.

    Args:
        rate: None leaves it.
        share: of the epochs of every stage, of which each keeps at least one.
    """
    command = change_option(stage.command, "--output_dir", lambda _: [f"{place.folder}/{name}"])
    command = change_option(
        command, "--epochs_per_stage", lambda counts: [str(max(1, round(share * int(count)))) for count in counts]
    )
    if rate is not None:
        command = change_option(command, "--learning_rate", lambda _: [rate])
    return Stage(f"{place.folder}/{name}/config.json", command, share * stage.minutes)


def shrink(stage: Stage, scale: float) -> Stage:
    """The same command on a share of the pictures, and with one small epoch a stage: it tries the command out."""
    command = stage.command
    changes = {
        "--n": lambda values: [str(max(LEAST_PICTURES, round(scale * int(values[0]))))],
        "--samples_per_epoch": lambda _: [str(SMALL_EPOCH)],
        "--epochs_per_stage": lambda counts: ["1"] * len(counts),
        "--epochs": lambda _: ["1"],
    }
    for flag, change in changes.items():
        if flag in command.split(" "):
            command = change_option(command, flag, change)
    return Stage(stage.made, command, scale * stage.minutes)
