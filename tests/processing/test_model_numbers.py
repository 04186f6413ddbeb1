"""Numbers of a model stand in its config alone: the processor reads them there, and two that disagree are refused."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import picture, user_turn
from transformers import AutoConfig, AutoProcessor

from configuration_latentvlm import DeepLatentConfig, LaReConfig
from processing_latentvlm.processing_deeplatent import LATENT_END, LATENT_PAD, LATENT_START
from train.common.chat_collator import collator_for


CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
BLOCK = f"{LATENT_START}2x3{LATENT_END}"
WEIGHTS = shutil.ignore_patterns("*.safetensors", "*.py", "known_answers", "__pycache__")


def change(path: Path, **fields) -> None:
    """Set fields of a JSON file, and drop those that are None."""
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@pytest.fixture(params=["deeplatent", "lare"])
def folder(request, tmp_path):
    """A shipped checkpoint of version 0.1, which saved the numbers twice."""
    return shutil.copytree(CHECKPOINTS / request.param, tmp_path / request.param, ignore=WEIGHTS)


@pytest.fixture
def blocks(tmp_path):
    return shutil.copytree(CHECKPOINTS / "deeplatent", tmp_path / "deeplatent", ignore=WEIGHTS)


def stored(folder: Path) -> dict:
    return json.loads((folder / "processor_config.json").read_text())


def test_an_old_checkpoint_loads_and_is_saved_with_each_number_once(folder, tmp_path):
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.model_numbers and set(processor.model_numbers) <= stored(folder).keys()
    numbers = {name: getattr(processor, name) for name in processor.model_numbers}
    assert numbers == processor.numbers_of(AutoConfig.from_pretrained(folder))
    processor.save_pretrained(tmp_path / "alone")
    assert stored(tmp_path / "alone").items() >= numbers.items()
    processor.save_pretrained(folder)
    assert not set(numbers) & stored(folder).keys()
    for place in (folder, tmp_path / "alone"):
        again = AutoProcessor.from_pretrained(place)
        assert {name: getattr(again, name) for name in again.model_numbers} == numbers


def test_the_number_is_that_of_the_config(blocks):
    change(blocks / "config.json", latent_mode="autoregressive")
    change(blocks / "processor_config.json", num_control_tokens=None)
    processor = AutoProcessor.from_pretrained(blocks)
    assert processor.num_control_tokens == 0
    assert processor(text=BLOCK)["input_ids"][0].count(processor.tokenizer.convert_tokens_to_ids(LATENT_PAD)) == 6


@pytest.mark.parametrize("name", ["patch_size", "image_size"])
def test_sizes_of_pictures_are_those_of_the_tower(tmp_path, name):
    folder = shutil.copytree(CHECKPOINTS / "lare", tmp_path / "lare", ignore=WEIGHTS)
    kept = stored(folder)[name]
    change(folder / "processor_config.json", patch_size=None, image_size=None)
    processor = AutoProcessor.from_pretrained(folder)
    assert getattr(processor, name) == kept
    change(folder / "processor_config.json", **{name: kept // 2})
    with pytest.raises(ValueError, match=f"`{name}` is {kept // 2}, but the model's config says {kept}"):
        AutoProcessor.from_pretrained(folder)


def test_two_that_disagree_are_refused(blocks):
    change(blocks / "config.json", latent_mode="autoregressive")
    message = r"deeplatent the processor's `num_control_tokens` is 3, but the model's config says 0"
    with pytest.raises(ValueError, match=message):
        AutoProcessor.from_pretrained(blocks)
    AutoProcessor.from_pretrained(CHECKPOINTS / "deeplatent").save_pretrained(blocks)
    with pytest.raises(ValueError, match=message):  # saving hides no difference
        AutoProcessor.from_pretrained(blocks)
    processor = AutoProcessor.from_pretrained(CHECKPOINTS / "deeplatent")
    with pytest.raises(ValueError, match="`num_control_tokens` is 3, but the model's config says 0: they belong"):
        collator_for(processor, DeepLatentConfig(latent_mode="autoregressive"))
    with pytest.raises(ValueError, match="`patch_size` is 28, but the model's config says 14"):
        collator_for(AutoProcessor.from_pretrained(CHECKPOINTS / "lare"), LaReConfig())


def test_a_processor_that_lost_its_config_asks_for_the_number_where_it_is_needed(blocks):
    (blocks / "config.json").unlink()
    change(blocks / "processor_config.json", num_control_tokens=None)
    processor = AutoProcessor.from_pretrained(blocks)
    assert processor(text="words")["input_ids"]
    with pytest.raises(ValueError, match="`num_control_tokens` is not known: .* without its model's config.json"):
        processor(text=BLOCK)
    processor.check_model(DeepLatentConfig())
    assert processor.num_control_tokens == 3
    assert AutoProcessor.from_pretrained(blocks, num_control_tokens=0).num_control_tokens == 0


def test_a_tower_that_lost_its_config_asks_for_its_patches(tmp_path):
    folder = shutil.copytree(CHECKPOINTS / "lare", tmp_path / "lare", ignore=WEIGHTS)
    (folder / "config.json").unlink()
    change(folder / "processor_config.json", patch_size=None)
    processor = AutoProcessor.from_pretrained(folder)
    with pytest.raises(ValueError, match="`patch_size` is not known"):
        processor.apply_chat_template(user_turn("what?", picture(56, 56)), tokenize=True, return_dict=True)


def test_a_broken_config_is_named(blocks):
    (blocks / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object, got a list"):
        AutoProcessor.from_pretrained(blocks)
