"""SFT 1 and SFT 2 of DeepLatent as runs of `Trainer`: arguments, weights, teacher, checkpoints."""

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import snapshot_download
from torch.utils.data import Subset
from transformers import AutoModel, AutoProcessor, TrainingArguments, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from configuration_latentvlm.transformers_contract import check_contract
from conversion.config_overrides import load_config
from conversion.dataclass_parser import DataclassParser
from conversion.own_models import TRUST_HELP, check_model_type
from conversion.reading import check_model_folder
from train.common.stages import (
    AnswerAccuracy,
    Curriculum,
    RowsUpTo,
    StageArguments,
    plan_epochs,
    shown_rows,
    split_by_pictures,
)
from train.common.trained_sizes import record_image_sizes
from train.common.training_model import LatentTrainer, TrainingModel, run_training
from train.deeplatent.collator import DeepLatentCollator
from train.deeplatent.distillation import SftObjective
from train.deeplatent.kept_features import keep_features
from train.deeplatent.teacher_states import TeacherCache, choose_layers, make_fingerprint
from train.deeplatent.trajectories import CHAINS_OF_THOUGHT, WITHOUT_PICTURES, Trajectories, picture_items


LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass
class DataArguments:
    """What is read, and what its pictures and chains of thought become."""

    data_path: str = field(
        metadata={"help": "JSONL, JSON list, parquet, or a folder that `datasets` wrote.", "aliases": ["--data"]}
    )
    data_format: str = field(default="messages", metadata={"help": "messages, zebra_cot, thyme or monet."})
    split: str = field(default="train", metadata={"help": "Of a `datasets` folder with several."})
    image_folder: str | None = field(
        default=None, metadata={"help": "Where image paths start; by default at the data."}
    )
    chain_of_thought: str = field(
        default="interleaved", metadata={"help": f"One of {CHAINS_OF_THOUGHT}: the ablations leave parts of it out."}
    )
    max_question_pixels: int | None = field(
        default=None, metadata={"help": "Shrink larger pictures of the question; by default the processor's limit."}
    )
    drop_invalid: bool = field(default=False, metadata={"help": "Leave out rows that cannot be used."})

    def read(self, config, processor, path: str | None = None) -> Trajectories:
        return Trajectories(
            path or self.data_path,
            self.data_format,
            self.split,
            self.image_folder,
            self.chain_of_thought,
            config.max_latent_blocks,
            (*processor.latent_tokens, processor.image_token, processor.video_token, "<|im_start|>", "<|im_end|>"),
            self.drop_invalid,
        )


@dataclass
class SftArguments:
    """The model, its teacher, and which weights train."""

    model_path: str = field(metadata={"help": "Folder or hub id of a DeepLatent checkpoint; for sft2 that of sft1."})
    stage: str = field(default="sft1", metadata={"help": "sft1 or sft2."})
    eval_data_path: str | None = field(default=None, metadata={"help": "For `--eval_strategy`, in the same format."})
    config_overrides: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Fields of the config as field=value, such as latentformer_layers=2 or modulate_images=false. "
            "Latent weights that fit no more start anew."
        },
    )
    teacher_states: str | None = field(default=None, metadata={"help": "Folder of `train.cache_teacher_states`."})
    teacher_path: str | None = field(
        default=None,
        metadata={
            "help": "SFT-1 checkpoint. With `--teacher_states` the one they were made from (by default `--model_path`); "
            "without, it runs beside the student."
        },
    )
    align_loss_weight: float = field(default=4.0, metadata={"help": "Of L_align; 0 trains without distillation."})
    align_layers: list[int] | None = field(default=None, metadata={"help": "By default 4 evenly spaced ones."})
    stages: list[int] | None = field(
        default=None,
        metadata={
            "help": "A curriculum: in stage j the first j texts of an answer but its last are left out, and its pictures or blocks "
            "stay. By default all texts stay."
        },
    )
    epochs_per_stage: list[int] = field(
        default_factory=lambda: [1], metadata={"help": "With `--stages`: of all stages or of each."}
    )
    cache_image_features: float = field(
        default=0.0,
        metadata={
            "help": "GiB of main memory, of each process, for the features of all pictures, which the frozen vision tower then "
            "computes once. 0 computes them in every step."
        },
    )
    lora: bool = field(default=False, metadata={"help": "Adapters on the language model; latent modules in full."})
    lora_r: int = field(default=64, metadata={"help": "Rank."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale; alpha / r multiplies the adapter."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapters."})
    dtype: str = field(
        default="float32", metadata={"help": "Of the weights; `--bf16` computes in bfloat16 either way."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": TRUST_HELP})


@dataclass
class SftTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the paper's defaults."""

    learning_rate: float = 1e-5
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 16
    weight_decay: float = 0.01
    num_train_epochs: float = 1.0
    remove_unused_columns: bool = False


def local_folder(path: str) -> Path:
    """The folder of a checkpoint, downloaded if it is a hub id."""
    check_model_folder(path)
    return Path(path) if Path(path).is_dir() else Path(snapshot_download(path))


def load_processor(path: str | Path, config, trust_remote_code: bool = False):
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    processor.num_control_tokens = config.num_control_tokens  # the config's mode may have been overridden
    return processor


def load_model(
    path: str | Path,
    config,
    dtype: str,
    attn_implementation: str | None,
    may_renew: bool = False,
    trust_remote_code: bool = False,
):
    """Load a DeepLatent model.

    Args:
        may_renew: latent weights that do not fit the config start anew.

    Raises:
        ValueError: other weights are missing or do not fit.
    """
    model, info = AutoModel.from_pretrained(
        path,
        config=config,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
        ignore_mismatched_sizes=may_renew,
        output_loading_info=True,
        **({"attn_implementation": attn_implementation} if attn_implementation else {}),
    )
    fresh = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    wrong = sorted(name for name in fresh if not config.is_new_weight(name))
    if wrong:
        raise ValueError(f"{path} lacks {len(wrong)} weights of the backbone, first {wrong[0]}.")
    return model


def prepare_weights(model, args: SftArguments, training_args: TrainingArguments):
    """Say what trains: never the vision tower; the latent modules in SFT 2; the rest in full or by adapters."""
    is_latent = args.stage == "sft2"
    model.model.visual.requires_grad_(False)
    latent_modules = list(model.config.latent_modules)
    for name in latent_modules:
        getattr(model, name).requires_grad_(is_latent)
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
                modules_to_save=latent_modules if is_latent else None,
            ),
        )
    if training_args.bf16 or training_args.fp16:
        # Small updates are lost in 16 bits; autocast computes in them anyway.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


def prepare_teacher(args: SftArguments, data: Trajectories, sizes, processor, layers) -> TeacherCache | None:
    """Open the cached states if they are asked for.

    Raises:
        ValueError: SFT 2 aligns latents and has nothing to align them to.
    """
    if args.teacher_states:
        folder = local_folder(args.teacher_path or args.model_path)
        return TeacherCache(args.teacher_states, make_fingerprint(data, folder, processor, sizes, layers))
    if not args.teacher_path:
        raise ValueError(
            "sft2 aligns latents to a teacher: give `--teacher_states` (of `train.cache_teacher_states`) or `--teacher_path`, "
            "or `--align_loss_weight 0` to train without one."
        )
    if is_deepspeed_zero3_enabled():
        raise ValueError("A live teacher cannot run beside ZeRO-3, which would shard it: use `--teacher_states`.")
    return None


def load_teacher(args: SftArguments, training_args: TrainingArguments):
    """The SFT-1 model that runs beside the student."""
    folder = local_folder(args.teacher_path)
    check_model_type(folder, "deeplatent", args.trust_remote_code)
    dtype = "bfloat16" if training_args.bf16 else args.dtype  # it takes no updates that could get lost
    config = load_config(folder, trust_remote_code=args.trust_remote_code)
    return load_model(folder, config, dtype, args.attn_implementation, trust_remote_code=args.trust_remote_code)


def plan_stages(
    args: SftArguments, training_args: TrainingArguments, stage_args: StageArguments, chain_of_thought: str
) -> list[int]:
    """The epochs of every stage; sets those of the training.

    Raises:
        ValueError: stages that cannot be, or epochs that do not fit them.
    """
    stages, given = args.stages, args.epochs_per_stage
    if stages is None:
        if given != [1]:
            raise ValueError("`epochs_per_stage` belongs to `stages`; without them, give `num_train_epochs`.")
        if stage_args.stage_accuracy is not None or stage_args.decay_last_stage:
            raise ValueError("`stage_accuracy` and `decay_last_stage` belong to `stages`, which are not given.")
        return []
    if not stages or min(stages) < 0:
        raise ValueError(f"`stages` must be whole numbers >= 0, how many texts are left out, got {stages}.")
    if max(stages) and chain_of_thought != "interleaved":
        raise ValueError(
            f"`stages` leave texts out of interleaved answers: leave `chain_of_thought` ({chain_of_thought}) out."
        )
    epochs = plan_epochs(given, len(stages))
    if training_args.num_train_epochs not in (1, sum(epochs)):
        raise ValueError(
            f"`num_train_epochs` ({training_args.num_train_epochs:g}) is not what `stages` take ({sum(epochs)}): leave it out."
        )
    training_args.num_train_epochs = float(sum(epochs))
    return epochs


def split_data(data: Trajectories, eval_data: Trajectories | None, stage_args: StageArguments, seed: int) -> tuple:
    """(rows to learn from, held-out ones or None), of which a stage may show a part."""
    lengths, eval_lengths = data.num_steps, eval_data and eval_data.num_steps
    rows = data
    if stage_args.eval_share:
        asked = [
            [message for message in data[n]["messages"] if message["role"] != "assistant"] for n in range(len(data))
        ]
        images = [[item["image"] for item in picture_items(messages)] for messages in asked]
        sides = split_by_pictures(images, stage_args.eval_share, seed)
        rows, eval_data = (Subset(data, side) for side in sides)
        lengths, eval_lengths = ([data.num_steps[number] for number in side] for side in sides)
    return shown_rows(rows, eval_data, stage_args, seed, lengths, eval_lengths)


def make_callbacks(args: SftArguments, stage_args: StageArguments, epochs: list[int], collator, *data) -> list:
    wrapped = tuple(one for one in data if isinstance(one, RowsUpTo))
    if args.stages is None and not wrapped:
        return []
    return [Curriculum(collator, args.stages or [0], epochs or [1], stage_args, wrapped)]


def train_sft(
    args: SftArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    stage_args: StageArguments | None = None,
) -> LatentTrainer:
    stage_args = stage_args or StageArguments()
    set_seed(training_args.seed)
    folder = local_folder(args.model_path)
    trust = args.trust_remote_code
    check_model_type(folder, "deeplatent", trust)
    config = load_config(folder, args.config_overrides, trust)
    processor = load_processor(folder, config, trust)
    epochs = plan_stages(args, training_args, stage_args, data_args.chain_of_thought)
    stage_args.prepare(training_args, len(epochs) or 1, args.eval_data_path is not None)
    data = data_args.read(config, processor)
    eval_data = data_args.read(config, processor, args.eval_data_path) if args.eval_data_path else None
    is_aligned = (
        args.stage == "sft2" and args.align_loss_weight > 0 and data_args.chain_of_thought not in WITHOUT_PICTURES
    )
    if eval_data is not None and is_aligned and args.teacher_states:
        raise ValueError("`--teacher_states` are those of the training data: evaluate with `--teacher_path` alone.")
    layers = choose_layers(config.get_text_config().num_hidden_layers, args.align_layers)
    assistant_images = "image" if args.stage == "sft1" else "latent"
    collator = DeepLatentCollator(processor, config, assistant_images, data_args.max_question_pixels)
    record_image_sizes(
        processor,
        range(len(data)),
        lambda number: [collator.sizes.question_size_of(size) for size in data.question_image_sizes(number)],
    )
    teacher = None
    if is_aligned:
        collator.cache = prepare_teacher(args, data, collator.sizes, processor, layers)
        collator.has_live_teacher = collator.cache is None
        if collator.has_live_teacher:
            teacher = load_teacher(args, training_args)
    model = load_model(folder, config, args.dtype, args.attn_implementation, bool(args.config_overrides), trust)
    prepared = prepare_weights(model, args, training_args)
    if args.cache_image_features:
        samples = (one[number] for one in (data, eval_data) if one is not None for number in range(len(one)))
        others = () if teacher is None else (teacher,)
        keep_features(model, collator, samples, args.cache_image_features, training_args, others)
    objective = SftObjective(model.config, args.align_loss_weight if is_aligned else 0.0, layers, teacher)
    rows, eval_rows = split_data(data, eval_data, stage_args, training_args.seed)
    measure = AnswerAccuracy(processor.tokenizer, model.config.latent_pad_token_id)
    trainer = LatentTrainer(
        model=TrainingModel(prepared, objective),
        args=training_args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=collator,
        processing_class=processor,
        callbacks=make_callbacks(args, stage_args, epochs, collator, rows, eval_rows),
        preprocess_logits_for_metrics=measure.reduce if args.stages else None,
        compute_metrics=measure.average if args.stages else None,
    )
    run_training(trainer, keeps_log=stage_args.stage_accuracy is not None)
    return trainer


def build_parser() -> DataclassParser:
    return DataclassParser((SftArguments, DataArguments, SftTrainingArguments, StageArguments))


def run(arguments: list[str]) -> None:
    train_sft(*build_parser().parse_args_into_dataclasses(arguments))
