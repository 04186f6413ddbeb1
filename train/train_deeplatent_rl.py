"""Reinforcement learning of DeepLatent: GRPO over words and over how its latents are modulated.

    python -m train.data.tasks --task all --n 2000 --seed 0 --output data/tasks
    python -m train.train_deeplatent_rl --model_path out/deeplatent-sft2 --data_path data/tasks/data.jsonl \
        --output_dir out/deeplatent-rl --bf16 --gradient_checkpointing --report_to tensorboard

The objective is in `train/deeplatent/rl/objective.py`, rewards in `rewards.py`, the loop in `grpo_trainer.py`, the data
formats in `train/data/reasoning_data.py` (a row needs no rationale). A step takes the paper's 64 questions over all processes. Every argument of `transformers.TrainingArguments` works.
The paper's ablations: `--variant text`, `--train_latent_former`, `--latent_reward_weight 0.1`. A run that was killed goes
on with `--resume_from_checkpoint last`. `--dump_rollouts FOLDER` writes what was sampled.
"""

import sys
from dataclasses import dataclass, field

from transformers import AutoModel, AutoProcessor, set_seed

from conversion.commands import exit_on_error
from conversion.dataclass_parser import DataclassParser
from conversion.own_models import TRUST_HELP, check_model_type
from train.common.trained_sizes import record_image_sizes
from train.common.training_model import TrainingModel, run_training
from train.data.reasoning_data import ReasoningSample, read_reasoning
from train.deeplatent.rl.dump import RolloutDump
from train.deeplatent.rl.grpo_trainer import GRPOTrainer, GRPOTrainingArguments
from train.deeplatent.rl.judge import JudgeArguments
from train.deeplatent.rl.objective import GRPOObjective, ObjectiveArguments
from train.deeplatent.rl.policy import AdapterArguments, check_policy, prepare_policy
from train.deeplatent.rl.rewards import RewardArguments, WeightedRewards
from train.deeplatent.rl.rollouts import QuestionCollator, RolloutArguments


@dataclass
class ScriptArguments:
    model_path: str = field(metadata={"help": "Folder or hub id of a DeepLatent checkpoint, best one of SFT 2."})
    data_path: str = field(metadata={"help": "JSONL, parquet, or a folder that `datasets` wrote."})
    data_format: str = field(default="steps", metadata={"help": "steps, m3cot or scienceqa."})
    split: str = field(default="train", metadata={"help": "Of a `datasets` folder with several."})
    drop_incomplete: bool = field(default=False, metadata={"help": "Leave out rows without an answer."})
    instruction: str = field(default="", metadata={"help": "Put behind every question."})
    dtype: str = field(
        default="float32", metadata={"help": "Of the weights; `--bf16` computes in bfloat16 either way."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": TRUST_HELP})
    dump_rollouts: str | None = field(default=None, metadata={"help": "Folder for what was sampled, as JSONL."})
    dump_every: int = field(default=1, metadata={"help": "Steps from one dump to the next."})
    dump_pictures: bool = field(default=False, metadata={"help": "Also draw where the latents looked."})


def main(
    script: ScriptArguments,
    adapters: AdapterArguments,
    objective_args: ObjectiveArguments,
    rollout: RolloutArguments,
    reward_args: RewardArguments,
    judge: JudgeArguments,
    training_args: GRPOTrainingArguments,
) -> GRPOTrainer:
    set_seed(training_args.seed)
    rewards = WeightedRewards(reward_args, judge)
    check_model_type(script.model_path, "deeplatent", script.trust_remote_code)
    processor = AutoProcessor.from_pretrained(script.model_path, trust_remote_code=script.trust_remote_code)
    given = {"attn_implementation": script.attn_implementation} if script.attn_implementation else {}
    model = AutoModel.from_pretrained(
        script.model_path, trust_remote_code=script.trust_remote_code, dtype=script.dtype, **given
    )
    data = read_reasoning(
        script.data_path, script.data_format, script.split, script.drop_incomplete, needs_steps=False
    )
    check_policy(model, objective_args, data)
    record_image_sizes(processor, data, ReasoningSample.image_sizes)
    in_16_bits = training_args.bf16 or training_args.fp16
    model, reference = prepare_policy(model, objective_args, adapters, in_16_bits)
    dump = None
    if script.dump_rollouts:
        dump = RolloutDump(script.dump_rollouts, script.dump_every, script.dump_pictures)
    trainer = GRPOTrainer(
        model=TrainingModel(model, GRPOObjective(objective_args, rollout, reference)),
        args=training_args,
        train_dataset=data,
        data_collator=QuestionCollator(processor, script.instruction),
        processing_class=processor,
        rewards=rewards,
        dump=dump,
    )
    run_training(trainer, keeps_log=True)  # the curve of the rewards, for `train.deeplatent.rl.progress`
    return trainer


ARGUMENTS = (
    ScriptArguments,
    AdapterArguments,
    ObjectiveArguments,
    RolloutArguments,
    RewardArguments,
    JudgeArguments,
    GRPOTrainingArguments,
)


def build_parser() -> DataclassParser:
    parser = DataclassParser(ARGUMENTS)
    parser.add_argument("--stage", choices=["rl"], help="Given by `train.train_deeplatent`.")
    return parser


def run(arguments: list[str]) -> None:
    """What `train.train_deeplatent --stage rl` calls."""
    *parsed, _ = build_parser().parse_args_into_dataclasses(arguments)
    main(*parsed)


if __name__ == "__main__":
    with exit_on_error():
        run(sys.argv[1:])
