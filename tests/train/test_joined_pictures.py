"""`--pictures joined`: one picture of the whole way in the place of one a step."""

import json

import numpy as np
import pytest
from PIL import Image

from train.data.tasks import generate_questions, generate_sample, write_dataset
from train.data.tasks.sample import join_pictures
from train.deeplatent.trajectories import Trajectories, count_steps


def test_pictures_stand_side_by_side_in_the_order_of_the_steps():
    for sample in generate_questions("hops", 0, 1, image_size=112, questions="steps"):
        joined = join_pictures(sample)
        assert joined.rationale == sample.rationale and joined.id == sample.id and joined.answer == sample.answer
        (whole,) = joined.assistant_images
        parts = [np.asarray(one) for one in sample.assistant_images]
        assert np.array_equal(np.asarray(whole), np.concatenate(parts, axis=1))
        assert joined.boxes == [(0, 0, 112, 112)]
        kinds = [item["type"] for item in joined.messages()[1]["content"]]
        assert kinds == ["text"] * len(parts) + ["image", "text"]
        assert len(sample.assistant_images) == len(parts)  # the sample itself is left as it was


def test_steps_without_pictures_stay():
    sample = generate_sample("chart_value", 0, 0)
    plain = [step._replace(image=None) for step in sample.steps]
    sample.steps = plain
    assert join_pictures(sample) is sample


def test_files(tmp_path):
    path = write_dataset("hops", 2, 0, tmp_path, image_size=112, questions="steps", pictures="joined")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 8
    for row in rows:
        (name,) = row["assistant_images"]
        assert Image.open(tmp_path / name).size == (56 * len(row["rationale"]), 56)
        assert count_steps(row["messages"]) == len(row["rationale"])
    assert len({row["assistant_images"][0] for row in rows}) == 8
    assert Trajectories(path).num_steps == [1, 2, 3, 4] * 2
    with pytest.raises(ValueError, match="`pictures` must be one of steps, joined; got 'none'"):
        write_dataset("hops", 2, 0, tmp_path / "x", image_size=112, pictures="none")
