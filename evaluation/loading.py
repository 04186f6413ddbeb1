"""A checkpoint to evaluate: ours of any architecture, or a plain model that `AutoModelForImageTextToText` loads."""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
)
from transformers.utils import cached_file, is_torchvision_available

import conversion.own_models  # noqa: F401
from conversion.reading import check_config_file
from modeling_latentvlm.complete_weights import load_complete
from processing_latentvlm.processing_qwen import QwenLatentProcessor
from train.data.decontamination.journal import hash_file


DTYPES = ("auto", "float32", "bfloat16", "float16")
PLAIN_QWEN = (Qwen2VLConfig, Qwen2_5_VLConfig)  # and not what derives from them
MODEL_FILES = (".json", ".safetensors", ".py", ".jinja", ".txt", ".model")  # what a checkpoint's answers follow from


class PlainQwenProcessor(QwenLatentProcessor):
    """Qwen-VL's own processor, which cannot be built without torchvision; no tokens of ours."""


def load_processor(model: str, trust_remote_code: bool = False):
    """The checkpoint's processor, which pads on the left: `generate` goes on from the last column.

    Args:
        trust_remote_code: run what the checkpoint of another model type brings (`conversion/own_models.py`).
    """
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    if type(config) in PLAIN_QWEN and not is_torchvision_available():
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        processor = PlainQwenProcessor(
            AutoImageProcessor.from_pretrained(model, trust_remote_code=trust_remote_code),
            tokenizer,
            chat_template=tokenizer.chat_template,
        )
    else:
        processor = AutoProcessor.from_pretrained(model, trust_remote_code=trust_remote_code)
    if processor.chat_template is None:
        raise ValueError(f"{model} has no chat template, without which no question can be asked.")
    processor.tokenizer.padding_side = "left"
    return processor


def load_model(
    model: str,
    dtype: str = "auto",
    device: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model in evaluation mode, on `device` or, by default, on a GPU where there is one.

    Raises:
        ValueError: an unknown dtype, or weights that are missing or do not fit the config.
    """
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {DTYPES}, got {dtype!r}.")
    check_config_file(model)
    loaded = load_complete(
        AutoModelForImageTextToText,
        model,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
        attn_implementation=attn_implementation,
        use_safetensors=True,
    )
    return loaded.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def hash_model(model: str) -> dict[str, str]:
    """By file what the answers follow from: weights, config, processor, code. Of a hub's model its commit.

    Raises:
        ValueError: it is neither a folder with a config nor a model of a hub.
    """
    folder = Path(model)
    if not folder.is_dir():
        try:
            config = Path(cached_file(model, "config.json"))
        except OSError as error:
            raise ValueError(f"`model` must be a folder or the name of a model on a hub, got {model!r}.") from error
        return {"commit": config.parent.name}  # models--owner--name/snapshots/<commit>/config.json
    if not (folder / "config.json").is_file():
        raise ValueError(f"`model` must be the folder of a checkpoint, but {folder} has no config.json.")
    files = sorted(path for path in folder.iterdir() if path.suffix in MODEL_FILES)
    return {path.name: hash_file(path) for path in files}
