"""Conversion of both backbones to a fresh Vedas model. What every converter does is tested with DeepLatent's."""

import json

import pytest
import torch
from conftest import CHAT_TEMPLATE, build_tokenizer, encode, picture, user_turn
from helpers import GREEDY, step_logits
from safetensors.torch import load_file
from test_vedas import STOCK, fields_of
from torch.testing import assert_close
from transformers import AutoModel, AutoProcessor, GenerationConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from conversion.convert_vedas import convert_vedas
from modeling_latentvlm import VedasForConditionalGeneration


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def backbone(request, tmp_path_factory):
    """A stock checkpoint of each backbone."""
    folder, tokenizer = tmp_path_factory.mktemp(request.param) / "stock", build_tokenizer()
    config_class, model_class = STOCK[request.param]
    torch.manual_seed(3)
    model = model_class(config_class(**fields_of(tokenizer, request.param)))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(
        eos_token_id=[end, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder, max_shard_size="60KB")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 16).save_pretrained(folder)
    return request.param, folder, model.eval()


@pytest.fixture(scope="module")
def converted(backbone, tmp_path_factory):
    settings = {"num_latent_steps": 2, "num_replay_tokens": 3, "alpha": 4}
    return convert_vedas(backbone[1], tmp_path_factory.mktemp("converted") / "vedas", overrides=settings)


def weights_of(folder) -> dict:
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def test_backbone_bit_for_bit_and_exactly_the_routers_new(backbone, converted):
    before, after = weights_of(backbone[1]), weights_of(converted)
    rows = len(build_tokenizer())  # behind these the latent token took a spare row
    for name, weight in before.items():
        kept = slice(rows) if "embed_tokens" in name or name == "lm_head.weight" else slice(None)
        assert torch.equal(after[name][kept], weight[kept])
    new = {name.replace("language_model.", "") for name in after.keys() - before.keys()}
    assert new == {f"model.layers.1.router.{part}" for part in ("score.weight", "score.bias", "depth_scale")}
    bias = next(value for name, value in after.items() if name.endswith("score.bias"))
    assert bias.item() == -4.0


def test_it_loads_and_starts_near_its_backbone(backbone, converted):
    name, folder, stock = backbone
    model, info = VedasForConditionalGeneration.from_pretrained(converted, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.backbone == name and model.config.num_latent_steps == 2
    processor = AutoProcessor.from_pretrained(converted, trust_remote_code=True)
    inputs = encode(processor, [user_turn("what?", picture(84, 84))])
    model.config.num_latent_steps = 0
    near, exact = (step_logits(one.generate(**inputs, **(GREEDY | {"max_new_tokens": 1}))) for one in (model, stock))
    difference = (near - exact).abs()
    difference[..., model.config.latent_token_id] = 0  # its row is new
    assert 0 < difference.max() < 0.02 * exact.abs().max()


def test_remote_code_answers(converted):
    model = AutoModel.from_pretrained(converted, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(converted, trust_remote_code=True)
    inputs = encode(processor, [user_turn("what?", picture(84, 84))])
    output = model.generate(**inputs, output_latents=True, **GREEDY)
    assert [len(step.picked_tokens) for step in output.latent_trace.steps] == [3, 3]
    again = VedasForConditionalGeneration.from_pretrained(converted).generate(**inputs, **GREEDY)
    assert_close(step_logits(output), step_logits(again), atol=1e-5, rtol=1e-5)
    assert json.loads((converted / "generation_config.json").read_text())["eos_token_id"] == [
        processor.tokenizer.eos_token_id,
        processor.tokenizer.pad_token_id,
    ]


def test_what_the_backbone_decides_cannot_be_set(backbone, tmp_path):
    with pytest.raises(ValueError, match="`--set` knows the fields.*got backbone"):
        convert_vedas(backbone[1], tmp_path / "out", overrides={"backbone": "qwen2_vl"})
    assert not (tmp_path / "out").exists()
