"""`generate` with latent blocks: what must be equal is equal, on logits."""

import copy

import pytest
import torch
import transformers.generation.utils as generation_utils
from conftest import build_model, encode, picture, stock_twin, user_turn
from helpers import GREEDY, assert_near, disable_checkpointing, enable_checkpointing, open_at, step_logits, vision
from torch.testing import assert_close
from transformers import QuantizedCache, StoppingCriteria, TextIteratorStreamer

from configuration_latentvlm.transformers_api import CACHE


pytestmark = pytest.mark.core

PLAN = [[0, 4], [2], []]  # generated positions where each row of `batch` opens a block


def test_zero_blocks_is_the_backbone(shared_model, batch):
    """The one identity that pins down embeddings, M-RoPE positions, mask and cache at once."""
    config = shared_model.config
    inner = [config.latent_start_token_id, config.latent_pad_token_id, config.latent_end_token_id]
    stock = stock_twin(shared_model).generate(**batch, suppress_tokens=inner, **GREEDY)
    ours = shared_model.generate(**batch, max_latent_blocks=0, **GREEDY)
    assert_close(ours.sequences, stock.sequences)
    assert_near(step_logits(ours), step_logits(stock))
    assert ours.num_latent_blocks.tolist() == [0, 0, 0]


def test_ragged_batch_equals_one_by_one(mode_model, batch, rows):
    output = mode_model.generate(**batch, logits_processor=open_at(mode_model, batch, PLAN), **GREEDY)
    assert output.num_latent_blocks.tolist() == [2, 1, 0]
    grids = iter(output.latent_grid_hw.tolist())
    for row, inputs in enumerate(rows):
        alone = mode_model.generate(**inputs, logits_processor=open_at(mode_model, inputs, [PLAN[row]]), **GREEDY)
        assert_near(step_logits(output)[row], step_logits(alone)[0])
        assert alone.latent_grid_hw.tolist() == [next(grids) for _ in PLAN[row]]


def test_blocks_differ_in_size(shared_model, batch):
    """Otherwise the ragged tests above would prove less than they say."""
    grids = shared_model.generate(
        **batch, logits_processor=open_at(shared_model, batch, PLAN), **GREEDY
    ).latent_grid_hw
    assert len({tuple(grid) for grid in grids.tolist()}) > 1


def test_beam_search_equals_one_by_one(mode_model, batch, rows):
    settings = GREEDY | {"num_beams": 3, "num_return_sequences": 2, "output_scores": True, "output_latents": True}
    output = mode_model.generate(**batch, logits_processor=open_at(mode_model, batch, PLAN), **settings)
    for row, inputs in enumerate(rows):
        alone = mode_model.generate(**inputs, logits_processor=open_at(mode_model, inputs, [PLAN[row]]), **settings)
        both = slice(2 * row, 2 * row + 2)
        length = inputs["input_ids"].shape[1]
        assert_close(output.sequences[both, batch["input_ids"].shape[1] :], alone.sequences[:, length:])
        assert_near(output.sequences_scores[both], alone.sequences_scores)
        steps = [step for step in output.latent_trace.steps if step.row in (2 * row, 2 * row + 1)]
        assert len(steps) == len(alone.latent_trace.steps) == 2 * len(PLAN[row])
        for step, other in zip(steps, alone.latent_trace.steps):
            assert_near(step.latents, other.latents)


def test_beams_keep_the_blocks_of_their_own_past(mode_model, rows):
    """The blocks reported for a beam are those that its own sequence rebuilds."""
    inputs = rows[1]
    settings = GREEDY | {"num_beams": 4, "num_return_sequences": 4, "output_latents": True}
    output = mode_model.generate(**inputs, logits_processor=open_at(mode_model, inputs, [[3]]), **settings)
    assert len({tuple(sequence) for sequence in output.sequences.tolist()}) == 4
    for row, sequence in enumerate(output.sequences):
        (step,) = output.latent_trace.row(row)
        grid = torch.tensor([step.grid])
        rebuilt = mode_model(sequence[None], **vision(inputs), latent_grid_hw=grid, output_latents=True)
        assert_near(step.latents, rebuilt.latent_trace.steps[0].latents)
        assert rebuilt.latent_trace.steps[0].column == step.column


def test_generate_equals_teacher_forced_forward(mode_model, rows):
    for row in (0, 1):
        inputs, length = rows[row], rows[row]["input_ids"].shape[1]
        output = mode_model.generate(**inputs, logits_processor=open_at(mode_model, inputs, [PLAN[row]]), **GREEDY)
        sequences = output.sequences[:, :-1]
        forced = mode_model(sequences, **vision(inputs), latent_grid_hw=output.latent_grid_hw)
        assert_near(forced.logits[:, length - 1 :], step_logits(output))


def test_cached_equals_recomputed_by_hand(shared_model, rows):
    """A naive loop: one uncached forward of the decoder over embeddings and positions written out here."""
    model, inputs = shared_model, rows[0]
    output = model.generate(**inputs, logits_processor=open_at(model, inputs, [[1]]), output_latents=True, **GREEDY)
    step, length = output.latent_trace.steps[0], inputs["input_ids"].shape[1]
    height, width = step.grid
    table, config = model.get_input_embeddings(), model.config
    ids = output.sequences[0, :-1]
    embeds = table(ids)
    features = torch.cat(model.get_image_features(**vision(inputs), return_dict=True).pooler_output)
    embeds[ids == config.image_token_id] = features
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
    )
    prompt, at = positions[:, 0], int(positions.max()) + 1
    open_column = length + 1
    after = len(ids) - open_column - 1
    text = torch.arange(at, at + 2 + 3)  # one word, `<latent>`, three controls
    first = at + 5
    grid = torch.stack(
        [
            torch.full((height * width,), first),
            torch.arange(height).repeat_interleave(width) + first,
            torch.arange(width).repeat(height) + first,
        ]
    )
    rest = torch.arange(first + max(height, width), first + max(height, width) + 1 + after)
    all_positions = torch.cat([prompt, text.expand(3, -1), grid, rest.expand(3, -1)], dim=1)
    end = table(torch.tensor([config.latent_end_token_id]))
    control = model.latent_control.weight
    whole = torch.cat([embeds[: open_column + 1], control, step.latents, end, embeds[open_column + 1 :]])
    hidden = model.model.language_model(
        inputs_embeds=whole[None], position_ids=all_positions[:, None]
    ).last_hidden_state
    logits = model.lm_head(hidden)[0]
    expected = torch.cat([logits[length - 1 : open_column], logits[open_column + 3 + height * width + 1 :]])
    assert_near(step_logits(output)[0], expected)


def test_autoregressive_latents_are_the_previous_hidden_states(tokenizer, rows):
    model, inputs = build_model(tokenizer, latent_mode="autoregressive"), rows[0]
    output = model.generate(**inputs, logits_processor=open_at(model, inputs, [[0]]), output_latents=True, **GREEDY)
    latents = output.latent_trace.steps[0].latents
    assert len(latents) == model.config.num_autoregressive_latents
    ids, config = output.sequences[:, : inputs["input_ids"].shape[1] + 1], model.config
    embeds = model.get_input_embeddings()(ids)
    embeds[ids == config.image_token_id] = torch.cat(
        model.get_image_features(**vision(inputs), return_dict=True).pooler_output
    )
    positions, _ = model.model.get_rope_index(ids, model._token_types(ids), image_grid_thw=inputs["image_grid_thw"])
    for latent in latents:
        hidden = model.model.language_model(inputs_embeds=embeds, position_ids=positions).last_hidden_state[:, -1:]
        assert_near(latent, hidden[0, 0])
        embeds = torch.cat([embeds, hidden], dim=1)
        positions = torch.cat([positions, positions[..., -1:] + 1], dim=-1)


@pytest.mark.parametrize("images", ["only new", "all"])
def test_a_returned_cache_is_continued(mode_model, processor, rows, images):
    """Two turns on one cache equal one teacher-forced forward over everything, with an image in the second turn."""
    inputs = rows[1]
    first = mode_model.generate(**inputs, logits_processor=open_at(mode_model, inputs, [[2, 8]]), **GREEDY)
    turn = encode(processor, [user_turn("and here?", picture(84, 56, 9))])
    ids = torch.cat([first.sequences, turn["input_ids"]], dim=1)
    both = {name: torch.cat([inputs[name], turn[name]]) for name in vision(inputs)}
    second = mode_model.generate(
        ids,
        **(both if images == "all" else vision(turn)),
        past_key_values=copy.deepcopy(first.past_key_values),
        logits_processor=open_at(mode_model, {"input_ids": ids}, [[1]]),
        **GREEDY,
    )
    grids = second.latent_grid_hw  # of the whole sequence
    assert len(grids) == 3  # the last `<latent>` of the first answer is built by the second call
    forced = mode_model(second.sequences[:, :-1], **both, latent_grid_hw=grids)
    assert_near(forced.logits[:, ids.shape[1] - 1 :], step_logits(second))


def test_a_batch_is_continued_behind_its_padding(shared_model, batch, rows, processor):
    """A row that ended early is padded in `sequences`; with the mask it goes on as if it had been alone."""
    model, length = shared_model, batch["input_ids"].shape[1]
    turn = encode(processor, [user_turn("go on")])["input_ids"]
    first = model.generate(**batch, logits_processor=open_at(model, batch, [[1], [2], []]), **GREEDY)
    kept = 4  # pretend that row 0 ended after four tokens: the rest of its answer is padding
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 9, dtype=torch.long)], dim=1)
    mask[0, length + kept :] = 0
    ids = torch.cat(
        [first.sequences.masked_fill(mask == 0, processor.tokenizer.pad_token_id), turn.expand(3, -1)], dim=1
    )
    mask = torch.cat([mask, torch.ones_like(turn).expand(3, -1)], dim=1)
    settings = GREEDY | {"max_latent_blocks": 0}
    second = model.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, **settings)
    for row, end in ((0, length + kept), (1, length + 9), (2, length + 9)):
        unpadded = torch.cat([first.sequences[row, :end], turn[0]])[batch["attention_mask"][row].argmax() :]
        grid = first.latent_grid_hw[row : row + 1] if row < 2 else None
        alone = model.generate(unpadded[None], **vision(rows[row]), latent_grid_hw=grid, **settings)
        assert_near(step_logits(second)[row], step_logits(alone)[0])


def test_static_cache_gives_the_same_logits(mode_model, batch):
    settings = GREEDY | {"logits_processor": open_at(mode_model, batch, PLAN)}
    expected = mode_model.generate(**batch, **settings)
    assert_near(
        step_logits(mode_model.generate(**batch, cache_implementation="static", **settings)), step_logits(expected)
    )


def test_quantized_cache_runs_near_the_exact_one(shared_model, rows):
    """fp8 needs no extra package; it is lossy, so near is all that can be asked."""
    try:
        QuantizedCache("fp8", shared_model.config.get_text_config())
    except ValueError as error:
        pytest.skip(f"this version of transformers has no fp8 cache: {error}")
    inputs = rows[0]
    settings = GREEDY | {"logits_processor": open_at(shared_model, inputs, [[1]]), "max_new_tokens": 4}
    exact = step_logits(shared_model.generate(**inputs, **settings))
    lossy = shared_model.generate(
        **inputs, cache_implementation="quantized", cache_config={"backend": "fp8"}, **settings
    )
    assert lossy.num_latent_blocks.tolist() == [1]
    assert_close(step_logits(lossy)[:, 0], exact[:, 0], atol=1e-5, rtol=1e-5)
    assert (step_logits(lossy) - exact).abs().max() < 0.3 * exact.abs().max()


def test_minimum_and_maximum_of_blocks(shared_model, batch):
    output = shared_model.generate(**batch, min_latent_blocks=2, max_latent_blocks=2, **GREEDY)
    start, length = shared_model.config.latent_start_token_id, batch["input_ids"].shape[1]
    written = output.sequences[:, length:] == start
    assert written[:, :2].tolist() == [[True, True], [True, True], [False, False]]
    assert not written[:, 2:].any()
    assert output.num_latent_blocks.tolist() == [2, 2, 0]


def test_blocks_end_at_the_maximum_where_the_model_wants_more(model, rows):
    """With its `<latent>` logit raised a model opens as many blocks as it may, and a row without image none."""
    with torch.no_grad():
        model.lm_head.weight[model.config.latent_start_token_id] = 0
    bias = {"sequence_bias": {(model.config.latent_start_token_id,): 50.0}}
    assert model.generate(**rows[0], **bias, **GREEDY).num_latent_blocks.tolist() == [5]
    assert model.generate(**rows[0], max_latent_blocks=1, **bias, **GREEDY).num_latent_blocks.tolist() == [1]
    assert model.generate(**rows[2], **bias, **GREEDY).num_latent_blocks.tolist() == [0]


def test_sampling_draws_rows_of_their_own(shared_model, rows):
    settings = GREEDY | {"do_sample": True, "num_return_sequences": 3, "top_k": 50, "temperature": 1.5}
    torch.manual_seed(3)
    output = shared_model.generate(**rows[0], min_latent_blocks=1, max_latent_blocks=1, **settings)
    assert output.num_latent_blocks.tolist() == [1, 1, 1]
    assert len({tuple(row) for row in output.sequences.tolist()}) == 3
    torch.manual_seed(3)
    again = shared_model.generate(**rows[0], min_latent_blocks=1, max_latent_blocks=1, **settings)
    assert_close(again.sequences, output.sequences)


def test_explicit_grid(shared_model, batch):
    output = shared_model.generate(**batch, min_latent_blocks=1, max_latent_blocks=1, latent_grid=(2, 3), **GREEDY)
    assert output.latent_grid_hw.tolist() == [[2, 3], [2, 3]]
    assert output.num_latents.tolist() == [6, 6, 0]


def test_fixed_scale_ablation(tokenizer, rows):
    model = build_model(tokenizer, latent_scale="fixed", fixed_latent_grid=[3, 1])
    output = model.generate(**rows[0], min_latent_blocks=1, max_latent_blocks=1, **GREEDY)
    assert output.latent_grid_hw.tolist() == [[3, 1]]


def test_a_history_with_blocks_is_rebuilt_at_its_grids(mode_model, processor, rows):
    """As tokens of `sequences`, and as a message: both are the same function."""
    inputs = rows[0]
    first = mode_model.generate(**inputs, logits_processor=open_at(mode_model, inputs, [[1]]), **GREEDY)
    settings = GREEDY | {"max_latent_blocks": 0}
    lone = mode_model.generate(first.sequences, **vision(inputs), latent_grid_hw=first.latent_grid_hw, **settings)
    start = mode_model.config.latent_start_token_id
    column = int((first.sequences[0] == start).nonzero()[0])
    pads = mode_model.config.num_control_tokens + int(first.latent_grid_hw.prod())
    block = [start] + [mode_model.config.latent_pad_token_id] * pads + [mode_model.config.latent_end_token_id]
    ids = first.sequences[0].tolist()
    whole = torch.tensor([ids[:column] + block + ids[column + 1 :]])
    written = mode_model.generate(whole, **vision(inputs), latent_grid_hw=first.latent_grid_hw, **settings)
    assert_near(step_logits(written), step_logits(lone))
    settings |= {"num_beams": 2, "num_return_sequences": 2}
    beams = mode_model.generate(whole, **vision(inputs), latent_grid_hw=first.latent_grid_hw, **settings)
    assert beams.latent_grid_hw.tolist() == first.latent_grid_hw.tolist() * 2
    assert beams.num_latent_blocks.tolist() == [0, 0]  # those of the prompt are not of the answer


def test_stop_reasons(shared_model, processor, rows):
    inputs, length = rows[0], rows[0]["input_ids"].shape[1]
    settings = GREEDY | {"max_latent_blocks": 0}
    plain = shared_model.generate(**inputs, **settings)
    assert plain.stop_reason == ["max_length"]
    third = int(plain.sequences[0, length + 2])
    ended = shared_model.generate(**inputs, **(settings | {"eos_token_id": third, "pad_token_id": 0}))
    assert ended.stop_reason == ["eos"]

    class Enough(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= length + 2)

    assert shared_model.generate(**inputs, stopping_criteria=[Enough()], **settings).stop_reason == [
        "stopping_criteria"
    ]
    word = processor.tokenizer.decode([third])
    stopped = shared_model.generate(**inputs, stop_strings=[word], tokenizer=processor.tokenizer, **settings)
    assert stopped.stop_reason == ["stop_string"]


def test_streamer_gets_every_token(shared_model, processor, rows):
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=30)
    settings = GREEDY | {"min_latent_blocks": 1}
    output = shared_model.generate(**rows[0], streamer=streamer, **settings)
    text = processor.tokenizer.decode(output.sequences[0, rows[0]["input_ids"].shape[1] :])
    assert "".join(streamer) == text
    assert "<|latent_start|>" in text


def test_logits_to_keep_and_hidden_states(shared_model, rows):
    inputs = rows[0]
    settings = GREEDY | {"logits_processor": open_at(shared_model, inputs, [[1]]), "output_hidden_states": True}
    output = shared_model.generate(**inputs, **settings)
    assert len(output.hidden_states) == 9
    states = output.hidden_states[2]  # of the step that built the block
    assert len(states) == 4 and all(layer.shape == (1, 1, 64) for layer in states)
    assert_near(shared_model.lm_head(states[-1])[0, 0], output.logits[2][0])
    sequences = output.sequences[:, :-1]
    full = shared_model(sequences, **vision(inputs), latent_grid_hw=output.latent_grid_hw)
    kept = shared_model(sequences, **vision(inputs), latent_grid_hw=output.latent_grid_hw, logits_to_keep=2)
    assert_near(kept.logits, full.logits[:, -2:])


def test_nothing_stays_on_the_model(shared_model, batch, rows):
    """A call with blocks in between changes no later call."""
    before = shared_model.generate(**rows[1], max_latent_blocks=0, **GREEDY)
    shared_model.generate(**batch, logits_processor=open_at(shared_model, batch, PLAN), **GREEDY)
    after = shared_model.generate(**rows[1], max_latent_blocks=0, **GREEDY)
    assert torch.equal(step_logits(before), step_logits(after))


def test_says_so_when_no_block_was_opened(shared_model, rows, caplog, monkeypatch):
    from modeling_latentvlm import generation_blocks

    said = []
    monkeypatch.setattr(generation_blocks.logger, "warning_once", said.append)
    shared_model.generate(**rows[2], **GREEDY)  # no image: nothing to say
    assert not said
    forbidden = {"suppress_tokens": [shared_model.config.latent_start_token_id]}
    shared_model.generate(**rows[0], **forbidden, **GREEDY)
    assert len(said) == 1 and "No latent block was opened" in said[0]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"use_cache": False}, "use_cache=False"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"output_attentions": True}, "output_attentions"),
        ({"cache_implementation": "offloaded"}, "offloaded"),
        ({"latent_grid": (5, 1)}, r"1\.\.4.*5 x 1"),
        ({"min_latent_blocks": 6}, r"max_latent_blocks.*5.*got 6"),
        ({"latent_intervention": "nothing"}, "latent_intervention"),
        ({"output_latents": True, "return_dict_in_generate": False}, "return_dict_in_generate"),
        ({"no_such_option": 1}, "no_such_option"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"latent_grid": (2.5, 2)}, "whole numbers"),
        ({"min_latent_blocks": 1.5}, "whole number"),
        ({"latent_grid_hw": [[1, 2, 3]]}, r"\(blocks, 2\)"),
        ({"position_ids": torch.zeros(3, 1, 25, dtype=torch.long)}, "position_ids"),
        ({"attention_mask": torch.ones(1, 4, dtype=torch.long)}, "attention_mask"),
    ],
)
def test_what_cannot_work_raises(shared_model, rows, wrong, message):
    with pytest.raises(ValueError, match=message):
        shared_model.generate(**(dict(rows[0]) | GREEDY | wrong))


def test_wrong_prompts_raise(shared_model, rows):
    inputs, config = rows[1], shared_model.config
    with pytest.raises(ValueError, match="Row 0 .* image placeholders"):
        shared_model.generate(
            inputs["input_ids"], pixel_values=inputs["pixel_values"][:64], image_grid_thw=inputs["image_grid_thw"][:1]
        )
    with pytest.raises(ValueError, match="more images"):
        shared_model.generate(rows[2]["input_ids"], max_new_tokens=1, **vision(inputs))
    lone = torch.cat([rows[0]["input_ids"], torch.tensor([[config.latent_start_token_id, 5]])], dim=1)
    with pytest.raises(ValueError, match="latent_grid_hw"):
        shared_model.generate(lone, max_new_tokens=1, **vision(rows[0]))
    with pytest.raises(ValueError, match="Row 0 .* 513 tokens.* 512"):
        shared_model.generate(torch.full((1, 513), 5), max_new_tokens=1)
    stock = stock_twin(shared_model)(**rows[2], use_cache=True)
    with pytest.raises(ValueError, match="latent_state"):
        shared_model.generate(
            torch.cat([rows[2]["input_ids"]] * 2, dim=1), past_key_values=stock[CACHE], max_new_tokens=1
        )
    done = shared_model.generate(**rows[2], **GREEDY)
    with pytest.raises(ValueError, match="same rows"):
        shared_model.generate(rows[2]["input_ids"], past_key_values=done.past_key_values, max_new_tokens=1)
    with pytest.raises(ValueError, match="Continuous batching"):
        shared_model.generate_batch([[1, 2]])


def test_embeddings_take_pictures_where_their_placeholders_are(shared_model, rows):
    embeds = shared_model.get_input_embeddings()(rows[0]["input_ids"])
    blocks = {"min_latent_blocks": 1, "max_latent_blocks": 1}
    assert_near(
        step_logits(shared_model.generate(inputs_embeds=embeds, **vision(rows[0]), **blocks, **GREEDY)),
        step_logits(shared_model.generate(rows[0]["input_ids"], **vision(rows[0]), **blocks, **GREEDY)),
    )
    with pytest.raises(ValueError, match="image placeholders"):
        shared_model.generate(inputs_embeds=embeds, **blocks, **GREEDY)
    text = shared_model.get_input_embeddings()(rows[2]["input_ids"])
    for given in (vision(rows[0]), blocks):
        with pytest.raises(ValueError, match="need `input_ids`"):
            shared_model.generate(inputs_embeds=text, **given, **GREEDY)
    assert_near(
        step_logits(shared_model.generate(inputs_embeds=text, **GREEDY)),
        step_logits(shared_model.generate(rows[2]["input_ids"], **GREEDY)),
    )


def test_rollouts_in_training_mode_with_checkpointing(model, rows):
    """No gradients, but the state of a model in the middle of training: transformers would drop the cache."""
    inputs = rows[0]
    settings = GREEDY | {"logits_processor": open_at(model, inputs, [[1]])}
    expected = model.generate(**inputs, **settings)
    enable_checkpointing(model.train())
    assert_near(step_logits(model.generate(**inputs, **settings)), step_logits(expected))
    sequences = expected.sequences[:, :-1]
    model.eval()
    grids = expected.latent_grid_hw
    forced = model(sequences, **vision(inputs), latent_grid_hw=grids).logits
    model.train()
    model.latent_blocks.eval()
    with torch.no_grad():
        torch.manual_seed(0)
        noisy = model(sequences, **vision(inputs), latent_grid_hw=grids).logits
        disable_checkpointing(model)
        torch.manual_seed(0)
        plain = model(sequences, **vision(inputs), latent_grid_hw=grids).logits
    assert_near(noisy, plain)
    assert forced.shape == noisy.shape


def continued(model, first, **kwargs):
    ids = torch.cat([first.sequences, torch.full((len(first.sequences), 2), 40)], dim=1)
    return model.generate(ids, past_key_values=first.past_key_values, max_latent_blocks=0, **(GREEDY | kwargs))


class NoEvent:
    """Stands for a device's event on a CPU, where every copy is done at once."""

    def __init__(self, *args, **kwargs): ...

    def record(self): ...

    def synchronize(self): ...


@pytest.mark.skipif(not hasattr(generation_utils, "DeferredStopCheck"), reason="transformers < 5.24")
def test_a_stop_that_is_read_one_step_late_leaves_the_same_cache(shared_model, rows, monkeypatch):
    """As on MPS: one more token is decoded, and then dropped from the sequences and cropped from the cache."""
    model, settings = shared_model, {"min_latent_blocks": 1, "max_latent_blocks": 1}
    free = model.generate(**rows[0], **settings, **GREEDY).sequences[0, rows[0]["input_ids"].shape[1] :].tolist()
    end = next(token for at, token in enumerate(free) if at > 1 and token not in free[:at])
    settings |= GREEDY | {"eos_token_id": end, "pad_token_id": 1}
    expected = model.generate(**rows[0], **settings)
    deferred = generation_utils.DeferredStopCheck
    monkeypatch.setattr(deferred, "is_supported", staticmethod(lambda *args, **kwargs: True))
    monkeypatch.setattr(torch, "Event", NoEvent)
    first = model.generate(**rows[0], **settings)
    assert torch.equal(first.sequences, expected.sequences) and first.sequences[0, -1] == end
    assert first.cache.get_seq_length() == expected.cache.get_seq_length()
    monkeypatch.undo()
    assert_near(step_logits(continued(model, first)), step_logits(continued(model, expected)))


def test_a_cache_that_was_changed_is_refused(shared_model, rows):
    model = shared_model
    first = model.generate(**rows[0], min_latent_blocks=1, max_latent_blocks=1, **GREEDY)
    first.past_key_values.crop(-5)
    with pytest.raises(ValueError, match="was changed"):
        continued(model, first)
    with pytest.raises(ValueError, match="was changed"):
        model(torch.tensor([[40]]), past_key_values=first.past_key_values)
    first = model.generate(**rows[0], min_latent_blocks=1, max_latent_blocks=1, **GREEDY)
    first.sequences[0, 3] = 77
    with pytest.raises(ValueError, match="row 0 has token 77 at column 3"):
        continued(model, first)


def test_the_cache_of_beams_is_not_taken_for_that_of_the_answers(shared_model, rows):
    settings = {"num_beams": 3, "num_return_sequences": 3, "min_latent_blocks": 1, "max_latent_blocks": 1}
    first = shared_model.generate(**rows[0], **settings, **GREEDY)
    cache = first.past_key_values
    same = torch.equal(first.sequences[:, : cache.latent_state.num_tokens], cache.latent_state.tokens)
    if same:
        pytest.skip("the running beams happen to be the answers")
    with pytest.raises(ValueError, match="do not continue"):
        continued(shared_model, first)


def test_a_reset_cache_starts_anew(shared_model, rows):
    from transformers import StaticCache

    cache = StaticCache(config=shared_model.config.get_text_config(), max_cache_len=200)
    settings = GREEDY | {"max_latent_blocks": 1, "latent_grid": (2, 2)}
    shared_model.generate(**rows[0], past_key_values=cache, min_latent_blocks=1, **settings)
    cache.reset()
    again = shared_model.generate(**rows[1], past_key_values=cache, min_latent_blocks=1, **settings)
    assert_near(step_logits(again), step_logits(shared_model.generate(**rows[1], min_latent_blocks=1, **settings)))
    small = StaticCache(config=shared_model.config.get_text_config(), max_cache_len=40)
    with pytest.raises(ValueError, match="holds 40 positions"):
        shared_model.generate(**rows[1], past_key_values=small, min_latent_blocks=1, **settings)


def test_a_failed_call_leaves_the_cache_as_it_was(shared_model, processor, rows):
    first = shared_model.generate(**rows[0], **(GREEDY | {"max_latent_blocks": 0}))
    turn = encode(processor, [user_turn("and?", picture(56, 56, 3))])
    ids = torch.cat([first.sequences, turn["input_ids"]], dim=1)
    bad = {"pixel_values": turn["pixel_values"][:4], "image_grid_thw": turn["image_grid_thw"]}
    with pytest.raises(ValueError, match="16 patches, but the images have 4"):
        shared_model.generate(ids, past_key_values=first.past_key_values, num_beams=2, **bad, **GREEDY)
    good = shared_model.generate(ids, past_key_values=first.past_key_values, num_beams=2, **vision(turn), **GREEDY)
    assert good.sequences.shape[1] == ids.shape[1] + 9


def test_an_answer_cut_off_at_a_block_can_be_fed_back(shared_model, rows):
    inputs, length = rows[0], rows[0]["input_ids"].shape[1]
    plan = open_at(shared_model, inputs, [[1, 8]])  # the last of nine tokens is `<latent>`, not built any more
    cut = shared_model.generate(**inputs, logits_processor=plan, **GREEDY)
    assert cut.latent_grid_hw.shape == (1, 2)
    settings = GREEDY | {"max_latent_blocks": 0}
    again = shared_model.generate(cut.sequences, **vision(inputs), latent_grid_hw=cut.latent_grid_hw, **settings)
    on = shared_model.generate(**inputs, logits_processor=plan, **(GREEDY | {"max_new_tokens": 10}))
    assert_near(step_logits(again)[:, 0], step_logits(on)[:, 9])
    assert again.latent_grid_hw.tolist() == on.latent_grid_hw.tolist()
    assert on.sequences.shape[1] == length + 10


def test_rows_that_stop_before_the_others(shared_model, processor, batch):
    """Padding behind a row's end is not its end."""
    settings = GREEDY | {"max_latent_blocks": 0, "pad_token_id": processor.tokenizer.pad_token_id}
    length = batch["input_ids"].shape[1]
    plain = shared_model.generate(**batch, **settings).sequences[:, length:]

    class RowZero(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= length + 2, False, False])

    eos = int(plain[1, 4])
    settings |= {"eos_token_id": eos, "stopping_criteria": [RowZero()]}
    output = shared_model.generate(**batch, **settings)
    expected = ["stopping_criteria", "eos", "eos" if eos in plain[2].tolist() else "max_length"]
    if eos in plain[0, :2].tolist():
        expected[0] = "eos"
    assert output.stop_reason == expected
