"""README and docs say what is so: Python runs as written and prints what is shown, commands exist with their options, links resolve."""

import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from configuration_latentvlm import __version__


ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "benchmarks/README.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$(?:\n\nprints\n\n```\w*\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
OURS = ("train", "conversion", "examples", "evaluation", "benchmarks", "latentvlm", "docs")
README_BYTES = 11_000
TRAINS = "examples.finetune"  # blocks that train run in the slow tests


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[tuple[str, str | None]]:
    """(text, output or None) of the code blocks of a page in one language."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [(text, output or None) for kind, text, output in found if kind == language]


def commands(page: Path) -> list[str]:
    lines = (line for text, _ in blocks(page, "bash") for line in text.replace("\\\n", " ").splitlines())
    return [
        command for line in lines if " -m " in (command := line.partition("#")[0].strip()) and "pip" not in command
    ]


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs and GitHub make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower()) for title in titles}


PYTHON = [page for page in PAGES if blocks(page, "python")]
COMMANDS = sorted({(name_of(page), command) for page in PAGES for command in commands(page)})


def test_there_is_something_to_run():
    assert len(PYTHON) > 5 and len(COMMANDS) > 40


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= README_BYTES


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A folder that looks like a fresh checkout, and where what a page writes is thrown away."""
    for name in ("checkpoints", "docs", "train"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(page: Path, capsys, train: bool = False) -> None:
    """Run a page's Python, block after block in one namespace, and compare what is printed with what the page says.

    In float32, so that no machine's rounding decides. Blocks that train are left out unless `train` says otherwise.
    """
    namespace = {"__name__": "page"}
    for number, (text, expected) in enumerate(blocks(page, "python")):
        if TRAINS in text and not train:
            continue
        code = text.replace('dtype="auto"', 'dtype="float32"')
        exec(compile(code, f"{name_of(page)}, Python block {number}", "exec"), namespace)
        printed = capsys.readouterr().out
        assert expected is None or printed == expected


@pytest.mark.parametrize("page", PYTHON, ids=name_of)
def test_python_runs_as_written(page, checkout, capsys):
    run_python(page, capsys)


def test_the_first_block_of_the_readme_says_what_it_prints():
    assert blocks(ROOT / "README.md", "python")[0][1]


@pytest.mark.slow
def test_ten_pictures_of_ones_own(checkout, capsys):
    """The quickstart from its first to its last command, in a fresh folder: rows, fine-tuning, evaluation, report."""
    page = ROOT / "docs/quickstart.md"
    run_python(page, capsys, train=True)
    chain = [command for command in commands(page) if "data/mine" in command]
    assert len(chain) == 3
    for command in chain:
        subprocess.run([sys.executable, *command.split()[1:]], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    right = [json.loads(line)["correct"] for line in (checkout / "out/scores/results.jsonl").read_text().splitlines()]
    assert sum(right) >= 8
    assert (checkout / "out/faithfulness/faithfulness.html").stat().st_size > 10_000


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
@pytest.mark.parametrize("page, command", COMMANDS)
def test_commands_have_the_options_that_are_given(page, command):
    words = command.split()
    module = words[words.index("-m") + 1]
    if module.partition(".")[0] not in OURS:
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


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_modules_and_files_that_a_page_names_exist(page):
    """`python -m X` under its present name, and paths in code font."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    modules = [name for name in re.findall(r"-m\s+([\w.]+\w)", text) if name.partition(".")[0] in OURS]
    places = [ROOT.joinpath(*name.split(".")) for name in modules]
    missing = [
        str(place)
        for place in places
        if not place.with_suffix(".py").is_file() and not (place / "__main__.py").is_file()
    ]
    named = re.findall(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|md|yaml|yml|json|ipynb))`", text)
    missing += [
        name
        for name in named
        if not re.search(r"_echo|_X\b", name)
        and not any((folder / name).exists() for folder in (ROOT, ROOT / "modeling_latentvlm"))
        and not name.startswith(("out/", "data/"))
    ]
    assert not missing


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_links_resolve(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in slugs(file)):
            broken.append(target)
    assert not broken


def test_the_tree_names_files_that_exist():
    tree = blocks(ROOT / "docs/tree.md", "text")[0][0]
    written = {name for name in re.findall(r"[\w.-]*\w\.(?:py|md)\b", tree) if "{" not in name}
    here = {path.name for path in ROOT.rglob("*.*") if ".venv" not in str(path)}
    assert len(written) > 80 and not written - here - {"config.py"}


def test_the_citation_names_this_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_all_pages_are_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    listed = re.findall(r"- ([\w/]+\.md)$", navigation, re.MULTILINE)
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]}
    assert set(listed) == pages and len(listed) == len(set(listed))
