"""What every registered architecture declares (`latent_architecture.py`) is there and true, and nobody else asks for its name."""

import ast
import inspect
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from conftest import picture, user_turn
from transformers import AutoModel, AutoProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

import modeling_latentvlm  # noqa: F401
import processing_latentvlm  # noqa: F401
from configuration_latentvlm import ARCHITECTURES
from configuration_latentvlm.latent_architecture import UNITS, changed_fields, has_latents


ROOT = Path(__file__).resolve().parents[1]
# From transformers' registry and not from a list of ours, so that none can be left out.
REGISTERED = {
    name: config_class
    for name, config_class in CONFIG_MAPPING._extra_content.items()
    if config_class.__module__.startswith("configuration_latentvlm.")
}


@pytest.fixture(scope="module", params=sorted(REGISTERED))
def architecture(request):
    """(config, model on the meta device, processor class)."""
    config_class = REGISTERED[request.param]
    config = config_class()
    with torch.device("meta"):
        model = MODEL_MAPPING[config_class](config)
    return config, model, PROCESSOR_MAPPING[config_class]


def find_class(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def test_all_registered_architectures_are_walked():
    assert REGISTERED == ARCHITECTURES and len(REGISTERED) >= 3


def test_latents_are_counted_by_a_field_and_an_argument_that_are_there(architecture):
    config, model, _ = architecture
    assert config.latent_unit in UNITS and has_latents(config)
    fields, accepted = config.to_dict(), inspect.signature(type(model).generate).parameters
    assert type(fields[config.latent_count_field]) is int and config.latent_count == fields[config.latent_count_field]
    given = (config.latent_count_argument, config.least_count_argument, config.latent_grid_argument)
    assert all(name in accepted for name in given if name is not None)
    for count in (0, 1):
        changed, arguments = config.limit_latents(count)
        assert count in (changed | arguments).values()
        assert changed.keys() <= fields.keys() and arguments.keys() <= accepted.keys()
        type(config)(**changed)  # which are values that the config takes
    most = config.latent_count_limit
    assert most is None or most >= config.latent_count
    if config.latent_unit == "block":
        assert config.force_latents(7)[config.least_count_argument] == 7
        assert config.latent_grid_argument is not None
    else:
        with pytest.raises(ValueError, match="for models that open blocks"):
            config.force_latents(1)


def test_tokens_are_fields_of_the_config(architecture):
    config, _, processor_class = architecture
    names, fields = config.latent_token_fields, config.to_dict()
    ids = [fields[name] for name in names]
    assert names and len(set(ids)) == len(ids)
    assert set(config.marker_ids) <= set(ids) and len(config.marker_ids) in (0, 2)
    assert set(config.step_tokens()) <= set(ids)
    assert config.unused_token_id not in ids
    assert len(processor_class.latent_tokens) >= len(names)
    if config.latent_unit == "block":
        assert config.opening_token_id == config.marker_ids[0] and not config.step_tokens()
    else:
        assert config.opening_token_id is None and config.step_tokens()


def test_modules_and_layers_are_those_of_the_model(architecture):
    config, model, _ = architecture
    weights = list(model.state_dict())
    parts = {part for name in weights for part in name.split(".")}
    assert config.latent_modules and set(config.latent_modules) <= parts
    assert config.frozen_modules and set(config.frozen_modules) <= parts
    assert not any(config.is_new_weight(name) and config.is_frozen_weight(name) for name in weights)
    present = {type(module).__name__ for module in model.modules()}
    assert type(model.get_decoder().layers[0]).__name__ in model._no_split_modules <= present
    sources = Path(transformers.__file__).parent.joinpath("models").glob("*/modeling_*.py")
    texts = [path.read_text() for path in (*sources, *(ROOT / "modeling_latentvlm").glob("*.py"))]
    for name in set(type(model)._no_split_modules) - present:  # of another backbone, or misspelled
        assert any(f"class {name}(" in text for text in texts), name


def test_classes_and_commands_are_found(architecture):
    config, model, processor_class = architecture
    assert set(config.hub_classes) >= {"AutoConfig", "AutoProcessor", "AutoModel"}
    assert find_class(config.hub_classes["AutoConfig"]) is type(config)
    assert find_class(config.hub_classes["AutoModel"]) is type(model)
    assert find_class(config.hub_classes["AutoProcessor"]) is processor_class
    assert find_spec(config.training_command) is not None
    assert callable(find_class(config.chat_collator).for_model)
    assert find_spec(processor_class.converter) is not None
    numbers = processor_class.numbers_of(config)
    assert set(numbers) == set(processor_class.model_numbers)
    assert set(numbers) <= set(inspect.signature(processor_class.__init__).parameters)


@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_the_declared_count_is_what_generate_takes(name):
    folder = ROOT / "checkpoints" / name
    if not folder.is_dir():
        pytest.skip("ships no checkpoint")
    model, processor = AutoModel.from_pretrained(folder, dtype=torch.float32), AutoProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        user_turn("What is the color of the disk?", picture(112, 112)),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    settings = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True}
    for count in (0, 1, 2):
        fields, arguments = model.config.limit_latents(count)
        if model.config.least_count_argument is not None:
            arguments[model.config.least_count_argument] = count
        with changed_fields(model.config, **fields):
            output = model.generate(**inputs, **settings, **arguments)
        assert output.num_latent_blocks.tolist() == [count]
        assert bool(output.num_latents.any()) == (count > 0)


def test_fields_are_as_before_after_an_error():
    config = ARCHITECTURES["lare"]()
    with changed_fields(config, num_refocus_steps=7, adaptive_stop="l1"):
        assert (config.num_refocus_steps, config.adaptive_stop) == (7, "l1")
    with pytest.raises(ZeroDivisionError), changed_fields(config, num_refocus_steps=7, adaptive_stop="l1"):
        print(1 / 0)
    assert (config.num_refocus_steps, config.adaptive_stop) == (4, None)
    with pytest.raises(AttributeError), changed_fields(config, no_such_field=1):
        pass
    with (
        pytest.raises(Exception, match="num_refocus_steps"),
        changed_fields(config, stop_threshold=0.5, num_refocus_steps="x"),
    ):
        pass
    assert config.stop_threshold == 0.1


# An architecture's own files carry its name; recipes and what compares recipes train one architecture after the other.
PACKAGES = (
    "benchmarks",
    "configuration_latentvlm",
    "conversion",
    "evaluation",
    "examples",
    "modeling_latentvlm",
    "processing_latentvlm",
    "train",
)
RECIPES = re.compile(r"recipes|comparison\.py|ablations\.py|convert_|train_\w+\.py")
ALLOWED = {
    # What the code relies on in transformers, by the part that needs it: one of them an architecture each.
    "configuration_latentvlm/transformers_uses.py",
    # Of CLIP and Qwen-VL vision towers, which are none of our architectures.
    "train/recipes/vision_pretraining.py",
    "train/data/decontamination/tower.py",
}


def shared_files() -> list[Path]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    names = [path.relative_to(ROOT).as_posix() for path in files]
    own = re.compile("|".join(REGISTERED))
    return [ROOT / name for name in names if not own.search(name) and not RECIPES.search(name) and name not in ALLOWED]


def mentions_model_type(node: ast.AST) -> bool:
    return any(
        (isinstance(part, ast.Attribute) and part.attr == "model_type")
        or (isinstance(part, ast.Name) and part.id == "model_type")
        or (isinstance(part, ast.Constant) and part.value == "model_type")
        for part in ast.walk(node)
    )


def asks_for_an_architecture(node: ast.AST) -> bool:
    """A comparison of `model_type` with names, a look-up by it, or an architecture's name as a string."""
    if isinstance(node, ast.Constant):
        return node.value in REGISTERED
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        # Two model types may be compared with each other, whatever they are.
        return any(map(mentions_model_type, sides)) and not all(map(mentions_model_type, sides))
    if isinstance(node, ast.Subscript):
        return mentions_model_type(node.slice) and not isinstance(node.slice, ast.Constant)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get" and node.args:
        return mentions_model_type(node.args[0]) and not isinstance(node.args[0], ast.Constant)
    return False


def find_questions(source: str) -> list[int]:
    return [node.lineno for node in ast.walk(ast.parse(source)) if asks_for_an_architecture(node)]


def test_no_other_file_asks_for_an_architecture_by_name():
    files = shared_files()
    assert len(files) > 100
    found = {path.relative_to(ROOT).as_posix(): find_questions(path.read_text(encoding="utf-8")) for path in files}
    # Converters know the model types of backbones, and code is refreshed by the name of the file it came from.
    wrong = {name: lines for name, lines in found.items() if lines and not name.startswith("conversion/")}
    assert not wrong, "declare it in `LatentArchitectureMixin` instead"


@pytest.mark.parametrize(
    "source",
    [
        "if model.config.model_type == 'echo': pass",
        "if config.model_type not in KNOWN: pass",
        "steps = STEPS[model.config.model_type]",
        "steps = STEPS.get(config.model_type)",
        "steps = {'lare': 1}",
        "step = 'block' if name == 'deeplatent' else 'step'",
    ],
)
def test_a_question_for_an_architecture_is_found(source):
    assert find_questions(source) == [1]
    assert not find_questions("'deeplatent is a word of this text'; a.model_type != b.model_type; c.get('model_type')")
