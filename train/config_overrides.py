"""A checkpoint's config with fields that a training script was told to change."""

from pathlib import Path

from transformers import AutoConfig

from conversion.backbone import parse_overrides


def load_config(path: str | Path, overrides: list[str] = ()):
    """The config of a checkpoint with some fields changed.

    Raises:
        ValueError: there is no such field.
    """
    fields = parse_overrides(list(overrides))
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    unknown = sorted(name for name in fields if not hasattr(config, name))
    if unknown:
        raise ValueError(f"`config_overrides` names {', '.join(unknown)}, which the config does not have.")
    fields = {
        name: float(value) if type(value) is int and isinstance(getattr(config, name), float) else value
        for name, value in fields.items()
    }
    return type(config).from_dict(config.to_dict() | fields)
