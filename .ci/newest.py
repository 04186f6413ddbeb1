"""Install the newest of every dependency that setup.cfg names, whatever its bounds say, and print what came.

    .venvs/newest/bin/python .ci/newest.py

torch is left as `.ci/install_torch.py --newest` installed it: asked for by name it may come with gigabytes of CUDA.
"""

import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent


def names(requirements: str) -> list[str]:
    return re.findall(r"^[A-Za-z0-9._-]+", requirements, re.MULTILINE)


def tell(names: list[str]) -> str:
    return ", ".join(f"{name} {version(name)}" for name in names)


def main() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    needed, extra = names(config["options"]["install_requires"]), names(config["options.extras_require"]["dev"])
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # Eager: an environment of an earlier day brings the dependencies of dependencies up to date too.
    newest = ["--upgrade", "--upgrade-strategy", "eager", f"torch=={version('torch')}"]
    subprocess.run([*pip, *newest, *(name for name in needed + extra if name != "torch")], check=True)
    subprocess.run([*pip, "--no-deps", "--editable", str(ROOT)], check=True)
    print("newest:", tell(needed), flush=True)
    print("beside them:", tell(extra), flush=True)


if __name__ == "__main__":
    main()
