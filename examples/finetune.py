"""Fine-tune a converted model with `transformers.Trainer`; pictures in the assistant's turns become latent blocks.

python -m train.tasks --task all --n 256 --seed 0 --output data/tasks
python -m examples.finetune MODEL data/tasks/data.jsonl out/finetuned
"""

import argparse

from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments

from train.data import TrajectoryCollator, read_trajectories


def finetune(model_path: str, data_path: str, output: str, **arguments) -> Trainer:
    processor = AutoProcessor.from_pretrained(model_path, trust_remote_code=True)
    model = AutoModel.from_pretrained(model_path, trust_remote_code=True)
    model.model.visual.requires_grad_(False)
    defaults = {"learning_rate": 1e-4, "num_train_epochs": 1, "per_device_train_batch_size": 4, "logging_steps": 1}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output, remove_unused_columns=False, report_to=[], **(defaults | arguments)),
        train_dataset=read_trajectories(data_path),
        data_collator=TrajectoryCollator(processor, "latent", model.config.latent_grid_size),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model_path", "data_path", "output"):
        parser.add_argument(name)
    finetune(**vars(parser.parse_args()))
