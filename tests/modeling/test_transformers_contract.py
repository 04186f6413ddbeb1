"""The declared list is what the code uses, and a difference from it is an error that says how to mend it."""

import ast
import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import transformers
from library_use import ROOT, overrides, private_uses, source_files, trees
from packaging.version import Version
from transformers import TrainerCallback

from configuration_latentvlm import transformers_contract, transformers_uses
from configuration_latentvlm.transformers_api import CACHE, CACHE_NAMES, OTHER_CACHE, one_cache, take_cache
from configuration_latentvlm.transformers_contract import Use, check_contract, compare
from modeling_latentvlm.modeling_deeplatent import DeepLatentCausalLMOutputWithPast
from modeling_latentvlm.modeling_lare import LaReCausalLMOutputWithPast, LaReForCausalLM
from modeling_latentvlm.modeling_vedas import VedasCausalLMOutputWithPast
from modeling_latentvlm.trace import LatentGenerateBeamOutput, LatentGenerateOutput


pytestmark = pytest.mark.core
ENTRIES = [use for uses in transformers_uses.USES.values() for use in uses]
DECLARED = {name for use in ENTRIES for name in use.names}
BY_CLASS = defaultdict(set)  # names that are declared for a class of a library
for entry in ENTRIES:
    BY_CLASS[entry.path.rpartition(":")[2].partition(".")[0]] |= entry.names
# Class attributes that one version of a library sets on its class and another only looks for, e.g. those of a config.
METHODS = {name for entry in ENTRIES for name in entry.hooks}
LOOKED_FOR = {name for entry in ENTRIES for names in entry.callers.values() for name in names}
KEYWORDS = {name for use in ENTRIES for name in use.keywords}
# Where the names of the cache may be written out: the file that knows them, and signatures (which this test passes over).
CACHE_FILE = ROOT / "configuration_latentvlm" / "transformers_api.py"


# --- the list and the code ---


def test_every_override_is_declared():
    """For a class of the library that defines it, or for one that inherits it from there."""
    found = set()
    for cls, name, _, bases in overrides():
        if not any(name in BY_CLASS[base.__name__] for base in bases) and name not in {
            *CACHE_NAMES,
            *LOOKED_FOR - METHODS,
        }:
            found.add(f"{cls.__module__}.{cls.__qualname__}.{name} of {bases[0].__name__}")
    assert found == set()
    assert len(list(overrides())) > 60  # the search finds something


def test_every_private_name_is_declared():
    found = {(place, name) for place, name in private_uses() if name not in DECLARED | KEYWORDS}
    assert found == set()
    assert {name for _, name in private_uses()} > {"_can_checkpoint_with_cache", "_gradient_checkpointing_func"}


def test_the_names_of_the_cache_stand_in_one_file():
    """Elsewhere neither name is a string, a keyword of a call, or an attribute of an output."""
    wrong = []
    for file, tree in trees().items():
        if file == CACHE_FILE:
            continue
        documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            place = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Constant) and node.value in CACHE_NAMES and id(node) not in documentation:
                wrong.append(f"{place} string")
            if isinstance(node, ast.keyword) and node.arg in CACHE_NAMES:
                wrong.append(f"{place} keyword")
            if isinstance(node, ast.Attribute) and node.attr == "past_key_values":
                wrong.append(f"{place} attribute")
            if isinstance(node, ast.Attribute) and node.attr == "cache" and getattr(node.value, "id", "") == "output":
                wrong.append(f"{place} attribute")
    assert not wrong
    assert len(source_files()) > 100


def forwards(function, name: str) -> bool:
    """Whether a function hands all of its `**name` on: as `**name`, in a dict with it, or whole to a function of ours."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg is None:
            handed = node.value
        elif isinstance(node, ast.Dict) and None in node.keys:
            handed = node.values[node.keys.index(None)] if node.keys.count(None) == 1 else node
        elif (
            isinstance(node, ast.Call)
            and not isinstance(node.func, ast.Name)
            or isinstance(node, ast.Call)
            and node.func.id[0].isupper()
        ):
            handed = ast.Tuple([arg for arg in node.args if isinstance(arg, ast.Name)])
        else:
            continue
        if any(isinstance(one, ast.Name) and one.id == name for one in ast.walk(handed)):
            return True
    return False


def swallows(model_kwargs, **kwargs):
    return len(kwargs), kwargs.get("cache"), {"m": kwargs.pop("m", None)}, print(cache=kwargs.get("cache"))


def passes_on(model_kwargs, **kwargs):
    return dict(**kwargs)


def test_what_counts_as_passing_on():
    assert forwards(passes_on, "kwargs") and not forwards(swallows, "kwargs")


def test_no_override_swallows_an_unknown_keyword():
    swallowing = []
    for cls, name, value, _ in overrides():
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if not inspect.isfunction(function) or issubclass(cls, TrainerCallback):
            continue  # a callback is offered many objects by keyword, and takes what it needs
        parameters = inspect.signature(function).parameters.values()
        keywords = [one.name for one in parameters if one.kind == inspect.Parameter.VAR_KEYWORD]
        if any(not forwards(function, keyword) for keyword in keywords):
            swallowing.append(f"{cls.__module__}.{cls.__qualname__}.{name}")
    # The first raises whatever it is given, the second says once what it ignores.
    assert sorted(swallowing) == [
        "modeling_latentvlm.generation_common.LatentGenerationMixin.generate_batch",
        "train.common.training_model.LatentTrainer.create_model_card",
    ]


# --- both names ---


def test_a_cache_may_be_given_by_either_name_and_not_by_both():
    one, other = object(), object()
    assert one_cache(one, None) is one and one_cache(None, one) is one and one_cache(None, None) is None
    with pytest.raises(ValueError, match="two names of one argument"):
        one_cache(one, other)
    kwargs = {OTHER_CACHE: one, "other": 1}
    assert take_cache(kwargs) is one and kwargs == {"other": 1}
    with pytest.raises(ValueError, match="two names of one argument"):
        take_cache({CACHE: one, OTHER_CACHE: other})


@pytest.mark.parametrize(
    "output_class",
    [
        DeepLatentCausalLMOutputWithPast,
        LaReCausalLMOutputWithPast,
        VedasCausalLMOutputWithPast,
        LatentGenerateOutput,
        LatentGenerateBeamOutput,
    ],
)
def test_outputs_answer_to_both_names(output_class, caplog):
    cache = transformers.DynamicCache()
    required = {"sequences": torch.zeros(1, 1)} if "sequences" in output_class.__dataclass_fields__ else {}
    output = output_class(logits=torch.zeros(1), **required, **{CACHE: cache})
    for name in CACHE_NAMES:
        assert (
            getattr(output, name) is cache and output[name] is cache and output.get(name) is cache and name in output
        )
    assert list(output) == [*required, "logits", CACHE]  # once
    assert not any("deprecated" in record.message for record in caplog.records)


@pytest.mark.parametrize("hook", ["forward", "prepare_inputs_for_generation"])
def test_signatures_show_both_names(hook):
    assert set(CACHE_NAMES) < set(inspect.signature(getattr(LaReForCausalLM, hook)).parameters)


# --- comparing ---


class Parent:
    def hook(self, new_name): ...

    def calls(self):
        return self.hook(1), getattr(self, "found_by_name", None)


class Child(Parent):
    def hook(self, old_name): ...

    def hidden(self, *args, **kwargs): ...


HERE = f"{__name__}:Child"


@pytest.mark.parametrize(
    "use, message",
    [
        (Use(HERE, hooks={"hook": ("old_name",)}), "Child.hook has no parameter `old_name`; it has self, new_name"),
        (Use(HERE, hooks={"hidden": ("old_name",)}), "Child.hidden hides its signature"),
        (Use(HERE, hooks={"gone": ()}), "Child.gone is gone"),
        (Use(HERE, attributes=("gone",)), "Child.gone is gone"),
        (Use(HERE, instance_attributes=("gone",)), r"Child\(\).gone is gone"),
        (Use(HERE, callers={"calls": ("other_hook",)}), "Child.calls no longer uses `other_hook`"),
        (Use(f"{__name__}:Gone"), "Gone is gone"),
        (Use(HERE, called=("hidden",)), "no method of .*:Child calls `hidden`"),
        (Use(f"{HERE}.calls", mentions=("hidden",)), "Child.calls no longer uses `hidden`"),
        (Use("no_such_module:Thing"), "no_such_module:Thing is gone"),
    ],
)
def test_a_difference_is_named(use, message, monkeypatch):
    monkeypatch.setitem(transformers_uses.USES, "test", (use,))
    with pytest.raises(ImportError, match=message) as error:
        check_contract.__wrapped__("test")
    told = str(error.value)
    assert transformers.__version__ in told and 'pip install "transformers>=5.17,<5.25"' in told
    assert "5.17 up to, not including, 5.25" in told and "python -m conversion.refresh_code" in told


def test_what_is_as_declared_passes():
    assert compare(Use(HERE, hooks={"calls": ()}, callers={"calls": ("hook", "found_by_name")})) == []
    for part, uses in transformers_uses.USES.items():
        assert [line for use in uses for line in compare(use)] == [], part


def test_an_older_version_is_refused_and_a_newer_one_told_once(monkeypatch):
    monkeypatch.setattr(transformers_contract.transformers, "__version__", "5.16.9")
    with pytest.raises(ImportError, match=r"5\.16\.9 is installed.*pip install"):
        check_contract.__wrapped__("configuration")
    monkeypatch.setattr(transformers_contract.transformers, "__version__", "5.25.0.dev0")
    transformers_contract.warn_untested.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            check_contract.__wrapped__("configuration")
    assert len(caught) == 1 and "not including, 5.25; 5.25.0.dev0 is installed" in str(caught[0].message)
    assert transformers_contract.is_untested()
    monkeypatch.setattr(transformers_contract.transformers, "__version__", "5.24.9")
    assert not transformers_contract.is_untested()


def test_the_range_is_that_of_the_installation():
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    assert f"transformers>={transformers_contract.OLDEST},<{transformers_contract.FIRST_UNTESTED}" in text
    assert transformers_contract.OLDEST <= Version(transformers.__version__) < transformers_contract.FIRST_UNTESTED


# --- a library that changed ---


def patched_transformers(folder: Path, changes: dict[str, tuple[str, str]]) -> Path:
    """A copy of the installed transformers, by links, with one text replaced by another in some of its files."""
    source = Path(transformers.__file__).parent
    linked = {Path(name).parent for name in changes} | {parent for name in changes for parent in Path(name).parents}
    for at in sorted(linked):
        (folder / "transformers" / at).mkdir(parents=True, exist_ok=True)
        for entry in (source / at).iterdir():
            target, name = folder / "transformers" / at / entry.name, (at / entry.name).as_posix()
            if entry.name == "__pycache__" or at / entry.name in linked:
                continue
            if name in changes:
                text = entry.read_text(encoding="utf-8")
                assert changes[name][0] in text, name
                target.write_text(text.replace(*changes[name]), encoding="utf-8")
            else:
                target.symlink_to(entry)
    return folder


CACHE_ARGUMENT = (f"{CACHE}: Cache | None = None", "kv_cache: Cache | None = None")
CHANGES = {
    "a hook's parameter": (
        {"generation/utils.py": ("max_cache_length", "length_of_cache")},
        "GenerationMixin._prepare_cache_for_generation has no parameter `max_cache_length`",
    ),
    "a hook's name": (
        {"generation/utils.py": ("_update_model_kwargs_for_generation", "_update_kwargs_for_generation")},
        "GenerationMixin._update_model_kwargs_for_generation is gone",
    ),
    "who calls a hook": (
        {"configuration_utils.py": ("self.to_json_file(", "self.write_json_file(")},
        "PreTrainedConfig.save_pretrained no longer uses `to_json_file`",
    ),
    "the cache's keyword": (
        {f"models/{name}.py": CACHE_ARGUMENT for name in ("qwen2/modeling_qwen2", "qwen2_5_vl/modeling_qwen2_5_vl")},
        f"forward has no parameter `{CACHE}`",
    ),
}


@pytest.mark.parametrize(
    "name, change",
    [
        ("deeplatent", "the cache's keyword"),
        ("deeplatent", "a hook's name"),
        ("lare", "the cache's keyword"),
        ("lare", "a hook's parameter"),
        ("vedas", "the cache's keyword"),
        ("vedas", "who calls a hook"),
    ],
)
def test_a_changed_library_is_an_import_error_and_code_can_still_be_refreshed(name, change, tmp_path):
    changes, message = CHANGES[change]
    library = patched_transformers(tmp_path / "library", changes)
    folder = tmp_path / name
    shutil.copytree(ROOT / "checkpoints" / name, folder)
    code = f"from transformers import AutoModel\nAutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
    environment = os.environ | {"PYTHONPATH": str(library), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode and "ImportError" in run.stderr and message in run.stderr, run.stderr[-2000:]
    assert 'pip install "transformers>=5.17,<5.25"' in run.stderr
    (folder / f"modeling_{name}.py").write_text("raise ImportError('old')\n")
    environment["PYTHONPATH"] = f"{library}{os.pathsep}{ROOT}"
    command = [sys.executable, "-m", "conversion.refresh_code", str(folder)]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and f"modeling_{name}.py" in run.stdout, run.stderr[-2000:]
    assert json.loads((folder / "config.json").read_text())["auto_map"]["AutoModel"].startswith(f"modeling_{name}.")
