"""Write the hidden states that SFT 2 of DeepLatent distils: those of an SFT-1 model at the assistant's pictures.

    python -m train.cache_teacher_states --model out/sft1 --data data/tasks/data.jsonl --output out/teacher
    torchrun --nproc-per-node 8 -m train.cache_teacher_states ..       (or --num_shards 8 --shard 3, once for each)

Killed, it goes on where it was when the same command is run again. The folder's layout and what binds it to data, model and
settings: `train/deeplatent/teacher_states.py`. Data, overrides and layers must be those of `train.train_deeplatent`.
"""

import os
import shutil
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from configuration_latentvlm import DeepLatentConfig
from conversion.commands import exit_on_error
from conversion.config_overrides import load_config
from conversion.dataclass_parser import DataclassParser
from conversion.own_models import TRUST_HELP, check_model_type
from processing_latentvlm.pictures import read_size
from train.deeplatent.collator import DeepLatentCollator
from train.deeplatent.sft import DataArguments, load_model, load_processor, local_folder
from train.deeplatent.teacher_states import (
    DTYPES,
    TeacherCacheWriter,
    choose_layers,
    make_fingerprint,
    read_hidden_states,
)
from train.deeplatent.trajectories import Trajectories, picture_items


@dataclass
class CacheArguments:
    model: str = field(metadata={"help": "Folder or hub id of an SFT-1 checkpoint."})
    output: str = field(metadata={"help": "Folder of the states."})
    config_overrides: list[str] = field(default_factory=list, metadata={"help": "As those of SFT 2."})
    align_layers: list[int] | None = field(default=None, metadata={"help": "By default 4 evenly spaced ones."})
    states_dtype: str = field(default="bfloat16", metadata={"help": f"Of the states, one of {sorted(DTYPES)}."})
    model_dtype: str = field(default="auto", metadata={"help": "Of the weights and of what is computed."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": TRUST_HELP})
    device: str | None = field(default=None, metadata={"help": "By default the GPU of this process, or the CPU."})
    batch_size: int = field(default=1, metadata={"help": "Samples in one forward."})
    samples_per_shard: int = field(default=64, metadata={"help": "Samples in one file."})
    num_shards: int | None = field(default=None, metadata={"help": "Processes that share the work; torchrun says it."})
    shard: int | None = field(default=None, metadata={"help": "The number of this one, from 0."})


def this_process(args: CacheArguments) -> tuple[int, int]:
    """(number, count) of the processes that share the work.

    Raises:
        ValueError: the number does not lie within the count.
    """
    number = int(os.environ.get("RANK", 0)) if args.shard is None else args.shard
    count = int(os.environ.get("WORLD_SIZE", 1)) if args.num_shards is None else args.num_shards
    if not 0 <= number < count:
        raise ValueError(f"`shard` must lie within 0 and `num_shards` - 1, got {number} of {count}.")
    return number, count


def count_tokens(data: Trajectories, collator: DeepLatentCollator) -> int:
    """Image tokens of all assistant's pictures, from their sizes alone."""
    grids = (
        collator.sizes.grid_of(read_size(item["image"]))
        for number in range(len(data))
        for item in picture_items(data[number]["messages"], "assistant")
    )
    return sum(height * width for height, width in grids)


def states_of(model, collator: DeepLatentCollator, samples: list[dict], layers) -> list[tuple[int, torch.Tensor]]:
    """(sample, states) of those samples that have assistant images."""
    opened = [collator.open(sample) for sample in samples]
    inputs = {name: value.to(model.device) for name, value in collator.teacher_inputs(opened).items()}
    columns = inputs.pop("columns")
    if not len(inputs.pop("lengths")):
        return []
    states = read_hidden_states(model, inputs, layers, columns)
    lengths = columns.sum(dim=1).tolist()
    return [(sample["number"], part) for sample, part in zip(samples, states.split(lengths, dim=1)) if part.shape[1]]


def main(args: CacheArguments, data_args: DataArguments) -> None:
    number, count = this_process(args)
    folder = local_folder(args.model)
    check_model_type(folder, DeepLatentConfig.model_type, args.trust_remote_code)
    config = load_config(folder, args.config_overrides, args.trust_remote_code)
    processor = load_processor(folder, config, args.trust_remote_code)
    data = data_args.read(config, processor)
    collator = DeepLatentCollator(processor, config, "image", data_args.max_question_pixels)
    text_config = config.get_text_config()
    layers = choose_layers(text_config.num_hidden_layers, args.align_layers)
    fingerprint = make_fingerprint(data, folder, processor, collator.sizes, layers)
    writer = TeacherCacheWriter(args.output, fingerprint, len(data), args.samples_per_shard, args.states_dtype)
    tokens = count_tokens(data, collator)
    size = tokens * len(layers) * text_config.hidden_size * DTYPES[args.states_dtype].itemsize
    missing = [shard for shard in writer.missing() if shard % count == number]
    print(
        f"{len(data)} samples with {tokens} image tokens, layers {list(layers)}, {args.states_dtype}: {size / 1e9:.3f} GB in "
        f"{writer.num_shards} shards, {len(missing)} left for this process; {shutil.disk_usage(args.output).free / 1e9:.1f} GB "
        "are free.",
        flush=True,
    )
    if missing:
        default = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        model = load_model(
            folder,
            config,
            args.model_dtype,
            args.attn_implementation,
            bool(args.config_overrides),
            args.trust_remote_code,
        )
        model = model.eval().to(args.device or default)
    for shard in tqdm(missing, desc="teacher states", disable=number > 0):
        samples, states = writer.samples_of(shard), []
        for first in range(0, len(samples), args.batch_size):
            batch = [data[sample] for sample in samples[first : first + args.batch_size]]
            states += states_of(model, collator, batch, layers)
        writer.write(shard, states)
    if not writer.finish():
        print("Other processes still write; the last of them completes the folder.")


def build_parser() -> DataclassParser:
    return DataclassParser((CacheArguments, DataArguments))


if __name__ == "__main__":
    with exit_on_error():
        main(*build_parser().parse_args_into_dataclasses())
