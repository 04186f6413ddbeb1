"""Vedas in the scopes that cache: every identity, on both backbones."""

import copy

import pytest
import torch
from conftest import CHAT_TEMPLATE, backbone_fields, build_tokenizer, encode, picture, user_turn
from helpers import GREEDY, assert_near, enable_checkpointing, step_logits, vision
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer

from configuration_latentvlm import VedasConfig
from modeling_latentvlm import VedasForConditionalGeneration
from modeling_latentvlm.visual_replay_vedas import densest_window
from processing_latentvlm import VedasProcessor
from processing_latentvlm.processing_vedas import LATENT_TOKEN


pytestmark = pytest.mark.core

STOCK = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
}
VISION_OF_QWEN2 = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2, "patch_size": 14}


def fields_of(tokenizer, backbone: str) -> dict:
    fields = backbone_fields(tokenizer)
    if backbone == "qwen2_vl":
        fields["vision_config"] = dict(VISION_OF_QWEN2)
    return copy.deepcopy(fields)


def build(tokenizer, backbone: str = "qwen2_5_vl", **fields) -> VedasForConditionalGeneration:
    """A model whose routers choose, whose gates open, and whose depths count."""
    small = {
        "num_latent_steps": 2,
        "num_replay_tokens": 4,
        "num_routed_tokens": 6,
        "num_routed_step_tokens": 3,
        "routed_layers": [0, 2],
    }
    config = VedasConfig(
        **fields_of(tokenizer, backbone),
        backbone=backbone,
        latent_token_id=tokenizer.convert_tokens_to_ids(LATENT_TOKEN),
        **(small | fields),
    )
    model = VedasForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("depth_scale"):
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
            elif "norm" not in name:
                std = 0.5 if "router" in name else 0.12
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer((LATENT_TOKEN,))


@pytest.fixture(scope="module")
def processor(tokenizer, image_processor):
    return VedasProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def conversations() -> list:
    """One picture, two, and none; a row with fewer image tokens than K x T."""
    return [
        user_turn("what colour?", picture(84, 112, 1)),
        user_turn("which of the two is it, left or right?", picture(56, 56, 2), picture(28, 56, 3)),
        user_turn("hello"),
    ]


@pytest.fixture(scope="module")
def batch(processor, conversations):
    return encode(processor, conversations)


@pytest.fixture(scope="module")
def rows(processor, conversations):
    return [encode(processor, [conversation]) for conversation in conversations]


@pytest.fixture(params=["incremental", "context"])
def scope(request) -> str:
    return request.param


@pytest.fixture(params=["qwen2_vl", "qwen2_5_vl"])
def model(request, scope, tokenizer) -> VedasForConditionalGeneration:
    return build(tokenizer, request.param, routing_scope=scope)


@pytest.mark.parametrize("backbone", list(STOCK))
def test_no_steps_and_no_routers_is_the_backbone(tokenizer, batch, backbone):
    model = build(tokenizer, backbone, num_latent_steps=0, routed_layers=[])
    config_class, stock_class = STOCK[backbone]
    fields = fields_of(tokenizer, backbone)
    stock = stock_class(config_class(**fields)).eval()
    stock.load_state_dict(model.state_dict())
    slot = [model.config.latent_token_id]
    assert_near(
        step_logits(model.generate(**batch, **GREEDY)),
        step_logits(stock.generate(**batch, suppress_tokens=slot, **GREEDY)),
    )
    inputs = {name: value for name, value in batch.items() if name != "mm_token_type_ids"}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :30] = -100
    assert_near(model(**inputs, labels=labels).loss, stock(**batch, labels=labels).loss)


def test_a_padded_row_equals_the_row_alone(model, batch, rows):
    output = model.generate(**batch, output_latents=True, **GREEDY)
    for row, inputs in enumerate(rows):
        alone = model.generate(**inputs, output_latents=True, **GREEDY)
        assert_near(step_logits(output)[row], step_logits(alone)[0])
        for step, other in zip(output.latent_trace.row(row), alone.latent_trace.row(0), strict=True):
            assert torch.equal(step.picked_tokens, other.picked_tokens) if other.picked_tokens is not None else True


def with_slots(model, inputs, sequences) -> torch.Tensor:
    """Put the slots between prompt and answer."""
    length = inputs["input_ids"].shape[1]
    slots = torch.full((len(sequences), model.config.num_latent_steps), model.config.latent_token_id)
    return torch.cat([sequences[:, :length], slots, sequences[:, length:]], dim=1)


def test_generate_equals_the_training_forward(model, rows):
    for inputs in rows:
        output = model.generate(**inputs, **GREEDY)
        ids = with_slots(model, inputs, output.sequences[:, :-1])
        start = inputs["input_ids"].shape[1] + model.config.num_latent_steps
        assert_near(model(ids, **vision(inputs)).logits[:, start - 1 :], step_logits(output))


def test_slots_in_the_prompt_are_the_same(model, rows):
    inputs = rows[0]
    prompt = with_slots(model, inputs, inputs["input_ids"])
    assert_near(
        step_logits(model.generate(prompt, **vision(inputs), **GREEDY)),
        step_logits(model.generate(**inputs, **GREEDY)),
    )


def test_a_later_segment_never_changes_an_earlier_logit(model, rows):
    """Inside the prompt tokens compete; across segments nothing leaks back."""
    inputs = rows[0]
    ids = with_slots(model, inputs, model.generate(**inputs, **GREEDY).sequences)
    other = ids.clone()
    other[0, -3:] = torch.tensor([40, 41, 42])
    first, second = model(ids, **vision(inputs)).logits, model(other, **vision(inputs)).logits
    assert torch.equal(first[:, :-3], second[:, :-3])
    assert (first[:, -3:] - second[:, -3:]).abs().max() > 1e-3
    shorter = copy.deepcopy(model)
    shorter.config.num_latent_steps = 1
    cut = torch.cat([ids[:, : inputs["input_ids"].shape[1] + 1]], dim=1)
    if model.config.routing_scope == "incremental":
        length = cut.shape[1]
        assert_near(shorter(cut, **vision(inputs)).logits, first[:, :length])


def test_beams_and_samples(model, batch, rows):
    settings = GREEDY | {"num_beams": 3, "num_return_sequences": 2, "output_scores": True, "output_latents": True}
    output = model.generate(**batch, **settings)
    for row, inputs in enumerate(rows):
        alone = model.generate(**inputs, **settings)
        assert_near(output.sequences_scores[2 * row : 2 * row + 2], alone.sequences_scores)
    assert [len(output.latent_trace.row(row)) for row in range(6)] == [2] * 6
    torch.manual_seed(0)
    drawn = model.generate(**rows[0], **(GREEDY | {"do_sample": True, "num_return_sequences": 3, "top_k": 50}))
    assert len({tuple(row) for row in drawn.sequences.tolist()}) > 1


def test_naive_loop_without_a_cache(tokenizer, rows):
    """Scope "context", written out: every pass over everything, with whole attention maps from eager."""
    model, inputs = build(tokenizer, routing_scope="context", routed_layers=[]), rows[0]
    output = model.generate(**inputs, output_latents=True, **GREEDY)
    text, config, ids = model.model.language_model, model.config, inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    is_image = ids[0] == config.image_token_id
    embeds[0, is_image] = torch.cat(model.model.get_image_features(**vision(inputs)).pooler_output)
    images, visited = embeds[0, is_image].clone(), torch.zeros(int(is_image.sum()), dtype=torch.bool)
    positions = model._rope_positions(
        ids, None, dict.fromkeys(("video_grid_thw", "second_per_grid_ts")) | vision(inputs)
    )
    text.config._attn_implementation = "eager"
    for step in output.latent_trace.steps:
        result = text(inputs_embeds=embeds, position_ids=positions, output_attentions=True)
        attention = torch.stack(result.attentions).mean(dim=(0, 2))[0, -1, : ids.shape[1]][is_image]
        picked = attention.masked_fill(visited, -1).topk(4).indices.sort().values
        visited[picked] = True
        assert torch.equal(step.picked_tokens, picked)
        replayed = images[picked] * attention[picked].softmax(0)[:, None]
        assert_near(step.latents[0], result.last_hidden_state[0, -1])
        embeds = torch.cat([embeds, replayed[None], result.last_hidden_state[:, -1:]], dim=1)
        positions = torch.cat([positions, positions.max() + 1 + torch.arange(5).expand(3, 1, -1)], dim=-1)
    hidden = text(inputs_embeds=embeds, position_ids=positions).last_hidden_state[0, -1]
    assert_near(model.lm_head(hidden), output.logits[0][0])


def test_latents_and_images_matter(model, rows):
    inputs = rows[0]
    clean = step_logits(model.generate(**inputs, **GREEDY))[:, 0]
    zeroed = step_logits(model.generate(**inputs, latent_intervention="zero", **GREEDY))[:, 0]
    assert (clean - zeroed).abs().max() > 1e-2
    other = dict(inputs) | {"pixel_values": inputs["pixel_values"].flip(0)}
    traces = [model.generate(**one, output_latents=True, **GREEDY).latent_trace for one in (inputs, other)]
    for step, changed in zip(*(trace.steps for trace in traces)):
        assert (step.latents - changed.latents).abs().max() > 1e-2


def test_a_token_is_replayed_once_and_slots_may_stay_empty(model, rows):
    """Eight picks of six image tokens: the second step replays what is left."""
    trace = model.generate(**rows[1], output_latents=True, **GREEDY).latent_trace
    picked = torch.cat([step.picked_tokens for step in trace.steps]).tolist()
    assert sorted(picked) == list(range(6))
    assert [len(step.picked_tokens) for step in trace.steps] == [4, 2]


def test_the_trace_has_the_window_of_every_step(model, rows):
    model.config.replay_window = 2
    trace = model.generate(**rows[2], output_latents=True, **GREEDY).latent_trace
    steps = [step for row in rows for step in model.generate(**row, output_latents=True, **GREEDY).latent_trace.steps]
    assert len(steps) > len(trace.steps)
    for step in steps:
        if step.picked_tokens is None:
            assert step.windows is None
            continue
        (image, top, left, height, width), picked = step.windows[0], step.picked_tokens.tolist()
        first = sum(h * w for h, w in step.image_grids[:image])
        cells = {
            first + (top + y) * step.image_grids[image][1] + left + x for y in range(height) for x in range(width)
        }
        held = len(cells & set(picked))
        assert (height, width) == tuple(min(2, side) for side in step.image_grids[image]) and held >= 1
        assert step.windows == [densest_window(picked, step.image_grids, 2)]


@pytest.mark.parametrize(
    "fields",
    [
        {"replay_pattern": "soft_mix"},
        {"replay_positions": "grid"},
        {"replay_scale": 4.0},
        {"replay_at_inference": False},
        {"routing_depth": 2},
        {"routing_gate": "softmax"},
        {"routing_positions": "renumbered"},
        {"alpha_schedule": "cosine", "alpha_start": 8, "alpha_end": 2},
        {"routed_layers": []},
        {"num_replay_tokens": 100},
        {"num_routed_tokens": 1000},
    ],
)
def test_every_switch_makes_another_model_that_keeps_the_identities(tokenizer, scope, batch, rows, fields):
    base = step_logits(build(tokenizer, routing_scope=scope).generate(**rows[0], **GREEDY))
    model = build(tokenizer, routing_scope=scope, **fields)
    output = model.generate(**rows[0], **GREEDY)
    assert (step_logits(output) - base).abs().max() > 1e-4
    assert_near(step_logits(model.generate(**batch, **GREEDY))[0], step_logits(output)[0])
    ids = with_slots(model, rows[0], output.sequences[:, :-1])
    start = rows[0]["input_ids"].shape[1] + 2
    assert_near(model(ids, **vision(rows[0])).logits[:, start - 1 :], step_logits(output))


def training_batch(model, batch) -> dict:
    """Prompts of unequal length, padded on the right like in training, with slots and answers."""
    pad, slot = model.config.get_text_config().pad_token_id, model.config.latent_token_id
    rows = []
    for ids, mask, extra in zip(batch["input_ids"], batch["attention_mask"], ([40, 41, 42], [43], [44, 45])):
        rows.append([*ids[mask.bool()].tolist(), *[slot] * model.config.num_latent_steps, *extra])
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = torch.full_like(ids, -100)
    for row, (tokens, extra) in enumerate(zip(rows, (3, 1, 2))):
        labels[row, len(tokens) - extra : len(tokens)] = ids[row, len(tokens) - extra : len(tokens)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **vision(batch)}


def gradients(model, inputs) -> dict:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_right_padded_training_equals_rows_alone(model, batch, rows):
    inputs = training_batch(model, batch)
    logits = model(**inputs).logits
    for row, source in enumerate(rows):
        length = int(inputs["attention_mask"][row].sum())
        alone = model(inputs["input_ids"][row : row + 1, :length], **vision(source)).logits
        assert_near(logits[row, :length], alone[0])


@pytest.mark.parametrize("backbone", list(STOCK))
def test_gradients_reach_routers_and_are_equal_with_checkpointing(tokenizer, scope, batch, backbone):
    """Not in the last layer: what it refines there matters only to the token itself."""
    model = build(tokenizer, backbone, routing_scope=scope, routed_layers=[0, 1])
    inputs = training_batch(model, batch)
    expected = gradients(model.train(), inputs)
    for layer in model.config.routed_layers:
        for name in ("score.weight", "score.bias", "depth_scale"):
            assert expected[f"model.language_model.layers.{layer}.router.{name}"].abs().max() > 0
    enable_checkpointing(model)
    actual = gradients(model, inputs)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_near(actual[name], gradient)


@pytest.mark.parametrize("flows", [True, False])
def test_gradients_through_the_latents(tokenizer, scope, batch, flows):
    model = build(tokenizer, routing_scope=scope, backprop_through_latents=flows).train()
    seen = []

    def keep(latents, step):
        if latents.requires_grad:
            latents.retain_grad()
        seen.append(latents)
        return latents

    model(**training_batch(model, batch), latent_intervention=keep).loss.backward()
    assert len(seen) == 6  # two steps in three rows
    assert all((latents.grad is not None and latents.grad.abs().max() > 0) == flows for latents in seen)


def test_saved_and_loaded_elsewhere(model, rows, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = VedasForConditionalGeneration.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    own = [name for name in VedasConfig.__annotations__ if name != "hub_classes"]
    assert [getattr(again.config, name) for name in own] == [getattr(model.config, name) for name in own]
    assert (tmp_path / "modeling_vedas.py").is_file() and (tmp_path / "processing_vedas.py").is_file()
    assert_near(step_logits(again.generate(**rows[0], **GREEDY)), step_logits(model.generate(**rows[0], **GREEDY)))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"routed_layers": [3]}, r"0\.\.2.*\[3\]"),
        ({"num_routed_tokens": 0}, "`num_routed_tokens` must be >= 1"),
        ({"num_replay_tokens": 0}, "num_replay_tokens"),
        ({"routing_scope": "all"}, "routing_scope"),
        ({"backbone": "llama"}, "backbone"),
    ],
)
def test_wrong_configs_raise(tokenizer, fields, message):
    from huggingface_hub.errors import StrictDataclassError

    with pytest.raises(StrictDataclassError, match=message):
        VedasConfig(**(fields_of(tokenizer, "qwen2_5_vl") | {"latent_token_id": 4} | fields))


def test_wrong_slots_raise(model, batch, rows):
    slot, ids = model.config.latent_token_id, rows[0]["input_ids"]
    with pytest.raises(ValueError, match="has 1 latent slots, but `num_latent_steps` is 2"):
        model.generate(torch.cat([ids, torch.tensor([[slot]])], dim=1), **vision(rows[0]), **GREEDY)
    with pytest.raises(ValueError, match="not in one run"):
        model(torch.cat([ids, torch.tensor([[slot, 40, slot]])], dim=1), **vision(rows[0]))
    with pytest.raises(ValueError, match="neither `past_key_values`"):
        model.generate(**rows[0], cache_implementation="static", **GREEDY)
    with pytest.raises(ValueError, match="one by one"):
        model.generate(**rows[0], latent_intervention="mean", **GREEDY)


def test_a_position_passes_the_decoder_once_and_an_answer_token_takes_one_pass(tokenizer, rows):
    """Scope "incremental": prompt, steps and answer each on the cache of what came before."""
    model, lengths = build(tokenizer, routed_layers=[]), []
    layer = model.model.language_model.layers[1]
    hook = layer.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    model.generate(**rows[0], **GREEDY)
    hook.remove()
    assert lengths == [rows[0]["input_ids"].shape[1], 5, 5, *[1] * 8]  # the first token comes with the last step


def test_incremental_routing_written_out(tokenizer, rows):
    """Segment by segment on caches equals one pass over everything with the selection of each segment by hand.

    The selected tokens of a segment attend to each other and to those of earlier segments, causally, whatever lies between.
    """
    model, calls, outputs = build(tokenizer), [], []
    text = model.model.language_model
    hooks = [
        text.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True),
        text.register_forward_hook(lambda module, args, output: outputs.append(output.last_hidden_state)),
    ]
    model.generate(**rows[0], **(GREEDY | {"max_new_tokens": 1}))
    for hook in hooks:
        hook.remove()
    lengths = [call["inputs_embeds"].shape[1] for call in calls]
    assert lengths == [rows[0]["input_ids"].shape[1], 5, 5]
    states = torch.cat([call["inputs_embeds"] for call in calls], dim=1)
    tables = text.rotary_emb(states, torch.cat([call["position_ids"] for call in calls], dim=2))

    def stock(layer, states, tables):
        causal = torch.ones(states.shape[1], states.shape[1], dtype=torch.bool).tril()[None, None]
        return Qwen2_5_VLDecoderLayer.forward(layer, states, attention_mask=causal, position_embeddings=tables)

    for layer in text.layers:
        states = stock(layer, states, tables)
        if not hasattr(layer, "router"):
            continue
        scores, chosen, start = layer.router(states)[0][0], [], 0
        for length, alpha in zip(
            lengths,
            (model.config.num_routed_tokens, model.config.num_routed_step_tokens, model.config.num_routed_step_tokens),
        ):
            chosen += sorted((scores[start : start + length].topk(alpha).indices + start).tolist())
            start += length
        refined = stock(layer, states[:, chosen], tuple(table[:, chosen] for table in tables))
        states = states.clone()
        states[:, chosen] += scores[chosen].sigmoid()[None, :, None] * refined * layer.router.depth_scale[0]
    assert_near(torch.cat(outputs, dim=1), text.norm(states))


def test_the_trace_names_the_tokens_that_ran_deeper(model, rows):
    """Those of the step's own segment, or of everything so far, as the scope has it."""
    trace = model.generate(**rows[0], output_latents=True, **GREEDY).latent_trace
    incremental = model.config.routing_scope == "incremental"
    for number, step in enumerate(trace.steps):
        assert sorted(step.routed_tokens) == [0, 2]
        length = 5 if incremental else rows[0]["input_ids"].shape[1] + 5 * (number + 1)
        for columns in step.routed_tokens.values():
            assert len(columns) == (
                model.config.num_routed_step_tokens if incremental else model.config.num_routed_tokens
            )
            assert columns.tolist() == sorted(columns.tolist()) and columns.max() < length
    assert model.generate(**rows[0], **GREEDY).latent_trace is None
