"""One vocabulary for the number of latents in every `generate`: `latents`, and the name of the config's counting field."""

import json

import pytest
import torch
from conftest import CHAT_TEMPLATE, build_model, build_tokenizer, encode, picture, stock_twin, user_turn
from helpers import GREEDY, assert_near, step_logits
from test_lare import build as build_lare
from test_lare import stock_twin as stock_of_lare
from test_recording import lare_inputs, model_and_requests
from test_vedas import STOCK, fields_of
from test_vedas import build as build_vedas
from transformers import GenerationConfig

from configuration_latentvlm.latent_architecture import changed_fields
from processing_latentvlm import VedasProcessor
from processing_latentvlm.processing_vedas import LATENT_TOKEN


KINDS = ("deeplatent", "lare", "vedas")
COUNTS = {"deeplatent": "max_latent_blocks", "lare": "num_refocus_steps", "vedas": "num_latent_steps"}
NAMES = ("min_latent_blocks", "max_latent_blocks", "num_refocus_steps", "num_latent_steps", "num_steps", "latent_grid")
SHORT = GREEDY | {"max_new_tokens": 4}


def build(kind: str, tokenizer, processor, image_processor):
    model, (inputs,), opens = model_and_requests(kind, tokenizer, processor, image_processor, count=1)
    return model, inputs, opens


@pytest.fixture(params=KINDS)
def case(request, tokenizer, processor, image_processor):
    """A model, a request, and what makes it take latents."""
    return build(request.param, tokenizer, processor, image_processor)


def limited(model, inputs, count: int, **settings):
    """What the declaration of the architecture says that so many latents are."""
    fields, arguments = model.config.limit_latents(count)
    with changed_fields(model.config, **fields):
        return model.generate(**inputs, **settings, **arguments)


@pytest.mark.core
def test_off_is_a_limit_of_zero_and_on_the_default(case):
    model, inputs, opens = case
    before = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    off = model.generate(**inputs, **SHORT, latents="off")
    assert torch.equal(step_logits(off), step_logits(limited(model, inputs, 0, **SHORT)))
    assert off.num_latents.tolist() == off.num_latent_blocks.tolist() == [0]
    on = model.generate(**inputs, **SHORT, **opens, latents="on")
    assert torch.equal(step_logits(on), step_logits(model.generate(**inputs, **SHORT, **opens)))
    assert on.num_latents.item() > 0 and (step_logits(on) - step_logits(off)).abs().max() > 1e-4
    assert json.dumps(model.config.to_dict(), sort_keys=True, default=str) == before


def prompt_of_vedas(image_processor, question):
    tokenizer = build_tokenizer((LATENT_TOKEN,))
    processor = VedasProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)
    model = build_vedas(tokenizer, routed_layers=[])
    config_class, stock_class = STOCK["qwen2_5_vl"]
    stock = stock_class(config_class(**fields_of(tokenizer, "qwen2_5_vl"))).eval()
    stock.load_state_dict(model.state_dict())
    return model, stock, encode(processor, [question]), [model.config.latent_token_id]


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
def test_off_is_the_stock_backbone(kind, tokenizer, processor, image_processor):
    """Vedas without routed layers, which act on every token whether there are latents or not."""
    question = user_turn("what colour?", picture(56, 84, 1))
    if kind == "vedas":
        model, stock, inputs, never = prompt_of_vedas(image_processor, question)
    elif kind == "lare":
        model, inputs, never = build_lare(), lare_inputs(1), []
        stock = stock_of_lare(model)
    else:
        model, inputs = build_model(tokenizer), encode(processor, [question])
        stock, config = stock_twin(model), model.config
        never = [config.latent_start_token_id, config.latent_pad_token_id, config.latent_end_token_id]
    expected = stock.generate(**inputs, **SHORT, **({"suppress_tokens": never} if never else {}))
    assert_near(step_logits(model.generate(**inputs, **SHORT, latents="off")), step_logits(expected))


@pytest.mark.core
@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_counting_field_is_an_argument(case, count):
    model, inputs, opens = case
    opens = dict.fromkeys(opens, count)  # DeepLatent's tiny model opens no block by itself
    name = model.config.latent_count_field
    had = model.config.latent_count
    output = model.generate(**inputs, **SHORT, **opens, output_latents=True, **{name: count})
    assert output.num_latent_blocks.tolist() == [count] == [len(output.latent_trace.row(0))]
    assert model.config.latent_count == had
    expected = limited(model, inputs, count, **SHORT, **opens)
    assert torch.equal(step_logits(output), step_logits(expected))


def test_a_given_number_of_steps_is_taken_by_every_row():
    """As under `limit_latents`: a row does not stop by itself."""
    model, inputs = build_lare(adaptive_stop="l2", stop_threshold=1e9), lare_inputs(0)
    assert model.generate(**inputs, **SHORT).num_latent_steps.tolist() == [2]
    assert model.generate(**inputs, **SHORT, num_refocus_steps=5).num_latent_steps.tolist() == [5]
    embeds = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]), **inputs}
    first, second = (model.generate(**given, **SHORT, num_refocus_steps=1) for given in (inputs, embeds))
    assert_near(step_logits(first), step_logits(second))


def test_the_generation_config_may_hold_both(case):
    model, inputs, opens = case
    name = model.config.latent_count_field
    off = GenerationConfig(**SHORT)
    off.latents = "off"
    one = GenerationConfig(**SHORT)
    setattr(one, name, 1)
    assert model.generate(**inputs, generation_config=off).num_latents.tolist() == [0]
    assert model.generate(**inputs, **opens, generation_config=one).num_latent_blocks.tolist() == [1]
    assert model.generate(**inputs, latents="off", generation_config=one).num_latents.tolist() == [0]
    more = opens if "min_latent_blocks" not in opens else {"min_latent_blocks": 2}
    assert model.generate(**inputs, **more, **{name: 2}, generation_config=one).num_latent_blocks.tolist() == [2]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_count_of_another_architecture_names_the_right_one(kind, name, tokenizer, processor, image_processor):
    model, inputs, _ = build(kind, tokenizer, processor, image_processor)
    is_own = name == COUNTS[kind] or (kind == "deeplatent" and name in ("min_latent_blocks", "latent_grid"))
    value = (1, 1) if name == "latent_grid" else 1
    model.generate(**inputs, **SHORT, **{name: None})  # as if it were not given
    if is_own:
        model.generate(**inputs, **SHORT, **{name: value})
        return
    with pytest.raises(ValueError, match=f"`{name}` cannot be given to `generate` of {kind}.*`{COUNTS[kind]}`"):
        model.generate(**inputs, **SHORT, **{name: value})
    config = GenerationConfig(**SHORT)
    setattr(config, name, value)
    with pytest.raises(ValueError, match=f"`{name}` cannot be given.*`{COUNTS[kind]}`"):
        model.generate(**inputs, generation_config=config)


@pytest.mark.parametrize("wrong", [True, False, 1, "OFF", "none", ["off"], torch.tensor([1, 2])])
def test_latents_are_on_or_off(case, wrong):
    model, inputs, _ = case
    with pytest.raises(ValueError, match='`latents` must be "on" or "off"'):
        model.generate(**inputs, **SHORT, latents=wrong)


def test_a_contradiction_is_refused(case):
    model, inputs, _ = case
    name = model.config.latent_count_field
    with pytest.raises(ValueError, match=f'`latents="off"` allows no latents, but `{name}=2`'):
        model.generate(**inputs, **SHORT, latents="off", **{name: 2})
    assert model.generate(**inputs, **SHORT, latents="off", **{name: 0}).num_latents.tolist() == [0]


@pytest.mark.parametrize("wrong", [-1, 1.0, True, "2", torch.tensor(1), 9])
@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_whole_numbers_within_the_limit(kind, wrong, tokenizer, processor, image_processor):
    model, inputs, _ = build(kind, tokenizer, processor, image_processor)
    if wrong == 9 and kind != "lare":  # `max_refocus_steps` is 8
        pytest.skip("nothing limits it")
    with pytest.raises(ValueError, match="must be a whole number"):
        model.generate(**inputs, **SHORT, **{COUNTS[kind]: wrong})


def test_slots_of_a_prompt_are_as_many_as_the_call_takes(tokenizer, processor, image_processor):
    model, inputs, _ = build("vedas", tokenizer, processor, image_processor)
    slots = torch.full((1, 3), model.config.latent_token_id)
    given = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    prompt = torch.cat([inputs["input_ids"], slots], dim=1)
    three = model.generate(prompt, **given, **SHORT, num_latent_steps=3)
    assert_near(step_logits(three), step_logits(model.generate(**inputs, **SHORT, num_latent_steps=3)))
    with pytest.raises(ValueError, match="has 3 latent slots, but `num_latent_steps` is 2"):
        model.generate(prompt, **given, **SHORT, num_latent_steps=2)
