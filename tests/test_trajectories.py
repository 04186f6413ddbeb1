"""Trajectories: layouts, what is refused and by which name, sizes of pictures, and labels of each stage."""

import base64
import io
import json

import pytest
import torch
from conftest import picture, user_turn
from PIL import Image

from processing_latentvlm.pictures import open_picture
from processing_latentvlm.processing_deeplatent import LATENT_TOKENS
from train.data.chats import fit_grid
from train.deeplatent.collator import DeepLatentCollator, PictureSizes
from train.deeplatent.trajectories import Trajectories, picture_items, shorten


RESERVED = (*LATENT_TOKENS, "<|image_pad|>")


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def words(text: str) -> dict:
    return {"type": "text", "text": text}


def shown(image) -> dict:
    return {"type": "image", "image": image}


def answer(*content) -> dict:
    return {"role": "assistant", "content": list(content)}


def line(*content, question=("q.png",)) -> dict:
    asked = [*map(shown, question), words("what?")]
    return {"messages": [{"role": "user", "content": asked}, answer(*content)]}


GOOD = line(words("look"), shown("a.png"), words("red"))


@pytest.fixture
def write(tmp_path):
    picture(56, 84, 1).save(tmp_path / "q.png")
    picture(84, 56, 2).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(png(picture())[:200])
    (tmp_path / "text.png").write_text("no image")

    def write(*rows, name: str = "data.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return path

    return write


def content_of(sample) -> list:
    """Texts, and the sizes of pictures, by message."""
    return [
        [item["text"] if item["type"] == "text" else open_picture(item["image"]).size for item in message["content"]]
        for message in sample["messages"]
    ]


def test_paths_bytes_and_pil_images_are_one_trajectory(write, tmp_path):
    datasets = pytest.importorskip("datasets")
    (sample,) = Trajectories(write(GOOD))
    expected = [[(56, 84), "what?"], ["look", (84, 56), "red"]]
    assert content_of(sample) == expected
    assert sample["origin"].startswith("Line 1 of ") and sample["number"] == 0

    def fill(make):
        return json.loads(
            json.dumps(GOOD),
            object_hook=lambda item: item | {"image": make(item["image"])} if "image" in item else item,
        )

    stored = fill(lambda name: {"bytes": (tmp_path / name).read_bytes(), "path": None})
    rows = datasets.Dataset.from_list([stored])
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "data.parquet")
    item = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
    message = {"role": datasets.Value("string"), "content": [item]}
    decoded = rows.cast(datasets.Features({"messages": [message]}))
    decoded.save_to_disk(tmp_path / "decoded")
    digests = {Trajectories(write(GOOD)).digest}
    for path in ("saved", "data.parquet", "decoded"):
        data = Trajectories(tmp_path / path)
        assert [content_of(one) for one in data] == [expected], path
        if path != "decoded":  # the pixels of a picture, and the file it came from, are not the same bytes
            digests.add(data.digest)
    assert len(digests) == 1


def test_the_digest_follows_texts_pictures_and_order(write, tmp_path):
    other = line(words("look"), shown("a.png"), words("blue"))
    digests = [Trajectories(write(*rows)).digest for rows in ([GOOD], [other], [GOOD, other], [other, GOOD])]
    assert len(set(digests)) == 4
    picture(84, 56, 3).save(tmp_path / "a.png")
    assert Trajectories(write(GOOD)).digest not in digests


def test_a_text_alone_is_a_message(write):
    plain = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]}
    data = Trajectories(write(GOOD, plain))
    assert data[1]["messages"] == plain["messages"]


@pytest.mark.parametrize(
    "row, reason",
    [
        ("{", "Line 2 of .* is no JSON"),
        ([], "Line 2 of .*`messages` must be a list"),
        ({"messages": "hi"}, "Line 2 of .*`messages` must be a list"),
        ({"messages": ["hi"]}, "Line 2 of .*`role` must be a str"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "Line 2 of .*`role` must be one of .*'robot'"),
        ({"messages": user_turn("hi")}, "Line 2 of .*no assistant message"),
        (line(words("look"), shown("gone.png")), "Line 2 of .*gone.png does not exist"),
        (line(words("look"), shown("broken.png")), "Line 2 of .*broken.png cannot be read"),
        (line(words("look"), shown("text.png")), "Line 2 of .*text.png cannot be read"),
        (line(words("look"), shown("a.png"), question=["broken.png"]), "Line 2 of .*broken.png cannot be read"),
        (line(words("look"), shown("x" * 5000)), "Line 2 of .*xxx does not exist"),
        (line(words("look"), shown(7)), "Line 2 of .*must be a path, bytes or a PIL image, got int"),
        (line(words("look"), {"type": "sound"}), "Line 2 of .*must be text or image, got 'sound'"),
        (line(words("look"), {"type": "text"}), "Line 2 of .*`text` must be a str"),
        (line(shown("a.png")), "Line 2 of .*1 assistant images with no text around them"),
        (line(words(" \n"), shown("a.png"), shown("a.png")), "Line 2 of .*2 assistant images with no text around"),
        (line(words("")), "Line 2 of .*holds no text"),
        (line(words("look"), shown("a.png"), question=[]), "Line 2 of .*before any image of the question"),
        (line(words("look"), *[shown("a.png")] * 3), "Line 2 of .*holds 3 assistant images, but may open 2 blocks"),
        (line(words("a <|latent_end|> b")), r"Line 2 of .*reserved '<\|latent_end\|>'"),
        (line(words("a <|image_pad|> b")), r"Line 2 of .*reserved '<\|image_pad\|>'"),
    ],
)
def test_a_bad_row_is_named_or_left_out(write, row, reason, capsys):
    path = write(GOOD, row if isinstance(row, str) else json.dumps(row), GOOD)
    with pytest.raises(ValueError, match=reason):
        Trajectories(path, max_blocks=2, reserved=RESERVED)
    if row != "{":
        data = Trajectories(path, max_blocks=2, reserved=RESERVED, drop_invalid=True)
        assert [sample["origin"][:6] for sample in data] == ["Line 1", "Line 3"]
        assert [sample["number"] for sample in data] == [0, 1] and len(data.digests) == 2
        assert "1 of 3 rows" in capsys.readouterr().out


def test_data_without_assistant_images_or_without_rows_are_refused(write):
    plain = line(words("red"))
    with pytest.raises(ValueError, match="No answer in .*data.jsonl holds an image"):
        Trajectories(write(plain))
    assert len(Trajectories(write(plain), chain_of_thought="text")) == 1
    with pytest.raises(ValueError, match="holds no trajectory"):
        Trajectories(write(line(words(""))), drop_invalid=True)
    with pytest.raises(ValueError, match="`data_format` must be one of"):
        Trajectories(write(GOOD), "sharegpt")
    with pytest.raises(ValueError, match="`chain_of_thought` must be one of"):
        Trajectories(write(GOOD), chain_of_thought="silent")
    with pytest.raises(ValueError, match="must hold a list, got dict"):
        Trajectories(write(GOOD, name="data.json"))


def test_ablated_chains_of_thought(write):
    full = line(words("look"), shown("a.png"), words("closer"), shown("a.png"), words("red"))
    path = write(full)
    assert content_of(Trajectories(path, chain_of_thought="text")[0])[1] == ["look", "closer", "red"]
    assert content_of(Trajectories(path, chain_of_thought="visual")[0])[1] == [(84, 56), (84, 56), "red"]
    assert content_of(Trajectories(path, chain_of_thought="none")[0])[1] == ["red"]
    with pytest.raises(ValueError, match="Line 1 of .*no text around"):
        Trajectories(write(line(shown("a.png"))), chain_of_thought="visual")
    asked = full["messages"][0]
    assert shorten(asked, "text") == asked and shorten(asked, "visual") == asked


def test_zebra_cot(write, tmp_path):
    datasets = pytest.importorskip("datasets")
    row = {
        "Question": "Where? <image_start>[problem_image_1]<image_end> Say it.",
        "Text Reasoning Trace": "THOUGHT 0: I look.\n<image_start>[reasoning_image_1]<image_end>\nTHOUGHT 1: Left.",
        "Final Answer": " left ",
        "problem_image_1": {"bytes": png(picture(56, 84, 1)), "path": None},
        "problem_image_2": {"bytes": png(picture(28, 28, 1)), "path": None},
        "reasoning_image_1": {"bytes": png(picture(84, 56, 2)), "path": None},
        "reasoning_image_2": None,
    }
    features = {
        name: datasets.Value("string") if isinstance(value, str) else datasets.Image() for name, value in row.items()
    }
    rows = datasets.Dataset.from_list([row], features=datasets.Features(features))
    rows.to_parquet(tmp_path / "zebra.parquet")
    (sample,) = Trajectories(tmp_path / "zebra.parquet", "zebra_cot")
    asked = [(28, 28), "Where? ", (56, 84), " Say it."]
    assert content_of(sample) == [asked, ["I look.\n", (84, 56), "\nLeft.", "\nThe answer is \\boxed{left}."]]
    lost = {name: value for name, value in row.items() if not isinstance(value, dict)}
    with pytest.raises(ValueError, match="Line 1 of .*names problem_image_1, which the row lacks"):
        Trajectories(write(lost), "zebra_cot")


def test_thyme(write, tmp_path):
    row = {
        "image": ["q.png", "a.png"],
        "question": "<image>\nWhat colour?",
        "response": "<think>I crop.<code>crop()</code><sandbox_output><image></sandbox_output>Red.</think><answer>red</answer>",
    }
    texts = row["response"].split("<image>")
    expected = [[(56, 84), "\nWhat colour?"], [texts[0], (84, 56), texts[1]]]
    (sample,) = Trajectories(write(row), "thyme")
    assert content_of(sample) == expected
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    coded = row | {"image": [base64.b64encode(png(noise)).decode(), "a.png"]}
    (sample,) = Trajectories(write(coded), "thyme")
    assert content_of(sample)[0] == [(64, 64), "\nWhat colour?"]
    with pytest.raises(ValueError, match="Line 1 of .*2 times `<image>`, but there are 1 images"):
        Trajectories(write(row | {"image": ["q.png"]}), "thyme")
    with pytest.raises(ValueError, match="Line 1 of .*neither a path nor base64"):
        Trajectories(write(row | {"image": ["?" * 2000, "a.png"]}), "thyme")


def test_monet(write, tmp_path):
    (tmp_path / "ReFocus").mkdir()
    row = {
        "metadata": {"sample_id": 1},
        "data": [
            {"role": "system", "content": [words("You help.")]},
            {"role": "user", "content": [shown("q.png"), words("What?")]},
            answer(
                words("I look <abs_vis_token></abs_vis_token>"),
                shown("a.png"),
                words("<observation>a red</observation> thing"),
            ),
        ],
    }
    path = write([row], name="ReFocus/train.json")
    (sample,) = Trajectories(path, "monet", image_folder=tmp_path)
    assert content_of(sample) == [["You help."], [(56, 84), "What?"], ["I look ", (84, 56), "a red thing"]]
    assert sample["origin"].startswith("Element 1 of")
    with pytest.raises(ValueError, match="Element 1 of .*q.png does not exist"):
        Trajectories(path, "monet")


def test_small_pictures_are_enlarged_to_what_the_image_processor_leaves_alone():
    assert fit_grid(28, 28, 16, least=4) == (2, 2)
    assert fit_grid(56, 28, 16, least=4) in ((2, 2), (1, 4))
    assert fit_grid(280, 28, 16, least=4) == (1, 10)
    for width, height in ((28, 280), (30, 500), (3, 3), (100, 20), (5000, 31)):
        for least in (1, 4, 9, 16):
            rows, columns = fit_grid(width, height, 8, least=least)
            assert least <= rows * columns and max(rows, columns) <= 8
            again = fit_grid(28 * columns, 28 * rows, 8, least=least)
            assert again == (rows, columns)
    with pytest.raises(ValueError, match="at most 1 x 1 merged patches cannot have 4"):
        fit_grid(28, 28, 1, least=4)


@pytest.fixture(scope="module")
def sample() -> dict:
    """Two question images, two blocks; sizes that are no multiples of a patch, and one that is too large."""
    asked = [shown(picture(60, 84, 1)), shown(picture(56, 28, 2)), words("what?")]
    content = answer(words("look"), shown(picture(300, 100, 3)), words("and"), shown(picture(50, 61, 4)), words("red"))
    return {"messages": [{"role": "user", "content": asked}, content], "origin": "Line 7", "number": 0}


def test_pictures_reach_the_teacher_at_the_size_of_their_blocks(processor, shared_model, sample):
    taught = DeepLatentCollator(processor, shared_model.config, "image")([sample])
    learned = DeepLatentCollator(processor, shared_model.config, "latent")([sample])
    assert learned["latent_grid_hw"].tolist() == [[1, 4], [2, 2]]  # within 4 x 4
    assert taught["image_grid_thw"].tolist() == [[1, 6, 4], [1, 2, 4], [1, 2, 8], [1, 4, 4]]
    assert torch.equal(learned["image_grid_thw"], taught["image_grid_thw"][:2])
    live = DeepLatentCollator(processor, shared_model.config, "latent", has_live_teacher=True)([sample])
    inputs = live["teacher_inputs"]
    assert torch.equal(inputs["input_ids"], taught["input_ids"]) and inputs["lengths"].tolist() == [4, 4]
    columns = inputs["columns"][0].nonzero().flatten()
    images = (taught["input_ids"][0] == processor.image_token_id).nonzero().flatten()
    assert torch.equal(columns, images[-8:])


def test_labels_are_the_words_and_what_opens_a_picture(processor, tokenizer, shared_model, sample):
    def learned(assistant_images: str) -> str:
        batch = DeepLatentCollator(processor, shared_model.config, assistant_images)([sample])
        labels, ids = batch["labels"][0], batch["input_ids"][0]
        kept = labels != -100
        assert torch.equal(labels[kept], ids[kept])
        return tokenizer.decode(ids[kept])

    assert learned("image") == "look<|vision_start|>and<|vision_start|>red<|im_end|>"
    assert learned("latent") == "look<|latent_start|>and<|latent_start|>red<|im_end|>"


def test_a_picture_that_the_image_processor_resizes_again_is_named(processor, shared_model, sample):
    images = processor.image_processor
    size = dict(images.size)
    try:
        images.size = {"shortest_edge": size["shortest_edge"], "longest_edge": 3 * 28 * 28}
        collator = DeepLatentCollator(processor, shared_model.config, "image")
        with pytest.raises(ValueError, match="Line 7: an assistant image of 1 x 4 merged patches was resized to"):
            collator([sample])
        images.size = {"shortest_edge": 6 * 28 * 28, "longest_edge": size["longest_edge"]}
        collator = DeepLatentCollator(processor, shared_model.config, "image")
        assert [height * width >= 6 for _, height, width in collator([sample])["image_grid_thw"][2:] // 2] == [
            True
        ] * 2
    finally:
        images.size = size


def test_a_picture_that_vanished_is_named(processor, shared_model, sample, tmp_path):
    gone = {"messages": [*user_turn("what?", str(tmp_path / "p.png")), answer(words("red"))], "origin": "Line 8"}
    with pytest.raises(ValueError, match="Line 8: the image .*p.png cannot be read"):
        DeepLatentCollator(processor, shared_model.config, "image")([sample, gone])


def test_large_questions_are_shrunk_and_answers_are_not(processor, shared_model, sample):
    batch = DeepLatentCollator(processor, shared_model.config, "image", max_question_pixels=56 * 56)([sample])
    areas = (batch["image_grid_thw"][:, 1] * batch["image_grid_thw"][:, 2]).tolist()
    assert areas[0] <= 16 < 24 and areas[1:] == [8, 16, 16]


def test_sizes_of_the_ablations(processor, model, sample):
    model.config.latent_scale, model.config.fixed_latent_grid = "fixed", [3, 2]
    fixed = DeepLatentCollator(processor, model.config, "latent", has_live_teacher=True)([sample])
    assert fixed["latent_grid_hw"].tolist() == [[3, 2], [3, 2]]
    assert fixed["teacher_inputs"]["image_grid_thw"][2:].tolist() == [[1, 6, 4], [1, 6, 4]]
    model.config.latent_scale, model.config.latent_mode = "predicted", "autoregressive"
    single = DeepLatentCollator(processor, model.config, "latent", has_live_teacher=True)([sample])
    assert single["latent_grid_hw"].tolist() == [[1, 3], [1, 3]]
    assert single["teacher_inputs"]["lengths"].tolist() == [4, 4]
    assert PictureSizes.of(model.config, processor).fixed is None


def test_procedural_tasks_are_trajectories(tmp_path):
    from train.data.tasks import write_dataset

    data = Trajectories(write_dataset("count", 3, 0, tmp_path / "tasks", image_size=112))
    assert all(picture_items(sample["messages"], "assistant") for sample in data)
