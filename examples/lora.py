"""Train LoRA adapters with PEFT, load them again on a model loaded by trust_remote_code, and merge them.

python -m examples.lora MODEL data/tasks/data.jsonl out/adapter out/merged
"""

import argparse

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments

from train.data import TrajectoryCollator, read_trajectories


# The language model's projections alone: `latent_blocks` is new and trains in full.
TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def train_adapter(model_path: str, data_path: str, adapter: str, **arguments) -> Trainer:
    processor = AutoProcessor.from_pretrained(model_path, trust_remote_code=True)
    model = AutoModel.from_pretrained(model_path, trust_remote_code=True)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, modules_to_save=["latent_control", "latent_blocks"])
    collator = TrajectoryCollator(processor, "latent", model.config.latent_grid_size)
    defaults = {"learning_rate": 1e-4, "num_train_epochs": 1, "per_device_train_batch_size": 4, "logging_steps": 1}
    trainer = Trainer(
        model=get_peft_model(model, lora),
        args=TrainingArguments(adapter, remove_unused_columns=False, report_to=[], **(defaults | arguments)),
        train_dataset=read_trajectories(data_path),
        data_collator=collator,
    )
    trainer.train()
    trainer.save_model()
    return trainer


def merge_adapter(model_path: str, adapter: str, merged: str):
    """Load an adapter onto its base model, merge it, and save a checkpoint that needs neither PEFT nor the adapter."""
    base = AutoModel.from_pretrained(model_path, trust_remote_code=True)
    model = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    model.save_pretrained(merged)
    AutoProcessor.from_pretrained(model_path, trust_remote_code=True).save_pretrained(merged)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model_path", "data_path", "adapter", "merged"):
        parser.add_argument(name)
    args = parser.parse_args()
    train_adapter(args.model_path, args.data_path, args.adapter)
    merge_adapter(args.model_path, args.adapter, args.merged)
