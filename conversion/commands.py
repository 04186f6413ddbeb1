"""What all commands share: how options are spelled, what `--help` shows, and how a command ends.

Every command builds its parser with `CommandParser`, or with `DataclassParser` (`conversion/dataclass_parser.py`) where its options
are dataclasses. Both

    accept `-` and `_` in every long option          --batch-size, --batch_size
    use one word for one thing, and accept old ones  --model for --model_path (`RENAMED`)
    refuse abbreviations                             --batch is an error
    show defaults                                    in --help
    end with one line and status 2                   where something is wrong with the options

Nothing here imports torch or transformers, so that `--help` is fast.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


# Options that had other names in version 0.1, or have them in transformers, and the words that all commands share:
# --model --data --output --set --split --limit --batch-size --seed --dtype --device
RENAMED = {
    "model_path": "model",
    "data_path": "data",
    "eval_data_path": "eval_data",
    "output_dir": "output",
    "config_overrides": "set",
    "model_dtype": "dtype",
}
STANDARD = {"output_dir"}  # the Trainer's own names: no old spelling
REMOVED_IN = "0.4"

COMMAND_FOLDERS = ("conversion", "evaluation", "train", "examples", "benchmarks", "docs")

# Optional packages by the extra of setup.cfg that brings them; the last ones are in no extra.
EXTRAS = {
    "train": (
        "peft",
        "trl",
        "datasets",
        "diffusers",
        "matplotlib",
        "math_verify",
        "gguf",
        "pandas",
        "sklearn",
        "scipy",
    ),
    "demo": ("gradio",),
    "dev": ("bitsandbytes", "nbclient", "ipykernel"),
}
PACKAGES = {"playwright": "playwright", "deepspeed": "deepspeed", "torchvision": "torchvision", "yaml": "pyyaml"}


def option_key(option: str) -> str:
    """The name of an option without its dashes, the same for both spellings."""
    return option.lstrip("-").replace("-", "_")


class CommandHelp(argparse.RawDescriptionHelpFormatter):
    """Descriptions keep their lines, and every option with a default shows it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_default = not action.help or "default" in action.help.lower()
        has_default = action.option_strings and action.default not in (None, argparse.SUPPRESS, [], "")
        if says_default or not has_default or isinstance(action.default, bool):
            return action.help
        if isinstance(action.default, (list, tuple)):
            shown = " ".join(map(str, action.default)).replace("%", "%%")
            return f"{action.help} (default: {shown})"
        return f"{action.help} (default: %(default)s)"


class CommandOptions:
    """Mixed into a parser of argparse, or one derived from it."""

    def __init__(self, *args, **settings):
        spec = getattr(sys.modules.get("__main__"), "__spec__", None)
        if spec is not None:
            settings.setdefault("prog", f"python -m {spec.name.removesuffix('.__main__')}")
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": CommandHelp} | settings)

    def add_argument(self, *names, **settings):
        """As in argparse; the shared word stands first, and each spelling is shown once."""
        if names and names[0].startswith("--"):
            settings.setdefault("dest", option_key(names[0]))
            shared = [f"--{RENAMED[key]}" for key in map(option_key, names) if key in RENAMED]
            by_key: dict[str, str] = {}
            for name in (*shared, *names):
                by_key.setdefault(option_key(name), name)
            names = tuple(by_key.values())
        return super().add_argument(*names, **settings)

    def parse_known_args(self, args=None, namespace=None):
        arguments = sys.argv[1:] if args is None else args
        return super().parse_known_args(self.spell_as_declared(list(arguments)), namespace)

    def spell_as_declared(self, arguments: list[str]) -> list[str]:
        """The arguments with every known option spelled as the parser knows it."""
        known = {option_key(option): option for option in self._option_string_actions if option.startswith("--")}
        spelled = []
        for at, argument in enumerate(arguments):
            if argument == "--":
                return spelled + arguments[at:]
            name, equals, value = argument.partition("=")
            key = option_key(name)
            if name.startswith("--") and key in known:
                argument = f"{known[key]}{equals}{value}"
                if key in RENAMED and key not in STANDARD:
                    warn_of_old_spelling(key)
            spelled.append(argument)
        return spelled

    def error(self, message: str):
        self.exit(2, f"error: {' '.join(message.split())} (`{self.prog} --help` lists the options)\n")


class CommandParser(CommandOptions, argparse.ArgumentParser):
    """The parser of a command."""


_warned: set[str] = set()


def warn_of_old_spelling(key: str) -> None:
    """Name the shared word on stderr, once, and in one process of several."""
    if key not in _warned and os.environ.get("RANK", "0") == "0":
        _warned.add(key)
        print(
            f"warning: --{key} is the old spelling of --{RENAMED[key]}, and works until version {REMOVED_IN}.",
            file=sys.stderr,
            flush=True,
        )


def say_how_to_install(module: str | None) -> str | None:
    """One line on how an optional package is installed; None where the module is no optional package."""
    name = (module or "").partition(".")[0]
    extra = next((extra for extra, modules in EXTRAS.items() if name in modules), None)
    if extra is None and name not in PACKAGES:
        return None
    how = f'-c constraints.txt -e ".[{extra}]"' if extra else PACKAGES[name]
    return f"This command needs {name}, which is not installed. Run: pip install {how}"


def explain_failed_import(kind, error, trace) -> None:
    """As `sys.excepthook`: the optional package that a module of ours imports at its top is named in one line, too."""
    text = say_how_to_install(error.name) if isinstance(error, ImportError) else None
    if text is None or os.environ.get("LATENTVLM_TRACEBACK"):
        sys.__excepthook__(kind, error, trace)
    else:
        end_with(text)


def is_command_of_ours() -> bool:
    """Whether this process runs one of our commands; other programs that import this module keep their own hook."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = spec.name if spec is not None else ""
    # While `python -m` imports the packages that a command lies in, its first argument is still "-m".
    return sys.argv[:1] == ["-m"] or name.partition(".")[0] in COMMAND_FOLDERS


if is_command_of_ours() and sys.excepthook is sys.__excepthook__:
    sys.excepthook = explain_failed_import


def input_errors() -> tuple[type[Exception], ...]:
    """What is raised where a user's input, folder or disk is at fault."""
    from huggingface_hub.errors import StrictDataclassError

    return OSError, ValueError, StrictDataclassError, subprocess.CalledProcessError


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End a command with one line and status 2 where a user's input, folder or disk is at fault, or a package is missing.

    `LATENTVLM_TRACEBACK=1` shows where it was raised.
    """
    try:
        yield
    except ImportError as error:
        text = say_how_to_install(error.name)
        if text is None or os.environ.get("LATENTVLM_TRACEBACK"):
            raise
        end_with(text)
    except input_errors() as error:
        if os.environ.get("LATENTVLM_TRACEBACK"):
            raise
        end_with(str(error))


def end_with(text: str) -> None:
    """Print one line on stderr and exit with status 2."""
    text = text.encode(errors="backslashreplace").decode()  # a lone surrogate could not be printed
    print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    sys.exit(2)
