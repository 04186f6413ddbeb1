"""Fields of a config that a command was told to change."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

import conversion.own_models  # noqa: F401
from conversion.backbone import parse_overrides
from conversion.reading import check_config_file


def fields_of(config: PreTrainedConfig, assignments: Sequence[str], option: str) -> dict[str, Any]:
    """Parse `field=value`, with whole numbers as floats where the field holds one; its value is the config's to judge.

    Args:
        option: that the assignments were given to, for messages.

    Raises:
        ValueError: there is no such field. Properties and methods of the config are none.
    """
    known, fields = config.to_dict(), parse_overrides(list(assignments))
    fields = {config.attribute_map.get(name, name): value for name, value in fields.items()}  # old names of fields
    unknown = sorted(name for name in fields if name not in known)
    if unknown:
        raise ValueError(f"`{option}` names {unknown}, which are no fields of the config of {config.model_type!r}.")
    return {
        name: float(value) if type(value) is int and isinstance(known[name], float) else value
        for name, value in fields.items()
    }


def load_config(path: str | Path, overrides: Sequence[str] = (), trust_remote_code: bool = False):
    """The config of a checkpoint with some fields changed.

    Raises:
        ValueError: there is no such field.
    """
    check_config_file(path)
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    return type(config).from_dict(config.to_dict() | fields_of(config, overrides, "config_overrides"))
