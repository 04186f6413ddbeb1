"""Decontamination: what goes and why, kills and resumption, bad input, memory."""

import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import shake
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from train.data.decontamination.arguments import DecontaminationArguments
from train.data.decontamination.comparison import find_nearest
from train.data.decontamination.journal import Journal
from train.data.decontamination.samples import digest_pair, normalize_text, read_samples
from train.data.decontamination.tower import ImageEmbedder
from train.decontaminate import decontaminate, main


ROOT = Path(__file__).parent.parent
PHOTOS = ROOT / "train" / "data" / "photos"
SIZE = 56  # pixels
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": 14,
}
TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
# With the random tower of these tests a photo's copies have at least 0.9999, other photos at most 0.996.
THRESHOLD = 0.999
KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}]
import torch
torch.set_num_threads(1)
from pathlib import Path
from train import decontaminate
from importlib import import_module
module = import_module({module!r})

calls, method = 0, module.{method}
def kill(*args, **kwargs):
    global calls
    calls += 1
    result = method(*args, **kwargs)
    if calls == {nth}:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
module.{method} = kill
sys.argv = ["decontaminate", *{arguments!r}]
decontaminate.main()
"""


def save_tower(folder: Path, model: torch.nn.Module) -> Path:
    shake(model).save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    return save_tower(tmp_path_factory.mktemp("tower"), CLIPVisionModel(CLIPVisionConfig(**TOWER)))


def photo(name: str) -> Image.Image:
    return Image.open(PHOTOS / f"{name}.jpg").convert("RGB")


def reencoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60)
    return buffer.getvalue()


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def ask(number: int, image: str | None = None) -> dict:
    return {"question": f"Question {number}?", "answer": f"answer {number}"} | ({"image": image} if image else {})


@pytest.fixture
def data(tmp_path) -> Path:
    """Three test photos; twelve training samples, of which lines 2, 4, 7, 9 and 11 must go."""
    for name in ("astronaut", "brick", "camera", "coffee", "gravel", "retina", "chelsea", "hubble", "rocket"):
        shutil.copy(PHOTOS / f"{name}.jpg", tmp_path)
    (tmp_path / "reencoded.jpg").write_bytes(reencoded(photo("chelsea")))
    rocket = photo("rocket")
    rocket.resize((rocket.width // 2, rocket.height // 2), Image.Resampling.BICUBIC).save(tmp_path / "small.png")
    write_lines(tmp_path / "test.jsonl", [ask(100, "chelsea.jpg"), ask(101, "chelsea.jpg"), ask(102, "hubble.jpg")])
    write_lines(tmp_path / "more.jsonl", [ask(103, "rocket.jpg"), ask(104)])
    images = [
        "astronaut",
        "reencoded",
        "brick",
        None,
        "camera",
        "coffee",
        "small",
        "gravel",
        "hubble",
        "retina",
        "brick",
    ]
    records = [ask(n, name and f"{name}.{'png' if name == 'small' else 'jpg'}") for n, name in enumerate(images)]
    records[3] = {"question": "  QUESTION 104 ", "answer": "\uff21nswer\u00a0104."}
    records[10] |= {"question": "question 100", "answer": "Answer 100!"}
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    lines[4] = lines[4].replace(": ", " :   ") + " \r"
    lines.append('{"answer":"z","question":"no newline at the end \u00e9"}')
    (tmp_path / "train.jsonl").write_bytes("\n".join(lines).encode())
    return tmp_path


REMOVED = {
    2: ("near-duplicate image", "test.jsonl", 1),
    4: ("exact match", "more.jsonl", 2),
    7: ("near-duplicate image", "more.jsonl", 1),
    9: ("near-duplicate image", "test.jsonl", 3),
    11: ("exact match", "test.jsonl", 1),
}


def arguments_of(folder: Path, tower: Path, **changes) -> DecontaminationArguments:
    fields = {
        "train": folder / "train.jsonl",
        "test": [folder / "test.jsonl", folder / "more.jsonl"],
        "vision_tower": tower,
        "output": folder / "clean.jsonl",
        "threshold": THRESHOLD,
        "batch_size": 2,
        "num_threads": 2,
    }
    return DecontaminationArguments(**(fields | changes))


def command_line(folder: Path, tower: Path) -> list[str]:
    files = ["--train", folder / "train.jsonl", "--test", folder / "test.jsonl", folder / "more.jsonl"]
    rest = ["--vision-tower", tower, "--output", folder / "clean.jsonl", "--threshold", THRESHOLD]
    return [str(word) for word in (*files, *rest, "--batch-size", 2, "--num-threads", 2, "--device", "cpu")]


def outputs(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "clean.jsonl").read_bytes(), (folder / "clean.jsonl.report.jsonl").read_bytes()


def report_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in outputs(folder)[1].splitlines()]


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "clean" in path.name)


class Killed(BaseException):
    """Like a kill, it is caught by nobody."""


def killing(monkeypatch, owner, method: str, nth: int) -> None:
    calls, original = 0, getattr(owner, method)

    def kill(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == nth:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, method, kill)


def count_embedded(monkeypatch) -> list[Path]:
    """The images that are embedded from here on."""
    seen, embed = [], ImageEmbedder.embed

    def note(self, images):
        images = list(images)
        seen.extend(images)
        return embed(self, images)

    monkeypatch.setattr(ImageEmbedder, "embed", note)
    return seen


# What goes


@pytest.mark.parametrize(
    "one, other",
    [
        ("What  is\tthis ?\n", "what is this"),
        ("\uff37\uff48\uff41\uff54 \ufb01ne", "What fine"),
        ("\u2121 5", "Tel. 5"),
        ("STRASSE", "stra\u00dfe"),
        ("caf\u00e9", "cafe\u0301"),
        ("<image>\nWhere?", "Where"),
        ("(A)", "a."),
        ("zero\u200bwidth", "zerowidth"),
        ("1,000", "1 000"),
    ],
)
def test_spellings_of_one_text_are_equal(one, other):
    assert normalize_text(one) == normalize_text(other)


@pytest.mark.parametrize(
    "one, other", [("-5", "5"), ("3 + 4", "3 - 4"), ("<", ">"), ("?", "!"), ("at one", "atone"), ("caf\u00e9", "cafe")]
)
def test_different_texts_stay_different(one, other):
    assert normalize_text(one) != normalize_text(other)


def test_question_and_answer_do_not_run_into_each_other():
    assert digest_pair("is it", "red") != digest_pair("is", "it red")


def test_contaminated_samples_go_and_the_rest_keeps_its_bytes(data, tower):
    counts = decontaminate(arguments_of(data, tower))
    assert counts == {"exact match": 2, "near-duplicate image": 3, "kept": 7}
    lines = (data / "train.jsonl").read_bytes().splitlines(keepends=True)
    assert outputs(data)[0] == b"".join(line for number, line in enumerate(lines, 1) if number not in REMOVED)
    report = {record["line"]: record for record in report_lines(data)}
    found = {n: (r["stage"], Path(r["test_file"]).name, r["test_line"]) for n, r in report.items()}
    assert found == REMOVED
    assert (report[2]["image"], report[2]["test_image"]) == ("reencoded.jpg", "chelsea.jpg")
    assert THRESHOLD <= report[2]["similarity"] < 1
    assert left_behind(data) == ["clean.jsonl", "clean.jsonl.report.jsonl"]


def test_a_copy_goes_at_threshold_one_and_a_near_copy_stays(data, tower):
    decontaminate(arguments_of(data, tower, threshold=1.0))
    report = {record["line"]: record for record in report_lines(data)}
    assert set(report) == {4, 9, 11}
    assert report[9]["similarity"] == 1.0


def test_nearest_is_the_first_of_equals():
    test_embeds = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    embeds = torch.tensor([[1.0, 0.0], [-0.6, 0.8], [0.0, -1.0]])
    assert find_nearest(embeds, test_embeds) == [(1.0, 1), (0.8, 0), (0.0, 1)]


def test_conversations_and_arrays(data, tower):
    """An array in, an array out, the text of its items untouched; any turn's pair and any of several images counts."""

    def talk(*texts, image=None):
        turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
        return {"conversations": turns} | ({"image": image} if image else {})

    records = [
        talk("<image>\nHi?", "yes", image="brick.jpg"),
        talk("Hello", "Hi", "question 104", "<image>ANSWER 104", image="camera.jpg"),
        talk("question 104", "Hi", "Hello", "answer 104"),
        talk('Which \u00e9 ]} \\" is it?', "the left, [really", image=["brick.jpg", "gravel.jpg"]),
        talk("And here?", "yes", image=["brick.jpg", "reencoded.jpg"]),
    ]
    (data / "train.json").write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8", newline="")
    counts = decontaminate(arguments_of(data, tower, train=data / "train.json"))
    assert counts == {"exact match": 1, "near-duplicate image": 1, "kept": 3}
    assert json.loads(outputs(data)[0]) == [records[0], records[2], records[3]]
    items = [sample.source for sample in read_samples(data / "clean.jsonl")]
    originals = [sample.source for sample in read_samples(data / "train.json")]
    assert items == [originals[0], originals[2], originals[3]]
    assert "\n".join(json.dumps(records[0], indent=1).splitlines()[1:]).encode()[:20] in items[0].replace(
        b"\n ", b"\n"
    )


def test_arrays_longer_than_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr("train.data.decontamination.samples.BLOCK", 7)
    path = tmp_path / "train.json"
    records = [ask(n) | {"padding": "x" * n} for n in range(40)]
    path.write_text(json.dumps(records, indent=3) + "\n")
    assert [json.loads(sample.source) for sample in read_samples(path)] == records
    monkeypatch.setattr("train.data.decontamination.samples.LARGEST_ITEM", 50)  # no broken array is read to its end
    with pytest.raises(ValueError, match="Item .* is no JSON"):
        list(read_samples(path))
    path.write_text("[ ]")
    assert not list(read_samples(path))


# Towers


@pytest.mark.parametrize("kind", ["clip", "projection", "siglip"])
def test_towers_give_the_models_own_image_features(tmp_path, kind):
    vision_config = TOWER | ({"projection_dim": 24} if kind == "projection" else {})
    if kind == "siglip":
        model = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=vision_config))
    else:  # real ones say the width at the top, and not all of them in the half as well
        model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=vision_config, projection_dim=24))
    save_tower(tmp_path, model)
    if kind == "projection":
        CLIPVisionModelWithProjection.from_pretrained(tmp_path).save_pretrained(tmp_path)
    paths = [PHOTOS / "brick.jpg", PHOTOS / "camera.jpg", PHOTOS / "coffee.jpg"]
    embeds, unreadable = ImageEmbedder(tmp_path, torch.float32, "cpu", 2, 2).embed(paths)
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path)
    with torch.inference_mode():
        pixels = processor(images=[photo(path.stem) for path in paths], return_tensors="pt")
        expected = model.get_image_features(**pixels).pooler_output
    torch.testing.assert_close(embeds, torch.nn.functional.normalize(expected, dim=-1), atol=1e-5, rtol=1e-5)
    assert not unreadable


def test_a_tower_without_some_weights_is_refused(tmp_path, tower):
    shutil.copytree(tower, tmp_path / "tower")
    config = json.loads((tower / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "tower" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"all weights of CLIPVisionModel, .* lacks 16: .*layers\.2"):
        ImageEmbedder(tmp_path / "tower", torch.float32, "cpu", 2, 2)
    (tmp_path / "tower" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "tower" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="intact safetensors"):
        ImageEmbedder(tmp_path / "tower", torch.float32, "cpu", 2, 2)


def test_other_dtypes_and_broken_weights(tmp_path, tower):
    paths = [PHOTOS / "brick.jpg", PHOTOS / "camera.jpg"]
    expected, _ = ImageEmbedder(tower, torch.float32, "cpu", 2, 2).embed(paths)
    embedder = ImageEmbedder(tower, torch.bfloat16, "cpu", 2, 2)
    embeds, _ = embedder.embed(paths)
    assert (embedder.model.dtype, embeds.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(embeds, expected, atol=0.05, rtol=0)
    shutil.copytree(tower, tmp_path / "tower")
    os.truncate(tmp_path / "tower" / "model.safetensors", 1000)
    with pytest.raises(ValueError, match="intact safetensors"):
        ImageEmbedder(tmp_path / "tower", torch.float32, "cpu", 2, 2)


def test_no_image_starts_a_program(tmp_path, tower):
    """PostScript under a picture's name: Pillow would hand it to Ghostscript."""
    photo("brick").save(tmp_path / "brick.jpg", "EPS")
    _, unreadable = ImageEmbedder(tower, torch.float32, "cpu", 2, 2).embed([tmp_path / "brick.jpg"])
    assert "PostScript" in unreadable[tmp_path / "brick.jpg"]


def test_embeddings_that_are_not_finite_are_refused(tmp_path):
    model = CLIPVisionModel(CLIPVisionConfig(**TOWER))
    save_tower(tmp_path, model)
    with torch.no_grad():
        model.get_parameter("post_layernorm.weight").fill_(torch.nan)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"finite.*brick\.jpg"):
        ImageEmbedder(tmp_path, torch.float32, "cpu", 2, 2).embed([PHOTOS / "brick.jpg"])


# Kills


@pytest.fixture
def uninterrupted(data, tower, tmp_path_factory) -> tuple[bytes, bytes]:
    decontaminate(arguments_of(data, tower))
    found = outputs(data)
    for name in left_behind(data):
        (data / name).unlink()
    return found


MOMENTS = [
    (Journal, "write", 1),
    (Journal, "write", 2),
    (Journal, "write", 5),
    (ImageEmbedder, "embed", 1),
    (ImageEmbedder, "embed", 6),
    (Journal, "records", 3),
    (Journal, "note", 2),
    (os, "replace", 1),
    (os, "replace", 2),
    (Journal, "delete", 1),
]


@pytest.mark.parametrize("owner, method, nth", MOMENTS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_run_that_is_stopped_goes_on_to_the_same_outputs(data, tower, uninterrupted, owner, method, nth):
    with pytest.MonkeyPatch.context() as patch:
        killing(patch, owner, method, nth)
        with pytest.raises(Killed):
            decontaminate(arguments_of(data, tower))
    finished = method == "delete"
    assert (data / "clean.jsonl").exists() == finished
    counts = decontaminate(arguments_of(data, tower))
    assert outputs(data) == uninterrupted
    assert counts == {"exact match": 2, "near-duplicate image": 3, "kept": 7}
    assert left_behind(data) == ["clean.jsonl", "clean.jsonl.report.jsonl"]


@pytest.mark.parametrize(
    "module, method, nth",
    [("train.data.decontamination.journal", "Journal.transaction", 5), ("os", "replace", 1)],
    ids=["batch", "renames"],
)
def test_a_killed_process_goes_on_to_the_same_outputs(data, tower, uninterrupted, module, method, nth):
    """SIGKILL, first inside the transaction of a batch, then between the two renames."""
    command = command_line(data, tower)
    script = KILLED.format(root=str(ROOT), module=module, method=method, nth=nth, arguments=command)
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (data / "clean.jsonl").exists()
    assert (data / "clean.jsonl.journal").exists()
    decontaminate(arguments_of(data, tower))
    assert outputs(data) == uninterrupted


def stop_at(data, tower, nth: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        killing(patch, ImageEmbedder, "embed", nth)
        with pytest.raises(Killed):
            decontaminate(arguments_of(data, tower))


def test_what_was_done_is_not_done_again(data, tower, monkeypatch):
    """Two batches of test images; then line 1 and 2, line 3 (4 is an exact match), line 5 and 6."""
    stop_at(data, tower, 5)
    seen = count_embedded(monkeypatch)
    decontaminate(arguments_of(data, tower))
    assert [path.stem for path in seen] == ["camera", "coffee", "small", "gravel", "hubble", "retina"]


@pytest.mark.parametrize("changed", ["threshold", "batch_size", "dtype", "train", "test", "vision_tower"])
def test_a_stale_journal_is_refused_and_kept(data, tower, changed, tmp_path_factory):
    stop_at(data, tower, 4)
    changes = {"threshold": {"threshold": 0.9}, "batch_size": {"batch_size": 3}, "dtype": {"dtype": "bfloat16"}}
    if changed in ("train", "test"):
        with (data / f"{changed}.jsonl").open("a") as file:
            file.write("\n" * (changed == "train") + json.dumps(ask(7)))
    if changed == "vision_tower":
        other = CLIPVisionModel(CLIPVisionConfig(**TOWER))
        save_tower(tmp_path_factory.mktemp("other"), other)
        changes["vision_tower"] = {"vision_tower": tmp_path_factory.mktemp("changed") / "tower"}
        shutil.copytree(tower, changes["vision_tower"]["vision_tower"])
        weights = changes["vision_tower"]["vision_tower"] / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"clean\.jsonl\.journal .*other inputs or settings: `{changed}`.* delete it"
    ):
        decontaminate(arguments_of(data, tower, **changes.get(changed, {})))
    assert left_behind(data) == ["clean.jsonl.journal"]


def test_a_file_that_is_no_journal_and_one_in_use_are_refused(data, tower):
    (data / "clean.jsonl.journal").write_text("notes " * 1000)
    with pytest.raises(ValueError, match="must be a journal"):
        decontaminate(arguments_of(data, tower))
    assert (data / "clean.jsonl.journal").read_text().startswith("notes")
    (data / "clean.jsonl.journal").unlink()
    journal = Journal(data / "clean.jsonl.journal", {})
    with pytest.raises(ValueError, match="no other process"):
        Journal(data / "clean.jsonl.journal", {})
    journal.close()


@pytest.mark.parametrize("replaced, by", [("brick.jpg", "chelsea.jpg"), ("rocket.jpg", "brick.jpg")])
def test_batches_of_a_replaced_image_are_worked_out_anew(data, tower, replaced, by):
    """A training image, or a test image, after the batch of line 3, which now must go: as in a run that saw no other."""
    stop_at(data, tower, 6)
    shutil.copy(data / by, data / replaced)
    os.utime(data / replaced, ns=(1, 1))
    decontaminate(arguments_of(data, tower))
    resumed = outputs(data)
    assert 3 in {record["line"] for record in report_lines(data)}
    decontaminate(arguments_of(data, tower, force=True))
    assert outputs(data) == resumed


# Bad input


def break_image(path: Path) -> bytes:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return whole


def test_an_unreadable_image_stops_the_run_and_costs_nothing(data, tower, uninterrupted, monkeypatch):
    whole = break_image(data / "coffee.jpg")
    with pytest.raises(ValueError, match=r"1 images .*coffee\.jpg \(line 6 .*truncated.*--skip-unreadable"):
        decontaminate(arguments_of(data, tower))
    assert left_behind(data) == ["clean.jsonl.journal"]
    (data / "coffee.jpg").write_bytes(whole)
    seen = count_embedded(monkeypatch)
    decontaminate(arguments_of(data, tower))
    assert outputs(data) == uninterrupted
    assert [path.stem for path in seen][:2] == ["camera", "coffee"]


def test_unreadable_images_are_skipped_on_request(data, tower):
    break_image(data / "coffee.jpg")
    (data / "gravel.jpg").unlink()
    (data / "hubble.jpg").write_text("no image")
    counts = decontaminate(arguments_of(data, tower, skip_unreadable=True))
    # Line 9 shows the test image that cannot be read, so it cannot be read either.
    assert counts == {
        "exact match": 2,
        "near-duplicate image": 2,
        "unreadable image": 3,
        "unreadable test image": 1,
        "kept": 5,
    }
    unreadable = [r for r in report_lines(data) if r["stage"].startswith("unreadable")]
    assert [r.get("line") for r in unreadable] == [None, 6, 8, 9]
    assert (unreadable[0]["test_image"], unreadable[0]["test_line"]) == ("hubble.jpg", 3)
    assert "no image of a known format" in unreadable[0]["reason"] and "no such file" in unreadable[2]["reason"]


def test_what_was_skipped_on_request_stops_a_run_without_it(data, tower):
    break_image(data / "astronaut.jpg")
    with pytest.MonkeyPatch.context() as patch:
        killing(patch, ImageEmbedder, "embed", 4)
        with pytest.raises(Killed):
            decontaminate(arguments_of(data, tower, skip_unreadable=True))
    with pytest.raises(ValueError, match=r"astronaut\.jpg"):
        decontaminate(arguments_of(data, tower))


def test_missing_images_are_all_counted_before_any_work(data, tower, monkeypatch):
    for name in ("astronaut", "gravel", "hubble"):
        (data / f"{name}.jpg").unlink()
    seen = count_embedded(monkeypatch)
    pattern = r"4 of 14 images are missing: hubble\.jpg \(line 3 of .*test\.jsonl\), astronaut.*line 1.*gravel.*line 8"
    with pytest.raises(ValueError, match=pattern):
        decontaminate(arguments_of(data, tower))
    assert not seen and not left_behind(data)


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{", "Line 13 of .*train.jsonl is no JSON"),
        (b"", "Line 13 of .*no JSON"),
        (b'"\xff"', "Line 13 of .*no JSON.*utf-8"),
        (b"[]", "Line 13 of .*an object, got list"),
        (b'{"question": "a"}', "Line 13 of .*text, got str and NoneType"),
        (b'{"question": "a", "answer": 5}', "Line 13 of .*got str and int"),
        (b'{"question": "a", "answer": "b", "image": [1]}', r"Line 13 of .*`image`.*\[1\]"),
        (b'{"conversations": [{"from": "human"}]}', "Line 13 of .*`from` and `value`"),
    ],
)
def test_bad_lines_are_named_before_any_work(data, tower, monkeypatch, line, message):
    seen = count_embedded(monkeypatch)
    with (data / "train.jsonl").open("ab") as file:
        file.write(b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=message):
        decontaminate(arguments_of(data, tower))
    assert not seen and not left_behind(data)


@pytest.mark.parametrize(
    "text, message",
    [
        ('[{"question": "a", "answer": "b"}, {"question"', "Item 2 of .*no JSON"),
        ('[{"question": "a", "answer": "b"} {}]', "Item 1 of .*neither a comma"),
        ('[{"question": "a", "answer": "b"}, ]', "Item 2 of .*no JSON"),
        ('[{"question": "a", "answer": "b"}] {}', "goes on behind its end"),
        ('[{"question": "a", "answer": "b"}, 5]', "Item 2 of .*an object, got int"),
    ],
)
def test_bad_items_are_named(tmp_path, text, message):
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_samples(tmp_path / "train.json"))


def test_arguments_are_checked(data, tower):
    (data / "empty.jsonl").touch()
    (data / "link.jsonl").symlink_to(data / "train.jsonl")
    for changes, message in (
        ({"threshold": 0.0}, r"`threshold` .*got 0\.0"),
        ({"threshold": 1.01}, r"`threshold` .*got 1\.01"),
        ({"threshold": float("nan")}, "`threshold` .*got nan"),
        ({"batch_size": 0}, "`batch_size` .*got 0"),
        ({"dtype": "int8"}, "`dtype` .*'int8'"),
        ({"device": "cuda:99"}, "`device` .*'cuda:99'"),
        ({"train": data / "none.jsonl"}, r"files, got .*none\.jsonl"),
        ({"test": [data / "none.jsonl"]}, r"files, got .*none\.jsonl"),
        ({"train": data / "test.jsonl"}, "must not be one of the `test` files"),
        ({"vision_tower": data}, "config.json, got"),
        ({"output": data / "train.jsonl"}, r"different files, got .*train\.jsonl"),
        ({"output": data / "link.jsonl"}, r"different files, got .*link\.jsonl"),
        ({"report": data / "test.jsonl"}, r"different files, got .*test\.jsonl"),
        ({"output": data / "none" / "clean.jsonl"}, "folders that exist"),
    ):
        with pytest.raises(ValueError, match=message):
            arguments_of(data, tower, **changes)
    with pytest.raises(ValueError, match=r"empty\.jsonl must hold samples"):
        decontaminate(arguments_of(data, tower, train=data / "empty.jsonl"))


def test_what_is_there_is_replaced_only_on_request(data, tower):
    (data / "clean.jsonl").write_text("precious")
    with pytest.raises(ValueError, match=r"must be new, but .*clean\.jsonl exist"):
        arguments_of(data, tower)
    with pytest.MonkeyPatch.context() as patch:
        killing(patch, ImageEmbedder, "embed", 3)
        with pytest.raises(Killed):
            decontaminate(arguments_of(data, tower, force=True))
    with pytest.raises(ValueError, match="must be new"):  # the journal alone is no permission
        decontaminate(arguments_of(data, tower))
    assert (data / "clean.jsonl").read_text() == "precious"
    decontaminate(arguments_of(data, tower, force=True))
    assert len(outputs(data)[0].splitlines()) == 7


def test_relative_images_need_the_folder_that_they_are_relative_to(data, tower, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "clean.jsonl"
    with pytest.raises(ValueError, match=r"`output` must be in the folder of `train`.*number 1 .*astronaut\.jpg"):
        decontaminate(arguments_of(data, tower, output=elsewhere))
    write_lines(data / "train.jsonl", [ask(1, str(data / "brick.jpg"))])
    assert decontaminate(arguments_of(data, tower, output=elsewhere))["kept"] == 1


# Size


def test_memory_holds_the_test_images_and_one_batch(data, tower, monkeypatch):
    """Rows of embeddings that are alive when a batch is embedded: the test images' and its own, none of earlier ones."""
    write_lines(data / "train.jsonl", [ask(n, "brick.jpg" if n % 2 else "coffee.jpg") for n in range(60)])
    rows, embed_pixels = [], ImageEmbedder.embed_pixels

    def note(self, pixels, paths):
        embeds = embed_pixels(self, pixels, paths)
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
        rows.append(sum(len(tensor) for tensor in tensors if tensor.shape[1:] == embeds.shape[1:]))
        return embeds

    monkeypatch.setattr(ImageEmbedder, "embed_pixels", note)
    decontaminate(arguments_of(data, tower))
    assert rows[2:] == [3 + 2] * 30


# The command


def test_the_command_prints_a_table(data, tower, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["decontaminate", *command_line(data, tower)])
    main()
    printed = capsys.readouterr()
    rows = {line[:26].strip(): line[26:].strip() for line in printed.out.splitlines()[:-1]}
    assert rows == {
        "samples read": "12",
        "exact match": "2",
        "near-duplicate image": "3",
        "unreadable image": "0",
        "kept": "7",
    }
    assert "Comparing training samples: 100%" in printed.err
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.startswith("error: `output` and `report` must be new")
