"""Arguments that belong to `forward` alone, and what says where answers start: nothing of it is dropped without a word."""

import pickle

import pytest
import torch
from helpers import GREEDY
from test_recording import model_and_requests

from modeling_latentvlm import generation_common


KINDS = ("deeplatent", "lare", "vedas incremental")
ONLY_OF_FORWARD = {
    "labels": lambda ids: ids,
    "answer_starts": lambda ids: torch.full((len(ids),), 3),
    "latent_state_layers": lambda ids: (1,),
}


@pytest.fixture(params=KINDS)
def case(request, tokenizer, processor, image_processor):
    model, requests, settings = model_and_requests(request.param, tokenizer, processor, image_processor, count=1)
    return model, requests[0], GREEDY | {"max_new_tokens": 2} | settings


@pytest.mark.parametrize("name", ONLY_OF_FORWARD)
def test_generate_refuses_what_only_forward_can_honour(case, name):
    """`answer_starts` would move the steps into the question."""
    model, inputs, settings = case
    with pytest.raises(ValueError, match=name):
        model.generate(**inputs, **settings, **{name: ONLY_OF_FORWARD[name](inputs["input_ids"])})


@pytest.mark.parametrize("kind", KINDS[1:])
def test_labels_have_the_rows_and_columns_of_the_tokens(kind, tokenizer, processor, image_processor):
    """One row of labels was spread over all rows, and the message then named rows that were in order."""
    model, (inputs,), _ = model_and_requests(kind, tokenizer, processor, image_processor, count=1)
    ids = inputs["input_ids"]
    for labels in (ids[:, :5], ids.repeat(2, 1)):
        with pytest.raises(ValueError, match=r"`labels` must have the rows and columns of `input_ids`"):
            model(**inputs, labels=labels)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_answers_start_at_whole_columns_outside_images(kind, tokenizer, processor, image_processor):
    model, (inputs,), _ = model_and_requests(kind, tokenizer, processor, image_processor, count=1)
    ids = inputs["input_ids"]
    columns = (ids[0] == model.config.image_token_id).nonzero().flatten()
    first, last = int(columns[0]), int(columns[-1])
    for wrong in ([3], torch.tensor([True]), torch.tensor([3.0]), torch.tensor(3)):
        with pytest.raises(ValueError, match="`answer_starts` must be"):
            model(**inputs, answer_starts=wrong)
    for start in (first + 1, last):
        with pytest.raises(ValueError, match=r"in rows \[0\]"):
            model(**inputs, answer_starts=torch.tensor([start]))
    for start in (first, last + 1, ids.shape[1]):
        assert model(**inputs, answer_starts=torch.tensor([start])).logits.isfinite().all()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_outputs_that_are_not_returned_are_said_to_be(kind, tokenizer, processor, image_processor, monkeypatch):
    said = []
    monkeypatch.setattr(generation_common.logger, "warning_once", said.append)
    model, (inputs,), _ = model_and_requests(kind, tokenizer, processor, image_processor, count=1)
    expected = model(**inputs, output_hidden_states=False).logits
    said.clear()  # what is said of the cache
    output = model(**inputs, output_hidden_states=True)
    assert torch.equal(output.logits, expected) and output.hidden_states is None
    model(**inputs, output_attentions=True)
    asked = [one for one in said if "are ignored" in one]
    assert len(asked) == 2 and "output_hidden_states" in asked[0] and "output_attentions" in asked[1]
    pickle.dumps(model.model.language_model)  # the hooks by which transformers records hidden states could not be
