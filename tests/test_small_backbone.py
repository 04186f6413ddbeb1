"""A small backbone from nothing: its folder, its vision tower's lessons, and the scenes that they are about."""

import json
import shutil

import pytest
import torch
from transformers import AutoImageProcessor, Qwen2_5_VLForConditionalGeneration

from conversion.convert_vedas import convert_vedas
from train.data.small_tokenizer import texts_of, train_tokenizer
from train.data.tasks import generate_sample, write_dataset
from train.data.tasks.shapes import COLORS, DIGITS, GRID, MORE_COLORS, SHAPES
from train.recipes.small_backbone import write_backbone
from train.recipes.small_clip import write_small
from train.recipes.vision_pretraining import NAMES, CellFeatures, cell_labels, place_labels, pretrain, read_scenes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset("describe", 32, 0, tmp_path_factory.mktemp("describe"), image_size=112)


@pytest.fixture(scope="module")
def backbone(data, tmp_path_factory):
    return write_backbone(texts_of(data), tmp_path_factory.mktemp("backbone") / "model", hidden_size=64, num_layers=2)


def test_a_description_names_every_thing_in_its_cell():
    for index in range(12):
        sample = generate_sample("describe", 3, index, image_size=112)
        assert int(sample.answer) == len(sample.objects)
        said = [
            step.removeprefix(f"Row {row + 1}: ").rstrip(".").split(", ") for row, step in enumerate(sample.rationale)
        ]
        assert [len(row) for row in said] == [GRID] * GRID
        labels = cell_labels(sample.objects, 112)
        for row in range(GRID):
            for column in range(GRID):
                words = [names[int(k)] for names, k in zip(NAMES.values(), labels[row, column])]
                expected = f"{words[0]} {words[1]} {words[2]}".strip() or "nothing"
                assert said[row][column] == expected
    assert len(NAMES["color"]) == len(COLORS) + len(MORE_COLORS) + 1 and len(NAMES["shape"]) == len(SHAPES) + 1
    assert len(NAMES["digit"]) == len(DIGITS) + 1


def test_a_backbone_keeps_its_dtype(backbone, data, tmp_path):
    """SmolLM2's weights are bfloat16; the tower learns in float32."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(backbone, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(backbone).save_pretrained(tmp_path)
    before = model.model.visual.merger.mlp[0].weight.clone()
    pretrain(tmp_path, data, epochs=1, batch_size=8)
    after = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, dtype="auto")
    assert after.dtype == torch.bfloat16
    assert not torch.equal(after.model.visual.merger.mlp[0].weight, before)


def test_places_are_quadrants_and_the_middle_lines_are_none():
    assert place_labels(2).tolist() == [[1, 2], [3, 4]]  # 0 is for nothing, then QUADRANTS
    assert place_labels(4)[1:3, 1:3].tolist() == [[1, 2], [3, 4]]
    assert place_labels(3).tolist() == [[1, 0, 2], [0, 0, 0], [3, 0, 4]]


def test_the_vision_tower_learns_what_stands_in_the_cells(backbone, data):
    before = CellFeatures(backbone).model.state_dict()
    first = pretrain(backbone, data, epochs=1, batch_size=8)
    last = pretrain(backbone, data, epochs=20, batch_size=8, learning_rate=2e-3)
    assert last["color"] > first["color"] + 0.2  # chance is 1 / 8
    after = CellFeatures(backbone).model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("model.visual.") for name in moved)


@pytest.mark.parametrize("kind", ["qwen", "clip"])
def test_towers_learn_where_a_cell_lies(kind, data, tmp_path):
    tower = tmp_path / "tower"
    if kind == "qwen":
        write_backbone(texts_of(data), tower, hidden_size=64, num_layers=2)
    else:
        shutil.copytree(write_small(texts_of(data), tmp_path, 64, 2, 400) / "vision", tower)
    scores = pretrain(tower, data, epochs=20, batch_size=8)
    assert list(scores) == ["color", "shape", "digit", "place"] and scores["place"] > 0.5  # chance is 1 / 4
    assert json.loads((tower / "vision_pretraining.json").read_text()) == scores


def test_columns_can_be_told_apart(backbone):
    """M-RoPE leaves columns the slowest frequencies: neighbours have to differ in angle by what attention can see."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(backbone)
    temporal, height, width = model.config.text_config.rope_parameters["mrope_section"]
    frequencies = model.model.language_model.rotary_emb.inv_freq
    assert len(frequencies) == temporal + height + width and float(frequencies[temporal + height]) > 0.05


def test_the_folder_converts_like_a_published_one(backbone, tmp_path):
    output = convert_vedas(backbone, tmp_path / "vedas", overrides={"num_latent_steps": 2})
    assert json.loads((output / "config.json").read_text())["num_latent_steps"] == 2


@pytest.mark.parametrize("sizes", [{"hidden_size": 100}, {"num_layers": 1}])
def test_sizes_that_cannot_be(sizes, tmp_path):
    with pytest.raises(ValueError, match="hidden_size"):
        write_backbone(["text"], tmp_path / "no", **sizes)


def test_the_roles_of_a_chat_are_one_token_each(data):
    """Where they stand as words; and what they are part of keeps its letters."""
    tokenizer = train_tokenizer(texts_of(data), 400)
    header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(header)[:2] == ["<|im_start|>", "assistant"] and len(header) == 3
    assert tokenizer("user", add_special_tokens=False)["input_ids"] == [tokenizer.convert_tokens_to_ids("user")]
    for text in ("a user, an assistant", "superusers and assistants", "the user\nuser"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert "user" not in tokenizer.tokenize("superusers")


def test_a_picture_that_several_rows_ask_about_is_seen_once(tmp_path):
    questions = write_dataset("hops", 3, 0, tmp_path, image_size=112, questions="steps")
    images, labels = read_scenes(questions)
    assert len(images) == len(set(images)) == len(labels) == 3 and len(questions.read_text().splitlines()) == 12
