"""Analyses: what they measure is what is there, and each command leaves a table and a plot."""

import copy
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from conftest import CHAT_TEMPLATE, build_model, build_tokenizer, encode, picture, user_turn
from helpers import assert_near, open_at
from PIL import Image
from scipy import stats
from test_lare import build, lare_fields
from test_lare_objective import write_vae
from test_processing_lare import QWEN_TEMPLATE, exact
from test_vedas import build as build_vedas
from transformers import AutoModel, AutoProcessor

from configuration_latentvlm.latent_architecture import changed_fields
from evaluation.analyses import attention, convergence, probing, reconstruction
from evaluation.analyses.collection import Study, fields_of_steps, pool_mean_max, prepare_output
from evaluation.analyses.matched_pairs import KINDS, Questions, choose_questions, pair_up, share_out
from modeling_latentvlm import LaReForCausalLM
from processing_latentvlm import DeepLatentProcessor, LaReProcessor, VedasProcessor
from processing_latentvlm.processing_lare import BOT, EOT, IMAGE, REFOCUS_TOKENS
from processing_latentvlm.processing_vedas import LATENT_TOKEN
from train.common.training_model import save_objective
from train.data.reasoning_data import read_reasoning
from train.lare.image_reconstruction import ImageReconstruction, load_vae


WORDINGS = ("what colour?", "which shape is on the left?")


def lare_processor() -> LaReProcessor:
    tokenizer = build_tokenizer(REFOCUS_TOKENS)
    tokenizer.chat_template = QWEN_TEMPLATE
    return LaReProcessor(exact(), tokenizer, patch_size=14, image_size=56)


def lare_model(processor: LaReProcessor, decoder: str = "qwen2", **fields) -> LaReForCausalLM:
    tokenizer = processor.tokenizer
    ids = dict(zip(("bot", "eot", "image"), tokenizer.convert_tokens_to_ids([BOT, EOT, IMAGE])))
    text = copy.deepcopy(lare_fields(decoder)["text_config"]) | {"vocab_size": len(tokenizer)}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    tokens = {"bot_token_id": ids["bot"], "eot_token_id": ids["eot"], "image_token_index": ids["image"]}
    return build(decoder, text_config=text, **(tokens | fields))


def write_questions(folder: Path, num_images: int) -> Path:
    """Two questions about every image, worded alike."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number in range(num_images):
        picture(56, 56, number).save(folder / f"{number}.png")
        for kind, wording in enumerate(WORDINGS):
            rationale = [f"the picture is {number}", f"the question is {kind}", *["and that is all"] * kind]
            rows.append({"image": f"{number}.png", "question": wording, "rationale": rationale, "answer": "red"})
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def processor() -> LaReProcessor:
    return lare_processor()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_questions(tmp_path_factory.mktemp("data"), 12)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, processor) -> Path:
    folder = tmp_path_factory.mktemp("lare")
    lare_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def study(model, processor, data: Path, tmp_path: Path, count: int = 5) -> Study:
    return Study(model, processor, read_reasoning(data)[:count], tmp_path, batch_size=3)


def planted(num: int = 400, size: int = 40) -> tuple[Questions, np.ndarray, np.ndarray]:
    """Questions, two about each image, whose latents hold their image's feature, turned, among noise."""
    rng = np.random.default_rng(0)
    images = np.arange(num) // 2
    chosen, is_train = choose_questions(images, num, rng)
    features = rng.standard_normal((num // 2, size))[images[chosen]]
    latents = features @ rng.standard_normal((size, size)) + rng.standard_normal((num, size))
    return Questions(images[chosen], chosen % 2, is_train), latents, features


def probe(questions: Questions, latents: np.ndarray, features: np.ndarray, num_shuffles: int = 1) -> pandas.DataFrame:
    rng = np.random.default_rng(0)
    train, test = (pair_up(questions, questions.images, side, rng) for side in (True, False))
    projected = [probing.project(values, questions.is_train, 0) for values in (latents, features)]
    rows = probing.run_probes(*projected, train, test, questions.images[train.latents], num_shuffles, 0)
    table = pandas.DataFrame(rows)
    return table[table["pairs"] == "all"].set_index(["probe", "labels"])


def test_probes_find_what_is_planted_and_nothing_else():
    questions, latents, features = planted()
    found = probe(questions, latents, features, 4)
    noise = probe(questions, np.random.default_rng(1).standard_normal(latents.shape), features)
    for name in ("svm", "mlp"):
        assert found.loc[(name, "true"), "accuracy"] > 0.95
        assert found.loc[(name, "true"), "low"] > 0.9
        for row in (found.loc[(name, "shuffled")], noise.loc[(name, "true")]):
            assert row["low"] < row["chance"] < row["high"] and row["chance"] == 0.5


def test_intervals():
    is_right = np.random.default_rng(0).random((5, 40)) < 0.7
    wilson = stats.binomtest(int(is_right[0].sum()), 40).proportion_ci(method="wilson")
    assert probing.interval(is_right[:1]) == (wilson.low, wilson.high)
    runs = is_right.mean(axis=1)
    student = stats.t.interval(0.95, 4, loc=runs.mean(), scale=stats.sem(runs))
    assert probing.interval(is_right) == pytest.approx(student)


def test_shuffled_labels_say_nothing():
    labels = np.repeat([1, 0], [30, 50])
    shuffled = probing.shuffle(labels, np.random.default_rng(0))
    assert shuffled[:30].sum() == 15 and shuffled[30:].sum() == 25


@pytest.mark.parametrize("target", ["image", "text"])
def test_pairs_are_what_they_are_called(target):
    rng = np.random.default_rng(0)
    images, wordings = np.arange(120) // 3, np.arange(120) % 3 % 2  # two of three are worded alike
    chosen, is_train = choose_questions(images, 90, rng)
    assert len(set(chosen)) == 90 and is_train.sum() == 63
    assert not set(images[chosen][is_train]) & set(images[chosen][~is_train])
    questions = Questions(images[chosen], wordings[chosen], is_train)
    contents = questions.images if target == "image" else np.arange(90)
    usable = KINDS[1:] if target == "image" else KINDS  # an image that is shared is no mismatch of images
    for side in (True, False):
        pairs = pair_up(questions, contents, side, rng)
        rows = np.flatnonzero(is_train == side)
        matched = pairs.kinds == "matched"
        assert pairs.labels.sum() * 2 == len(pairs.labels) and (pairs.labels == matched).all()
        assert (pairs.latents[matched] == pairs.features[matched]).all()
        assert sorted(pairs.latents[matched]) == sorted(pairs.latents[~matched]) == rows.tolist()
        assert set(pairs.features) <= set(rows)
        counts = [(pairs.kinds == kind).sum() for kind in usable]
        assert max(counts) - min(counts) <= 1 and sum(counts) == len(rows)
        for first, second, kind in zip(pairs.latents, pairs.features, pairs.kinds):
            shared = (
                questions.images[first] == questions.images[second],
                questions.wordings[first] == questions.wordings[second],
            )
            assert shared == {"matched": (1, 1), "same_image": (1, 0), "same_question": (0, 1), "random": (0, 0)}[kind]


def test_kinds_that_the_data_lack_are_made_up():
    questions = Questions(np.arange(40), np.zeros(40, dtype=int), np.arange(40) < 28)
    pairs = pair_up(questions, questions.images, True, np.random.default_rng(0))
    assert set(pairs.kinds) == {"matched", "same_question"} and len(pairs.kinds) == 56


def test_no_row_is_left_without_a_kind_that_it_has():
    has_kind = {"same_image": np.array([True, True, False]), "random": np.array([False, True, True])}
    for seed in range(10):
        kinds = share_out(has_kind, np.random.default_rng(seed))
        assert all(has_kind[kind][row] for row, kind in enumerate(kinds))


def test_uniform_data_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="100 pairs need 50 questions with an image, but there are 40"):
        choose_questions(np.arange(40), 50, rng)
    with pytest.raises(ValueError, match="are about one image"):
        choose_questions(np.zeros(40, dtype=int), 40, rng)
    questions = Questions(np.arange(40), np.zeros(40, dtype=int), np.arange(40) < 28)
    with pytest.raises(ValueError, match="28 of 28 questions of one side of the split mismatch none"):
        pair_up(questions, np.zeros(40, dtype=int), True, rng)


def test_features_are_the_questions_own(processor, data, tmp_path):
    """In a batch as alone: the projected tokens of its images, its rationale read alone, its latents."""
    model = lare_model(processor)
    asked = study(model, processor, data, tmp_path, 4)
    asked.samples[0].images += asked.samples[2].images
    found = probing.collect(asked, asked.samples, "rationale", 1)
    for row, sample in enumerate(asked.samples):
        inputs = encode(processor, [user_turn(sample.question, *sample.load_images())])
        with torch.no_grad():
            image = torch.cat(list(model.model.get_image_features(inputs["pixel_values"]).pooler_output))
            ids = processor.tokenizer(" ".join(sample.steps), return_tensors="pt")["input_ids"]
            hidden = model.model.language_model(input_ids=ids).last_hidden_state[0]
        output = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True, output_latents=True)
        latents = torch.cat([step.latents for step in output.latent_trace.steps])
        for name, values in {"image": image, "text": hidden, "latents": latents}.items():
            expected = torch.cat([values.mean(dim=0), values.max(dim=0).values])
            assert_near(torch.from_numpy(found[name][row]), expected, 1e-4 if name == "latents" else 1e-5)
            assert_near(pool_mean_max(values), expected)


def test_statistics_are_scipys():
    rng = np.random.default_rng(0)
    without = rng.uniform(0.04, 0.05, 30)
    with_latents = without + rng.uniform(-0.004, 0.01, 30)
    found = attention.compare(with_latents, without)
    paired = stats.ttest_1samp(with_latents - without, 0)
    assert found["paired_t_test"]["statistic"] == pytest.approx(paired.statistic)
    assert found["paired_t_test"]["p_value"] == pytest.approx(paired.pvalue)
    ranked = stats.mannwhitneyu(with_latents, without, alternative="two-sided")
    assert found["mann_whitney"] == {"statistic": ranked.statistic, "p_value": ranked.pvalue}
    assert found["cohens_d"] == pytest.approx(paired.statistic / 30**0.5)
    wins = np.sign(with_latents[:, None] - without).mean()
    assert found["rank_biserial"] == pytest.approx(wins)
    expected = [with_latents.mean(), with_latents.std(ddof=1), *np.percentile(with_latents, [25, 50, 75, 95])]
    assert list(found["with_latents"].values()) == pytest.approx(expected)


@pytest.mark.parametrize("decoder", ["qwen2", "llama"])
def test_shares_are_those_of_eager_maps(decoder, processor, data, tmp_path):
    """The first generated token's row of whole attention maps, over the latents that it was generated behind."""
    model = lare_model(processor, decoder)
    shares = attention.measure_shares(study(model, processor, data, tmp_path))
    assert model.config.num_refocus_steps == 3
    text, embed = model.model.language_model, model.get_input_embeddings()
    text.config._attn_implementation = "eager"
    for row, sample in enumerate(read_reasoning(data)[:5]):
        inputs = encode(processor, [user_turn(sample.question, *sample.load_images())])
        is_image = inputs["input_ids"][0] == model.config.image_token_id
        for arm, num_steps in (("with_latents", 3), ("without_latents", 0)):
            model.config.num_refocus_steps = num_steps
            settings = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_latents": True}
            output = model.generate(**inputs, **settings, eos_token_id=None, do_sample=False)
            with torch.no_grad():
                features = model.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
                prompt = embed(inputs["input_ids"])[0]
                prompt[is_image] = features
                latents = [step.latents for step in output.latent_trace.steps]
                bot, eot = embed(torch.tensor([[model.config.bot_token_id], [model.config.eot_token_id]]))
                parts = [prompt, bot, *latents, eot] if num_steps else [prompt]
                whole = torch.cat([*parts, embed(output.sequences[0, -1:])])[None]
                maps = torch.stack(text(inputs_embeds=whole, output_attentions=True).attentions)
            expected = maps[:, 0, :, -1, : len(is_image)][..., is_image].sum(dim=-1).mean()
            assert shares[arm][row] == pytest.approx(float(expected), abs=1e-5)


def test_changes_are_those_of_a_naive_loop(processor, data, tmp_path):
    model = lare_model(processor)
    table = convergence.measure_convergence(study(model, processor, data, tmp_path), num_steps=4)
    assert model.config.num_refocus_steps == 3
    model.config.num_refocus_steps = 4
    values: dict[tuple[str, int], list[float]] = {}
    for sample in read_reasoning(data)[:5]:
        inputs = encode(processor, [user_turn(sample.question, *sample.load_images())])
        output = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True, output_latents=True)
        means = [step.latents.mean(dim=0).numpy() for step in output.latent_trace.steps]
        for number, mean in enumerate(means):
            found = {"similarity_to_last": mean @ means[-1] / np.linalg.norm(mean) / np.linalg.norm(means[-1])}
            if number:
                before = means[number - 1]
                cosine = mean @ before / np.linalg.norm(mean) / np.linalg.norm(before)
                found["cosine_change"] = 1 - cosine
                found["l1_change"] = np.abs(mean - before).sum() / np.abs(before).sum()
                found["l2_change"] = np.sqrt(((mean - before) ** 2).sum() / (before**2).sum())
            for measure, value in found.items():
                values.setdefault((measure, number + 1), []).append(value)
    assert set(values) == set(zip(table["measure"], table["step"]))
    for row in table.itertuples():
        expected = values[row.measure, row.step]
        assert row.questions == len(expected) == 5
        quantiles = np.quantile(expected, [0.05, 0.25, 0.5, 0.75, 0.95])
        actual = table.loc[row.Index, ["mean", "5%", "25%", "50%", "75%", "95%"]]
        assert actual.tolist() == pytest.approx([np.mean(expected), *quantiles], abs=1e-5)


def test_rows_that_stop_early_count_while_they_go_on():
    one = [torch.ones(2, 3), torch.ones(2, 3) * 2]
    other = [*one, torch.ones(2, 3) * 3]
    table = convergence.summarize(convergence.measure_changes(one) + convergence.measure_changes(other))
    changes = table[table["measure"] == "l1_change"]
    assert changes["questions"].tolist() == [2, 1]
    assert changes["mean"].tolist() == pytest.approx([1.0, 0.5])


COMMANDS = {
    "probing": (probing.main, ["--pairs", "40", "--shuffles", "2"], ["probing.csv", "probing.png"]),
    "attention": (attention.main, [], ["attention.json", "attention_shares.csv", "attention.png"]),
    "convergence": (convergence.main, ["--num-steps", "2"], ["convergence.csv", "convergence.png"]),
}


@pytest.mark.parametrize("command", list(COMMANDS))
def test_commands_write_table_and_plot(command, checkpoint, data, tmp_path, capsys):
    main, extra, files = COMMANDS[command]
    tables = []
    for run in ("first", "second"):
        main(["--model", str(checkpoint), "--data", str(data), "--output", str(tmp_path / run), *extra])
        assert sorted(path.name for path in (tmp_path / run).iterdir()) == sorted(files)
        with Image.open(tmp_path / run / files[-1]) as plot:
            assert plot.format == "PNG" and len(np.unique(plot.convert("L"))) > 10
        tables.append((tmp_path / run / files[0]).read_bytes())
    assert tables[0] == tables[1]  # nothing is left to chance
    assert capsys.readouterr().out.strip()
    if files[0].endswith(".json"):
        assert json.loads(tables[0])["questions"] == 24


@pytest.fixture(scope="module")
def vedas_processor(image_processor) -> VedasProcessor:
    return VedasProcessor(image_processor, build_tokenizer((LATENT_TOKEN,)), chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory) -> Path:
    """Pictures of two sizes, so that rows of a batch are padded."""
    path = write_questions(tmp_path_factory.mktemp("ragged"), 12)
    picture(84, 112).save(path.parent / "0.png")
    return path


@pytest.mark.parametrize("scope", ["incremental", "context", "reference"])
def test_shares_of_vedas(scope, vedas_processor, ragged, tmp_path):
    """Against the weights that each layer's eager attention gives in the second forward of a row alone."""
    # Two tokens a step: the pictures of four have them for both steps, as scope "reference" requires.
    model = build_vedas(vedas_processor.tokenizer, routing_scope=scope, num_replay_tokens=2)
    asked = study(model, vedas_processor, ragged, tmp_path, 3)
    asked.batch_size = 1 if scope == "reference" else 3  # in that scope pads compete: a batch is not as its rows alone
    shares = attention.measure_shares(asked)
    text, weights = model.model.language_model, {}
    text.config._attn_implementation = "eager"

    def keep(module, args, output) -> None:
        weights.setdefault(module.layer_idx, []).append(output[1])

    for layer in text.layers:
        layer.self_attn.register_forward_hook(keep)
    model.register_forward_pre_hook(lambda module, args: weights.clear())
    for row, sample in enumerate(read_reasoning(ragged)[:3]):
        inputs = encode(vedas_processor, [user_turn(sample.question, *sample.load_images())])
        is_image = inputs["input_ids"][0] == model.config.image_token_id
        for arm, num_steps in (("with_latents", 2), ("without_latents", 0)):
            model.config.num_latent_steps = num_steps
            model.generate(**inputs, max_new_tokens=2, eos_token_id=None, do_sample=False)
            rows = torch.stack([found[0][0, :, -1, : len(is_image)] for found in weights.values()])
            expected = rows[..., is_image].sum(dim=-1).mean()
            assert len(rows) == 3 and shares[arm][row] == pytest.approx(float(expected), abs=1e-5)


def test_vedas_converges_and_is_probed(vedas_processor, ragged, tmp_path):
    """One latent a step."""
    model = build_vedas(vedas_processor.tokenizer)
    whole = study(model, vedas_processor, ragged, tmp_path, 24)
    table = convergence.measure_convergence(whole)
    assert table[table["measure"] == "l2_change"]["step"].tolist() == [2]
    assert set(probing.probe_latents(whole, 40, "question", 2)["target"]) == {"image", "text"}


def test_deeplatent_is_probed_where_it_opens_blocks(tokenizer, image_processor, data, tmp_path, monkeypatch):
    model = build_model(tokenizer)
    processor = DeepLatentProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)
    one = study(model, processor, data, tmp_path, 1)
    with pytest.raises(ValueError, match="made no latents for 1 of 1 questions of a batch, the first: Line 1 of"):
        probing.collect(one, one.samples, "rationale", 1)
    inputs = encode(processor, [user_turn(one.samples[0].question, *one.samples[0].load_images())])
    opens = open_at(model, inputs, [[0]])
    monkeypatch.setattr(model, "generate", partial(model.generate, logits_processor=opens))
    found = probing.collect(one, one.samples, "rationale", 3)
    assert {name: values.shape for name, values in found.items()} == dict.fromkeys(found, (1, 2 * 64))


def test_bad_input_is_refused(processor, data, tmp_path):
    model = lare_model(processor)
    few = study(model, processor, data, tmp_path)
    with pytest.raises(ValueError, match="`num_pairs` must be even and >= 40, got 41"):
        probing.probe_latents(few, 41)
    with pytest.raises(ValueError, match="`num_shuffles` must be >= 2, got 1"):
        probing.probe_latents(few, 40, num_shuffles=1)
    with pytest.raises(ValueError, match="40 pairs need 20 questions with an image, but there are 5"):
        probing.probe_latents(few, 40)
    with pytest.raises(ValueError, match="`num_steps` must be 1 to 8 for this model, got 9"):
        convergence.measure_convergence(few, 9)
    with changed_fields(model.config, **fields_of_steps(model.config, 0)):
        for analyse in (attention.measure_shares, convergence.measure_convergence):
            with pytest.raises(ValueError, match="takes no latent steps: `num_refocus_steps` is 0"):
                analyse(few)
        with pytest.raises(ValueError, match="takes no latent steps"):
            probing.probe_latents(few, 40)
    with pytest.raises(ValueError, match="need 2 questions or more, got 1"):
        attention.compare(np.ones(1), np.ones(1))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`output` must be a folder that can be written to"):
        prepare_output(tmp_path / "file" / "folder")


def test_blocks_in_the_text_are_no_steps(tokenizer, data, tmp_path):
    deeplatent = Study(build_model(tokenizer), None, read_reasoning(data), tmp_path, 2)
    for analyse in (attention.measure_shares, convergence.measure_convergence):
        with pytest.raises(ValueError, match=r"one of \['lare', 'vedas'\]; this one is a 'deeplatent'"):
            analyse(deeplatent)


# Reconstruction


@pytest.fixture(scope="module")
def reconstructing(checkpoint, tmp_path_factory) -> tuple[Path, str]:
    """A checkpoint with a U-Net beside it, and the image tokenizer of both."""
    vae_path, folder = str(write_vae(tmp_path_factory.mktemp("vae"))), tmp_path_factory.mktemp("reconstructing")
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    module = ImageReconstruction(64, load_vae(vae_path, crop_size=32), [0.5] * 3, [0.5] * 3, (8, 8, 16, 16), 32)
    save_objective({f"image_reconstruction.{name}": value for name, value in module.state_dict().items()}, folder)
    return folder, vae_path


def test_pictures_are_drawn_from_latents(reconstructing, data, tmp_path, capsys):
    folder, vae_path = reconstructing
    arguments = ["--model", str(folder), "--data", str(data), "--output", str(tmp_path), "--vae_path", vae_path]
    reconstruction.main(
        [*arguments, "--crop_size", "32", "--denoising-steps", "3", "--limit", "3", "--batch-size", "2"]
    )
    table = pandas.read_csv(tmp_path / "reconstruction.csv")
    steps = AutoModel.from_pretrained(folder).config.num_refocus_steps
    assert table["step"].tolist() == list(range(1, steps + 1)) and (table["windows"] == 3).all()
    assert np.isfinite(table[["picture", "control"]].to_numpy()).all()
    Image.open(tmp_path / "reconstruction.png").verify()
    assert "nearer" in capsys.readouterr().out


def test_pictures_and_controls_differ_by_their_latents_alone(reconstructing, data):
    folder, vae_path = reconstructing
    processor = AutoProcessor.from_pretrained(folder)
    study = Study(AutoModel.from_pretrained(folder).eval(), processor, read_reasoning(data)[:3], folder, 2)
    module = reconstruction.load_reconstruction(folder, vae_path, 32, processor.image_processor)
    table, windows, pictures, controls = reconstruction.reconstruct(study, module, 3, seed=1)
    assert not torch.equal(pictures, controls)
    with torch.no_grad():
        for parameter in module.condition.parameters():
            parameter.zero_()  # blind to the latents
    _, _, pictures, controls = reconstruction.reconstruct(study, module, 3, seed=1)
    assert torch.equal(pictures, controls) and windows.shape == pictures.shape
    errors = (pictures - windows).square().mean(dim=(1, 2, 3))
    again = reconstruction.reconstruct(study, module, 3, seed=1)[0]
    assert_near(torch.tensor(again["picture"].tolist()), errors)
    assert len(table) == len(windows)


@pytest.mark.parametrize("num_windows", [1, 2, 3])
def test_controls_are_of_another_question(reconstructing, data, monkeypatch, num_windows):
    """Whatever the number of windows of a step: no control is drawn from the question's own latents."""
    folder, vae_path = reconstructing
    processor, model = AutoProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    model.config.num_windows = num_windows
    samples = read_reasoning(data)[:6:2]  # of three pictures
    study = Study(model, processor, samples, folder, 2)
    module = reconstruction.load_reconstruction(folder, vae_path, 32, processor.image_processor)
    conditions = []

    def sample(latents, *args):
        conditions.append(latents.clone())
        return torch.zeros(len(latents), 3, 32, 32)

    monkeypatch.setattr(module, "sample", sample)
    table, *_ = reconstruction.reconstruct(study, module, 3, seed=1)
    own, others = torch.cat(conditions[0::2]), torch.cat(conditions[1::2])
    assert len(own) == len(table) == len(samples) * model.config.num_refocus_steps * num_windows
    assert not any(torch.allclose(one, other) for one, other in zip(own, others))
    expected = (
        own.unflatten(0, (len(samples), -1)).roll(1, dims=0).flatten(0, 1)
    )  # the same step of the question before
    assert torch.equal(others, expected)


def test_a_control_of_a_step_that_no_other_took_is_of_the_last_one():
    """Rows that stop early, and windows that are missing."""
    questions, steps = [0, 0, 0, 1, 2, 2, 2], [0, 0, 1, 0, 0, 1, 2]
    assert reconstruction.find_donors(questions, steps) == [4, 4, 5, 0, 3, 2, 3]
    with pytest.raises(ValueError, match="only one has windows"):
        reconstruction.find_donors([4, 4], [0, 1])


def test_a_checkpoint_without_a_u_net_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="no trained U-Net"):
        reconstruction.load_reconstruction(checkpoint, str(tmp_path), 32, None)
