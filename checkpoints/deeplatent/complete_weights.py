"""A checkpoint must hold the weights that its config asks for: transformers gives others random values, and logs a line."""

from typing import Any

from safetensors import SafetensorError
from torch import nn

from .latent_architecture import has_latents


def check_weights_complete(model: nn.Module, info: dict[str, Any]) -> None:
    """Compare what loading a model found with what the model has.

    All weights together that the model's config declares as its architecture's own may be missing: such a checkpoint is a
    backbone's.

    Args:
        info: the `output_loading_info` of `from_pretrained`.

    Raises:
        ValueError: a weight has another shape than the config says, or is missing, or has another name.
    """
    wrong = [f"{name} is {tuple(got)}, expected {tuple(want)}" for name, got, want in info["mismatched_keys"]]
    if wrong:
        raise ValueError(f"The checkpoint does not fit its config: {'; '.join(sorted(wrong))}.")

    is_new = model.config.is_new_weight if has_latents(getattr(model, "config", None)) else lambda name: False
    fresh = {name for name in info["missing_keys"] if is_new(name)}
    missing = sorted(set(info["missing_keys"]) - fresh)
    if fresh and len(fresh) < sum(map(is_new, model.state_dict())):
        missing += sorted(fresh)  # a backbone has none of them; a part of them means a damaged checkpoint
    if missing:
        unknown = sorted(info.get("unexpected_keys") or ())
        others = f" It holds {len(unknown)} that the model does not have: {', '.join(unknown[:5])}." if unknown else ""
        raise ValueError(f"The checkpoint lacks {len(missing)} weights: {', '.join(missing[:5])}.{others}")


def load_complete(loader, path, **options) -> nn.Module:
    """`loader.from_pretrained(path, **options)` of a stock class, held to the same.

    Raises:
        ValueError: a weight is missing or has another shape; the message names it.
    """
    try:
        model, info = loader.from_pretrained(path, ignore_mismatched_sizes=True, output_loading_info=True, **options)
    except SafetensorError as error:
        raise ValueError(f"The weights in {path} must be intact safetensors files: {error}") from error
    try:
        check_weights_complete(model, info)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return model
