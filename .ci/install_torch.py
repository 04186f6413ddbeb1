"""Install torch: a CPU build where there is no NVIDIA GPU, the default build where there is one.

The plain `torch` of PyPI for Linux pulls several gigabytes of CUDA packages, so on a CPU machine a CPU wheel is asked
for by its local version first (`torch==X+cpu`, found on any configured index or `--find-links` folder), then on PyTorch's
CPU index. A CUDA build is never installed on a CPU machine: the last resort is an error that says what to do.
"""

import shutil
import subprocess
import sys
from importlib.util import find_spec


CPU_VERSION = "2.13.0+cpu"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def pip_install(*arguments: str) -> bool:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    return subprocess.run(command).returncode == 0


def main() -> None:
    if find_spec("torch"):
        return
    if sys.platform != "linux" or shutil.which("nvidia-smi"):
        installed = pip_install("torch")
    else:
        installed = pip_install("--only-binary=:all:", f"torch=={CPU_VERSION}") or pip_install(
            "--index-url", CPU_INDEX, "torch"
        )
    if not installed:
        sys.exit("No CPU build of torch could be installed. Install one into .venv by hand, then run make again.")


if __name__ == "__main__":
    main()
