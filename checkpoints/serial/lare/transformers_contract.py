"""What this code relies on in other libraries, compared with what is installed, once, when the code is imported.

A checkpoint carries its code for years and meets whatever its users have installed. An override that nobody calls any
more, or a keyword that somebody's `**kwargs` swallows, gives wrong answers without an error. So every private,
overridden or wrapped thing is declared (`transformers_uses.py`) with the parameters and attributes that the code relies
on, and a difference is an `ImportError` that says what differs, what is installed and how to mend it.

Nothing but the standard library and `transformers.__version__` is imported here, so that this file works when others fail.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from inspect import Parameter, signature, unwrap
from types import CodeType
from typing import Any

import transformers
from packaging.version import Version


OLDEST, FIRST_UNTESTED = (
    Version("5.17"),
    Version("5.25"),
)  # every minor version from the first to below the second works
INSTALL = f'pip install "transformers>={OLDEST},<{FIRST_UNTESTED}"'
REFRESH = "python -m conversion.refresh_code CHECKPOINT"
HIDING = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Use:
    """One class, function or object of another library that this code relies on.

    Args:
        path: `module:name`.
        parameters: names that its signature must have (a class: that of its constructor).
        hooks: by method the parameters that it must have, in this class and in every class below it that overrides it.
        attributes: names that the class must have.
        instance_attributes: names that an instance must have; the class is made without arguments.
        callers: by method the names that its code must use: hooks that are called, or found by name, from there.
        called: methods that some other method of the class must use: an override that nobody calls changes nothing.
        mentions: names that the code of this function itself must use.
    """

    path: str
    parameters: tuple[str, ...] = ()
    hooks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    attributes: tuple[str, ...] = ()
    instance_attributes: tuple[str, ...] = ()
    callers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    called: tuple[str, ...] = ()
    mentions: tuple[str, ...] = ()

    @property
    def names(self) -> set[str]:
        """Every thing that this entry declares, without its module."""
        used = {name for names in self.callers.values() for name in names}
        last = self.path.partition(":")[2].rpartition(".")[2]
        return {last, *self.hooks, *self.attributes, *self.instance_attributes, *self.called, *self.mentions, *used}

    @property
    def keywords(self) -> set[str]:
        """Every parameter that this entry declares."""
        return {*self.parameters, *(name for names in self.hooks.values() for name in names)}


def compare(use: Use) -> list[str]:
    """What is not there or not as declared, one line each."""
    module, _, names = use.path.partition(":")
    try:
        thing: Any = import_module(module)
        for name in names.split("."):
            thing = getattr(thing, name)
    except (ImportError, AttributeError) as error:
        return [f"{use.path} is gone ({error})"]
    lines = lacking_parameters(use.path, thing, use.parameters) if use.parameters else []
    for name, parameters in use.hooks.items():
        # Every class of the library that defines the method: whichever of them is called, it must know the keywords.
        bases = [base for base in thing.__mro__ if base.__module__.split(".")[0] == module.split(".")[0]]
        definitions = [vars(base)[name] for base in bases if name in vars(base)]
        if not definitions:
            lines.append(f"{use.path}.{name} is gone")
        for definition in definitions:
            lines += lacking_parameters(f"{use.path}.{name}", definition, parameters)
    lines += [f"{use.path}.{name} is gone" for name in use.attributes if not hasattr(thing, name)]
    if use.instance_attributes:
        instance = thing()
        absent = [name for name in use.instance_attributes if not hasattr(instance, name)]
        lines += [f"{use.path}().{name} is gone" for name in absent]
    for method, called in use.callers.items():
        known = names_in(getattr(thing, method, None))
        lines += [f"{use.path}.{method} no longer uses `{name}`" for name in called if name not in known]
    if use.called:
        used = {name: names_in(method) for name, method in vars(thing).items() if callable(method)}
        for name in use.called:
            if not any(name in names for method, names in used.items() if method != name):
                lines.append(f"no method of {use.path} calls `{name}`")
    known = names_in(thing) if use.mentions else set()
    lines += [f"{use.path} no longer uses `{name}`" for name in use.mentions if name not in known]
    return lines


def lacking_parameters(path: str, thing: Any, parameters: Iterable[str]) -> list[str]:
    """A line if a callable lacks parameters, or hides them behind `*args` and `**kwargs`."""
    try:
        known = signature(thing.__func__ if isinstance(thing, classmethod | staticmethod) else thing).parameters
    except (TypeError, ValueError):
        return [f"{path} hides its signature"]
    named = [name for name, parameter in known.items() if parameter.kind not in HIDING]
    absent = [name for name in parameters if name not in named]
    if not absent:
        return []
    if set(named) <= {"self", "cls"}:
        return [f"{path} hides its signature"]
    return [f"{path} has no parameter {', '.join(f'`{name}`' for name in absent)}; it has {', '.join(named)}"]


def names_in(function: Any) -> set[str]:
    """Names and string constants that a function's code uses, inner functions included."""
    code = getattr(unwrap(function), "__code__", None)
    return set() if code is None else names_of_code(code)


def names_of_code(code: CodeType) -> set[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, str):
            found.add(constant)
        elif isinstance(constant, CodeType):
            found |= names_of_code(constant)
    return found


def is_untested() -> bool:
    """Whether the installed transformers is newer than any that this code was tested with."""
    return Version(transformers.__version__).release >= FIRST_UNTESTED.release


def installed_versions(uses: Iterable[Use]) -> str:
    packages = sorted({use.path.partition(".")[0].partition(":")[0] for use in uses} | {"transformers"})
    found = []
    for package in packages:
        try:
            found.append(f"{package} {transformers.__version__ if package == 'transformers' else version(package)}")
        except PackageNotFoundError:
            found.append(f"{package}, which is not installed")
    return " and ".join(found)


def check_version() -> None:
    """Raise for a transformers that is older than the oldest that works.

    Raises:
        ImportError: naming the installed version, those that work and the command that installs one.
    """
    if Version(transformers.__version__).release < OLDEST.release:
        raise ImportError(
            f"latentvlm works with transformers {OLDEST} up to, not including, {FIRST_UNTESTED}, but {transformers.__version__} is "
            f"installed. Install one that works: {INSTALL}"
        )


@cache
def check_contract(part: str) -> None:
    """Compare what one part of the code relies on with what is installed.

    Args:
        part: a key of `transformers_uses.USES`.

    Raises:
        ImportError: something is not as declared; the message names it, the installed version, the versions that work, and
            the commands that mend it.
    """
    check_version()
    from .transformers_uses import USES  # not before the version is known to be right

    differences = [line for use in USES[part] for line in compare(use)]
    if differences:
        listed = "\n  ".join(differences)
        raise ImportError(
            f"latentvlm ({part}) relies on what the installed {installed_versions(USES[part])} does not have:\n  {listed}\n"
            f"It works with transformers {OLDEST} up to, not including, {FIRST_UNTESTED}: {INSTALL}\n"
            f"A newer latentvlm may know this version. It brings the code of a checkpoint up to date by: {REFRESH}"
        )
    if is_untested():
        warn_untested()


@cache
def warn_untested() -> None:
    warnings.warn(
        f"latentvlm was tested with transformers {OLDEST} up to, not including, {FIRST_UNTESTED}; {transformers.__version__} is "
        "installed. All that it relies on is there, and the known answers of a checkpoint are checked when it is loaded.",
        stacklevel=2,
    )
