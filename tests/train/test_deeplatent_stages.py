"""The curriculum of DeepLatent: texts left out stage by stage, stages that end by accuracy, features that are kept."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from helpers import assert_near
from test_train_deeplatent import SAMPLES, cache, logged, train
from transformers import AutoModel, AutoProcessor

from conversion.convert_deeplatent import convert_deeplatent
from train.common import training_model
from train.data.small_tokenizer import texts_of
from train.data.tasks import write_dataset
from train.deeplatent import collator as collators
from train.deeplatent import trajectories
from train.deeplatent.collator import DeepLatentCollator
from train.deeplatent.kept_features import keep_features
from train.deeplatent.sft import build_parser
from train.deeplatent.trajectories import Trajectories, count_steps, drop_texts
from train.recipes.small_backbone import write_backbone


@pytest.fixture(scope="module")
def hops(tmp_path_factory):
    """A DeepLatent model of random weights, and every number of hops about four pictures."""
    folder = tmp_path_factory.mktemp("hops")
    questions = write_dataset("hops", 4, 0, folder / "data", image_size=112, questions="steps")
    backbone = write_backbone(texts_of(questions), folder / "backbone", 64, 2, 400)
    return convert_deeplatent(backbone, folder / "deeplatent", overrides={"latent_grid_size": 2}), questions


@pytest.fixture
def unsaved(monkeypatch):
    monkeypatch.setattr(training_model, "save_trained", lambda trainer: None)


def texts(message: dict) -> list[str]:
    return [item.get("text", "picture") for item in message["content"]]


@pytest.mark.parametrize(
    ("count", "left"),
    [
        (0, ["so", "look 0", "picture", "look 1", "picture", "red"]),
        (2, ["picture", "look 1", "picture", "red"]),
        (3, ["picture", "picture", "red"]),
        (9, ["picture", "picture", "red"]),
    ],
)
def test_the_first_texts_are_left_out_but_never_the_last(count, left):
    message = {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "so"},
            {"type": "text", "text": "look 0"},
            {"type": "image", "image": "a"},
            {"type": "text", "text": "look 1"},
            {"type": "image", "image": "b"},
            {"type": "text", "text": "red"},
        ],
    }
    assert texts(drop_texts(message, count)) == left
    asked = message | {"role": "user"}
    assert drop_texts(asked, count) is asked
    plain = {"role": "assistant", "content": "red"}
    assert drop_texts(plain, count) is plain


def test_steps_are_texts_but_the_last_or_pictures():
    assert [count_steps(sample["messages"]) for sample in SAMPLES] == [1, 2, 4]
    picture = {"type": "image", "image": "a"}
    drawn = {"role": "assistant", "content": [picture, picture, picture, {"type": "text", "text": "red"}]}
    assert count_steps([{"role": "user", "content": [picture]}, drawn]) == 3
    assert count_steps([{"role": "assistant", "content": "red"}]) == 0


@pytest.mark.parametrize("stage", [0, 1, 4])
def test_students_lose_texts_and_teachers_keep_them(hops, stage):
    model, processor = AutoModel.from_pretrained(hops[0]), AutoProcessor.from_pretrained(hops[0])
    data = Trajectories(hops[1])
    collator = DeepLatentCollator(processor, model.config, "latent", has_live_teacher=True)
    collator.stage = stage
    batch = collator([data[number] for number in range(4)])  # 1 to 4 hops over one picture
    for row, inputs in enumerate(zip(batch["input_ids"], batch["teacher_inputs"]["input_ids"])):
        student, teacher = (processor.decode(ids).split("assistant\n")[1] for ids in inputs)
        steps = json.loads(hops[1].read_text().splitlines()[row])["rationale"]
        assert [step in student for step in steps] == [number >= stage for number in range(len(steps))], student
        assert all(step in teacher for step in steps)
        assert student.count("<|latent_start|>") == teacher.count("<|vision_start|>") == len(steps) == row + 1
        assert "The answer is" in student
    assert batch["teacher_inputs"]["columns"].sum() == batch["latent_grid_hw"].prod(1).sum() == 4 * (1 + 2 + 3 + 4)


def test_teachers_say_the_same_in_every_stage(hops, tmp_path, unsaved):
    """States from a disk cache, which was written once, and those of a teacher that runs beside the student."""
    states = cache(hops[0], hops[1], tmp_path / "states", states_dtype="float32", samples_per_shard=4)
    settings = {"stages": [2, 4], "samples_per_epoch": 8, "eval_share": 0.25, "seed": 1}
    settings |= {"attn_implementation": "sdpa", "learning_rate": 1e-3}
    runs = {"teacher_states": str(states)}, {"teacher_path": str(hops[0]), "cache_image_features": 0.01}
    stored, live = (train("sft2", *hops, tmp_path / str(n), **settings, **run) for n, run in enumerate(runs))
    assert len(logged(stored, "align_loss")) == 4
    assert logged(stored, "align_loss") == pytest.approx(logged(live, "align_loss"), abs=1e-4)


def test_stages_end_by_accuracy_and_show_short_answers(hops, tmp_path, unsaved, monkeypatch):
    seen = []
    call = DeepLatentCollator.__call__

    def watch(self, samples):
        if torch.is_grad_enabled():
            seen.append((self.stage, max(count_steps(sample["messages"]) for sample in samples)))
        return call(self, samples)

    monkeypatch.setattr(collators.DeepLatentCollator, "__call__", watch)
    settings = {"stages": [0, 2, 4], "stage_longest": [1, 2, 4], "samples_per_epoch": 8, "eval_share": 0.25}
    settings |= {"lr_scheduler_type": "constant", "decay_last_stage": True, "align_loss_weight": 0.0}
    trainer = train("sft2", *hops, tmp_path, **settings, stage_accuracy=1.0, epochs_per_stage=[2, 1, 2])
    assert trainer.state.epoch == 5  # nothing is right: every stage takes its most
    stages = [entry for entry in trainer.state.log_history if "begins_stage" in entry]
    assert [(entry["begins_stage"], entry["epoch"]) for entry in stages] == [(2, 2), (4, 3)]
    assert {stage for stage, _ in seen} == {0, 2, 4}
    assert all(longest <= {0: 1, 2: 2, 4: 4}[stage] for stage, longest in seen)
    assert max(longest for _, longest in seen) > 1
    rates = logged(trainer, "learning_rate")
    assert rates[:6] == [3e-3] * 6 and rates[-1] < rates[-2] < rates[-3] < 3e-3 * 1.01
    monkeypatch.setattr("train.common.stages.AnswerAccuracy.average", staticmethod(lambda _: {"answer_accuracy": 1.0}))
    trainer = train("sft2", *hops, tmp_path / "soon", **settings, stage_accuracy=0.5, epochs_per_stage=[2, 9, 1])
    assert trainer.state.epoch == 3


@pytest.mark.parametrize("stage", ["sft1", "sft2"])
def test_kept_features_change_nothing_but_the_time(hops, tmp_path, unsaved, monkeypatch, stage):
    """The student's, the live teacher's and the answers' pictures; every content is encoded once."""
    opened = []
    monkeypatch.setattr(
        collators,
        "open_picture",
        lambda image, name, read=collators.open_picture: opened.append(name) or read(image, name),
    )
    settings = {"stages": [0, 4], "samples_per_epoch": 4, "seed": 3}
    settings |= {"teacher_path": str(hops[0])} if stage == "sft2" else {}
    plain = train(stage, *hops, tmp_path / "plain", **settings)
    assert opened
    opened.clear()
    kept = train(stage, *hops, tmp_path / "kept", cache_image_features=0.01, **settings)
    assert not opened  # no batch decodes anything
    assert logged(kept, "loss") == pytest.approx(logged(plain, "loss"), abs=2e-5)
    expected = plain.model.model.state_dict()
    for name, value in kept.model.model.state_dict().items():
        assert_near(value, expected[name], 1e-3)


def test_a_content_is_encoded_once(hops):
    model, processor = AutoModel.from_pretrained(hops[0]), AutoProcessor.from_pretrained(hops[0])
    model.model.visual.requires_grad_(False)
    data = Trajectories(hops[1])
    arguments = build_parser().parse_dict({"model_path": "x", "data_path": "x", "output_dir": "x", "use_cpu": True})[2]
    samples = [data[number] for number in range(len(data))]
    for assistant_images, names in (("latent", 4), ("image", 4 + 4 * 4)):
        collator = DeepLatentCollator(processor, model.config, assistant_images)
        cache = keep_features(model, collator, samples, 0.01, arguments)
        tiles = {(step["color"], step["next"]) for line in hops[1].read_text().splitlines() for step in asked(line)}
        assert len(cache.numbers) == names
        assert len(cache.features) == 4 + (len(tiles) if assistant_images == "image" else 0)
    with pytest.raises(ValueError, match="row: features can be kept of pictures that are files"):
        keep_features(model, collator, [SAMPLES[0] | {"origin": "row"}], 0.01, arguments)
    with pytest.raises(ValueError, match="GiB"):
        keep_features(model, DeepLatentCollator(processor, model.config, "latent"), samples, 1e-9, arguments)


def asked(line: str) -> list[dict]:
    row = json.loads(line)
    passed = row["serial"]["way"][1 : row["serial"]["num_steps"] + 1]
    return [thing for thing in row["objects"] if thing["color"] in passed]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": [-1]}, "whole numbers >= 0"),
        ({"stages": [0, 1], "chain_of_thought": "visual"}, "chain_of_thought"),
        ({"stages": [0, 1], "epochs_per_stage": [1, 2, 3]}, "one for each of 2 stages"),
        ({"stages": [0, 1], "num_train_epochs": 5}, "num_train_epochs"),
        ({"epochs_per_stage": [3]}, "belongs to `stages`"),
        ({"decay_last_stage": True, "lr_scheduler_type": "constant"}, "belong to `stages`"),
        ({"stages": [0, 1], "stage_accuracy": 0.9}, "held-out"),
    ],
)
def test_stages_that_cannot_be_are_refused(hops, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        train("sft1", *hops, tmp_path, **settings)


def test_a_picture_of_several_rows_is_decoded_once_and_hashed_as_before(hops, monkeypatch):
    opened = []
    read = trajectories.open_picture
    monkeypatch.setattr(trajectories, "open_picture", lambda image, name: opened.append(image) or read(image, name))
    # One thread: of several, two may come to the same picture at the same time, and each decode it.
    monkeypatch.setattr(trajectories, "ThreadPoolExecutor", partial(ThreadPoolExecutor, max_workers=1))
    data = Trajectories(hops[1])
    assert len(opened) == len(set(opened)) == 4 + 4 * 4
    samples = [data[number]["messages"] for number in range(len(data))]
    assert data.digests == [trajectories.digest_messages(messages) for messages in samples]
