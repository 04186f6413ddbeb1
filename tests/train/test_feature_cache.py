"""Features that a frozen tower computes once: the same losses, no decoding, and what is refused."""

import pytest
import torch
from helpers import assert_near
from test_train_vedas import data, folder, logged, processor, state_of, tokenizer, train  # noqa: F401

from train.common import training_model
from train.common.feature_cache import encode_pictures
from train.data.reasoning_data import ReasoningSample, read_reasoning
from train.vedas.curriculum import CurriculumCollator


SETTINGS = {"freeze_vision": True, "stages": [0, 2], "epochs_per_stage": 1, "seed": 3}


@pytest.mark.parametrize("weight", [0.0, 1.0], ids=["plain", "crops"])
def test_losses_and_weights_equal_those_without(folder, data, tmp_path, monkeypatch, weight):  # noqa: F811
    """Rows with no, one and two pictures of several sizes; the crops of the crop branch still pass the tower."""
    monkeypatch.setattr(training_model, "save_trained", lambda trainer: None)
    settings = SETTINGS | {"replay_loss_weight": weight, "eval_data_path": str(data), "eval_strategy": "epoch"}
    plain = train(folder, data, tmp_path / "plain", **settings)
    opened = []
    monkeypatch.setattr(
        ReasoningSample,
        "load_image",
        lambda self, image, load=ReasoningSample.load_image: opened.append(image) or load(self, image),
    )
    kept = train(folder, data, tmp_path / "kept", cache_image_features=0.01, **settings)
    # Checked twice (both files), encoded once. Batches decode nothing, but for the crops.
    assert len(opened) == 3 * 6 or weight
    for name in ("loss", "eval_loss", "eval_answer_accuracy"):
        assert logged(kept, name) == pytest.approx(logged(plain, name), abs=1e-6), name
    expected = state_of(plain)
    for name, value in state_of(kept).items():
        assert_near(value, expected[name], 1e-5)


def test_batches_are_the_same_but_for_pixels(folder, data, processor):  # noqa: F811
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model.model.visual.requires_grad_(False)
    samples = read_reasoning(data)
    cache = encode_pictures(model, processor, samples, 0.01, torch.enable_grad)
    plain, numbered = (CurriculumCollator(processor, 2, keep_images=False, features=one) for one in (None, cache))
    for collator in (plain, numbered):
        collator.stage = 1
    expected, actual = plain(samples), numbered(samples)
    assert expected.keys() == actual.keys()
    for name in expected.keys() - {"pixel_values"}:
        assert torch.equal(expected[name], actual[name]), name
    assert len(actual["pixel_values"]) == len(expected["pixel_values"]) and actual["pixel_values"].shape[1] == 1
    before = model(**expected).logits
    cache.install(model)
    assert_near(model(**actual).logits, before)
    assert_near(model(**expected).logits, before)  # pixels still pass the tower
    swapped = torch.tensor([4, 1, 2, 3, 0, 5])[actual["pixel_values"]]  # two pictures of one size
    other = actual | {"pixel_values": swapped}
    assert (model(**other).logits - before).abs().max() > 1e-3
    assert "pixel_values" not in numbered([one for one in samples if not one.images])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"freeze_vision": False}, "frozen vision tower only: add `--freeze_vision`"),
        ({"cache_image_features": 1e-9}, "take .* GiB, but `cache_image_features` is 1e-09"),
    ],
)
def test_what_is_refused(folder, data, tmp_path, settings, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        train(folder, data, tmp_path, **(SETTINGS | {"cache_image_features": 0.1} | settings))


def test_a_tower_that_drops_attention_is_refused(folder, data, processor):  # noqa: F811
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model.requires_grad_(False)
    model.config.vision_config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention dropout"):
        encode_pictures(model, processor, read_reasoning(data), 1.0, torch.enable_grad)
