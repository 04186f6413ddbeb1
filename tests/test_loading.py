"""A checkpoint that is not what its config says is refused, not patched with random weights."""

import pytest
from conftest import build_model
from safetensors.torch import load_file, save_file

from modeling_latentvlm import DeepLatentForConditionalGeneration


pytestmark = pytest.mark.core


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    build_model(tokenizer).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")

    def rewrite(change) -> str:
        change(weights)
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        return str(tmp_path)

    return rewrite


def test_a_wrong_shape_is_refused_with_both_shapes(checkpoint):
    name = "latent_blocks.queries.weight"
    folder = checkpoint(lambda weights: weights.update({name: weights[name][:3].clone()}))
    with pytest.raises(ValueError, match=r"queries.weight is \(3, 4, 64\), expected \(4, 4, 64\)"):
        DeepLatentForConditionalGeneration.from_pretrained(folder)
    model, info = DeepLatentForConditionalGeneration.from_pretrained(
        folder, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert [key[0] for key in info["mismatched_keys"]] == [name]


def test_a_missing_backbone_weight_is_refused(checkpoint):
    folder = checkpoint(lambda weights: weights.pop(next(name for name in weights if "layers.1.mlp.up_proj" in name)))
    with pytest.raises(ValueError, match=r"lacks 1 weights: .*layers\.1\.mlp\.up_proj"):
        DeepLatentForConditionalGeneration.from_pretrained(folder)


def test_some_latent_weights_missing_is_refused(checkpoint):
    folder = checkpoint(lambda weights: weights.pop(next(name for name in weights if "cross_attention" in name)))
    with pytest.raises(ValueError, match="lacks 1 weights: latent_blocks.*cross_attention"):
        DeepLatentForConditionalGeneration.from_pretrained(folder)
    DeepLatentForConditionalGeneration.from_pretrained(folder, ignore_mismatched_sizes=True)


def test_missing_latent_weights_start_fresh(checkpoint):
    """A backbone's own checkpoint has none of them; transformers lists them."""

    def drop(weights):
        for name in [name for name in weights if name.startswith("latent_")]:
            weights.pop(name)

    model, info = DeepLatentForConditionalGeneration.from_pretrained(checkpoint(drop), output_loading_info=True)
    assert all(name.startswith(("latent_control.", "latent_blocks.")) for name in info["missing_keys"])
    assert model.latent_blocks.queries.weight.std() > 0.9  # `latent_query_rms`, not zeros
