"""LaRe: every identity, on both kinds of decoder."""

import copy

import pytest
import torch
from conftest import picture
from helpers import CHECKPOINTING, GREEDY, assert_near, enable_checkpointing, step_logits
from huggingface_hub.errors import StrictDataclassError
from torch.testing import assert_close
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from configuration_latentvlm import LaReConfig
from modeling_latentvlm import LaReForCausalLM
from modeling_latentvlm.decoding_lare import measure_change
from modeling_latentvlm.refocus_extractor_lare import RefocusAttention, RefocusExtractor
from modeling_latentvlm.saliency import LastStateRecorder, SaliencyRecorder, record_attention
from processing_latentvlm import draw_trace


pytestmark = pytest.mark.core

PAD, EOS, IMAGE, BOT, EOT = 0, 1, 120, 121, 122
GRID = 4
LATENTS = {"return_dict_in_generate": True, "output_latents": True}
DECODERS = ("qwen2", "llama")


def lare_fields(decoder: str, vision: str = "clip_vision_model") -> dict:
    text = {
        "model_type": decoder,
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "tie_word_embeddings": False,
    }
    if decoder == "qwen3":
        text["head_dim"] = 16
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    return {
        "text_config": text,
        "vision_config": {"model_type": vision, "image_size": 56, "patch_size": 14, **tower},
        "vision_feature_select_strategy": "default" if vision == "clip_vision_model" else "full",
        "image_token_index": IMAGE,
    }


def build(decoder: str = "qwen2", vision: str = "clip_vision_model", **fields) -> LaReForCausalLM:
    """A model whose weights matter: on a fresh one many mistakes do not show."""
    small = {
        "bot_token_id": BOT,
        "eot_token_id": EOT,
        "num_refocus_steps": 3,
        "window_size": 2,
        "extractor_hidden_size": 24,
        "extractor_num_heads": 2,
        "latent_rms": 0.3,
    }
    model = LaReForCausalLM(LaReConfig(**copy.deepcopy(lare_fields(decoder, vision) | small | fields)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                std = 0.2 if "refocus" in name else 0.1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def stock_twin(model: LaReForCausalLM) -> LlavaForConditionalGeneration:
    """LLaVA around the same weights."""
    fields = lare_fields(model.config.text_config.model_type)
    stock = LlavaForConditionalGeneration(LlavaConfig(**fields)).eval()
    missing, unexpected = stock.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all(name.startswith("refocus.") for name in unexpected)
    return stock


def prompt(*parts) -> list[int]:
    """Tokens of text, with "image" where an image stands."""
    return [token for part in parts for token in ([IMAGE] * GRID**2 if part == "image" else part)]


PROMPTS = [  # one image, two with text between them, none
    prompt([5, 6], "image", [7, 8, 9]),
    prompt([10], "image", [11, 12], "image", [13, 14, 15, 16, 17, 18, 19]),
    prompt([20, 21, 22, 23]),
]


def encode(prompts: list[list[int]], side: str = "left", seed: int = 0) -> dict:
    """Padded prompts and their pictures."""
    width = max(map(len, prompts))
    pads = [[PAD] * (width - len(row)) for row in prompts]
    ones = [[1] * len(row) for row in prompts]
    zeros = [[0] * len(pad) for pad in pads]
    left = side == "left"
    ids = [pad + row if left else row + pad for row, pad in zip(prompts, pads)]
    mask = [zero + one if left else one + zero for one, zero in zip(ones, zeros)]
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    count = sum(row.count(IMAGE) for row in prompts) // GRID**2
    if count:
        pictures = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(seed))
        inputs["pixel_values"] = pictures[:count]
    return inputs


@pytest.fixture
def batch() -> dict:
    return encode(PROMPTS)


@pytest.fixture
def rows() -> list[dict]:
    """Each prompt alone, with its own pictures."""
    pictures = encode(PROMPTS)["pixel_values"]
    alone = [encode([row]) for row in PROMPTS]
    alone[0]["pixel_values"], alone[1]["pixel_values"] = pictures[:1], pictures[1:]
    return alone


@pytest.fixture(params=DECODERS)
def decoder(request) -> str:
    return request.param


@pytest.fixture
def model(decoder) -> LaReForCausalLM:
    return build(decoder)


def pictures(inputs) -> dict:
    return {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs else {}


def test_no_steps_is_llava(decoder, batch):
    model = build(decoder, num_refocus_steps=0)
    stock = stock_twin(model)
    ours, theirs = model.generate(**batch, **GREEDY), stock.generate(**batch, **GREEDY)
    assert_near(step_logits(ours), step_logits(theirs))  # prefill and cached decoding
    assert torch.equal(ours.sequences, theirs.sequences)
    assert ours.num_latents.tolist() == [0, 0, 0]
    inputs = encode(PROMPTS, "right")
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (inputs["input_ids"] == IMAGE), -100)
    first, second = model(**inputs, labels=labels), stock(**inputs, labels=labels)
    attended = inputs["attention_mask"].bool()
    assert_near(first.logits[attended], second.logits[attended])
    assert_near(first.loss, second.loss)


def naive_step(model, embeds, is_image, columns: int):
    """One forward over everything, without cache and with whole attention maps: latents, window and saliency."""
    text, config = model.model.language_model, model.config
    states = []
    hooks = [layer.register_forward_hook(lambda _, __, output: states.append(output[0, -1])) for layer in text.layers]
    result = text(inputs_embeds=embeds, output_attentions=True, use_cache=False)
    for hook in hooks:
        hook.remove()
    saliency = torch.stack(result.attentions).sum(dim=(0, 2))[0, -1, :columns][is_image]
    maps = saliency.view(-1, GRID, GRID)
    best, window = -1.0, None
    for image, values in enumerate(maps):
        for top in range(GRID - 1):
            for left in range(GRID - 1):
                total = values[top : top + 2, left : left + 2].sum()
                if total > best:
                    best, window = total, (image, top, left)
    image, top, left = window
    places = [image * GRID**2 + (top + row) * GRID + left + column for row in (0, 1) for column in (0, 1)]
    visual = embeds[:, :columns][:, is_image][:, places]
    latents, _ = model.refocus(torch.stack(states)[None], visual, torch.ones(1, 4, dtype=torch.bool))
    assert config.num_windows == 1
    return latents, window, saliency


@pytest.mark.parametrize("row", [0, 1])
def test_cached_equals_a_naive_loop(model, rows, row):
    """Everything computed anew at each step by eager attention, with the window found by hand."""
    inputs, length = rows[row], rows[row]["input_ids"].shape[1]
    output = model.generate(**inputs, **(GREEDY | LATENTS))
    text, embed = model.model.language_model, model.get_input_embeddings()
    text.config._attn_implementation = "eager"
    with torch.no_grad():
        features = torch.cat(model.model.get_image_features(inputs["pixel_values"]).pooler_output)
        is_image = inputs["input_ids"][0] == IMAGE
        embeds = embed(inputs["input_ids"])
        embeds[0, is_image] = features
        embeds = torch.cat([embeds, embed(torch.tensor([[BOT]]))], dim=1)
        for step in output.latent_trace.steps:
            latents, window, saliency = naive_step(model, embeds, is_image, length)
            assert step.windows == [(*window, 2, 2)]
            assert_near(step.saliency, saliency)
            assert_near(step.latents, latents[0])
            embeds = torch.cat([embeds, latents], dim=1)
        embeds = torch.cat([embeds, embed(torch.tensor([[EOT]])), embed(output.sequences[:, length:])], dim=1)
        logits = model.lm_head(text(inputs_embeds=embeds).last_hidden_state)[:, -10:-1]
    assert len(output.latent_trace.steps) == 3
    assert_near(logits, step_logits(output))


ADAPTIVE = {"adaptive_stop": "cosine", "max_refocus_steps": 6, "stop_threshold": 0.165}


@pytest.mark.parametrize("fields", [{}, ADAPTIVE])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_equals_the_row_alone(decoder, rows, side, fields):
    model = build(decoder, **fields)
    output = model.generate(**encode(PROMPTS, side), **(GREEDY | LATENTS))
    for row, inputs in enumerate(rows):
        alone = model.generate(**inputs, **(GREEDY | LATENTS))
        assert_near(step_logits(output)[row], step_logits(alone)[0])
        assert output.num_latent_blocks[row] == alone.num_latent_blocks[0]
        for step, other in zip(output.latent_trace.row(row), alone.latent_trace.row(0), strict=True):
            assert_near(step.latents, other.latents)
            assert step.windows == other.windows and step.image_grids == other.image_grids


@pytest.mark.parametrize("measure, threshold", [("cosine", 0.165), ("l1", 0.59), ("l2", 0.57)])
def test_rows_stop_by_themselves(decoder, batch, measure, threshold):
    """At different steps, where the change of the mean latent falls under the threshold, and no later than the most."""
    model = build(decoder, adaptive_stop=measure, max_refocus_steps=6, stop_threshold=threshold)
    output = model.generate(**batch, **(GREEDY | LATENTS))
    counts = output.num_latent_blocks.tolist()
    assert len(set(counts)) > 1, counts
    for row, count in enumerate(counts):
        latents = [step.latents[None] for step in output.latent_trace.row(row)]
        changes = [float(measure_change(now, before, measure)) for before, now in zip(latents, latents[1:])]
        assert len(latents) == count and all(change >= threshold for change in changes[:-1])
        assert changes[-1] < threshold or count == 6


def test_measures_of_change():
    earlier, now = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[3.0, 5.0], [3.0, 3.0]]])
    assert_close(measure_change(now, earlier, "l2"), torch.tensor([0.0]))  # of the means
    now = torch.tensor([[[4.0, 2.0]]])
    assert_close(measure_change(now, earlier, "l1"), torch.tensor([3 / 7]))
    assert_close(measure_change(now, earlier, "l2"), torch.tensor([5**0.5 / 5]))
    assert_close(measure_change(now, earlier, "cosine"), torch.tensor([1 - 20 / (5 * 20**0.5)]))


@pytest.mark.parametrize("fields", [{}, ADAPTIVE])
def test_generate_equals_the_training_forward(decoder, rows, fields):
    model = build(decoder, **fields)
    for inputs in rows:
        output = model.generate(**inputs, **GREEDY)
        ids, length = output.sequences[:, :-1], inputs["input_ids"].shape[1]
        labels = ids.clone()
        labels[:, :length] = -100
        logits = model.train()(ids, labels=labels, **pictures(inputs)).logits
        assert_near(logits[:, length - 1 :], step_logits(model.eval() and output))
        with torch.no_grad():
            assert_near(model(ids, labels=labels, **pictures(inputs)).logits, logits)


def test_a_marker_pair_says_where_latents_go(model, rows):
    """In `forward` and in the prompt of `generate`, behind the question and before the answer's first words."""
    inputs = rows[1]
    output = model.generate(**inputs, **GREEDY)
    ids, length = inputs["input_ids"], inputs["input_ids"].shape[1]
    answer = output.sequences[:, length:-1]
    marked = torch.cat([ids, torch.tensor([[BOT, EOT]]), answer], dim=1)
    logits = model(marked, **pictures(inputs)).logits
    assert logits.shape[1] == marked.shape[1]
    assert_near(logits[:, length + 1 :], step_logits(output))
    again = model.generate(marked[:, : length + 5], **pictures(inputs), **(GREEDY | {"max_new_tokens": 3}))
    assert_near(step_logits(again), step_logits(output)[:, 3:6])
    labels = marked.masked_fill(marked == IMAGE, -100)
    expected = labels.masked_fill((marked == BOT) | (marked == EOT), -100)
    assert_near(
        model(marked, labels=labels, **pictures(inputs)).loss, model(marked, labels=expected, **pictures(inputs)).loss
    )


def test_marker_pairs_without_steps_are_not_there(decoder, rows):
    model, inputs = build(decoder, num_refocus_steps=0), rows[0]
    ids = inputs["input_ids"]
    marked = torch.cat([ids, torch.tensor([[BOT, EOT, 40, 41]])], dim=1)
    plain = torch.cat([ids, torch.tensor([[40, 41]])], dim=1)
    ours, expected = (model(one, **pictures(inputs)).logits for one in (marked, plain))
    assert_near(ours[:, -3:], expected[:, -3:])


def test_latents_and_images_matter(model, rows):
    inputs = rows[0]
    clean = step_logits(model.generate(**inputs, **GREEDY))[:, 0]
    for change in ("zero", "noise", "mean", "shuffle"):
        changed = step_logits(model.generate(**inputs, latent_intervention=change, **GREEDY))[:, 0]
        assert (clean - changed).abs().max() > 1e-3, change
    other = inputs | {"pixel_values": inputs["pixel_values"].flip(-1)}
    traces = [model.generate(**one, **(GREEDY | LATENTS)).latent_trace for one in (inputs, other)]
    for step, changed in zip(*(trace.steps for trace in traces)):
        assert (step.latents - changed.latents).abs().max() > 1e-3


def test_only_what_is_in_the_window_reaches_the_extractor(model, rows):
    """A token outside the window changes no latent but through the language model; one inside does."""
    output = model(**rows[0], output_latents=True)
    image, top, left = output.windows[0, 0, 0].tolist()
    states, visual = torch.randn(1, 3, 64), torch.randn(1, 4, 64)
    attended = torch.tensor([[True, True, True, False]])
    expected = model.refocus(states, visual, attended)[0]
    outside, inside = visual.clone(), visual.clone()
    outside[0, 3] += 1
    inside[0, 2] += 1
    assert torch.equal(model.refocus(states, outside, attended)[0], expected)
    assert not torch.allclose(model.refocus(states, inside, attended)[0], expected)
    attention = output.latent_trace.steps[0].image_attention
    seen = {row * GRID + column for row in (top, top + 1) for column in (left, left + 1)}
    assert image == 0 and set(attention.sum(dim=0).nonzero().flatten().tolist()) == seen
    assert_close(attention.sum(dim=1), torch.ones(3))


def test_saliency_is_eagers(model, batch):
    """Summed over layers and heads, at the last position of every row."""
    text = model.model.language_model
    inputs = {"inputs_embeds": torch.randn(3, 9, 64), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    inputs["attention_mask"][1, :4] = 0
    text.config._attn_implementation = "eager"
    expected = torch.stack(text(**inputs, output_attentions=True).attentions).sum(dim=(0, 2))[:, -1]
    text.config._attn_implementation = "sdpa"
    record_attention(text)
    recorder = SaliencyRecorder(has_gradients=False)
    text(**inputs, saliency=recorder)
    assert_near(recorder.sum(), expected)
    assert not recorder.sum().requires_grad


def test_text_alone_takes_nothing_from_an_image(model, rows):
    """Whatever the extractor's cross-attention holds, and in a batch whatever the other rows look at."""
    text = rows[2]
    expected = step_logits(model.generate(**text, **GREEDY))
    with torch.no_grad():
        for layer in model.refocus.layers:
            for parameter in layer.cross_attention.parameters():
                parameter.mul_(7)
    assert torch.equal(step_logits(model.generate(**text, **GREEDY)), expected)
    output = model(**text, output_latents=True)
    assert output.windows is None and output.latents.shape == (1, 3, 3, 64)
    assert output.latent_trace.steps[0].image_attention is None


def test_attention_to_nothing_is_zero():
    attention = RefocusAttention(8, 2)
    output, weights = attention(
        torch.randn(2, 3, 8), torch.randn(2, 4, 8), torch.tensor([[True] * 4, [False] * 4]), True
    )
    assert not output[1].any() and not weights[1].any() and output[0].any()
    assert_close(weights[0].sum(-1), torch.ones(3))


def test_the_window_lies_in_the_image_that_is_looked_at_most(model, rows):
    for step in model.generate(**rows[1], **(GREEDY | LATENTS)).latent_trace.steps:
        pooled = torch.nn.functional.avg_pool2d(step.saliency.view(2, 1, GRID, GRID), 2, 1, divisor_override=1)
        image, top, left = step.windows[0][:3]
        assert pooled[image, 0, top, left] == pooled.max()


def test_beams_and_samples(model, batch, rows):
    settings = GREEDY | LATENTS | {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    output = model.generate(**batch, **settings)
    for row, inputs in enumerate(rows):
        alone = model.generate(**inputs, **settings)
        assert_near(output.sequences_scores[2 * row : 2 * row + 2], alone.sequences_scores)
    assert [len(output.latent_trace.row(row)) for row in range(6)] == [3] * 6
    assert output.num_latents.tolist() == [9] * 6
    torch.manual_seed(0)
    drawn = model.generate(**rows[0], **(GREEDY | {"do_sample": True, "num_return_sequences": 3, "top_k": 50}))
    assert len({tuple(row) for row in drawn.sequences.tolist()}) > 1
    assert not torch.isin(drawn.sequences[:, rows[0]["input_ids"].shape[1] :], torch.tensor([IMAGE, BOT, EOT])).any()


def test_beams_of_rows_that_stop_at_different_steps(decoder, batch, rows):
    model = build(decoder, **ADAPTIVE)
    settings = GREEDY | LATENTS | {"num_beams": 2, "output_scores": True}
    output = model.generate(**batch, **settings)
    greedy = model.generate(**batch, **GREEDY)
    assert output.num_latent_blocks.tolist() == greedy.num_latent_blocks.tolist()
    assert [len(output.latent_trace.row(row)) for row in range(3)] == output.num_latent_blocks.tolist()
    for row, inputs in enumerate(rows):
        assert_near(output.sequences_scores[row], model.generate(**inputs, **settings).sequences_scores[0])


SWITCHES = [
    {"use_extractor": False},
    {"use_window": False},
    {"use_window": False, "window_size": 99},
    {"num_windows": 2},
    {"window_size": 1},
    {"window_size": 4},
    {"latent_tokens_per_step": 5},
    {"num_refocus_steps": 1},
    {"num_refocus_steps": 8},
    {"extractor_num_layers": 1},
    {"adaptive_stop": "l2", "stop_threshold": 1e9},
]


@pytest.mark.parametrize("fields", SWITCHES)
def test_every_switch_makes_another_model_that_keeps_the_identities(batch, rows, fields):
    model, plain = build(**fields), build()
    output = model.generate(**batch, **(GREEDY | LATENTS))
    assert not torch.allclose(step_logits(output)[:2], step_logits(plain.generate(**batch, **GREEDY))[:2], atol=1e-3)
    for row, inputs in enumerate(rows):
        alone = model.generate(**inputs, **GREEDY)
        assert_near(step_logits(output)[row], step_logits(alone)[0])
        ids, length = alone.sequences[:, :-1], inputs["input_ids"].shape[1]
        labels = ids.clone()
        labels[:, :length] = -100
        logits = model(ids, labels=labels, **pictures(inputs)).logits[:, length - 1 :]
        assert_near(logits, step_logits(alone))
    count = fields.get("num_refocus_steps", 2 if "adaptive_stop" in fields else 3)
    assert output.num_latent_blocks.tolist() == [count] * 3
    assert output.latent_trace.steps[0].latents.shape == (fields.get("latent_tokens_per_step", 3), 64)


def test_without_the_extractor_latents_are_the_hidden_states(rows):
    model = build(use_extractor=False)
    assert not any(name.startswith("refocus") for name in model.state_dict())
    states = []
    for layer in model.model.language_model.layers:
        layer.register_forward_hook(lambda _, __, output: states.append(output[0, -1]))
    output = model(**rows[0], output_latents=True)
    assert torch.equal(output.latents[0].flatten(0, 1), torch.stack(states[:9]))


def test_latents_have_the_size_of_token_embeddings(model, rows):
    latents = model(**rows[0], output_latents=True).latents
    assert_near(latents.square().mean(dim=-1).sqrt(), torch.full(latents.shape[:-1], 0.3))


def training_batch() -> dict:
    """Prompts of unequal length, padded on the right like in training, with answers."""
    answers = [[40, 41, 42], [43], [44, 45]]
    inputs = encode([row + extra for row, extra in zip(PROMPTS, answers)], "right")
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, (tokens, extra) in enumerate(zip(PROMPTS, answers)):
        labels[row, len(tokens) : len(tokens) + len(extra)] = torch.tensor(extra)
    return inputs | {"labels": labels}


def gradients(model, inputs) -> dict:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_labels_the_last_token_has_what_follows_the_latents(model, rows, side):
    """Not the last column, where that is padding."""
    inputs = encode(PROMPTS, side)
    output = model(**inputs, output_latents=True)
    last = (torch.arange(inputs["input_ids"].shape[1]) * inputs["attention_mask"]).argmax(dim=1)
    assert [step.column for step in output.latent_trace.steps[::3]] == (last + 1).tolist()
    for row, source in enumerate(rows):
        first = model.generate(**source, **(GREEDY | {"max_new_tokens": 1})).logits[0]
        assert_near(output.logits[row, last[row]], first[0])


@pytest.mark.parametrize("fields", [{}, ADAPTIVE])
def test_right_padded_training_equals_rows_alone(decoder, rows, fields):
    model, inputs = build(decoder, **fields), training_batch()
    output = model(**inputs, output_latents=True)
    for row, source in enumerate(rows):
        length = int(inputs["attention_mask"][row].sum())
        one = {name: inputs[name][row : row + 1, :length] for name in ("input_ids", "labels")}
        alone = model(**one, **pictures(source), output_latents=True)
        assert_near(output.logits[row, :length], alone.logits[0])
        taken = output.latent_mask[row]
        assert_near(output.latents[row][taken], alone.latents[0])
        assert not output.latents[row][~taken].any()


@pytest.mark.parametrize("fields", [{}, {"latent_tokens_per_step": 2}, ADAPTIVE])
def test_gradients_reach_every_new_weight_and_are_equal_with_checkpointing(decoder, fields):
    model, inputs = build(decoder, **fields).train(), training_batch()
    expected = gradients(model, inputs)
    new = {name for name, _ in model.named_parameters() if name.startswith("refocus.")}
    assert new and all(expected[name].abs().max() > 0 for name in new)
    for name in ("model.language_model.layers.0.mlp.up_proj.weight", "model.multi_modal_projector.linear_1.weight"):
        assert expected[name].abs().max() > 0
    enable_checkpointing(model)
    actual = gradients(model, inputs)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_near(actual[name], gradient)


def test_gradients_without_steps_are_equal_with_checkpointing(decoder):
    """A cache that the first run fills must not be there when a layer runs again."""
    model, inputs = build(decoder, num_refocus_steps=0).train(), training_batch()
    expected = gradients(model, inputs)
    enable_checkpointing(model)
    actual = gradients(model, inputs)
    for name, gradient in expected.items():
        assert_near(actual[name], gradient)


@pytest.mark.parametrize("flows", [True, False])
def test_gradients_through_the_latents(rows, flows):
    """Without, those of the last latents do not reach the forwards that they were made from."""
    model = build(backprop_through_latents=flows).train()
    output = model(**rows[0], output_latents=True)
    assert output.latents.requires_grad and output.image_hidden_states.requires_grad
    model.refocus.requires_grad_(False)
    output = model(**rows[0], output_latents=True)
    first = model.model.language_model.layers[0].self_attn.q_proj.weight
    (gradient,) = torch.autograd.grad(output.latents[:, -1].sum(), first, allow_unused=True)
    assert (gradient is not None and gradient.abs().max() > 0) == flows


def test_text_alone_still_gives_every_weight_a_gradient(rows):
    """So that processes without an image do not hang a sharded model."""
    model = build().train()
    labels = rows[2]["input_ids"].clone()
    labels[:, :2] = -100
    found = gradients(model, rows[2] | {"labels": labels})
    new = {
        name for name, _ in model.named_parameters() if name.startswith(("refocus.", "model.multi_modal_projector."))
    }
    assert new <= found.keys()
    assert not any(found[name].any() for name in new if "multi_modal" in name)


def test_what_forward_returns_of_the_latents(model, batch):
    output = model(**batch, output_latents=True)
    assert output.latents.shape == (3, 3, 3, 64) and output.latent_mask.all()
    assert output.windows.shape == (3, 3, 1, 3) and (output.windows[2] == -1).all()
    assert output.image_hidden_states.shape == (3, GRID**2, 64)
    for step in output.latent_trace.steps:
        assert torch.equal(step.latents, output.latents[step.row, step.index])
        if step.windows:
            assert step.windows[0][:3] == tuple(output.windows[step.row, step.index, 0].tolist())
    plain = model(**batch)
    assert plain.latents is None and plain.latent_trace is None
    assert torch.equal(plain.logits, output.logits)


def test_interventions(model, batch):
    clean = model.generate(**batch, **(GREEDY | LATENTS)).latent_trace
    swapped = model.generate(**batch, latent_intervention="swap", **(GREEDY | LATENTS)).latent_trace
    for row in range(3):
        assert_near(swapped.row(row)[0].latents, clean.row((row + 1) % 3)[0].latents)
    seen = []

    def double(latents, step):
        seen.append((step.row, step.index, step.windows))
        return 2 * latents

    changed = model.generate(**batch, latent_intervention=double, **(GREEDY | LATENTS)).latent_trace
    assert_near(changed.row(0)[0].latents, 2 * clean.row(0)[0].latents)
    assert [(row, step) for row, step, _ in seen] == [(row, step) for step in range(3) for row in range(3)]
    assert seen[0][2] == clean.row(0)[0].windows
    with pytest.raises(ValueError, match="shape"):
        model.generate(**batch, latent_intervention=lambda latents, step: latents[:1], **GREEDY)
    with pytest.raises(ValueError, match="latent_intervention"):
        model.generate(**batch, latent_intervention="nothing", **GREEDY)


def test_the_trace_can_be_drawn(model, batch):
    trace = model.generate(**batch, **(GREEDY | LATENTS)).latent_trace
    widths = [draw_trace(trace, [picture(56, 56)] * count, row=row).width for row, count in enumerate((1, 2, 0))]
    assert widths[0] == widths[1] == 4 * (336 + 12) + 12  # the picture and three steps
    with pytest.raises(ValueError, match="looked at 2 images, got 1"):
        draw_trace(trace, [picture(56, 56)], row=1)


def test_a_position_passes_the_decoder_once(model, rows):
    lengths = []
    hook = model.model.language_model.layers[1].register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1])
    )
    model.generate(**rows[0], **GREEDY)
    hook.remove()
    assert lengths == [rows[0]["input_ids"].shape[1] + 1, 3, 3, 4, *[1] * 8]


def test_only_the_last_position_of_a_layer_is_kept(model, rows):
    """Not as a view, which would keep all positions."""
    recorder, layers = LastStateRecorder(), model.model.language_model.layers
    with torch.no_grad():
        model.model.language_model(rows[2]["input_ids"], last_states=recorder)
    assert list(recorder.states) == list(range(len(layers)))
    assert all(state.untyped_storage().nbytes() == state.nbytes for state in recorder.states.values())


def test_images_are_encoded_once(model, batch):
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *args: calls.append(1))
    model.generate(**batch, **(GREEDY | {"num_beams": 3}))
    assert len(calls) == 1


def test_why_an_answer_ended(model, rows):
    output = model.generate(**rows[0], **(GREEDY | {"eos_token_id": None}))
    assert output.stop_reason == ["max_length"]
    end = int(output.sequences[0, -3])
    stopped = model.generate(**rows[0], **(GREEDY | {"eos_token_id": end}))
    assert stopped.stop_reason == ["eos"] and stopped.sequences[0, -1] == end


def test_streaming(model, rows):
    class Keep:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    streamer = Keep()
    output = model.generate(**rows[0], streamer=streamer, **GREEDY)
    assert streamer.tokens == [*output.sequences[0].tolist(), "end"]


@pytest.mark.parametrize("vision", ["clip_vision_model", "siglip_vision_model"])
def test_qwen3_and_siglip(rows, vision):
    model = build("qwen3", vision)
    output = model.generate(**rows[1], **GREEDY)
    ids, length = output.sequences[:, :-1], rows[1]["input_ids"].shape[1]
    labels = ids.clone()
    labels[:, :length] = -100
    assert_near(model(ids, labels=labels, **pictures(rows[1])).logits[:, length - 1 :], step_logits(output))


def test_bfloat16(model, batch):
    exact = step_logits(model.generate(**batch, **GREEDY))[:, 0]
    half = model.to(torch.bfloat16)
    output = half.generate(**batch, **(GREEDY | LATENTS))
    assert {step.latents.dtype for step in output.latent_trace.steps} == {torch.bfloat16}
    error = (step_logits(output)[:, 0].float() - exact).norm() / exact.norm()
    assert error < 0.2  # rounding, at most another window; a mistake is off by all of it
    half.train()(**training_batch()).loss.backward()


def test_under_autocast(model):
    inputs = training_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.train()(**inputs).loss
    loss.backward()
    assert (loss - model(**inputs).loss).abs() < 0.1


def test_any_attention_implementation(model, batch):
    """The one that is configured runs, whichever it is; the saliency row is computed beside it."""
    expected = step_logits(model.generate(**batch, **GREEDY))
    model.set_attn_implementation("eager")
    assert_near(step_logits(model.generate(**batch, **GREEDY)), expected)


def test_trainer_moves_every_new_weight(model, tmp_path):
    inputs, before = training_batch(), {name: weight.clone() for name, weight in model.named_parameters()}
    rows = [{name: values[row] for name, values in inputs.items() if name != "pixel_values"} for row in range(3)]

    def collate(samples: list[dict]) -> dict:
        return default_data_collator(samples) | {"pixel_values": inputs["pixel_values"]}

    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        max_steps=1,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        remove_unused_columns=False,
        disable_tqdm=True,
        data_seed=1,
        **{CHECKPOINTING: True},
    )
    sampler = SequentialTrainer(model=model, args=args, train_dataset=rows, data_collator=collate)
    sampler.train()
    new = [name for name in before if name.startswith(("refocus.", "model.multi_modal_projector."))]
    assert not any(torch.equal(before[name], dict(model.named_parameters())[name]) for name in new)
    sampler.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "modeling_lare.py").is_file()


class SequentialTrainer(Trainer):
    """Keeps the rows in the order of their pictures."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


DISK = {
    "model.vision_tower": "cpu",
    "model.multi_modal_projector": "disk",
    "model.language_model": "disk",
    "lm_head": "cpu",
}


@pytest.mark.parametrize("kind", ["memory", "disk", "device_map"])
def test_offloaded_weights(kind, model, batch, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    expected = step_logits(model.generate(**batch, **GREEDY))
    if kind == "memory":
        model = accelerate.cpu_offload(model, execution_device="cpu")
    elif kind == "disk":
        model = accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    else:
        model.save_pretrained(tmp_path / "checkpoint")
        device_map = DISK | {"refocus": "disk"}
        model = LaReForCausalLM.from_pretrained(
            tmp_path / "checkpoint", device_map=device_map, offload_folder=str(tmp_path / "offloaded")
        )
    assert_near(step_logits(model.generate(**batch, **GREEDY)), expected)


def test_saved_and_loaded(model, rows, tmp_path):
    model.save_pretrained(tmp_path)
    again, info = LaReForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    own = [name for name in LaReConfig.__annotations__ if name != "hub_classes"]
    assert [getattr(again.config, name) for name in own] == [getattr(model.config, name) for name in own]
    assert_near(step_logits(again.generate(**rows[0], **GREEDY)), step_logits(model.generate(**rows[0], **GREEDY)))


def test_a_fresh_model_is_initialised():
    model = LaReForCausalLM(build().config)
    for name, weight in model.named_parameters():
        assert weight.isfinite().all() and weight.abs().max() < 2, name
        if "refocus" in name and "norm" in name:
            assert (weight == 1).all()
    assert 0.01 < model.refocus.layer_embedding.weight.std() < 0.03


def test_the_size_of_the_papers_extractor():
    config = LaReConfig()
    with torch.device("meta"):
        extractor = RefocusExtractor(config)
    assert 80e6 < sum(weight.numel() for weight in extractor.parameters()) < 90e6


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"window_size": 5}, r"`window_size` \(5\).*\(4\)"),
        ({"num_refocus_steps": -1}, "`num_refocus_steps` must be >= 0, got -1"),
        ({"num_refocus_steps": 9}, r"`num_refocus_steps` \(9\)"),
        ({"num_windows": 0}, "num_windows"),
        ({"adaptive_stop": "linf"}, "adaptive_stop.*linf"),
        ({"stop_threshold": 0.0}, "stop_threshold"),
        ({"stop_threshold": float("nan")}, "stop_threshold"),
        ({"extractor_num_heads": 5}, r"`extractor_num_heads` \(5\).*\(24\)"),
        ({"latent_tokens_per_step": 0}, "latent_tokens_per_step"),
        ({"use_extractor": False, "latent_tokens_per_step": 2}, "needs `use_extractor`"),
        ({"bot_token_id": 500}, "bot_token_id.*500"),
        ({"bot_token_id": EOT}, "differ"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
    ],
)
def test_wrong_configs_raise(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        build(**fields)


def test_wrong_towers_and_decoders_raise():
    fields = lare_fields("qwen2")
    with pytest.raises(ValueError, match="image_size.*square.*56 x 28"):
        LaReConfig(**(fields | {"vision_config": fields["vision_config"] | {"image_size": [56, 28]}}))
    with pytest.raises(StrictDataclassError, match="text_config.model_type.*gpt2"):
        LaReConfig(**(fields | {"text_config": {"model_type": "gpt2"}}))
    sliding = fields["text_config"] | {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8}
    with pytest.raises(StrictDataclassError, match="full_attention"):
        LaReConfig(**(fields | {"text_config": sliding, "window_size": 2}))


def test_wrong_inputs_raise(model, batch, rows):
    ids = rows[0]["input_ids"]
    with pytest.raises(ValueError, match=r"\(images, channels, 56, 56\).*28"):
        model(ids, pixel_values=torch.randn(1, 3, 28, 56))
    with pytest.raises(ValueError, match="Row 0.*16 image placeholders, but its images have 0"):
        model(ids)
    with pytest.raises(ValueError, match="1 more images were given"):
        model.generate(ids, pixel_values=torch.randn(2, 3, 56, 56), **GREEDY)
    with pytest.raises(ValueError, match=r"rows \[0\]"):
        model(torch.cat([ids, torch.tensor([[BOT, 40, EOT]])], dim=1), **pictures(rows[0]))
    with pytest.raises(ValueError, match="once, side by side"):
        model(torch.cat([ids, torch.tensor([[BOT, EOT, BOT, EOT]])], dim=1), **pictures(rows[0]))
    labels = ids.clone()
    labels[:, :6] = -100
    with pytest.raises(ValueError, match="Image tokens cannot be labels"):
        model(ids, labels=labels, **pictures(rows[0]))
    with pytest.raises(ValueError, match="`position_ids` cannot be given"):
        model(ids, position_ids=torch.arange(ids.shape[1])[None], **pictures(rows[0]))
    with pytest.raises(
        ValueError, match="Row 0 of the prompt has 510 tokens and 9 latents, but the context holds 512"
    ):
        model.generate(torch.full((1, 510), 40), **GREEDY)
    with pytest.raises(ValueError, match="neither `past_key_values`"):
        model.generate(**rows[0], cache_implementation="static", **GREEDY)
    with pytest.raises(ValueError, match="return_dict_in_generate"):
        model.generate(**rows[0], output_latents=True)
    with pytest.raises(ValueError, match="input_ids"):
        model.generate(pixel_values=batch["pixel_values"])
