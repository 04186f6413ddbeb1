"""`import latentvlm`: quick, all public names, and models that transformers finds without `trust_remote_code`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import latentvlm
from latentvlm.registration import PACKAGES


ROOT = Path(__file__).resolve().parents[1]
LOADED = """
model = AutoModel.from_pretrained("checkpoints/lare")
assert type(model) is latentvlm.LaReForCausalLM, type(model)
assert type(AutoProcessor.from_pretrained("checkpoints/lare")) is latentvlm.LaReProcessor
"""
ORDERS = {
    "first": "import latentvlm\nfrom transformers import AutoModel, AutoProcessor",
    "second": "import transformers\nassert 'torch' not in sys.modules\nimport latentvlm\nfrom transformers import AutoModel, AutoProcessor",
    "last": "from transformers import AutoModel, AutoProcessor\nimport latentvlm",
}


def run(code: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_is_quick():
    run("import latentvlm, sys\nassert not {'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)")


@pytest.mark.core
@pytest.mark.parametrize("order", ORDERS)
def test_transformers_finds_the_models(order):
    """In every order of the imports; afterwards the module of transformers is as it was."""
    run(f"import sys\n{ORDERS[order]}\n{LOADED}\nassert type(sys.modules['transformers']).__name__ == '_LazyModule'")


def test_every_public_name_is_there():
    assert sorted(latentvlm._HOMES) == latentvlm.__all__ and set(latentvlm.__all__) <= set(dir(latentvlm))
    for name in latentvlm.__all__:
        assert getattr(latentvlm, name) is not None
    for package in PACKAGES:
        public = set(sys.modules[package].__all__) - {"ARCHITECTURES"}
        assert public <= set(latentvlm.__all__), package
    with pytest.raises(AttributeError, match="no attribute 'LaRe'"):
        _ = latentvlm.LaRe


def test_editors_see_the_same_names():
    """The imports under `TYPE_CHECKING`, which never run, name what `_HOMES` does."""
    tree = ast.parse((ROOT / "latentvlm/__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: line.module for line in block.body for alias in line.names}
    assert seen == latentvlm._HOMES


def test_known_answers_are_checked():
    assert latentvlm.check_known_answers(ROOT / "checkpoints/vedas").passed
