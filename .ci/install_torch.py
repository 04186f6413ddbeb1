"""Install torch: a CPU build where there is no NVIDIA GPU, the default build where there is one.

    python .ci/install_torch.py             # the version that was tested, `VERSION`
    python .ci/install_torch.py --newest    # the newest one, or `VERSION` where no newer CPU build can be reached
    python .ci/install_torch.py --pin       # print the requirement that `make lock` writes into constraints.txt

The plain `torch` of PyPI for Linux pulls several gigabytes of CUDA packages, so on a CPU machine a CPU wheel is asked
for by its local version first (`torch==X+cpu`, found on any configured index or `--find-links` folder), then on PyTorch's
CPU index. A CUDA build is never installed on a CPU machine: the last resort is an error that says what to do.
"""

import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version


VERSION = "2.13.0"
CPU_INDEX = ("--only-binary=:all:", "--index-url", "https://download.pytorch.org/whl/cpu")


def pip_install(*arguments: str) -> bool:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    return subprocess.run(command).returncode == 0


def is_installed() -> bool:
    """Whether torch is here in the tested version, whichever its build."""
    try:
        return version("torch").partition("+")[0] == VERSION
    except PackageNotFoundError:
        return False


def install(newest: bool, cuda: bool) -> bool:
    if cuda:
        return pip_install("--upgrade", "torch") if newest else pip_install(f"torch=={VERSION}")
    # Without retries: where PyTorch's index cannot be reached, the tested version is all there is.
    if newest and pip_install("--retries", "0", "--upgrade", *CPU_INDEX, "torch"):
        return True
    return (
        is_installed()
        or pip_install("--only-binary=:all:", f"torch=={VERSION}+cpu")
        or pip_install(*CPU_INDEX, f"torch=={VERSION}")
    )


def main() -> None:
    if "--pin" in sys.argv:
        print(f"torch=={VERSION}")
        return
    newest = "--newest" in sys.argv
    if is_installed() and not newest:
        return
    if not install(newest, cuda=sys.platform != "linux" or shutil.which("nvidia-smi") is not None):
        sys.exit("No CPU build of torch could be installed. Install one into .venv by hand, then run make again.")


if __name__ == "__main__":
    main()
