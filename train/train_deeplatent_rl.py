"""Reinforcement learning of DeepLatent: GRPO over words and over how its latents are modulated.

    python -m train.tasks --task all --n 2000 --seed 0 --output data/tasks
    python -m train.train_deeplatent_rl --model_path out/deeplatent-sft2 --data_path data/tasks/data.jsonl \
        --output_dir out/deeplatent-rl --bf16 --gradient_checkpointing --report_to tensorboard

The objective is in `train/deeplatent_rl/objective.py`, rewards in `rewards.py`, the loop in `grpo_trainer.py`, the data
formats in `train/reasoning_data.py` (a row needs no rationale). Every argument of `transformers.TrainingArguments` works.
The paper's ablations: `--variant text`, `--train_latent_former`, `--latent_reward_weight 0.1`. A run that was killed goes
on with `--resume_from_checkpoint last`. `--dump_rollouts FOLDER` writes what was sampled.
"""

import copy
from dataclasses import dataclass, field

from torch import nn
from transformers import AutoModel, AutoProcessor, HfArgumentParser, set_seed

from train.deeplatent_rl.dump import RolloutDump
from train.deeplatent_rl.grpo_trainer import MODULATION, GRPOTrainer, GRPOTrainingArguments
from train.deeplatent_rl.judge import JudgeArguments
from train.deeplatent_rl.objective import GRPOObjective, ObjectiveArguments
from train.deeplatent_rl.rewards import RewardArguments, WeightedRewards
from train.deeplatent_rl.rollouts import QuestionCollator, RolloutArguments
from train.reasoning_data import ReasoningSample, read_reasoning
from train.train_vedas import LORA_TARGETS, save_trained
from train.training_model import TrainingModel, last_complete_checkpoint


@dataclass
class ScriptArguments:
    model_path: str = field(metadata={"help": "Folder or hub id of a DeepLatent checkpoint, best one of SFT 2."})
    data_path: str = field(metadata={"help": "JSONL, parquet, or a folder that `datasets` wrote."})
    data_format: str = field(default="steps", metadata={"help": "steps, m3cot or scienceqa."})
    split: str = field(default="train", metadata={"help": "Of a `datasets` folder with several."})
    drop_incomplete: bool = field(default=False, metadata={"help": "Leave out rows without an answer."})
    instruction: str = field(default="", metadata={"help": "Put behind every question."})
    lora: bool = field(
        default=False, metadata={"help": "Adapters on the language model; the modulation trains in full."}
    )
    lora_r: int = field(default=64, metadata={"help": "Rank."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale; alpha / r multiplies the adapter."})
    dtype: str = field(
        default="float32", metadata={"help": "Of the weights; `--bf16` computes in bfloat16 either way."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2, ..."})
    dump_rollouts: str | None = field(default=None, metadata={"help": "Folder for what was sampled, as JSONL."})
    dump_every: int = field(default=1, metadata={"help": "Steps from one dump to the next."})
    dump_pictures: bool = field(default=False, metadata={"help": "Also draw where the latents looked."})


def trained_names(model, arguments: ObjectiveArguments) -> tuple[str, ...]:
    """Prefixes of what learns; the vision tower, Q, the scale head and e_* never do."""
    names = ("model.language_model.", "lm_head.")
    if arguments.variant == "joint":
        names += tuple(f"latent_blocks.{part}." for part in MODULATION)
    if arguments.train_latent_former:
        names += ("latent_blocks.layers.", "latent_blocks.image_index.")
    return names


def check_policy(model, arguments: ObjectiveArguments, data: list[ReasoningSample]) -> None:
    """Raise where there would be no latent to learn from."""
    config = model.config
    if not any(sample.images for sample in data):
        raise ValueError("No sample has an image, but latents are made of images.")
    if arguments.variant != "joint":
        return
    if config.latent_mode != "parallel" or not (config.modulate_queries or config.modulate_images):
        raise ValueError(
            "`variant='joint'` needs a modulation to learn, but the checkpoint has `latent_mode` "
            f"{config.latent_mode!r}, `modulate_queries` {config.modulate_queries}, `modulate_images` "
            f"{config.modulate_images}: use `variant='text'`."
        )


def prepare_policy(model, arguments: ObjectiveArguments, script: ScriptArguments, in_16_bits: bool):
    """Freeze what does not learn; return the policy and its reference (None: the policy without its adapters)."""
    names = trained_names(model, arguments)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(names))
    model.latent_blocks.float()  # small, and read by densities that 16 bits would drown
    reference = None
    if script.lora:
        model = add_adapters(model, names, script)
    elif arguments.kl_weight:
        # All but the vision tower, which is frozen in both.
        visual = model.model.visual
        reference = copy.deepcopy(model, {id(visual): visual}).requires_grad_(False).eval()
    if in_16_bits:
        # Small updates are lost in 16 bits; autocast computes in them anyway.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model, reference


def add_adapters(model: nn.Module, names: tuple[str, ...], script: ScriptArguments):
    from peft import LoraConfig, get_peft_model

    whole = [name.removesuffix(".").split(".", 1)[1] for name in names if name.startswith("latent_blocks.")]
    return get_peft_model(
        model,
        LoraConfig(
            r=script.lora_r,
            lora_alpha=script.lora_alpha,
            lora_dropout=0.0,  # old and new log-probabilities must come from one function
            target_modules=LORA_TARGETS,
            modules_to_save=[f"latent_blocks.{name}" for name in whole] or None,
        ),
    )


def main(
    script: ScriptArguments,
    objective_args: ObjectiveArguments,
    rollout: RolloutArguments,
    reward_args: RewardArguments,
    judge: JudgeArguments,
    training_args: GRPOTrainingArguments,
) -> GRPOTrainer:
    set_seed(training_args.seed)
    rewards = WeightedRewards(reward_args, judge)
    processor = AutoProcessor.from_pretrained(script.model_path, trust_remote_code=True)
    given = {"attn_implementation": script.attn_implementation} if script.attn_implementation else {}
    model = AutoModel.from_pretrained(script.model_path, trust_remote_code=True, dtype=script.dtype, **given)
    data = read_reasoning(
        script.data_path, script.data_format, script.split, script.drop_incomplete, needs_steps=False
    )
    check_policy(model, objective_args, data)
    in_16_bits = training_args.bf16 or training_args.fp16
    model, reference = prepare_policy(model, objective_args, script, in_16_bits)
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
    resume = training_args.resume_from_checkpoint
    trainer.train(last_complete_checkpoint(training_args.output_dir) if resume == "last" else resume)
    save_trained(trainer)
    return trainer


ARGUMENTS = (
    ScriptArguments,
    ObjectiveArguments,
    RolloutArguments,
    RewardArguments,
    JudgeArguments,
    GRPOTrainingArguments,
)

if __name__ == "__main__":
    main(*HfArgumentParser(ARGUMENTS).parse_args_into_dataclasses())
