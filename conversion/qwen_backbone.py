"""Conversion around a Qwen-VL backbone, for the architectures that have one: the backbone bit for bit, new weights fresh."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from conversion.backbone import (
    Backbone,
    add_tokens,
    carried_fields,
    check_overrides,
    check_token_ids,
    choose_dtype,
    copy_legal_files,
    find_license,
    load_backbone,
    locate_backbone,
    name_backbone,
    parse_overrides,
    read_model_type,
    write_generation_config,
)
from conversion.checkpoint_io import (
    Edit,
    check_output,
    check_weights,
    extend_vocabulary,
    find_vocabulary_weights,
    grown_vocabulary,
    initialize_weights,
    write_weights,
)
from conversion.commands import CommandParser, exit_on_error
from conversion.known_answers import record_answers
from conversion.writing import replaced_folder


VISION = "model.visual."
# Names on disk to names in the model. Checkpoints keep the names they were first published with; those of some later
# versions of transformers have the model's own, which match neither.
RENAMES = (
    (re.compile(r"^visual\."), VISION),
    (re.compile(r"^model\.(?!language_model\.|visual\.)"), "model.language_model."),
)


def rename_weight(name: str) -> str:
    """Name in the model of a weight on disk."""
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    return name


def report(message: str) -> None:
    """Say on stderr what the command is doing, so that stdout stays the folder's path."""
    print(message, file=sys.stderr, flush=True)


def build_config(
    backbone: Backbone,
    model_class: type[PreTrainedModel],
    tokens: dict[str, str],
    dtype: torch.dtype | None,
    fields: dict,
):
    """The backbone's config with the latent tokens, room for them, and what the caller set.

    Args:
        tokens: config field -> the token whose id it takes.
    """
    vocabulary = backbone.tokenizer.get_vocab()
    latent_ids = {name: vocabulary[token] for name, token in tokens.items()}
    carried = carried_fields(backbone.config)
    carried["text_config"]["vocab_size"] = grown_vocabulary(
        backbone.config.text_config.vocab_size, latent_ids.values()
    )
    config = model_class.config_class(**carried, **(latent_ids | fields))
    config.architectures = [model_class.__name__]
    if dtype is not None:
        for part in (config, config.text_config, config.vision_config):
            part.dtype = dtype
    elif config.dtype is None:
        config.dtype = next(entry.dtype for entry in backbone.weights.entries.values())
    return config


def build_model(backbone: Backbone, model_class: type[PreTrainedModel], config) -> PreTrainedModel:
    """Build the model without memory, and require that the backbone's weights are all of its other ones.

    Raises:
        ValueError: a weight is missing, unknown, or of another shape; the message names it.
    """
    with torch.device("meta"):
        model = model_class(config)
    num_rows, vocabulary = backbone.config.text_config.vocab_size, find_vocabulary_weights(model)
    expected = {
        name: (num_rows, *weight.shape[1:]) if name in vocabulary else tuple(weight.shape)
        for name, weight in model.state_dict().items()
        if not config.is_new_weight(name)
    }
    check_weights(backbone.weights, rename_weight, expected, optional=set(model.all_tied_weights_keys))
    return model


def edit_vocabulary(
    backbone: Backbone, model: PreTrainedModel, known_ids: set[int], added_ids: list[int]
) -> dict[str, Edit]:
    """What changes in the matrices with a row per token: the rows of added tokens, and those that make room."""
    num_rows, vocabulary = model.config.text_config.vocab_size, find_vocabulary_weights(model)
    extend = partial(extend_vocabulary, num_rows=num_rows, known_ids=known_ids, added_ids=added_ids)
    return {
        name: Edit((num_rows, *entry.shape[1:]), extend)
        for name, entry in backbone.weights.entries.items()
        if rename_weight(name) in vocabulary
    }


def save_side_files(folder: Path, backbone: Backbone, config, processor_class, **fields) -> None:
    """Write config, code, model card, stop tokens, processor and licence texts."""
    backbone.tokenizer.padding_side = "left"  # `generate` goes on from the last column
    config.save_pretrained(folder)
    write_generation_config(folder, backbone.folder, config)
    processor_class(
        backbone.image_processor, backbone.tokenizer, chat_template=backbone.chat_template, **fields
    ).save_pretrained(folder)
    copy_legal_files(folder, backbone.folder)


def report_conversion(backbone: Backbone, config, tokens: dict[str, str], new_weights: dict[str, Tensor]) -> None:
    """List what was copied and what is new."""
    weights = backbone.weights
    report(f"Copied {len(weights.entries)} weights of {config.base_model} from {len(weights.files)} files.")
    ids = ", ".join(f"{token} {getattr(config, name)}" for name, token in tokens.items())
    rows, grown = backbone.config.text_config.vocab_size, config.text_config.vocab_size
    room = f"within its {rows} rows" if grown == rows else f"grown from {rows} to {grown} rows"
    report(f"Latent tokens: {ids}; the vocabulary has room for them {room}.")
    size = sum(weight.nbytes for weight in new_weights.values())
    numbers = sum(weight.numel() for weight in new_weights.values())
    report(f"{len(new_weights)} new weights, {numbers / 1e6:.2f}M numbers, {size / 2**20:.1f} MiB:")
    for name, weight in new_weights.items():
        report(f"  {name} {list(weight.shape)}")


@dataclass(frozen=True)
class Architecture:
    """What a converter knows of its architecture."""

    model_class: type[PreTrainedModel]
    processor_class: type
    tokens: dict[str, str]  # config field -> special token whose id it takes
    backbones: dict[str, type]  # `model_type` -> config class
    fields_of: Callable[[str], dict[str, Any]] = lambda model_type: {}  # config fields that the backbone decides
    decided: tuple[str, ...] = ("latentvlm_version",)  # further fields that `--set` cannot change
    measure: Callable[..., None] = lambda source, config, model, overrides: None  # completes the config


def convert_backbone(
    architecture: Architecture,
    backbone: str | Path,
    output: str | Path,
    dtype: str | None = None,
    overrides: dict[str, Any] | None = None,
    seed: int = 0,
    force: bool = False,
    license: str | None = None,
    known_answers: bool = True,
) -> Path:
    """Write a checkpoint around a backbone's weights, whole or not at all, and return its folder.

    Args:
        backbone: folder or Hub id of a checkpoint in safetensors.
        dtype: "bfloat16", "float16" or "float32"; by default every weight keeps its own.
        overrides: fields that the architecture's config adds to the backbone's.
        seed: of the new weights.
        force: replace a checkpoint that lies at `output`.
        license: for the model card; by default what the backbone's says.
        known_answers: record what the checkpoint answers, which takes its weights in float32 at once.

    Raises:
        ValueError: the backbone, the output folder or a field is not what it must be; the message says which.
        StrictDataclassError: a field's value is refused by the config.
    """
    cast_to, model_class = choose_dtype(dtype), architecture.model_class
    folder, output = locate_backbone(backbone), Path(output).expanduser()
    model_type = read_model_type(folder)
    backbone_class = architecture.backbones.get(model_type, next(iter(architecture.backbones.values())))
    given = architecture.fields_of(model_type)
    decided = (*architecture.tokens, *architecture.decided, *given)
    overrides = check_overrides(overrides or {}, model_class.config_class, backbone_class, decided)
    check_output(output, folder, force)
    source = load_backbone(folder, backbone_class)
    check_token_ids(source.tokenizer, source.config, {"image_token_id": "<|image_pad|>"})
    known_ids = set(source.tokenizer.get_vocab().values())
    added_ids = list(add_tokens(source.tokenizer, tuple(architecture.tokens.values())).values())

    card = {"base_model": name_backbone(backbone), "base_model_license": license or find_license(folder)}
    config = build_config(source, model_class, architecture.tokens, cast_to, card | given | overrides)
    model = build_model(source, model_class, config)
    architecture.measure(source, config, model, overrides)
    names = [name for name in model.state_dict() if config.is_new_weight(name)]
    new_weights = initialize_weights(model, names, seed, dtype_of_new_weights(model))
    edits = edit_vocabulary(source, model, known_ids, added_ids)
    with replaced_folder(output) as partial_folder:
        write_weights(partial_folder, source.weights, edits, new_weights, cast_to)
        processor_class = architecture.processor_class
        save_side_files(partial_folder, source, config, processor_class, **processor_class.numbers_of(config))
        if known_answers:
            record_answers(partial_folder, output)
    report_conversion(source, config, architecture.tokens, new_weights)
    return output


def dtype_of_new_weights(model: PreTrainedModel) -> torch.dtype:
    """The backbone's, or float32 where the model runs its new modules in float32 beside a float16 backbone."""
    dtype = model.config.dtype
    return torch.float32 if dtype == torch.float16 and model._keep_in_fp32_modules else dtype


def run_converter(parser: CommandParser, convert: Callable[..., Path]) -> None:
    """Read the command line of a converter, convert, and print the folder."""
    arguments = vars(parser.parse_args())
    with exit_on_error():
        arguments["overrides"] = parse_overrides(arguments.pop("set"))
        print(convert(**arguments))
