"""Read what a backbone folder holds beside its weights: config, licence, tokenizer, image processor, stop tokens.

Also the two things that a user may say about the result, `--dtype` and `--set field=value`. Shared by the converters.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.repocard import metadata_load
from PIL import Image
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedConfig, ProcessorMixin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from yaml import YAMLError

from conversion.checkpoint_io import SourceWeights, write_json
from conversion.commands import exit_on_error as exit_on_error  # older code finds it here
from conversion.converter_options import CAST_DTYPE_NAMES
from conversion.fetch_assets import make_reference_image
from conversion.reading import check_model_folder, read_json_object
from processing_latentvlm.pictures import open_picture


CAST_DTYPES = {name: getattr(torch, name) for name in CAST_DTYPE_NAMES}
# What a converter reads from a Hub repository: no pickles, no other framework's weights, no original formats.
HUB_FILES = [
    "*.json",
    "*.safetensors",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "README.md",
    "LICENSE*",
    "NOTICE*",
]
HUB_FILES_LEFT = ["original/*", "onnx/*", "consolidated*"]
LEGAL_FILES = ("LICENSE*", "NOTICE*")
SPECIAL_TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Says what a class or a file is, not what the model computes: the converted checkpoint states its own.
IDENTITY_FIELDS = ("model_type", "architectures", "transformers_version", "auto_map", "_name_or_path")
REFERENCE_PHOTO = Path(__file__).resolve().parent.parent / "train" / "data" / "photos" / "chelsea.jpg"
REFERENCE_SIZE = 448  # pixels


def locate_backbone(backbone: str | Path, role: str = "backbone") -> Path:
    """Return the folder of a backbone, downloaded from the Hub (or found in its cache) where it is an id.

    Args:
        role: what it is called where it cannot be found.

    Raises:
        ValueError: there is neither such a folder nor such a repository.
    """
    folder = Path(backbone).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"A {role} folder must hold a config.json, got {folder}.")
        return folder
    check_model_folder(folder)
    try:
        return Path(snapshot_download(str(backbone), allow_patterns=HUB_FILES, ignore_patterns=HUB_FILES_LEFT))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"`{role}` must be a folder or the id of a Hub repository, got {backbone}: {reason}"
        ) from error


def name_backbone(backbone: str | Path) -> str:
    """The Hub id of a backbone where it has one, also from its place in the Hub's cache, or its folder's name."""
    folder = Path(backbone).expanduser()
    if not folder.is_dir():
        return str(backbone)
    folder = folder.resolve()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name


def find_license(folder: Path) -> str | None:
    """The `license:` of the backbone's model card. A licence with no more than a name is "other", as on the Hub.

    Raises:
        ValueError: the card's front matter cannot be read.
    """
    card = folder / "README.md"
    try:
        metadata = (metadata_load(card) if card.is_file() else None) or {}
    except (ValueError, YAMLError) as error:
        raise ValueError(f"The front matter of {card} cannot be read; pass `--license`. {error}") from error
    named = "other" if "license_name" in metadata else None
    licenses = metadata.get("license", named)
    return ", ".join(licenses) if isinstance(licenses, list) else licenses


def read_model_type(folder: Path) -> str | None:
    return read_json_object(folder / "config.json").get("model_type")


def read_config(folder: Path, config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Read the config of a stock, unquantised checkpoint.

    Raises:
        ValueError: it is of another model type, or quantised.
    """
    content = read_json_object(folder / "config.json")
    if content.get("model_type") != config_class.model_type:
        raise ValueError(
            f"The backbone's `model_type` must be {config_class.model_type!r}, "
            f"got {content.get('model_type')!r} in {folder / 'config.json'}."
        )
    if "quantization_config" in content:
        method = content["quantization_config"].get("quant_method")
        raise ValueError(f"The backbone must not be quantised, got `quant_method` {method!r} in {folder}.")
    return config_class.from_pretrained(folder)


def carried_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that a config built around `config` takes over."""
    return without_code({name: value for name, value in config.to_dict().items() if name not in IDENTITY_FIELDS})


def without_code(fields: Any) -> Any:
    """Fields without `auto_map`, wherever it stands: a backbone's code is not ours to pass on, nor to run."""
    if isinstance(fields, dict):
        return {name: without_code(value) for name, value in fields.items() if name != "auto_map"}
    return [without_code(value) for value in fields] if isinstance(fields, list) else fields


@dataclasses.dataclass
class Backbone:
    """A checkpoint folder, everything loaded but its weights."""

    folder: Path
    config: PreTrainedConfig
    weights: SourceWeights
    tokenizer: Any
    image_processor: Any
    chat_template: str | dict[str, str] | None


def load_backbone(folder: Path, config_class: type[PreTrainedConfig]) -> Backbone:
    """Load tokenizer, image processor and chat template each on its own.

    Never the stock processor: it wants a video processor, which cannot be made without torchvision.

    Raises:
        ValueError: one of them is missing, or config or weights are not what they must be.
    """
    config, weights = read_config(folder, config_class), SourceWeights(folder)
    try:
        tokenizer = load_tokenizer(folder)
        image_processor = load_image_processor(folder)
        saved = ProcessorMixin.get_processor_dict(folder)[0]
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"A backbone must hold a tokenizer and an image processor: {reason}") from error
    chat_template = saved.get("chat_template") or tokenizer.chat_template
    return Backbone(folder, config, weights, tokenizer, image_processor, chat_template)


def load_tokenizer(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # The first two are of this loading, and would be saved. The last names the code of somebody else, which our checkpoint
    # would run for everybody who trusts ours.
    for name in ("is_local", "local_files_only", "auto_map"):
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def load_image_processor(folder: Path, fallback: type = Qwen2VLImageProcessorPil, **fields):
    """The backbone's image processor; older transformers find theirs without torchvision by its class alone."""
    try:
        image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, **fields)
    except ImportError:
        image_processor = fallback.from_pretrained(folder, **fields)
    if hasattr(image_processor, "auto_map"):
        del image_processor.auto_map  # the code of somebody else
    return image_processor


def add_tokens(tokenizer, tokens: tuple[str, ...]) -> dict[str, int]:
    """Add special tokens where the tokenizer lacks them, and return the ids of those that were added.

    Raises:
        ValueError: the tokenizer's ids have gaps, and an added token got an id that another one has.
    """
    before = tokenizer.get_vocab()
    absent = [token for token in tokens if token not in before]
    if absent:
        special = [AddedToken(token, normalized=False, special=True) for token in absent]
        tokenizer.add_special_tokens({"extra_special_tokens": special}, replace_extra_special_tokens=False)
    vocabulary = tokenizer.get_vocab()
    added = {token: vocabulary[token] for token in absent}
    taken = {token: token_id for token, token_id in before.items() if token_id in added.values()}
    if taken:
        raise ValueError(
            f"The {len(before)} token ids of the backbone's tokenizer must be 0..{len(before) - 1}, "
            f"but the ids {added} of the added tokens are also those of {taken}."
        )
    return added


def check_token_ids(tokenizer, config: PreTrainedConfig, tokens: dict[str, str]) -> None:
    """Require that tokenizer and config agree on the tokens that stand for images: otherwise none would be seen.

    Args:
        tokens: token by config field.
    """
    vocabulary = tokenizer.get_vocab()
    for field, token in tokens.items():
        if vocabulary.get(token) != getattr(config, field):
            raise ValueError(
                f"The backbone's `{field}` is {getattr(config, field)}, "
                f"but its tokenizer gives {token!r} the id {vocabulary.get(token)}."
            )


def choose_dtype(name: str | None) -> torch.dtype | None:
    """The dtype to cast to, None to keep what is there."""
    if name is not None and name not in CAST_DTYPES:
        raise ValueError(f"`dtype` must be one of {tuple(CAST_DTYPES)}, got {name!r}.")
    return CAST_DTYPES.get(name)


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """Parse `field=value`, the value as JSON or, where it is none, as a string.

    Raises:
        ValueError: there is no `=`, or a field is given twice.
    """

    def refuse(constant: str):
        raise ValueError(f"{constant} is not JSON")

    overrides = {}
    for assignment in assignments:
        field, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"`--set` takes field=value, got {assignment!r}.")
        if field in overrides:
            raise ValueError(f"`--set` gives `{field}` twice.")
        try:
            overrides[field] = json.loads(text, parse_constant=refuse)
        except ValueError:
            overrides[field] = text
    return overrides


def check_overrides(
    overrides: dict[str, Any],
    config_class: type[PreTrainedConfig],
    backbone_class: type[PreTrainedConfig],
    decided: tuple[str, ...],
) -> dict[str, Any]:
    """Return the overrides with whole numbers as floats where a field is one; its value is the config's to judge.

    Only what an architecture adds to its backbone can be set: the rest describes weights that are there already.

    Args:
        decided: fields that the conversion decides.

    Raises:
        ValueError: a field is unknown, the backbone's, or decided by the conversion.
    """
    overrides = {config_class.attribute_map.get(name, name): value for name, value in overrides.items()}  # old names
    inherited = {field.name for field in dataclasses.fields(backbone_class)}
    types = {field.name: field.type for field in dataclasses.fields(config_class)}
    settable = sorted(types.keys() - inherited - set(decided))
    unknown = sorted(overrides.keys() - set(settable))
    if unknown:
        raise ValueError(f"`--set` knows the fields {', '.join(settable)}, got {', '.join(unknown)}.")
    return {
        name: float(value) if types[name] is float and type(value) is int else value
        for name, value in overrides.items()
    }


def write_generation_config(
    folder: Path, source: Path, config: PreTrainedConfig, pad_token_id: int | None = None
) -> None:
    """Write the backbone's generation config as an explicit one, with every stop token.

    Not marked as derived from the model config: transformers would derive it again on load and forget what was added.

    Args:
        pad_token_id: where the backbone says none.
    """
    file = source / "generation_config.json"
    fields = read_json_object(file) if file.is_file() else {}
    fields.pop("_from_model_config", None)
    text_config = config.get_text_config()
    for name in SPECIAL_TOKEN_FIELDS:
        if fields.get(name) is None and getattr(text_config, name, None) is not None:
            fields[name] = getattr(text_config, name)
    if fields.get("pad_token_id") is None and pad_token_id is not None:
        fields["pad_token_id"] = pad_token_id
    write_json(folder / "generation_config.json", fields)


def copy_legal_files(folder: Path, source: Path, suffix: str = "") -> None:
    """Copy licence texts, which most licences want to go with the weights."""
    for pattern in LEGAL_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / (file.name + suffix))


def reference_picture() -> Image.Image:
    """A photo to measure image features on, small enough for the largest tower on a CPU; drawn where it is missing."""
    if not REFERENCE_PHOTO.is_file():
        return make_reference_image()
    photo = open_picture(REFERENCE_PHOTO, str(REFERENCE_PHOTO))
    return photo.resize((REFERENCE_SIZE, REFERENCE_SIZE), Image.Resampling.BICUBIC)


def root_mean_square(features: Tensor) -> float:
    """Root mean square over all elements.

    Raises:
        ValueError: it is zero or no number, as with a vision tower that was never filled.
    """
    rms = features.float().square().mean().sqrt().item()
    if not 0 < rms < float("inf"):
        raise ValueError(f"The image features of the backbone must have a finite size above 0, got {rms}.")
    return rms
