"""Traces, interventions and their pictures."""

import numpy as np
import pytest
import torch
from conftest import build_model, picture
from helpers import GREEDY, open_at, step_logits
from torch.testing import assert_close

from modeling_latentvlm.interventions import INTERVENTIONS, draw_by_row, resize_latents
from modeling_latentvlm.trace import LatentStep, LatentTrace, follow_rows
from processing_latentvlm import draw_trace


pytestmark = pytest.mark.core

ONE = GREEDY | {"min_latent_blocks": 1, "max_latent_blocks": 1, "output_latents": True}


def test_the_trace_says_what_was_built(shared_model, batch):
    plan = [[0, 4], [2], []]
    settings = GREEDY | {"output_latents": True, "logits_processor": open_at(shared_model, batch, plan)}
    output = shared_model.generate(**batch, **settings)
    trace, length = output.latent_trace, batch["input_ids"].shape[1]
    assert trace.num_rows == 3
    assert [(step.row, step.index, step.decode_step, step.column - length) for step in trace.steps] == [
        (0, 0, 0, 0),
        (0, 1, 4, 4),
        (1, 0, 2, 2),
    ]
    for step in trace.steps:
        assert output.sequences[step.row, step.column] == shared_model.config.latent_start_token_id
        count = step.grid[0] * step.grid[1]
        tokens = sum(height * width for height, width in step.image_grids)
        assert step.latents.shape == (count, 64) and step.image_attention.shape == (count, tokens)
        assert_close(step.image_attention.sum(-1), torch.ones(count))
    assert trace.row(0)[0].image_grids == [(3, 2)] and trace.row(1)[0].image_grids == [(4, 4), (1, 2)]
    assert trace.latent_grid_hw.tolist() == output.latent_grid_hw.tolist()


def test_without_asking_no_tensor_is_kept(shared_model, rows):
    output = shared_model.generate(**rows[0], **(ONE | {"output_latents": False}))
    assert output.latent_trace is None
    assert output.num_latents.item() == output.latent_grid_hw.prod().item()


def test_follow_rows_through_beams():
    """Row 1 computes a block at step 0, and the answer that went through row 1 at step 1 gets it."""
    steps = [LatentStep(row, 0, 9, (1, 1), torch.ones(1, 2) * row, [], decode_step=0) for row in (0, 1)]
    beams = torch.tensor([[0, 1, 0], [0, 0, -1]])
    followed = follow_rows(steps, 2, beams)
    assert [(step.row, float(step.latents[0, 0])) for step in followed] == [(0, 1.0), (1, 0.0)]


@pytest.mark.parametrize("name", sorted(INTERVENTIONS))
def test_interventions_act_before_the_language_model(shared_model, batch, name):
    clean = shared_model.generate(**batch, **ONE)
    changed = shared_model.generate(**batch, latent_intervention=name, **ONE)
    for step, other in zip(clean.latent_trace.steps, changed.latent_trace.steps):
        if other.latents.shape[0] > 1 or name in ("zero", "noise", "swap"):
            assert not torch.allclose(step.latents, other.latents)
        if name == "zero":
            assert not other.latents.any()
        elif name == "noise":
            assert_close(other.latents.norm(dim=-1), step.latents.norm(dim=-1))
        elif name == "mean":
            assert_close(other.latents, step.latents.mean(0, keepdim=True).expand_as(step.latents))
        elif name == "shuffle":
            assert_close(other.latents.sum(0), step.latents.sum(0), atol=1e-4, rtol=1e-4)
    first, later = step_logits(clean)[:2], step_logits(changed)[:2]
    assert torch.equal(first[:, 0], later[:, 0])  # before the block nothing differs
    assert (first[:, 1] - later[:, 1]).abs().max() > 1e-3
    assert_close(step_logits(clean)[2], step_logits(changed)[2], atol=1e-5, rtol=1e-5)  # the row without a block


@pytest.mark.parametrize("name", ["noise", "shuffle"])
def test_a_seed_for_each_row_draws_the_same_in_every_batch(shared_model, batch, rows, name):
    """The named intervention follows the batch's generator; by row it does not."""
    settings = ONE | {"latent_grid": (2, 2)}
    together = shared_model.generate(**batch, latent_intervention=draw_by_row(name, [7, 8, 9]), **settings)
    alone = shared_model.generate(**rows[1], latent_intervention=draw_by_row(name, [8]), **settings)
    other = shared_model.generate(**rows[1], latent_intervention=draw_by_row(name, [80]), **settings)
    clean = shared_model.generate(**rows[1], **settings).latent_trace.steps[0].latents
    found = [output.latent_trace.steps[0].latents for output in (alone, other)]
    (drawn,) = (step.latents for step in together.latent_trace.row(1))
    assert_close(found[0], drawn, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[1], drawn, atol=1e-3) and not torch.allclose(clean, drawn, atol=1e-3)
    if name == "noise":
        assert_close(drawn.norm(dim=-1), clean.norm(dim=-1), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(drawn, together.latent_trace.row(0)[0].latents)
    else:
        assert_close(drawn.sum(0), clean.sum(0), atol=1e-4, rtol=1e-4)


def test_seeds_must_be_there_for_every_row(shared_model, batch):
    with pytest.raises(ValueError, match="one seed for each row, but row 1 makes latents and there are 1"):
        shared_model.generate(**batch, latent_intervention=draw_by_row("noise", [7]), **ONE)
    with pytest.raises(ValueError, match=r"knows the interventions \['noise', 'shuffle'\], got 'zero'"):
        draw_by_row("zero", [7])


def test_swap_gives_each_row_its_neighbours_latents(shared_model, batch):
    clean = shared_model.generate(**batch, **ONE).latent_trace.steps
    swapped = shared_model.generate(**batch, latent_intervention="swap", **ONE).latent_trace.steps
    for own, donor, got in zip(clean, clean[1:] + clean[:1], swapped):
        assert_close(got.latents, resize_latents(donor.latents, donor.grid, own.grid), atol=1e-5, rtol=1e-5)


def test_swap_alone_and_wrong_callables_raise(shared_model, rows):
    for beams in ({}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        with pytest.raises(ValueError, match="two prompts"):
            shared_model.generate(**rows[0], latent_intervention="swap", **(ONE | beams))
    with pytest.raises(ValueError, match=r"block 0 of row 0, got \(1, 64\)"):
        shared_model.generate(
            **rows[0], latent_intervention=lambda latents, step: latents[:1], latent_grid=(2, 2), **ONE
        )


def test_swap_takes_from_another_prompt_than_its_own_beams(shared_model, batch):
    settings = ONE | {"num_beams": 2, "latent_grid": (2, 2)}
    clean = shared_model.generate(**batch, **settings).latent_trace.steps
    swapped = shared_model.generate(**batch, latent_intervention="swap", **settings).latent_trace.steps
    assert_close(swapped[0].latents, clean[1].latents, atol=1e-5, rtol=1e-5)
    assert_close(swapped[1].latents, clean[0].latents, atol=1e-5, rtol=1e-5)


def test_unused_latents_are_reported(shared_model, rows):
    settings = GREEDY | {"suppress_tokens": [shared_model.config.latent_start_token_id]}
    assert shared_model.generate(**rows[0], **settings).latents_unused is True
    assert shared_model.generate(**rows[2], **settings).latents_unused is False  # none was possible
    assert shared_model.generate(**rows[0], **ONE).latents_unused is False


def test_a_callable_sees_the_step(shared_model, rows):
    seen = []

    def double(latents, step):
        seen.append((step.row, step.index, step.grid))
        return 2 * latents

    clean = shared_model.generate(**rows[0], **ONE).latent_trace.steps[0]
    changed = shared_model.generate(**rows[0], latent_intervention=double, **ONE).latent_trace.steps[0]
    assert seen == [(0, 0, clean.grid)]
    assert_close(changed.latents, 2 * clean.latents)


def test_interventions_on_autoregressive_latents(tokenizer, batch):
    model = build_model(tokenizer, latent_mode="autoregressive")
    clean = model.generate(**batch, **ONE)
    zeroed = model.generate(**batch, latent_intervention="zero", **ONE)
    assert not any(step.latents.any() for step in zeroed.latent_trace.steps)
    assert (step_logits(clean)[0, 1] - step_logits(zeroed)[0, 1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="one by one"):
        model.generate(**batch, latent_intervention="mean", **ONE)


def test_a_trace_is_drawn(shared_model, batch, conversations, tmp_path):
    output = shared_model.generate(**batch, **ONE)
    images = [item["image"] for item in conversations[1][0]["content"] if item["type"] == "image"]
    drawn = draw_trace(output.latent_trace, images, tmp_path / "trace.png", row=1)
    pixels = np.asarray(drawn)
    assert (tmp_path / "trace.png").stat().st_size > 1000
    assert drawn.width > 3 * 336  # two images, heat and dots each, but the second is narrow
    assert pixels.std() > 20
    other = shared_model.generate(**batch, **(ONE | {"latent_grid": (4, 1)}))
    assert np.asarray(draw_trace(other.latent_trace, images, row=1)).tobytes() != pixels.tobytes()


def test_a_heat_map_is_hot_where_the_attention_is():
    attention = torch.zeros(1, 16)
    attention[0, 5] = 1  # row 1, column 1 of 4 x 4
    step = LatentStep(0, 0, 7, (1, 1), torch.ones(1, 4), [(4, 4)], attention)
    drawn = np.asarray(draw_trace(LatentTrace(1, [step]), [picture(112, 112)])).astype(int)
    panel = drawn[30 : 30 + 336, 12 + 41 + 12 :][:, :336]
    warmth = panel[..., 0] - panel[..., 2]
    assert warmth[84:168, 84:168].mean() > warmth.mean() + 20


def test_windows_and_picked_tokens_are_outlined():
    """Fields of the other architectures: the structure and the picture serve them too."""
    image = picture(112, 112)
    plain = LatentStep(0, 0, 7, (1, 4), torch.ones(4, 4), [(4, 4)])
    picked = LatentStep(0, 0, 7, (1, 4), torch.ones(4, 4), [(4, 4)], picked_tokens=torch.tensor([0, 9]))
    windowed = LatentStep(0, 0, 7, (1, 4), torch.ones(4, 4), [(4, 4)], windows=[(0, 1, 1, 2, 2)])
    drawings = [
        np.asarray(draw_trace(LatentTrace(1, [step]), [image])).tobytes() for step in (plain, picked, windowed)
    ]
    assert len(set(drawings)) == 3
    moved = picked.to("cpu")
    assert moved.picked_tokens.tolist() == [0, 9]


def test_drawing_nothing_or_the_wrong_images_raises(shared_model, batch):
    output = shared_model.generate(**batch, **ONE)
    with pytest.raises(ValueError, match="Row 2 has no latent step"):
        draw_trace(output.latent_trace, [], row=2)
    with pytest.raises(ValueError, match="looked at 2 images, got 1"):
        draw_trace(output.latent_trace, [picture()], row=1)


def refocusing_trace(grids) -> LatentTrace:
    """Two steps, which look at different places."""
    count = sum(height * width for height, width in grids)
    steps = []
    for index, (window, token) in enumerate((((0, 0, 0, 2, 2), 0), ((len(grids) - 1, 2, 2, 2, 2), count - 1))):
        saliency, attention = torch.full((count,), 0.1), torch.zeros(3, count)
        saliency[token], attention[:, token] = 5.0, 1.0
        step = LatentStep(0, index, 9, (1, 3), torch.randn(3, 8), grids, image_attention=attention, saliency=saliency)
        step.windows = [window]
        steps.append(step)
    return LatentTrace(1, steps)


def test_refocusing_steps_are_a_row_of_heat_maps(tmp_path):
    """A picture and a panel per step, for the language model and for the Extractor; hot where each looked."""
    drawn = draw_trace(refocusing_trace([(4, 4)]), [picture(112, 112)], tmp_path / "trace.png")
    pixels = np.asarray(drawn).astype(int)
    assert drawn.size == (4 * 12 + 3 * 336, 2 * (30 + 336 + 12)) and (tmp_path / "trace.png").is_file()
    for top in (30, 30 + 336 + 12 + 30):
        first, second = (pixels[top : top + 336, 12 + panel * 348 : 12 + panel * 348 + 336] for panel in (1, 2))
        assert first[20:60, 20:60].mean() > second[20:60, 20:60].mean() + 30
        assert second[276:316, 276:316].mean() > first[276:316, 276:316].mean() + 30
    cyan = (pixels == (0, 229, 255)).all(axis=-1)
    assert cyan[30:198, 360:528].sum() > 600 and not cyan[30:366, 12:348].any()
    two = draw_trace(refocusing_trace([(4, 4), (4, 4)]), [picture(112, 112), picture(112, 56)])
    assert two.height == 2 * (30 + 336 + 12) + 2 * (30 + 168 + 12)
