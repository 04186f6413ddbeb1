"""Finds what the code overrides and which private names of other libraries it uses, for the tests of the contract."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "configuration_latentvlm",
    "modeling_latentvlm",
    "processing_latentvlm",
    "conversion",
    "train",
    "evaluation",
    "examples",
)
LIBRARIES = ("transformers", "accelerate", "peft", "trl", "huggingface_hub")
OTHER_HARNESSES = (
    "evaluation.harnesses.vlmevalkit",
    "evaluation.harnesses.lmms_eval",
)  # run inside environments of their own
SPECIAL = ("__call__", "__getitem__", "__contains__", "__post_init__")
WRITTEN_BY_PYTHON = ("_abc_impl",)
OF_ARGPARSE = {
    "_actions",
    "_option_string_actions",
}  # of Python itself, which has no public list of a parser's options
NAMED_TUPLE = {"_asdict", "_fields", "_replace", "_make"}  # public by their documentation


@cache
def source_files() -> list[Path]:
    return [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]


@cache
def trees() -> dict[Path, ast.Module]:
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in source_files()}


@cache
def own_names() -> set[str]:
    """Everything that this code itself defines: functions, classes, variables and attributes of `self`."""
    names = set()
    for tree in trees().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                names.add(node.attr)
    return names


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def private_uses() -> Iterator[tuple[str, str]]:
    """(place, name) of every private name of a library that is read, set, imported or passed as a keyword."""
    own = own_names()
    for file, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                found = [node.attr]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(LIBRARIES):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.Call):
                found = [keyword.arg for keyword in node.keywords if keyword.arg]
                if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr", "hasattr", "delattr"):
                    found += [arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)]
            else:
                continue
            for name in found:
                is_private = name.startswith("_") and not name.startswith("__")
                if is_private and name not in own | NAMED_TUPLE | OF_ARGPARSE:
                    yield f"{file.relative_to(ROOT)}:{node.lineno}", name


@cache
def own_classes() -> list[type]:
    classes = {}
    for file in source_files():
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module in OTHER_HARNESSES or module.endswith("__main__"):
            continue
        for thing in vars(importlib.import_module(module)).values():
            if inspect.isclass(thing) and thing.__module__.startswith(PACKAGES):
                classes[f"{thing.__module__}.{thing.__qualname__}"] = thing
    return list(classes.values())


def top(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def overrides() -> Iterator[tuple[type, str, object, list[type]]]:
    """(class, name, what it defines, library classes behind it) wherever a class of ours stands before a library's definition.

    The library classes are those that define the name, and those of the class's order of resolution that inherit it from them.
    """
    seen = set()
    for cls in own_classes():
        mro = cls.__mro__
        for at, base in enumerate(mro):
            if not base.__module__.startswith(PACKAGES):
                continue
            for name, value in vars(base).items():
                if (name.startswith("__") and name not in SPECIAL) or name in WRITTEN_BY_PYTHON:
                    continue
                if name.endswith("_cached_value"):  # transformers keeps on a class what it found out about it
                    continue
                libraries = [later for later in mro[at + 1 :] if top(later) in LIBRARIES]
                if any(name in vars(later) for later in libraries) and (base, name) not in seen:
                    seen.add((base, name))
                    yield base, name, value, [later for later in libraries if hasattr(later, name)]
