"""The learning rate of an arm: the best of three at a quarter of the budget, by questions of the split "val".

It is chosen once, in the first of the named seeds, and written down in `rates.json`; all seeds take it. An arm with twice the
budget takes the rate of the arm that it doubles.
"""

import json
from pathlib import Path

from conversion.writing import write_file
from train.recipes.serial.arms import ARMS, Model, own_rate
from train.recipes.serial.plan import Place, Stage, vary
from train.recipes.serial.scoring import ask, kinds_of


SHARE = 0.25  # of the epochs of every stage
# Around the rate that an arm has by itself, which counts where others are not better.
TRIED = {
    "3e-4": ("3e-4", "1e-4", "1e-3"),
    "5e-4": ("5e-4", "2e-4", "1.5e-3"),
    "1e-3": ("1e-3", "3e-4", "3e-3"),
}
FILE = "rates.json"


def searched_arm(name: str) -> str:
    """The arm whose rates are tried."""
    return ARMS[name].rate_of or name


def try_rates(place: Place, name: str) -> list[Stage]:
    """What is trained and asked to choose the rate of an arm."""
    *stages, last = ARMS[name].build(place)
    for rate in TRIED[own_rate(name, place)]:
        tried = f"rates/{name}-{rate}"
        stages.append(vary(last, place, tried, rate, SHARE))
        command = (
            f"evaluation.evaluate --model {place.folder}/{tried} --data {place.data('val')} --output {score_of(place, name, rate).parent} "
            f"--batch_size 32 --max_new_tokens 64{ask(Model(name), kinds_of(Model(name))[0])}"
        )
        stages.append(Stage(str(score_of(place, name, rate)), command, 0.15))
    return stages


def score_of(place: Place, name: str, rate: str) -> Path:
    return place.folder / "rates" / "scores" / f"{name}-{rate}" / "summary.json"


def read_chosen(output: Path) -> dict[str, dict]:
    """By arm what was tried (`accuracy` by rate, in which `seed`) and `chosen`."""
    path = output / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def choose_rate(place: Place, name: str) -> str:
    """Write down and return the best rate of those that were tried."""
    found = {
        rate: json.loads(score_of(place, name, rate).read_text(encoding="utf-8"))["all"]["accuracy"]
        for rate in TRIED[own_rate(name, place)]
    }
    best = max(found, key=found.get)  # the first of equals: the arm's own comes first
    known = read_chosen(place.output) | {name: {"seed": place.seed, "accuracy": found, "chosen": best}}
    write_file(place.output / FILE, json.dumps(known, indent=2) + "\n")
    return best


def model_at(place: Place, name: str, rate: str) -> Model:
    """The arm at a rate; at its own it is what it is without a choice."""
    return Model(name, None if rate == own_rate(name, place) else rate)


def models_of(place: Place, names: list[str], has_choice: bool) -> list[Model]:
    """The models of some arms: at the rates that were chosen, or at the arms' own.

    Args:
        has_choice: whether rates are chosen; those that are not yet count as the arms' own.
    """
    chosen = read_chosen(place.output) if has_choice else {}
    return [
        model_at(place, name, chosen[searched_arm(name)]["chosen"]) if searched_arm(name) in chosen else Model(name)
        for name in names
    ]


def missing_choices(place: Place, names: list[str]) -> list[str]:
    """Arms whose rates are still to be tried."""
    chosen = read_chosen(place.output)
    return [name for name in dict.fromkeys(map(searched_arm, names)) if name not in chosen]


def models_there(place: Place, names: list[str]) -> list[Model]:
    """What is trained, at whatever rate."""
    found = []
    for name in names:
        for rate in TRIED[own_rate(searched_arm(name), place)]:
            model = model_at(place, name, rate)
            if (place.folder / model.name / "config.json").is_file():
                found.append(model)
    return found
