"""D6: an answer that may not attend to the picture, against a mask written down by hand and models whose way is known."""

import pytest
import torch
from test_faithfulness import data as data
from test_faithfulness import make
from test_faithfulness import makers as makers

from evaluation.faithfulness.attention_cut import CUTS, answer_cut, cut_attention, hide
from evaluation.faithfulness.columns import ANSWER, IMAGE, LATENT, TEXT
from evaluation.faithfulness.latent_only import blank, measure_latent_only
from evaluation.faithfulness.lending import table_of
from evaluation.faithfulness.subject import Arm


KINDS = ("lare", "vedas", "deeplatent", "autoregressive")
ROW = [TEXT, IMAGE, TEXT, LATENT, ANSWER, ANSWER]


@pytest.fixture(params=KINDS)
def subject(request, makers, data):
    return make(makers, request.param, data)


def test_the_mask_by_hand():
    kinds = torch.tensor([ROW])
    image = hide(None, kinds, kinds, "image", torch.float32)[0, 0].int().tolist()
    assert image[3] == [1, 1, 1, 1, 0, 0]  # a latent sees all before it
    assert image[4] == [1, 0, 1, 1, 1, 0] and image[5] == [1, 0, 1, 1, 1, 1]
    prompt = hide(None, kinds, kinds, "prompt", torch.float32)[0, 0].int().tolist()
    assert prompt[5] == [0, 0, 0, 1, 1, 1] and prompt[2] == [1, 1, 1, 0, 0, 0]
    vectors = hide(None, kinds, kinds, "vectors", torch.float32)[0, 0].int().tolist()
    assert vectors[3] == [0, 0, 0, 1, 0, 0] and vectors[5] == prompt[5]
    one = hide(None, kinds[:, -1:], kinds, "prompt", torch.float32)[0, 0].int().tolist()
    assert one == [[0, 0, 0, 1, 1, 1]]
    added = hide(torch.zeros(1, 1, 1, 6), kinds[:, -1:], kinds, "image", torch.float32)[0, 0, 0]
    assert added[1] == torch.finfo(torch.float32).min and added.count_nonzero() == 1
    given = torch.zeros(1, 1, 6, 6)
    assert hide(given, torch.full_like(kinds, TEXT), kinds, "image", torch.float32) is given
    with pytest.raises(ValueError, match=r"shape \(rows, heads, 6, 6\)"):
        hide(torch.ones(1, 6), kinds, kinds, "image", torch.float32)


def test_nothing_hidden_changes_nothing(subject, monkeypatch):
    """The hooks alone, with no kind to hide, give the clean answers; both cuts give others, to the logits."""
    numbers = subject.with_latents
    served = {number: subject.clean[number].steps for number in numbers}
    arm = Arm("own", "own", table_of(subject, {number: number for number in numbers}))
    expected = [subject.clean[number].tokens for number in numbers]
    monkeypatch.setitem(CUTS, "image", ((99,), (99,)))
    assert [answer.tokens for answer in answer_cut(subject, arm, served, "image")] == expected
    monkeypatch.undo()
    logits = {}
    monkeypatch.setitem(CUTS, "nothing", ((99,), (99,)))
    for what in ("nothing", "image", "prompt", "vectors"):
        inputs = subject.encode([subject.items[number].sample for number in numbers])
        with cut_attention(subject, what, list(served.values()), inputs["input_ids"]):
            logits[what] = subject.read(numbers, arm)[0][:, 1:]
    assert (logits["image"] - logits["nothing"]).abs().max() > 1e-3
    assert (logits["prompt"] - logits["image"]).abs().max() > 1e-3
    assert (logits["vectors"] - logits["prompt"]).abs().max() > 1e-3


def test_a_cut_answer_does_not_depend_on_what_is_hidden(makers, data):
    """With the vectors alone, another picture changes nothing of the answer's logits; with the prompt cut alone it does."""
    subject = make(makers, "deeplatent", data)
    numbers = subject.with_latents
    arm = Arm("own", "own", table_of(subject, {number: number for number in numbers}))
    served = [subject.clean[number].steps for number in numbers]
    found = {}
    for what in ("prompt", "vectors"):
        for change in (lambda item: item.sample, blank):
            inputs = subject.encode([change(subject.items[number]) for number in numbers])
            subject.encoded = (list(numbers), inputs)
            with cut_attention(subject, what, served, inputs["input_ids"]) as columns:
                logits, _ = subject.read(numbers, arm)
            behind = columns.keys[:, -logits.shape[1] :] == ANSWER
            assert behind.any()
            found.setdefault(what, []).append(logits[behind])
    torch.testing.assert_close(*found["vectors"], atol=1e-5, rtol=1e-5)
    assert (found["prompt"][0] - found["prompt"][1]).abs().max() > 1e-3


def test_the_table(subject):
    result = measure_latent_only(subject)
    rows = result.tables["latents alone"]
    ways = [(row["picture"], row["latents"]) for row in rows]
    pictures = ["blank picture", "image cut", "prompt cut", "vectors alone"]
    assert ways == [("as it is", "own"), *((p, "own") for p in pictures), *((p, "another's") for p in pictures)]
    assert all(row["items"] == len(subject.with_latents) and 0 <= row["accuracy"] <= 100 for row in rows)
    assert rows[0]["answer as in the clean run"] == 1 and result.curves[0].series.keys() == {"own", "another's"}
