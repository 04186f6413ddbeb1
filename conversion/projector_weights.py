"""Read a trained projector of LLaVA: `mm_projector.bin` as its authors publish it, or a folder of `llava-hf`."""

import pickle
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from conversion.backbone import locate_backbone
from conversion.checkpoint_io import SourceWeights


PROJECTOR = "model.multi_modal_projector."
# The authors number the layers of `mlp2x_gelu`, of which the activation is 1.
NAMES = (
    (re.compile(r"(?:^|\.)mm_projector\.([02])\.(weight|bias)$"), {"0": "linear_1", "2": "linear_2"}),
    (re.compile(r"(?:^|\.)multi_modal_projector\.(linear_[12])\.(weight|bias)$"), {}),
)


def rename_projector_weight(name: str) -> str | None:
    """Name in the model of a weight on disk; None where it is none of a projector."""
    for pattern, layers in NAMES:
        found = pattern.search(name)
        if found:
            return f"{PROJECTOR}{layers.get(found[1], found[1])}.{found[2]}"
    return None


def load_projector(source: str | Path, expected: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the weights of a projector by their names in the model.

    Args:
        source: a file, or a folder or Hub id of a LLaVA checkpoint.
        expected: shape by name.

    Raises:
        ValueError: it holds no such projector, or one of other widths.
    """
    path = Path(source).expanduser()
    weights = read_file(path) if path.is_file() else read_checkpoint(locate_backbone(source, "projector"))
    if weights.keys() != expected.keys():
        raise ValueError(
            f"`projector` must hold the two layers of LLaVA-1.5's, each with weight and bias, got {sorted(weights)} in {source}."
        )
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            raise ValueError(
                f"The projector must fit between vision tower and language model: {name} must be {list(shape)}, "
                f"got {list(weights[name].shape)} in {source}."
            )
    return weights


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    source = SourceWeights(folder)
    return {renamed: source.read(name) for name in source.entries if (renamed := rename_projector_weight(name))}


def read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        found = load_file(path)
    else:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"`projector` {path} cannot be read as tensors: {reason}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"`projector` must be a dictionary of tensors, got another object in {path}.")
    return {renamed: value for name, value in found.items() if (renamed := rename_projector_weight(name))}
