"""D7, D10 and D11 against values worked out by hand, and on every architecture."""

import math
from types import SimpleNamespace

import pytest
import torch
from test_faithfulness import data as data
from test_faithfulness import make
from test_faithfulness import makers as makers

from evaluation.faithfulness.items import NotApplicable
from evaluation.faithfulness.lens import describe_place, measure_lens, read_words
from evaluation.faithfulness.observation import observe
from evaluation.faithfulness.parity import checkpointed, measure_parity, read_gradients
from evaluation.faithfulness.retrieval import compare_predictions, measure_retrieval


KINDS = ("lare", "vedas", "deeplatent", "autoregressive")


@pytest.fixture(params=KINDS)
def subject(request, makers, data):
    return make(makers, request.param, data)


# D7


def test_retrieval_by_hand():
    """Two predictions at their oracles, and two that lie together between theirs."""
    oracles = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])
    predicted = torch.tensor([[2.0, 0.1, 0.0], [0.1, 3.0, 0.0], [0.6, 0.6, 0.1], [0.6, 0.6, 0.1]])
    retrieved, nearer, cosine = compare_predictions(predicted, oracles)
    assert retrieved == [True, True, False, False] and nearer == [False, False, True, True]
    assert cosine[0] == pytest.approx(2 / math.hypot(2, 0.1)) and cosine[3] == -cosine[2]
    # An oracle that two items share is retrieved by both.
    assert compare_predictions(predicted[:2], oracles[[0, 0]])[0] == [True, True]


def test_retrieval_needs_a_teacher(makers, data):
    found = measure_retrieval(make(makers, "deeplatent", data)).tables["retrieval"]
    assert found and all(row["items"] == 4 and row["chance"] == 0.25 for row in found)
    for kind in ("lare", "vedas", "autoregressive"):
        with pytest.raises(NotApplicable):
            measure_retrieval(make(makers, kind, data))


def test_latents_that_are_their_oracle_are_retrieved(makers, data):
    from evaluation.faithfulness.arms import oracle_table

    subject = make(makers, "deeplatent", data)
    oracles = oracle_table(subject).steps
    for number in subject.with_latents:
        for step, (_, features) in zip(subject.clean[number].steps, oracles[number]):
            step.latents = 3 * features
    for row in measure_retrieval(subject).tables["retrieval"]:
        assert row["retrieval"] == 1 and row["USP"] == 0 and row["cosine"] == pytest.approx(1)


# D10


def test_words_by_hand():
    tokenizer = SimpleNamespace(decode=lambda tokens: "abcdefgh"[tokens[0]])
    subject = SimpleNamespace(tokenizer=tokenizer)
    sure = torch.full((8,), -1e4)
    sure[2] = 0.0
    even = torch.full((8,), -math.log(8))
    row = describe_place(subject, [sure, sure, even], [2, 3, 0])
    assert row["top token"] == "c" and row["its share"] == pytest.approx(2 / 3)
    assert row["entropy, nats"] == pytest.approx(math.log(8) / 3, abs=1e-4)
    assert row["answer on top"] == pytest.approx(1 / 3 + (1 / 3 if int(even.argmax()) == 0 else 0), abs=0.34)


def test_outputs_are_the_states_that_the_head_reads(subject):
    """The last hidden state in the column of a row's last latent gives the logits that the model has there."""
    observed = observe(subject)
    result = measure_lens(subject, observed)
    rows = result.tables["words"]
    assert {row["state"] for row in rows} == {"input", "output"}
    for number, seen in observed.items():
        assert seen.outputs[2].shape == subject.clean[number].latents().shape
        assert not seen.outputs[2].isnan().any()
    if subject.model.config.model_type == "vedas":
        number = subject.with_latents[0]
        words = read_words(subject, observed[number].outputs[2][-1:], is_input=False)
        assert int(words.argmax()) == subject.clean[number].tokens[0]


# D11


def test_what_is_trained_is_what_is_run(subject):
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    result = measure_parity(subject)
    rows = result.tables["latents"]
    assert len(rows) == len(subject.clean[subject.with_latents[0]].latents())
    for row in rows:
        assert row["least free cosine"] == pytest.approx(1, abs=1e-4)
        assert 0 < row["items"] <= len(subject.with_latents)
    assert any(row["with a gradient"] == 1 for row in rows)
    checked = result.tables["checkpointing"][0]
    assert checked["relative difference of the loss"] < 1e-5 and checked["of the gradients"] < 1e-3
    assert not subject.model.training and all(weight.grad is None for weight in subject.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())


def test_a_gradient_that_is_cut_is_said(makers, data):
    """Vedas as published detaches its latents: the answer depends on them, and nothing teaches what made them."""
    subject = make(makers, "vedas", data)
    assert all(row["taught"] == 1 for row in measure_parity(subject).tables["latents"])
    subject.model.config.backprop_through_latents = False
    for row in measure_parity(subject).tables["latents"]:
        assert row["taught"] == 0 and row["with a gradient"] == 1


def test_a_gradient_is_that_of_the_loss(makers, data):
    """Against a finite difference along one direction."""
    subject = make(makers, "vedas", data)
    numbers = subject.with_latents[:1]
    found = read_gradients(subject, numbers, False)
    from evaluation.faithfulness.lending import Table
    from evaluation.faithfulness.subject import Arm

    direction, losses = torch.zeros(len(found.by_place[0, 1])), []
    direction[3] = 1.0
    for size in (-1e-2, 1e-2):
        steps = {n: [(s.grid, s.latents.clone()) for s in subject.clean[n].steps] for n in numbers}
        steps[numbers[0]][1] = (steps[numbers[0]][1][0], steps[numbers[0]][1][1] + size * direction)
        table = Table(steps)
        arm = Arm("moved", "moved", lambda z, step, n, t=table: t(z, step, n) if step.index == 1 else z)
        with checkpointed(subject.model, False), torch.no_grad():
            logits, answers = subject.read(numbers, arm)
        tokens = torch.tensor(answers[0])
        losses.append(-float(logits[0, : len(tokens)].log_softmax(-1).gather(1, tokens[:, None]).sum()))
    assert float(found.by_place[0, 1][3]) == pytest.approx((losses[1] - losses[0]) / 2e-2, rel=0.02, abs=1e-4)
