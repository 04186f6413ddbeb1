"""LaRe's processor: chat templates of language models that learn images, and pictures of the tower's size."""

import pytest
import torch
from conftest import build_tokenizer, encode, picture, user_turn
from PIL import Image
from transformers import AutoProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from processing_latentvlm import LaReProcessor
from processing_latentvlm.processing_lare import BOT, EOT, IMAGE, REFOCUS_TOKENS, extend_chat_template


pytestmark = pytest.mark.core

# As language models have them: content is a string, and more than roles and contents is looked at.
QWEN_TEMPLATE = (
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA_TEMPLATE = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\\n\\n' }}{% endif %}"
)
TEMPLATES = {"qwen": QWEN_TEMPLATE, "llama": LLAMA_TEMPLATE}


def exact(size: int = 56) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"height": size, "width": size}, do_center_crop=False)


def build_processor(template: str = QWEN_TEMPLATE) -> LaReProcessor:
    tokenizer = build_tokenizer(REFOCUS_TOKENS)
    tokenizer.chat_template = template
    return LaReProcessor(exact(), tokenizer, patch_size=14, image_size=56)


@pytest.fixture(params=list(TEMPLATES))
def template(request) -> str:
    return TEMPLATES[request.param]


@pytest.fixture
def processor(template) -> LaReProcessor:
    return build_processor(template)


TEXT_ONLY = [
    {"role": "user", "content": "what is <image>, and <bot>?"},
    {"role": "assistant", "content": "a word"},
    {"role": "user", "content": "thanks"},
]


def test_text_renders_as_the_language_models_own(processor, template):
    tokenizer = build_tokenizer(REFOCUS_TOKENS)
    for prompt in (True, False):
        expected = tokenizer.apply_chat_template(
            TEXT_ONLY, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        assert processor.apply_chat_template(TEXT_ONLY, add_generation_prompt=prompt) == expected
    ids = encode(processor, [TEXT_ONLY])["input_ids"]
    assert not torch.isin(ids, torch.tensor(processor.tokenizer.convert_tokens_to_ids(list(REFOCUS_TOKENS)))).any()
    as_lists = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in TEXT_ONLY]
    assert processor.apply_chat_template(as_lists) == processor.apply_chat_template(TEXT_ONLY)


def test_an_image_becomes_a_token_per_patch(processor):
    turns = user_turn("what?", picture(30, 90), picture())
    rendered = processor.apply_chat_template(turns)
    assert f"{IMAGE}\n{IMAGE}\nwhat?" in rendered
    inputs = encode(processor, [turns])
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 2 * 16
    assert inputs["pixel_values"].shape == (2, 3, 56, 56)
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert f"{IMAGE * 16}\n{IMAGE * 16}\nwhat?" in text


def test_batches_of_unequal_rows(processor):
    conversations = [user_turn("what?", picture()), user_turn("which of the two?", picture(), picture()), TEXT_ONLY]
    inputs = encode(processor, conversations)
    assert (inputs["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [16, 32, 0]
    assert inputs["pixel_values"].shape == (3, 3, 56, 56)
    assert (inputs["attention_mask"][:, -1] == 1).all()
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}


def test_an_extended_template_is_extended_once():
    once = extend_chat_template(QWEN_TEMPLATE)
    assert extend_chat_template(once) == once and extend_chat_template(None) is None
    assert extend_chat_template({"default": QWEN_TEMPLATE}) == {"default": once}


def test_latents_of_an_earlier_answer(processor):
    turns = [
        *user_turn("what?", picture()),
        {"role": "assistant", "content": [{"type": "latent"}, {"type": "text", "text": "red"}]},
    ]
    assert f"{BOT}{EOT}red" in processor.apply_chat_template(turns)
    with pytest.raises(ValueError, match="user message holds .*reserved"):
        encode(processor, [user_turn(f"{BOT}{EOT}")])
    with pytest.raises(ValueError, match="user message holds .*reserved"):
        encode(processor, [user_turn(f"see {IMAGE}")])


def test_counts_must_fit(processor):
    with pytest.raises(ValueError, match=r"\[1, 0\] image placeholders, but \[0, 1\] images.*Rows \[0, 1\]"):
        processor(text=[IMAGE, "a"], images=[[], [picture()]])
    with pytest.raises(ValueError, match=r"\[1\] image placeholders, but \[2\] images"):
        processor(text=IMAGE, images=[picture(), picture()])
    with pytest.raises(ValueError, match="no videos"):
        processor(text="a", videos=["a.mp4"])
    with pytest.raises(Exception, match="text and images, got video"):
        encode(processor, [[{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]])


def test_images_that_cannot_be_seen_raise(processor, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"images\[0\]\[0\].*broken.png'. cannot be read"):
        encode(processor, [user_turn("what?", str(broken))])
    with pytest.raises(ValueError, match="at least one pixel"):
        encode(processor, [user_turn("what?", Image.new("RGB", (0, 5)))])


@pytest.mark.parametrize(
    "image_processor, message",
    [
        (exact(70), "takes pictures of 56 x 56 pixels, but the image processor gives 70 x 70"),
        (CLIPImageProcessorPil(size={"shortest_edge": 56}, do_center_crop=False), "gives any size"),
        (CLIPImageProcessorPil(crop_size={"height": 56, "width": 28}), "gives 56 x 28"),
    ],
)
def test_a_size_that_the_tower_does_not_take(image_processor, message):
    with pytest.raises(ValueError, match=message):
        LaReProcessor(image_processor, build_tokenizer(REFOCUS_TOKENS), patch_size=14, image_size=56)


def test_a_centre_crop_is_a_size_too():
    processor = LaReProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        build_tokenizer(REFOCUS_TOKENS),
        patch_size=14,
    )
    assert processor.image_size == 56
    assert processor(text=IMAGE, images=picture(80, 60), return_tensors="pt")["input_ids"].shape == (1, 16)


def test_a_tokenizer_without_our_tokens_is_refused():
    with pytest.raises(ValueError, match="must know.*convert_lare"):
        LaReProcessor(exact(), build_tokenizer(), patch_size=14, image_size=56)


def test_saved_and_loaded(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = LaReProcessor.from_pretrained(tmp_path)
    turns = user_turn("what?", picture())
    for name, values in encode(processor, [turns]).items():
        assert torch.equal(encode(again, [turns])[name], values), name
    assert again.chat_template == processor.chat_template
    assert (tmp_path / "processing_lare.py").is_file() and (tmp_path / "latent_messages.py").is_file()
    assert type(AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)).__name__ == "LaReProcessor"
