"""Reading of reasoning data: adapters, images of every kind, `datasets`, and bad rows that are named."""

import json
from pathlib import Path

import pytest
from conftest import picture
from PIL import Image

from train.data.reasoning_data import ReasoningSample, read_reasoning, split_steps


GOOD = {"image": None, "question": "q", "rationale": ["a", "b"], "answer": "x"}


def write(folder: Path, *rows) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_steps(tmp_path):
    rows = (
        GOOD,
        GOOD | {"rationale": "First look. It is 3.5 wide! (Then) count. so be it"},
        GOOD | {"rationale": "one. Two\n\n  three \n", "more": 1},
    )
    first, second, third = read_reasoning(write(tmp_path, rows[0], "", *rows[1:]))
    origin = f"Line 1 of {tmp_path / 'data.jsonl'}"
    assert first == ReasoningSample([], "q", ["a", "b"], "x", origin)
    assert second.steps == ["First look.", "It is 3.5 wide!", "(Then) count. so be it"]
    assert second.origin.startswith("Line 3 ")  # blank lines count, as editors do
    assert third.steps == ["one. Two", "three"]


def test_m3cot(tmp_path):
    row = {
        "image": None,
        "context": "Look.",
        "question": "Which one?",
        "choices": ["cat", "dog"],
        "rationale": "It barks. So it is a dog.",
        "answer": "B",
    }
    sample, bare = read_reasoning(write(tmp_path, row, row | {"context": ""}), "m3cot")
    assert sample.question == "Look.\nWhich one?\n(A) cat\n(B) dog"
    assert bare.question == "Which one?\n(A) cat\n(B) dog"
    assert sample.steps == ["It barks.", "So it is a dog."] and sample.answer == "B"


def test_scienceqa(tmp_path):
    row = {
        "image": None,
        "hint": "A hint.",
        "question": "Which one?",
        "choices": ["cat", "dog"],
        "lecture": "Dogs bark.",
        "solution": "It barks.\nSo: a dog.",
        "answer": 1,
    }
    sample, bare = read_reasoning(write(tmp_path, row, row | {"lecture": "", "answer": 0}), "scienceqa")
    assert sample.question == "A hint.\nWhich one?\n(A) cat\n(B) dog"
    assert sample.steps == ["Dogs bark.", "It barks.", "So: a dog."] and sample.answer == "B"
    assert bare.steps == ["It barks.", "So: a dog."] and bare.answer == "A"
    with pytest.raises(ValueError, match="Line 1 .*`answer` .* 2"):
        read_reasoning(write(tmp_path, row | {"answer": 2}), "scienceqa")


def test_a_text_is_split_into_lines_or_else_sentences():
    assert split_steps(" a. B.\nc. D. ") == ["a. B.", "c. D."]
    assert split_steps('It is 1.5 m. "Yes." No? 2 more') == ["It is 1.5 m.", '"Yes." No?', "2 more"]
    assert split_steps(" \n ") == []


def test_images(tmp_path):
    (tmp_path / "images").mkdir()
    picture(56, 84, 1).save(tmp_path / "images" / "a.png")
    picture(28, 28, 2).convert("L").save(tmp_path / "b.png")
    path = write(
        tmp_path,
        GOOD,
        GOOD | {"image": "images/a.png"},
        GOOD | {"image": ["b.png", "images/a.png"]},
        GOOD | {"image": []},
    )
    samples = [sample.load_images() for sample in read_reasoning(path)]
    assert [[image.size for image in images] for images in samples] == [[], [(56, 84)], [(28, 28), (56, 84)], []]
    assert all(image.mode == "RGB" for images in samples for image in images)
    assert samples[1][0].tobytes() == picture(56, 84, 1).tobytes()


BAD_ROWS = {
    "{": "is no JSON",
    "[]": "must be an object, got list",
    json.dumps({"question": "q", "answer": "x"}): "rationale",
    json.dumps(GOOD | {"rationale": []}): "rationale",
    json.dumps(GOOD | {"rationale": " \n"}): "rationale",
    json.dumps(GOOD | {"rationale": ["a", " "]}): "rationale",
    json.dumps(GOOD | {"rationale": ["a", 1]}): "rationale",
    json.dumps(GOOD | {"rationale": 5}): "`rationale`",
    json.dumps(GOOD | {"answer": None}): "`answer`",
    json.dumps(GOOD | {"answer": " "}): "`answer`",
    json.dumps(GOOD | {"answer": 5}): "`answer`",
    json.dumps(GOOD | {"question": ""}): "`question`",
    json.dumps(GOOD | {"image": "gone.png"}): "gone.png does not exist",
    json.dumps(GOOD | {"image": ["gone.png"]}): "gone.png does not exist",
    json.dumps(GOOD | {"image": 5}): "got int",
    json.dumps(GOOD | {"image": [None]}): "got NoneType",
}


@pytest.mark.parametrize("row, message", BAD_ROWS.items())
def test_a_bad_line_is_named(tmp_path, row, message):
    for check_images in (True, False):  # whether pictures are opened already
        with pytest.raises(ValueError, match="Line 3 of .*data.jsonl.*" + message):
            read_reasoning(write(tmp_path, GOOD, "", row, GOOD), check_images=check_images)


@pytest.mark.parametrize(
    "data_format, fields",
    [("m3cot", {"choices": "ab"}), ("m3cot", {"rationale": 5}), ("scienceqa", {"solution": ["a"]})],
)
def test_a_field_of_the_wrong_kind_is_named(tmp_path, data_format, fields):
    row = GOOD | {"answer": "A", "choices": ["a", "b"], "rationale": "a", "solution": "a"}
    assert len(read_reasoning(write(tmp_path, row), data_format)) == 1
    with pytest.raises(ValueError, match=f"Line 1 .*`{next(iter(fields))}`"):
        read_reasoning(write(tmp_path, row | fields), data_format)


def test_a_line_that_is_no_utf8_is_named(tmp_path):
    path = write(tmp_path, GOOD)
    path.write_bytes(path.read_bytes() + b'\n{"question": "\xff"}\n')
    with pytest.raises(ValueError, match="Line 2 of"):
        read_reasoning(path)


def broken_image(path: Path, how: str) -> None:
    picture(200, 200, 1).save(path, format="BMP" if how == "huge" else "PNG")
    content = bytearray(path.read_bytes())
    if how == "text":
        content[:] = b"no image"
    elif how == "truncated":
        del content[len(content) // 2 :]
    elif how == "bad chunk":
        content[content.index(b"IDAT") - 4 : content.index(b"IDAT")] = b"\0\0\0\1"
    else:
        content[18:26] = (60000).to_bytes(4, "little") * 2
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["text", "truncated", "bad chunk", "huge"])
def test_an_image_that_cannot_be_read_is_named(tmp_path, how):
    broken_image(tmp_path / "p.png", how)
    path = write(tmp_path, GOOD, GOOD | {"image": "p.png"})
    with pytest.raises(ValueError, match="Line 2 of .*p.png cannot be read"):
        read_reasoning(path)
    with pytest.raises(ValueError, match="p.png cannot be read"):  # nor is it dropped
        read_reasoning(path, drop_incomplete=True)
    samples = read_reasoning(path, check_images=False)
    with pytest.raises(ValueError, match="Line 2 of .*p.png cannot be read"):
        samples[1].load_images()


def test_incomplete_rows_are_dropped_on_demand_and_told(tmp_path, capsys):
    path = write(tmp_path, GOOD, GOOD | {"rationale": []}, GOOD, GOOD | {"answer": None})
    assert [sample.origin.split()[1] for sample in read_reasoning(path, drop_incomplete=True)] == ["1", "3"]
    assert f"2 rows of {path} were left out as incomplete, the first: Line 2 of {path}." in capsys.readouterr().out
    read_reasoning(write(tmp_path, GOOD), drop_incomplete=True)
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "row, message",
    [(GOOD | {"image": "gone.png"}, "gone.png"), (GOOD | {"question": ""}, "`question`"), ("{", "JSON")],
)
def test_only_incomplete_rows_are_dropped(tmp_path, row, message):
    with pytest.raises(ValueError, match=f"Line 2 .*{message}"):
        read_reasoning(write(tmp_path, GOOD, row), drop_incomplete=True)


def test_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match="There is no data file"):
        read_reasoning(tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match="holds no sample"):
        read_reasoning(write(tmp_path, GOOD | {"answer": ""}), drop_incomplete=True)
    with pytest.raises(ValueError, match="`data_format` must be one of"):
        read_reasoning(write(tmp_path, GOOD), "json")


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return library


@pytest.fixture
def dataset(datasets):
    """Two rows, the first with two pictures."""
    features = datasets.Features(
        {
            "image": datasets.List(datasets.Image()),
            "question": datasets.Value("string"),
            "rationale": datasets.List(datasets.Value("string")),
            "answer": datasets.Value("string"),
        }
    )
    rows = [GOOD | {"image": [picture(56, 84, 1), picture(28, 56, 2)]}, GOOD | {"image": [], "question": "second"}]
    return datasets.Dataset.from_list(rows, features=features)


def check_dataset(samples: list[ReasoningSample], where: Path) -> None:
    assert [sample.origin for sample in samples] == [f"Row {number} of {where}" for number in (0, 1)]
    assert [sample.question for sample in samples] == ["q", "second"]
    assert [[image.size for image in sample.load_images()] for sample in samples] == [[(56, 84), (28, 56)], []]
    assert samples[0].load_images()[1].tobytes() == picture(28, 56, 2).tobytes()


def test_a_datasets_folder_and_parquet(dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "folder")
    check_dataset(read_reasoning(tmp_path / "folder"), tmp_path / "folder")
    dataset.to_parquet(tmp_path / "data.parquet")
    check_dataset(read_reasoning(str(tmp_path / "data.parquet")), tmp_path / "data.parquet")


def test_a_split_of_several(datasets, dataset, tmp_path):
    several = datasets.DatasetDict({"train": dataset.select([1]), "validation": dataset})
    several.save_to_disk(tmp_path / "folder")
    check_dataset(read_reasoning(tmp_path / "folder", split="validation"), tmp_path / "folder")
    assert len(read_reasoning(tmp_path / "folder")) == 1
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train', 'validation'\]"):
        read_reasoning(tmp_path / "folder", split="test")


def test_a_bad_row_of_a_dataset_is_named(datasets, tmp_path):
    broken_image(tmp_path / "p.png", "truncated")
    for row, message in (
        ({"image": {"bytes": (tmp_path / "p.png").read_bytes(), "path": None}}, "image that cannot be read"),
        ({"image": None, "answer": ""}, "`answer`"),
    ):
        rows = datasets.Dataset.from_list([GOOD, GOOD | row]).cast_column("image", datasets.Image())
        rows.save_to_disk(tmp_path / message)
        with pytest.raises(ValueError, match=f"Row 1 of .*{message}"):
            read_reasoning(tmp_path / message)


def test_pictures_in_memory():
    """What `answer_questions` and notebooks make."""
    images = [Image.new("RGBA", (30, 20)), Image.new("P", (3, 2))]
    assert [image.mode for image in ReasoningSample(images, "q", ["a"], "x", "here").load_images()] == ["RGB", "RGB"]
