"""What latents are worth: every small model in several arms, and twins of its backbone that never had any, in one table.

    python -m train.comparison --run out/small                        # the folder that `train.recipes` wrote
    python -m train.comparison --run out/small --models lare --arms "as trained" "swap"

| arm            | what answers                                                                                    |
|----------------|-------------------------------------------------------------------------------------------------|
| as trained     | the model                                                                                       |
| latents off    | the same weights, no blocks or steps                                                            |
| swap, noise    | the same weights, latents replaced by those of another picture (same norm), by noise            |
| direct         | the same backbone, trained by the same script on the same data to answer without any reasoning |
| text reasoning | the same, trained to reason in words                                                            |

Twins that are missing are trained first, as many steps as the model took: the direct one at each of three learning rates, of
which the best on questions of the split "val" counts (`twins.json`, curves in `twins.png`); the reasoning one at the recipe's
rate. "LaRe, latents off" answers with the picture in sight, also where the model as trained answers from its latents alone.
What was measured already is not measured again. Writes `comparison.md` and a table for each model into the run: accuracy with
95 % intervals, and how much more often the model is right than each arm on the same questions (bootstrap of the differences).
"""

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from train.checkpoints import ENDS
from train.faithfulness.statistics import paired
from train.recipes import LARE_STAGES, RECIPES, SHARED, make_set, run


RATES = ("3e-4", "1e-3", "3e-3")  # of direct twins; the recipes' own is the middle one


@dataclass(frozen=True)
class Arm:
    """`folder` of the run, by default the model's own; `options` of `train.evaluate`."""

    options: str = ""
    folder: str | None = None


OWN = {
    "as trained": Arm(),
    "latents off": Arm("--latents off"),
    "swap": Arm("--latent_intervention swap"),
    "noise": Arm("--latent_intervention noise"),
}


def arms_of(model: str) -> dict[str, Arm]:
    is_lare = model.startswith("lare")
    kind = "clip" if is_lare else "qwen"
    text = "lare-stage0" if is_lare else "qwen-text"
    twins = {"direct": Arm("--latents off", f"{kind}-direct"), "text reasoning": Arm("--latents off", text)}
    return OWN | twins


def twin_commands(folder: str, output: Path, scale: float, rate: str = RATES[1]) -> list[tuple[str, str]]:
    """How a twin is trained from the backbone that the recipes made; the language twins of Qwen-VL are DeepLatent without blocks.

    Args:
        folder: `clip-direct`, `qwen-direct` or `qwen-text`, with anything behind it.
    """
    epochs = 1
    if scale >= 1:
        epochs = sum(share for share, _ in LARE_STAGES.values()) if folder.startswith("clip") else 9
    data = f"--data_path {output}/train/data.jsonl --output_dir {output}/{folder} --num_train_epochs {epochs}"
    common = f"{data} --learning_rate {rate} --per_device_train_batch_size {32 if scale >= 1 else 8} {SHARED}"
    if folder.startswith("clip-direct"):
        size, before = 32 if scale >= 1 else 8, []
        command = (
            f"train.train_lare --stage 0 --direct_answers --data_format steps --model_path {output}/lare "
            f"--global_batch_size {size} {common}"
        )
    else:
        chain = "none" if folder.startswith("qwen-direct") else "text"
        converted = f"{output}/deeplatent/config.json"  # not there where Vedas alone was trained
        before = [one for one in RECIPES["deeplatent"][0](output, "color", scale) if one[0] == converted]
        command = (
            f"train.train_deeplatent --stage sft1 --chain_of_thought {chain} --model_path {output}/deeplatent "
            f"--gradient_accumulation_steps 1 {common}"
        )
    return [*before, (f"{output}/{folder}/config.json", command)]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def choose_rate(folder: str, output: Path, scale: float, batch_size: int) -> str:
    """Train a twin at every rate that is not there yet, and return that which is right most often on validation questions."""
    rows = read_lines(output / "test" / "data.jsonl")
    tasks = ",".join(dict.fromkeys(row["task"] for row in rows))
    run([make_set(output, "val", tasks, "val", len(rows), 1.0)])
    found = {}
    for rate in RATES:
        name = f"{folder}-{rate}"
        run(twin_commands(name, output, scale, rate), output / "times.jsonl")
        arm = Arm("--latents off", name)
        found[rate] = evaluate(arm, name, "val", output / "scores" / name, output, batch_size)["all"]["accuracy"]
    best = max(RATES, key=found.get)
    path = output / "twins.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(known | {folder: {"validation accuracy": found, "chosen": best}}, indent=2))
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
        axis.set(title=f"{kind} twin", xlabel="step", ylabel="loss of the answer")
        axis.legend(title="learning rate")
    figure.savefig(output / "twins.png", dpi=110)
    return output / "twins.png"


def evaluate(arm: Arm, folder: str, split: str, scores: Path, output: Path, batch_size: int) -> dict:
    """The summary of `train.evaluate`."""
    command = (
        f"train.evaluate --model {output}/{folder} --data {output}/{split}/data.jsonl --output {scores} {arm.options} "
        f"--max_new_tokens 96 --batch_size {batch_size} --dtype float32"
    )
    print(f"$ python -m {command}", flush=True)
    subprocess.run([sys.executable, "-m", *shlex.split(command)], check=True)
    return json.loads((scores / "summary.json").read_text(encoding="utf-8"))


def measure(model: str, name: str, output: Path, scale: float, batch_size: int) -> tuple[dict, list[dict]]:
    """The summary of one arm, and its rows in the order of the test set."""
    arm = arms_of(model)[name]
    folder = arm.folder or ENDS[model]
    if name == "direct":
        folder = f"{folder}-{choose_rate(folder, output, scale, batch_size)}"
    elif arm.folder is not None and not (output / folder / "config.json").is_file():
        run(twin_commands(folder, output, scale), output / "times.jsonl")
    scores = output / "scores" / model / name.replace(" ", "-")
    summary = evaluate(arm, folder, "test", scores, output, batch_size)
    return summary, sorted(read_lines(scores / "results.jsonl"), key=lambda row: row["id"])


def percent(numbers: dict) -> str:
    low, high = 100 * numbers["accuracy_low"], 100 * numbers["accuracy_high"]
    return f"{100 * numbers['accuracy']:.1f} ({low:.1f} to {high:.1f})"


def gain(own: list[dict], other: list[dict], task: str) -> str:
    """In points, how much more often `own` is right on the same questions."""
    pairs = [(one["correct"], two["correct"]) for one, two in zip(own, other, strict=True) if one["task"] == task]
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
        lines.append("| " + " | ".join([model, arm, *cells]) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="output of `train.recipes`")
    parser.add_argument("--models", nargs="+", choices=sorted(RECIPES), default=sorted(RECIPES))
    parser.add_argument("--arms", nargs="+", choices=list(arms_of("lare")), default=list(arms_of("lare")))
    parser.add_argument("--batch-size", type=int, default=40)
    parser.add_argument("--scale", type=float, default=1.0, help="that of the recipes")
    args = parser.parse_args(arguments)
    for model in args.models:
        if not (args.run / ENDS[model] / "config.json").is_file():
            parser.error(
                f"{args.run} has no trained {model}: run `python -m train.recipes {model} --output {args.run}`."
            )
    measured = {
        (model, arm): measure(model, arm, args.run, args.scale, args.batch_size)
        for model in args.models
        for arm in args.arms
    }
    if list(args.run.glob("*-direct-*")):
        draw_curves(args.run)
    for model in args.models:
        (args.run / f"{model}.md").write_text(
            draw({key: summary for key, summary in measured.items() if key[0] == model}), encoding="utf-8"
        )
    (args.run / "comparison.md").write_text(draw(measured), encoding="utf-8")
    print(draw(measured))


if __name__ == "__main__":
    main()
