"""From answers and times to the table: everything is derived from what `evaluation.evaluate` and the commands left.

table.json    seed -> model -> answers by kind (as it is, swap, zero, noise) and number of moves, costs, fresh draws, report
table.md      the same for reading: a table for every seed, and one over seeds
"""

import json
import re
from collections import defaultdict
from pathlib import Path

from evaluation.report import describe
from train.recipes.serial.arms import ARMS, Model, own_rate
from train.recipes.serial.plan import STEPS, Place
from train.recipes.serial.rates import SHARE, TRIED, models_there, read_chosen, searched_arm
from train.recipes.serial.scoring import fresh_scores, kinds_of, report_model, score_folder


AS_IS = "as it is"
MANY = "k >= 3"  # what a model cannot do by looking up one or two moves while it answers


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_needs(data: Path) -> tuple[dict[str, int], float]:
    """(number of moves by question, share of right answers by chance)."""
    rows = read_lines(data)
    return {row["id"]: len(row["rationale"]) for row in rows}, sum(row["chance"] for row in rows) / len(rows)


def by_moves(records: list[dict], needs: dict[str, int]) -> dict[str, dict]:
    """By number of moves, for those of three moves and more, and for all: accuracy with its interval, format, donors and tokens."""
    groups = defaultdict(list)
    for record in records:
        need = needs[record["id"]]
        for group in (str(need), *([MANY] if need >= 3 else []), "all"):
            groups[group].append(record)
    order = [*map(str, range(1, STEPS + 1)), MANY, "all"]
    return {name: shorten(describe(groups[name])) for name in order if name in groups}


def shorten(numbers: dict) -> dict:
    """What of a summary belongs into the table."""
    names = ("rows", "accuracy", "accuracy_low", "accuracy_high", "unmarked", "outside_choices", "accuracy_valid")
    kept = {name: numbers[name] for name in (*names, "answer_tokens", "latents", "not_swapped") if name in numbers}
    return kept | numbers.get("swapped", {})


def read_answers(place: Place, model: Model, folder: str, split: str) -> tuple[dict[str, dict], float | None]:
    """(answers by kind, chance) as far as they are complete."""
    found, chance, kinds = {}, None, kinds_of(model)
    for kind in kinds:
        results = Path(score_folder(place, model, kind, folder))
        if (results / "summary.json").is_file():
            needs, chance = read_needs(Path(place.data(split)))
            found[AS_IS if kind == kinds[0] else kind] = by_moves(read_lines(results / "results.jsonl"), needs)
    return found, chance


def training_of(folder: Path) -> dict:
    """The steps at which stages began, and how many there were."""
    path = folder / "trainer_state.json"
    if not path.is_file():
        return {}
    state = json.loads(path.read_text(encoding="utf-8"))
    begun = [[entry["begins_stage"], entry["step"]] for entry in state["log_history"] if "begins_stage" in entry]
    return {"stages_began": begun, "steps": state["global_step"]}


def cost_of(times: Path, made: set[str]) -> float:
    """CPU minutes of the commands that made something."""
    lines = read_lines(times) if times.is_file() else ()
    return sum(line["cpu_seconds"] for line in lines if line["made"] in made) / 60


def read_report(place: Place, model: Model) -> dict:
    """What the diagnostics found, by name."""
    for stage in report_model(place, model):
        if Path(stage.made).is_file():
            found = json.loads(Path(stage.made).read_text(encoding="utf-8"))["diagnostics"]
            kept = ("tables", "notes", "not_applicable")
            return {"report": {name: {part: one[part] for part in kept} for name, one in found.items()}}
    return {}


def measure(place: Place, model: Model) -> dict:
    """Everything that is known of a model in a seed."""
    times, own = place.output / "times.jsonl", own_rate(model.arm, place)
    answers, chance = read_answers(place, model, "scores", "test")
    draws = sorted(
        int(found[1]) for one in place.output.glob("fresh*") if (found := re.fullmatch(r"fresh(\d+)", one.name))
    )
    fresh = {str(seed): read_answers(place, model, **fresh_scores(seed))[0] for seed in draws}
    searched = searched_arm(model.arm)
    tried = {f"{place.folder}/rates/{searched}-{rate}/config.json" for rate in TRIED[own_rate(searched, place)]}
    return {
        "arm": model.arm,
        "about": ARMS[model.arm].about,
        "rate": model.rate or own,
        "is_chosen_rate": read_chosen(place.output).get(searched, {}).get("chosen") == (model.rate or own),
        "chance": chance,
        "answers": answers,
        "fresh": {seed: found for seed, found in fresh.items() if found},
        **training_of(place.folder / model.name),
        "cpu_minutes": cost_of(times, {f"{place.folder}/{model.name}/config.json"}),
        "cpu_minutes_from_nothing": cost_of(times, {stage.made for stage in model.build(place)}),
        "cpu_minutes_of_rates": cost_of(times, tried),
        **read_report(place, model),
    }


def collect(places: list[Place], names: list[str]) -> dict:
    """The table as JSON: all models of the arms that were asked, in every seed; rates; and what stands above the best direct twin."""
    seeds = {}
    for place in places:
        measured = {model.name: measure(place, model) for model in models_there(place, names)}
        seeds[str(place.seed)] = {name: one for name, one in measured.items() if AS_IS in one["answers"]}
    return {
        "task": places[0].task,
        "rates": {"share of the epochs": SHARE, **read_chosen(places[0].output)},
        "seeds": {seed: models for seed, models in seeds.items() if models},
        "above the best direct twin": compare(seeds),
    }


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def over_seeds(seeds: dict[str, dict], read) -> dict[str, list[float]]:
    """By model the values of all seeds that have one."""
    found = defaultdict(list)
    for models in seeds.values():
        for name, one in models.items():
            if (value := read(one)) is not None:
                found[name].append(value)
    return found


def accuracy(one: dict, group: str, kind: str = AS_IS) -> float | None:
    return one["answers"].get(kind, {}).get(group, {}).get("accuracy")


def compare(seeds: dict[str, dict]) -> dict[str, dict]:
    """For each model with latents: how far it is above the best direct twin of its backbone where three moves and more are asked for.

    Both are means over the seeds that have them, in points.
    """
    many = {name: mean(values) for name, values in over_seeds(seeds, lambda one: accuracy(one, MANY)).items()}
    arms = {name: ARMS[one["arm"]] for models in seeds.values() for name, one in models.items() if name in many}
    found = {}
    for name, arm in arms.items():
        twins = [one for one, other in arms.items() if other.is_direct and other.backbone == arm.backbone]
        if arm.has_latents and twins:
            best = max(twins, key=many.get)
            found[name] = {"twin": best, "points": 100 * (many[name] - many[best]), "twin_accuracy": many[best]}
    return found


def percent(numbers: dict | None, name: str = "accuracy") -> str:
    if not numbers or numbers.get(name) is None:
        return "-"
    low, high = (100 * numbers[f"{name}_{end}"] for end in ("low", "high"))
    return f"{100 * numbers[name]:.1f} ({low:.1f} to {high:.1f})"


def donors_share(answers: dict) -> str:
    """The share of answers that are the donor's; unknown in answers of an earlier version."""
    swapped = answers.get("swap", {}).get("all", {})
    if "follows_donor" not in swapped:
        return "-"
    return f"{percent(swapped, 'follows_donor')}, by chance {100 * swapped['follow_chance']:.1f}"


def draw_row(name: str, one: dict) -> list[str]:
    own = one["answers"][AS_IS]
    groups = [percent(own.get(group)) for group in (*map(str, range(1, STEPS + 1)), MANY, "all")]
    replaced = [percent(one["answers"].get(kind, {}).get("all")) for kind in ("swap", "zero", "noise")]
    fresh = "; ".join(
        f"seed {seed}: {percent(found.get(AS_IS, {}).get('all'))}"
        + (f", swap {percent(found['swap']['all'])}" if "swap" in found else "")
        for seed, found in one["fresh"].items()
    )
    costs = [f"{one[cost]:.1f}" for cost in ("cpu_minutes", "cpu_minutes_from_nothing", "cpu_minutes_of_rates")]
    rate = one["rate"] + (" (chosen)" if one["is_chosen_rate"] else "")
    tokens = [f"{own['all'][count]:.1f}" for count in ("answer_tokens", "latents")]
    return [
        name,
        rate,
        *groups,
        replaced[0],
        donors_share(one["answers"]),
        *replaced[1:],
        *tokens,
        *costs,
        fresh or "-",
    ]


def draw_lines(rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""]


HEADS = [
    *("model", "rate", *(f"k = {number}" for number in range(1, STEPS + 1)), MANY, "all"),
    *("swap", "donor's answers", "zeros", "noise", "tokens", "latents"),
    *("CPU min", "from nothing", "choice of the rate", "fresh draw"),
]
SHARES = {  # of the table over seeds
    **{f"k = {number}": (str(number), AS_IS) for number in range(1, STEPS + 1)},
    MANY: (MANY, AS_IS),
    "all": ("all", AS_IS),
    **{name: ("all", kind) for name, kind in (("swap", "swap"), ("zeros", "zero"), ("noise", "noise"))},
}


def draw_over_seeds(seeds: dict[str, dict]) -> list[str]:
    """Mean, lowest and highest of every model that has more than one seed."""
    counts = over_seeds(seeds, lambda one: accuracy(one, "all"))
    names = [name for name, values in counts.items() if len(values) > 1]
    if not names:
        return []
    columns = [over_seeds(seeds, lambda one, of=of: accuracy(one, *of)) for of in SHARES.values()]
    minutes = over_seeds(seeds, lambda one: one["cpu_minutes"])

    def cell(values: list[float], scale: float) -> str:
        if not values:
            return "-"
        return f"{scale * mean(values):.1f} ({scale * min(values):.1f} to {scale * max(values):.1f})"

    rows = [
        [
            name,
            str(len(counts[name])),
            *(cell(column.get(name, []), 100) for column in columns),
            cell(minutes[name], 1),
        ]
        for name in names
    ]
    heads = ["model", "seeds", *SHARES, "CPU min"]
    return ["## Over seeds: mean (lowest to highest)", "", *draw_lines([heads, *rows])]


def draw(table: dict) -> str:
    """The table in Markdown: accuracy in % with 95 % intervals (Wilson)."""
    lines = [f"# `{table['task']}`: accuracy in % by number of moves k, with 95 % intervals", ""]
    for seed, models in table["seeds"].items():
        first = next(iter(models.values()))
        lines += [
            f"## Seed {seed}: {first['answers'][AS_IS]['all']['rows']} unseen questions, by chance {100 * first['chance']:.1f}",
            "",
        ]
        lines += draw_lines([HEADS, *(draw_row(name, one) for name, one in models.items())])
    lines += draw_over_seeds(table["seeds"])
    for name, one in table["above the best direct twin"].items():
        lines.append(
            f"- {name}: {one['points']:+.1f} points from the best direct twin, {one['twin']} ({100 * one['twin_accuracy']:.1f}), "
            f"over {MANY}."
        )
    for seed, models in table["seeds"].items():
        lines += [
            f"- {name}, seed {seed}, {diagnostic}: {note}"
            for name, one in models.items()
            for diagnostic, found in one.get("report", {}).items()
            for note in found["notes"][:1]
        ]
    abouts = {one["arm"]: one["about"] for models in table["seeds"].values() for one in models.values()}
    return "\n".join([*lines, "", *(f"- {arm}: {about}" for arm, about in abouts.items())]) + "\n"
