"""DeepLatent's ablations (the paper's tables 4, 5 and 6 and figure 4) at small scale: one command, a table with seeds.

    python -m train.recipes deeplatent --output out/deeplatent-small
    python -m train.recipes.ablations --base out/deeplatent-small --output out/ablations --seeds 0 1 2

Every variant is SFT 2, or the stage that takes its place, from the same SFT-1 model; those of reinforcement learning go on from
the first variant of their seed. A variant is a line of flags below. What is trained already is not trained again. The table
gives accuracy on the recipe's unseen questions, mean and standard deviation over the seeds, with and without latents.
"""

import json
import statistics
from pathlib import Path

from conversion.commands import CommandParser, exit_on_error
from conversion.writing import write_file
from train.recipes.small_models import BATCH, RL_STEPS, SMALL_RL, run, score


SFT2 = "--stage sft2 --teacher_path {base}/sft1"
RL = f"--stage rl {SMALL_RL}"
FULL = "full"
# What is ablated, and how: the model it starts from ({base}: the recipe's folder, {seed}: that of the seed) and its flags.
VARIANTS: dict[str, tuple[str, str]] = {
    FULL: ("{base}/sft1", SFT2),
    "no LatentFormer": ("{base}/sft1", f"{SFT2} --config_overrides latentformer_layers=0"),
    "2 LatentFormer layers": ("{base}/sft1", f"{SFT2} --config_overrides latentformer_layers=2"),
    "no query modulation": ("{base}/sft1", f"{SFT2} --config_overrides modulate_queries=false"),
    "no image modulation": ("{base}/sft1", f"{SFT2} --config_overrides modulate_images=false"),
    "no distillation": ("{base}/sft1", "--stage sft2 --align_loss_weight 0"),
    "text-only CoT": ("{base}/sft1", "--stage sft1 --chain_of_thought text"),
    "visual-only CoT": ("{base}/sft1", f"{SFT2} --chain_of_thought visual"),
    "text GRPO": ("{seed}/full", f"{RL} --variant text"),
    "text GRPO, LatentFormer learns": ("{seed}/full", f"{RL} --variant text --train_latent_former"),
    "joint GRPO": ("{seed}/full", RL),
    "joint GRPO, LatentFormer learns": ("{seed}/full", f"{RL} --train_latent_former"),
    "joint GRPO, paid for latents": ("{seed}/full", f"{RL} --latent_reward_weight 0.1"),
}
# The paper's figure 4: as many latents at once as one by one. More than 16 need pictures of more than 112 pixels.
FIGURE_4 = {1: "[1,1]", 4: "[2,2]", 16: "[4,4]"}
for count, grid in FIGURE_4.items():
    fixed = f"{SFT2} --config_overrides latent_scale=fixed fixed_latent_grid={grid}"
    one_by_one = f"{SFT2} --config_overrides latent_mode=autoregressive num_autoregressive_latents={count}"
    VARIANTS |= {f"{count} in parallel": ("{base}/sft1", fixed), f"{count} one by one": ("{base}/sft1", one_by_one)}


def commands(
    name: str, base: Path, seed_folder: Path, seed: int, sft: str, rl: str
) -> tuple[Path, list[tuple[str, str]]]:
    """The folder of a variant's model and what makes it.

    Args:
        sft, rl: further flags of either kind of stage, such as `--max_steps 60`.
    """
    start, flags = (part.format(base=base, seed=seed_folder) for part in VARIANTS[name])
    output = seed_folder / name.replace(" ", "-").replace(",", "")
    data, further = ("questions", rl) if "--stage rl" in flags else ("train", sft)
    command = (
        f"train.train_deeplatent {flags} --model_path {start} --data_path {base}/{data}/data.jsonl --output_dir {output} "
        f"--seed {seed} --report_to none --save_strategy no {further}"
    )
    return output, [(f"{output}/config.json", command)]


def tabulate(results: dict[str, list[dict[str, float]]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| variant | accuracy | without latents | seeds |", "|---|---|---|---|"]
    for name, scores in results.items():
        cells = []
        for arm in ("latents", "no latents"):
            values = [100 * one[arm] for one in scores]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {len(scores)} |")
    return lines


def build_parser() -> CommandParser:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="folder that `train.recipes deeplatent` wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder for the models and the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the trainings")
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="what is ablated (default: all)"
    )
    sft = f"--num_train_epochs 2 --learning_rate 5e-4 --per_device_train_batch_size {BATCH} --gradient_accumulation_steps 1"
    parser.add_argument("--sft", default=sft, help="further flags of SFT")
    parser.add_argument("--rl", default=f"--max_steps {RL_STEPS}", help="further flags of reinforcement learning")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    for needed in ("sft1/config.json", *(f"{name}/data.jsonl" for name in ("train", "questions", "test"))):
        if not (args.base / needed).is_file():
            raise ValueError(
                f"`base` must be what `train.recipes deeplatent` wrote, but {args.base / needed} is missing."
            )
    needs_full = any(VARIANTS[name][0] == "{seed}/full" for name in args.variants)
    names = [FULL, *(name for name in args.variants if name != FULL)] if needs_full else args.variants
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for seed in args.seeds:
        for name in names:
            folder, todo = commands(name, args.base, args.output / f"seed{seed}", seed, args.sft, args.rl)
            run(todo)
            kept = folder / "scores.json"
            if not kept.is_file():
                write_file(
                    kept, json.dumps(score(folder, args.base / "test" / "data.jsonl", ("latents", "no latents")))
                )
            results[name].append(json.loads(kept.read_text()))
    lines = tabulate(results)
    write_file(args.output / "ablations.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    with exit_on_error():
        main()
