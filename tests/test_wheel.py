"""The built wheel alone, outside the checkout: what is in it, and that it loads, asks and saves a checkpoint."""

import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from configuration_latentvlm import __version__


pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("configuration_latentvlm", "latentvlm", "modeling_latentvlm", "processing_latentvlm")
# Runs in a folder that holds a checkpoint, a picture and nothing of the checkout.
JOURNEY = """
import sys
from importlib.util import find_spec
from pathlib import Path

folder, wheel, checkout = (Path(one).resolve() for one in sys.argv[1:])
for package in ("train", "evaluation", "conversion", "examples", "benchmarks"):
    assert find_spec(package) is None or not Path(find_spec(package).submodule_search_locations[0]).is_relative_to(checkout)

import latentvlm
from PIL import Image
from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained("lare"), AutoProcessor.from_pretrained("lare")
assert type(model) is latentvlm.LaReForCausalLM
content = [{"type": "image", "image": Image.open("example.png")}, {"type": "text", "text": "What color is the heart?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=64, return_dict_in_generate=True, output_latents=True)
answer = processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
assert answer.endswith(r"\\boxed{red}."), answer
assert len(output.latent_trace.row(0)) == model.config.num_refocus_steps
latentvlm.draw_trace(output.latent_trace, [Image.open("example.png")], "trace.png")
model.save_pretrained("saved")
processor.save_pretrained("saved")
again = AutoModel.from_pretrained("saved").generate(**inputs, max_new_tokens=64)
assert again.tolist() == output.sequences.tolist()
assert latentvlm.check_known_answers("lare").passed
for name, module in sys.modules.items():
    if name.partition(".")[0].endswith("latentvlm"):
        assert Path(module.__file__).is_relative_to(wheel), module.__file__
print("version", latentvlm.__version__)
"""
# The same checkpoint as its own code reads it, where nothing is installed.
REMOTE = """
import sys
from importlib.util import find_spec
from transformers import AutoModel

assert find_spec("modeling_latentvlm") is None and find_spec("latentvlm") is None
assert AutoModel.from_pretrained("saved", trust_remote_code=True).check_known_answers().passed
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that no build folder is left in the checkout, and none is read."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*PACKAGES, "train", "evaluation", "conversion", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "golden")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(target), "."]
    done = subprocess.run([sys.executable, "-m", *command], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel unpacked: for one without scripts or compiled code that is what pip does."""
    folder = tmp_path_factory.mktemp("installed")
    command = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder), str(wheel)]
    subprocess.run([sys.executable, "-m", *command], check=True)
    return folder


def test_what_is_in_the_wheel(wheel):
    """Every module of the four packages, and nothing else."""
    names = zipfile.ZipFile(wheel).namelist()
    info = f"latentvlm-{__version__}.dist-info"
    assert wheel.name == f"latentvlm-{__version__}-py3-none-any.whl"
    modules = {name for name in names if not name.startswith(info)}
    assert modules == {
        path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")
    }
    assert f"{info}/licenses/LICENSE" in names


def test_the_wheel_loads_asks_and_saves(installed, tmp_path):
    """In an interpreter whose path holds its dependencies and the wheel; `-S` keeps editable installs out of it."""
    shutil.copytree(ROOT / "checkpoints/lare", tmp_path / "lare")
    shutil.copy(ROOT / "docs/example.png", tmp_path)
    libraries = [*site.getsitepackages(), *(path for path in sys.path if path.endswith("site-packages"))]
    for code, first, said in ((JOURNEY, [str(installed)], f"version {__version__}"), (REMOTE, [], "")):
        path = os.pathsep.join(dict.fromkeys([*first, *libraries]))
        settings = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-S", "-c", code, str(tmp_path), str(installed), str(ROOT)]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
    assert (tmp_path / "trace.png").stat().st_size > 1000
