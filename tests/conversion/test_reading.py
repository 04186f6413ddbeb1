"""JSON that others wrote: whatever is wrong with it is said with file and line, and a command ends with one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conversion.commands import exit_on_error
from conversion.reading import (
    check_config_file,
    check_model_folder,
    is_file,
    parse_json,
    read_json,
    read_json_lines,
    read_json_object,
)
from train.data.chats import read_trajectories
from train.data.reasoning_data import read_reasoning
from train.data.small_tokenizer import texts_of
from train.data.tasks.balance import read_rows
from train.data.tasks.gallery import write_gallery
from train.deeplatent.trajectories import open_rows
from train.lare.data import read_llava
from train.recipes.vision_pretraining import read_scenes


ROOT = Path(__file__).parents[2]
DEEP = b"[" * 200_000
READERS = {
    "chats": read_trajectories,
    "llava": read_llava,
    "reasoning": read_reasoning,
    "trajectories": lambda path: open_rows(path, "train"),
    "texts": texts_of,
    "balance": read_rows,
    "gallery": write_gallery,
    "scenes": read_scenes,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"a": ' + DEEP, "nested too deeply"),
        (b'{"a": "\xff"}', "no JSON: 'utf-8' codec"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b"{", "no JSON: Expecting property name"),
    ],
)
def test_every_reader_names_line_and_file(tmp_path, reader, line, reason):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=rf"(?s)Line 2 of .*data\.jsonl.*{reason}"):
        READERS[reader](path)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("row", [[], 5, None, {}, {"messages": [5]}, {"messages": [{"role": "user"}]}], ids=str)
def test_every_reader_names_a_row_that_it_cannot_use(tmp_path, reader, row):
    if reader == "trajectories" or (reader == "llava" and row == []):
        pytest.skip("rows are looked at later")
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"Line 1 of .*data\.jsonl"):
        READERS[reader](path)


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_names_a_file_that_is_not_there(tmp_path, reader):
    for name in ("none.jsonl", "x" * 3000, "\0"):
        with pytest.raises(ValueError, match="no (data )?file"):
            READERS[reader](tmp_path / name)


@pytest.mark.parametrize("read", [read_json, lambda path: list(read_json_lines(path))])
def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch, read):
    with pytest.raises(ValueError, match=r"There is no (data )?file .*none\.json"):
        read(tmp_path / "none.json")

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "closed.json").write_text("{}")
    monkeypatch.setattr(Path, "open", refuse)  # `read_bytes` opens so too; the superuser can read everything
    with pytest.raises(ValueError, match=r"closed\.json cannot be read: .*Permission denied"):
        read(tmp_path / "closed.json")


@pytest.mark.parametrize("name", ["x" * 3000, "\0", "nothing.png"])
def test_an_image_that_is_not_there_is_named(tmp_path, name):
    rows = {
        "chats": {"messages": [{"role": "user", "content": [{"type": "image", "image": name}]}]},
        "reasoning": {"image": name, "question": "a", "rationale": ["b"], "answer": "c"},
        "llava": {
            "image": name,
            "conversations": [{"from": "human", "value": "<image> a"}, {"from": "gpt", "value": "b"}],
        },
    }
    for reader, row in rows.items():
        (tmp_path / "data.jsonl").write_text(json.dumps(row))
        with pytest.raises(ValueError, match=r"Line 1 of .* does not exist"):
            READERS[reader](tmp_path / "data.jsonl")


def test_a_line_break_that_may_stand_in_a_text_ends_no_line(tmp_path):
    rows = [{"text": "a\u2028b"}, {"text": "🙂 \ud83d\ude42"}]
    (tmp_path / "data.jsonl").write_bytes(b'{"text": "a\xe2\x80\xa8b"}\r\n{"text": "\xf0\x9f\x99\x82 \\ud83d\\ude42"}')
    assert [row for _, row in read_json_lines(tmp_path / "data.jsonl")][0] == rows[0]
    assert [row for _, row in read_json_lines(tmp_path / "data.jsonl")][1] == {"text": "🙂 🙂"}
    assert parse_json(b'{"a": [1, "\\n"]}', "here") == {"a": [1, "\n"]}


@pytest.mark.parametrize("content", ["[]", "5", "null", '"x"', "{", ""])
def test_a_config_that_is_no_object_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    for function in (read_json_object, lambda path: check_config_file(path.parent)):
        with pytest.raises(ValueError, match=r"config\.json"):
            function(tmp_path / "config.json")
    check_config_file("owner/name")  # of a hub
    assert not is_file("x" * 3000)


@pytest.mark.parametrize(
    "error", [ValueError("a\nb"), OSError("c"), subprocess.CalledProcessError(3, "d"), ValueError("\ud800")]
)
def test_a_command_ends_with_one_line(capsys, error, monkeypatch):
    with pytest.raises(SystemExit) as ended, exit_on_error():
        raise error
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    monkeypatch.setenv("LATENTVLM_TRACEBACK", "1")
    with pytest.raises(type(error)), exit_on_error():
        raise error


def test_every_command_ends_its_errors_in_the_one_way():
    """`exit_on_error`, and not an error of its option parser, which says how all options are used."""
    folders = ("conversion", "evaluation", "train", "examples", "benchmarks", "docs")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    sources = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}
    commands = {name: source for name, source in sources.items() if '__name__ == "__main__"' in source}
    others = {
        "evaluation/worker_mathematics.py",
        "evaluation/harnesses/lmms_eval.py",
    }  # a worker, and a harness' own command
    assert len(commands) > 30 and others <= commands.keys()
    ends = re.compile(r"with exit_on_error\(\):|run_converter\(")
    assert [name for name, source in commands.items() if name not in others and not ends.search(source)] == []
    assert [name for name, source in sources.items() if re.search(r"error\(str\(|\"error: \{", source)] == [
        "conversion/commands.py"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "train.recipes.small_backbone --data none.jsonl --output out",
        "train.recipes.small_clip --data none.jsonl --output out",
        "train.recipes.vision_pretraining --model none --data none.jsonl",
        "train.data.tasks.balance --data none.jsonl",
        "train.data.tasks --task nothing --n 1 --output out",
        "train.decontaminate --train none.jsonl --test none.jsonl --vision_tower bad --output out.jsonl",
        "train.recipes.comparison --run none",
        "train.train_vedas --model_path bad --data_path none.jsonl --output_dir out",
        "train.train_lare --stage 2 --model_path bad --data_path none.jsonl --output_dir out",
        "train.train_deeplatent --stage sft1 --model_path bad --data_path none.jsonl --output_dir out",
        "train.train_deeplatent --stage rl --model_path bad --data_path none.jsonl --output_dir out",
        "train.cache_teacher_states --model bad --data none.jsonl --output out",
        "evaluation.faithfulness --model bad --data none.jsonl --output out",
        "evaluation.evaluate --model bad --data none.jsonl --output out",
        "evaluation.analyses.probing --model bad --data none.jsonl --output out",
        "train.deeplatent.rl.progress out",
        "conversion.convert_vedas --backbone bad --output out",
        "conversion.check bad",
        "conversion.refresh_code bad",
        "examples.ask bad none.png what",
        "examples.finetune bad none.jsonl out",
        "examples.lora bad none.jsonl out merged",
        "examples.demo --n 0",
        "examples.demo --checkpoints none",
    ],
)
def test_commands_end_bad_input_with_one_line(tmp_path, command):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("[]")
    path = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment = os.environ | path
    ended = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    assert len([line for line in ended.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "usage: " not in ended.stderr  # which would be several lines about options that are right


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("mine/none", "./none", "out/lare", "checkpoints/none", "a/b/c", str(tmp_path / "none"), "none"):
        with pytest.raises(ValueError, match=f"There is no folder {re.escape(name)}"):
            check_model_folder(name)
    for name in ("owner/name", "mine", "./mine", str(tmp_path / "mine"), tmp_path / "mine"):
        check_model_folder(name)
