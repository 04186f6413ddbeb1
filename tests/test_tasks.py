"""The procedural tasks: reproducible, unambiguous, balanced, without leaks between splits."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

from train.data import tasks
from train.data.tasks import FAMILIES, SPLITS, TASKS, generate_sample, write_dataset
from train.data.tasks.__main__ import main
from train.data.tasks.photos import PHOTO_FOLDER, PHOTOS
from train.data.tasks.shapes import COLORS, DIGITS, SHAPES, Thing, draw_thing


ROOT = Path(__file__).parent.parent
each_task = pytest.mark.parametrize("task", FAMILIES["shapes"])


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference in levels of 255."""
    return sum(ImageStat.Stat(ImageChops.difference(one, other)).mean) / 3


def fingerprints(sample) -> set[str]:
    pictures = [sample.image, *sample.assistant_images]
    return {hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures}


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_cli(*arguments: str, hash_seed: str = "0") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "train.data.tasks", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
    )


# Reproducible


def test_command_line_writes_the_same_bytes_in_another_process(tmp_path):
    """Two hash salts: nothing may depend on `hash()` or on the order of a set."""
    for hash_seed in ("1", "2"):
        arguments = ["--task", "all", "--n", "17", "--seed", "3", "--output", str(tmp_path / hash_seed)]
        finished = run_cli(*arguments, hash_seed=hash_seed)
        assert finished.returncode == 0, finished.stderr
        assert "17/17" in finished.stderr  # the progress bar
        assert "samples/s" in finished.stdout
    first = folder_bytes(tmp_path / "1")
    assert first == folder_bytes(tmp_path / "2")
    assert len(first) > 2 * 17


# What `describe` and the families of 0.1.0 gave before there were others: texts, boxes and objects of eight samples.
FIRST_VERSION = {
    "color": "4b8ed537ca49186a",
    "digit": "36a4b2729d5eb7d7",
    "count": "56af8de0bb5bbcae",
    "position": "b768d59a3c91cecc",
    "describe": "4b7b7e17ead8c673",
}


@pytest.mark.parametrize("task", FIRST_VERSION)
def test_the_first_tasks_are_what_they_were(task):
    samples = [generate_sample(task, 3, index, "val", 112) for index in range(8)]
    content = [json.dumps([s.question, s.answer, s.rationale, s.boxes, s.objects]) for s in samples]
    assert hashlib.sha256("".join(content).encode()).hexdigest()[:16] == FIRST_VERSION[task]


@each_task
def test_seed_and_index_both_change_the_sample(task):
    pictures = [generate_sample(task, seed, index).image.tobytes() for seed in (0, 1) for index in (0, 1)]
    assert len(set(pictures)) == 4


@each_task
def test_image_size_scales_the_same_scene(task):
    small, large = (generate_sample(task, 0, 5, image_size=size) for size in (224, 448))
    assert small.image.size == (224, 224)
    assert large.image.size == (448, 448)
    assert (small.question, small.answer, small.rationale) == (large.question, large.answer, large.rationale)
    for one, other in zip(small.objects, large.objects, strict=True):
        assert [one["color"], one["shape"], one["digit"]] == [other["color"], other["shape"], other["digit"]]
        assert all(abs(2 * a - b) <= 4 for a, b in zip(one["box"], other["box"]))


def test_a_family_deals_its_tasks_evenly_and_contains_their_own_samples():
    samples = [generate_sample("shapes", 0, index) for index in range(10)]
    assert sorted(Counter(sample.request.task for sample in samples).values()) == [2, 2, 3, 3]
    assert samples[5].image.tobytes() == generate_sample("digit", 0, 1).image.tobytes()


# Splits


def test_every_photo_belongs_to_one_split_and_has_a_license():
    dealt = [f"{name}.jpg" for names in PHOTOS.values() for name in names]
    assert sorted(dealt) == sorted(path.name for path in PHOTO_FOLDER.glob("*.jpg"))
    assert len({(PHOTO_FOLDER / name).read_bytes() for name in dealt}) == len(dealt)
    license_rows = {
        row.split("`")[1]: row.split("|")[-2].strip()
        for row in (PHOTO_FOLDER / "LICENSE.md").read_text().splitlines()
        if row.startswith("| `")
    }
    assert license_rows == {f"{name}.jpg": split for split, names in PHOTOS.items() for name in names}
    assert sum((PHOTO_FOLDER / name).stat().st_size for name in dealt) <= 600_000


def test_splits_share_no_image_and_no_photo(monkeypatch):
    opened = {split: set() for split in SPLITS}
    pictures = {split: set() for split in SPLITS}
    load_photo = tasks.photos.load_photo
    for split in SPLITS:
        monkeypatch.setattr(
            "train.data.tasks.photos.load_photo", lambda name, split=split: opened[split].add(name) or load_photo(name)
        )
        for index in range(40):
            pictures[split] |= fingerprints(generate_sample("shapes", 0, index, split, image_size=112))
    assert {split: tuple(sorted(names)) for split, names in opened.items()} == PHOTOS
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not pictures[one] & pictures[other]


# Unambiguous


def answers_from_objects(sample) -> list[str]:
    """Return every answer that the drawn objects allow, from the words of the question alone."""
    words = set(re.findall(r"\w+", sample.question.replace("crosses", "cross")))
    words |= {word.removesuffix("s") for word in words}
    colors, shapes = words & set(COLORS), words & set(SHAPES)
    assert len(shapes) == 1
    found = [o for o in sample.objects if o["shape"] in shapes and (o["color"] in colors or not colors)]
    assert [o["asked"] for o in sample.objects] == [o in found for o in sample.objects]
    half = sample.image.width / 2
    answers = {
        "color": [o["color"] for o in found],
        "digit": [o["digit"] for o in found],
        "count": [str(len(found))],
        "position": [
            f"{'top' if bottom <= half else 'bottom' if top >= half else 'middle'} "
            f"{'left' if right <= half else 'right' if left >= half else 'middle'}"
            for left, top, right, bottom in (o["box"] for o in found)
        ],
    }
    return answers[sample.request.task]


@each_task
def test_objects_allow_one_answer_and_lie_apart_inside_the_picture(task):
    for index in range(60):
        sample = generate_sample(task, 0, index, image_size=112)
        assert answers_from_objects(sample) == [sample.answer]
        assert sample.answer in sample.choices
        assert sample.answer in sample.rationale[-1]
        boxes = [o["box"] for o in sample.objects]
        assert all(0 <= left < right <= 112 and 0 <= top < bottom <= 112 for left, top, right, bottom in boxes)
        for number, (left, top, right, bottom) in enumerate(boxes):
            for other_left, other_top, other_right, other_bottom in boxes[:number]:
                apart = left >= other_right or right <= other_left or top >= other_bottom or bottom <= other_top
                assert apart


def test_pixels_show_the_recorded_objects():
    """Redraw every object with every color, or every digit: the recorded one must fit the picture best, by far."""
    for task, index in (("color", 0), ("count", 1), ("position", 2), ("digit", 3), ("digit", 4)):
        sample = generate_sample(task, 0, index)
        for recorded in sample.objects:
            thing = Thing(recorded["color"], recorded["shape"], recorded["digit"])
            field, values = ("digit", DIGITS) if thing.digit else ("color", tuple(COLORS))
            region = sample.image.crop(recorded["box"])
            misfit = {}
            for value in values:
                redrawn = region.copy()
                draw_thing(redrawn, thing._replace(**{field: value}), (0, 0, *region.size))
                misfit[value] = difference(redrawn, region)
            best, second = sorted(values, key=misfit.get)[:2]
            assert best == getattr(thing, field)
            assert misfit[best] < 3
            assert misfit[second] > 2 * misfit[best]


def test_no_shape_is_cut_off_by_its_box():
    """The box is wide enough for outline and halo: a larger canvas around it stays clean and its rim is not solid."""
    for shape in SHAPES:
        picture = Image.new("RGB", (60, 60), (0, 128, 128))
        draw_thing(picture, Thing("red", shape, "8"), (10, 10, 50, 50))
        left, top, right, bottom = ImageChops.difference(picture, Image.new("RGB", (60, 60), (0, 128, 128))).getbbox()
        assert 10 <= left <= 13
        assert 47 <= right <= 50
        assert 10 <= top <= 14
        assert 46 <= bottom <= 50
        for rim in ((10, 10, 50, 11), (10, 49, 50, 50), (10, 10, 11, 50), (49, 10, 50, 50)):
            dark = picture.crop(rim).convert("L").getextrema()[0]
            assert dark > 60  # the rim may touch the light halo, never the black outline


@pytest.mark.parametrize("background", ["white", "black", *COLORS.values()])
def test_every_thing_stands_out_on_every_background(background):
    for color in COLORS:
        picture = Image.new("RGB", (36, 36), background)
        blank = picture.copy()
        draw_thing(picture, Thing(color, "circle"), (0, 0, 36, 36))
        contrast = ImageChops.difference(picture.convert("L"), blank.convert("L")).getextrema()[1]
        assert contrast >= 100


# Assistant images


@each_task
@pytest.mark.parametrize("image_size", [224, 252])
def test_crops_enlarge_the_asked_objects(task, image_size):
    for index in range(12):
        sample = generate_sample(task, 1, index, "val", image_size)
        asked = [o for o in sample.objects if o["asked"]]
        assert len(asked) == len(sample.boxes) == len(sample.assistant_images)
        for recorded, box, picture in zip(asked, sample.boxes, sample.assistant_images):
            left, top, right, bottom = box
            assert 0 <= left <= recorded["box"][0]
            assert 0 <= top <= recorded["box"][1]
            assert image_size >= right >= recorded["box"][2]
            assert image_size >= bottom >= recorded["box"][3]
            assert picture.width % 28 == picture.height % 28 == 0
            assert picture.width >= 1.4 * (right - left)
            assert picture.height >= 1.4 * (bottom - top)
            shrunk = picture.resize((right - left, bottom - top), Image.Resampling.BOX)
            assert difference(shrunk, sample.image.crop(box)) < 12


def test_messages_interleave_text_and_crops():
    sample = generate_sample("count", 0, [generate_sample("count", 0, i).answer for i in range(4)].index("2"))
    user, assistant = sample.messages()
    assert [part["type"] for part in user["content"]] == ["image", "text"]
    assert user["content"][0]["image"] is sample.image
    assert [part["type"] for part in assistant["content"]] == [
        "text",
        "text",
        "image",
        "text",
        "image",
        "text",
        "text",
    ]
    assert [part["image"] for part in assistant["content"] if part["type"] == "image"] == sample.assistant_images
    texts = [part["text"] for part in assistant["content"] if part["type"] == "text"]
    assert texts == [*sample.rationale, "The answer is \\boxed{2}."]


# Balanced


@each_task
def test_no_answer_is_known_without_the_image(task, monkeypatch):
    """Neither a constant nor the majority answer of the same question, learned on other samples, beats chance."""
    monkeypatch.setattr("train.data.tasks.shapes.draw_thing", lambda *_: None)  # pixels do not matter here, time does
    seen, held_out = ([generate_sample(task, seed, index, image_size=112) for index in range(300)] for seed in (0, 1))
    chance = 1 / len(seen[0].choices)
    counts = Counter(sample.answer for sample in held_out)
    assert set(counts) == set(seen[0].choices)
    assert max(counts.values()) / 300 < chance + 0.01
    by_question = {sample.question: Counter() for sample in seen}
    for sample in seen:
        by_question[sample.question][sample.answer] += 1
    known = [sample for sample in held_out if sample.question in by_question]
    correct = sum(by_question[sample.question].most_common(1)[0][0] == sample.answer for sample in known)
    assert len(known) > 250
    assert correct / len(known) < chance + 0.06
    order = "".join(sample.answer for sample in seen)
    assert order != "".join(sample.answer for sample in held_out)


def test_the_crowd_does_not_give_the_answer_away():
    """As many things whatever the count, and as many in every quadrant whatever the position."""
    decoys = Counter()
    for index in range(40):
        count = generate_sample("count", 0, index, image_size=112)
        assert len(count.objects) == 10
        kinds = Counter((o["color"], o["shape"]) for o in count.objects if not o["asked"])
        decoys[max(kinds.values())] += 1
        corners = [(o["box"][1] // 28, o["box"][0] // 28) for o in count.objects if o["asked"]]
        assert corners == sorted(corners)  # found in reading order

        position = generate_sample("position", 0, index, image_size=112)
        quadrants = Counter((o["box"][1] >= 56, o["box"][0] >= 56) for o in position.objects)
        assert list(quadrants.values()) == [2, 2, 2, 2]
    assert set(decoys) >= {1, 2, 3, 4}  # the largest group need not be the one asked about


# Files and errors


def test_written_files_read_back_as_the_samples(tmp_path):
    data = write_dataset("all", 8, 5, tmp_path / "set", split="test", image_size=112)
    assert data == tmp_path / "set" / "data.jsonl"
    records = [json.loads(line) for line in data.read_text().splitlines()]
    named = {"data.jsonl"}
    for index, record in enumerate(records):
        sample = generate_sample("all", 5, index, "test", 112)
        assert record == json.loads(json.dumps(sample.record()))
        paths = [record["image"], *record["assistant_images"]]
        for path, picture in zip(paths, [sample.image, *sample.assistant_images], strict=True):
            with Image.open(data.parent / path) as written:
                assert written.convert("RGB").tobytes() == picture.tobytes()
        in_chat = [p["image"] for m in record["messages"] for p in m["content"] if p["type"] == "image"]
        assert in_chat == paths
        named |= set(paths)
    assert len({record["id"] for record in records}) == 8
    assert set(folder_bytes(data.parent)) == named


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_run_leaves_what_was_there(tmp_path, monkeypatch, error):
    """The data of an earlier run with `force`, nothing without one; and the same command can be run again."""
    write_dataset("color", 1, 0, tmp_path / "old")
    before = folder_bytes(tmp_path / "old")

    def interrupted(request):
        if request.index == 2:
            raise error
        return generate_sample("digit", 0, request.index)

    monkeypatch.setitem(TASKS, "color", interrupted)
    with pytest.raises(error):
        write_dataset("color", 5, 1, tmp_path / "old", force=True)
    with pytest.raises(error):
        write_dataset("color", 5, 1, tmp_path / "new")
    assert folder_bytes(tmp_path / "old") == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    monkeypatch.undo()
    written = [folder_bytes(write_dataset("color", 5, 1, tmp_path / "new").parent)]
    written.append(folder_bytes(write_dataset("color", 5, 1, tmp_path / "old", force=True).parent))
    assert written[1] == before | written[0]  # files of other names stay


def test_output_that_is_not_empty_is_refused_unless_forced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"`output` must be empty or new, but .* Pass `force`"):
        write_dataset("color", 1, 0, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    write_dataset("color", 1, 0, tmp_path, force=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert len((tmp_path / "data.jsonl").read_text().splitlines()) == 1
    with pytest.raises(ValueError, match="notes.txt is a file"):
        write_dataset("color", 1, 0, tmp_path / "notes.txt")


BAD_ARGUMENTS = [
    ({"task": "colour"}, "`task` must be one of all, shapes, search, jigsaw, "),
    ({"level": "middle"}, "`level` must be one of easy, hard; got 'middle'"),
    ({"level": "hard"}, "`level` must be easy for task color, which has no other; got 'hard'"),
    (
        {"task": "jigsaw,color", "level": "hard", "image_size": 224},
        "`level` must be easy for task color, which has no other; got 'hard'",
    ),
    (
        {"task": "color,jigsaw:0"},
        "A task's share, as in `search_color:4,jigsaw`, must be a number above 0; got 'color,jigsaw:0'.",
    ),
    (
        {"task": "search_text", "level": "hard", "image_size": 196},
        "`image_size` must be at least 224 pixels for task search_text at level hard, got 196",
    ),
    ({"split": "dev"}, "`split` must be one of train, val, test; got 'dev'"),
    ({"image_size": 84}, "`image_size` must be a multiple of 28 and at least 112 pixels, got 84"),
    ({"image_size": 230}, "`image_size` must be a multiple of 28 and at least 112 pixels, got 230"),
    ({"n": 0}, "`n` must be >= 1, got 0"),
]


@pytest.mark.parametrize("bad, message", BAD_ARGUMENTS)
def test_bad_arguments_are_named_by_the_library_and_by_the_command_line(tmp_path, capsys, bad, message):
    arguments = {"task": "color", "n": 1, "seed": 0, "output": tmp_path / "set", **bad}
    with pytest.raises(ValueError, match=re.escape(message)):
        write_dataset(**arguments)
    flags = [part for name, value in arguments.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    with pytest.raises(SystemExit) as exit_info:
        main(flags)
    assert exit_info.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_negative_index_is_refused():
    with pytest.raises(ValueError, match="`index` must be >= 0, got -1"):
        generate_sample("color", 0, -1)
