"""Every public name is in the reference of docs/reference, and every name there exists."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest


REFERENCE = Path(__file__).resolve().parent.parent / "docs/reference"
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in sorted(REFERENCE.glob("*.md")))
ENTRIES = re.findall(r"^::: ([\w.]+)\n(?:    options:\n      members: \[([^\]]*)\])?", TEXT, re.MULTILINE)
PUBLIC = ("configuration_latentvlm", "modeling_latentvlm", "processing_latentvlm", "latentvlm")


def documented() -> set[str]:
    """The names with an entry: of an entry itself, and of the members that it lists."""
    members = {name.strip() for _, names in ENTRIES for name in names.split(",") if name.strip()}
    return members | {entry.rpartition(".")[2] for entry, _ in ENTRIES}


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_documented(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"there is no {package} yet")
    names = set(importlib.import_module(package).__all__) - {"__version__"}
    assert names and not names - documented()


@pytest.mark.parametrize("entry, members", ENTRIES)
def test_entries_exist_and_have_a_docstring(entry, members):
    """An entry is a module, or a name of one; a class or function without a docstring would be an empty page."""
    try:
        found = importlib.import_module(entry)
    except ModuleNotFoundError:
        module, _, name = entry.rpartition(".")
        found = getattr(importlib.import_module(module), name)
    for name in filter(None, (name.strip() for name in members.split(","))):
        assert (getattr(found, name).__doc__ or "").strip(), name
    assert (found.__doc__ or "").strip()
