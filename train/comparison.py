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

Twins that are missing are trained first. They have the learning rate of the recipe, which was not searched for them. What was
measured already is not measured again. Writes `comparison.md` and a table for each model into the run.
"""

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from train.checkpoints import ENDS
from train.recipes import RECIPES, SHARED, run


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
    kind = "clip" if model == "lare" else "qwen"
    text = "lare-stage0" if model == "lare" else "qwen-text"
    twins = {"direct": Arm("--latents off", f"{kind}-direct"), "text reasoning": Arm("--latents off", text)}
    return OWN | twins


def twin_commands(folder: str, output: Path, scale: float) -> list[tuple[str, str]]:
    """How a twin is trained from the backbone that the recipes made; the language twins of Qwen-VL are DeepLatent without blocks."""
    epochs = {"clip-direct": 6, "qwen-direct": 5, "qwen-text": 4}[folder] if scale >= 1 else 1
    data = f"--data_path {output}/train/data.jsonl --output_dir {output}/{folder} --num_train_epochs {epochs}"
    common = f"{data} --learning_rate 1e-3 --per_device_train_batch_size {32 if scale >= 1 else 8} {SHARED}"
    if folder == "clip-direct":
        size, before = 32 if scale >= 1 else 8, []
        command = (
            f"train.train_lare --stage 0 --direct_answers --data_format steps --model_path {output}/lare "
            f"--global_batch_size {size} {common}"
        )
    else:
        chain = {"qwen-direct": "none", "qwen-text": "text"}[folder]
        converted = f"{output}/deeplatent/config.json"  # not there where Vedas alone was trained
        before = [one for one in RECIPES["deeplatent"][0](output, "color", scale) if one[0] == converted]
        command = (
            f"train.train_deeplatent --stage sft1 --chain_of_thought {chain} --model_path {output}/deeplatent "
            f"--gradient_accumulation_steps 1 {common}"
        )
    return [*before, (f"{output}/{folder}/config.json", command)]


def measure(model: str, name: str, output: Path, scale: float, batch_size: int) -> dict:
    """The summary of `train.evaluate` for one arm."""
    arm = arms_of(model)[name]
    folder = arm.folder or ENDS[model]
    if arm.folder is not None and not (output / folder / "config.json").is_file():
        run(twin_commands(folder, output, scale), output / "times.jsonl")
    scores = output / "scores" / model / name.replace(" ", "-")
    command = (
        f"train.evaluate --model {output}/{folder} --data {output}/test/data.jsonl --output {scores} {arm.options} "
        f"--max_new_tokens 96 --batch_size {batch_size} --dtype float32"
    )
    print(f"$ python -m {command}", flush=True)
    subprocess.run([sys.executable, "-m", *shlex.split(command)], check=True)
    return json.loads((scores / "summary.json").read_text(encoding="utf-8"))


def percent(numbers: dict) -> str:
    low, high = 100 * numbers["accuracy_low"], 100 * numbers["accuracy_high"]
    return f"{100 * numbers['accuracy']:.1f} ({low:.1f} to {high:.1f})"


def draw(measured: dict[tuple[str, str], dict]) -> str:
    """A table in Markdown: accuracy in % with 95 % intervals by task, and what an answer took."""
    tasks = sorted({task for summary in measured.values() for task in summary["tasks"]})
    heads = ["model", "arm", *tasks, "tokens", "latents"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for (model, arm), summary in measured.items():
        cells = [percent(summary["tasks"][task]) if task in summary["tasks"] else "-" for task in tasks]
        whole = summary["all"]
        cells += [f"{whole['answer_tokens']:.1f}", f"{whole['latents']:.1f}"]
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
    for model in args.models:
        (args.run / f"{model}.md").write_text(
            draw({key: summary for key, summary in measured.items() if key[0] == model}), encoding="utf-8"
        )
    (args.run / "comparison.md").write_text(draw(measured), encoding="utf-8")
    print(draw(measured))


if __name__ == "__main__":
    main()
