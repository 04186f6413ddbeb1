"""Fields of a language model's config that transformers takes unseen, and fails over without a word about them."""

from typing import Any


def check_rope_type(text_config: Any) -> None:
    """Raises:
    ValueError: there is no rotary embedding of the type that `rope_parameters` names.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # here, since it imports torch

    parameters = getattr(text_config, "rope_parameters", None) or {}
    known = sorted({"default", *ROPE_INIT_FUNCTIONS})
    kind = parameters.get("rope_type", "default")
    if kind not in known:
        raise ValueError(f"`rope_type` of `text_config.rope_parameters` must be one of {known}, got {kind!r}.")
