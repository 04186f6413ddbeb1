"""Fields of a backbone's configs that transformers takes unseen, and fails over without a word about them."""

from typing import Any


def check_backbone_fields(config: Any) -> None:
    """Look at the names that the configs of the language model and of the vision tower give to functions.

    Raises:
        ValueError: there is no such rotary embedding or activation function.
    """
    # Here, since they import torch.
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for name in ("text_config", "vision_config"):
        part = getattr(config, name)
        activation = getattr(part, "hidden_act", None)
        if isinstance(activation, str) and activation not in ACT2FN:
            raise ValueError(f"`{name}.hidden_act` must be one of {sorted(ACT2FN)}, got {activation!r}.")
    # Not those of vision towers, which know other types.
    parameters = getattr(config.text_config, "rope_parameters", None) or {}
    kind, known = parameters.get("rope_type", "default"), sorted({"default", *ROPE_INIT_FUNCTIONS})
    if kind not in known:
        raise ValueError(f"`rope_type` of `text_config.rope_parameters` must be one of {known}, got {kind!r}.")
