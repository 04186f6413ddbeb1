"""A checkpoint that is not what its config says is refused, not patched with random weights: in every architecture."""

import json

import pytest
import test_lare
import test_vedas
from conftest import build_model, build_tokenizer, stock_twin
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from modeling_latentvlm import DeepLatentForConditionalGeneration, LaReForCausalLM, VedasForConditionalGeneration
from modeling_latentvlm.complete_weights import load_complete


pytestmark = pytest.mark.core

# By architecture: its class, a part of the name of one of its own weights, and parts of the names of all of them.
KINDS = {
    "deeplatent": (DeepLatentForConditionalGeneration, "cross_attention", ("latent_control.", "latent_blocks.")),
    "lare": (LaReForCausalLM, "refocus.state_proj.weight", ("refocus.",)),
    "vedas": (VedasForConditionalGeneration, "router.depth_scale", (".router.",)),
}
BACKBONE = "layers.1.mlp.up_proj"


def build(kind: str, tokenizer):
    if kind == "lare":
        return test_lare.build()
    return build_model(tokenizer) if kind == "deeplatent" else test_vedas.build(build_tokenizer(("<|latent|>",)))


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def checkpoint(kind, tokenizer, tmp_path):
    build(kind, tokenizer).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")

    def rewrite(change) -> str:
        change(weights)
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        return str(tmp_path)

    return rewrite


def first(weights: dict, *parts: str) -> str:
    return next(name for name in weights if all(part in name for part in parts))


def test_an_untouched_checkpoint_loads(kind, checkpoint):
    _, info = KINDS[kind][0].from_pretrained(checkpoint(lambda weights: None), output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]


def test_a_wrong_shape_is_refused_with_both_shapes(kind, checkpoint):
    cls, _, (own, *_) = KINDS[kind]
    names = []

    def cut(weights):
        names.append(first(weights, own, "weight"))
        weights[names[0]] = weights[names[0]][..., :-1].clone()

    folder = checkpoint(cut)
    with pytest.raises(ValueError, match=rf"does not fit its config: .*{names[0][-12:]} is \(.*\), expected"):
        cls.from_pretrained(folder)
    _, info = cls.from_pretrained(folder, ignore_mismatched_sizes=True, output_loading_info=True)
    assert [key[0][-12:] for key in info["mismatched_keys"]] == [names[0][-12:]]


def test_a_missing_backbone_weight_is_refused(kind, checkpoint):
    folder = checkpoint(lambda weights: weights.pop(first(weights, BACKBONE)))
    with pytest.raises(ValueError, match=r"lacks 1 weights: .*layers\.1\.mlp\.up_proj"):
        KINDS[kind][0].from_pretrained(folder)


def test_a_misnamed_weight_is_refused_with_both_names(kind, checkpoint):
    def misname(weights):
        name = first(weights, BACKBONE)
        weights[name.replace("up_proj", "vp_proj")] = weights.pop(name)

    with pytest.raises(ValueError, match=r"lacks 1 weights: .*up_proj.weight\. It holds 1 that .*vp_proj"):
        KINDS[kind][0].from_pretrained(checkpoint(misname))


def test_a_flipped_byte_in_the_header_is_refused(kind, checkpoint, tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint(lambda weights: None)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    name = first(json.loads(content[8 : 8 + length]), KINDS[kind][1]).encode()
    place = content.index(name) + len(name) - 3
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(ValueError, match="lacks 1 weights"):
        KINDS[kind][0].from_pretrained(tmp_path)


def test_some_latent_weights_missing_is_refused(kind, checkpoint):
    cls, one, _ = KINDS[kind]
    folder = checkpoint(lambda weights: weights.pop(first(weights, one)))
    with pytest.raises(ValueError, match=f"lacks 1 weights: .*{one}"):
        cls.from_pretrained(folder)
    cls.from_pretrained(folder, ignore_mismatched_sizes=True)


def test_missing_latent_weights_start_fresh(kind, checkpoint):
    """A backbone's own checkpoint has none of them; transformers lists them."""
    cls, _, parts = KINDS[kind]

    def drop(weights):
        for name in [name for name in weights if any(part in name for part in parts)]:
            weights.pop(name)

    model, info = cls.from_pretrained(checkpoint(drop), output_loading_info=True)
    assert info["missing_keys"] and all(any(part in name for part in parts) for name in info["missing_keys"])
    if kind == "deeplatent":
        assert model.latent_blocks.queries.weight.std() > 0.9  # `latent_query_rms`, not zeros


def test_stock_models_are_held_to_the_same(tokenizer, tmp_path):
    stock_twin(build_model(tokenizer)).save_pretrained(tmp_path)
    load_complete(AutoModelForImageTextToText, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(first(weights, BACKBONE))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights: .*layers\.1\.mlp\.up_proj"):
        load_complete(AutoModelForImageTextToText, tmp_path)
