"""`forward` with blocks in the sequence: the same function as `generate`, with gradients, one pass over each segment."""

import pytest
import torch
import torch.nn.functional as F
from conftest import build_model, encode, picture, stock_twin, user_turn
from helpers import assert_near, enable_checkpointing, vision


pytestmark = pytest.mark.core


def answer(*parts) -> dict:
    """An assistant turn of words and grids."""
    items = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "latent", "grid": part} for part in parts
    ]
    return {"role": "assistant", "content": items}


@pytest.fixture(scope="module")
def trajectories() -> list:
    """Rows with two blocks, one block, and none; one and two images; unequal lengths."""
    return [
        [*user_turn("what?", picture(56, 84, 1)), answer("look", (2, 3), "and", (4, 1), "red")],
        [
            *user_turn("which of both?", picture(112, 112, 2), picture(56, 28, 3)),
            answer("there it is", (1, 1), "the left one"),
        ],
        [*user_turn("hello"), answer("hi")],
    ]


@pytest.fixture(scope="module")
def samples(processor, trajectories):
    return encode(processor, trajectories, add_generation_prompt=False)


def targets(inputs) -> torch.Tensor:
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


def test_a_padded_row_equals_the_row_alone(shared_model, processor, trajectories, samples):
    logits = shared_model(**samples).logits
    for row, trajectory in enumerate(trajectories):
        alone = encode(processor, [trajectory], add_generation_prompt=False)
        length = alone["input_ids"].shape[1]
        assert_near(logits[row, -length:], shared_model(**alone).logits[0])


def test_padding_on_either_side_is_the_same(shared_model, samples, tokenizer):
    """Training pads right, generation left."""
    ids, mask = samples["input_ids"], samples["attention_mask"]
    order = mask.argsort(dim=1, descending=True, stable=True)
    right = shared_model(
        ids.gather(1, order),
        attention_mask=mask.gather(1, order),
        **vision(samples),
        latent_grid_hw=samples["latent_grid_hw"],
    ).logits
    left = shared_model(**samples).logits
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        assert_near(right[row, :length], left[row, -length:])


def test_whole_blocks_equal_lone_latents(shared_model, processor, trajectories):
    """A block written out with placeholders and `<latent>` alone are one function."""
    whole = encode(processor, [trajectories[0]], add_generation_prompt=False)
    ids, config = whole["input_ids"], shared_model.config
    kept = (ids != config.latent_pad_token_id) & (ids != config.latent_end_token_id)
    lone = shared_model(ids[kept][None], **vision(whole), latent_grid_hw=whole["latent_grid_hw"]).logits[0]
    full = shared_model(**whole).logits[0]
    answers = full[kept[0]]
    starts = (ids[kept] == config.latent_start_token_id).nonzero().flatten()
    ends = (ids[0] == config.latent_end_token_id).nonzero().flatten()
    answers[starts] = full[ends]
    assert_near(lone, answers)


def test_without_blocks_forward_is_the_backbone(shared_model, batch):
    stock = stock_twin(shared_model)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    ours, theirs = shared_model(**batch, labels=labels), stock(**batch, labels=labels)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)


def test_missing_token_types_do_not_drop_the_image_positions(shared_model, rows):
    """The backbone falls back to one-dimensional positions without a word."""
    inputs = {name: value for name, value in rows[0].items() if name != "mm_token_type_ids"}
    assert torch.equal(shared_model(**inputs).logits, shared_model(**rows[0]).logits)


def test_latents_change_the_logits_and_the_image_changes_the_latents(shared_model, samples):
    plain = shared_model(**samples, output_latents=True)
    zeroed = shared_model(**samples, latent_intervention="zero")
    config = shared_model.config
    after = int((samples["input_ids"][0] == config.latent_end_token_id).nonzero()[0])
    assert torch.equal(zeroed.logits[0, : after - 6], plain.logits[0, : after - 6])
    assert (zeroed.logits[0, after:] - plain.logits[0, after:]).abs().max() > 1e-2
    other = shared_model(**(dict(samples) | {"pixel_values": samples["pixel_values"].flip(0)}), output_latents=True)
    for step, changed in zip(plain.latent_trace.steps, other.latent_trace.steps):
        assert (step.latents - changed.latents).abs().max() > 1e-2


def test_a_block_does_not_see_a_later_image(shared_model, processor):
    """What comes after a block changes nothing in it: otherwise a cached turn would differ from a recomputed one."""
    first = [*user_turn("one", picture(56, 84, 1)), answer("look", (2, 2), "ok")]
    second = user_turn("two", picture(84, 28, 5))
    alone = shared_model(**encode(processor, [first], add_generation_prompt=False), output_latents=True)
    both = shared_model(**encode(processor, [first + second], add_generation_prompt=False), output_latents=True)
    assert_near(both.latent_trace.steps[0].latents, alone.latent_trace.steps[0].latents)


def test_loss_is_over_text_only_and_adds_the_scale(shared_model, samples):
    output = shared_model(**samples, labels=targets(samples))
    config, ids = shared_model.config, samples["input_ids"]
    labels = targets(samples)
    labels[(ids == config.latent_pad_token_id) | (ids == config.latent_end_token_id)] = -100
    text = F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
    heights, widths = samples["latent_grid_hw"].T - 1
    scale = F.cross_entropy(output.scale_logits[0], heights) + F.cross_entropy(output.scale_logits[1], widths)
    assert_near(output.scale_loss, scale)
    assert_near(output.loss, text + config.scale_loss_weight * scale)


def gradients(model, samples) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(5)  # the noise of the modulation
    model(**samples, labels=targets(samples)).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_gradients_reach_every_new_weight(model, samples):
    found = gradients(model.train(), samples)
    new = [name for name, _ in model.named_parameters() if name.startswith(("latent_control", "latent_blocks"))]
    dead = [name for name in new if name not in found or not found[name].abs().max() > 0]
    assert not dead
    assert all(found["latent_control.weight"].abs().amax(dim=1) > 0)


def test_gradients_reach_every_backbone_weight_through_blocks(mode_model, processor, trajectories):
    samples = encode(processor, trajectories[:1], add_generation_prompt=False)
    if mode_model.config.latent_mode == "autoregressive":
        samples = autoregressive_samples(mode_model, samples)
    found = gradients(mode_model.train(), samples)
    language = [name for name, _ in mode_model.named_parameters() if "language_model.layers" in name]
    assert all(found[name].abs().max() > 0 for name in language)


def autoregressive_samples(model, samples) -> dict:
    """Blocks of 1 x K latents without controls, in place of the parallel ones."""
    config, ids = model.config, samples["input_ids"][0].tolist()
    written, grids = [], []
    for token in ids:
        if token == config.latent_pad_token_id:
            continue
        written.append(token)
        if token == config.latent_start_token_id:
            count = 2 + len(grids)
            written += [config.latent_pad_token_id] * count
            grids.append((1, count))
    ids = torch.tensor([written])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "latent_grid_hw": torch.tensor(grids),
        **vision(samples),
    }


@pytest.mark.parametrize("mode", ["parallel", "autoregressive"])
def test_gradient_checkpointing_changes_nothing(tokenizer, processor, trajectories, samples, mode):
    model = build_model(tokenizer, latent_mode=mode).train()
    if mode == "autoregressive":
        samples = autoregressive_samples(model, encode(processor, trajectories[:1], add_generation_prompt=False))
    expected = gradients(model, samples)
    enable_checkpointing(model)
    assert any(layer.gradient_checkpointing for layer in model.model.language_model.layers)
    actual = gradients(model, samples)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_near(actual[name], gradient)
    assert not any(layer._can_checkpoint_with_cache for layer in model.model.language_model.layers)


def test_reentrant_checkpointing_is_refused(model, samples):
    enable_checkpointing(model.train(), {"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(**samples, labels=targets(samples))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_position_passes_the_decoder_once(model, samples, checkpointing):
    """One pass over each segment, never over the prefix again; once more in the backward pass when checkpointed."""
    model.train()
    if checkpointing:
        enable_checkpointing(model)
    lengths = []
    layer = model.model.language_model.layers[1]
    hook = layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: lengths.append(args[0].shape[1]))
    loss = model(**samples, labels=targets(samples)).loss
    forward = list(lengths)
    loss.backward()
    hook.remove()
    segments = 1 + 2  # the row with most blocks has two
    assert len(forward) == segments
    assert sum(forward) < 1.5 * samples["input_ids"].shape[1]  # ragged rows are padded segment by segment
    assert len(lengths) == (2 if checkpointing else 1) * segments


def test_autoregressive_forward_equals_padded(tokenizer, processor, trajectories):
    model = build_model(tokenizer, latent_mode="autoregressive")
    samples = autoregressive_samples(model, encode(processor, trajectories[:1], add_generation_prompt=False))
    other = encode(processor, [user_turn("a longer row of words without any block in it, which pads the first")])
    length, total = samples["input_ids"].shape[1], other["input_ids"].shape[1]
    width = max(length, total)
    pad = tokenizer.pad_token_id
    ids = torch.cat(
        [
            F.pad(samples["input_ids"], (width - length, 0), value=pad),
            F.pad(other["input_ids"], (width - total, 0), value=pad),
        ]
    )
    mask = (torch.arange(width) >= width - torch.tensor([[length], [total]])).long()
    both = model(ids, attention_mask=mask, **vision(samples), latent_grid_hw=samples["latent_grid_hw"])
    assert_near(both.logits[0, -length:], model(**samples).logits[0])
    assert_near(both.logits[1, -total:], model(**other).logits[0])


def test_hidden_states_of_all_layers_are_put_back_in_order(shared_model, samples):
    output = shared_model(**samples, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    assert all(layer.shape == (*samples["input_ids"].shape, 64) for layer in output.hidden_states)
    assert_near(shared_model.lm_head(output.hidden_states[-1]), output.logits)
    embeds = shared_model.get_input_embeddings()(samples["input_ids"])
    text = samples["mm_token_type_ids"] == 0
    text &= samples["input_ids"] != shared_model.config.latent_pad_token_id
    assert_near(
        output.hidden_states[0][text & samples["attention_mask"].bool()],
        embeds[text & samples["attention_mask"].bool()],
    )


def test_noise_acts_in_training_only(model, samples):
    model.eval()
    assert_near(model(**samples).logits, model(**samples).logits, 0)
    model.train()
    assert (model(**samples).logits - model(**samples).logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    "fields",
    [
        {"latentformer_layers": 0},
        {"latentformer_layers": 2},
        {"modulate_queries": False},
        {"modulate_images": False},
        {"latentformer_mlp_ratio": 1.5},
        {"latent_scale": "fixed"},
        {"latent_grid_size": 24},
    ],
)
def test_ablations_train(tokenizer, samples, fields):
    """Every switch gives a model of its own that runs, learns, and says what it left out."""
    model = build_model(tokenizer, **fields).train()
    output = model(**samples, labels=targets(samples))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    dead = {
        name.split(".")[1]
        for name, parameter in model.named_parameters()
        if name.startswith("latent_blocks") and (parameter.grad is None or not parameter.grad.abs().max() > 0)
    }
    expected = {
        "latentformer_layers": {"image_modulation", "image_index"}
        if fields.get("latentformer_layers") == 0
        else set(),
        "modulate_queries": {"query_modulation"},
        "modulate_images": {"image_modulation"},
        "latent_scale": {"scale_head"},
    }.get(next(iter(fields)), set())
    assert dead == expected
    assert (output.scale_loss is None) == ("latent_scale" in fields)


def test_every_latent_weight_gets_a_gradient_where_replicas_wait(tmp_path, model, batch):
    """One process stands for many: a batch without blocks must not leave latent weights without a gradient."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        loss = model.train()(**batch, labels=batch["input_ids"]).loss
        loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    weights = dict(model.named_parameters())
    assert all(weights[name].grad is not None and not weights[name].grad.any() for name in weights if "latent" in name)
    assert loss == model(**batch, labels=batch["input_ids"]).loss


def test_forward_with_a_cache_goes_on_where_it_stopped(shared_model, processor, trajectories):
    """A plain forward keeps a cache with its state; the next tokens see the blocks in it."""
    whole = encode(processor, [trajectories[0]], add_generation_prompt=False)
    expected = shared_model(**whole).logits
    cut = whole["input_ids"].shape[1] - 3
    with torch.no_grad():
        first = shared_model(
            whole["input_ids"][:, :cut], **vision(whole), latent_grid_hw=whole["latent_grid_hw"], use_cache=True
        )
        rest = shared_model(whole["input_ids"][:, cut:], past_key_values=first.past_key_values)
    assert_near(rest.logits, expected[:, cut:])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.update(latent_grid_hw=s["latent_grid_hw"][:1]), "1 grids.*3 blocks"),
        (lambda s: s.update(latent_grid_hw=s["latent_grid_hw"] + 1), "takes 15 placeholders.*row 0.*has 9"),
        (lambda s: s.update(latent_grid_hw=s["latent_grid_hw"] * 0 + 5), r"1\.\.4.*5 x 5 in row 0"),
        (lambda s: s.pop("latent_grid_hw"), "Row 0.*placeholders.*latent_grid_hw"),
        (lambda s: s.update(pixel_values=s["pixel_values"][:-4]), "names 96 patches.*have 92"),
        (lambda s: s.update(latent_intervention="other"), "latent_intervention"),
        (lambda s: s.update(image_grid_thw=None), "together"),
        (lambda s: s.update(output_attentions=True), "output_attentions"),
        (lambda s: s.update(position_ids=torch.zeros(3, 3, 5, dtype=torch.long)), "position_ids"),
        (lambda s: s.update(attention_mask=s["attention_mask"][:, 1:]), "must cover"),
    ],
)
def test_wrong_samples_raise(shared_model, samples, change, message):
    samples = dict(samples)
    change(samples)
    with pytest.raises(ValueError, match=message):
        shared_model(**samples)


def test_blocks_without_an_image_or_out_of_place_raise(shared_model, samples, rows):
    config, ids = shared_model.config, rows[2]["input_ids"]
    start, pad, end = config.latent_start_token_id, config.latent_pad_token_id, config.latent_end_token_id

    def run(*tokens, grids=((1, 1),)):
        return shared_model(torch.cat([ids, torch.tensor([tokens])], dim=1), latent_grid_hw=torch.tensor(grids))

    with pytest.raises(ValueError, match="Row 0 opens a latent block.*no image"):
        run(start, pad, pad, pad, pad, end)
    with pytest.raises(ValueError, match="outside any block"):
        run(start, 5, pad)
    with pytest.raises(ValueError, match="4 placeholders and no"):
        run(start, pad, pad, pad, pad, 5)
    with pytest.raises(ValueError, match="`latent_grid_hw` is not given"):
        shared_model(torch.cat([ids, torch.tensor([[start]])], dim=1))
