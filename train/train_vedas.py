"""Train Vedas by its curriculum: reasoning steps become latent steps, stage by stage.

    python -m train.tasks --task all --n 2000 --seed 0 --output data/tasks
    python -m train.train_vedas --model_path out/vedas --data_path data/tasks/data.jsonl --output_dir out/vedas-trained \
        --lora --bf16 --attn_implementation sdpa --per_device_train_batch_size 8

Every argument of `transformers.TrainingArguments` works. A run that was killed goes on with `--resume_from_checkpoint last`,
in the same stage and with the same data. What the steps look at is trained by the crop branch (`train/replay.py`), the
data formats are in `train/reasoning_data.py`. `output_dir` becomes a whole checkpoint; with `--lora` the adapter is merged
into it, and also lies in `adapter/`.
"""

from dataclasses import dataclass, field

from transformers import AutoModel, AutoProcessor, HfArgumentParser, TrainingArguments, set_seed

from configuration_latentvlm.transformers_contract import check_contract
from conversion.commands import exit_on_error
from train.curriculum import Curriculum, CurriculumCollator
from train.gradient_dynamics import GradientDynamics
from train.own_models import TRUST_HELP, check_model_type
from train.reasoning_data import ReasoningSample, read_reasoning
from train.replay import ReplayArguments, ReplayObjective
from train.trained_sizes import record_image_sizes
from train.training_model import (
    LatentTrainer,
    TrainingModel,
    load_objective,
    run_training,
)


LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass
class ScriptArguments:
    model_path: str = field(metadata={"help": "Folder or hub id of a Vedas checkpoint (`conversion.convert_vedas`)."})
    data_path: str = field(metadata={"help": "JSONL, parquet, or a folder that `datasets` wrote."})
    data_format: str = field(default="steps", metadata={"help": "steps, m3cot or scienceqa."})
    split: str = field(default="train", metadata={"help": "Of a `datasets` folder with several."})
    drop_incomplete: bool = field(default=False, metadata={"help": "Leave out rows without steps or answer."})
    eval_data_path: str | None = field(default=None, metadata={"help": "For `--eval_strategy`, at the current stage."})
    stages: list[int] | None = field(default=None, metadata={"help": "By default 0 to `num_latent_steps`."})
    epochs_per_stage: int = field(default=4, metadata={"help": "Epochs before the next stage."})
    rationale_steps: int | None = field(
        default=None, metadata={"help": "Longer rationales are merged into so many; by default `num_latent_steps`."}
    )
    num_latent_steps: int | None = field(default=None, metadata={"help": "In place of the checkpoint's."})
    backprop_through_latents: bool | None = field(default=None, metadata={"help": "In place of the checkpoint's."})
    lora: bool = field(default=False, metadata={"help": "Adapters on the language model; routers train in full."})
    lora_r: int = field(default=64, metadata={"help": "Rank."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale; alpha / r multiplies the adapter."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapters."})
    freeze_vision: bool = field(default=False, metadata={"help": "Leave the vision tower as it is (`--lora` does)."})
    dtype: str = field(
        default="float32", metadata={"help": "Of the weights; `--bf16` computes in bfloat16 either way."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": TRUST_HELP})
    gradient_dynamics_steps: int = field(default=0, metadata={"help": "Record gradient norms every so many steps."})


@dataclass
class VedasTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the paper's defaults."""

    learning_rate: float = 4e-5
    lr_scheduler_type: str = "constant"
    num_train_epochs: float = field(default=0.0, metadata={"help": "By default what the curriculum needs."})
    remove_unused_columns: bool = False


def load_model(args: ScriptArguments):
    model = AutoModel.from_pretrained(
        args.model_path,
        trust_remote_code=args.trust_remote_code,
        dtype=args.dtype,
        **({"attn_implementation": args.attn_implementation} if args.attn_implementation else {}),
    )
    for name in ("num_latent_steps", "backprop_through_latents"):
        if getattr(args, name) is not None:
            setattr(model.config, name, getattr(args, name))
    return model


def plan_stages(args: ScriptArguments, training_args: TrainingArguments, num_latent_steps: int) -> list[int]:
    """The stages in order; sets the epochs.

    Raises:
        ValueError: stages that do not lead to the model's latent steps, or epochs that end before the last of them.
    """
    stages = list(range(num_latent_steps + 1)) if args.stages is None else args.stages
    if not stages or min(stages) < 0 or stages[-1] != num_latent_steps or max(stages) > num_latent_steps:
        raise ValueError(
            f"`stages` must lie within 0 and `num_latent_steps` ({num_latent_steps}) and end there, since `generate` takes "
            f"that many steps, got {stages}."
        )
    if args.epochs_per_stage < 1:
        raise ValueError(f"`epochs_per_stage` must be >= 1, got {args.epochs_per_stage}.")
    if args.rationale_steps is not None and args.rationale_steps < 1:
        raise ValueError(f"`rationale_steps` must be >= 1, got {args.rationale_steps}.")
    needed = len(stages) * args.epochs_per_stage
    if not training_args.num_train_epochs:
        training_args.num_train_epochs = float(needed)
    if training_args.num_train_epochs <= needed - args.epochs_per_stage and training_args.max_steps <= 0:
        raise ValueError(
            f"`num_train_epochs` ({training_args.num_train_epochs}) ends before the last of {len(stages)} stages of "
            f"{args.epochs_per_stage} epochs."
        )
    return stages


def prepare_weights(model, args: ScriptArguments, training_args: TrainingArguments):
    """Say what trains: adapters and routers, or everything."""
    model.model.visual.requires_grad_(not (args.freeze_vision or args.lora))
    if args.lora:
        from peft import LoraConfig, get_peft_model

        check_contract("adapters")
        model = get_peft_model(
            model,
            LoraConfig(
                r=args.lora_r,
                lora_alpha=args.lora_alpha,
                lora_dropout=args.lora_dropout,
                target_modules=LORA_TARGETS,
                modules_to_save=["router"] if model.config.routed_layers else None,
            ),
        )
    if training_args.bf16 or training_args.fp16:
        # Small updates are lost in 16 bits; autocast computes in them anyway.
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
    return model


def main(args: ScriptArguments, replay_args: ReplayArguments, training_args: TrainingArguments) -> LatentTrainer:
    set_seed(training_args.seed)
    check_model_type(args.model_path, "vedas", args.trust_remote_code)
    processor = AutoProcessor.from_pretrained(args.model_path, trust_remote_code=args.trust_remote_code)
    model = load_model(args)
    stages = plan_stages(args, training_args, model.config.num_latent_steps)
    data = read_reasoning(args.data_path, args.data_format, args.split, args.drop_incomplete)
    eval_data = read_reasoning(args.eval_data_path, args.data_format, args.split) if args.eval_data_path else None
    objective = ReplayObjective(model.config, processor.image_processor, replay_args)
    load_objective(objective, args.model_path)
    record_image_sizes(processor, data, ReasoningSample.image_sizes)
    rationale_steps = args.rationale_steps or max(1, model.config.num_latent_steps)
    collator = CurriculumCollator(processor, rationale_steps, keep_images=objective.weight > 0)
    callbacks = [Curriculum(collator, stages, args.epochs_per_stage)]
    if args.gradient_dynamics_steps:
        callbacks.append(GradientDynamics(training_args.output_dir, args.gradient_dynamics_steps))
    trainer = LatentTrainer(
        model=TrainingModel(prepare_weights(model, args, training_args), objective),
        args=training_args,
        train_dataset=data,
        eval_dataset=eval_data,
        data_collator=collator,
        processing_class=processor,
        callbacks=callbacks,
    )
    run_training(trainer)
    return trainer


if __name__ == "__main__":
    with exit_on_error():
        parser = HfArgumentParser((ScriptArguments, ReplayArguments, VedasTrainingArguments))
        main(*parser.parse_args_into_dataclasses())
