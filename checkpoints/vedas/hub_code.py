"""Checkpoints that carry their own code, written flat the way the Hub's remote-code loader can read it.

`save_pretrained`, `push_to_hub` and `Trainer.save_model` all end in `config.to_json_file` before anything is uploaded, so
that is the one place where the code is written. The loader (`transformers/dynamic_module_utils.py`) follows only
relative imports of sibling files; the sources import each other absolutely, by the one form the pattern below knows,
and the copies get that line rewritten. The copies are build output: never edited.
"""

import json
import re
from pathlib import Path
from typing import Any


__version__ = "0.2.0"

PACKAGES = ("configuration_latentvlm", "modeling_latentvlm", "processing_latentvlm")
SOURCES = Path(__file__).parent.parent  # read and not imported: a long run may save after its package was updated
_IMPORT = re.compile(rf"^(\s*from )((?:{'|'.join(PACKAGES)})\.(\w+))(?= import\b)", re.MULTILINE)


def read_source(module: str) -> str:
    return (SOURCES / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")


def flat_code(hub_classes: dict[str, str]) -> dict[str, str]:
    """The text of every file that a checkpoint needs, by file name: its classes' modules and all that they import."""
    pending, files = [name.rpartition(".")[0] for name in hub_classes.values()], {}
    while pending:
        module = pending.pop()
        source = read_source(module)
        files[f"{module.rpartition('.')[2]}.py"] = _IMPORT.sub(r"\1.\3", source)
        found = {found for _, found, _ in _IMPORT.findall(source)}
        pending += [name for name in found if f"{name.rpartition('.')[2]}.py" not in files]
    return files


def export_code(hub_classes: dict[str, str], folder: Path) -> None:
    """Write the code of `hub_classes`, flat, into `folder`."""
    for name, text in flat_code(hub_classes).items():
        (folder / name).write_text(text, encoding="utf-8")


def find_stale_code(folder: str | Path, hub_classes: dict[str, str]) -> str | None:
    """The first file of a checkpoint folder's code that is not as this library writes it, or None."""
    folder = Path(folder)
    if not any(folder.glob("*.py")):
        return None
    for name, text in sorted(flat_code(hub_classes).items()):
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text:
            return name
    return None


def map_classes(hub_classes: dict[str, str]) -> dict[str, str]:
    """The `auto_map` of a config: `module.Class` of the flat code by auto class."""
    return {auto_class: name.split(".", 1)[1] for auto_class, name in hub_classes.items()}


class HubCodeMixin:
    """Adds `auto_map` to what a config or processor saves, and writes the code that it points to.

    A subclass sets `hub_classes`, e.g. `{"AutoModel": "modeling_latentvlm.modeling_lare.LaReForCausalLM"}`.
    """

    hub_classes = {}

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers, which fails without a word about the file where it holds no object.

        Raises:
            ValueError: the folder's config.json holds no JSON object.
        """
        path = Path(str(pretrained_model_name_or_path)) / "config.json"
        if path.is_file():
            try:
                content = json.loads(path.read_bytes().decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} must hold a JSON object: {error}") from error
            if not isinstance(content, dict):
                raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}.")
        return super().get_config_dict(pretrained_model_name_or_path, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        # Here and not while saving, so that a saved and reloaded object equals the one in memory.
        return super().to_dict() | {"auto_map": map_classes(self.hub_classes)}

    def to_json_file(self, json_file_path, *args, **kwargs) -> None:
        super().to_json_file(json_file_path, *args, **kwargs)
        # An object loaded from a checkpoint has flat code already, which transformers itself copies along.
        if type(self).__module__.startswith(PACKAGES):
            export_code(self.hub_classes, Path(json_file_path).parent)
