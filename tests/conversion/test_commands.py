"""What all command lines share."""

import argparse
import configparser
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from conversion import commands
from conversion.commands import CommandParser, exit_on_error
from conversion.dataclass_parser import DataclassParser


@dataclass
class Settings:
    model_path: str = field(metadata={"help": "A model."})
    batch_size: int = field(default=4, metadata={"help": "Rows at once."})
    output_dir: str = field(default="out", metadata={"help": "A folder."})


@dataclass
class Changed(Settings):
    batch_size: int = 8


@pytest.fixture(autouse=True)
def nothing_warned(monkeypatch):
    monkeypatch.setattr(commands, "_warned", set())


def plain_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="p")
    parser.add_argument("--batch-size", type=int, default=4, help="rows at once")
    parser.add_argument("--model_path", help="a model")
    parser.add_argument("--words", nargs="*", help="any")
    return parser


@pytest.mark.parametrize("option", ["--batch-size", "--batch_size"])
@pytest.mark.parametrize("model", ["--model", "--model-path", "--model_path"])
def test_every_spelling_reaches_the_same_field(option, model, capsys):
    for parse in (
        plain_parser().parse_args,
        lambda words: DataclassParser(Settings).parse_args_into_dataclasses(words)[0],
    ):
        found = parse([option, "7", f"{model}=a_b-c"])
        assert (found.batch_size, found.model_path) == (7, "a_b-c")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (model != "--model") and all("old spelling of --model," in line for line in lines)


def test_the_names_of_the_trainer_are_no_old_spellings(capsys):
    for name in ("output", "output_dir", "output-dir"):
        (found,) = DataclassParser(Settings).parse_args_into_dataclasses(["--model", "m", f"--{name}", "here"])
        assert found.output_dir == "here"
    assert not capsys.readouterr().err


def test_values_and_what_follows_two_dashes_stay_as_they_are():
    parser = plain_parser()
    parser.add_argument("rest", nargs="*", help="any")
    found = parser.parse_args(["--words", "a-b", "model_path", "--", "--batch_size"])
    assert found.words == ["a-b", "model_path"] and found.rest == ["--batch_size"]


@pytest.mark.parametrize("words", [["--batch", "3"], ["--batch-size", "x"], ["--nothing"]])
def test_an_abbreviation_and_other_errors_are_one_line(words, capsys):
    with pytest.raises(SystemExit) as ended:
        plain_parser().parse_args(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("error: ") and "`p --help`" in line
    with pytest.raises((SystemExit, ValueError)):
        DataclassParser(Settings).parse_args_into_dataclasses(["--model", "m", *words])


def test_help_shows_the_shared_word_first_each_spelling_once_and_defaults():
    text = DataclassParser(Changed).format_help()
    assert "--model MODEL" in text and text.index("--model MODEL") < text.index("--model_path MODEL")
    assert "--batch-size" not in text and "Rows at once. (default: 8)" in " ".join(text.split())
    assert "rows at once (default: 4)" in plain_parser().format_help()


def test_the_options_of_a_subcommand_have_both_spellings():
    parser = CommandParser(prog="p")
    parser.add_subparsers(dest="which").add_parser("one").add_argument("--batch-size", type=int, help="rows")
    assert parser.parse_args(["one", "--batch_size", "3"]).batch_size == 3


def test_a_missing_package_is_one_line_that_says_how_it_is_installed(capsys, monkeypatch):
    for module, how in (("gradio", ".[demo]"), ("peft.tuners", ".[train]"), ("playwright", "pip install playwright")):
        with pytest.raises(SystemExit) as ended, exit_on_error():
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        (line,) = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and how in line and module.partition(".")[0] in line
    with pytest.raises(ModuleNotFoundError), exit_on_error():  # of ours: a fault, whose place is wanted
        import conversion.nothing  # noqa: F401
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit), exit_on_error():
        import gradio  # noqa: F401


def test_an_import_at_the_top_of_a_command_is_explained_too(tmp_path):
    (tmp_path / "pandas.py").write_text("raise ModuleNotFoundError('No module named pandas', name='pandas')")
    root = str(Path(__file__).parents[2])
    ended = subprocess.run(
        [sys.executable, "-m", "evaluation.analyses.probing", "--help"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 2 and line.startswith("error: This command needs pandas") and ".[train]" in line


def test_the_extras_are_those_of_the_setup():
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    names = {"math_verify": "math-verify", "sklearn": "scikit-learn"}
    for extra, modules in commands.EXTRAS.items():
        brought = re.findall(r"^[\w-]+", setup["options.extras_require"][extra], re.M)
        assert {names.get(module, module) for module in modules} <= set(brought), extra
