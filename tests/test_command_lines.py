"""Every command of this repository: its options, their spelling, their help."""

import importlib
import re
from pathlib import Path

import pytest

from conversion.commands import COMMAND_FOLDERS as FOLDERS
from conversion.commands import RENAMED, CommandOptions, option_key, say_how_to_install


ROOT = Path(__file__).parents[1]
# Options whose old names say the same as a shared word. Nothing new may be called so.
NOT_SHARED = {
    "num_seed",
    "batchsize",
    "model_name_or_path",
    "checkpoint_path",
    "out",
    "out_dir",
    "output_folder",
    "bs",
    "overrides",
}
# A worker and a drawing without options, and commands of other harnesses, which are not installed here.
OTHERS = {
    "evaluation.harnesses.lmms_eval",
    "evaluation.harnesses.vlmevalkit",
    "evaluation.worker_mathematics",
    "docs.diagrams",
}


def find_commands() -> list[str]:
    """Names of all modules that are commands."""
    names = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if '__name__ == "__main__"' in path.read_text(encoding="utf-8"):
                names.append(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return [name for name in names if name not in OTHERS]


COMMANDS = find_commands()


def parsers_of(command: str) -> list[CommandOptions]:
    """The parser of a command and those of its subcommands."""
    try:
        module = importlib.import_module(command)
    except ModuleNotFoundError as error:
        if say_how_to_install(error.name) is None:
            raise
        pytest.skip(f"{error.name} is not installed")
    build = getattr(module, "build_parser", None)
    if build is None and command.endswith(".__main__"):  # of a package whose command stands in another file
        build = importlib.import_module(module.main.__module__).build_parser
    parser = build()
    assert isinstance(parser, CommandOptions), command
    found = [parser]
    for action in parser._actions:
        if isinstance(action.choices, dict) and all(
            isinstance(one, CommandOptions) for one in action.choices.values()
        ):
            found += action.choices.values()
    return found


def options_of(parser: CommandOptions):
    """(action, its long options) of all but help."""
    for action in parser._actions:
        options = [option for option in action.option_strings if option.startswith("--")]
        if options and options != ["--help"]:
            yield action, options


def test_all_commands_are_found():
    assert len(COMMANDS) > 30 and {"evaluation.evaluate", "train.train_lare", "train.recipes.__main__"} <= set(
        COMMANDS
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_keeps_the_rules_of_all(command):
    for parser in parsers_of(command):
        assert not parser.allow_abbrev
        unexplained = [
            action.dest for action in parser._actions if not (action.help or "").strip() and action.dest != "command"
        ]
        assert not unexplained, f"{command}: options without help: {unexplained}"
        for action, options in options_of(parser):
            keys = [option_key(option) for option in options]
            assert len(set(keys)) == len(keys), f"{command}: {options}"
            shared = [RENAMED[key] for key in keys if key in RENAMED]
            assert set(shared) <= set(keys) and (not shared or keys[0] == shared[0]), f"{command}: {options}"
            assert not NOT_SHARED & {*keys, action.dest}, f"{command}: {options}"
            for option in options:  # both spellings lead to the option
                for spelling in (f"--{option_key(option)}", f"--{option_key(option).replace('_', '-')}"):
                    (spelled,) = parser.spell_as_declared([spelling])
                    assert parser._option_string_actions[spelled] is action
        assert parser.format_help()


def test_options_are_read_by_the_shared_parsers_alone():
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if path.parent.name != "conversion" or path.name not in ("commands.py", "dataclass_parser.py"):
                assert not re.search(r"\b(argparse\.ArgumentParser|HfArgumentParser)\(", text), path
