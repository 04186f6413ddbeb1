"""Train LaRe in its four stages; each starts from what the one before wrote.

    python -m train.train_lare --stage 1 --model_path out/lare --data_path llava_pretrain.json --output_dir out/lare-1 --bf16
    python -m train.train_lare --stage 2 --model_path out/lare-1 --data_path reasoning.jsonl --vae_path kl16 --output_dir out/lare-2
    python -m train.train_lare --stage 3 --model_path out/lare-2 --data_path llava_instruct.json --vae_path kl16 --output_dir out/lare-3
    python -m train.train_lare --stage 4 --model_path out/lare-3 --data_path reasoning.jsonl --vae_path kl16 --output_dir out/lare-4

| stage | trains                                                       | data        | learning rate | batch |
|-------|--------------------------------------------------------------|-------------|---------------|-------|
| 0     | everything but the vision tower, without latents             | LLaVA JSON  | 2e-5          | 128   |
| 1     | the projector, without latents                               | LLaVA JSON  | 1e-3          | 256   |
| 2     | Extractor, `<bot>` and `<eot>`, heads, U-Net                 | reasoning   | 1e-4          | 128   |
| 3     | everything but the vision tower                              | LLaVA JSON  | 2e-5          | 128   |
| 4     | everything but the vision tower                              | reasoning   | 2e-5          | 128   |

Stage 0 is not the paper's: it makes the plain model that the others start from, where none is at hand, or the twin without
latents that a trained model is compared with.

`--curriculum 0 1 2 3 4` (not the paper's either) teaches latents to compute what was written before: in the stages of the
curriculum the answer loses the first 0, 1, .. steps of its reasoning, and as many refocusing steps take their place
(`train/lare/curriculum.py`; in stage 0 of the table nothing does, which is a twin). `train/common/stages.py` says how its stages end.

    python -m train.train_lare --stage 4 --model_path out/words --data_path data/hops/data.jsonl --output_dir out/hops \
        --curriculum 1 2 3 4 --epochs_per_stage 4 --stage_accuracy 0.98 --eval_share 0.02 --fresh_objective --start_delimiters \
        --align_loss_weight 0 --image_loss_weight 0

Every argument of `transformers.TrainingArguments` works; a run that was killed goes on with `--resume_from_checkpoint last`.
The loss terms are in `train/lare/objective.py`; heads and U-Net lie in `training/` beside a checkpoint, never in it.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AutoModel, AutoProcessor, TrainingArguments, set_seed

from conversion.backbone import parse_overrides
from conversion.commands import exit_on_error
from conversion.config_overrides import load_config
from conversion.dataclass_parser import DataclassParser
from conversion.own_models import TRUST_HELP, check_model_type
from train.common.stages import AnswerAccuracy, Curriculum, RowsUpTo, StageArguments, hold_out, plan_epochs, shown_rows
from train.common.training_model import LatentTrainer, TrainingModel, load_objective, run_training
from train.data.reasoning_data import read_reasoning
from train.lare.curriculum import RefocusCurriculumCollator, shorten, start_delimiters
from train.lare.data import LaReCollator, check_rows, from_reasoning, read_llava
from train.lare.objective import LaReObjective, LatentLossArguments
from train.lare.tower_cache import encode_pictures


@dataclass(frozen=True)
class Stage:
    """What makes a stage. `trains` are the parts of the model that do; None: all but the vision tower."""

    learning_rate: float
    batch_size: int
    trains: tuple[str, ...] | None
    data_format: str
    has_latents: bool = True


STAGES = {
    0: Stage(2e-5, 128, None, "llava", has_latents=False),
    1: Stage(1e-3, 256, ("model.multi_modal_projector.",), "llava", has_latents=False),
    2: Stage(1e-4, 128, ("refocus.",), "steps"),
    3: Stage(2e-5, 128, None, "llava"),
    4: Stage(2e-5, 128, None, "steps"),
}
TOKEN_IDS = ("_token_id", "_token_index")  # endings of config fields


@dataclass
class ScriptArguments:
    stage: int = field(metadata={"help": "0 to 4."})
    model_path: str = field(metadata={"help": "Folder or hub id of a LaRe checkpoint (`conversion.convert_lare`)."})
    data_path: str = field(
        metadata={"help": "LLaVA JSON, or questions with reasoning (`train/data/reasoning_data.py`)."}
    )
    data_format: str | None = field(default=None, metadata={"help": "llava, steps, m3cot or scienceqa; by the stage."})
    direct_answers: bool = field(
        default=False, metadata={"help": "Learn to answer without writing the reasoning; not of LLaVA data."}
    )
    split: str = field(default="train", metadata={"help": "Of a `datasets` folder with several."})
    drop_incomplete: bool = field(default=False, metadata={"help": "Leave out rows without steps or answer."})
    eval_data_path: str | None = field(default=None, metadata={"help": "For `--eval_strategy`."})
    global_batch_size: int | None = field(default=None, metadata={"help": "By the stage; sets the accumulation."})
    max_length: int | None = field(default=None, metadata={"help": "Longest row in tokens; see `--long_rows`."})
    long_rows: str = field(
        default="error",
        metadata={"help": "What becomes of longer rows: error, drop (counted) or truncate (at the end)."},
    )
    curriculum: list[int] | None = field(
        default=None,
        metadata={
            "help": "How many steps the reasoning loses, stage by stage; the last number is `num_refocus_steps`."
        },
    )
    epochs_per_stage: list[int] = field(
        default_factory=lambda: [1], metadata={"help": "Of the curriculum: epochs of all its stages or of each."}
    )
    start_delimiters: bool = field(
        default=False,
        metadata={
            "help": "Start `<bot>` and `<eot>` as copies of the token behind which the plain model begins its answer."
        },
    )
    fresh_objective: bool = field(
        default=False, metadata={"help": "Start stage 3 or 4 with new heads and a new U-Net."}
    )
    cache_image_features: float = field(
        default=0.0,
        metadata={
            "help": "GiB of main memory, of each process, for the features of all pictures, which the frozen vision tower then "
            "computes once. 0 computes them in every step."
        },
    )
    dtype: str = field(
        default="float32", metadata={"help": "Of the weights; `--bf16` computes in bfloat16 either way."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": TRUST_HELP})
    config_overrides: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Fields of the config as field=value, such as answer_sees_image=false; no sizes of weights, no tokens."
        },
    )

    def __post_init__(self):
        if self.stage not in STAGES:
            raise ValueError(f"`stage` must be one of {sorted(STAGES)}, got {self.stage}.")


@dataclass
class LaReTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the paper's defaults."""

    learning_rate: float = field(default=0.0, metadata={"help": "By the stage."})
    weight_decay: float = 0.05
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = field(default=0.03, metadata={"help": "A number of steps, or below 1 a share of them."})
    num_train_epochs: float = 1.0
    remove_unused_columns: bool = False


def complete_arguments(args: ScriptArguments, training_args: TrainingArguments) -> None:
    """Fill in what the stage decides.

    Raises:
        ValueError: the batch of the stage cannot be made of whole batches of the devices.
    """
    stage = STAGES[args.stage]
    training_args.learning_rate = training_args.learning_rate or stage.learning_rate
    if training_args.gradient_accumulation_steps != 1 and args.global_batch_size is None:
        return  # the user's
    wanted = args.global_batch_size or stage.batch_size
    at_once = training_args.train_batch_size * training_args.world_size
    if wanted % at_once:
        raise ValueError(
            f"A batch of {wanted} (`global_batch_size`, by default the stage's) cannot be made of batches of {at_once}: set "
            "`per_device_train_batch_size` or `global_batch_size`."
        )
    training_args.gradient_accumulation_steps = wanted // at_once


def read_data(path: str, args: ScriptArguments, drop_incomplete: bool = False):
    data_format = args.data_format or STAGES[args.stage].data_format
    if data_format == "llava":
        if args.direct_answers:
            raise ValueError(
                "`direct_answers` needs data that tell reasoning and answer apart; LLaVA's format does not."
            )
        return read_llava(path, drop_incomplete)
    samples = read_reasoning(path, data_format, args.split, drop_incomplete)
    if args.curriculum is not None:
        return samples  # its collator makes conversations of them, other ones in every stage
    return [from_reasoning(sample, args.direct_answers) for sample in samples]


def plan_curriculum(
    args: ScriptArguments, stage_args: StageArguments, training_args: TrainingArguments, num_refocus_steps: int
) -> list[int]:
    """The epochs of every stage of the curriculum; sets those of the training.

    Raises:
        ValueError: settings of a curriculum without one, one that does not fit the model, the data or the stage, or epochs
            that it does not have.
    """
    if args.curriculum is None:
        if stage_args != StageArguments() or args.epochs_per_stage != [1]:
            raise ValueError(
                "`epochs_per_stage` and the settings of stages (`train/common/stages.py`) need a `curriculum`."
            )
        return []
    stages, has_latents = args.curriculum, STAGES[args.stage].has_latents
    if not stages or min(stages) < 0 or stages[-1] != max(stages):
        raise ValueError(f"`curriculum` must be numbers >= 0, the largest at the end, got {stages}.")
    if has_latents and stages[-1] != num_refocus_steps:
        raise ValueError(
            f"`curriculum` must end at `num_refocus_steps` ({num_refocus_steps}), since `generate` takes that many steps, got "
            f"{stages}."
        )
    if (args.data_format or STAGES[args.stage].data_format) == "llava" or args.direct_answers:
        raise ValueError(
            "`curriculum` needs reasoning to leave out: give a `data_format` other than llava, and no `direct_answers`."
        )
    if training_args.num_train_epochs != 1:
        raise ValueError(
            f"With `curriculum`, epochs are given by `epochs_per_stage`; got `num_train_epochs` {training_args.num_train_epochs}."
        )
    epochs = plan_epochs(args.epochs_per_stage, len(stages))
    training_args.num_train_epochs = float(sum(epochs))
    return epochs


def make_collator(processor, args: ScriptArguments) -> LaReCollator | RefocusCurriculumCollator:
    collator = LaReCollator(processor, args.max_length, args.long_rows)
    if args.curriculum is None:
        return collator
    return RefocusCurriculumCollator(collator, max(1, *args.curriculum), STAGES[args.stage].has_latents)


def read_rows(args: ScriptArguments, stage_args: StageArguments, collator, seed: int) -> tuple[list, list | None]:
    """Checked rows to learn from, and held-out ones where there are any."""
    if isinstance(collator, RefocusCurriculumCollator):
        collator.stage = min(args.curriculum)  # where texts are longest
    data = check_rows(read_data(args.data_path, args, args.drop_incomplete), collator)
    if stage_args.eval_share:
        return hold_out(data, stage_args.eval_share, seed)
    return data, check_rows(read_data(args.eval_data_path, args), collator) if args.eval_data_path else None


def freeze(model: nn.Module, stage: Stage) -> None:
    """Let train what the stage trains."""
    for name, parameter in model.named_parameters():
        is_chosen = "vision_tower" not in name if stage.trains is None else name.startswith(stage.trains)
        parameter.requires_grad_(is_chosen)


def load_model(args: ScriptArguments) -> nn.Module:
    """The model of `model_path`, with the fields of its config that `config_overrides` changes.

    Raises:
        ValueError: there is no such field, it is the id of a token, or the weights are not those that the config asks for.
    """
    options = {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
    if args.config_overrides:
        tokens = [name for name in parse_overrides(args.config_overrides) if name.endswith(TOKEN_IDS)]
        if tokens:
            raise ValueError(f"`config_overrides` cannot change {tokens}: the ids of tokens are the processor's.")
        options["config"] = load_config(args.model_path, args.config_overrides, args.trust_remote_code)
    model, info = AutoModel.from_pretrained(
        args.model_path,
        trust_remote_code=args.trust_remote_code,
        dtype=args.dtype,
        ignore_mismatched_sizes=True,  # they are named below
        output_loading_info=True,
        **options,
    )
    wrong = {kind: sorted(info[f"{kind}_keys"]) for kind in ("missing", "unexpected")}
    wrong["mismatched"] = sorted(name for name, *_ in info["mismatched_keys"])
    found = [f"{len(names)} {kind}, first {names[0]}" for kind, names in wrong.items() if names]
    if found:
        raise ValueError(
            f"The weights of {args.model_path} must be those that its config asks for, with `config_overrides` "
            f"{args.config_overrides}, got {'; '.join(found)}."
        )
    return model


def check_stage(model: nn.Module, args: ScriptArguments) -> None:
    """Raise a `ValueError` where a checkpoint lacks what a stage needs."""
    if STAGES[args.stage].has_latents and not model.config.step_limit:
        raise ValueError(
            f"Stage {args.stage} needs refocusing steps, but `num_refocus_steps` of {args.model_path} is "
            f"{model.config.num_refocus_steps}."
        )


def find_objective(objective: LaReObjective, args: ScriptArguments) -> None:
    """Take over heads and U-Net from the stage before.

    Raises:
        ValueError: stage 3 or 4 finds none.
    """
    if not STAGES[args.stage].has_latents or args.fresh_objective or load_objective(objective, args.model_path):
        return
    if args.stage > 2 and (objective.alignment is not None or objective.image_reconstruction is not None):
        raise ValueError(
            f"Stage {args.stage} needs the heads and the U-Net of stage 2, but {args.model_path} has no `training/` folder: run "
            "stage 2 first, or pass `--fresh_objective`."
        )


def keep_features(
    model: nn.Module, objective: LaReObjective, collator, rows: list, args: ScriptArguments, training_args
) -> None:
    """Compute the features of all pictures as training would, and let the model look them up.

    Raises:
        ValueError: the pixels of pictures are needed too, or see `encode_pictures`.
    """
    if objective.image_reconstruction is not None:
        raise ValueError("`cache_image_features` keeps no pixels, which L_image needs: set `image_loss_weight` to 0.")
    model.model.vision_tower.to(training_args.device)
    half = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else None

    def context():
        return nullcontext() if half is None else torch.autocast(training_args.device.type, half)

    of_rows = collator.collate if isinstance(collator, RefocusCurriculumCollator) else collator
    image_processor = of_rows.processor.image_processor
    cache = encode_pictures(model, image_processor, rows, args.cache_image_features, context)
    cache.install(model)
    objective.cache = of_rows.cache = cache


def check_negatives(objective: LaReObjective, data: list, training_args: TrainingArguments, collator) -> None:
    """Raise a `ValueError` where no batch of a run can hold two rows that the alignment could tell apart.

    A batch that has none is possible in any run: its rows are left out, and logged as `align_without_negative`.
    """
    if objective.alignment is None:
        return
    size = training_args.train_batch_size * training_args.world_size * training_args.gradient_accumulation_steps
    if size < 2:
        raise ValueError(
            "The alignment loss tells rows of a batch apart, but the global batch holds 1 row: set `global_batch_size` to 2 or "
            "more, or `align_loss_weight` to 0."
        )
    if isinstance(collator, RefocusCurriculumCollator):
        data = [shorten(sample, collator.most_steps, collator.most_steps) for sample in data]
    reasonings = {one.reasoning for one in data if one.reasoning}
    pictures = {tuple(image if isinstance(image, str) else id(image) for image in one.images) for one in data}
    if len(reasonings) < 2 and len(pictures) < 2:
        raise ValueError(
            f"The alignment loss tells rows apart, but all {len(data)} rows of the data have the same reasoning and the same "
            "pictures: set `align_loss_weight` to 0."
        )


def main(
    args: ScriptArguments,
    loss_args: LatentLossArguments,
    training_args: TrainingArguments,
    stage_args: StageArguments | None = None,
) -> LatentTrainer:
    stage_args = stage_args or StageArguments()
    set_seed(training_args.seed)
    stage = STAGES[args.stage]
    complete_arguments(args, training_args)
    check_model_type(args.model_path, "lare", args.trust_remote_code)
    processor = AutoProcessor.from_pretrained(args.model_path, trust_remote_code=args.trust_remote_code)
    model = load_model(args)
    check_stage(model, args)
    epochs = plan_curriculum(args, stage_args, training_args, model.config.num_refocus_steps)
    stage_args.prepare(training_args, len(epochs), args.eval_data_path is not None)
    if args.start_delimiters:
        start_delimiters(model, processor)
    freeze(model, stage)
    objective = LaReObjective(model, processor.image_processor, loss_args, stage.has_latents, args.stage == 2)
    find_objective(objective, args)
    collator = make_collator(processor, args)
    data, eval_data = read_rows(args, stage_args, collator, training_args.seed)
    check_negatives(objective, data, training_args, collator)
    if args.cache_image_features:
        keep_features(model, objective, collator, [*data, *(eval_data or [])], args, training_args)
    rows, eval_rows = shown_rows(data, eval_data, stage_args, training_args.seed)
    callbacks = []
    if args.curriculum is not None:
        wrapped = tuple(one for one in (rows, eval_rows) if isinstance(one, RowsUpTo))
        callbacks.append(Curriculum(collator, args.curriculum, epochs, stage_args, wrapped))
    measure = AnswerAccuracy(processor.tokenizer, model.config.bot_token_id)
    trainer = LatentTrainer(
        model=TrainingModel(model, objective),
        args=training_args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=collator,
        processing_class=processor,
        callbacks=callbacks,
        preprocess_logits_for_metrics=measure.reduce,
        compute_metrics=measure.average,
    )
    run_training(trainer, keeps_log=args.curriculum is not None)
    return trainer


def build_parser() -> DataclassParser:
    return DataclassParser((ScriptArguments, LatentLossArguments, LaReTrainingArguments, StageArguments))


if __name__ == "__main__":
    with exit_on_error():
        main(*build_parser().parse_args_into_dataclasses())
