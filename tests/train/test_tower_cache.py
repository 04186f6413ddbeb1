"""Features of LaRe's tower that are computed once: the same losses and gradients, without reading a picture again."""

from contextlib import nullcontext

import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import AutoModel, AutoProcessor

from conversion.convert_lare import convert_lare
from train import train_lare
from train.lare.data import Conversation, LaReCollator
from train.lare.objective import LaReObjective, LatentLossArguments
from train.lare.tower_cache import encode_pictures
from train.recipes.small_clip import write_small
from train.train_lare import LaReTrainingArguments, ScriptArguments


LOSSES = {"align_loss_weight": 0.1, "image_loss_weight": 0, "text_loss_weight": 0.5}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    small = write_small(["What is it?", "red blue"] * 9, folder / "small", 64, 2, 300, image_size=56, patch_size=28)
    sizes = {"window_size": 1, "num_refocus_steps": 2, "extractor_hidden_size": 24, "extractor_num_heads": 2}
    return convert_lare(small / "vision", small / "language", folder / "lare", overrides=sizes)


@pytest.fixture
def parts(base):
    model = AutoModel.from_pretrained(base, trust_remote_code=False, dtype="float32")
    model.model.vision_tower.requires_grad_(False)
    processor = AutoProcessor.from_pretrained(base, trust_remote_code=False)
    torch.manual_seed(0)
    return (
        model,
        processor,
        LaReObjective(model, processor.image_processor, LatentLossArguments(**LOSSES), True, False),
    )


@pytest.fixture
def rows(tmp_path) -> list[Conversation]:
    """Two pictures in files, the first in two rows and equal to a third; one of two pictures; one without."""
    paths = []
    for number, color in enumerate(("red", "blue", "red")):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", (56, 56), color).save(paths[-1])
    chosen = ([paths[0]], [paths[1], paths[0]], [], [paths[2]])

    def conversation(images: list[str], number: int) -> Conversation:
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": "What is it?"}]
        answer = {"role": "assistant", "content": f"red {number}"}
        return Conversation([{"role": "user", "content": content}, answer], images, f"blue {number}", f"Row {number}")

    return [conversation(images, number) for number, images in enumerate(chosen)]


def learn(model, objective, batch: dict) -> tuple[float, dict]:
    model.zero_grad()
    loss = objective(model, **batch)["loss"]
    loss.backward()
    return loss.detach(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def test_losses_and_gradients_are_those_of_pixels_and_no_picture_is_read(parts, rows, tmp_path):
    model, processor, objective = parts
    collator = LaReCollator(processor)
    expected = learn(model, objective, collator(rows))
    keys = collator(rows)["image_keys"]
    cache = encode_pictures(model, processor.image_processor, rows, 1.0, nullcontext)
    cache.install(model)
    objective.cache = collator.cache = cache
    for path in tmp_path.glob("*.png"):
        path.unlink()
    batch = collator(rows)
    assert batch["image_numbers"].tolist() == [0, 1, 0, 2] and not batch["pixel_values"].any()
    same = batch["image_keys"][:, None] == batch["image_keys"]
    assert torch.equal(same, keys[:, None] == keys)  # rows that show the same are no negatives of each other
    loss, gradients = learn(model, objective, batch)
    assert_close(loss, expected[0], atol=1e-6, rtol=0)
    assert gradients.keys() == expected[1].keys() and "model.multi_modal_projector.linear_1.weight" in gradients
    for name, gradient in gradients.items():
        assert_close(gradient, expected[1][name], atol=1e-6, rtol=1e-4)


def test_pixels_still_go_through_the_tower(parts, rows):
    model, processor, objective = parts
    batch = LaReCollator(processor)(rows)
    expected = objective(model, **batch)["loss"]
    encode_pictures(model, processor.image_processor, rows, 1.0, nullcontext).install(model)
    assert_close(objective(model, **batch)["loss"], expected, atol=0, rtol=0)


def test_features_that_cannot_be_kept_are_refused(parts, rows):
    model, processor, _ = parts
    with pytest.raises(
        ValueError, match="The features of 3 pictures take .* GiB, but `cache_image_features` is 1e-06"
    ):
        encode_pictures(model, processor.image_processor, rows, 1e-6, nullcontext)
    with pytest.raises(ValueError, match="There is no picture"):
        encode_pictures(model, processor.image_processor, rows[2:3], 1.0, nullcontext)
    model.config.vision_config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention dropout"):
        encode_pictures(model, processor.image_processor, rows, 1.0, nullcontext)


def test_pixels_that_the_image_loss_needs_are_not_given_up(parts, rows, tmp_path):
    model, processor, objective = parts
    objective.image_reconstruction = torch.nn.Identity()
    args = ScriptArguments(stage=4, model_path="", data_path="", cache_image_features=1.0)
    training = LaReTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="set `image_loss_weight` to 0"):
        train_lare.keep_features(model, objective, LaReCollator(processor), rows, args, training)
