"""`conversion.refresh_code` rewrites the code of a checkpoint, whole or not at all, and nothing else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

import modeling_latentvlm  # noqa: F401 (registers the models)
from configuration_latentvlm import ARCHITECTURES
from conversion import refresh_code as command
from conversion.known_answers import write_known_answers
from conversion.refresh_code import read_hub_classes, refresh_code
from modeling_latentvlm import answered_model


pytestmark = pytest.mark.core
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def old(tmp_path):
    """A checkpoint whose code is of another version, with a file of its user's."""
    folder = tmp_path / "old"
    shutil.copytree(ROOT / "checkpoints" / "lare", folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "modeling_lare.py").write_text("raise RuntimeError('code of an older version')\n")
    (folder / "trace.py").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "modeling_old.Old"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "notes.py").write_text("# of the user\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_classes_are_read_off_the_source_as_they_are(name):
    assert read_hub_classes(name) == ARCHITECTURES[name].hub_classes


def test_the_code_is_rewritten_and_nothing_else(old):
    before, weights = contents(old), (old / "model.safetensors").stat().st_ino
    assert refresh_code(old) == ["config.json", "modeling_lare.py", "trace.py"]
    after, shipped = contents(old), contents(ROOT / "checkpoints" / "lare")
    assert {name: after[name] for name in shipped if name.endswith(".py")} == {
        name: content for name, content in shipped.items() if name.endswith(".py") and "__pycache__" not in name
    }
    assert json.loads(after["config.json"]) == json.loads(shipped["config.json"])
    same = before.keys() - {"config.json", "modeling_lare.py"}
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert (old / "model.safetensors").stat().st_ino == weights  # linked, not copied
    assert refresh_code(old) == []
    assert [path.name for path in old.parent.iterdir()] == ["old"]


def test_an_interrupted_run_leaves_the_folder_as_it_was(old, monkeypatch):
    before, write = contents(old), Path.write_text

    def fail(path, *args, **kwargs):
        if path.name == "trace.py":
            raise OSError("No space left on device")
        return write(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        refresh_code(old)
    assert contents(old) == before
    assert [path.name for path in old.parent.iterdir()] == ["old"]


def test_the_current_folder_is_not_pulled_from_under_its_user(old, monkeypatch):
    monkeypatch.chdir(old)
    before = contents(old)
    with pytest.raises(ValueError, match="run this from another folder"):
        refresh_code(".")
    assert contents(old) == before


def test_answers_are_not_recorded_with_other_code_than_the_folder_has(old):
    with pytest.raises(ValueError, match=r"is not that of this latentvlm \(modeling_lare.py differs\).*refresh_code"):
        write_known_answers(old)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: (folder / "config.json").unlink(), "must hold a config.json, got"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json must hold a JSON object"),
        (lambda folder: (folder / "config.json").write_text("[]"), "must hold a JSON object, got a list"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "qwen2"}'),
            r"must be one of \['deeplatent', 'lare', 'vedas'\], got 'qwen2'",
        ),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(old, change, message, capsys):
    change(old)
    with pytest.raises(ValueError, match=message):
        refresh_code(old)
    with pytest.raises(SystemExit) as ended:
        command.main([str(old)])
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1


def test_old_code_is_told_by_the_installed_package_and_by_the_check(old, monkeypatch):
    told = []
    monkeypatch.setattr(answered_model.logger, "warning_once", told.append)
    AutoModelForImageTextToText.from_pretrained(old)
    assert len(told) == 1 and "modeling_lare.py differs" in told[0]
    assert f"python -m conversion.refresh_code {old}" in told[0]
    # The command loads what users load: the code in the folder. Here it has no known answers to check.
    refresh_code(old)
    source = (old / "modeling_lare.py").read_text()
    (old / "modeling_lare.py").write_text(
        source
        + "\n\nfor base in LaReForCausalLM.__mro__:\n    if 'check_known_answers' in vars(base):\n        del base.check_known_answers\n"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(old.parent / "modules")}
    arguments = [sys.executable, "-m", "conversion.check", str(old)]
    run = subprocess.run(arguments, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and f"python -m conversion.refresh_code {old}" in run.stderr, run.stderr[-2000:]
    refresh_code(old)
    run = subprocess.run(arguments, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "as recorded" in run.stdout, run.stderr[-2000:]
