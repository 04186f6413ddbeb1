"""The crop branch of visual replay: windows, crops, the loss written out, and where its gradient goes."""

import random

import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, build_tokenizer, picture
from helpers import assert_near, enable_checkpointing
from PIL import Image
from test_vedas import build

from processing_latentvlm import VedasProcessor
from processing_latentvlm.processing_vedas import LATENT_TOKEN
from train.data.reasoning_data import ReasoningSample
from train.vedas.crop_distillation import PREDICTORS, ReplayArguments, ReplayObjective, crop_window, densest_window
from train.vedas.curriculum import CurriculumCollator


pytestmark = pytest.mark.core

ROUTED = {"routed_layers": [0, 1]}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer((LATENT_TOKEN,))


@pytest.fixture(scope="module")
def processor(tokenizer, image_processor):
    return VedasProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def samples() -> list[ReasoningSample]:
    """One picture; two of unequal grids; none; one that the first step replays whole."""
    questions = {
        "what colour?": [picture(112, 140, 1)],
        "which of the two is it, left or right?": [picture(28, 56, 2), picture(84, 84, 3)],
        "hello": [],
        "and this": [picture(61, 56, 4)],
    }
    return [
        ReasoningSample(images, question, ["it is round", "it is red"], "red " * number, f"sample {number}")
        for number, (question, images) in enumerate(questions.items(), 1)
    ]


@pytest.fixture(scope="module")
def collator(processor) -> CurriculumCollator:
    collator = CurriculumCollator(processor, 2)
    collator.stage = 2
    return collator


@pytest.fixture(scope="module")
def batch(collator, samples) -> dict:
    return collator(samples)


def make_objective(model, processor, **arguments) -> ReplayObjective:
    torch.manual_seed(7)
    return ReplayObjective(model.config, processor.image_processor, ReplayArguments(**arguments))


def replay_loss(objective, model, batch):
    inputs = {name: value for name, value in batch.items() if name != "original_images"}
    output = model(**inputs, output_latents=True)
    loss = objective.replay_loss(model, output.replays, batch["original_images"], batch.get("image_grid_thw"))
    return loss, output.replays


def gradients(*modules) -> dict:
    return {
        f"{number}.{name}": parameter.grad.clone()
        for number, module in enumerate(modules)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def search_window(picked, grids, size):
    """Eq. 7, every window counted one by one."""
    best, most, first = None, 0, 0
    for image, (height, width) in enumerate(grids):
        h, w = min(size, height), min(size, width)
        for top in range(height - h + 1):
            for left in range(width - w + 1):
                inside = {
                    first + row * width + column for row in range(top, top + h) for column in range(left, left + w)
                }
                if len(inside & set(picked)) > most:
                    best, most = (image, top, left, h, w), len(inside & set(picked))
        first += height * width
    return best


def test_densest_window_equals_a_search():
    draw, clamped, others = random.Random(0), 0, 0
    for _ in range(400):
        grids = [(draw.randint(1, 6), draw.randint(1, 7)) for _ in range(draw.randint(1, 3))]
        tokens = range(sum(height * width for height, width in grids))
        picked = draw.sample(tokens, draw.randint(0, min(8, len(tokens))))
        size = draw.randint(1, 4)
        found = densest_window(picked, grids, size)
        assert found == search_window(picked, grids, size)
        clamped += found is not None and found[3:] != (size, size)
        others += found is not None and found[0] > 0
    assert clamped > 50 and others > 50


def test_windows_by_hand():
    assert densest_window([], [(3, 3)], 3) is None
    assert densest_window([0, 8], [(3, 3)], 2) == (0, 0, 0, 2, 2)  # a tie: first in raster order
    assert densest_window([0, 9], [(3, 3), (2, 2)], 2)[0] == 0  # a tie: first image
    assert densest_window([0, 10, 12], [(3, 3), (2, 2)], 2) == (1, 0, 0, 2, 2)
    assert densest_window([11, 10, 7], [(3, 4)], 2) == (0, 1, 2, 2, 2)  # the last corner
    assert densest_window([1], [(1, 5)], 3) == (0, 0, 0, 1, 3)


def numbered(rows: int, columns: int, side: int) -> Image.Image:
    """Every cell of the grid in a grey of its own."""
    cells = np.arange(rows * columns, dtype=np.uint8).reshape(rows, columns) * 10 + 10
    return Image.fromarray(cells.repeat(side, 0).repeat(side, 1)).convert("RGB")


@pytest.mark.parametrize("top, left", [(0, 0), (0, 2), (1, 0), (1, 2), (0, 1)])
def test_a_crop_is_the_part_under_the_window(top, left):
    image = numbered(3, 4, 10)
    crop = np.array(crop_window(image, (0, top, left, 2, 2), (3, 4), 20)).astype(int)
    expected = np.array(image)[top * 10 : top * 10 + 20, left * 10 : left * 10 + 20]
    assert np.abs(crop - expected).max() <= 1  # 8 bits, cut off
    enlarged = np.array(crop_window(image, (0, top, left, 2, 2), (3, 4), 0))
    assert enlarged.shape == (30, 40, 3)
    assert [abs(int(enlarged[y, x, 0]) - int(expected[y, x, 0])) <= 1 for y in (0, -1) for x in (0, -1)] == [True] * 4


def test_a_crop_reaches_the_border_of_any_size():
    """61 / 7 * 7 is less than 61 in floating point."""
    image = Image.fromarray(np.arange(61 * 122, dtype=np.int64).reshape(122, 61).astype(np.uint8)).convert("RGB")
    whole = np.array(crop_window(image, (0, 0, 0, 7, 7), (7, 7), 0)).astype(int)
    assert np.abs(whole - np.array(image)).max() <= 1
    tiny = crop_window(picture(2, 2), (0, 3, 3, 1, 1), (4, 4), 6)  # less than a pixel
    assert tiny.size == (6, 6)


def test_a_crop_of_any_mode():
    assert crop_window(Image.new("RGBA", (20, 20), "red"), (0, 0, 0, 1, 1), (2, 2), 4).getpixel((0, 0)) == (255, 0, 0)


def naive_terms(objective, model, batch, replays, weighted: bool = True) -> list[torch.Tensor]:
    """Eq. 7-9 by row and step, one at a time, with the branch's own predictor."""
    merge, terms = model.config.vision_config.spatial_merge_size, []
    grids = [(h // merge, w // merge) for _, h, w in batch["image_grid_thw"].tolist()]
    for row, images in enumerate(batch["original_images"]):
        of_row, grids = grids[: len(images)], grids[len(images) :]
        for replay in replays:
            kept = replay.tokens[row] >= 0
            if not kept.any():
                continue
            image, top, left, h, w = search_window(replay.tokens[row][kept].tolist(), of_row, 3)
            source, grid = images[image], of_row[image]
            box = [left * source.width // grid[1], top * source.height // grid[0]]
            box += [(left + w) * source.width // grid[1], (top + h) * source.height // grid[0]]
            pixels = torch.from_numpy(np.array(source.crop(box))).permute(2, 0, 1)[None] / 255
            pixels = torch.nn.functional.interpolate(pixels, source.size[::-1], mode="bilinear")[0]
            crop = Image.fromarray((pixels * 255).permute(1, 2, 0).to(torch.uint8).numpy())
            encoded = objective.image_processor(images=[crop], return_tensors="pt")
            with torch.no_grad():
                (features,) = model.model.get_image_features(
                    encoded["pixel_values"], encoded["image_grid_thw"], return_dict=True
                ).pooler_output
            tokens = replay.embeds[row][kept] if weighted else replay.picked_embeds[row][kept] / kept.sum()
            if objective.replay_predictor.is_convolution:
                predicted = objective.replay_predictor(tokens.T[None])[0].sum(dim=-1)
            else:
                predicted = objective.replay_predictor(tokens.sum(dim=0))
            terms.append((predicted - features.mean(dim=0)).square().mean())
    return terms


@pytest.mark.parametrize("kind", PREDICTORS)
@pytest.mark.parametrize("weighted", [True, False])
def test_the_loss_written_out(tokenizer, processor, batch, kind, weighted):
    """The row without a picture has no part, nor has the step for which nothing was left."""
    model = build(tokenizer, **ROUTED).train()
    objective = make_objective(model, processor, replay_predictor=kind, replay_weighted=weighted)
    loss, replays = replay_loss(objective, model, batch)
    terms = naive_terms(objective, model, batch, replays, weighted)
    assert len(terms) == 2 + 2 + 0 + 1
    assert_near(loss, torch.stack(terms).mean())
    loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in objective.parameters())


@pytest.mark.parametrize("kind", PREDICTORS)
def test_a_ragged_batch_equals_its_rows_alone(tokenizer, processor, collator, samples, batch, kind):
    """Also where a row has fewer image tokens than a step replays, and others have more."""
    model = build(tokenizer, num_replay_tokens=6, **ROUTED).train()
    objective = make_objective(model, processor, replay_predictor=kind)
    together = objective(model, **batch)["losses"]
    ce, replay, tokens, sites = 0.0, 0.0, 0, 0
    for sample, count in zip(samples, (2, 2, 0, 1)):
        inputs = collator([sample])
        alone, learned = objective(model, **inputs), int((inputs["labels"] != -100).sum()) - 2  # slots are no targets
        ce, tokens = ce + alone["losses"]["ce_loss"] * learned, tokens + learned
        replay, sites = replay + alone["losses"]["replay_loss"] * count, sites + count
    assert_near(together["ce_loss"], ce / tokens)
    assert_near(together["replay_loss"], replay / sites)


@pytest.mark.parametrize("weighted", [True, False])
def test_the_gradient_reaches_attention_and_picks(tokenizer, processor, batch, weighted):
    """Attention by the weights of the picks; their plain mean does not depend on it."""
    model = build(tokenizer, **ROUTED).train()
    objective = make_objective(model, processor, replay_weighted=weighted)
    loss, replays = replay_loss(objective, model, batch)
    for replay in replays:
        replay.picked_embeds.retain_grad()
    loss.backward()
    for layer in model.model.language_model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            assert (projection.weight.grad is not None and projection.weight.grad.abs().max() > 0) == weighted
    assert model.lm_head.weight.grad is None
    for replay in replays:
        moved = replay.picked_embeds.grad.abs().amax(dim=-1) > 0
        assert torch.equal(moved, replay.tokens >= 0)


def test_the_target_takes_no_gradient_unless_asked(tokenizer, processor, batch, monkeypatch):
    """The vision tower learns through the picks: the same as with the target's numbers in its place."""

    def vision_gradient(constant: bool = False, **arguments):
        model = build(tokenizer, **ROUTED).train()
        objective = make_objective(model, processor, **arguments)
        encode_crops = objective.encode_crops
        if constant:
            monkeypatch.setattr(objective, "encode_crops", lambda *args: encode_crops(*args).detach().clone())
        replay_loss(objective, model, batch)[0].backward()
        return model.model.visual.patch_embed.proj.weight.grad

    expected = vision_gradient(constant=True, replay_detach_target=False)
    assert expected.abs().max() > 0
    assert_near(vision_gradient(), expected)
    assert (vision_gradient(replay_detach_target=False) - expected).abs().max() > 1e-3 * expected.abs().max()


def test_without_any_picture_a_zero_in_which_the_predictor_takes_part(tokenizer, processor, collator, samples):
    model = build(tokenizer, **ROUTED).train()
    objective = make_objective(model, processor)
    inputs = collator([samples[2]])
    output = objective(model, **inputs)
    assert output["losses"]["replay_loss"] == 0 and output["loss"] == output["losses"]["ce_loss"]
    output["loss"].backward()
    assert all(torch.equal(parameter.grad, torch.zeros_like(parameter)) for parameter in objective.parameters())


def test_the_whole_loss_and_its_switches(tokenizer, processor, collator, samples, batch):
    model = build(tokenizer, **ROUTED).train()
    inputs = {name: value for name, value in batch.items() if name != "original_images"}
    plain = model(**inputs).loss
    loss, replays = replay_loss(make_objective(model, processor), model, batch)
    assert make_objective(model, processor).weight == 1.0
    for weight in (None, 0.3):
        output = make_objective(model, processor, replay_loss_weight=weight)(model, **batch)
        assert output["losses"].keys() == {"ce_loss", "replay_loss"}
        assert not any(value.requires_grad for value in output["losses"].values())
        assert_near(output["loss"], plain + (1.0 if weight is None else weight) * loss)
    for left_out in (
        make_objective(model, processor, replay_loss_weight=0)(model, **batch),
        make_objective(model, processor)(model, **inputs),
    ):
        assert left_out["losses"].keys() == {"ce_loss"}
        assert torch.equal(left_out["loss"], plain)
    objective = make_objective(model, processor, replay_last_step_only=True)
    assert_near(
        replay_loss(objective, model, batch)[0], torch.stack(naive_terms(objective, model, batch, replays[-1:])).mean()
    )
    first_stage = CurriculumCollator(processor, 2)(samples)  # no latent steps yet
    assert objective(model, **first_stage)["losses"]["replay_loss"] == 0


def test_crops_of_a_chosen_size(tokenizer, processor, batch):
    model = build(tokenizer, **ROUTED)
    objective = make_objective(model, processor, replay_crop_size=40, replay_window=1)
    _, replays = replay_loss(objective, model, batch)
    sites = objective.find_sites(replays, batch["original_images"], batch["image_grid_thw"])
    assert [(step, row) for step, row, _ in sites] == [(0, 0), (0, 1), (0, 3), (1, 0), (1, 1)]
    assert {crop.size for _, _, crop in sites} == {(40, 40)}


@pytest.mark.parametrize("scope", ["incremental", "context"])
def test_gradient_checkpointing_changes_nothing(tokenizer, processor, batch, scope):
    model = build(tokenizer, routing_scope=scope, **ROUTED).train()
    objective = make_objective(model, processor, replay_loss_weight=100.0)  # so that its gradients show
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model)
        model.zero_grad()
        objective.zero_grad()
        output = objective(model, **batch)
        output["loss"].backward()
        found.append((output["losses"], gradients(model, objective)))
    (losses, expected), (other_losses, actual) = found
    assert losses["replay_loss"] > 0
    assert_near(torch.stack(list(other_losses.values())), torch.stack(list(losses.values())))
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_near(actual[name], gradient)


def test_the_weight_follows_the_backbones_size(tokenizer, processor):
    config = build(tokenizer).config
    config.get_text_config().hidden_size = 3584
    with torch.device("meta"):
        assert ReplayObjective(config, processor.image_processor, ReplayArguments()).weight == 0.2
        assert ReplayObjective(config, processor.image_processor, ReplayArguments(0.7)).weight == 0.7


@pytest.mark.parametrize(
    "fields",
    [
        {"replay_predictor": "cnn"},
        {"replay_window": 0},
        {"replay_crop_size": -1},
        {"replay_loss_weight": -0.1},
        {"replay_loss_weight": float("nan")},
        {"replay_loss_weight": float("inf")},
    ],
)
def test_bad_arguments(fields):
    with pytest.raises(ValueError, match=f"`{next(iter(fields))}`"):
        ReplayArguments(**fields)
