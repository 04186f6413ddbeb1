"""The modules between the control states and a block of latents, each against a closed form."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from modeling_latentvlm.latent_former_deeplatent import (
    ImageIndexEmbedding,
    LatentBlockBuilder,
    LatentFormerAttention,
    LatentQueries,
    grid_places,
    locate,
    modulate,
    rotate_2d,
)
from modeling_latentvlm.row_images import RowImages


pytestmark = pytest.mark.core


def test_queries_are_the_grid_itself_at_full_size_and_smooth_below():
    queries = LatentQueries(8, 4)
    torch.nn.init.normal_(queries.weight)
    assert_close(queries(4, 4), queries.weight.flatten(0, 1))
    assert_close(queries(1, 1), queries.weight.mean(dim=(0, 1))[None], atol=0.2, rtol=0.2)
    assert queries(3, 2).shape == (6, 8)
    rows = queries(4, 2).view(4, 2, 8)  # width resized, height untouched: rows stay apart
    assert_close(
        rows[0], F.interpolate(queries.weight[0].T[None, :, None], (1, 2), mode="bilinear", antialias=True)[0, :, 0].T
    )


def test_modulation_is_the_identity_at_the_start_and_scales_its_noise():
    base = torch.randn(10, 6) * 3
    zero = torch.zeros(6)
    assert_close(modulate(base, zero, zero, zero, None), base)
    assert_close(modulate(base, zero + 1, zero + 2, zero, None), 2 * base + 2)
    noise = torch.ones_like(base)
    moved = modulate(base, zero, zero, zero - 4, noise) - base
    assert_close(
        moved,
        torch.full_like(base, float(torch.tensor(-4.0).exp() * base.square().mean().sqrt())),
        atol=1e-5,
        rtol=1e-4,
    )


def test_the_width_of_the_noise_gets_no_gradient_through_its_base():
    base = torch.randn(5, 4, requires_grad=True)
    log_sigma = torch.zeros(4, requires_grad=True)
    modulate(base, torch.zeros(4), torch.zeros(4), log_sigma, torch.ones(5, 4)).sum().backward()
    assert_close(base.grad, torch.ones(5, 4))
    assert log_sigma.grad.abs().min() > 0


def test_rotary_embedding_depends_on_the_difference_of_places_alone():
    query, key = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(query_place, key_place):
        rotated = (
            rotate_2d(query, torch.tensor([[query_place]]), 100.0),
            rotate_2d(key, torch.tensor([[key_place]]), 100.0),
        )
        return float((rotated[0] * rotated[1]).sum())

    assert score((1.0, 2.0), (3.0, 5.0)) == pytest.approx(score((2.5, 4.0), (4.5, 7.0)), abs=1e-5)
    assert abs(score((1.0, 2.0), (3.0, 5.0)) - score((1.0, 2.0), (5.0, 3.0))) > 1e-3  # y is not x
    assert_close(rotate_2d(query, torch.zeros(1, 1, 2), 100.0), query)


def test_latents_lie_at_the_same_relative_place_of_every_image():
    images = RowImages(torch.zeros(8 * 6 + 2 * 3, 4), [(8, 6), (2, 3)], [1, 60])
    places = locate([(2, 3)], [images], torch.device("cpu"))
    # Distinct grids are sorted: (2, 3), then (8, 6). In its own grid a latent stands where it stands.
    assert_close(places.in_images[0, :, 0], grid_places(2, 3, torch.device("cpu")))
    assert_close(places.in_images[0, 0, 1], torch.tensor([1.5, 0.5]))  # first of two rows = middle of rows 0..3
    assert_close(places.in_images[0, 5, 1], torch.tensor([5.5, 4.5]))
    assert places.image_grid[0].tolist() == [1] * 48 + [0] * 6


def naive_attention(module, states, context, query_places, key_places, key_grid):
    """One query, one key at a time, with the rotation of the key's own grid."""
    heads = module.num_heads
    query, key, value = (
        f(x).unflatten(-1, (heads, -1))
        for f, x in ((module.q_proj, states), (module.k_proj, context), (module.v_proj, context))
    )
    scores = torch.zeros(heads, states.shape[1], context.shape[1])
    for i in range(states.shape[1]):
        for j in range(context.shape[1]):
            place = query_places[:, i : i + 1, key_grid[0, j]]
            turned = rotate_2d(query[:, i : i + 1], place, module.theta)[0, 0]
            other = rotate_2d(key[:, j : j + 1], key_places[:, j : j + 1], module.theta)[0, 0]
            scores[:, i, j] = (turned * other).sum(-1) * query.shape[-1] ** -0.5
    weights = scores.softmax(-1)
    mixed = torch.einsum("hij,jhd->ihd", weights, value[0])
    return module.o_proj(mixed.flatten(1))[None], weights.mean(0)[None]


def test_attention_over_images_of_unequal_grids_equals_the_naive_loop():
    module = LatentFormerAttention(16, 2, 50.0)
    images = RowImages(torch.randn(4 * 3 + 2 * 2 + 4 * 3, 16), [(4, 3), (2, 2), (4, 3)], [0, 20, 30])
    places = locate([(2, 3)], [images], torch.device("cpu"))
    assert places.in_images.shape[2] == 2  # two distinct grids
    states = torch.randn(1, 6, 16)
    actual, attention = module(
        states, images.features[None], places.in_images, places.image, places.image_grid, None, output_attention=True
    )
    expected, weights = naive_attention(
        module, states, images.features[None], places.in_images, places.image, places.image_grid
    )
    assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert_close(attention, weights, atol=1e-5, rtol=1e-5)
    assert_close(attention.sum(-1), torch.ones(1, 6))


@pytest.fixture
def builder(model) -> LatentBlockBuilder:
    return model.latent_blocks


def some_images(*grids) -> RowImages:
    return RowImages(
        torch.randn(sum(h * w for h, w in grids), 64), list(grids), [10 * index for index in range(len(grids))]
    )


def test_blocks_built_together_equal_blocks_built_alone(builder):
    images = [some_images((4, 4)), some_images((2, 3), (1, 5)), some_images((3, 3))]
    states, grids = torch.randn(3, 3, 64), [(2, 3), (4, 4), (1, 1)]
    together = builder(states, images, grids, output_attention=True)
    for row in range(3):
        alone = builder(states[row : row + 1], images[row : row + 1], grids[row : row + 1], output_attention=True)
        assert_close(together.latents[row], alone.latents[0], atol=1e-5, rtol=1e-5)
        assert_close(together.image_attention[row], alone.image_attention[0], atol=1e-5, rtol=1e-5)


def test_the_three_states_have_strictly_separate_roles(builder):
    """h_s sets the size alone, h_q and h_v never do (systems, section 1)."""
    images, states = [some_images((4, 4))], torch.randn(1, 3, 64)
    base = builder(states, images, [None])
    for role in (1, 2):
        moved = states.clone()
        moved[:, role] += 1
        other = builder(moved, images, base.grids)
        assert torch.equal(other.height_logits, base.height_logits)
        assert (other.latents[0] - base.latents[0]).abs().max() > 1e-3
    moved = states.clone()
    moved[:, 0] += 1
    other = builder(moved, images, base.grids)
    assert torch.equal(other.latents[0], base.latents[0])
    assert not torch.equal(other.height_logits, base.height_logits)


def test_a_row_of_one_colour_of_image_index_is_zero_at_the_start():
    embedding = ImageIndexEmbedding(8)
    torch.nn.init.zeros_(embedding.weight)
    assert not embedding(torch.arange(100)).any()
    torch.nn.init.normal_(embedding.weight)
    embedded = embedding(torch.arange(100))
    assert torch.cdist(embedded, embedded).add(torch.eye(100) * 9).min() > 1e-3  # a hundred images stay apart


def test_the_order_of_images_is_told_apart_only_by_the_index(model, builder):
    images = some_images((3, 3), (3, 3))
    swapped = RowImages(torch.cat([images.features[9:], images.features[:9]]), images.grids, images.columns)
    states = torch.randn(1, 3, 64)
    first, second = (builder(states, [row], [(2, 2)]).latents[0] for row in (images, swapped))
    assert (first - second).abs().max() > 1e-3
    with torch.no_grad():
        builder.image_index.weight.zero_()
    first, second = (builder(states, [row], [(2, 2)]).latents[0] for row in (images, swapped))
    assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_fresh_weights_start_where_the_paper_starts(tokenizer):
    from conftest import DeepLatentConfig, DeepLatentForConditionalGeneration, backbone_fields

    torch.manual_seed(0)
    fields = {"latent_start_token_id": 1, "latent_pad_token_id": 2, "latent_end_token_id": 3}
    config = DeepLatentConfig(**backbone_fields(tokenizer), **fields, latent_query_rms=2.5)
    builder = DeepLatentForConditionalGeneration(config).latent_blocks
    assert float(builder.queries.weight.detach().square().mean().sqrt()) == pytest.approx(2.5, rel=0.02)
    gamma, beta, log_sigma = builder.image_modulation(torch.randn(2, 64))
    assert not gamma.any() and not beta.any()
    assert_close(log_sigma, torch.full((2, 64), -4.0))
    assert not builder.image_index.weight.any()
    assert float(builder.layers[0].self_attention.q_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_one_layer_has_the_size_the_paper_calls_lightweight():
    """About 103M parameters at 7B: eight square matrices of the hidden size."""
    from configuration_latentvlm import DeepLatentConfig

    config = DeepLatentConfig(text_config={"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4})
    with torch.device("meta"):
        builder = LatentBlockBuilder(config)
    assert sum(parameter.numel() for parameter in builder.layers.parameters()) == pytest.approx(102.8e6, rel=0.001)
