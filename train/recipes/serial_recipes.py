"""Serial questions from nothing: a model that answers them by latent steps, its twins that have none, and the table of all.

    python -m train.recipes.serial_recipes --output out/serial                            # Vedas on `hops`, seed 0
    python -m train.recipes.serial_recipes --output out/serial --arms vedas words direct shorter pauses --seeds 0 1 2
    python -m train.recipes.serial_recipes --output out/serial --arms lare lare_words lare_direct lare_shorter
    python -m train.recipes.serial_recipes --output out/serial --arms deeplatent deeplatent_drawn      # by latent blocks
    python -m train.recipes.serial_recipes --output out/serial --arms direct direct_twice --rates      # each at its best rate of three
    python -m train.recipes.serial_recipes --output out/serial --arms vedas direct --plan  # says what is missing, and its minutes
    python -m train.recipes.serial_recipes --output out/serial --table --seeds 0 1 2 --fresh-seed 7 --report

An arm is a way to learn the same questions about the same pictures. All arms of a backbone and a seed begin with one backbone, one
vision tower that stays frozen, and one stage that reasons in words (`train/recipes/serial/`). Every command is one that the README
documents; it is printed as it runs, and what is there already is not made again, so that a run that was killed goes on. At the end stands
the accuracy by number of moves on pictures that were not seen, by `generate`; for arms with latents also with those of another
picture, zeros and noise: `table.md` and `table.json`, of all that was trained in the named seeds. `--table` trains nothing.

    --rates         the learning rate of each arm is the best of three at a quarter of the budget, by validation questions
    --fresh-seed N  asks all models also about pictures of another seed of the task: choose one that was never looked at
    --report        adds the diagnostics D1, D14, D15 and D16 of `evaluation.faithfulness` for every model with latents
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from conversion.commands import CommandParser, exit_on_error
from conversion.writing import write_file
from train.data.tasks.families import FAMILIES
from train.recipes.serial.arms import ARMS, Model
from train.recipes.serial.plan import Place, Stage, draw_again, shrink
from train.recipes.serial.rates import choose_rate, missing_choices, models_of, models_there, try_rates
from train.recipes.serial.scoring import fresh_scores, report_model, score_model
from train.recipes.serial.table import collect, draw
from train.recipes.small_models import SETTINGS, remember, run


def stages_of(place: Place, models: list[Model]) -> list[Stage]:
    """Everything that trains and asks the models, once each, in an order in which it can be made."""
    return once(stage for model in models for stage in [*model.build(place), *score_model(place, model)])


def once(stages) -> list[Stage]:
    return list({stage.made: stage for stage in stages}.values())


@dataclass(frozen=True)
class Plan:
    """What a command makes.

    Args:
        arms: by name.
        is_table: whether nothing is trained: only what is there is asked.
        has_rates: whether learning rates are chosen.
        fresh_seed: of other unseen pictures.
        has_report: whether diagnostics are taken.
        scale: share of the pictures; below 1 also the shortest stages.
    """

    places: list[Place]
    arms: list[str]
    is_table: bool = False
    has_rates: bool = False
    fresh_seed: int | None = None
    has_report: bool = False
    scale: float = 1.0

    def models(self, place: Place) -> list[Model]:
        return models_there(place, self.arms) if self.is_table else models_of(place, self.arms, self.has_rates)

    def choices(self) -> list[str]:
        """Arms whose rates are to be chosen first, in the first seed."""
        return missing_choices(self.places[0], self.arms) if self.has_rates and not self.is_table else []

    def search(self, name: str) -> list[Stage]:
        return self.sized(try_rates(self.places[0], name))

    def stages(self, place: Place) -> list[Stage]:
        models = self.models(place)
        if self.is_table:
            stages = once(stage for model in models for stage in score_model(place, model))
        else:
            stages = stages_of(place, models)
        if self.fresh_seed is not None:
            where = fresh_scores(self.fresh_seed)
            asked = [stage for model in models for stage in score_model(place, model, **where)]
            stages = [*stages, draw_again(place, self.fresh_seed), *asked]
        if self.has_report:
            stages = [*stages, *(stage for model in models for stage in report_model(place, model))]
        return self.sized(once(stages))

    def sized(self, stages: list[Stage]) -> list[Stage]:
        return stages if self.scale == 1 else [shrink(stage, self.scale) for stage in stages]

    def all_stages(self) -> list[Stage]:
        searched = [stage for name in self.choices() for stage in self.search(name)]
        return once([*searched, *(stage for place in self.places for stage in self.stages(place))])

    def make(self, output: Path) -> None:
        """Run what is missing, and write the table after every seed."""
        times = output / "times.jsonl"
        for name in self.choices():
            run([stage[:2] for stage in self.search(name)], times)
            print(f"{name}: learning rate {choose_rate(self.places[0], name)}", flush=True)
        for place in self.places:
            run([stage[:2] for stage in self.stages(place)], times)
            table = collect(self.places, list(ARMS))
            write_file(output / "table.json", json.dumps(table, indent=2) + "\n")
            write_file(output / "table.md", draw(table))
        print(draw(table), flush=True)


def describe_missing(stages: list[Stage]) -> str:
    missing = [stage for stage in stages if not Path(stage.made).is_file()]
    lines = [f"{stage.minutes:5.1f} min  {stage.made}" for stage in missing]
    total = sum(stage.minutes for stage in missing)
    return "\n".join([*lines, f"{total:5.1f} minutes of one CPU thread for {len(missing)} of {len(stages)} commands"])


def build_parser() -> CommandParser:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the models, one folder a seed")
    parser.add_argument("--task", choices=FAMILIES["serial"], help="by default that of the folder, or hops")
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), help="by default vedas; with --table all that are there"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of backbones and trainings (default: 0)")
    parser.add_argument("--plan", action="store_true", help="say what is missing and what it takes, and make nothing")
    parser.add_argument("--table", action="store_true", help="train nothing: ask what is there, and write the table")
    parser.add_argument(
        "--rates",
        action="store_true",
        help="choose the learning rate of every arm among three, at a quarter of the budget",
    )
    parser.add_argument(
        "--fresh-seed", "--fresh_seed", type=int, help="also ask about unseen pictures of this seed of the task"
    )
    parser.add_argument("--report", action="store_true", help="also take the diagnostics of serial questions")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="share of the pictures; below 1 also the shortest stages, to try it out",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    if not (0 < args.scale <= 1 and math.isfinite(args.scale)):
        raise ValueError(f"`scale` must be above 0 and at most 1, got {args.scale}.")
    if args.fresh_seed is not None and args.fresh_seed < 1:
        raise ValueError(f"`fresh_seed` must be >= 1, since all other pictures are of seed 0; got {args.fresh_seed}.")
    settings = args.output / SETTINGS
    begun = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    task = args.task or begun.get("task", "hops")
    places = [Place(args.output, task, seed) for seed in dict.fromkeys(args.seeds)]
    arms = args.arms or (list(ARMS) if args.table else ["vedas"])
    plan = Plan(places, arms, args.table, args.rates, args.fresh_seed, args.report, args.scale)
    print(describe_missing(plan.all_stages()), flush=True)
    if args.plan:
        return
    if args.table and not any(plan.models(place) for place in places):
        raise ValueError(f"`--table` needs trained models, but {args.output} has none of these arms and seeds.")
    remember(args.output, task=task, recipe="serial", **({} if args.scale == 1 else {"scale": args.scale}))
    plan.make(args.output)


if __name__ == "__main__":
    with exit_on_error():
        main()
