"""The processor: blocks in text, images that cannot be seen, and what it gives to the model."""

import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, build_tokenizer, encode, picture, user_turn
from PIL import Image

from processing_latentvlm import DeepLatentProcessor
from processing_latentvlm.processing_deeplatent import LATENT_END, LATENT_PAD, LATENT_START


pytestmark = pytest.mark.core


def test_latent_written_by_a_user_stays_text(processor):
    text = "what does <latent> mean, and </latent>?"
    inputs = encode(processor, [user_turn(text)])
    special = processor.tokenizer.convert_tokens_to_ids([LATENT_START, LATENT_PAD, LATENT_END])
    assert not torch.isin(inputs["input_ids"], torch.tensor(special)).any()
    assert text in processor.tokenizer.decode(inputs["input_ids"][0])
    assert "latent_grid_hw" not in inputs


def test_a_block_in_a_message_becomes_its_placeholders(processor):
    turn = {
        "role": "assistant",
        "content": [{"type": "text", "text": "a"}, {"type": "latent", "grid": [2, 3]}, {"type": "text", "text": "b"}],
    }
    inputs = encode(processor, [[*user_turn("q", picture()), turn]], add_generation_prompt=False)
    assert inputs["latent_grid_hw"].tolist() == [[2, 3]]
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert f"a{LATENT_START}{LATENT_PAD * 9}{LATENT_END}b" in text
    rendered = processor.apply_chat_template([*user_turn("q", picture()), turn])
    assert f"a{LATENT_START}2x3{LATENT_END}b" in rendered
    again = processor(text=[rendered], images=[picture()], return_tensors="pt")
    assert torch.equal(again["input_ids"], inputs["input_ids"])
    assert again["latent_grid_hw"].tolist() == [[2, 3]]


def test_autoregressive_blocks_have_no_controls(image_processor, tokenizer):
    processor = DeepLatentProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE, num_control_tokens=0)
    inputs = processor(text=f"x{LATENT_START}1x4{LATENT_END}", return_tensors="pt")
    pad = tokenizer.convert_tokens_to_ids(LATENT_PAD)
    assert int((inputs["input_ids"] == pad).sum()) == 4
    assert '"num_control_tokens": 0' in processor.to_json_string()


@pytest.mark.parametrize(
    "text", [f"a{LATENT_START}b", f"{LATENT_PAD}", f"{LATENT_START}2x{LATENT_END}", f"{LATENT_START}0x2{LATENT_END}"]
)
def test_latent_tokens_outside_a_block_raise(processor, text):
    with pytest.raises(ValueError, match="Row 1 of `text`"):
        processor(text=["fine", text])


def test_a_user_cannot_write_latent_tokens(processor):
    with pytest.raises(ValueError, match="user message holds .*reserved"):
        encode(processor, [user_turn(f"{LATENT_START}2x2{LATENT_END}")])
    with pytest.raises(ValueError, match="system message"):
        encode(processor, [[{"role": "system", "content": f"{LATENT_END}"}]])


def test_images_that_cannot_be_seen_raise(processor, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    cut = tmp_path / "cut.png"
    picture(112, 112).save(cut)
    cut.write_bytes(cut.read_bytes()[:900])
    for image, message in (
        (Image.open(cut), "cannot be read"),
        (str(broken), r"images\[0\]\[0\]. .*broken.png'. cannot be read"),
        (str(tmp_path / "missing.png"), r"missing.png'. cannot be read"),
        (Image.new("RGB", (0, 5)), r"at least one pixel.*\(0, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(processor, [user_turn("what?", image)])


def test_image_counts_must_fit(processor):
    one = "<|vision_start|><|image_pad|><|vision_end|>"
    with pytest.raises(ValueError, match=r"\[1\] image placeholders, but \[2\] images"):
        processor(text=one, images=[picture(), picture()])
    with pytest.raises(ValueError, match=r"\[1, 1\] image placeholders, but \[0\] images"):
        processor(text=[one, one])
    with pytest.raises(ValueError, match=r"\[1, 1\] image placeholders, but \[2, 0\] images"):
        processor(text=[one, one], images=[[picture(), picture()], []])


def test_paths_pictures_and_batches_are_the_same(processor, tmp_path):
    path = tmp_path / "p.png"
    picture().save(path)
    inputs = [encode(processor, [user_turn("q", image)])["pixel_values"] for image in (picture(), str(path))]
    assert torch.equal(*inputs)


def test_batches_are_padded_on_the_left(processor, conversations):
    inputs = encode(processor, conversations)
    assert (inputs["attention_mask"][:, -1] == 1).all() and (inputs["attention_mask"][2, 0] == 0)
    assert inputs["mm_token_type_ids"].sum(dim=1).tolist() == [6, 18, 0]


def test_videos_say_what_they_need(processor):
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        pytest.skip("torchvision is installed")
    with pytest.raises(ImportError, match="torchvision"):
        processor(text="<|vision_start|><|video_pad|><|vision_end|>", videos=[torch.zeros(4, 3, 28, 28)])


def test_a_tokenizer_without_latent_tokens_is_refused(image_processor):
    with pytest.raises(ValueError, match="must know"):
        DeepLatentProcessor(image_processor, build_tokenizer())


def test_decoding_answers(processor):
    ids = processor.tokenizer(f"red{LATENT_START}", return_tensors="pt")["input_ids"]
    assert processor.post_process_image_text_to_text(ids) == ["red"]
    assert processor.batch_decode(ids, skip_special_tokens=False) == [f"red{LATENT_START}"]


def test_the_model_takes_all_that_the_processor_gives(processor, batch, shared_model):
    assert set(batch) <= set(processor.model_input_names)
    assert shared_model(**batch).logits.shape[:2] == batch["input_ids"].shape


@pytest.mark.parametrize("grid", [(65, 64), (3000, 3000), (1, 10**10)])
def test_blocks_that_would_fill_the_memory_are_refused(processor, grid):
    """A row of a data file holds 40 characters, and its placeholders would take gigabytes."""
    height, width = grid
    with pytest.raises(ValueError, match=rf"A latent block of {height} x {width} in row 0 .* 4096 are the most"):
        processor(text=f"{LATENT_START}{height}x{width}{LATENT_END}")
    turn = {"role": "assistant", "content": [{"type": "latent", "grid": list(grid)}, {"type": "text", "text": "a"}]}
    with pytest.raises(ValueError, match="4096 are the most"):
        encode(processor, [[*user_turn("q"), turn]], add_generation_prompt=False)
    assert len(processor(text=f"{LATENT_START}64x64{LATENT_END}")["input_ids"][0]) == 4096 + 3 + 2


BROKEN_CHATS = [
    (5, "A conversation must be a list"),
    ([], "A conversation must be a list"),
    ([5], "Message 0 must be a dict"),
    ([{"content": "a"}], "Message 0 must be a dict with a `role`"),
    ([{"role": "user", "content": 5}], "Message 0: `content` must be a text or a list"),
    ([{"role": "user", "content": ["a"]}], "Message 0: an item of `content` must be a dict with a `type`"),
    ([{"role": "user", "content": [{"type": "text"}]}], "an item of type text needs a `text`"),
    ([{"role": "user", "content": "a\ud800"}], r"Message 0 holds '\\ud800' at character 1, half of a surrogate pair"),
    ([[{"role": "user", "content": "a"}], [{"role": "user", "content": 5}]], "Message 0 of conversation 1"),
    ([[{"role": "user", "content": "a"}], 5], "Conversation 1 must be a list of messages, got '5'"),
    ([{"role": "assistant", "content": [{"type": "latent"}]}], "`grid` of a latent item must be two whole numbers"),
    ([{"role": "assistant", "content": [{"type": "latent", "grid": [0, 2]}]}], r"got \[0, 2\]"),
    ([{"role": "assistant", "content": [{"type": "latent", "grid": [True, 2]}]}], "two whole numbers"),
    ([{"role": "assistant", "content": [{"type": "latent", "grid": "23"}]}], "got '23'"),
]


@pytest.mark.parametrize("chat, message", BROKEN_CHATS, ids=lambda value: repr(value)[:40])
def test_a_chat_that_cannot_be_rendered_is_refused(processor, chat, message):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")


def test_what_a_chat_template_refuses_is_the_callers_to_mend(image_processor, tokenizer):
    template = "{{ raise_exception('Roles must alternate.') }}"
    processor = DeepLatentProcessor(image_processor, tokenizer, chat_template=template)
    with pytest.raises(ValueError, match=r"The chat template cannot render this conversation: Roles must alternate\."):
        processor.apply_chat_template(user_turn("q"))


def test_an_array_without_a_pixel_is_refused_where_arrays_stay_as_they_are(processor):
    with pytest.raises(ValueError, match=r"`images\[1\]` must have at least one pixel, its shape is \(0, 4, 3\)"):
        processor(images=[picture(), np.zeros((0, 4, 3))], text="a", images_kwargs={"do_rescale": False})


@pytest.mark.parametrize(
    "text, message",
    [
        (5, "`text` must be a text or a list of texts, got int"),
        (["a", 5], "Row 1 of `text` must be a text, got int"),
        ([], "`text` must hold at least one text"),
        (["a", "b\ud800"], "Row 1 of `text` holds"),
    ],
)
def test_a_text_that_cannot_be_encoded_is_refused(processor, text, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text)
