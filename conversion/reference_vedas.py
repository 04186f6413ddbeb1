"""Turn a published Vedas checkpoint into one of ours, in the reference preset: the same function, to the last digit.

Their file holds the whole model under names that PEFT and their wrapper gave it, LoRA unmerged, with the module of the
self-distillation beside it. The backbone folder gives the config and, if present, tokenizer and image processor; its
weights are not read.
"""

import json
import pickle
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, Qwen2_5_VLConfig, Qwen2VLConfig

from configuration_latentvlm import VedasConfig
from conversion.backbone import (
    add_tokens,
    carried_fields,
    find_license,
    load_image_processor,
    load_tokenizer,
    locate_backbone,
    name_backbone,
    read_config,
    read_model_type,
    write_generation_config,
)
from conversion.checkpoint_io import check_output
from conversion.known_answers import record_answers
from conversion.qwen_backbone import rename_weight, report
from conversion.writing import replaced_folder
from modeling_latentvlm import VedasForConditionalGeneration
from processing_latentvlm import VedasProcessor
from processing_latentvlm.processing_vedas import LATENT_TOKEN


BACKBONES = {"qwen2_5_vl": Qwen2_5_VLConfig, "qwen2_vl": Qwen2VLConfig}  # `model_type` -> config class
REFERENCE_TOKENS = ("<|start-latent|>", "<|end-latent|>", LATENT_TOKEN)  # the last rows of their vocabulary
TRAINING_FILE = Path("training") / "objective.safetensors"  # where `train.common.training_model` looks
TOKEN_SR = {f"tokenSR.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
PREFIX = re.compile(r"^(?:module\.)?(?:base_causallm\.)?(?:base_model\.model\.)?")


def read_reference(file: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint's tensors; no code in the file is run.

    Raises:
        ValueError: it is missing, of another kind, or holds more than tensors.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"There is no reference checkpoint {file}.")
    if file.suffix == ".safetensors":
        return load_file(file)
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} cannot be read as tensors alone: {str(error).splitlines()[0]}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{file} must be a dictionary of tensors, as the authors' script writes it.")
    return weights


def merge_adapters(weights: dict[str, Tensor], lora_alpha: float | None) -> dict[str, Tensor]:
    """Strip the wrappers' names and merge LoRA: W = base + alpha / r * B A.

    Args:
        lora_alpha: default r / 4, the authors' scaling of 0.25.

    Raises:
        ValueError: an adapter lacks one of its parts; the message names it.
    """
    plain = {PREFIX.sub("", name): value for name, value in weights.items()}
    merged = {}
    for name, value in plain.items():
        if ".lora_" in name:
            target = name.partition(".lora_")[0]
            if f"{target}.base_layer.weight" not in plain:
                raise ValueError(f"{name} has no {target}.base_layer.weight to be merged into.")
            continue
        if name.endswith(".base_layer.weight"):
            target = name.removesuffix(".base_layer.weight")
            parts = [f"{target}.lora_{part}.default.weight" for part in "AB"]
            missing = [part for part in parts if part not in plain]
            if missing:
                raise ValueError(f"{name} has no {missing[0]} beside it.")
            down, up = (plain[part].float() for part in parts)
            scale = (down.shape[0] / 4 if lora_alpha is None else lora_alpha) / down.shape[0]
            value = (value.float() + scale * (up @ down)).to(value.dtype)
        merged[name.replace(".base_layer.", ".")] = value
    return merged


def split_reference(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's weights under its own names, and those of the self-distillation's module.

    Raises:
        ValueError: that module is not whole.
    """
    training = {name: value for name, value in weights.items() if name.startswith("tokenSR.")}
    if training and set(training) != TOKEN_SR:
        raise ValueError(f"The checkpoint must hold {sorted(TOKEN_SR)}, got {sorted(training)}.")
    model = {
        rename_weight(name).replace(".router.router.", ".router.score."): value
        for name, value in weights.items()
        if name not in training and name != "embedding.weight"  # a copy of `embed_tokens`
    }
    return model, training


def check_reference(weights: dict[str, Tensor], model: VedasForConditionalGeneration) -> None:
    """Raise unless the weights are exactly the model's, but for the scales that the published code does not have."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items() if "depth_scale" not in name}
    optional = set(model.all_tied_weights_keys)
    missing = sorted(expected.keys() - weights.keys() - optional)
    unknown = sorted(weights.keys() - expected.keys())
    wrong = [
        f"{name} is {tuple(value.shape)}, expected {expected[name]}"
        for name, value in weights.items()
        if name in expected and tuple(value.shape) != expected[name]
    ]
    if missing or unknown or wrong:
        raise ValueError(
            f"The checkpoint does not fit its backbone: missing {missing[:5]}, unknown {unknown[:5]}, wrong {wrong[:5]}."
        )


def build_reference(config: PreTrainedConfig, model_type: str, weights: dict[str, Tensor], card: dict):
    """The model that the weights are of: rows and routed layers are read off them."""
    carried = carried_fields(config)
    rows = weights["model.language_model.embed_tokens.weight"].shape[0]
    carried["text_config"]["vocab_size"] = rows
    routers = {int(match[1]) for name in weights if (match := re.search(r"layers\.(\d+)\.router\.", name))}
    fields = {"backbone": model_type, "routed_layers": sorted(routers), "latent_token_id": rows - 1}
    config = VedasConfig.preset("reference", **(carried | fields | card))
    config.architectures = [VedasForConditionalGeneration.__name__]
    with torch.device("meta"):
        return VedasForConditionalGeneration(config)


def save_processor(folder: Path, backbone: Path, rows: int) -> None:
    """Save tokenizer and image processor where the backbone has them, with the published code's tokens."""
    if not (backbone / "tokenizer_config.json").is_file():
        report(f"{backbone} has no tokenizer: the checkpoint gets none.")
        return
    tokenizer = load_tokenizer(backbone)
    added = add_tokens(tokenizer, REFERENCE_TOKENS)
    if added and list(added.values()) != list(range(rows - len(added), rows)):
        raise ValueError(
            f"The tokens {list(added)} must take the last of the checkpoint's {rows} rows, but the backbone's tokenizer gives "
            f"them {list(added.values())}."
        )
    tokenizer.padding_side = "left"
    processor = VedasProcessor(load_image_processor(backbone), tokenizer, chat_template=tokenizer.chat_template)
    processor.save_pretrained(folder)


def convert_reference(
    backbone: str | Path,
    output: str | Path,
    reference_checkpoint: str | Path,
    lora_alpha: float | None = None,
    force: bool = False,
    license: str | None = None,
    known_answers: bool = True,
) -> Path:
    """Write a Vedas checkpoint from a published one, whole or not at all, and return its folder.

    Args:
        backbone: folder or Hub id whose config (and tokenizer, image processor) the checkpoint goes with.
        reference_checkpoint: their `.pth`, or safetensors.
        lora_alpha: of the adapters; default r / 4.

    Raises:
        ValueError: keys or shapes do not fit; the message names them.
    """
    folder, output = locate_backbone(backbone), Path(output).expanduser()
    check_output(output, folder, force)
    model_type = read_model_type(folder)
    if model_type not in BACKBONES:
        raise ValueError(f"The backbone's `model_type` must be one of {sorted(BACKBONES)}, got {model_type!r}.")
    weights, training = split_reference(merge_adapters(read_reference(reference_checkpoint), lora_alpha))
    if "model.language_model.embed_tokens.weight" not in weights:
        raise ValueError(f"The checkpoint has no embed_tokens.weight; it has {sorted(weights)[:3]} and more.")
    config = read_config(folder, BACKBONES[model_type])
    card = {"base_model": name_backbone(backbone), "base_model_license": license or find_license(folder)}
    model = build_reference(config, model_type, weights, card)
    check_reference(weights, model)
    for name, value in model.state_dict().items():
        if "depth_scale" in name:
            weights[name] = torch.ones(value.shape)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig()
    with replaced_folder(output) as partial_folder:
        model.save_pretrained(partial_folder)
        write_generation_config(partial_folder, folder, model.config)
        save_processor(partial_folder, folder, model.config.get_text_config().vocab_size)
        if known_answers:
            record_answers(partial_folder, output)
        if training:
            (partial_folder / TRAINING_FILE).parent.mkdir()
            renamed = {name.replace("tokenSR.", "replay_predictor."): value for name, value in training.items()}
            save_file({name: value.contiguous() for name, value in renamed.items()}, partial_folder / TRAINING_FILE)
    report(f"Converted {len(weights)} weights, routed layers {list(model.config.routed_layers)}, {json.dumps(card)}.")
    return output
