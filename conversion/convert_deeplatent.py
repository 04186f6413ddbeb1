"""Turn a Qwen2.5-VL checkpoint into a DeepLatent one: the backbone bit for bit, and the new modules at their start.

    python -m conversion.convert_deeplatent --backbone Qwen/Qwen2.5-VL-7B-Instruct --output checkpoints/deeplatent-7b
    python -m conversion.convert_deeplatent --backbone BACKBONE_FOLDER --output OUT --set latent_grid_size=24 --seed 1

The backbone is streamed, so memory stays near its largest shard; only the vision tower is loaded, in float32, to
measure how large image features are (`latent_query_rms`). The output loads with
`AutoModel.from_pretrained(OUT, trust_remote_code=True)`, also where this library is not installed.
"""

import argparse
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2_5_VLConfig

from configuration_latentvlm import DeepLatentConfig
from conversion.backbone import (
    CAST_DTYPES,
    Backbone,
    add_tokens,
    carried_fields,
    check_overrides,
    check_token_ids,
    choose_dtype,
    copy_legal_files,
    exit_on_error,
    find_license,
    load_backbone,
    locate_backbone,
    name_backbone,
    parse_overrides,
    reference_picture,
    root_mean_square,
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
    replaced_folder,
    write_weights,
)
from modeling_latentvlm.modeling_deeplatent import NEW_WEIGHTS, DeepLatentForConditionalGeneration
from processing_latentvlm.processing_deeplatent import LATENT_TOKENS, DeepLatentProcessor


LATENT_TOKEN_FIELDS = ("latent_start_token_id", "latent_pad_token_id", "latent_end_token_id")
# Decided by the tokenizer and by this library, not by `--set`.
DECIDED_FIELDS = (*LATENT_TOKEN_FIELDS, "latentvlm_version")
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


def build_config(backbone: Backbone, dtype: torch.dtype | None, fields: dict[str, Any]) -> DeepLatentConfig:
    """The backbone's config with the latent tokens, room for them, and what the caller set."""
    vocabulary = backbone.tokenizer.get_vocab()
    latent_ids = [vocabulary[token] for token in LATENT_TOKENS]
    carried = carried_fields(backbone.config)
    carried["text_config"]["vocab_size"] = grown_vocabulary(backbone.config.text_config.vocab_size, latent_ids)
    config = DeepLatentConfig(**carried, **(dict(zip(LATENT_TOKEN_FIELDS, latent_ids)) | fields))
    config.architectures = [DeepLatentForConditionalGeneration.__name__]
    if dtype is not None:
        for part in (config, config.text_config, config.vision_config):
            part.dtype = dtype
    elif config.dtype is None:
        config.dtype = next(entry.dtype for entry in backbone.weights.entries.values())
    return config


def build_model(backbone: Backbone, config: DeepLatentConfig) -> DeepLatentForConditionalGeneration:
    """Build the model without memory, and require that the backbone's weights are all of its other ones.

    Raises:
        ValueError: a weight is missing, unknown, or of another shape; the message names it.
    """
    with torch.device("meta"):
        model = DeepLatentForConditionalGeneration(config)
    num_rows, vocabulary = backbone.config.text_config.vocab_size, find_vocabulary_weights(model)
    expected = {
        name: (num_rows, *weight.shape[1:]) if name in vocabulary else tuple(weight.shape)
        for name, weight in model.state_dict().items()
        if not name.startswith(NEW_WEIGHTS)
    }
    check_weights(backbone.weights, rename_weight, expected, optional=set(model.all_tied_weights_keys))
    return model


@torch.no_grad()
def measure_image_features(backbone: Backbone, tower_class: type[PreTrainedModel]) -> float:
    """Root mean square of a photo's merged features, from the vision tower alone, in float32."""
    names = [name for name in backbone.weights.entries if rename_weight(name).startswith(VISION)]
    weights = {rename_weight(name).removeprefix(VISION): backbone.weights.read(name) for name in names}
    config = backbone.config.vision_config
    tower = tower_class.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32).eval()
    inputs = backbone.image_processor(images=[reference_picture()], return_tensors="pt")
    return root_mean_square(tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output)


def dtype_of_new_weights(model: DeepLatentForConditionalGeneration) -> torch.dtype:
    """The backbone's, or float32 where the model runs its new modules in float32 beside a float16 backbone."""
    dtype = model.config.dtype
    return torch.float32 if dtype == torch.float16 and model._keep_in_fp32_modules else dtype


def edit_vocabulary(
    backbone: Backbone, model: DeepLatentForConditionalGeneration, known_ids: set[int], added_ids: list[int]
) -> dict[str, Edit]:
    """What changes in the matrices with a row per token: the rows of added tokens, and those that make room."""
    num_rows, vocabulary = model.config.text_config.vocab_size, find_vocabulary_weights(model)
    extend = partial(extend_vocabulary, num_rows=num_rows, known_ids=known_ids, added_ids=added_ids)
    return {
        name: Edit((num_rows, *entry.shape[1:]), extend)
        for name, entry in backbone.weights.entries.items()
        if rename_weight(name) in vocabulary
    }


def convert_deeplatent(
    backbone: str | Path,
    output: str | Path,
    dtype: str | None = None,
    overrides: dict[str, Any] | None = None,
    seed: int = 0,
    force: bool = False,
    license: str | None = None,
) -> Path:
    """Write a DeepLatent checkpoint around a backbone's weights, whole or not at all, and return its folder.

    Args:
        backbone: folder or Hub id of a Qwen2.5-VL checkpoint in safetensors.
        dtype: "bfloat16", "float16" or "float32"; by default every weight keeps its own.
        overrides: fields that `DeepLatentConfig` adds to the backbone's.
        seed: of the new weights.
        force: replace a checkpoint that lies at `output`.
        license: for the model card; by default what the backbone's says.

    Raises:
        ValueError: the backbone, the output folder or a field is not what it must be; the message says which.
        StrictDataclassError: a field's value is refused by the config.
    """
    cast_to = choose_dtype(dtype)
    overrides = check_overrides(overrides or {}, DeepLatentConfig, Qwen2_5_VLConfig, DECIDED_FIELDS)
    folder, output = locate_backbone(backbone), Path(output).expanduser()
    check_output(output, folder, force)
    source = load_backbone(folder, Qwen2_5_VLConfig)
    check_token_ids(source.tokenizer, source.config, {"image_token_id": "<|image_pad|>"})
    known_ids = set(source.tokenizer.get_vocab().values())
    added_ids = list(add_tokens(source.tokenizer, LATENT_TOKENS).values())

    card = {"base_model": name_backbone(backbone), "base_model_license": license or find_license(folder)}
    config = build_config(source, cast_to, card | overrides)
    model = build_model(source, config)
    if "latent_query_rms" not in overrides:
        config.latent_query_rms = measure_image_features(source, type(model.model.visual))
    names = [name for name in model.state_dict() if name.startswith(NEW_WEIGHTS)]
    new_weights = initialize_weights(model, names, seed, dtype_of_new_weights(model))
    edits = edit_vocabulary(source, model, known_ids, added_ids)
    with replaced_folder(output) as partial_folder:
        write_weights(partial_folder, source.weights, edits, new_weights, cast_to)
        save_side_files(partial_folder, source, config)
    report_conversion(source, config, new_weights)
    return output


def save_side_files(folder: Path, backbone: Backbone, config: DeepLatentConfig) -> None:
    """Write config, code, model card, stop tokens, processor and licence texts."""
    backbone.tokenizer.padding_side = "left"  # `generate` goes on from the last column
    config.save_pretrained(folder)
    write_generation_config(folder, backbone.folder, config)
    DeepLatentProcessor(
        backbone.image_processor,
        backbone.tokenizer,
        chat_template=backbone.chat_template,
        num_control_tokens=config.num_control_tokens,
    ).save_pretrained(folder)
    copy_legal_files(folder, backbone.folder)


def report_conversion(backbone: Backbone, config: DeepLatentConfig, new_weights: dict[str, Tensor]) -> None:
    """List what was copied and what is new."""
    weights = backbone.weights
    report(f"Copied {len(weights.entries)} weights of {config.base_model} from {len(weights.files)} files.")
    ids = ", ".join(f"{token} {getattr(config, name)}" for token, name in zip(LATENT_TOKENS, LATENT_TOKEN_FIELDS))
    rows, grown = backbone.config.text_config.vocab_size, config.text_config.vocab_size
    room = f"within its {rows} rows" if grown == rows else f"grown from {rows} to {grown} rows"
    report(f"Latent tokens: {ids}; the vocabulary has room for them {room}.")
    report(f"Image features have a root mean square of {config.latent_query_rms:.4g}.")
    size = sum(weight.nbytes for weight in new_weights.values())
    numbers = sum(weight.numel() for weight in new_weights.values())
    report(f"{len(new_weights)} new weights, {numbers / 1e6:.2f}M numbers, {size / 2**20:.1f} MiB:")
    for name, weight in new_weights.items():
        report(f"  {name} {list(weight.shape)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True, help="folder or Hub id of a Qwen2.5-VL checkpoint")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--dtype", choices=CAST_DTYPES, help="cast the weights (default: as they are)")
    parser.add_argument("--set", nargs="+", default=[], action="extend", metavar="FIELD=VALUE", help="config fields")
    parser.add_argument("--seed", type=int, default=0, help="of the new weights (default: 0)")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint at --output")
    parser.add_argument("--license", metavar="ID", help="licence for the model card (default: the backbone's)")
    arguments = vars(parser.parse_args())
    with exit_on_error():
        arguments["overrides"] = parse_overrides(arguments.pop("set"))
        print(convert_deeplatent(**arguments))


if __name__ == "__main__":
    main()
