"""Interventions that name which latents they act on, in `generate`, in `forward` and in the evaluation, on every architecture."""

import pytest
import test_lare
import test_vedas
import torch
from conftest import CHAT_TEMPLATE, build_model, build_tokenizer, encode
from helpers import GREEDY, open_at, step_logits
from toy_subject import ToyModel, ToyProcessor, toy_rows

from evaluation.answering import AnswerSettings
from evaluation.evaluate_rows import evaluate_rows
from evaluation.report import draw_table, summarize
from evaluation.swapping import Swap
from modeling_latentvlm import interventions
from modeling_latentvlm.interventions import (
    ChangeAt,
    check_reached,
    intervene,
    parse_intervention,
    prepare_intervention,
)
from modeling_latentvlm.trace import LatentStep
from processing_latentvlm import VedasProcessor
from processing_latentvlm.processing_vedas import LATENT_TOKEN


pytestmark = pytest.mark.core

TRACED = GREEDY | {"output_latents": True}
THREE = {"min_latent_blocks": 3, "max_latent_blocks": 3, "latent_grid": (2, 2)}


@pytest.fixture(scope="module")
def cases(tokenizer, batch, image_processor) -> dict:
    """By kind (model, inputs of two rows, settings, latents a step), each with three steps or blocks."""
    two = {name: values[:2] for name, values in batch.items() if name in ("input_ids", "attention_mask")}
    images = 3  # of the first two rows
    two |= {"image_grid_thw": batch["image_grid_thw"][:images]}
    two |= {"pixel_values": batch["pixel_values"][: int(two["image_grid_thw"].prod(dim=1).sum())]}
    vedas_tokens = build_tokenizer((LATENT_TOKEN,))
    processor = VedasProcessor(image_processor, vedas_tokens, chat_template=CHAT_TEMPLATE)
    shown = [test_vedas.user_turn("where is it?", test_vedas.picture(56, 84, seed)) for seed in (1, 2)]
    lare = test_lare.encode([test_lare.prompt([5, 6], "image", [7, 8]), test_lare.prompt("image", [9])])
    blocks = build_model(tokenizer)
    three = TRACED | THREE | {"suppress_tokens": [blocks.config.image_token_id]}
    lines = build_model(tokenizer, latent_mode="autoregressive")
    return {
        "deeplatent": (blocks, two, three, 4),
        "autoregressive": (lines, two, three | {"latent_grid": (1, 4)}, 4),
        "vedas": (test_vedas.build(vedas_tokens, num_latent_steps=3), encode(processor, shown), TRACED, 1),
        "lare": (test_lare.build(), lare, TRACED, 3),
    }


def latents_of(output) -> dict:
    return {(step.row, step.index): step.latents for step in output.latent_trace.steps}


def forward(model, inputs, output, **settings):
    """The logits that predict each generated token, from one forward with labels."""
    length = inputs["input_ids"].shape[1]
    ids = output.sequences[:, :-1]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, length:])], dim=1)
    if model.config.model_type == "deeplatent":
        settings["latent_grid_hw"] = output.latent_grid_hw
    labels = ids.clone()
    labels[:, :length] = -100
    shown = {name: values for name, values in inputs.items() if name.startswith(("pixel", "image_grid"))}
    return model(ids, attention_mask=mask, labels=labels, **shown, **settings).logits[:, length - 1 :]


@pytest.mark.parametrize("kind", ["deeplatent", "autoregressive", "vedas", "lare"])
def test_a_named_step_alone_is_changed(cases, kind):
    """In `generate`, and in `forward` with labels, which gives the same logits."""
    model, inputs, settings, count = cases[kind]
    clean = latents_of(model.generate(**inputs, **settings))
    assert {index for _, index in clean} == {0, 1, 2} and all(len(values) == count for values in clean.values())
    output = model.generate(**inputs, latent_intervention="zero:1", **settings)
    changed = latents_of(output)
    for row in (0, 1):
        assert torch.equal(changed[row, 0], clean[row, 0])
        assert not changed[row, 1].any()
        # The step after it is the model's own, made with the changed one before it.
        assert changed[row, 2].any() and not torch.allclose(changed[row, 2], clean[row, 2], atol=1e-4)
    given = forward(model, inputs, output, latent_intervention="zero:1")
    torch.testing.assert_close(given, step_logits(output), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(forward(model, inputs, output), step_logits(output), atol=1e-3)
    several = latents_of(model.generate(**inputs, latent_intervention="zero:0, 2", **settings))
    assert not several[0, 0].any() and several[0, 1].any() and not several[0, 2].any()


@pytest.mark.parametrize("kind", ["deeplatent", "autoregressive", "lare"])
def test_a_latent_in_a_step_can_be_named(cases, kind):
    """By its place in the grid, or (autoregressive) by when it comes."""
    model, inputs, settings, count = cases[kind]
    clean = latents_of(model.generate(**inputs, **settings))
    changed = latents_of(model.generate(**inputs, latent_intervention="zero:1.2", **settings))
    for row in (0, 1):
        assert torch.equal(changed[row, 0], clean[row, 0])
        assert not changed[row, 1][2].any() and changed[row, 1][0].any() and changed[row, 1][1].any()
        assert torch.equal(changed[row, 1][:2], clean[row, 1][:2])
        if kind != "autoregressive":  # there later latents of the block follow from the changed one
            assert torch.equal(changed[row, 1][3:], clean[row, 1][3:])
    with pytest.raises(
        ValueError, match=rf"'zero:1.{count}'` acts on latent {count} of block or step 1, counted from 0"
    ):
        model.generate(**inputs, latent_intervention=f"zero:1.{count}", **settings)


@pytest.mark.parametrize("kind", ["deeplatent", "autoregressive", "vedas", "lare"])
def test_swap_of_one_step_takes_the_other_rows(cases, kind):
    model, inputs, settings, _ = cases[kind]
    clean = latents_of(model.generate(**inputs, **settings))
    changed = latents_of(model.generate(**inputs, latent_intervention="swap:1", **settings))
    for row in (0, 1):
        assert torch.equal(changed[row, 0], clean[row, 0])
        if kind != "autoregressive":  # its latents follow from each other, also those of the donor
            torch.testing.assert_close(changed[row, 1], clean[1 - row, 1], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(changed[row, 1], clean[row, 1], atol=1e-3)


@pytest.mark.parametrize("kind", ["deeplatent", "autoregressive", "vedas", "lare"])
def test_a_step_that_no_row_takes_is_refused(cases, kind):
    model, inputs, settings, _ = cases[kind]
    message = (
        r"'zero:3'` acts on block or step 3, counted from 0, which no row has: at most 3 blocks or steps were taken"
    )
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, latent_intervention="zero:3", **settings)
    output = model.generate(**inputs, **settings)
    with pytest.raises(ValueError, match=message):
        forward(model, inputs, output, latent_intervention="zero:3")
    with pytest.raises(ValueError, match="'zero:1,7'` acts on block or step 7"):
        model.generate(**inputs, latent_intervention="zero:1,7", **settings)


def test_without_any_block_a_named_one_is_refused(cases):
    model, inputs, settings, _ = cases["deeplatent"]
    shown = {name: values for name, values in inputs.items() if name != "attention_mask"}
    with pytest.raises(ValueError, match="which no row has: at most 0 blocks"):
        model(**shown, latent_intervention="zero:0")
    model(**shown, latent_intervention="zero")  # all latents of none: as before
    none = GREEDY | {"max_latent_blocks": 0}
    with pytest.raises(ValueError, match="which no row has: at most 0 blocks"):
        model.generate(**inputs, latent_intervention="zero:0", **none)


def test_rows_without_the_step_keep_what_they_have_and_are_counted(cases, monkeypatch):
    """Row 0 opens two blocks, row 1 one."""
    model, inputs, settings, _ = cases["deeplatent"]
    settings = TRACED | {"logits_processor": open_at(model, inputs, [[0, 2], [0]]), "latent_grid": (2, 2)}
    clean = latents_of(model.generate(**inputs, **settings))
    logged = []
    monkeypatch.setattr(interventions.logger, "warning_once", logged.append)
    changed = latents_of(model.generate(**inputs, latent_intervention="zero:1", **settings))
    assert set(changed) == {(0, 0), (0, 1), (1, 0)} and not changed[0, 1].any()
    assert torch.equal(changed[1, 0], clean[1, 0]) and torch.equal(changed[0, 0], clean[0, 0])
    assert len(logged) == 1 and "1 of 2 rows have no block or step 1, counted from 0, and keep" in logged[0]
    model.generate(**inputs, latent_intervention="zero:0", **settings)
    assert len(logged) == 1  # every row has that one
    with pytest.raises(ValueError, match="opens one alone"):
        model.generate(**inputs, latent_intervention="swap:1", **settings)
    swapped = latents_of(model.generate(**inputs, latent_intervention="swap:0", **settings))  # block 1 needs no donor
    torch.testing.assert_close(swapped[0, 0], clean[1, 0], atol=1e-5, rtol=1e-5)


def test_what_is_no_intervention_is_refused(cases):
    model, inputs, settings, _ = cases["vedas"]
    assert parse_intervention("noise:1.3,0") == ("noise", ((1, 3), (0, None))) and parse_intervention("swap") == (
        "swap",
        (),
    )
    for text in ("zero:", "zero:a", "zero:1.", "zero:-1", "zero:1;2", "zero:0x1"):
        with pytest.raises(ValueError, match=f"must name blocks or steps by numbers from 0 on.*got '{text}'"):
            model.generate(**inputs, latent_intervention=text, **settings)
    for wrong in ("melt:1", "", 3, ["zero"]):
        with pytest.raises(ValueError, match="must be a callable or one of .*which may name blocks or steps"):
            prepare_intervention(wrong, False)
    with pytest.raises(ValueError, match="'mean:1'` needs a whole block at once"):
        model.generate(**inputs, latent_intervention="mean:1", **settings)


def test_a_callable_can_be_held_to_places():
    """By hand: latents 0..5 of step 1, of which the second and the last become their negative."""
    latents = torch.arange(6.0)[:, None] + 1
    steps = [LatentStep(row, index, 0, (2, 3), latents, []) for row in (0, 1) for index in (0, 1)]
    at = ChangeAt(lambda latents, step: -latents, [(1, 1), (1, 5)])
    signs = [values.sign().flatten().tolist() for values in intervene(at, steps, [0, 0, 1, 1])]
    assert signs == [[1.0] * 6, [1, -1, 1, 1, 1, -1]] * 2
    assert [at(step.latents, step).sign().flatten().tolist() for step in steps] == signs  # also as a plain callable
    assert at.has_reached(0) and at.has_reached(1) and not at.has_reached(2)
    with pytest.raises(ValueError, match=r"must return latents of shape \(6, 1\) for block 1 of row 0, got \(1, 1\)"):
        intervene(ChangeAt(lambda latents, step: latents[:1], [(1, None)]), steps, [0, 0, 1, 1])
    check_reached(ChangeAt(lambda latents, step: latents, [(9, None)]), 2)  # nobody named it in words
    one_by_one = [LatentStep(0, 1, 0, (1, 1), latents[n : n + 1], [], offset=n) for n in range(6)]
    found = [at(step.latents, step).sign().item() for step in one_by_one]
    assert found == [1, -1, 1, 1, 1, -1]


def test_autoregressive_donors_lend_the_latent_at_the_same_place():
    donor = LatentStep(0, 0, 0, (1, 4), torch.eye(4), [])
    swap = ChangeAt(Swap({0: [donor]}, is_one_by_one=True), [(0, 2)])
    own = [LatentStep(0, 0, 0, (1, 1), torch.full((1, 4), 0.5), [], offset=n) for n in range(4)]
    found = [swap(step.latents, step).tolist() for step in own]
    assert found[0] == found[1] == found[3] == [[0.5] * 4] and found[2] == [[0, 0, 1, 0]]


# The evaluation: a model of three steps that reads its answer off the sum of its latents


def evaluate(kind: str = "content", silent: tuple = (), **settings) -> list[dict]:
    settings = AnswerSettings(**{"batch_size": 8, "max_new_tokens": 4} | settings)
    return evaluate_rows(ToyModel(kind, silent), ToyProcessor(), toy_rows(48), settings)


def test_the_command_line_names_steps():
    """One latent of three that is another's leaves the answer as it is; two of them make it the donor's."""
    for text, is_right in (("swap:0", True), ("swap:2", True), ("swap:0,2", False), ("swap", False), ("zero:1", True)):
        found = evaluate(latent_intervention=text)
        assert all(record["correct"] == is_right and not record["not_reached"] for record in found), text
        assert all(record["follows_donor"] != is_right for record in found if "donor_id" in record)
        assert [record["text"] for record in found] == [
            record["text"] for record in evaluate(latent_intervention=text, batch_size=5)
        ]
    noisy = [[record["text"] for record in evaluate(latent_intervention="noise:0,1", batch_size=n)] for n in (1, 7)]
    assert noisy[0] == noisy[1]
    with pytest.raises(ValueError, match="acts on block or step 3, counted from 0, but `num_latent_steps` is 3"):
        evaluate(latent_intervention="zero:1,3")
    with pytest.raises(ValueError, match="but `num_latent_steps` is 2"):
        evaluate(latent_intervention="zero:2", set=["num_latent_steps=2"])
    with pytest.raises(ValueError, match="must name blocks or steps by numbers"):
        AnswerSettings(latent_intervention="swap:two")
    with pytest.raises(ValueError, match="`donors` belong to"):
        AnswerSettings(latent_intervention="zero:2", donors="other_task")
    settings = AnswerSettings(latent_intervention="swap:2", repeats=2).to_dict()
    assert settings["latent_intervention"] == "swap:2" and settings["draws"] == "by row" and "donors" in settings


def test_answers_without_the_named_latent_are_counted_apart():
    found = evaluate(silent=(6, 7), latent_intervention="zero:0,1,2")
    missed = [record for record in found if record["not_reached"]]
    assert len(missed) == 12 and all(record["num_latents"] == 0 for record in missed)
    summary = summarize(found)
    numbers = summary["all"]
    assert (numbers["rows"], numbers["not_reached"], numbers["not_swapped"]) == (36, 12, 0)
    assert "12 rows took no latent of those that the intervention names, and are not counted." in draw_table(summary)
    clean = summarize(evaluate())["all"]
    assert (clean["rows"], clean["not_reached"]) == (48, 0)
