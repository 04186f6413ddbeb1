"""What the README shows runs: its Python as written, and its commands with options that their programs know."""

import contextlib
import io
import re
import runpy
import sys
from functools import cache
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [
    line.partition("#")[0].strip()
    for language, text in BLOCKS
    if language == "bash"
    for line in text.replace("\\\n", " ").splitlines()
    if " -m " in line and "pip" not in line.split()[0]
]
OURS = ("train.", "conversion.", "examples.", "evaluation.", "benchmarks.", "latentvlm.")


def test_there_is_something_to_run():
    assert PYTHON and len(COMMANDS) > 20


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_blocks_run_as_written(number, monkeypatch, capsys):
    """With a checkpoint that ships in the place of the one that the reader converts."""
    monkeypatch.chdir(ROOT)
    code = re.sub(r'"out/(deeplatent|lare|vedas)[\w-]*"', r'"checkpoints/\1"', "\n".join(PYTHON[: number + 1]))
    code = re.sub(r'"(?:trace|out/trace)\.png"', "io.BytesIO()", code)
    with torch.no_grad():
        exec(compile(f"import io\n{code}", "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip()


@cache
def help_of(module: str, stage: str | None) -> str:
    """What a command prints on `--help`."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [module, *(["--stage", stage] if stage else []), "--help"])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    return printed.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_the_options_that_the_readme_gives(command):
    words = command.split()
    if not (module := words[words.index("-m") + 1]).startswith(OURS):
        pytest.skip("another program's")
    for adapter, harness in (("vlmevalkit", "vlmeval"), ("lmms_eval", "lmms_eval")):
        if module.endswith(adapter):
            pytest.importorskip(harness, reason=f"{harness} is not installed")
    stage = words[words.index("--stage") + 1] if module == "train.train_deeplatent" else None
    given = {
        word.partition("=")[0].replace("_", "-") for word in words[words.index("-m") + 2 :] if word.startswith("--")
    }
    known = {word.replace("_", "-") for word in re.findall(r"--[\w-]+", help_of(module, stage))}
    assert given <= known


def test_the_first_block_prints_what_the_readme_says(capsys, monkeypatch):
    """As a user who has cloned the repository; float32, so that no machine's rounding decides."""
    found = re.search(r"```python\n(.*?)```\n\nprints\n\n```\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(compile(found[1].replace('dtype="auto"', 'dtype="float32"'), "README.md", "exec"), {})
    assert capsys.readouterr().out == found[2]
