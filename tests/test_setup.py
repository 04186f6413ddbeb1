"""What the commands install is pinned within the bounds that users get, and git hides no folder of the tree."""

import os
import runpy
import subprocess
import warnings
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from transformers.utils.logging import get_logger


ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")


def requirements_of(*extras: str) -> list[Requirement]:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    named = [config["options"]["install_requires"], *(config["options.extras_require"][extra] for extra in extras)]
    return [Requirement(line) for text in named for line in text.split("\n") if line.strip()]


def pins_for(python: str) -> dict[str, Version]:
    """The versions that constraints.txt names for Linux and one Python, each `==` a single version."""
    marks = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        requirement = Requirement(text) if text else None
        if requirement and (requirement.marker is None or requirement.marker.evaluate(marks)):
            (pin,) = requirement.specifier
            assert pin.operator == "==", line
            assert canonicalize_name(requirement.name) not in pins, line
            pins[canonicalize_name(requirement.name)] = Version(pin.version)
    return pins


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_within_its_bounds(python):
    pins = pins_for(python)
    for requirement in requirements_of("dev", "demo"):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_torch_is_pinned_without_its_build():
    """`.ci/install_torch.py` picks the build; with another version, pip would put a CUDA build over it."""
    version = runpy.run_path(str(ROOT / ".ci" / "install_torch.py"))["VERSION"]
    for python in PYTHONS:
        assert str(pins_for(python)["torch"]) == version
        assert pins_for(python)["torch"].local is None


def test_what_breaks_between_minor_versions_has_an_upper_bound():
    bounded = {
        requirement.name
        for requirement in requirements_of("dev", "demo")
        if any(bound.operator == "<" for bound in requirement.specifier)
    }
    assert bounded == {"transformers", "accelerate", "peft", "trl"}


def git(*arguments: str, text: str | None = None) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, input=text, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr  # `git check-ignore` exits with 1 where nothing is ignored
    return done.stdout


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_git_hides_no_folder_of_the_tree():
    """Neither one that is there nor one that somebody may add: `data/` would hide `train/data/` too."""
    tops = {path.partition("/")[0] for path in git("ls-files").splitlines() if "/" in path}
    folders = {f"{top}/{name}/" for top in tops for name in ("data", "out", "build", "dist")}
    for top in tops:
        for folder, below, _ in os.walk(ROOT / top):
            below[:] = [name for name in below if name != "__pycache__"]
            folders.add(f"{Path(folder).relative_to(ROOT).as_posix()}/")
    assert {"train/data/", "tests/golden/vedas/"} <= folders
    # `--no-index`: a tracked file would otherwise keep its folder out of the answer.
    assert git("check-ignore", "--no-index", "--stdin", text="\n".join(sorted(folders))) == ""


@pytest.mark.core
@pytest.mark.parametrize("kind", [FutureWarning, DeprecationWarning])
def test_a_deprecation_warning_is_an_error_in_the_core(kind):
    with pytest.raises(kind):
        warnings.warn("`past_key_values` is deprecated", kind, stacklevel=1)


@pytest.fixture
def logged_deprecation() -> None:
    get_logger("transformers.modeling_utils").warning_once("`past_key_values` is deprecated")


@pytest.mark.core
@pytest.mark.parametrize("time", [1, 2])  # a second test that hears of it fails too
@pytest.mark.xfail(strict=True, raises=pytest.fail.Exception)
def test_a_logged_deprecation_fails_the_core(time, logged_deprecation):
    """The record comes from a fixture, and once a process only."""
