"""Train DeepLatent in its stages: interleaved pictures, latent blocks in their place, reinforcement learning.

    python -m train.data.tasks --task all --n 2000 --seed 0 --output data/tasks
    python -m train.train_deeplatent --stage sft1 --model_path out/deeplatent --data_path data/tasks/data.jsonl \
        --output_dir out/sft1 --bf16
    python -m train.cache_teacher_states --model out/sft1 --data data/tasks/data.jsonl --output out/teacher
    python -m train.train_deeplatent --stage sft2 --model_path out/sft1 --data_path data/tasks/data.jsonl \
        --teacher_states out/teacher --output_dir out/sft2 --bf16 --gradient_checkpointing
    python -m train.train_deeplatent --stage rl --model_path out/sft2 --data_path data/tasks/data.jsonl --output_dir out/rl --bf16

Every argument of `transformers.TrainingArguments` works; `--stage sft2 --help` lists those of a stage. A run that was killed
goes on with `--resume_from_checkpoint last`. On several GPUs: `accelerate launch --config_file train/accelerate/fsdp2.yaml -m
train.train_deeplatent ..`. The objective is in `train/deeplatent/distillation.py`, the data formats in
`train/deeplatent/trajectories.py`. `output_dir` becomes a whole checkpoint; with `--lora` the adapter is merged into it.
"""

import sys
from importlib import import_module

from conversion.commands import CommandParser, exit_on_error


STAGES = {  # each with a `run(arguments)`
    "sft1": "train.deeplatent.sft",
    "sft2": "train.deeplatent.sft",
    "rl": "train.train_deeplatent_rl",
}


def build_parser() -> CommandParser:
    """The parser of the stage alone: the stage brings the others."""
    parser = CommandParser(
        description=__doc__,
        add_help=False,
        epilog="All other options are those of a stage: `--stage sft1 --help`, `--stage sft2 --help` and `--stage rl --help` list them.",
    )
    parser.add_argument(
        "--stage", choices=STAGES, required=True, help="sft1: pictures in the answer; sft2: latents; rl: GRPO"
    )
    return parser


def main(arguments: list[str]) -> None:
    parser = build_parser()
    if {"-h", "--help"} & set(arguments) and not any(one.partition("=")[0] == "--stage" for one in arguments):
        print(parser.format_help())
        return
    stage = parser.parse_known_args(arguments)[0].stage
    import_module(STAGES[stage]).run(arguments)


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
