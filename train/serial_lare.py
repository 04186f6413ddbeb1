"""LaRe learns a serial task: from nothing to a model that takes one refocusing step for every move, and its twins.

    python -m train.serial_lare --output out/hops

Data, a tower that sees the tiles, words, then LaRe's curriculum from the words' checkpoint, by the commands that the README
documents; what is there already is not made again. The twins learn from the same checkpoint and the same data without latents:
`direct` answers at once and is asked easy questions first, `shorter` loses its words step by step and gets nothing instead.
"""

import argparse
from pathlib import Path

from conversion.commands import exit_on_error
from train.recipes import IMAGE_SIZE, SHARED, run


NUM_STEPS = 4  # the most moves that are asked for
NUM_PICTURES = 6000  # each is asked about every number of moves
PORTION = 1600  # questions between two looks at the held-out ones: 100 steps
# A tile is one token: the window is one too, and a smaller Extractor than the default's learns as much.
SIZES = f"num_refocus_steps={NUM_STEPS} window_size=1 extractor_hidden_size=128 extractor_num_heads=4 extractor_num_layers=1"
TRAINING = (
    f"--data_format steps --samples_per_epoch {PORTION} --eval_share 0.02 --stage_measure turn --cache_image_features 1 "
    "--per_device_train_batch_size 16 --global_batch_size 16 --per_device_eval_batch_size 64 "
    "--lr_scheduler_type constant_with_warmup --warmup_steps 50 --adam_beta2 0.98 --decay_last_stage "
    f"--disable_tqdm true {SHARED}"
)
# Where a number of words is left out, the largest number of epochs that it takes; the last stage takes all of its own.
WORDS = "--curriculum 0 0 --epochs_per_stage 16 2 --stage_accuracy 0.98"
LATENTS = "--curriculum 1 2 3 4 --epochs_per_stage 16 10 12 12 --stage_accuracy 0.97"
SHORTER = "--curriculum 1 2 3 4 --epochs_per_stage 16 10 12 12 --stage_accuracy 0.97"
DIRECT = "--curriculum 4 4 4 4 --epochs_per_stage 16 10 12 12 --stage_accuracy 0.97 --stage_longest 1 2 3 4"


def stage(output: Path, before: str, after: str, number: int, options: str) -> tuple[str, str]:
    return (
        f"{output}/{after}/config.json",
        f"train.train_lare --stage {number} --model_path {output}/{before} --data_path {output}/train/data.jsonl "
        f"--output_dir {output}/{after} {options} {TRAINING}",
    )


def prepare(output: Path, task: str) -> list[tuple[str, str]]:
    """Data, tower, conversion, and the plain model that reasons in words."""
    sets = f"--image-size {IMAGE_SIZE} --force --questions"
    texts = f"{output}/train/data.jsonl"
    return [
        (texts, f"train.tasks --task {task} --n {NUM_PICTURES} --split train {sets} steps --output {output}/train"),
        (
            f"{output}/test/data.jsonl",
            f"train.tasks --task {task} --n 480 --split test {sets} one --output {output}/test",
        ),
        (
            f"{output}/clip/vae/config.json",
            f"train.lare.small --data {texts} --output {output}/clip --image-size {IMAGE_SIZE} --patch-size 28",
        ),
        (
            f"{output}/clip/vision/vision_pretraining.json",
            f"train.vision_pretraining --model {output}/clip/vision --data {texts} --epochs 5 --batch-size 64 "
            "--learning-rate 1e-3",
        ),
        (
            f"{output}/lare/config.json",
            f"conversion.convert_lare --vision-tower {output}/clip/vision --language-model {output}/clip/language "
            f"--output {output}/lare --set {SIZES}",
        ),
        stage(output, "lare", "words", 0, f"{WORDS} --learning_rate 1e-3"),
    ]


def commands_of(output: Path, task: str, names: list[str]) -> list[tuple[str, str]]:
    """What makes the named models, in order."""
    latents = (
        f"{LATENTS} --learning_rate 5e-4 --fresh_objective --start_delimiters --hidden_windows 0.5 "
        "--align_loss_weight 0 --image_loss_weight 0 --text_loss_weight 0.5"
    )
    models = {
        "latents": stage(output, "words", "latents", 4, latents),
        "direct": stage(output, "words", "direct", 0, f"{DIRECT} --learning_rate 5e-4"),
        "shorter": stage(output, "words", "shorter", 0, f"{SHORTER} --learning_rate 5e-4"),
    }
    return [*prepare(output, task), *(models[name] for name in names)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--task", default="hops", help="a serial task of `train.tasks` with as many moves (default: hops)"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=["latents", "direct", "shorter"],
        default=["latents"],
        help="beside the words' model",
    )
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    run(commands_of(args.output, args.task, args.models), args.output / "times.jsonl")


if __name__ == "__main__":
    with exit_on_error():
        main()
