"""Whose code commands run: that of our own model types, which is here. Importing this module registers them.

A checkpoint of another model type that brings code (`auto_map`) is refused by transformers, unless the user gives
`--trust_remote_code`. Of ours the installed code is taken either way, and never what lies in the folder.
"""

from pathlib import Path

from transformers import AutoConfig

import modeling_latentvlm  # noqa: F401
import processing_latentvlm  # noqa: F401
from configuration_latentvlm import ARCHITECTURES
from conversion.reading import check_config_file


TRUST_HELP = "Run the code that a checkpoint of another model type brings. Those of this library need no such trust."


def check_model_type(model: str | Path, wanted: str, trust_remote_code: bool = False) -> None:
    """Refuse the checkpoint of another architecture, before anything of it is loaded.

    Args:
        trust_remote_code: a checkpoint of a type that is not ours may pass, since its code may build on ours.

    Raises:
        ValueError: it is of another type, which is named with the command that trains it.
    """
    check_config_file(model)
    found = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code).model_type
    if found != wanted and (found in ARCHITECTURES or not trust_remote_code):
        hint = f" Train it with `python -m {ARCHITECTURES[found].training_command}`." if found in ARCHITECTURES else ""
        raise ValueError(f"{model} must be a checkpoint of type {wanted!r}, got {found!r}.{hint}")
