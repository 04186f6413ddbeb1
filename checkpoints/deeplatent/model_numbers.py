"""Numbers that a processor needs of its model, read from the model's config, which alone holds them."""

import json
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file


HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
CONFIG = "config.json"


def read_json(source: str | Path, name: str, chosen: dict[str, Any]) -> dict[str, Any] | None:
    """The object in a file of a checkpoint, or None where there is no such file.

    Raises:
        ValueError: the file holds no JSON object.
    """
    found = cached_file(
        str(source),
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **chosen,
    )
    if found is None:
        return None
    try:
        content = json.loads(Path(found).read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{found} must hold a JSON object: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{found} must hold a JSON object, got a {type(content).__name__}.")
    return content


def find_config(source: str | Path, config_class: type, chosen: dict[str, Any]):
    """The config beside a processor.

    Args:
        chosen: of `HUB_ARGUMENTS` those that the processor is loaded with.

    Returns:
        None where there is none, or one of another model type.

    Raises:
        ValueError: the file holds no JSON object.
        StrictDataclassError: a field of it is refused.
    """
    if Path(source).is_file():
        source = Path(source).parent
    content = read_json(source, CONFIG, chosen)
    if content is None or content.get("model_type") != config_class.model_type:
        return None
    return config_class.from_dict(content)
