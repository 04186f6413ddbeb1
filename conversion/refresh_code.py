"""Bring the code of a checkpoint up to date: rewrite the flat code files and `auto_map`, and leave everything else alone.

    python -m conversion.refresh_code out/mine

For a checkpoint that an older latentvlm wrote, under a transformers that its code does not know. No modeling,
configuration or processing file is imported, so that this works where those cannot be imported.
"""

import ast
import json
import os
import re
import shutil
from collections.abc import Collection
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from conversion.commands import CommandParser, exit_on_error


ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configuration_latentvlm"
RELATIVE_IMPORT = re.compile(
    r"^\s*from \.(\w+) import", re.MULTILINE
)  # as transformers looks for the files that travel
WITH_AUTO_MAP = ("config.json", "processor_config.json", "tokenizer_config.json")


def load_hub_code():
    """`configuration_latentvlm.hub_code` without its package, whose `__init__` imports every config."""
    spec = spec_from_file_location("latentvlm_hub_code", CONFIGS / "hub_code.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_hub_classes(model_type: str) -> dict[str, str]:
    """The `hub_classes` of a config class, read off its source.

    Raises:
        ValueError: there is no such architecture here.
    """
    source = CONFIGS / f"configuration_{model_type}.py"
    known = sorted(file.stem.partition("_")[2] for file in CONFIGS.glob("configuration_*.py"))
    if model_type not in known:
        raise ValueError(f"`model_type` in config.json must be one of {known}, got {model_type!r}.")
    constants: dict[str, str] = {}
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            constants |= {target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", None) == "hub_classes":
            return {
                key.value: value.value if isinstance(value, ast.Constant) else constants[value.id]
                for key, value in zip(node.value.keys, node.value.values)
            }
    raise ValueError(f"{source} declares no `hub_classes`.")


def read_json(path: Path) -> dict:
    """Raises:
    ValueError: the file holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must hold a JSON object: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}.")
    return content


def refresh_code(folder: str | Path) -> list[str]:
    """Rewrite the code of a checkpoint folder, whole or not at all, and return the files that changed.

    Raises:
        ValueError: `folder` is no checkpoint of an architecture that is known here.
    """
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise ValueError(f"A checkpoint folder must hold a config.json, got {folder}.")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{folder} is or holds the current folder, which is replaced as a whole: run this from another folder."
        )
    hub_classes = read_hub_classes(str(read_json(folder / "config.json").get("model_type")))
    hub_code = load_hub_code()
    texts = hub_code.flat_code(hub_classes)
    obsolete = [name for name in sorted(code_in_use(folder)) if name not in texts]
    auto_map = hub_code.map_classes(hub_classes)
    for name in WITH_AUTO_MAP:
        path = folder / name
        content = read_json(path) if path.is_file() else {}
        if name == "config.json" or "auto_map" in content:
            wanted = auto_map if name == "config.json" else {"AutoProcessor": auto_map["AutoProcessor"]}
            if content.get("auto_map") != wanted:
                texts[name] = json.dumps(content | {"auto_map": wanted}, indent=2, sort_keys=True) + "\n"
    changed = [
        name
        for name, text in sorted(texts.items())
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text
    ]
    if changed or obsolete:
        replace_files(folder, {name: texts[name] for name in changed}, obsolete)
    return sorted([*changed, *obsolete])


def code_in_use(folder: Path) -> set[str]:
    """The files of code that a checkpoint's `auto_map` leads to, by relative imports; other code in the folder is its owner's."""
    maps = [read_json(folder / name).get("auto_map", {}) for name in WITH_AUTO_MAP if (folder / name).is_file()]
    classes = [one for each in maps if isinstance(each, dict) for one in each.values()]
    waiting = [f"{one.partition('.')[0]}.py" for one in classes if isinstance(one, str)]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in found and (folder / name).is_file():
            found.add(name)
            waiting += [f"{one}.py" for one in RELATIVE_IMPORT.findall((folder / name).read_text(encoding="utf-8"))]
    return found


def replace_files(folder: Path, texts: dict[str, str], left_out: Collection[str] = ()) -> None:
    """Swap the folder for one with other texts, so that no moment shows code of two versions. Weights are linked."""
    from conversion.writing import replaced_folder

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # a file system without links
            shutil.copy2(source, target)

    with replaced_folder(folder) as partial:
        shutil.copytree(
            folder.resolve(),
            partial,
            symlinks=True,
            dirs_exist_ok=True,
            copy_function=link,
            ignore=lambda path, names: [
                name for name in names if (name in texts or name in left_out) and Path(path) == folder.resolve()
            ],
        )
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")


def build_parser() -> CommandParser:
    parser = CommandParser(description=__doc__)
    parser.add_argument("checkpoint", help="folder of a checkpoint")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    with exit_on_error():
        changed = refresh_code(args.checkpoint)
    print(f"Rewrote {', '.join(changed)}." if changed else f"The code of {args.checkpoint} is up to date.")


if __name__ == "__main__":
    main()
