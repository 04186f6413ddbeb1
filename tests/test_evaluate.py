"""The evaluation: every arm on every architecture, resuming, and several processes."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from evaluation_material import KINDS, save_checkpoint, write_jsonl, write_tsv
from huggingface_hub.errors import StrictDataclassError
from transformers.generation import LogitsProcessorList
from transformers.utils import cached_file

from conversion.writing import locked
from evaluation import answering, loading
from evaluation import evaluate_rows as evaluation
from evaluation.answering import ANSWER_PREFIX, AnswerSettings, answer_batch, decoding_of
from evaluation.answers import conversation_of, encode_conversations
from evaluation.evaluate import EvaluationArguments, evaluate
from evaluation.evaluate_rows import evaluate_rows
from evaluation.loading import hash_model, load_model, load_processor
from evaluation.processes import Processes
from evaluation.report import draw_table, summarize
from evaluation.results import bind
from evaluation.rows import read_evaluation
from evaluation.swapping import Swap, steps_of


ROOT = Path(__file__).parent.parent
OURS = ("deeplatent", "lare", "vedas")
SHORT = {"max_new_tokens": 8, "batch_size": 2}
OPENED = ["min_latent_blocks=1"]  # a random model would open few


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints")
    return {kind: save_checkpoint(kind, folder / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def loaded(folders) -> dict:
    return {kind: (load_model(str(folder)), load_processor(str(folder))) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    return [str(write_jsonl(folder / "mixed", 5)), str(write_tsv(folder / "demo.tsv", 2))]


@pytest.fixture(scope="module")
def rows(data) -> list:
    return read_evaluation(data)


def opened(kind: str) -> list[str]:
    return OPENED if kind == "deeplatent" else []


def texts(loaded, kind, rows, **settings) -> list[str]:
    settings = AnswerSettings(**(SHORT | {"generate": opened(kind)} | settings))
    return [record["text"] for record in evaluate_rows(*loaded[kind], rows, settings)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_answers_as_its_rows_do_alone(loaded, rows, kind):
    settings = {"max_new_tokens": 8, "generate": opened(kind)}
    together = evaluate_rows(*loaded[kind], rows, AnswerSettings(batch_size=4, **settings))
    alone = evaluate_rows(*loaded[kind], rows, AnswerSettings(batch_size=1, **settings))
    for record in (*together, *alone):
        assert record.pop("seconds") > 0
    assert together == alone
    assert [record["id"] for record in together] == ["q0", "q1", "q2", "q3", "q4", "0", "1"]
    blocks = {"deeplatent": 1, "lare": 3, "vedas": 2, "plain": 0}[kind]
    assert all((record["num_latents"] > 0) == (kind != "plain") for record in together)
    assert all(record["num_latent_blocks"] >= blocks for record in together)
    assert all(record["num_tokens"] + (kind == "deeplatent") <= 8 for record in together)


@pytest.mark.parametrize("kind", OURS)
def test_latents_off_is_the_model_without_them(loaded, rows, kind):
    model, processor = loaded[kind]
    before = model.config.to_dict()
    off = texts(loaded, kind, rows, latents="off", generate=[])
    assert model.config.to_dict() == before
    assert off != texts(loaded, kind, rows)
    if kind == "deeplatent":
        config = model.config  # its tokens, which the backbone knows nothing of, and a random one writes
        tokens = [config.latent_start_token_id, config.latent_pad_token_id, config.latent_end_token_id]
        assert off == texts(loaded, "plain", rows, generate=[f"suppress_tokens={tokens}"])


def of_one_task(rows) -> list:
    """The same questions as ones of a single task with three answers, so that all have donors."""
    return [replace(row, task="all", family="all") for row in rows]


@pytest.mark.parametrize("kind", OURS)
def test_replaced_latents_change_answers_and_noise_repeats_itself(loaded, rows, kind):
    rows = of_one_task(rows[:4])
    clean = texts(loaded, kind, rows)
    for intervention in ("zero", "noise", "swap"):
        changed = texts(loaded, kind, rows, latent_intervention=intervention)
        assert changed != clean and changed == texts(loaded, kind, rows, latent_intervention=intervention)


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("intervention", ["swap", "noise"])
def test_neither_batch_size_nor_order_change_what_is_drawn(loaded, rows, kind, intervention):
    rows = of_one_task(rows)

    def answers(rows, batch_size):
        settings = AnswerSettings(
            latent_intervention=intervention,
            max_new_tokens=6,
            batch_size=batch_size,
            generate=opened(kind),
            repeats=2,
        )
        records = evaluate_rows(*loaded[kind], rows, settings)
        return {(record["id"], record["repeat"]): record | {"seconds": 0} for record in records}

    expected = answers(rows, 7)
    assert answers(rows, 1) == expected and answers(rows, 32) == expected
    assert answers([rows[number] for number in (3, 0, 6, 5, 1, 4, 2)], 3) == expected
    if intervention == "swap":
        assert all(record["donor_id"] != record["id"] and not record["same_answer"] for record in expected.values())
    assert [expected[row.id, 0] for row in rows] != [expected[row.id, 1] | {"repeat": 0} for row in rows]


def test_another_seed_draws_other_donors_and_noise(loaded, rows):
    rows = of_one_task(rows)
    for intervention, name in (("swap", "donor_id"), ("noise", "text")):
        settings = [AnswerSettings(latent_intervention=intervention, seed=seed, **SHORT) for seed in (0, 1)]
        one, other = ([record[name] for record in evaluate_rows(*loaded["lare"], rows, each)] for each in settings)
        assert one != other


@pytest.mark.parametrize("kind", [*OURS, "autoregressive"])
def test_a_swap_gives_the_donors_latents_at_the_norm_of_ones_own(loaded, rows, kind, tmp_path):
    if kind == "autoregressive":
        folder = save_checkpoint("deeplatent", tmp_path / "model", latent_mode="autoregressive")
        model, processor = load_model(str(folder)), load_processor(str(folder))
    else:
        model, processor = loaded[kind]
    inputs = encode_conversations(processor, [conversation_of(row) for row in rows[:3]])
    wanted = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_latents": True}
    wanted |= {"min_latent_blocks": 1, "latent_grid": (1, 3)} if hasattr(model.config, "latent_mode") else {}
    trace = model.generate(**inputs, **wanted).latent_trace
    donors = {0: 1, 1: 2}  # the third row has none
    given = {row: steps_of(trace, donor) for row, donor in donors.items()}
    swap = Swap(given, model.config.shows_latents_one_by_one)
    swapped = model.generate(**inputs, **wanted, latent_intervention=swap).latent_trace
    for row, donor in donors.items():
        got, own, given = swapped.row(row)[0].latents, trace.row(row)[0].latents, trace.row(donor)[0].latents
        assert len(got) == len(own) == len(given)
        torch.testing.assert_close(torch.cosine_similarity(got, given), torch.ones(len(got)))
        # Those behind the first may follow from it, so that only the first one's norm is known.
        torch.testing.assert_close(got[0].norm(), own[0].norm())
        assert not torch.allclose(got[0], own[0])
    torch.testing.assert_close(swapped.row(2)[0].latents, trace.row(2)[0].latents)


def test_a_row_without_a_donor_keeps_its_latents_and_does_not_count(loaded, rows):
    """The first two ask for red and the other for a number: of one task, they lend to each other; the last has a task to itself."""
    model, processor = loaded["lare"]
    rows = [rows[0], replace(rows[3], id="again"), replace(rows[2], task="color"), replace(rows[1], task="alone")]
    clean = evaluate_rows(model, processor, rows, AnswerSettings(**SHORT))
    swapped = evaluate_rows(model, processor, rows, AnswerSettings(latent_intervention="swap", **SHORT))
    assert [record["not_swapped"] for record in clean] == [False] * 4
    assert [record["not_swapped"] for record in swapped] == [False, False, False, True]
    assert [record.get("donor_id") for record in swapped] == ["q2", "q2", swapped[2]["donor_id"], None]
    assert swapped[3]["text"] == clean[3]["text"] and swapped[0]["text"] != clean[0]["text"]
    summary = summarize(swapped)
    assert summary["all"]["rows"] == 3 and summary["all"]["not_swapped"] == 1
    assert "1 rows were not swapped and are not counted" in draw_table(summary)
    other = AnswerSettings(latent_intervention="swap", donors="other_task", **SHORT)
    found = evaluate_rows(model, processor, rows, other)
    assert [record["donor_task"] for record in found] == ["alone", "alone", "alone", "color"]


def test_a_row_that_alone_opens_a_block_has_no_donor(loaded, rows, monkeypatch):
    """DeepLatent opens blocks as it likes: here where it is asked about the second row, which so lends to all others."""
    model, processor = loaded["deeplatent"]
    start, generate, rows = model.config.latent_start_token_id, model.generate, of_one_task(rows[:3])
    second = encode_conversations(processor, [conversation_of(rows[1])])["input_ids"][0]

    def open_in_second(input_ids, scores):
        asked = torch.tensor([second.tolist() == row[-len(second) - 1 :][: len(second)].tolist() for row in input_ids])
        asked |= torch.tensor([second.tolist() == row[-len(second) :].tolist() for row in input_ids])
        scores[:, start] = -float("inf")
        scores[asked & ~(input_ids == start).any(dim=1)] = -float("inf")
        scores[asked & ~(input_ids == start).any(dim=1), start] = 0
        return scores

    monkeypatch.setattr(
        model, "generate", lambda **wanted: generate(**wanted, logits_processor=LogitsProcessorList([open_in_second]))
    )
    settings = AnswerSettings(latent_intervention="swap", max_new_tokens=8, batch_size=3)
    records = evaluate_rows(model, processor, rows, settings)
    assert [record["num_latent_blocks"] for record in records] == [0, 1, 0]
    assert [record["not_swapped"] for record in records] == [False, True, False]
    assert [record.get("donor_id") for record in records] == ["q1", None, "q1"]
    found = summarize(records)["all"]
    assert found["accuracy_without_latents"]["answers"] == 2 and "swapped" not in found  # neither had anything to swap
    for record in records:
        del record["not_swapped"]  # as earlier versions wrote them
    assert summarize(records)["all"]["not_swapped"] == 0


def test_a_swap_without_donors_at_hand_is_refused(loaded, rows):
    settings = AnswerSettings(latent_intervention="swap", **SHORT)
    with pytest.raises(ValueError, match="needs `lent`, the latents of a donor for each of 2 conversations, got None"):
        answer_batch(*loaded["lare"], [conversation_of(row) for row in rows[:2]], settings)


@pytest.mark.parametrize("kind", KINDS)
def test_a_temperature_samples_and_a_seed_repeats_it(loaded, rows, kind, monkeypatch):
    """The papers' decoding reaches `generate`, and what is drawn follows from the seed alone."""
    model, seen = loaded[kind][0], []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **wanted: seen.append(wanted) or generate(**wanted))
    papers = [*opened(kind), "temperature=0.5", "top_p=0.5", "top_k=5"]
    first = texts(loaded, kind, rows, generate=papers)
    assert all(wanted["do_sample"] and wanted["top_p"] == 0.5 and wanted["top_k"] == 5 for wanted in seen)
    wild = [*opened(kind), "temperature=5.0", "top_k=0"]
    assert first == texts(loaded, kind, rows, generate=papers)
    drawn = texts(loaded, kind, rows, generate=wild)
    assert drawn == texts(loaded, kind, rows, generate=wild) != texts(loaded, kind, rows, generate=wild, seed=100)
    greedy = texts(loaded, kind, rows)
    assert drawn != greedy == texts(loaded, kind, rows, generate=[*opened(kind), "top_k=1"])
    assert greedy == texts(loaded, kind, rows, generate=[*opened(kind), "temperature=0"])
    assert not seen[-1]["do_sample"] and "temperature" not in seen[-1]


def test_repeats_ask_anew_and_survive_a_kill(folders, data, tmp_path, monkeypatch):
    settings = AnswerSettings(generate=["temperature=5.0", "top_k=0"], repeats=3, **SHORT)
    summary = evaluate(arguments(folders, data, tmp_path / "whole"), settings)
    records = results_of(tmp_path / "whole")
    assert [record["repeat"] for record in records] == [0] * 7 + [1] * 7 + [2] * 7
    answers = [[record["text"] for record in records if record["repeat"] == repeat] for repeat in range(3)]
    assert answers[0] != answers[1] != answers[2] != answers[0]
    once = evaluate(arguments(folders, data, tmp_path / "once"), replace(settings, repeats=1))
    assert [record["text"] for record in results_of(tmp_path / "once")] == answers[0]
    assert summary["all"]["rows"] == once["all"]["rows"] == 7 and summary["all"]["repeats"] == 3
    ask, asked = evaluation.ask, []

    def die_in_the_second_repeat(*args):
        asked.append(args)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return ask(*args)

    monkeypatch.setattr(evaluation, "ask", die_in_the_second_repeat)
    with pytest.raises(KeyboardInterrupt):
        evaluate(arguments(folders, data, tmp_path / "broken"), settings)
    resumed = evaluate(arguments(folders, data, tmp_path / "broken"), settings)
    assert results_of(tmp_path / "broken") == records and len(asked) == 12 + 1
    assert resumed["all"]["accuracy"] == summary["all"]["accuracy"]


def test_a_harness_that_asks_for_a_decoding_is_stronger_than_the_settings():
    settings = AnswerSettings(generate=["temperature=0.5", "top_k=5"], max_new_tokens=9)
    asked = {"temperature": 0.9, "max_new_tokens": 3}
    assert decoding_of(settings, asked) == {"do_sample": True, "temperature": 0.9, "top_k": 5, "max_new_tokens": 3}
    assert decoding_of(settings, {}) == {"do_sample": True, "temperature": 0.5, "top_k": 5, "max_new_tokens": 9}


def test_repeats_are_no_further_questions():
    """The interval is that of the questions; the spread is that of the repeats."""
    counts = {"num_tokens": 1, "num_latent_blocks": 0, "num_latents": 0, "stop_reason": "eos", "seconds": 1.0}
    names = {"family": "f", "task": "t", "data": "d"}
    right = [[True, True, False, False], [True, False, False, False]]
    once = [{**names, **counts, "correct": correct} for correct in (True, True, False, False)]
    records = [
        {**names, **counts, "correct": correct, "repeat": repeat} for repeat in range(2) for correct in right[repeat]
    ]
    found = summarize(records)["all"]
    assert (found["rows"], found["correct"], found["repeats"], found["accuracy"]) == (4, 3, 2, 0.375)
    assert found["accuracy_std"] == pytest.approx(0.1767767)
    width = found["accuracy_high"] - found["accuracy_low"]
    assert width == pytest.approx(0.7, abs=0.1)  # of 4 questions, and not of 8
    assert "asked 2 times" in draw_table(summarize(records)) and "repeats" not in summarize(once)["all"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_direct_answer_begins_behind_the_latents(loaded, rows, kind):
    settings = AnswerSettings(direct=True, **(SHORT | {"generate": opened(kind)}))
    answers = answer_batch(*loaded[kind], [conversation_of(row) for row in rows[:3]], settings)
    assert all(answer.text.startswith(ANSWER_PREFIX) for answer in answers)
    assert all((answer.num_latents > 0) == (kind != "plain") for answer in answers)
    assert len({answer.text for answer in answers}) > 1


def test_a_direct_answer_ends_with_its_box(loaded, rows, monkeypatch):
    model, processor = loaded["plain"]
    conversation, decode = conversation_of(rows[0]), processor.batch_decode
    settings = AnswerSettings(direct=True, max_new_tokens=8)
    (open_ended,) = answer_batch(model, processor, [conversation], settings)

    def with_a_brace(tokens, **kwargs):  # as if the third token behind the prefix closed the box
        texts = decode(tokens, **kwargs)
        length = len(processor.tokenizer(ANSWER_PREFIX)["input_ids"])
        return [ANSWER_PREFIX + "red}" if len(row) >= length + 3 else text for row, text in zip(tokens, texts)]

    monkeypatch.setattr(processor, "batch_decode", with_a_brace)
    (closed,) = answer_batch(model, processor, [conversation], settings)
    assert closed.text == ANSWER_PREFIX + "red}" and closed.stop_reason == "stopping_criteria"
    assert closed.num_tokens == open_ended.num_tokens - 5


def test_config_fields_hold_for_the_arm_alone(loaded, rows):
    model, processor = loaded["lare"]
    (record,) = evaluate_rows(model, processor, rows[:1], AnswerSettings(set=["num_refocus_steps=5"], **SHORT))
    assert record["num_latent_blocks"] == 5 and model.config.num_refocus_steps == 3


@pytest.mark.parametrize(
    ("kind", "field", "message"),
    [
        ("lare", "num_refocus_steps=-1", "num_refocus_steps"),
        ("lare", "num_refocus_steps=two", "num_refocus_steps"),
        ("vedas", "num_latent_steps=-1", "num_latent_steps"),
        ("deeplatent", "latent_grid_size=0", "latent_grid_size"),
    ],
)
def test_config_fields_are_held_to_the_config_before_anything_is_asked(
    loaded, folders, data, kind, field, message, tmp_path
):
    model, processor = loaded[kind]
    before = model.config.to_dict()
    with pytest.raises(StrictDataclassError, match=message):
        evaluate_rows(model, processor, [], AnswerSettings(set=[field]))
    assert model.config.to_dict() == before
    with pytest.raises(StrictDataclassError, match=message):
        evaluate(arguments(folders, data, tmp_path / "out", model=str(folders[kind])), AnswerSettings(set=[field]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latents": "no"}, "`latents` must be on or off, got 'no'"),
        ({"latent_intervention": "blur"}, "`latent_intervention` must be a callable or one of .*got 'blur'"),
        ({"latents": "off", "latent_intervention": "zero"}, "leaves none to change"),
        ({"latent_intervention": "swap", "donors": "near"}, "`donors` must be one of .*got 'near'"),
        (
            {"latent_intervention": "zero", "donors": "question"},
            "`donors` belong to `latent_intervention=swap`, .*'zero'",
        ),
        ({"latent_intervention": "zero", "repeats": 2}, "greedy answers are all the same"),
        ({"batch_size": 0}, "`batch_size` must be >= 1"),
        ({"generate": ["do_sample=true"]}, r"cannot give \['do_sample'\]"),
        ({"repeats": 0, "generate": ["temperature=1"]}, "`repeats` must be >= 1"),
        ({"repeats": 2}, "`repeats` is 2, but greedy answers are all the same"),
        ({"repeats": 2, "generate": ["temperature=0"]}, "greedy answers are all the same"),
        ({"generate": ["temperature=0", "top_p=0.5"]}, r"gives \['top_p'\], which mean nothing at temperature=0"),
        ({"generate": ["temperature=warm"]}, "numbers >= 0 for sampling, got {'temperature': 'warm'}"),
        ({"generate": ["top_p=-1"]}, "numbers >= 0 for sampling"),
        ({"generate": ["num_beams=2", "num_return_sequences=2"]}, r"cannot give \['num_return_sequences'\]"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        AnswerSettings(**settings)


def test_a_plain_model_has_no_latents_to_change(loaded, rows):
    for settings in ({"latents": "off"}, {"latent_intervention": "zero"}):
        with pytest.raises(ValueError, match="need a model with latents.*'qwen2_5_vl'"):
            evaluate_rows(*loaded["plain"], rows, AnswerSettings(**settings))
    with pytest.raises(ValueError, match=r"`set` names \['nonsense'\]"):
        evaluate_rows(*loaded["plain"], rows, AnswerSettings(set=["nonsense=1"]))


@pytest.mark.parametrize("name", ["step_limit", "to_dict"])
def test_methods_and_properties_of_a_config_are_not_set(loaded, rows, name):
    model, processor = loaded["lare"]
    assert hasattr(model.config, name)
    with pytest.raises(ValueError, match=rf"`set` names \['{name}'\]"):
        evaluate_rows(model, processor, rows, AnswerSettings(set=[f"{name}=0"]))


def test_whole_numbers_are_floats_where_a_field_is_one(loaded):
    """Which a strict config would refuse otherwise, and which says the same as in training."""
    model, _ = loaded["lare"]
    settings = AnswerSettings(set=["stop_threshold=1"])
    answering.check_settings(model, settings)
    with answering.changed_config(model, settings):
        assert type(model.config.stop_threshold) is float and model.config.stop_threshold == 1


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("lare", {"set": ["num_refocus_steps=8"]}, "takes no latents, but `num_refocus_steps` is set to 8"),
        ("deeplatent", {"generate": ["max_latent_blocks=2"]}, "takes no latents, but `max_latent_blocks` is set to 2"),
    ],
)
def test_latents_are_not_off_and_set_at_once(loaded, rows, kind, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate_rows(*loaded[kind], rows, AnswerSettings(latents="off", **SHORT, **settings))


def test_a_swap_knows_no_beams(loaded, rows):
    settings = AnswerSettings(latent_intervention="swap", generate=["num_beams=2"], **SHORT)
    with pytest.raises(ValueError, match="is done without beams, but `num_beams` is 2"):
        evaluate_rows(*loaded["lare"], rows[:2], settings)


def arguments(folders, data, output, **changes) -> EvaluationArguments:
    return EvaluationArguments(**({"model": str(folders["lare"]), "data": data, "output": output} | changes))


def results_of(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def test_a_killed_run_goes_on_and_ends_as_an_unbroken_one(folders, data, tmp_path, monkeypatch, capsys):
    settings = AnswerSettings(latent_intervention="noise", **SHORT)
    whole = evaluate(arguments(folders, data, tmp_path / "whole"), settings)
    ask, asked = evaluation.ask, []

    def die_at_the_third(*args):
        asked.append([row.id for row in args[2]])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return ask(*args)

    monkeypatch.setattr(evaluation, "ask", die_at_the_third)
    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        evaluate(arguments(folders, data, broken), settings)
    part = broken / "results.rank0.jsonl"
    assert len(part.read_bytes().splitlines()) == 4
    part.write_bytes(part.read_bytes()[:-20])  # as if killed while it wrote the last line
    summary = evaluate(arguments(folders, data, broken), settings)
    assert "results.rank0.jsonl: the last line was cut off" in capsys.readouterr().out
    assert asked[3:] == [["q2", "q3"], ["q4", "0"], ["1"]]  # the batch of the row that was lost, and what was left
    assert results_of(broken) == results_of(tmp_path / "whole")
    assert summary["all"]["rows"] == whole["all"]["rows"] == 7
    assert json.loads((broken / "summary.json").read_text()) == summary
    evaluate(arguments(folders, data, broken), settings)
    assert len(asked) == 6  # a finished run asks nothing


def test_a_resume_against_something_else_is_refused(folders, tmp_path):
    data = [str(write_jsonl(tmp_path / "mixed", 3)), str(write_tsv(tmp_path / "demo.tsv", 2))]
    model, output = tmp_path / "model", tmp_path / "out"
    shutil.copytree(folders["lare"], model)
    settings = AnswerSettings(**SHORT)

    def run(settings=settings, **changes):
        return evaluate(arguments(folders, data, output, model=str(model), **changes), settings)

    run()
    before = (output / "results.jsonl").read_bytes()
    with pytest.raises(ValueError, match="setting `max_new_tokens`: 8 then, 9 now"):
        run(AnswerSettings(max_new_tokens=9, batch_size=2))
    with pytest.raises(ValueError, match="setting `limit`: None then, 1 now"):
        run(limit=1)
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-4] + bytes(4))
    with pytest.raises(ValueError, match="model `model.safetensors`: "):
        run()
    (model / "model.safetensors").write_bytes(weights)
    shutil.copy(tmp_path / "mixed" / "0.png", tmp_path / "mixed" / "2.png")
    with pytest.raises(ValueError, match="data `.*mixed/data.jsonl`: 3 rows, [0-9a-f]+ then, 3 rows, [0-9a-f]+ now"):
        run()
    write_jsonl(tmp_path / "mixed", 3)
    run()
    assert (output / "results.jsonl").read_bytes() == before
    (output / "results.jsonl").write_bytes(b"{}\n" + before)
    with pytest.raises(ValueError, match="Line 1 of .*results.jsonl is no result"):
        run()


def test_processes_have_a_gpu_each_unless_one_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for wanted, expected in ((None, "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")):
        assert Processes(1, 2).device(wanted) == expected
    assert Processes().device("cuda") == "cuda" and Processes().device() is None


def test_the_vocabulary_is_part_of_the_model(tmp_path):
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / name).write_text("{}")
    assert set(hash_model(str(tmp_path))) == {"config.json", "tokenizer.model"}


def test_a_model_of_a_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    """As the Hub's cache lays it out; transformers has stopped keeping the commit on the config."""
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "models--me--tiny" / "refs").mkdir()
    (tmp_path / "models--me--tiny" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(loading, "cached_file", partial(cached_file, cache_dir=tmp_path))
    assert hash_model("me/tiny") == {"commit": "a" * 40}
    with pytest.raises(ValueError, match="must be a folder or the name of a model on a hub, got 'me/none'"):
        hash_model("me/none")


def test_two_evaluations_do_not_share_a_folder(folders, data, tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="Another process writes"):
        evaluate(arguments(folders, data, tmp_path), AnswerSettings(**SHORT))


def test_every_process_takes_its_batches_and_what_is_finished_is_not_written_again(loaded, rows):
    settings, written = AnswerSettings(**SHORT), []
    shares = [evaluate_rows(*loaded["plain"], rows, settings, processes=Processes(rank, 2)) for rank in range(2)]
    assert [[record["id"] for record in share] for share in shares] == [["q0", "q1", "q4", "0"], ["q2", "q3", "1"]]
    finished = {rows[number].key: {"id": "known"} for number in (0, 2, 3, 6)}
    records = evaluate_rows(*loaded["plain"], rows, settings, finished, written.append)
    assert [[record["id"] for record in batch] for batch in written] == [["q1"], ["q4", "0"]]
    assert [record["id"] for record in records] == ["known", "q1", "known", "known", "q4", "0", "known"]


def test_a_run_without_a_finished_row_binds_nothing(tmp_path):
    bind(tmp_path, {"setting": {"seed": 0}})
    (tmp_path / "results.jsonl").touch()
    bind(tmp_path, {"setting": {"seed": 1}})
    (tmp_path / "results.rank3.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="setting `seed`: 1 then, 2 now"):
        bind(tmp_path, {"setting": {"seed": 2}})
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match="holds results, but no run.json"):
        bind(tmp_path, {"setting": {"seed": 1}})


def test_two_processes_find_what_one_finds(folders, data, tmp_path):
    settings = AnswerSettings(latent_intervention="noise", **SHORT)
    evaluate(arguments(folders, data, tmp_path / "one"), settings)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m"]
    command += ["evaluation.evaluate", "--model", folders["lare"], "--data", *data, "--output", tmp_path / "two"]
    command += ["--latent_intervention", "noise", "--max_new_tokens", "8", "--batch_size", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert results_of(tmp_path / "two") == results_of(tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "two").glob("*.json*")) == [
        "results.jsonl",
        "run.json",
        "summary.json",
    ]
    assert done.stdout.count("95 % interval") == 1 and "demo/near" in done.stdout
