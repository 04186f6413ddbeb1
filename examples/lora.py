"""Train LoRA adapters with PEFT, load them again on a model loaded by trust_remote_code, and merge them.

python -m examples.lora MODEL data/tasks/data.jsonl out/adapter out/merged
"""

from typing import TYPE_CHECKING

from conversion.commands import CommandParser, exit_on_error
from conversion.reading import check_config_file


if TYPE_CHECKING:
    from transformers import Trainer


# The language model's projections alone. What an architecture adds is new, and trains in full.
TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def train_adapter(model_path: str, data_path: str, adapter: str, **arguments) -> "Trainer":
    # Imported here: they take seconds, which `--help` and a wrong option need not wait for.
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments

    from train.common.chat_collator import collator_for
    from train.common.trained_sizes import record_image_sizes
    from train.data.chats import question_image_sizes, read_trajectories

    processor = AutoProcessor.from_pretrained(model_path, trust_remote_code=True)
    model = AutoModel.from_pretrained(model_path, trust_remote_code=True)
    found = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    new = [name for name in model.config.latent_modules if name in found]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, modules_to_save=new or None)
    data = read_trajectories(data_path)
    record_image_sizes(processor, data, question_image_sizes)
    defaults = {"learning_rate": 1e-4, "num_train_epochs": 1, "per_device_train_batch_size": 4, "logging_steps": 1}
    trainer = Trainer(
        model=get_peft_model(model, lora),
        args=TrainingArguments(adapter, remove_unused_columns=False, report_to=[], **(defaults | arguments)),
        train_dataset=data,
        data_collator=collator_for(processor, model.config),
    )
    trainer.train()
    trainer.save_model()
    return trainer


def merge_adapter(model_path: str, adapter: str, merged: str):
    """Load an adapter onto its base model, merge it, and save a checkpoint that needs neither PEFT nor the adapter."""
    from peft import PeftModel
    from transformers import AutoModel, AutoProcessor

    base = AutoModel.from_pretrained(model_path, trust_remote_code=True)
    model = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    model.save_pretrained(merged)
    AutoProcessor.from_pretrained(model_path, trust_remote_code=True).save_pretrained(merged)
    return model


def build_parser() -> CommandParser:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id of a checkpoint")
    parser.add_argument("data", help="conversations with pictures, as `train.data.tasks` writes them")
    parser.add_argument("adapter", help="folder for the adapter")
    parser.add_argument("output", help="folder for the checkpoint with the adapter merged into it")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    with exit_on_error():
        check_config_file(args.model)
        train_adapter(args.model, args.data, args.adapter)
        merge_adapter(args.model, args.adapter, args.output)


if __name__ == "__main__":
    main()
