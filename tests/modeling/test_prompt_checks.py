"""What no model can answer is refused at the edge; latents that could act do act, or it is said that they do not."""

import pytest
import torch
from conftest import build_model, build_tokenizer, encode, picture, user_turn
from helpers import GREEDY, assert_near, step_logits, vision
from test_lare import BOT, EOT
from test_lare import build as build_lare
from test_recording import lare_inputs, model_and_requests
from test_vedas import build as build_vedas
from test_vedas import with_slots
from transformers import SuppressTokensLogitsProcessor

from configuration_latentvlm.model_card import render_model_card
from modeling_latentvlm.routing_vedas import TokenScore
from processing_latentvlm import VedasProcessor
from processing_latentvlm.processing_vedas import LATENT_TOKEN


pytestmark = pytest.mark.core
KINDS = ("deeplatent", "lare", "vedas incremental")
SHORT = GREEDY | {"max_new_tokens": 3}


@pytest.fixture(params=KINDS)
def case(request, tokenizer, processor, image_processor):
    model, requests, settings = model_and_requests(request.param, tokenizer, processor, image_processor, count=1)
    return model, requests[0], SHORT | settings


@pytest.fixture(params=("deeplatent", "vedas incremental"))
def qwen_case(request, tokenizer, processor, image_processor):
    model, requests, settings = model_and_requests(request.param, tokenizer, processor, image_processor, count=1)
    return model, requests[0], SHORT | settings


@pytest.fixture
def vedas(tokenizer, processor, image_processor):
    model, requests, _ = model_and_requests("vedas incremental", tokenizer, processor, image_processor, count=2)
    return model, requests


def changed(inputs: dict, **fields) -> dict:
    return dict(inputs) | fields


# --- number 30: inputs that cannot be decoded ---


def test_ids_that_are_none(case):
    model, inputs, settings = case
    ids = inputs["input_ids"]
    for wrong, message in (
        (ids[:, :0], r"at least one of each, got \(1, 0\)"),
        (ids[0], r"\(rows, columns\)"),
        (ids.float(), "whole numbers, got torch.float32"),
        (ids.tolist(), "whole numbers, got list"),
        (ids.masked_fill(ids == ids[0, 0], 10**6), "row 0 of `input_ids` has 1000000 at column 0"),
        (ids.masked_fill(ids == ids[0, 0], -5), "has -5 at column 0"),
    ):
        rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        with pytest.raises(ValueError, match=message):
            model.generate(wrong, **rest, **settings)
    expected = step_logits(model.generate(**inputs, **settings))
    output = model.generate(**changed(inputs, input_ids=ids.int()), **settings)
    assert torch.equal(step_logits(output), expected) and output.sequences.dtype == torch.int64


def test_masks(case):
    model, inputs, settings = case
    ids = inputs["input_ids"]
    for wrong, message in (
        (torch.zeros_like(ids), "row 0 is all zeros"),
        (torch.full_like(ids, 2), "zeros and ones, but row 0"),
        (torch.ones(1, 3, dtype=torch.long), "shape of `input_ids`"),
        ([[1] * ids.shape[1]], "got list"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**changed(inputs, attention_mask=wrong), **settings)


def test_grids_that_are_none(qwen_case):
    model, inputs, settings = qwen_case
    grid = inputs["image_grid_thw"]
    odd = grid.clone()
    odd[0, 1] += 1
    for wrong, message in (
        (grid.tolist(), "whole numbers .* got list"),
        (grid.float(), "got torch.float32"),
        (grid[0], r"shape \(items, 3\), got torch.int64 of \(3,\)"),
        (grid[:, :2], r"got torch.int64 of \(1, 2\)"),
        (grid * torch.tensor([0, 1, 1]), r"t >= 1 .* image 0 has \(0, "),
        (odd, "multiples of 2 .* image 0 has"),
        (grid * torch.tensor([1, 1, 2]), "names .* patches, but the images have"),
    ):
        for call in (lambda given: model.generate(**given, **settings), lambda given: model(**given, labels=None)):
            with pytest.raises(ValueError, match=message):
                call(changed(inputs, image_grid_thw=wrong))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_no_numbers(case, value):
    model, inputs, settings = case
    pixels = inputs["pixel_values"].clone()
    pixels.view(-1)[7] = value
    with pytest.raises(ValueError, match=r"`pixel_values` must be finite.*index \["):
        model.generate(**changed(inputs, pixel_values=pixels), **settings)
    with pytest.raises(ValueError, match="floating-point numbers, got torch.int64"):
        model.generate(**changed(inputs, pixel_values=pixels.long()), **settings)


def test_latents_that_are_no_numbers(case):
    """Whoever makes them so: the caller, or weights that overflow. Said before a token of garbage is written."""
    model, inputs, settings = case
    with pytest.raises(ValueError, match=r"latents of rows \[0\] hold NaN"):
        model.generate(**inputs, latent_intervention=lambda latents, step: latents * float("nan"), **settings)
    with torch.no_grad():
        name = {"deeplatent": "latent_blocks", "lare": "refocus", "vedas": "model.language_model.norm"}
        for parameter in model.get_submodule(name[model.config.model_type]).parameters():
            parameter.fill_(float("inf"))
    with pytest.raises(ValueError, match="overflow"):
        model.generate(**inputs, **settings)


def test_an_intervention_of_the_wrong_kind(case):
    model, inputs, settings = case
    for wrong in (5, ["zero"], {}):
        with pytest.raises(ValueError, match="must be a callable or one of"):
            model.generate(**inputs, latent_intervention=wrong, **settings)
        with pytest.raises(ValueError, match="must be a callable or one of"):
            model(**inputs, latent_intervention=wrong)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"latent_grid": 5}, r"`latent_grid` must be \(height, width\)"),
        ({"latent_grid": torch.tensor([2, 2])}, "`latent_grid` must be"),
        ({"latent_grid": (torch.tensor(2), 2)}, "whole numbers"),
        ({"latent_grid": (True, 2)}, "whole numbers"),
        ({"latent_grid": "22"}, "`latent_grid` must be"),
        ({"min_latent_blocks": torch.tensor(1)}, "`min_latent_blocks` must be a whole number"),
        ({"min_latent_blocks": 1.0}, "`min_latent_blocks` must be a whole number"),
        ({"min_latent_blocks": False}, "`min_latent_blocks` must be a whole number"),
        ({"max_latent_blocks": torch.tensor(1)}, "must be a whole number"),
        ({"max_latent_blocks": "1"}, "must be a whole number"),
        ({"latent_grid_hw": [[1, 2], [3]]}, r"shape \(blocks, 2\)"),
        ({"latent_grid_hw": "ab"}, r"shape \(blocks, 2\)"),
        ({"latent_noise": torch.tensor(1)}, "`latent_noise` must be True or False"),
    ],
)
def test_settings_of_the_wrong_kind(shared_model, rows, settings, message):
    with pytest.raises(ValueError, match=message):
        shared_model.generate(**rows[0], **SHORT, **settings)


# --- latents that could act and do not ---


@pytest.mark.parametrize(
    "fields", [{"latent_mode": "autoregressive"}, {"modulate_queries": False, "modulate_images": False}]
)
def test_nothing_to_modulate(tokenizer, rows, fields):
    model = build_model(tokenizer, **fields)
    for settings in ({"latent_noise": True}, {"latent_modulator": lambda *args: args[3]}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}.*would do nothing"):
            model.generate(**rows[0], **SHORT, **settings)
    model.generate(**rows[0], **SHORT, latent_noise=False, latent_modulator=None)


def test_a_forward_without_blocks_says_so(shared_model, rows):
    output = shared_model(**rows[0], output_latents=True)
    assert output.latent_trace.num_rows == 1 and output.latent_trace.steps == []
    assert shared_model(**rows[0]).latent_trace is None


def test_slots_of_an_earlier_turn(vedas):
    """An answer that was begun may go on; behind the end of a turn the next one would get no steps."""
    model, (inputs, _) = vedas
    end = model.config.get_text_config().eos_token_id
    prompt = with_slots(model, inputs, inputs["input_ids"])
    for tail, raises in (([40, 41], False), ([40, end, 41], True)):
        ids = torch.cat([prompt, torch.tensor([tail])], dim=1)
        if raises:
            with pytest.raises(ValueError, match=r"rows \[0\] of the prompt latent slots.*no steps of its own"):
                model.generate(ids, **vision(inputs), **SHORT)
        else:
            assert model.generate(ids, **vision(inputs), **SHORT).num_latents.tolist() == [2]
    pads = torch.cat([prompt, torch.tensor([[end, end]])], dim=1)  # padding, where the end token is its filling
    mask = torch.ones_like(pads)
    mask[:, -2:] = 0
    model.generate(pads, attention_mask=mask, **vision(inputs), **SHORT)


def test_markers_of_an_earlier_turn():
    model, inputs = build_lare(), lare_inputs(0)
    ids, end = inputs["input_ids"], model.config.get_text_config().eos_token_id
    begun = torch.cat([ids, torch.tensor([[BOT, EOT, 40]])], dim=1)
    assert model.generate(begun, pixel_values=inputs["pixel_values"], **SHORT).num_latent_blocks.tolist() == [3]
    later = torch.cat([begun, torch.tensor([[end, 41]])], dim=1)
    with pytest.raises(ValueError, match=r"`<bot>` and `<eot>` stand before the end of an earlier turn"):
        model.generate(later, pixel_values=inputs["pixel_values"], **SHORT)


@pytest.mark.parametrize("first", [0, 1])
def test_a_prompt_that_is_all_labels(vedas, first):
    """In a padded batch too, where one row would otherwise train the plain backbone without a word."""
    for model, inputs in ((vedas[0], vedas[1][0]), (build_lare(), lare_inputs(0))):
        ids = inputs["input_ids"]
        pads = torch.zeros(1, 3, dtype=torch.long)
        padded = torch.cat([pads, ids], dim=1)
        labels = torch.full_like(padded, -100)
        labels[:, 3 + first :] = ids[:, first:]
        rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        rest.pop("mm_token_type_ids", None)
        with pytest.raises(ValueError, match=r"rows \[0\]"):
            model(padded, attention_mask=(torch.arange(padded.shape[1]) >= 3)[None].long(), labels=labels, **rest)
        with pytest.raises(ValueError, match=r"rows \[0\]"):
            model(ids, labels=labels[:, 3:], **rest)


# --- processors, columns, lengths, cards ---


def test_the_users_suppressed_tokens(case):
    """By argument, by generation config and by a processor: each works beside ours, which is of another class."""
    model, inputs, settings = case
    length = inputs["input_ids"].shape[1]
    banned = [int(model.generate(**inputs, **settings).sequences[0, -1])]
    own = [SuppressTokensLogitsProcessor(banned, device="cpu")]
    for wish in ({"suppress_tokens": banned}, {"logits_processor": own}):
        assert banned[0] not in model.generate(**inputs, **settings, **wish).sequences[0, length:]
    model.generation_config.suppress_tokens = banned
    assert banned[0] not in model.generate(**inputs, **settings).sequences[0, length:]


def test_no_processor_of_ours_is_of_a_class_of_transformers(case, monkeypatch):
    """Of two of one class transformers drops its own, whatever the user's setting was that made it."""
    model, inputs, settings = case
    seen = []
    for name in ("_get_logits_processor", "_get_stopping_criteria"):
        plain = getattr(model, name)

        def spy(*args, plain=plain, **kwargs):
            given = kwargs.get("logits_processor", kwargs.get("stopping_criteria"))
            seen.extend(given or [])
            return plain(*args, **kwargs)

        monkeypatch.setattr(model, name, spy)
    model.generate(**inputs, **settings)
    assert seen
    assert not [type(one) for one in seen if type(one).__module__.startswith("transformers")]


def test_the_column_of_a_step(vedas):
    model, (inputs, _) = vedas
    length = inputs["input_ids"].shape[1]
    settings = SHORT | {"output_latents": True}
    trace = model.generate(**inputs, **settings).latent_trace
    assert [step.column for step in trace.steps] == [length, length]
    ids = with_slots(model, inputs, inputs["input_ids"])
    trace = model.generate(ids, **vision(inputs), **settings).latent_trace
    assert [step.column for step in trace.steps] == [length, length + 1]
    assert all(ids[0, step.column] == model.config.latent_token_id for step in trace.steps)


@pytest.mark.parametrize("kind", KINDS)
def test_the_latents_that_will_come_are_counted(kind, tokenizer, processor, image_processor):
    model, requests, settings = model_and_requests(kind, tokenizer, processor, image_processor, count=1)
    inputs, length = requests[0], requests[0]["input_ids"].shape[1]
    coming = {"deeplatent": 0, "lare": 3 * 3, "vedas": 2 + 6}[
        model.config.model_type
    ]  # of 6 image tokens all are replayed
    if kind == "deeplatent":
        sequences = model.generate(**inputs, **SHORT, **settings, latent_grid=(2, 2)).sequences[:, : length + 1]
        inputs = {"input_ids": sequences, **vision(inputs), "latent_grid_hw": torch.tensor([[2, 2]])}
        settings, length, coming = {}, length + 1, 3 + 4 + 1
    longest = model.config.get_text_config()
    longest.max_position_embeddings = length + coming
    model.generate(**inputs, **SHORT, **settings)
    longest.max_position_embeddings -= 1
    with pytest.raises(
        ValueError, match=f"{length} tokens and {coming} latents, but the context holds {length + coming - 1}"
    ):
        model.generate(**inputs, **SHORT, **settings)


def test_the_model_card():
    config = build_lare().config
    for name, metadata, text in (
        ("Qwen/Qwen2.5-VL-7B", "base_model: Qwen/Qwen2.5-VL-7B\n", "on Qwen/Qwen2.5-VL-7B."),
        ("backbone", "", "on a local backbone (`backbone`)."),
        ("../out/backbone", "", "on a local backbone"),
        (None, "", "unknown origin"),
    ):
        config.base_model = name
        card = render_model_card(config)
        head = card.split("---")[1]
        assert text in card and (metadata in head if metadata else "base_model" not in head)
        code = card.split("```python")[1].split("```")[0]
        assert code.index("path = ") < code.index("from_pretrained(path")


# --- A6 and A7: routing ---


@pytest.mark.parametrize("scope", ["incremental", "context"])
def test_renumbered_positions_do_not_depend_on_the_batch(tokenizer, processor, scope):
    """Filling takes no number: a short row beside a long one, with more to select than it has tokens."""
    tokenizer = build_tokenizer((LATENT_TOKEN,))
    processor = VedasProcessor(processor.image_processor, tokenizer, chat_template=processor.chat_template)
    model = build_vedas(
        tokenizer, routing_scope=scope, routing_positions="renumbered", num_routed_tokens=60, num_routed_step_tokens=9
    )
    talks = [user_turn("hi"), user_turn("which of the two is it, left or right?" * 3, picture(84, 112, 1))]
    output = model.generate(**encode(processor, talks), **GREEDY)
    for row, talk in enumerate(talks):
        assert_near(step_logits(output)[row], step_logits(model.generate(**encode(processor, [talk]), **GREEDY))[0])


def test_renumbered_positions_go_on_from_segment_to_segment(vedas, monkeypatch):
    model, (inputs, _) = vedas
    model.config.routing_positions = "renumbered"
    layer, seen = model.model.language_model.layers[0], []
    plain = model.model.language_model.rotary_emb.forward

    def spy(states, positions):
        seen.append(positions[0, 0].tolist())
        return plain(states, positions)

    monkeypatch.setattr(model.model.language_model.rotary_emb, "forward", spy)
    model.generate(**inputs, **(SHORT | {"max_new_tokens": 1}))
    chosen = [numbers for numbers in seen if len(numbers) in (6, 3)]
    # Two routed layers, each: six tokens of the prompt, then three of each step.
    assert chosen == [list(range(6))] * 2 + [[6, 7, 8]] * 2 + [[9, 10, 11]] * 2
    assert hasattr(layer, "router")


def test_the_reference_scope_refuses_what_it_cannot_reproduce(tokenizer, processor, image_processor):
    """Zero vectors of small pictures, and several images, of which the published code scores the last."""
    from conftest import encode, picture, user_turn

    tokenizer = build_tokenizer((LATENT_TOKEN,))
    processor = VedasProcessor(image_processor, tokenizer, chat_template=processor.chat_template)
    model = build_vedas(tokenizer, routing_scope="reference", routing_gate="softmax")  # K = 4, two steps
    ask = lambda *pictures: encode(processor, [user_turn("what?", *pictures)])  # noqa: E731
    for width, height, is_fine in ((56, 112, True), (28, 196, False), (84, 84, True), (28, 112, False)):
        inputs = ask(picture(width, height))  # 8, 7, 9 and 4 tokens
        if is_fine:
            model.generate(**inputs, **SHORT)
            continue
        with pytest.raises(ValueError, match=r"image of row 0 has \d: the published code would append zero vectors"):
            model.generate(**inputs, **SHORT)
    with pytest.raises(ValueError, match="one image a row.*row 0 has 2"):
        model.generate(**ask(picture(84, 84, 1), picture(84, 84, 2)), **SHORT)
    model.generate(**encode(processor, [user_turn("hello")]), **SHORT)
    model.config.num_latent_steps = 1
    model.generate(**ask(picture(28, 112)), **SHORT)  # K is one less than the four there are, once


def test_router_scores_are_float32():
    """In a half-precision model and under autocast: products of bfloat16 would choose other tokens."""
    torch.manual_seed(0)
    score, states = TokenScore(256), torch.randn(2, 40, 256)
    expected = score(states)
    with torch.autocast("cpu", torch.bfloat16):
        assert score(states).dtype == torch.float32 and torch.equal(score(states), expected)
    half = score.bfloat16()
    rounded = torch.nn.functional.linear(states.bfloat16().float(), half.weight.float(), half.bias.float())
    assert torch.equal(half(states.bfloat16()), rounded)
