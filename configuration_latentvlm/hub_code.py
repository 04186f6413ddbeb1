"""Checkpoints that carry their own code, written flat the way the Hub's remote-code loader can read it.

`save_pretrained`, `push_to_hub` and `Trainer.save_model` all end in `config.to_json_file` before anything is uploaded, so
that is the one place where the code is written. The loader (`transformers/dynamic_module_utils.py`) follows only
relative imports of sibling files; the sources import each other absolutely, by the one form the pattern below knows,
and the copies get that line rewritten. The copies are build output: never edited, never committed.
"""

import re
from pathlib import Path
from typing import Any


__version__ = "0.1.0"

PACKAGES = ("configuration_latentvlm", "modeling_latentvlm", "processing_latentvlm")
SOURCES = Path(__file__).parent.parent  # read and not imported: a long run may save after its package was updated
_IMPORT = re.compile(rf"^(\s*from )((?:{'|'.join(PACKAGES)})\.(\w+))(?= import\b)", re.MULTILINE)


def export_code(module: str, folder: Path) -> None:
    """Write `module` and every project module it imports, flat, into `folder`."""
    pending, done = [module], set()
    while pending:
        module = pending.pop()
        done.add(module)
        source = (SOURCES / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        pending += {found for _, found, _ in _IMPORT.findall(source)} - done
        target = folder / f"{module.rpartition('.')[2]}.py"
        target.write_text(_IMPORT.sub(r"\1.\3", source), encoding="utf-8")


class HubCodeMixin:
    """Adds `auto_map` to what a config or processor saves, and writes the code that it points to.

    A subclass sets `hub_classes`, e.g. `{"AutoModel": "modeling_latentvlm.modeling_lare.LaReForCausalLM"}`.
    """

    hub_classes = {}

    def to_dict(self) -> dict[str, Any]:
        # Here and not while saving, so that a saved and reloaded object equals the one in memory.
        auto_map = {auto_class: name.split(".", 1)[1] for auto_class, name in self.hub_classes.items()}
        return super().to_dict() | {"auto_map": auto_map}

    def to_json_file(self, json_file_path, *args, **kwargs) -> None:
        super().to_json_file(json_file_path, *args, **kwargs)
        # An object loaded from a checkpoint has flat code already, which transformers itself copies along.
        if type(self).__module__.startswith(PACKAGES):
            for module in {name.rpartition(".")[0] for name in self.hub_classes.values()}:
                export_code(module, Path(json_file_path).parent)
