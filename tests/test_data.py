"""Trajectories to batches: labels, what becomes of assistant pictures, and bad lines."""

import json

import pytest
import torch
from conftest import picture, user_turn

from train.common.chat_collator import TrajectoryCollator
from train.data.chats import fit_grid, read_trajectories
from train.lare.data import RefocusingChatCollator


@pytest.fixture(scope="module")
def trajectory() -> dict:
    content = [
        {"type": "text", "text": "I look closer."},
        {"type": "image", "image": picture(84, 56, 5)},
        {"type": "text", "text": "It is red."},
    ]
    return {"messages": [*user_turn("what colour?", picture(56, 84, 1)), {"role": "assistant", "content": content}]}


def test_labels_are_the_assistants_turn(processor, trajectory):
    batch = TrajectoryCollator(processor, "drop")(
        [trajectory, {"messages": [*user_turn("hi"), {"role": "assistant", "content": "you"}]}]
    )
    learned = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert learned == ["I look closer.It is red.<|im_end|>", "you<|im_end|>"]
    kept = batch["labels"] != -100
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])


def test_assistant_pictures_become_blocks(processor, trajectory, shared_model):
    batch = TrajectoryCollator(processor, "latent", 4)([trajectory])
    assert batch["latent_grid_hw"].tolist() == [[2, 3]]
    assert batch["image_grid_thw"].tolist() == [[1, 6, 4]]  # the question's picture alone
    assert torch.isfinite(shared_model(**batch).loss)


def test_assistant_pictures_stay_or_go(processor, trajectory):
    assert len(TrajectoryCollator(processor, "image")([trajectory])["image_grid_thw"]) == 2
    dropped = TrajectoryCollator(processor, "drop")([trajectory])
    assert len(dropped["image_grid_thw"]) == 1 and "latent_grid_hw" not in dropped
    with pytest.raises(ValueError, match="assistant_images"):
        TrajectoryCollator(processor, "keep")


def test_grids_keep_their_aspect_within_the_largest():
    assert fit_grid(84, 56, 16) == (2, 3)
    assert fit_grid(28 * 40, 28 * 20, 16) == (8, 16)
    assert fit_grid(5000, 28, 16) == (1, 16)
    assert fit_grid(3, 3, 16) == (1, 1)


def test_what_no_model_could_learn_from_is_refused(processor, tmp_path):
    """A chat without messages, one that nobody answers, and two answers where steps are taken before one."""
    (tmp_path / "data.jsonl").write_text('{"messages": []}')
    with pytest.raises(ValueError, match=r"Line 1 of .*data\.jsonl holds no message"):
        read_trajectories(tmp_path / "data.jsonl")
    with pytest.raises(ValueError, match=r"Line 3 of x\.jsonl holds no assistant turn to learn from"):
        RefocusingChatCollator(processor)([{"messages": user_turn("hi"), "origin": "Line 3 of x.jsonl"}])
    twice = [*user_turn("hi"), {"role": "assistant", "content": "you"}] * 2
    with pytest.raises(ValueError, match="Row 0 of the batch has 2 assistant turns"):
        TrajectoryCollator(processor, "drop", num_steps=2)([{"messages": twice}])


def test_a_batch_without_an_assistant_turn_raises(processor):
    with pytest.raises(ValueError, match=r"Rows \[0\]"):
        TrajectoryCollator(processor)([{"messages": user_turn("hi")}])


def test_reading_makes_paths_absolute_and_names_bad_lines(tmp_path):
    picture().save(tmp_path / "p.png")
    good = {"messages": [{"role": "user", "content": [{"type": "image", "image": "p.png"}]}]}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(good) + "\n")
    (sample,) = read_trajectories(path)
    assert sample["messages"][0]["content"][0]["image"] == str(tmp_path / "p.png")
    missing = {"messages": [{"role": "user", "content": [{"type": "image", "image": "q.png"}]}]}
    for line, message in (
        ("{", "Line 2 .* no JSON"),
        ("[]", "Line 2 .*messages"),
        (json.dumps(missing), "Line 2 .*q.png"),
    ):
        path.write_text(json.dumps(good) + "\n" + line)
        with pytest.raises(ValueError, match=message):
            read_trajectories(path)


def test_a_line_ends_where_the_file_says(tmp_path):
    text = "one\u2028two\x85three"
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": text}]}, ensure_ascii=False) + "\n\n")
    assert [sample["messages"][0]["content"] for sample in read_trajectories(path)] == [text]


def test_rows_that_would_fetch_or_open_something_else_are_refused(tmp_path):
    """transformers reads a picture from `image`, `url`, `path` or `base64`, from an `image_url`, and videos: whatever a row says."""
    picture().save(tmp_path / "p.png")
    answer = {"role": "assistant", "content": "red"}
    secret = str(tmp_path / "secret.png")
    items = [
        {"type": "image", "url": "http://127.0.0.1:9/x.png"},
        {"type": "image", "path": secret},
        {"type": "image", "base64": "aaaa"},
        {"type": "image", "image": "p.png", "url": "http://127.0.0.1:9/x.png"},
        {"type": "image"},
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}},
        {"type": "video", "video": secret},
        {"type": "audio", "path": secret},
        {"type": ["image"], "image": "p.png"},
        {"image": "p.png"},
        {"type": "text", "text": "a", "path": secret},
        {"type": "latent", "grid": [1, 1], "path": secret},
        "red",
        None,
    ]
    for item in items:
        path = tmp_path / "data.jsonl"
        good = {"messages": [*user_turn("q"), answer]}
        path.write_text(
            "\n".join(json.dumps(row) for row in (good, {"messages": [{"role": "user", "content": [item]}, answer]}))
        )
        with pytest.raises(ValueError, match=r"Line 2 of .*message 0: an item of `content` must be \{type: text"):
            read_trajectories(path)
    for wrong in (
        "hi",
        {"content": "a"},
        {"role": "user"},
        {"role": "user", "content": 5},
        {"role": 5, "content": "a"},
    ):
        path.write_text(json.dumps({"messages": [wrong]}))
        with pytest.raises(ValueError, match="Line 1 of .*message 0 must have a `role` and a `content`"):
            read_trajectories(path)
    path.write_text(
        json.dumps(
            {"messages": user_turn("q") + [{"role": "user", "content": [{"type": "image", "image": "http://h/x"}]}]}
        )
    )
    with pytest.raises(ValueError, match="Line 1 of .*names an address, but nothing is fetched"):
        read_trajectories(path)
    path.write_text(
        json.dumps({"messages": [{"role": "user", "content": [{"type": "image", "image": "p.png"}]}, answer]})
    )
    assert read_trajectories(path)[0]["messages"][0]["content"][0]["image"] == str(tmp_path / "p.png")
