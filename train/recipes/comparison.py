"""What latents are worth: every small model in several arms, and twins of its backbone that never had any, in one table.

    python -m train.recipes.comparison --run out/small                        # the folder that `train.recipes` wrote
    python -m train.recipes.comparison --run out/small --models lare --arms "as trained" "swap"

| arm            | what answers                                                                                    |
|----------------|-------------------------------------------------------------------------------------------------|
| as trained     | the model                                                                                       |
| latents off    | the same weights, no blocks or steps                                                            |
| swap           | the same weights, latents replaced by another picture's of the same task, with another answer  |
| swap other task | the same weights, latents replaced by a picture's of another task: what they hold of the task is wrong too |
| noise          | the same weights, latents replaced by noise, as the swaps at the same norm                     |
| direct         | the same backbone, trained by the same script on the same data to answer without any reasoning |
| text reasoning | the same, trained to reason in words                                                            |

Twins that are missing are trained first, on the same data with the same optimizer: the direct one at each of three learning
rates, of which the best on questions of the split "val" counts (`twins.json`, curves in `twins.png`), the reasoning one at the
recipe's. LaRe's direct twin takes as many steps as LaRe; those of Qwen's backbone as many as DeepLatent, and Vedas takes more.
LaRe's reasoning twin is its stage 0. "Latents off" of a LaRe answers with the picture in sight, also where the model as trained
answers from its latents alone. What was measured already is not measured again. Writes `comparison.md` and a table for each
model into the run: accuracy with 95 % intervals, and how much more often the model is right than each arm on the same questions
(bootstrap of the differences).
"""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from conversion.commands import CommandParser, exit_on_error
from conversion.writing import replaced_file, write_file
from train.data.tasks.families import tasks_of
from train.recipes.small_models import (
    ANSWER_TOKENS,
    BATCH,
    ENDS,
    LANGUAGES,
    LARE_STAGES,
    RECIPES,
    SETTINGS,
    SHARED,
    make_set,
    run,
    sft_epochs,
)


RATES = ("3e-4", "1e-3", "3e-3")  # of direct twins of small models


@dataclass(frozen=True)
class Arm:
    """`folder` of the run, by default the model's own; `options` of `evaluation.evaluate`."""

    options: str = ""
    folder: str | None = None


OWN = {
    "as trained": Arm(),
    "latents off": Arm("--latents off"),
    "swap": Arm("--latent_intervention swap"),
    "swap other task": Arm("--latent_intervention swap --donors other_task"),
    "noise": Arm("--latent_intervention noise"),
}


def arms_of(model: str) -> dict[str, Arm]:
    is_lare = model.startswith("lare")
    kind = "clip" if is_lare else "qwen"
    text = "lare-stage0" if is_lare else "qwen-text"
    twins = {"direct": Arm("--latents off", f"{kind}-direct"), "text reasoning": Arm("--latents off", text)}
    return OWN | twins


@dataclass(frozen=True)
class Run:
    """A folder of recipes, and what it was begun with."""

    output: Path
    task: str
    scale: float
    language: str
    batch_size: int = 40

    def rate(self, rate: str) -> str:
        return f"{float(rate) * LANGUAGES[self.language][1]:g}"

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(tasks_of(self.task)))


def open_run(output: Path, batch_size: int) -> Run:
    """Raises:
    ValueError: no recipe has begun there.
    """
    path = output / SETTINGS
    if not path.is_file():
        raise ValueError(f"{output} holds no {SETTINGS}: it must be the output of `train.recipes`.")
    return Run(output, **json.loads(path.read_text(encoding="utf-8")), batch_size=batch_size)


def twin_commands(folder: str, of: Run, rate: str = RATES[1]) -> list[tuple[str, str]]:
    """How a twin is trained from the backbone that the recipes made; the language twins of Qwen-VL are DeepLatent without blocks.

    Args:
        folder: `clip-direct`, `qwen-direct` or `qwen-text`, with anything behind it.
    """
    output, is_clip = of.output, folder.startswith("clip")
    epochs = sum(sft_epochs(of.task, of.scale))
    if is_clip:
        epochs = sum(share for share, _ in LARE_STAGES.values()) if of.scale >= 1 else 1
    size = (32 if of.scale >= 1 else 8) if is_clip else BATCH
    data = f"--data_path {output}/train/data.jsonl --output_dir {output}/{folder} --num_train_epochs {epochs}"
    common = f"{data} --learning_rate {of.rate(rate)} --per_device_train_batch_size {size} {SHARED}"
    if is_clip:
        command = (
            f"train.train_lare --stage 0 --direct_answers --data_format steps --model_path {output}/lare "
            f"--lr_scheduler_type constant_with_warmup --global_batch_size {size} {common}"
        )
        return [(f"{output}/{folder}/config.json", command)]
    chain = "none" if folder.startswith("qwen-direct") else "text"
    converted = f"{output}/deeplatent/config.json"  # not there where Vedas alone was trained
    before = [one for one in RECIPES["deeplatent"][0](output, of.task, of.scale, of.language) if one[0] == converted]
    command = (
        f"train.train_deeplatent --stage sft1 --chain_of_thought {chain} --model_path {output}/deeplatent "
        f"--gradient_accumulation_steps 1 {common}"
    )
    return [*before, (f"{output}/{folder}/config.json", command)]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def choose_rate(folder: str, of: Run) -> str:
    """Train a twin at every rate that is not there yet, and return that which is right most often on validation questions."""
    output, found = of.output, {}
    run([make_set(output, "val", ",".join(of.tasks), "val", 400 * len(of.tasks), of.scale)])
    for rate in RATES:
        name = f"{folder}-{rate}"
        run(twin_commands(name, of, rate), output / "times.jsonl")
        found[rate] = evaluate(Arm("--latents off"), name, "val", output / "scores" / name, of)["all"]["accuracy"]
    best = max(RATES, key=found.get)
    path = output / "twins.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_file(path, json.dumps(known | {folder: {"validation accuracy": found, "chosen": best}}, indent=2))
    return best


def draw_curves(output: Path) -> Path:
    """Draw the losses of every direct twin that was trained: `twins.png`."""
    from matplotlib.figure import Figure

    kinds = [name for name in ("qwen-direct", "clip-direct") if list(output.glob(f"{name}-*"))]
    figure = Figure(figsize=(5 * len(kinds), 3.4), layout="constrained")
    for axis, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds):
        for rate in RATES:
            states = sorted((output / f"{kind}-{rate}").glob("checkpoint-*/trainer_state.json"))
            history = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"] if states else []
            points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
            if points:
                axis.plot(*zip(*points), label=rate)
        axis.set(title=f"{kind}, the twin that answers at once", xlabel="step", ylabel="loss", yscale="log")
        axis.legend(title="learning rate")
    with replaced_file(output / "twins.png") as partial:
        figure.savefig(partial, dpi=110)
    return output / "twins.png"


def evaluate(arm: Arm, folder: str, split: str, scores: Path, of: Run) -> dict:
    """The summary of `evaluation.evaluate`."""
    command = (
        f"evaluation.evaluate --model {of.output}/{folder} --data {of.output}/{split}/data.jsonl --output {scores} {arm.options} "
        f"--max_new_tokens {ANSWER_TOKENS} --batch_size {of.batch_size} --dtype float32"
    )
    print(f"$ python -m {command}", flush=True)
    subprocess.run([sys.executable, "-m", *shlex.split(command)], check=True)
    return json.loads((scores / "summary.json").read_text(encoding="utf-8"))


def measure(model: str, name: str, of: Run) -> tuple[dict, list[dict]]:
    """The summary of one arm, and its rows by id."""
    arm = arms_of(model)[name]
    folder = arm.folder or ENDS[model]
    if name == "direct":
        folder = f"{folder}-{choose_rate(folder, of)}"
    elif arm.folder is not None and not (of.output / folder / "config.json").is_file():
        run(twin_commands(folder, of), of.output / "times.jsonl")
    scores = of.output / "scores" / model / name.replace(" ", "-")
    summary = evaluate(arm, folder, "test", scores, of)
    return summary, sorted(read_lines(scores / "results.jsonl"), key=lambda row: row["id"])


def percent(numbers: dict) -> str:
    if numbers["accuracy"] is None:
        return "-"  # no row had a donor
    low, high = 100 * numbers["accuracy_low"], 100 * numbers["accuracy_high"]
    return f"{100 * numbers['accuracy']:.1f} ({low:.1f} to {high:.1f})"


def gain(own: list[dict], other: list[dict], task: str) -> str:
    """In points, how much more often `own` is right on the same questions; those that could not be swapped are left out."""
    from evaluation.faithfulness.statistics import paired  # scipy takes seconds to import

    pairs = [
        (one["correct"], two["correct"])
        for one, two in zip(own, other, strict=True)
        if one["task"] == task and not two.get("not_swapped", False)
    ]
    mean, low, high = (100 * value for value in paired(*zip(*pairs)))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def draw(measured: dict[tuple[str, str], tuple[dict, list[dict]]]) -> str:
    """A table in Markdown: accuracy in % with 95 % intervals by task, and what an answer took; then the gains by task."""
    tasks = sorted({task for summary, _ in measured.values() for task in summary["tasks"]})
    heads = ["model", "arm", *tasks, "tokens", "latents", *(f"model - arm, {task}" for task in tasks)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for (model, arm), (summary, rows) in measured.items():
        cells = [percent(summary["tasks"][task]) if task in summary["tasks"] else "-" for task in tasks]
        whole = summary["all"]
        cells += [f"{whole['answer_tokens']:.1f}", f"{whole['latents']:.1f}"]
        own = measured.get((model, "as trained"))
        is_other = own is not None and arm != "as trained"
        cells += [gain(own[1], rows, task) if is_other and task in summary["tasks"] else "-" for task in tasks]
        kept = summary["all"].get("not_swapped", 0)
        note = f" ({kept} rows left out: no donor)" if kept else ""
        lines.append("| " + " | ".join([model, arm + note, *cells]) + " |")
    return "\n".join(lines) + "\n"


def build_parser() -> CommandParser:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="output of `train.recipes`")
    parser.add_argument("--models", nargs="+", choices=sorted(RECIPES), help="by default those that are trained there")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=list(arms_of("lare")),
        default=list(arms_of("lare")),
        help="what answers (default: all)",
    )
    parser.add_argument("--batch-size", type=int, default=40, help="questions at a time")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    of = open_run(args.run, args.batch_size)
    there = [model for model in sorted(RECIPES) if (args.run / ENDS[model] / "config.json").is_file()]
    missing = [model for model in args.models or sorted(RECIPES)[:1] * (not there) if model not in there]
    if missing:
        raise ValueError(
            f"{args.run} has no trained {missing[0]}: run `python -m train.recipes {missing[0]} --output {args.run}`."
        )
    models = args.models or there
    measured = {(model, arm): measure(model, arm, of) for model in models for arm in args.arms}
    if list(args.run.glob("*-direct-*")):
        draw_curves(args.run)
    for model in models:
        own = {key: summary for key, summary in measured.items() if key[0] == model}
        write_file(args.run / f"{model}.md", draw(own))
    write_file(args.run / "comparison.md", draw(measured))
    print(draw(measured))


if __name__ == "__main__":
    with exit_on_error():
        main()
