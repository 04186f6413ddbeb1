"""Fine-tune a model of any architecture with `transformers.Trainer`; pictures in the assistant's turns become latent blocks.

python -m train.data.tasks --task all --n 256 --seed 0 --output data/tasks
python -m examples.finetune MODEL data/tasks/data.jsonl out/finetuned

Models that open no blocks take their steps before the answer, and those pictures are left out.
"""

from typing import TYPE_CHECKING

from conversion.commands import CommandParser, exit_on_error
from conversion.reading import check_config_file


if TYPE_CHECKING:
    from transformers import Trainer


def finetune(model_path: str, data_path: str, output: str, **arguments) -> "Trainer":
    # Imported here: they take seconds, which `--help` and a wrong option need not wait for.
    from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments

    from train.common.chat_collator import collator_for
    from train.common.trained_sizes import record_image_sizes
    from train.data.chats import question_image_sizes, read_trajectories

    processor = AutoProcessor.from_pretrained(model_path, trust_remote_code=True)
    model = AutoModel.from_pretrained(model_path, trust_remote_code=True)
    data = read_trajectories(data_path)
    record_image_sizes(processor, data, question_image_sizes)
    for name, parameter in model.named_parameters():
        if model.config.is_frozen_weight(name):
            parameter.requires_grad_(False)
    defaults = {"learning_rate": 1e-4, "num_train_epochs": 1, "per_device_train_batch_size": 4, "logging_steps": 1}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output, remove_unused_columns=False, report_to=[], **(defaults | arguments)),
        train_dataset=data,
        data_collator=collator_for(processor, model.config),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()
    return trainer


def build_parser() -> CommandParser:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id of a checkpoint")
    parser.add_argument("data", help="conversations with pictures, as `train.data.tasks` writes them")
    parser.add_argument("output", help="folder for the trained checkpoint")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    with exit_on_error():
        check_config_file(args.model)
        finetune(args.model, args.data, args.output)


if __name__ == "__main__":
    main()
