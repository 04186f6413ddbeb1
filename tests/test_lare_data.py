"""LaRe's training data: what is read, what is refused by name, and the tokens and labels of a batch."""

import json
import shutil

import pytest
import torch
from conftest import build_tokenizer, encode, picture
from PIL import Image
from test_processing_lare import LLAMA_TEMPLATE, QWEN_TEMPLATE, exact
from tokenizers import processors

from conversion.convert_lare import VICUNA_TEMPLATE
from processing_latentvlm import LaReProcessor
from processing_latentvlm.processing_lare import REFOCUS_TOKENS
from train.common.stages import answer_text
from train.data.reasoning_data import ReasoningSample
from train.lare.data import IGNORED, Conversation, LaReCollator, check_rows, from_reasoning, read_llava


PATCHES = 16  # of a picture of 56 x 56 pixels
TEMPLATES = {
    "qwen": (QWEN_TEMPLATE, None),
    "llama": (LLAMA_TEMPLATE, None),
    "llama-bos": (LLAMA_TEMPLATE, "<s>"),  # the tokenizer puts it before a text, the template does not
    "llama-3": ("{{ bos_token }}" + LLAMA_TEMPLATE, "<s>"),
    "vicuna": (VICUNA_TEMPLATE, "<s>"),
}


def build_processor(template: str, bos: str | None = None) -> LaReProcessor:
    tokenizer = build_tokenizer(REFOCUS_TOKENS)
    if bos is not None:
        tokenizer.add_special_tokens({"bos_token": bos})
        first = (bos, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[first]
        )
        assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    tokenizer.chat_template = template
    return LaReProcessor(exact(), tokenizer, patch_size=14, image_size=56)


@pytest.fixture(scope="module", params=list(TEMPLATES))
def processor(request) -> LaReProcessor:
    return build_processor(*TEMPLATES[request.param])


@pytest.fixture(scope="module")
def qwen() -> LaReProcessor:
    return build_processor(QWEN_TEMPLATE)


@pytest.fixture
def folder(tmp_path):
    picture(60, 40, 1).save(tmp_path / "one.png")
    picture(40, 60, 2).save(tmp_path / "two.png")
    shutil.copy(tmp_path / "one.png", tmp_path / "copy.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    return tmp_path


def turns(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]


ROW = {"id": 1, "image": "one.png", "conversations": turns("<image>\nwhat is it?", "a thing")}
MIDDLE = {
    "image": ["one.png", "two.png"],
    "conversations": turns("look at <image> and\nat <image>\nwhich?", "left\nit is ", "sure?\n<b>", "yes"),
}
PLAIN = {"conversations": turns("hello", " hi there", "bye", "bye")}
ROWS = [ROW, MIDDLE, PLAIN]


def write(folder, rows: list, form: str = "list"):
    path = folder / f"data.{form}"
    texts = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text(f"[{', '.join(texts)}]" if form == "list" else "\n\n".join(texts) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("form", ["list", "lines"])
def test_both_forms_of_llava_are_read(folder, form):
    one, middle, plain = read_llava(write(folder, ROWS, form))
    assert one.messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "content": "a thing"},
    ]
    assert one.images == [str(folder / "one.png")]
    assert [item.get("text", "image") for item in middle.messages[0]["content"]] == [
        "look at ",
        "image",
        " and\nat ",
        "image",
        "which?",
    ]
    assert middle.images == [str(folder / "one.png"), str(folder / "two.png")]
    assert [message["role"] for message in plain.messages] == ["user", "assistant"] * 2
    assert plain.images == []
    # What latents stand for: the first response.
    assert [row.reasoning for row in (one, middle, plain)] == ["a thing", "left\nit is ", " hi there"]


def test_a_line_ends_where_the_file_says(folder):
    """A text may hold what Unicode calls a line break; JSON does not have to escape it."""
    row = {"conversations": turns("a\u2028b\x85c", "d\u2029e")}
    (read,) = read_llava(write(folder, [row], "lines"))
    assert read.reasoning == "d\u2029e"


BAD = {
    "role": ({"conversations": [{"from": "robot", "value": "a"}]}, "a turn needs `from` out of"),
    "no role": ({"conversations": [{"value": "a"}]}, "a turn needs `from` out of"),
    "empty": ({"conversations": turns("a", " \n")}, "a `value` that is not empty"),
    "no text": ({"conversations": turns("a", 3)}, "a `value` that is not empty"),
    "turn": ({"conversations": ["a"]}, "a turn needs"),
    "fewer words": (ROW | {"image": ["one.png", "two.png"]}, "2 images, but 1 times <image>"),
    "more words": (ROW | {"image": None}, "0 images, but 1 times <image>"),
    "missing": (ROW | {"image": "none.png"}, "none.png does not exist"),
    "a folder": (ROW | {"image": ""}, "does not exist"),
    "no path": (ROW | {"image": 7}, "the image 7 does not exist"),
    "unreadable": (ROW | {"image": "broken.png"}, "broken.png cannot be read"),
    "nobody answers": ({"conversations": turns("a")}, "nobody answers"),
    "begins with an answer": (
        {"conversations": [{"from": "gpt", "value": "a"}, *turns("b", "c")]},
        "begins with an answer .*to no question",
    ),
    "begins with an answer behind a system prompt": (
        {"conversations": [{"from": "system", "value": "s"}, {"from": "gpt", "value": "a"}]},
        "begins with an answer",
    ),
    "no turns": ({"conversations": []}, "list of `conversations`"),
    "no conversations": ({"image": "one.png"}, "list of `conversations`"),
    "no object": ("3", "must be an object"),
}


@pytest.mark.parametrize("form, where", [("list", "Entry 1 of"), ("lines", "Line 3 of")])
@pytest.mark.parametrize("kind", list(BAD))
def test_a_bad_row_is_named(folder, form, where, kind):
    row, message = BAD[kind]
    with pytest.raises(ValueError, match=f"{where} .*data.{form}.*{message}"):
        read_llava(write(folder, [PLAIN, row, PLAIN], form))


def test_bad_rows_are_left_out_where_the_user_says_so(folder, capsys):
    rows = [PLAIN, BAD["unreadable"][0], ROW, BAD["empty"][0]]
    assert len(read_llava(write(folder, rows), drop_incomplete=True)) == 2
    said = capsys.readouterr().out
    assert "2 rows of" in said and "Entry 1 of" in said and "broken.png" in said


def test_files_that_are_no_data(folder):
    with pytest.raises(ValueError, match="There is no data file"):
        read_llava(folder / "nothing.json")
    for form, rows, message in (
        ("list", [PLAIN, "{"], "data.list is no JSON"),
        ("lines", [PLAIN, "{"], "Line 3 of .*data.lines is no JSON"),
        ("list", [], "holds no sample"),
        ("lines", [""], "holds no sample"),
    ):
        with pytest.raises(ValueError, match=message):
            read_llava(write(folder, rows, form))


def test_an_image_that_breaks_later_is_named(folder, qwen):
    data = (folder / "one.png").read_bytes()
    (folder / "cut.png").write_bytes(data)
    (conversation,) = read_llava(write(folder, [ROW | {"image": "cut.png"}]))
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="Entry 0 of .*cut.png cannot be read"):
        LaReCollator(qwen)([conversation])


def as_prompt(conversation: Conversation) -> list[dict]:
    """The first question, with its pictures, as `generate` is given it."""
    upto = next(number for number, message in enumerate(conversation.messages) if message["role"] == "assistant")
    images = iter(conversation.load_images())
    messages = []
    for message in conversation.messages[:upto]:
        content = message["content"]
        if not isinstance(content, str):
            content = [item | ({"image": next(images)} if item["type"] == "image" else {}) for item in content]
        messages.append(message | {"content": content})
    return messages


def test_prompt_has_the_tokens_of_generate(processor, folder):
    conversations = read_llava(write(folder, ROWS))
    system = [{"role": "system", "content": "be kind"}, *conversations[0].messages]
    conversations.append(Conversation(system, conversations[0].images, "r", "here"))
    collate = LaReCollator(processor)
    for conversation in conversations:
        batch, expected = collate([conversation]), encode(processor, [as_prompt(conversation)])
        length = int((batch["labels"][0] != IGNORED).int().argmax())
        assert batch["input_ids"][0, :length].tolist() == expected["input_ids"][0].tolist()
        if conversation.images:
            assert torch.equal(batch["pixel_values"], expected["pixel_values"])


def test_the_whole_row_reads_as_the_template_renders_it(processor, folder):
    collate = LaReCollator(processor)
    for conversation in read_llava(write(folder, ROWS)):
        ids = collate([conversation])["input_ids"][0].tolist()
        rendered = processor.apply_chat_template(conversation.messages, tokenize=False)
        image = processor.image_token
        text = processor.tokenizer.decode(ids).replace(image * PATCHES, image)
        bos = processor.tokenizer.bos_token
        assert text.removeprefix(bos or "") == rendered.removeprefix(bos or "")
        assert bos is None or (ids[0], ids[1:].count(ids[0])) == (processor.tokenizer.bos_token_id, 0)


ENDS = {  # what follows an answer's text, and what of it the last answer is followed by
    "qwen": ("<|im_end|>\n", ""),
    "llama": ("<|end|>", ""),
    "llama-bos": ("<|end|>", ""),
    "llama-3": ("<|end|>", ""),
    "vicuna": ("<|im_end|>", " "),  # the tokenizer's end of text
}


def test_labels_are_exactly_the_turns_of_the_assistant(processor, folder, request):
    end, before = ENDS[request.node.callspec.params["processor"]]
    is_trimmed = end == "<|end|>"
    collate, tokenizer = LaReCollator(processor), processor.tokenizer
    for conversation in read_llava(write(folder, ROWS)):
        labels = collate([conversation])["labels"][0]
        runs, learned = [], False
        for label in labels.tolist():
            if label != IGNORED:
                runs = runs if learned else [*runs, []]
                runs[-1].append(label)
            learned = label != IGNORED
        answers = [message["content"] for message in conversation.messages if message["role"] == "assistant"]
        expected = [before + (answer.strip() if is_trimmed else answer) + end for answer in answers]
        assert [tokenizer.decode(run) for run in runs] == expected


def test_labels_stand_on_their_tokens_and_padding_is_none(qwen, folder):
    conversations = read_llava(write(folder, ROWS))
    collate = LaReCollator(qwen)
    batch, alone = collate(conversations), [collate([one]) for one in conversations]
    lengths = [one["input_ids"].shape[1] for one in alone]
    assert len(set(lengths)) == 3 and batch["input_ids"].shape == (3, max(lengths))
    for row, (one, length) in enumerate(zip(alone, lengths)):
        for name in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(batch[name][row, :length], one[name][0])
        assert (batch["attention_mask"][row, :length] == 1).all()
        assert (batch["attention_mask"][row, length:] == 0).all()
        assert (batch["labels"][row, length:] == IGNORED).all()
        count = int(batch["reasoning_mask"][row].sum())
        assert batch["reasoning_mask"][row, :count].all()
        text = qwen.tokenizer.decode(batch["reasoning_ids"][row, :count])
        assert text == conversations[row].reasoning
    learned = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][learned], batch["input_ids"][learned])
    assert torch.equal(batch["pixel_values"], torch.cat([alone[0]["pixel_values"], alone[1]["pixel_values"]]))
    assert "pixel_values" not in alone[2]
    assert batch["reasoning_mask"].dtype == torch.bool and batch["reasoning_ids"].dtype == torch.long


def test_a_row_that_is_too_long_is_named_and_never_cut(qwen, folder):
    conversations = read_llava(write(folder, ROWS))
    length = LaReCollator(qwen)(conversations[:1])["input_ids"].shape[1]
    LaReCollator(qwen, max_length=length)(conversations[:1])
    with pytest.raises(ValueError, match=f"Entry 0 of .* has {length} tokens, but `max_length` is {length - 1}"):
        LaReCollator(qwen, max_length=length - 1)(conversations[:1])


def test_keys_are_equal_for_equal_images_and_texts(qwen, folder):
    rows = [
        ROW,
        ROW | {"image": "copy.png", "conversations": turns("<image> who?", "another")},
        ROW | {"image": "two.png", "conversations": turns("<image> who?", "a thing", "and?", "no")},
        MIDDLE,
        MIDDLE | {"image": ["two.png", "one.png"]},
    ]
    batch = LaReCollator(qwen)(read_llava(write(folder, rows)))
    images, texts = batch["image_keys"].tolist(), batch["reasoning_keys"].tolist()
    assert images[0] == images[1] and len(set(images)) == 4  # the order of images counts
    assert texts[0] == texts[2] and texts[3] == texts[4] and len(set(texts)) == 3
    assert LaReCollator(qwen)(read_llava(write(folder, rows)))["image_keys"].tolist() == images


def test_a_template_that_rewrites_what_it_rendered_is_refused(folder):
    """As templates do that drop the thinking of earlier turns."""
    template = (
        "{% for message in messages %}{% if loop.last %}[{{ message.role }}]{% endif %}{{ message.content }}"
        "{% endfor %}{% if add_generation_prompt %}|{% endif %}"
    )
    with pytest.raises(ValueError, match="Entry 0 of .*chat template changes what it rendered"):
        LaReCollator(build_processor(template))(read_llava(write(folder, [PLAIN])))


def test_reasoning_samples_answer_with_their_steps(qwen):
    sample = ReasoningSample([picture(seed=1), picture(seed=2)], "which?", ["First look.", "Then think."], "B", "here")
    assert from_reasoning(sample, is_direct=True).messages[1]["content"] == answer_text(sample.answer)
    conversation = from_reasoning(sample)
    assert conversation.messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "which?"}]},
        {"role": "assistant", "content": "First look.\nThen think.\n" + answer_text("B")},
    ]
    assert conversation.reasoning == "First look.\nThen think." and conversation.origin == "here"
    batch = LaReCollator(qwen)([conversation])
    assert int((batch["input_ids"] == qwen.image_token_id).sum()) == 2 * PATCHES
    assert all(isinstance(image, Image.Image) for image in conversation.load_images())


def test_a_batch_without_any_reasoning(qwen):
    """Such rows are masked; a batch of them still has a column, for a language model takes none of no length."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    batch = LaReCollator(qwen)([Conversation(messages, [], "", "one"), Conversation(messages, [], "", "two")])
    assert batch["reasoning_ids"].shape[1] >= 1 and batch["reasoning_ids"].dtype == torch.long
    assert not batch["reasoning_mask"].any()


def test_long_rows_are_errors_dropped_or_cut_before_anything_is_trained(folder, qwen, capsys):
    rows = [ROW, ROW | {"conversations": turns("<image>\nwhat is it?", "a thing " * 40)}, PLAIN]
    conversations = read_llava(write(folder, rows))
    lengths = [len(LaReCollator(qwen).encode(one)[0]) for one in conversations]
    most = max(lengths[0], lengths[2]) + 8
    assert lengths[1] > most
    with pytest.raises(ValueError, match=f"Entry 1 of .* has {lengths[1]} tokens, but `max_length` is {most}"):
        check_rows(conversations, LaReCollator(qwen, most))
    assert check_rows(conversations, LaReCollator(qwen, lengths[1])) == conversations
    assert capsys.readouterr().out == ""
    assert check_rows(conversations, LaReCollator(qwen, most, "drop")) == [conversations[0], conversations[2]]
    assert (
        "1 of 3 rows have more than" in (printed := capsys.readouterr().out)
        and "dropped, the first: Entry 1" in printed
    )

    collator = LaReCollator(qwen, most, "truncate")
    assert check_rows(conversations, collator) == conversations
    assert "1 of 3 rows" in (printed := capsys.readouterr().out) and "cut at their end" in printed
    ids, labels = collator.encode(conversations[1])
    whole, targets = LaReCollator(qwen).encode(conversations[1])
    assert torch.equal(ids, whole[:most]) and torch.equal(labels, targets[:most])
    assert collator(conversations)["input_ids"].shape == (3, most)
    for least in (5, lengths[0] - lengths[0] // 2):  # inside the image, or before every answer
        with pytest.raises(ValueError, match="has .* and cut there it would lose an image or every answer"):
            check_rows(conversations[:1], LaReCollator(qwen, least, "truncate"))
    late = {"image": "one.png", "conversations": turns("which?", "a thing", "<image>\nand this?", "left")}
    (late,) = read_llava(write(folder, [late]))
    first = int((LaReCollator(qwen).encode(late)[0] == qwen.image_token_id).nonzero()[0])
    for least in (first, first + 3):  # an answer stays, but not the whole image
        with pytest.raises(ValueError, match="it would lose an image"):
            check_rows([late], LaReCollator(qwen, least, "truncate"))
    with pytest.raises(ValueError, match="All 1 rows have more tokens"):
        check_rows(conversations[:1], LaReCollator(qwen, 5, "drop"))


def test_settings_of_long_rows(qwen):
    for given, message in (
        ((None, "drop"), "'drop' needs a `max_length`"),
        ((5, "cut"), "must be one of"),
        ((0, "error"), "`max_length` must be >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            LaReCollator(qwen, *given)


def test_what_a_template_refuses_is_named_before_the_first_step(folder):
    refuses = "{% for message in messages %}{{ raise_exception('roles must alternate') }}{% endfor %}"
    conversations = read_llava(write(folder, [ROW]))
    with pytest.raises(
        ValueError, match="Entry 0 of .*template cannot render this conversation: roles must alternate"
    ):
        check_rows(conversations, LaReCollator(build_processor(refuses)))
