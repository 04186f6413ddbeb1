"""Adapters: what they share, and each in its harness, where an environment variable names the harness' Python.

LATENTVLM_VLMEVAL_PYTHON and LATENTVLM_LMMS_EVAL_PYTHON are interpreters of environments with nvidia-vlmeval and lmms-eval.
"""

import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import picture
from evaluation_material import save_checkpoint, write_jsonl, write_lmms_task, write_tsv

from evaluation.harnesses.answerer import Answerer, as_conversation, cut, generation_settings
from evaluation.rows import read_evaluation


ROOT = Path(__file__).parent.parent


def harness(variable: str, *arguments, **environment) -> str:
    """Run a module in the environment of a harness; return what it printed."""
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no Python with the harness")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, "-m", *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint("lare", tmp_path_factory.mktemp("lare"))


def test_parts_become_a_chat_in_their_order(tmp_path):
    image = picture()
    image.save(tmp_path / "image.png")
    (message,) = as_conversation([("text", "this:"), ("image", str(tmp_path / "image.png")), ("image", image)])
    assert message["role"] == "user" and [item["type"] for item in message["content"]] == ["text", "image", "image"]
    assert message["content"][1]["image"].tobytes() == message["content"][2]["image"].tobytes() == image.tobytes()
    with pytest.raises(ValueError, match="type 'video'"):
        as_conversation([("video", "a.mp4")])
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="broken.png cannot be read"):
        as_conversation([("image", str(tmp_path / "broken.png"))])


def test_generation_settings_of_lmms_eval():
    given = {
        "until": ["\n\n", "END"],
        "max_new_tokens": 5,
        "temperature": 0,
        "top_p": None,
        "image_aspect_ratio": "original",
    }
    assert generation_settings(given) == ({"max_new_tokens": 5}, ["END"])
    sampled, ends = generation_settings({"temperature": 0.5, "top_p": 0.9, "until": "."})
    assert sampled == {"do_sample": True, "temperature": 0.5, "top_p": 0.9} and ends == ["."]
    with pytest.raises(ValueError, match="got also {'max_tokens': 3}"):
        generation_settings({"max_tokens": 3})
    assert cut("a. b END c", ["END", "b"]) == "a. " and cut("a", ["END"]) == "a"


def test_the_box_alone_is_handed_over_unless_reasoning_is_asked_for(checkpoint, monkeypatch):
    conversation = as_conversation([("image", picture(56, 56)), ("text", "what colour?")])
    plain = Answerer(str(checkpoint), batch_size=1, max_new_tokens=4)
    (free,) = plain.answer([conversation])
    assert plain.answer([conversation], max_new_tokens=2) != [free]
    direct = Answerer(str(checkpoint), direct=True, max_new_tokens=4, keep_reasoning=True)
    assert direct.answer([conversation])[0].startswith("The answer is \\boxed{")
    decode = plain.processor.batch_decode
    monkeypatch.setattr(plain.processor, "batch_decode", lambda *args, **kwargs: ["It is \\boxed{red}, so."])
    assert plain.answer([conversation]) == ["red"]
    plain.keep_reasoning = True
    assert plain.answer([conversation]) == ["It is \\boxed{red}, so."]
    monkeypatch.setattr(plain.processor, "batch_decode", decode)
    with pytest.raises(ValueError, match="`latents` must be on or off"):
        Answerer(str(checkpoint), latents="maybe")


@pytest.fixture
def lmms_eval_adapter(monkeypatch):
    """The adapter on stand-ins for what it takes from lmms-eval."""

    class Model:
        def __init__(self):
            self._rank, self._world_size = 0, 1
            self.task_dict, self.cache_hook = {}, SimpleNamespace(add_partial=lambda *args: None)

        rank = property(lambda self: self._rank)
        world_size = property(lambda self: self._world_size)

    names = {"api.instance": {"Instance": object}, "api.model": {"lmms": Model}, "models": {"MODEL_REGISTRY_V2": None}}
    names["models.registry_v2"] = {"ModelManifest": None}
    for name, values in names.items():
        monkeypatch.setitem(sys.modules, f"lmms_eval.{name}", SimpleNamespace(**values))
    monkeypatch.setitem(sys.modules, "lmms_eval", SimpleNamespace())
    monkeypatch.delitem(sys.modules, "evaluation.harnesses.lmms_eval", raising=False)
    yield importlib.import_module("evaluation.harnesses.lmms_eval")
    sys.modules.pop("evaluation.harnesses.lmms_eval", None)


def test_processes_of_lmms_eval_share_questions_and_have_a_gpu_each(lmms_eval_adapter, monkeypatch):
    asked = []
    monkeypatch.setattr(lmms_eval_adapter, "Answerer", lambda model, device=None, **settings: asked.append(device))
    alone = lmms_eval_adapter.LatentVLM("model")
    assert (alone.rank, alone.world_size, asked) == (0, 1, [None])
    second_machine = SimpleNamespace(process_index=5, local_process_index=1, num_processes=8)
    monkeypatch.setattr(lmms_eval_adapter, "Accelerator", lambda: second_machine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for device in (None, "cuda", "cuda:3", "cpu"):
        model = lmms_eval_adapter.LatentVLM("model", device=device)
        assert (model.rank, model.world_size, model.accelerator) == (5, 8, second_machine)
    assert asked[1:] == ["cuda:1", "cuda:1", "cuda:3", "cpu"]


def test_in_vlmevalkit(checkpoint, tmp_path):
    write_tsv(tmp_path / "data" / "local_choices.tsv", 4)
    output = harness(
        "LATENTVLM_VLMEVAL_PYTHON",
        *(
            "evaluation.harnesses.vlmevalkit",
            "--checkpoint",
            f"ours={checkpoint}",
            "--max_new_tokens",
            6,
            "--direct",
            "true",
        ),
        *("--keep_reasoning", "true", "--model", "ours", "--data", "local_choices", "--judge", "exact_matching"),
        *("--work-dir", tmp_path / "out"),
        LMUData=str(tmp_path / "data"),
        PRED_FORMAT="tsv",
    )
    assert "The evaluation of model ours x dataset local_choices has finished" in output
    (scores,) = (tmp_path / "out" / "ours").glob("T*/ours_local_choices_acc.csv")
    with scores.open() as file:
        (score,) = csv.DictReader(file)
    assert set(score) == {"split", "Overall", "far", "near"} and 0 <= float(score["Overall"]) <= 1


def test_in_lmms_eval(checkpoint, tmp_path):
    data = write_jsonl(tmp_path / "data")
    output = harness(
        "LATENTVLM_LMMS_EVAL_PYTHON",
        *("evaluation.harnesses.lmms_eval", "--model", "latentvlm", "--model_args", f"pretrained={checkpoint},seed=3"),
        *("--tasks", "local_questions", "--include_path", write_lmms_task(tmp_path / "tasks", data)),
        *("--batch_size", 3, "--output_path", tmp_path / "out", "--log_samples"),
        HF_HOME=str(tmp_path / "home"),
    )
    assert "local_questions" in output
    (samples,) = (tmp_path / "out").glob("*/*_samples_local_questions.jsonl")
    told = {row["doc_id"]: row["filtered_resps"] for row in map(json.loads, samples.read_text().splitlines())}
    rows = read_evaluation([data])
    conversations = [
        as_conversation([*(("image", image) for image in row.images), ("text", row.question)]) for row in rows
    ]
    here = Answerer(str(checkpoint), max_new_tokens=12).answer(conversations)
    assert [told[number] for number in range(len(rows))] == here
