"""What may import what: the arrows of the tree."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
LAYERS = {  # a folder: what its files may import of this repository
    "configuration_latentvlm": {"configuration_latentvlm"},
    "modeling_latentvlm": {"configuration_latentvlm", "modeling_latentvlm"},
    "processing_latentvlm": {"configuration_latentvlm", "processing_latentvlm", "modeling_latentvlm.trace"},
}
PACKAGES = set(LAYERS)
LAYERS["latentvlm"] = {*PACKAGES, "latentvlm"}
LAYERS["conversion"] = {*PACKAGES, "conversion"}
LAYERS["train/data"] = {*LAYERS["conversion"], "train.data"}
# What an answer is and whether it is right is one question for rewards and for evaluation.
READING_ANSWERS = {"evaluation.final_answer", "evaluation.mathematics"}
LAYERS["train"] = {*LAYERS["conversion"], "train", *READING_ANSWERS}
# LaRe's decoder of images is the one part of a training that an analysis needs.
DECODER = {"train.lare.image_reconstruction", "train.lare.objective", "train.common.training_model"}
LAYERS["evaluation"] = {*LAYERS["train/data"], "evaluation"}
LAYERS["evaluation/analyses"] = {*LAYERS["evaluation"], *DECODER}
LAYERS["train/recipes"] = {*LAYERS["train"], "evaluation"}
LAYERS["examples"] = {*LAYERS["train/recipes"], "examples"}
LAYERS["docs"] = {*LAYERS["examples"], "docs"}
LAYERS["benchmarks"] = {*LAYERS["train"], "benchmarks"}
OURS = {name.partition("/")[0] for name in LAYERS}


def imports_of(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            if [name.name for name in node.names] != ["moved_attribute"]:  # of old names, not of training
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def layer_of(file: Path) -> str:
    parts = file.relative_to(ROOT).parts[:-1]
    return next("/".join(parts[:end]) for end in range(len(parts), 0, -1) if "/".join(parts[:end]) in LAYERS)


@pytest.mark.parametrize("folder", sorted(OURS))
def test_files_import_what_their_layer_may(folder):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    wrong = []
    for file in files:
        allowed = LAYERS[layer_of(file)]
        for name in imports_of(file):
            if name.partition(".")[0] in OURS and not any(
                name == one or name.startswith(f"{one}.") for one in allowed
            ):
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_the_root_of_train_holds_commands_only():
    for file in (ROOT / "train").glob("*.py"):
        assert file.name == "__init__.py" or "exit_on_error()" in file.read_text(encoding="utf-8"), file
