"""Arguments of the stock classes: None is not given, and a prompt may come as embeddings."""

import inspect
import sys
from pathlib import Path

import pytest
import torch
from helpers import GREEDY, assert_near, step_logits
from transformers import LlavaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))
from shipped import CLASSES, encode_rows, load_shaken, question, training_batch


STOCK = {
    "deeplatent": Qwen2_5_VLForConditionalGeneration,
    "lare": LlavaForConditionalGeneration,
    "vedas": Qwen2_5_VLForConditionalGeneration,
}
OF_ALL_MODELS = ["output_attentions", "output_hidden_states", "return_dict", "num_items_in_batch"]


@pytest.fixture(scope="module", params=list(CLASSES))
def loaded(request):
    return request.param, *load_shaken(request.param)


def names_of(function) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [one.name for one in inspect.signature(function).parameters.values() if one.kind in kinds][1:]


def test_forward_takes_none_for_every_argument(loaded):
    name, model, processor = loaded
    batch = training_batch(name, processor)
    names = [*names_of(STOCK[name].forward), *names_of(type(model).forward), *OF_ALL_MODELS]
    assert len(names) > 20
    with torch.no_grad():
        expected = model(**batch)
        for one in sorted(set(names) - batch.keys()):
            output = model(**batch, **{one: None})
            assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss), one


def test_generate_takes_none_for_every_argument(loaded):
    name, model, processor = loaded
    inputs = encode_rows(processor, [question("what?", 1)], add_generation_prompt=True)
    expected = step_logits(model.generate(**inputs, **GREEDY))
    names = {*names_of(STOCK[name].forward), *names_of(type(model).generate), *names_of(STOCK[name].generate)}
    # Not stock's either: these are not arguments of `generate` but of the decoding loop.
    names -= {*inputs, "inputs", "labels", "logits_to_keep", "mm_encoder_outputs"}
    for one in sorted(names):
        assert torch.equal(step_logits(model.generate(**inputs, **GREEDY, **{one: None})), expected), one


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("beams", [1, 2])
def test_a_prompt_of_embeddings_is_that_of_its_tokens(images, beams, loaded):
    name, model, processor = loaded
    rows = [question("what colour is the shape?", *range(1, images + 1)), question("what?", *range(3, images + 3))]
    inputs = encode_rows(processor, rows, add_generation_prompt=True)
    blocks = {"min_latent_blocks": 1, "max_latent_blocks": 1} if name == "deeplatent" and images else {}
    settings = {**GREEDY, "num_beams": beams, **blocks}
    expected = model.generate(**inputs, **settings)
    ids = inputs.pop("input_ids")
    embeds = model.get_input_embeddings()(ids).detach()
    rest = {key: value for key, value in inputs.items() if key != "mm_token_type_ids"}
    alone = model.generate(inputs_embeds=embeds, **rest, **settings)
    assert_near(step_logits(alone), step_logits(expected))
    assert torch.equal(alone.sequences, expected.sequences[:, ids.shape[1] :])
    both = model.generate(ids, inputs_embeds=embeds, **rest, **settings)
    assert_near(step_logits(both), step_logits(expected))
    assert torch.equal(both.sequences, expected.sequences)
    assert both.num_latents.tolist() == alone.num_latents.tolist() == expected.num_latents.tolist()


@pytest.mark.parametrize("name", ["lare", "vedas"])
def test_forward_on_embeddings(name):
    model, processor = load_shaken(name)
    batch = training_batch(name, processor)
    with torch.no_grad():
        expected = model(**batch)
        embeds = model.get_input_embeddings()(batch.pop("input_ids"))
        output = model(**batch, inputs_embeds=embeds)
    assert_near(output.logits, expected.logits)
    assert_near(output.loss, expected.loss)


def test_tokens_come_in_one_form(loaded):
    name, model, processor = loaded
    inputs = encode_rows(processor, [question("what?", 1)], add_generation_prompt=True)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    for wrong in ({**inputs, "inputs_embeds": embeds}, {**inputs, "input_ids": None}):
        with pytest.raises(ValueError, match="`input_ids` or `inputs_embeds`"):
            model(**wrong)
    with pytest.raises(ValueError, match="must have the rows and columns"):
        model.generate(**{**inputs, "inputs_embeds": embeds[:, 1:]})
