"""A checkpoint's processor knows the sizes of its training: it resizes to the only one, or says once what it does not know."""

import json
import logging

import pytest
import torch
from conftest import CHAT_TEMPLATE, build_tokenizer, encode, picture, user_turn
from PIL import Image
from transformers import AutoProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from processing_latentvlm import DeepLatentProcessor, VedasProcessor
from processing_latentvlm.processing_deeplatent import LATENT_TOKENS
from processing_latentvlm.processing_vedas import LATENT_TOKEN
from train.common.trained_sizes import record_image_sizes
from train.data.tasks import generate_sample
from train.recipes.shipping import CHECKPOINTS, SERIAL, read_sums, settle_image_size


CLASSES = {DeepLatentProcessor: LATENT_TOKENS, VedasProcessor: (LATENT_TOKEN,)}


@pytest.fixture(params=list(CLASSES), ids=lambda one: one.__name__)
def build(request, image_processor):
    def build(**fields):
        return request.param(
            image_processor, build_tokenizer(CLASSES[request.param]), chat_template=CHAT_TEMPLATE, **fields
        )

    return build


@pytest.fixture
def warnings():
    """What our processors warn of."""
    found, handler = [], logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("processing_latentvlm.processing_qwen")
    logger.addHandler(handler)
    yield lambda: found
    logger.removeHandler(handler)


def ask(processor, *images: Image.Image):
    return encode(processor, [user_turn("what?", *images)])


def test_any_picture_is_resized_as_in_training(build):
    processor = build(image_size=112)
    for size in ((224, 224), (112, 112), (300, 57)):
        image = picture(*size)
        expected = ask(build(), image.resize((112, 112), Image.Resampling.BICUBIC))
        inputs = ask(processor, image)
        assert inputs["image_grid_thw"].tolist() == [[1, 8, 8]]
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
        assert torch.equal(inputs["input_ids"], expected["input_ids"])
    as_is = processor(images=[picture(224, 224)], text=processor.image_token, resize_images=False)
    assert list(as_is["image_grid_thw"][0]) == [1, 16, 16]


def test_other_sizes_are_warned_of_once(build, warnings):
    processor = build(trained_image_sizes=[[56, 84], [112, 112]])
    ask(processor, picture(84, 56), picture(112, 112), picture(112, 84))
    assert not warnings()
    ask(processor, picture(112, 112), picture(224, 112))
    ask(processor, picture(56, 56), picture(224, 224))
    (warning,) = warnings()
    assert "112 x 224 pixels" in warning and "56 x 84 to 112 x 112" in warning
    ask(build(trained_image_sizes=[[56, 84], [112, 112]]), picture(56, 56))  # another processor: less than any
    assert "56 x 56 pixels" in warnings()[1]
    ask(build(), picture(224, 224))
    ask(build(trained_image_sizes=[[112, 112], [112, 112]], image_size=112), picture(224, 224))
    assert len(warnings()) == 2


def test_sizes_are_taken_down_as_the_model_gets_them_and_saved(build, tmp_path):
    processor = build()
    processor.add_trained_sizes([(112, 57), (100, 80)])  # (width, height); rounded to merged patches
    assert processor.trained_image_sizes == [[56, 112], [84, 112]]
    processor.add_trained_sizes([])
    processor.add_trained_sizes([(28, 168)])  # training that goes on adds to what was known
    assert processor.trained_image_sizes == [[56, 28], [168, 112]]
    processor.save_pretrained(tmp_path / "some")
    saved = json.loads((tmp_path / "some" / "processor_config.json").read_text())
    assert saved["trained_image_sizes"] == [[56, 28], [168, 112]] and saved["image_size"] is None
    again = AutoProcessor.from_pretrained(tmp_path / "some", trust_remote_code=True)
    assert again.trained_image_sizes == [[56, 28], [168, 112]]
    settle_image_size(again)
    assert again.image_size is None  # several sizes
    one = build()
    one.add_trained_sizes([(112, 112), (110, 113)])
    settle_image_size(one)
    one.save_pretrained(tmp_path / "one")
    assert AutoProcessor.from_pretrained(tmp_path / "one", trust_remote_code=True).image_size == 112
    one.add_trained_sizes([(500, 300)])  # resized to 112 in this training too
    assert one.trained_image_sizes == [[112, 112], [112, 112]]


def test_wrong_sizes_are_refused(build):
    for wrong in (100, 0, -28, "112", True, 28 * 9):
        with pytest.raises(ValueError, match="`image_size` must be a multiple of 28"):
            build(image_size=wrong)
    for wrong in (112, [112, 112], [[112], [112, 112]], [["a", 1], [2, 3]]):
        with pytest.raises(ValueError, match="`trained_image_sizes` must be"):
            build(trained_image_sizes=wrong)


def test_recording_reads_every_sample(processor):
    record_image_sizes(processor, [3, 4, 2], lambda number: [(28 * number, 56)] * number)
    assert processor.trained_image_sizes == [[56, 56], [56, 112]]
    record_image_sizes(object(), [1], lambda number: pytest.fail("LaRe's tower takes one size"))


@pytest.mark.parametrize(
    "place",
    [*sorted(read_sums(CHECKPOINTS)), *(f"{SERIAL}/{name}" for name in sorted(read_sums(CHECKPOINTS / SERIAL)))],
)
def test_shipped_checkpoints_see_a_large_picture_as_a_small_one(place):
    """Trained at 112 pixels, DeepLatent and Vedas answered garbage at 224."""
    from processing_latentvlm import LaReProcessor

    classes = {"deeplatent": DeepLatentProcessor, "lare": LaReProcessor, "vedas": VedasProcessor}
    name = place.rpartition("/")[2]
    processor = classes[name].from_pretrained(CHECKPOINTS / place)
    assert name == "lare" or processor.trained_image_sizes == [[112, 112], [112, 112]]
    small = generate_sample("search_color", 0, 0, "test", 112).image
    large = small.resize((448, 448), Image.Resampling.NEAREST)
    inputs, expected = ask(processor, large), ask(processor, small)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert processor.image_size == 112
    assert (inputs["pixel_values"] - expected["pixel_values"]).abs().mean() < 0.05


def test_the_image_processor_limits_are_known_in_both_forms(build):
    processor = build()
    assert processor.fit_size(100, 57) == (56, 112)
    limits = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 56 * 4)
    processor.image_processor = limits
    assert processor.fit_size(28, 28) == (56, 56) and processor.fit_size(448, 448) == (112, 112)


def test_steps_that_would_fill_the_memory_are_refused(image_processor):
    processor = VedasProcessor(image_processor, build_tokenizer((LATENT_TOKEN,)), chat_template=CHAT_TEMPLATE)
    assert processor.render_latent({"type": "latent", "steps": 4096}).count(LATENT_TOKEN) == 4096
    for steps in (4097, 10**10):
        with pytest.raises(ValueError, match=f"`steps` {steps} has {steps} latents; 4096 are the most"):
            processor.render_latent({"type": "latent", "steps": steps})
