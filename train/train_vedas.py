"""Train Vedas by its curriculum: reasoning steps become latent steps, stage by stage.

    python -m train.data.tasks --task all --n 2000 --seed 0 --output data/tasks
    python -m train.train_vedas --model_path out/vedas --data_path data/tasks/data.jsonl --output_dir out/vedas-trained \
        --lora --bf16 --attn_implementation sdpa --per_device_train_batch_size 8

Every argument of `transformers.TrainingArguments` works. Stages last `--epochs_per_stage` epochs, or end by accuracy
(`train/common/stages.py`):

    ... --stages 0 1 2 3 --epochs_per_stage 10 --samples_per_epoch 800 --stage_accuracy 0.97 --eval_share 0.02 \
        --freeze_vision --cache_image_features 0.1

A run that was killed goes on with `--resume_from_checkpoint last`,
in the same stage and with the same data. What the steps look at is trained by the crop branch (`train/vedas/crop_distillation.py`), the
data formats are in `train/data/reasoning_data.py`. `output_dir` becomes a whole checkpoint; with `--lora` the adapter is merged
into it, and also lies in `adapter/`.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from transformers import AutoModel, AutoProcessor, TrainingArguments, set_seed

from configuration_latentvlm.transformers_contract import check_contract
from conversion.commands import exit_on_error
from conversion.dataclass_parser import DataclassParser
from conversion.own_models import TRUST_HELP, check_model_type
from train.common.feature_cache import FeatureCache, encode_pictures
from train.common.gradient_dynamics import GradientDynamics
from train.common.stages import AnswerAccuracy, Curriculum, RowsUpTo, StageArguments, hold_out, plan_epochs, shown_rows
from train.common.trained_sizes import record_image_sizes
from train.common.training_model import (
    LatentTrainer,
    TrainingModel,
    load_objective,
    run_training,
)
from train.data.reasoning_data import ReasoningSample, instruct, read_reasoning
from train.vedas.crop_distillation import ReplayArguments, ReplayObjective
from train.vedas.curriculum import CurriculumCollator


LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass
class ScriptArguments:
    model_path: str = field(metadata={"help": "Folder or hub id of a Vedas checkpoint (`conversion.convert_vedas`)."})
    data_path: str = field(metadata={"help": "JSONL, parquet, or a folder that `datasets` wrote."})
    data_format: str = field(default="steps", metadata={"help": "steps, m3cot or scienceqa."})
    split: str = field(default="train", metadata={"help": "Of a `datasets` folder with several."})
    drop_incomplete: bool = field(default=False, metadata={"help": "Leave out rows without steps or answer."})
    eval_data_path: str | None = field(default=None, metadata={"help": "For `--eval_strategy`, at the current stage."})
    instruction: str | None = field(default=None, metadata={"help": "Stands below every question."})
    stages: list[int] | None = field(default=None, metadata={"help": "By default 0 to `num_latent_steps`."})
    epochs_per_stage: list[int] = field(
        default_factory=lambda: [4], metadata={"help": "Epochs before the next stage, of all stages or of each."}
    )
    latents_per_step: int = field(
        default=1,
        metadata={
            "help": "Latent steps in place of a reasoning step. 0: nothing stands in its place (a twin without latents)."
        },
    )
    rationale_steps: int | None = field(
        default=None, metadata={"help": "Longer rationales are merged into so many; by default the largest stage."}
    )
    num_latent_steps: int | None = field(default=None, metadata={"help": "In place of the checkpoint's."})
    backprop_through_latents: bool | None = field(default=None, metadata={"help": "In place of the checkpoint's."})
    lora: bool = field(default=False, metadata={"help": "Adapters on the language model; routers train in full."})
    lora_r: int = field(default=64, metadata={"help": "Rank."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale; alpha / r multiplies the adapter."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapters."})
    freeze_vision: bool = field(default=False, metadata={"help": "Leave the vision tower as it is (`--lora` does)."})
    cache_image_features: float = field(
        default=0.0,
        metadata={
            "help": "GiB of main memory, of each process, for the features of all pictures, which a frozen vision tower then "
            "computes once. 0 computes them in every step."
        },
    )
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
    stages, each = args.stages, args.latents_per_step
    if each < 0:
        raise ValueError(f"`latents_per_step` must be >= 0, got {each}.")
    if stages is None:
        if not each and not num_latent_steps:
            raise ValueError("`latents_per_step` 0 needs `stages`: the number of latent steps does not tell them.")
        stages = list(range(num_latent_steps // max(1, each) + 1))
    if not stages or min(stages) < 0 or stages[-1] != max(stages) or stages[-1] * each != num_latent_steps:
        unit = "" if each == 1 else f" at {each} latent steps each"
        raise ValueError(
            f"`stages` must lie within 0 and `num_latent_steps` ({num_latent_steps}) and end there{unit}, since `generate` takes "
            f"that many steps, got {stages}."
        )
    if args.rationale_steps is not None and args.rationale_steps < 1:
        raise ValueError(f"`rationale_steps` must be >= 1, got {args.rationale_steps}.")
    epochs = plan_epochs(args.epochs_per_stage, len(stages))
    if not training_args.num_train_epochs:
        training_args.num_train_epochs = float(sum(epochs))
    if training_args.num_train_epochs <= sum(epochs[:-1]) and training_args.max_steps <= 0:
        raise ValueError(
            f"`num_train_epochs` ({training_args.num_train_epochs}) ends before the last of {len(stages)} stages of "
            f"{epochs[0] if len(set(epochs)) == 1 else epochs} epochs."
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


def keep_features(model, processor, samples: list, limit_gib: float, training_args: TrainingArguments) -> FeatureCache:
    """Compute the features of all pictures as training would, and let the model look them up."""
    device = training_args.device
    model.model.visual.to(device)
    half = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else None

    def context():
        return nullcontext() if half is None else torch.autocast(device.type, half)

    cache = encode_pictures(model, processor, samples, limit_gib, context)
    cache.install(model)
    return cache


def read_data(args: ScriptArguments, stage_args: StageArguments, seed: int) -> tuple[list, list | None]:
    """Questions to learn from, and held-out ones where there are any."""
    data = read_reasoning(args.data_path, args.data_format, args.split, args.drop_incomplete)
    data = instruct(data, args.instruction)
    if stage_args.eval_share:
        return hold_out(data, stage_args.eval_share, seed)
    if not args.eval_data_path:
        return data, None
    return data, instruct(read_reasoning(args.eval_data_path, args.data_format, args.split), args.instruction)


def main(
    args: ScriptArguments,
    replay_args: ReplayArguments,
    training_args: TrainingArguments,
    stage_args: StageArguments | None = None,
) -> LatentTrainer:
    stage_args = stage_args or StageArguments()
    set_seed(training_args.seed)
    check_model_type(args.model_path, "vedas", args.trust_remote_code)
    processor = AutoProcessor.from_pretrained(args.model_path, trust_remote_code=args.trust_remote_code)
    model = load_model(args)
    stages = plan_stages(args, training_args, model.config.num_latent_steps)
    stage_args.prepare(training_args, len(stages), args.eval_data_path is not None)
    data, eval_data = read_data(args, stage_args, training_args.seed)
    objective = ReplayObjective(model.config, processor.image_processor, replay_args)
    load_objective(objective, args.model_path)
    record_image_sizes(processor, [*data, *(eval_data or [])], ReasoningSample.image_sizes)
    prepared = prepare_weights(model, args, training_args)
    features = None
    if args.cache_image_features:
        features = keep_features(
            model, processor, [*data, *(eval_data or [])], args.cache_image_features, training_args
        )
    collator = CurriculumCollator(
        processor,
        args.rationale_steps or max(1, *stages),
        keep_images=objective.weight > 0,
        latents_per_step=args.latents_per_step,
        features=features,
    )
    rows, eval_rows = shown_rows(data, eval_data, stage_args, training_args.seed)
    wrapped = tuple(one for one in (rows, eval_rows) if isinstance(one, RowsUpTo))
    callbacks = [Curriculum(collator, stages, plan_epochs(args.epochs_per_stage, len(stages)), stage_args, wrapped)]
    if args.gradient_dynamics_steps:
        callbacks.append(GradientDynamics(training_args.output_dir, args.gradient_dynamics_steps))
    measure = AnswerAccuracy(processor.tokenizer, model.config.latent_token_id)
    trainer = LatentTrainer(
        model=TrainingModel(prepared, objective),
        args=training_args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=collator,
        processing_class=processor,
        callbacks=callbacks,
        preprocess_logits_for_metrics=measure.reduce,
        compute_metrics=measure.average,
    )
    run_training(trainer, keeps_log=stage_args.stage_accuracy is not None)
    return trainer


def build_parser() -> DataclassParser:
    return DataclassParser((ScriptArguments, ReplayArguments, VedasTrainingArguments, StageArguments))


if __name__ == "__main__":
    with exit_on_error():
        main(*build_parser().parse_args_into_dataclasses())
