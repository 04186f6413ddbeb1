"""The faithfulness report: every diagnostic against a value worked out by hand, the whole on every architecture, and controls."""

import importlib.util
import json
import math
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, build_model, build_tokenizer
from helpers import assert_near
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from test_analyses import lare_model, lare_processor, write_questions
from test_vedas import build as build_vedas
from transformers import AutoModel, Qwen2_5_VLConfig

from evaluation.faithfulness import __main__ as entry
from evaluation.faithfulness import architectures, controls
from evaluation.faithfulness import run as running
from evaluation.faithfulness.__main__ import build_parser, key_of, main
from evaluation.faithfulness.architectures import architecture_of
from evaluation.faithfulness.arms import ARMS, build_arms, calibrate, random_window
from evaluation.faithfulness.attention import enrichment, grid_box
from evaluation.faithfulness.audit import audit
from evaluation.faithfulness.collapse import cosines, mean_cosine, ranks, spectrum
from evaluation.faithfulness.columns import ANSWER, IMAGE, LATENT, REPLAY, TEXT
from evaluation.faithfulness.edits import crop, flip, remove, turn_hues
from evaluation.faithfulness.interventions_report import measure_interventions
from evaluation.faithfulness.items import Item, NotApplicable, read_items
from evaluation.faithfulness.lending import Table
from evaluation.faithfulness.norms import measure_norms
from evaluation.faithfulness.observation import Observed, observe
from evaluation.faithfulness.probe import group_by_pictures, measure_probe, probe, split_folds
from evaluation.faithfulness.replacement import measure_replacement, ranking, replaced, split_units
from evaluation.faithfulness.result import Result
from evaluation.faithfulness.slots import measure_slots, shared_lead
from evaluation.faithfulness.statistics import mean_interval, paired
from evaluation.faithfulness.subject import CLEAN, Answer, Arm, Subject, compare, without_latents
from modeling_latentvlm.trace import LatentStep
from processing_latentvlm import DeepLatentProcessor, VedasProcessor
from processing_latentvlm.processing_vedas import LATENT_TOKEN
from train.data.reasoning_data import ReasoningSample


KINDS = ("lare", "vedas", "deeplatent", "autoregressive")
LETTERS = ("red", "green")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight questions about four pictures, with regions, assistant images and two answers."""
    path = write_questions(tmp_path_factory.mktemp("data"), 4)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows):
        row |= {"answer": LETTERS[number // 2 % 2], "boxes": [[0, 0, 28, 28]], "assistant_images": [row["image"]]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def makers(tokenizer, image_processor) -> dict:
    deeplatent = DeepLatentProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)
    bare = DeepLatentProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE, num_control_tokens=0)
    lare = lare_processor()
    vedas = VedasProcessor(image_processor, build_tokenizer((LATENT_TOKEN,)), chat_template=CHAT_TEMPLATE)
    return {
        "lare": lambda: (lare_model(lare), lare),
        "vedas": lambda: (build_vedas(vedas.tokenizer), vedas),
        "deeplatent": lambda: (build_model(tokenizer), deeplatent),
        "autoregressive": lambda: (build_model(tokenizer, latent_mode="autoregressive"), bare),
    }


def make(makers, kind: str, data: Path, count: int = 4, **settings) -> Subject:
    model, processor = makers[kind]()
    forced = {"min_latent_blocks": 1} if kind in ("deeplatent", "autoregressive") else {}
    settings = {"batch_size": 3, "max_new_tokens": 4} | forced | settings
    return Subject(model, processor, read_items(data, "steps", "train", None)[::2][:count], **settings)


@pytest.fixture(params=KINDS)
def subject(request, makers, data) -> Subject:
    return make(makers, request.param, data)


# Statistics and small formulas


def test_intervals():
    assert mean_interval([1, 1, 1]) == (1, 1, 1)
    mean, low, high = mean_interval([0, 1] * 50)
    assert mean == 0.5 and low == pytest.approx(0.4, abs=0.02) and high == pytest.approx(0.6, abs=0.02)
    mean, low, high = paired([1, 0, 1, 0] * 20, [1, 1, 1, 1] * 20)
    assert mean == -0.5 and low < -0.4 and high < -0.38
    assert paired([1, 0], [0, 1])[0] == 0
    assert all(math.isnan(value) for value in mean_interval([]))


def test_kl_and_likelihood_by_hand():
    clean = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    other = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    score = compare(clean, other, [1, 0])
    assert score.kl == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2)
    assert score.logprob == pytest.approx(math.log(0.75) + math.log(0.9)) and score.num_tokens == 2
    assert math.isnan(compare(clean[:0], other[:0], []).kl)


def test_ranks_by_hand():
    assert ranks(np.ones(4)) == {"Rank90": 4, "Rank95": 4, "Rank99": 4, "participation ratio": 4}
    found = ranks(np.array([8.0, 1.0, 1.0]))
    assert (found["Rank90"], found["Rank95"]) == (2, 3) and found["participation ratio"] == pytest.approx(100 / 66)
    values = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]]) + 5
    assert spectrum(values[:, None]) == pytest.approx([18 / 3, 2 / 3])
    assert ranks(spectrum(torch.ones(5, 1, 3)))["participation ratio"] == 0


def test_cosines_are_those_of_all_pairs():
    values = torch.randn(5, 3, 7, dtype=torch.float64)
    unit = torch.nn.functional.normalize(values, dim=-1)
    pairs = [(one, other) for one in range(5) for other in range(5) if one != other]
    inter = np.mean([float(unit[one, t] @ unit[other, t]) for t in range(3) for one, other in pairs])
    intra = np.mean([float(unit[n, s] @ unit[n, t]) for n in range(5) for s in range(3) for t in range(3) if s != t])
    found = cosines(values)
    assert found["inter, raw"] == pytest.approx(inter) and found["intra, raw"] == pytest.approx(intra)
    centred = cosines(values + 100)
    assert centred["inter, centred"] == pytest.approx(found["inter, centred"])
    assert centred["inter, raw"] > 0.99 and abs(found["inter, whitened"]) < 0.3
    constant = cosines(torch.ones(4, 3, 2))
    assert constant["inter, raw"] == pytest.approx(1) and "inter, whitened" not in constant
    assert mean_cosine(torch.zeros(2, 3)) == 1


def test_probe_is_the_named_one():
    rng = np.random.default_rng(0)
    labels = np.repeat(["a", "b", "c"], [12, 9, 4])
    features = rng.standard_normal((25, 6))
    found = probe(features, labels)
    right, losses = [], []
    for train, test in StratifiedKFold(4, shuffle=True, random_state=0).split(features, labels):
        scaler = StandardScaler().fit(features[train])
        model = LogisticRegression(C=1.0, max_iter=1000).fit(scaler.transform(features[train]), labels[train])
        chances = model.predict_proba(scaler.transform(features[test]))
        right += (model.classes_[chances.argmax(axis=1)] == labels[test]).tolist()
        losses += (-np.log(chances[np.arange(len(test)), np.searchsorted(model.classes_, labels[test])])).tolist()
    assert found["accuracy"] == pytest.approx(np.mean(right)) and found["CE, nats"] == pytest.approx(np.mean(losses))
    shares = np.array([12, 9, 4]) / 25
    assert found["H(Y), nats"] == pytest.approx(-(shares * np.log(shares)).sum()) and found["chance"] == 0.48
    assert found["MI_LB, nats"] == pytest.approx(max(0, found["H(Y), nats"] - found["CE, nats"]))
    planted = probe(np.eye(3)[np.searchsorted(["a", "b", "c"], labels)], labels)
    assert planted["accuracy"] == 1 and planted["above chance"] == 1 and planted["MI_LB, nats"] > 0.5


def test_a_probe_never_learns_from_a_picture_that_it_is_asked_about():
    """Four rows a picture, which features tell apart and which nothing but the picture ties to its answer."""
    rng = np.random.default_rng(0)
    pictures = np.repeat(np.arange(20), 4)
    labels = np.repeat(rng.permutation(["a", "b"] * 10), 4)
    features = rng.standard_normal((20, 64))[pictures]
    for learned, held in split_folds(labels, pictures, 0):
        assert not set(pictures[learned]) & set(pictures[held]) and set(labels[learned]) == {"a", "b"}
    assert len(split_folds(labels, pictures, 0)) == 5
    assert probe(features, labels)["accuracy"] > 0.9  # it knows the picture again
    assert probe(features, labels, pictures=pictures)["accuracy"] < 0.75
    with pytest.raises(NotApplicable, match="3 answers over 3 groups that share no picture cannot be split so"):
        split_folds(np.array(list("aabbcc")), np.array([0, 1, 1, 2, 0, 2]), 0)


def probed(items: list[Item], features: np.ndarray):
    """What `measure_probe` says of features that are all the same vectors."""
    rows = [torch.from_numpy(row) for row in features]
    observed = {number: Observed(emitting=row, question=row, visual=row) for number, row in enumerate(rows)}
    clean = {
        number: Answer([], "", [LatentStep(0, 0, 0, (1, 1), row[None].float(), [])], "eos")
        for number, row in enumerate(rows)
    }
    return measure_probe(SimpleNamespace(items=items, seed=0, clean=clean), observed)


def item_about(answer: str, *colors: int) -> Item:
    images = [Image.new("RGB", (4, 4), (color, 0, 0)) for color in colors]
    return Item(ReasoningSample(images, "what?", [], answer, "row"))


def test_the_pictures_of_repeated_questions_are_kept_apart():
    """Questions about one picture lie in one fold, so that knowing it again does not help."""
    rng = np.random.default_rng(0)
    answers, pictures = rng.permutation(["a", "b"] * 10), np.repeat(np.arange(20), 4)
    features = rng.standard_normal((20, 64))[pictures]
    repeated = probed([item_about(answers[picture], int(picture)) for picture in pictures], features)
    assert all(row["accuracy"] < 0.75 for row in repeated.tables["probes"])
    other = probed([item_about(answers[picture], number) for number, picture in enumerate(pictures)], features)
    assert all(row["accuracy"] > 0.9 for row in other.tables["probes"])


def test_rows_that_share_one_of_their_pictures_are_of_one_group():
    """Also where two rows have none in common and a third has one of each."""
    assert group_by_pictures(["ab", "cd", "ac", "e", "fg", "g", "e"]).tolist() == [0, 0, 0, 1, 2, 2, 1]
    assert group_by_pictures([]).tolist() == []
    rng = np.random.default_rng(0)
    answers, pictures = rng.permutation(["a", "b"] * 10), np.repeat(np.arange(20), 4)
    features = rng.standard_normal((20, 64))[pictures]
    items = [item_about(answers[one], int(one), 100 + number) for number, one in enumerate(pictures)]
    assert len({item.image_digest() for item in items}) == 80
    assert all(row["accuracy"] < 0.75 for row in probed(items, features).tables["probes"])


def test_an_answer_about_one_picture_alone_is_not_probed(data):
    items = read_items(data, "steps", "train", 6)  # red about two pictures, green about one
    observed = {number: Observed() for number in range(6)}
    with pytest.raises(NotApplicable, match="each about two different pictures or more"):
        measure_probe(SimpleNamespace(items=items, seed=0), observed)


def test_enrichment_by_hand():
    flat = torch.full((16,), 1 / 16)
    assert enrichment(flat, (4, 4), (1, 1, 2, 2)) != enrichment(flat, (4, 4), (0, 0, 2, 2))  # nothing lies apart: nan
    assert enrichment(flat, (4, 4), (0, 0, 2, 2)) == pytest.approx(1)
    doubled = flat.clone()
    doubled[[0, 1, 4, 5]] *= 3
    # Windows apart from the region: those from row 2 or column 2 on, which hold a quarter each where they miss it all.
    assert enrichment(doubled, (4, 4), (0, 0, 2, 2)) == pytest.approx(3)
    assert math.isnan(enrichment(flat, (4, 4), (0, 0, 4, 4)))
    assert grid_box((0, 0, 28, 28), (56, 56), (4, 4)) == (0, 0, 2, 2)
    assert grid_box((30, 10, 41, 15), (56, 56), (4, 4)) == (0, 2, 2, 1)


def test_norms_by_hand():
    one, other = Observed(), Observed()
    for seen, scale in ((one, 1.0), (other, 3.0)):
        for kind, size in ((TEXT, 1.0), (IMAGE, 2.0), (LATENT, 10.0)):
            for layer in range(3):
                seen.norms[kind, layer] += [size * scale * (layer + 1)]
    result = measure_norms({0: one, 1: other})
    fed, last = result.tables["ratios"]
    assert fed["mean"] == 20 and fed["over text embeddings"] == 10 and fed["over image embeddings"] == 5
    assert last["over text embeddings"] == 30
    assert result.tables["norms by layer"][0] == {"columns": "text", "input": 2, "1": 4, "final norm": 6}


def test_audit_by_hand():
    step = LatentStep(0, 0, 0, (1, 3), torch.zeros(3, 2), [])
    answers = [Answer([1, 2], "", [step, step], "eos"), Answer([1, 2, 3, 4], "", [], "max_length")]
    found = audit(answers)
    assert found["in latent mode"] == 0.5 and found["blocks or steps an item"] == 1
    assert found["latents a block or step"] == 3 and found["share of latents"] == 0.5
    assert found["stopped by eos"] == found["stopped by max_length"] == 0.5


def test_shared_words_give_no_answer_away():
    assert shared_lead(["I see. It is \\boxed{red}.", "Look. It is \\boxed{blue}."]) == ". It is \\boxed{"
    assert shared_lead(["It is red", "It is blue"]) == "It is "
    with pytest.raises(NotApplicable, match="share no words"):
        shared_lead(["red", "blue"])


def test_edits(data):
    item = read_items(data, "steps", "train", None)[0]
    picture = item.sample.load_images()[0]
    pixels = np.asarray(picture)
    assert (np.asarray(flip(picture, item)) == pixels[:, ::-1]).all()
    gone = np.asarray(remove(picture, item))
    assert (gone[:28, :28] == gone[0, 0]).all() and (gone[28:] == pixels[28:]).all()
    assert crop(0.6)(picture, item).size == turn_hues(picture, item).size == picture.size
    assert not (np.asarray(turn_hues(picture, item)) == pixels).all()


# Arms


def test_arms_are_what_they_are_called(makers, data):
    subject = make(makers, "lare", data)
    calibration = calibrate(subject)
    every = torch.cat([answer.latents() for answer in subject.clean])
    assert_near(calibration.mean, every.mean(dim=0))
    assert calibration.rms == pytest.approx(float(every.square().mean().sqrt()))
    arms = build_arms(subject, calibration)
    assert set(arms) == set(ARMS) and "no picture of the assistant" in arms["oracle"]
    steps = subject.clean[1].steps
    latents = torch.randn(400, 64)
    step = LatentStep(0, 1, 0, (1, 400), latents, steps[1].image_grids)

    def change(name):
        return arms[name].change(latents, step, 1)

    assert not change("zero").any() and (change("constant") == 0.01).all()
    assert float((change("noise_0.3") - latents).std()) == pytest.approx(0.3, rel=0.02)
    assert float((change("noise_0.3_rms") - latents).std()) == pytest.approx(0.3 * calibration.rms, rel=0.02)
    assert float(change("gaussian").std()) == pytest.approx(1, rel=0.02)
    assert_near(change("matched").mean(dim=0), calibration.mean, 6 * float(calibration.std.max()) / 20)
    assert float((change("matched").std(dim=0) / calibration.std).mean()) == pytest.approx(1, rel=0.05)
    assert torch.equal(change("gaussian"), change("gaussian"))  # drawn by place, not by call
    assert not torch.equal(change("gaussian"), arms["gaussian"].change(latents, step, 2))
    for place in ({"index": 0}, {"offset": 1}):
        assert not torch.equal(change("gaussian"), arms["gaussian"].change(latents, replace(step, **place), 1))
    first = arms["first_repeat"].change
    assert torch.equal(first(steps[0].latents, steps[0], 1), steps[0].latents[:1].expand(3, -1))
    assert torch.equal(first(steps[1].latents, steps[1], 1), steps[0].latents[:1].expand(3, -1))
    swap = arms["swap"]
    assert len(swap.draws) == 2 and all(draw.only == {0, 1, 2, 3} for draw in swap.draws)
    for draw in swap.draws:
        donor = draw.donors[1]
        assert subject.items[donor].answer != subject.items[1].answer
        assert torch.equal(draw.change(steps[1].latents, steps[1], 1), subject.clean[donor].steps[1].latents)
    assert swap.draws[0].donors[1] != swap.draws[1].donors[1]
    assert arms["cross_task"].startswith("no item with latents has a donor: one of another task")
    sham = arms["sham"].change(torch.zeros(3, 64), steps[1], 1)
    assert torch.equal(sham, steps[1].latents)
    shared = arms["shared"].draws
    assert len(shared) == 8 and all(draw.has_shared_draws for draw in shared)
    others = [subject.clean[number].steps[1].latents for number in (0, 2, 3)]
    values = [draw.change(steps[1].latents, steps[1], 1) for draw in shared]
    # Half of three others is one: each set serves the latents of one of them, place by place, and not always the same one's.
    assert all(any(torch.allclose(value, other) for other in others) for value in values)
    assert not all(torch.allclose(value, values[0]) for value in values)
    dummy = subject.model.get_input_embeddings().weight[subject.tokenizer.pad_token_id]
    assert (change("dummy") == dummy).all()


def test_a_region_is_a_window_of_the_picture():
    features = torch.arange(20.0)[:, None]
    step = LatentStep(0, 0, 0, (2, 3), torch.zeros(6, 1), [(4, 5)])
    window = random_window(features, step, np.random.default_rng(0)).flatten()
    assert torch.equal(window - window[0], torch.tensor([0.0, 1, 2, 5, 6, 7]))


def test_tables_serve_autoregressive_latents_one_at_a_time():
    table = Table({7: [((1, 3), torch.arange(3.0)[:, None])]})
    for offset, expected in ((0, 0.0), (2, 2.0), (5, 2.0)):
        step = LatentStep(0, 0, 0, (1, 1), torch.zeros(1, 1), [], offset=offset)
        assert table(torch.zeros(1, 1), step, 7).item() == expected


def test_autoregressive_latents_say_which_of_their_block_they_are(makers, data):
    subject, seen = make(makers, "autoregressive", data, batch_size=4), []
    spy = Arm("spy", "spy", lambda latents, step, number: (seen.append((number, step.offset)), latents)[1])
    subject.answer(spy, [0, 1])
    assert [place for place in seen if place[0] == 1][:3] == [(1, 0), (1, 1), (1, 2)]


# Reading given answers


def test_reading_is_generating(subject):
    """Teacher-forced log-probabilities are those of the decoding loop, as it is, changed, and without latents."""
    noisy = build_arms(subject, calibrate(subject))["noise_1.0"]
    for arm in (CLEAN, noisy, without_latents(subject.architecture)):
        subject.__dict__["clean"] = subject.answer(arm)  # its own answers, so that tokens agree
        if arm.is_without_latents:
            subject.__dict__["with_latents"] = [0, 1, 2]
            subject.architecture.scored = lambda tokens: list(range(len(tokens)))
        with arm.inside() as settings:
            inputs = subject.encode([subject.items[number].sample for number in (0, 1, 2)])
            output = subject.model.generate(
                **inputs,
                **subject.architecture.settings() | (settings or {}),
                do_sample=False,
                max_new_tokens=4,
                return_dict_in_generate=True,
                output_logits=True,
                latent_intervention=arm.change
                and (lambda latents, step, arm=arm: arm.change(latents, step, step.row)),
            )
        expected = torch.stack(output.logits, dim=1).log_softmax(dim=-1)
        for number, found in enumerate(subject.logprobs([0, 1, 2], arm)):
            places = subject.architecture.scored(subject.given([number])[0][0])
            assert len(found) == len(places) > 0
            assert_near(found, expected[number, places], 2e-4)


def test_arms_act_on_reading(subject):
    """Every arm moves KL off zero on a model whose weights matter; serving the recorded latents does not."""
    arms = build_arms(subject, calibrate(subject))
    scores = subject.score([CLEAN, *(arm for arm in arms.values() if isinstance(arm, Arm) and arm.name != "oracle")])
    assert max(abs(score.kl) for score in scores["clean"]) == 0
    assert max(abs(score.kl) for score in scores["sham"]) < 1e-6
    for name in ("zero", "shared", "gaussian", "swap", "skip", "dummy", "region"):
        assert max(score.kl for score in scores[name]) > 1e-7, name


def test_single_replacements_against_forwards_by_hand(makers, data):
    subject = make(makers, "lare", data, count=2, batch_size=2)
    observed = observe(subject)
    result = measure_replacement(subject, observed)
    mean = calibrate(subject).mean
    clean, at, expected = subject.clean, 4, []
    for number in range(2):
        answer = clean[number]
        inputs = subject.encode([subject.items[number].sample])
        arguments = subject.architecture.teacher_forced(inputs, [answer.tokens], [answer.steps])
        values = []
        for place in (None, at):
            latents = answer.latents()
            if place is not None:
                latents[place] = mean
            served = iter(latents.split(3))
            with torch.no_grad():
                logits = subject.model(
                    **arguments, latent_intervention=lambda own, step, served=served: next(served)
                ).logits
            chosen = logits[0, : len(answer.tokens)].log_softmax(dim=-1)
            values.append(sum(float(chosen[row, token]) for row, token in enumerate(answer.tokens)))
        expected.append(values[0] - values[1])
    row = result.tables["u_t"][at]
    assert row["latents"] == str(at + 1) and row["u_t"] == pytest.approx(np.mean(expected), abs=1e-4)
    most = result.curves[0].series["the most attended"]
    assert most[0][1] == 0 and most[-1][1] == pytest.approx(result.curves[0].series["the least attended"][-1][1])


def test_places_to_replace():
    assert split_units(3) == [[0], [1], [2]] and [len(part) for part in split_units(40)] == [3] * 8 + [2] * 8
    table = Table({0: [((1, 2), torch.ones(2, 1)), ((1, 2), torch.ones(2, 1))]})
    changed = replaced(table, {0: {1, 2}}, torch.zeros(1)).steps[0]
    assert [values.flatten().tolist() for _, values in changed] == [[1, 0], [0, 1]]
    assert table.steps[0][0][1].all()


# Looking inside


def test_attention_is_that_of_eager_maps(makers, data):
    """Masses by kind, against the maps of one eager forward over the whole sequence."""
    subject = make(makers, "lare", data, batch_size=4)
    observed = observe(subject)
    config, answer = subject.model.config, subject.clean[2]
    seen = observed[2]
    text = subject.model.model.language_model
    inputs = subject.encode([subject.items[2].sample])
    embed = subject.model.get_input_embeddings()
    with torch.no_grad():
        prompt = embed(inputs["input_ids"])
        is_image = inputs["input_ids"][0] == config.image_token_id
        prompt[0, is_image] = subject.image_features([2])[0]
        ends = embed(torch.tensor([[config.bot_token_id], [config.eot_token_id]]))
        parts = [prompt[0], ends[0], answer.latents(), ends[1], embed(torch.tensor(answer.tokens))]
        text.config._attn_implementation = "eager"
        maps = text(inputs_embeds=torch.cat(parts)[None], output_attentions=True).attentions
    first, count = len(is_image) + 1, answer.num_latents
    latents = slice(first, first + count)
    for layer, weights in enumerate(maps):
        mean = weights[0].mean(dim=0)  # (S, S)
        by_latent, by_answer = seen.attention[LATENT, layer], seen.attention[ANSWER, layer]
        assert by_latent.queries == count and by_answer.queries == 1 + len(answer.tokens)
        to_image = mean[latents, : len(is_image)][:, is_image].sum()
        assert float(by_latent.mass[IMAGE]) == pytest.approx(float(to_image), abs=1e-4)
        assert_near(by_answer.latents, mean[first + count :, latents].sum(dim=0), 1e-4)
        entropy = -(mean[latents] * mean[latents].clamp(min=1e-12).log()).sum()
        assert by_latent.entropy == pytest.approx(float(entropy), abs=1e-3)
    order = sum(seen.attention[ANSWER, layer].latents for layer in range(3)).argsort(descending=True)
    assert ranking(seen, count) == order.tolist()


def test_every_column_is_told_apart(subject):
    """Kinds of columns by architecture, and the hidden state that emits the answer's first token."""
    observed = observe(subject)
    for number, seen in observed.items():
        clean = subject.clean[number]
        is_vedas = subject.model.config.model_type == "vedas"
        assert len(seen.norms[LATENT, 0]) == clean.num_latents and bool(seen.norms[REPLAY, 0]) == is_vedas
        norms = sorted(clean.latents().norm(dim=-1).tolist())
        assert sorted(seen.norms[LATENT, 0]) == pytest.approx(norms, abs=1e-4)
        assert len(seen.norms[IMAGE, 0]) == len(subject.image_features([number])[0])
        for (kind, _), attention in seen.attention.items():
            assert float(attention.mass.sum()) == pytest.approx(attention.queries, abs=1e-4), kind
        place = subject.architecture.scored(clean.tokens)[0]
        logits = subject.model.lm_head(seen.emitting).log_softmax(dim=-1)
        assert_near(logits, subject.logprobs([number], CLEAN)[0][0], 2e-4)
        assert clean.tokens[place] == int(logits.argmax()) or subject.model.config.model_type != "lare"


def test_slots_share_of_gain(makers, data):
    """On a model whose answers are by their arm: half of the gain without latents' content, none without anything."""
    subject = make(makers, "lare", data)
    right = {"with latents": [1, 1, 1, 1], "slots only": [1, 1, 0, 0], "nothing": [0, 0, 0, 0]}
    from evaluation.faithfulness.slots import compare as compare_slots

    said = {0: "nothing known", 1: "red"}
    written = {name: [Answer([], said[one], [], "eos") for one in found] for name, found in right.items()}
    for item in subject.items:
        item.row.answer = "red"
    rows = compare_slots(subject, written, [0, 1, 2, 3])
    assert [row["share of gain kept"] for row in rows] == [1, 0.5, 0]
    assert (rows[1]["low, gain kept"], rows[1]["high, gain kept"]) == (0, 1) and rows[0]["low, gain kept"] == 1
    assert [(row["b"], row["c"]) for row in rows] == [(0, 4), (0, 2), (0, 0)]
    assert [row["p"] for row in rows] == [0.125, 0.5, 1] and [row["p (Holm)"] for row in rows[:2]] == [0.25, 0.5]
    assert [row["outside choices"] for row in rows] == [0, 2, 4]
    written["nothing"] = written["with latents"]
    assert math.isnan(compare_slots(subject, written, [0, 1, 2, 3])[1]["share of gain kept"])


def test_markers_alone_are_ordinary_tokens(subject):
    result = measure_slots(subject)
    arms = [row["arm"] for row in result.tables["arms"]]
    assert ("markers only" in arms) == (subject.model.config.model_type != "vedas")
    if subject.model.config.model_type == "vedas":
        assert "no markers" in result.not_applicable["markers only"]
    subject.architecture.check()  # the config is as it was


# The whole


def command(model, processor, data: Path, folder: Path, *extra: str) -> list[str]:
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    output = str(folder / "report")
    return ["--model", str(folder / "model"), "--data", str(data), "--output", output, "--max-new-tokens", "3", *extra]


@pytest.mark.parametrize("kind", ["lare", "vedas", "deeplatent"])
def test_the_whole_report(kind, makers, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(architectures, "SWEEP", (0, 2, 3))
    extra = ["--limit", "8", "--batch-size", "8", *(["--min-latent-blocks", "1"] if kind == "deeplatent" else [])]
    arguments = command(*makers[kind](), data, tmp_path, *extra)
    main(arguments)
    page = (tmp_path / "report" / "faithfulness.html").read_text()
    record = json.loads((tmp_path / "report" / "faithfulness.json").read_text())
    found = record["diagnostics"]
    assert set(found) == set(running.DIAGNOSTICS)
    has_no_part = {name for name, one in found.items() if one["not_applicable"].get("all of it")}
    # D17: an untrained model answers alike.
    assert has_no_part <= {"D14", "D15", "D16", "D17"} | (set() if kind == "deeplatent" else {"D7"})
    text = page.replace('xmlns:xlink="http://', "").replace('xmlns="http://', "")  # names, not places
    assert "<svg" in page and not any(
        mark in text for mark in ("<script", "<link", "<img", "src=", '="http', "@import")
    )
    named = {row["arm"] for row in found["D1"]["tables"]["arms"]} | set(found["D1"]["not_applicable"])
    assert named == {"clean", *ARMS}  # none is silently absent
    assert ("oracle" in found["D1"]["not_applicable"]) == (kind != "deeplatent")
    for name in ("D14", "D15", "D16"):
        assert "how many steps a question needs" in found[name]["not_applicable"]["all of it"]
    for name, one in found.items():
        assert one["tables"] or name in has_no_part, name
        assert one["title"] in page and all(reason.split("'")[0] in page for reason in one["not_applicable"].values())
    assert "swap" in capsys.readouterr().out

    def fail(*arguments):
        raise AssertionError("measured again")

    monkeypatch.setattr(
        running, "DIAGNOSTICS", {name: (title, fail) for name, (title, _) in running.DIAGNOSTICS.items()}
    )
    main(arguments)  # all of it lies there
    assert json.loads((tmp_path / "report" / "faithfulness.json").read_text()) == record
    assert (tmp_path / "report" / "faithfulness.html").read_text() == page
    with pytest.raises(AssertionError, match="measured again"):
        main([*arguments, "--seed", "1"])


def test_a_model_that_opens_no_block_gets_an_audit_and_reasons(makers, data):
    subject = make(makers, "deeplatent", data, min_latent_blocks=0)
    subject.architecture.settings = lambda: {"max_latent_blocks": 0}  # as a model that never writes `<latent>`
    with pytest.raises(NotApplicable, match="none of the 4 questions made the model open a latent block"):
        subject.with_latents  # noqa: B018
    results = {one.name: one for one in running.take_all(subject, ("zero",))}
    assert results["D12"].tables["audit"][0]["in latent mode"] == 0
    assert "--min-latent-blocks 1" in results["D1"].not_applicable["all of it"]


def test_bad_input_is_refused(makers, data, tmp_path):
    model, processor = makers["lare"]()
    model.config.num_refocus_steps = 0
    with pytest.raises(ValueError, match="takes no latent steps: `num_refocus_steps` is 0"):
        Subject(model, processor, [])
    model, _ = makers["deeplatent"]()
    model.config.max_latent_blocks = 0
    with pytest.raises(ValueError, match="opens no latent blocks: `max_latent_blocks` is 0"):
        architecture_of(model)
    model.config = Qwen2_5_VLConfig()
    with pytest.raises(ValueError, match="needs a model with latents.*'qwen2_5_vl', which has none"):
        architecture_of(model)
    options = ["--model", "nowhere", "--data", str(data), "--output", str(tmp_path)]
    with pytest.raises(ValueError, match=r"`arms` must be of .*got \['all'\]"):
        main([*options, "--arms", "all"])
    with pytest.raises(ValueError, match="`limit` must be >= 1, got 0"):
        main([*options, "--limit", "0"])
    with pytest.raises(ValueError, match="needs 4 questions with an image or more; .* gives 2"):
        read_items(data, "steps", "train", 2)


def test_a_missing_picture_of_the_assistant_is_named(data, tmp_path):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        row["image"] = str(data.parent / row["image"])
        row["assistant_images"] = [row["image"]]
    rows[1]["assistant_images"].append("crops/gone.png")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="[Ll]ine 2 of .*data.jsonl: .*must name files.*crops/gone.png is not"):
        read_items(tmp_path / "data.jsonl", "steps", "train", None)


def test_finished_diagnostics_follow_the_assistants_pictures(makers, data, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "looked_at.png").write_bytes(b"one")
    options = build_parser().parse_args(["--model", str(tmp_path / "model"), "--data", str(data), "--output", "-"])
    items = read_items(data, "steps", "train", 4)
    items[0].assistant_images = [str(tmp_path / "looked_at.png")]
    made = makers["lare"]()
    before = key_of(options, items, *made)
    assert key_of(options, items, *made) == before
    (tmp_path / "looked_at.png").write_bytes(b"another")
    assert key_of(options, items, *made) != before


def test_finished_diagnostics_follow_code_and_libraries(makers, data, tmp_path, monkeypatch):
    """The code of the class that answers, wherever it lies, also where the checkpoint's folder does not hold it."""
    (tmp_path / "model").mkdir()
    options = build_parser().parse_args(["--model", str(tmp_path / "model"), "--data", str(data), "--output", "-"])
    items, (model, processor) = read_items(data, "steps", "train", 4), makers["lare"]()
    keys = [key_of(options, items, model, processor)]
    known = entry.version
    for library in ("torch", "transformers"):
        with monkeypatch.context() as patch:
            patch.setattr(entry, "version", lambda name, new=library: "99" if name == new else known(name))
            keys.append(key_of(options, items, model, processor))
    (tmp_path / "remote").mkdir()
    source = tmp_path / "remote" / "modeling_remote.py"
    for text in ("class Remote: pass\n", "class Remote: pass  # otherwise\n"):
        source.write_text(text)
        specification = importlib.util.spec_from_file_location("modeling_remote", source)
        monkeypatch.setitem(sys.modules, "modeling_remote", importlib.util.module_from_spec(specification))
        specification.loader.exec_module(sys.modules["modeling_remote"])
        remote = sys.modules["modeling_remote"].Remote()
        remote.config = model.config
        keys.append(key_of(options, items, remote, processor))
    assert len(set(keys)) == 5 and key_of(options, items, model, processor) == keys[0]


def test_finished_diagnostics_follow_all_of_train_that_they_call(makers, data, tmp_path, monkeypatch):
    """Except for the tokenizer of the controls, which are no diagnostics, and the reading and writing of files."""
    (tmp_path / "model").mkdir()
    options = build_parser().parse_args(["--model", str(tmp_path / "model"), "--data", str(data), "--output", "-"])
    hashed, file_digest = set(), entry.file_digest
    monkeypatch.setattr(entry, "file_digest", lambda *paths: hashed.update(paths) or file_digest(*paths))
    key_of(options, read_items(data, "steps", "train", 4), *makers["lare"]())
    package = Path(entry.__file__).parent
    sources = [path.read_text() for path in package.glob("*.py")]
    modules = {
        name
        for text in sources
        for name in re.findall(r"^from ((?:train|evaluation|conversion)\.\S+) import", text, re.M)
    }
    assert {"train.data.chats", "evaluation.analyses.collection", "evaluation.faithfulness.arms"} <= modules
    root = package.parent.parent
    called = {
        root / f"{name.replace('.', '/')}.py"
        for name in modules
        - {"train.data.small_tokenizer", "conversion.commands", "conversion.writing", "conversion.reading"}
    }
    assert called <= hashed


def test_results_survive_their_file(tmp_path):
    result = Result("D0", "title", "what", tables={"a": [{"x": float("nan"), "y": 1}]})
    running.keep(result, tmp_path / "D0.json")
    again = Result.of(json.loads((tmp_path / "D0.json").read_text()))
    assert math.isnan(again.tables["a"][0]["x"]) and again.title == "title"


# Controls


@pytest.fixture(scope="module")
def squares(tmp_path_factory) -> list[Item]:
    return read_items(controls.write_questions(tmp_path_factory.mktemp("squares"), 16, 5), "steps", "train", None)


def untrained(kind: str, squares: list[Item]) -> Subject:
    torch.manual_seed(0)
    return Subject(*controls.build(kind), squares, 16, 3)


def test_the_positive_control_knows_the_picture_through_its_latents_alone(squares):
    """By construction, whatever its weights: with given latents all pictures are one."""
    subject = untrained("positive", squares)
    inputs = subject.encode([item.sample for item in squares])
    arguments = partial(subject.architecture.teacher_forced, inputs, [[1, 2]] * 16, [])
    with torch.no_grad():
        own = subject.model(**arguments()).logits
        same = subject.model(**arguments(), latent_intervention=lambda latents, step: torch.ones_like(latents)).logits
    assert_near(same, same[:1].expand_as(same))
    assert (own - own[:1]).abs().max() > 1e-3


def test_the_negative_control_does_not_move(squares):
    """Constant latents: another picture's, the shared one, the first and a draw from their distribution are they themselves."""
    subject = untrained("negative", squares)
    found = measure_interventions(subject, ("sham", "shared", "swap", "matched", "first_repeat", "gaussian"))
    rows = {row["arm"]: row for row in found.tables["arms"]}
    for name in ("sham", "shared", "swap", "matched", "first_repeat"):
        assert rows[name]["flip rate"] == 0 and rows[name]["KL"] < 1e-7 and rows[name]["change of accuracy"] == 0
    assert rows["gaussian"]["KL"] > 1e-5  # untrained, it still reads what stands there
    latents = subject.clean[0].latents()
    assert_near(latents, latents[:1].expand_as(latents)) and latents.any()


def test_a_control_is_kept_for_the_same_seed_and_steps_alone(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(controls, "train", lambda kind, *made: trained.append((kind, made[-1])))
    for seed in (0, 0, 1, 1):
        assert controls.make_control("negative", tmp_path, seed, 8) == tmp_path / "negative"
    assert trained == [("negative", 150)] * 2
    monkeypatch.setitem(controls.CONTROLS, "negative", 151)
    controls.make_control("negative", tmp_path, 1, 8)
    assert trained[2:] == [("negative", 151)]
    (tmp_path / "negative" / "made.json").unlink()  # as one that was killed, or made by an earlier version
    controls.make_control("negative", tmp_path, 1, 8)
    assert len(trained) == 4


def test_what_a_control_must_do():
    def row(arm: str, accuracy: float) -> dict:
        return {"arm": arm, "accuracy": accuracy, "change of accuracy": accuracy - 100}

    good = [row("clean", 100), row("shared", 12), row("swap", 12), row("matched", 12)]
    assert controls.judge("positive", good) == []
    assert controls.judge("positive", [good[0], row("swap", 40)]) == ["swap leaves 40.0 %"]
    assert controls.judge("negative", good[:2]) == ["shared changes -88.0 points"]
    assert controls.judge("negative", [good[2]]) == ["only 12.0 % right as it is"]
    form = [good[0], row("zero", 0), row("gaussian", 5), row("swap", 100), row("noise_0.1", 50)]
    assert controls.judge("form", form, controls.UNUSED + " of this picture") == []
    assert controls.judge("form", [good[0], row("zero", 90), row("swap", 90)]) == [
        "zero leaves 90.0 %",
        "swap changes -10.0 points",
    ]
    assert "the report says" in controls.judge("form", form, controls.USED)[0]
    assert "the report says" in controls.judge("positive", good, controls.UNUSED)[0]


def test_the_form_control_breaks_chosen_rows():
    torch.manual_seed(0)
    latents = torch.ones(4, 6)
    is_broken = torch.tensor([False, True])
    assert controls.break_rows(is_broken, latents, LatentStep(0, 0, 0, (2, 2), latents, [])) is latents
    changed = controls.break_rows(is_broken, latents, LatentStep(1, 0, 0, (2, 2), latents, []))
    assert changed.shape == latents.shape and not torch.equal(changed, latents)


@pytest.mark.slow
def test_trained_controls_behave(tmp_path):
    result = controls.controls_result(tmp_path)
    for kind, note in zip(controls.CONTROLS, result.notes):
        assert note.startswith(f"The {kind} control behaves.")
    assert AutoModel.from_pretrained(tmp_path / "positive").config.answer_sees_image is False
