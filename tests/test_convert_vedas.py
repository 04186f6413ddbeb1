"""Conversion of both backbones to a fresh Vedas model. What every converter does is tested with DeepLatent's."""

import json
from pathlib import Path

import pytest
import torch
from conftest import CHAT_TEMPLATE, build_tokenizer, encode, picture, user_turn
from helpers import GREEDY, step_logits
from safetensors.torch import load_file
from test_vedas import STOCK, fields_of
from test_vedas_golden import GOLDEN, check_decoding, decode
from test_vedas_golden import build as build_golden
from torch.testing import assert_close
from transformers import AutoModel, AutoProcessor, GenerationConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from conversion.convert_vedas import convert_vedas
from modeling_latentvlm import VedasForConditionalGeneration
from train.common.training_model import load_objective
from train.vedas.crop_distillation import ReplayArguments, ReplayObjective


pytestmark = pytest.mark.core

SHARED = Path(__file__).parents[2] / "shared" / "golden" / "vedas" / "c_lora"


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
    settings = {"num_latent_steps": 2, "num_replay_tokens": 3, "num_routed_tokens": 4}
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


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The golden Qwen2.5-VL model as its authors would publish it: wrapped, with adapters beside the base weights."""
    golden = load_file(GOLDEN / "c_weights.safetensors")
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, value in golden.items():
        wrapped = "base_causallm.base_model.model." + name.removeprefix("base_causallm.")
        if ".self_attn.q_proj.weight" not in name:
            weights[wrapped.replace("q_proj.bias", "q_proj.base_layer.bias")] = value
            continue
        target = wrapped.removesuffix(".weight")
        down, up = torch.randn(4, 64, generator=generator), torch.randn(64, 4, generator=generator)
        weights[f"{target}.lora_A.default.weight"], weights[f"{target}.lora_B.default.weight"] = down, up
        weights[f"{target}.base_layer.weight"] = value - 0.25 * up @ down
    weights["embedding.weight"] = golden["base_causallm.model.embed_tokens.weight"]
    weights |= {f"tokenSR.{layer}.weight": torch.randn(64, 64) for layer in (0, 2)}
    weights |= {f"tokenSR.{layer}.bias": torch.randn(64) for layer in (0, 2)}
    folder = tmp_path_factory.mktemp("published")
    stock = build_golden("c").config.to_dict()
    names = ("text_config", "vision_config", "image_token_id", "video_token_id", "tie_word_embeddings")
    (folder / "config.json").write_text(
        json.dumps({name: stock[name] for name in names} | {"model_type": "qwen2_5_vl"})
    )
    torch.save({f"module.{name}": value for name, value in weights.items()}, folder / "vedas.pth")
    return folder


def test_a_published_checkpoint_gives_the_published_answer(published, tmp_path):
    output = convert_vedas(published, tmp_path / "out", reference_checkpoint=published / "vedas.pth")
    model = VedasForConditionalGeneration.from_pretrained(output)
    model.config.latent_token_id = 316  # theirs is the last row; the golden model's vocabulary goes on behind it
    golden = load_file(GOLDEN / "c_infer.safetensors")
    check_decoding(decode(model, golden), golden)
    assert model.config.routed_layers == [1, 3, 5] and model.config.routing_scope == "reference"
    assert not any("tokenSR" in name for name in weights_of(output))
    objective = ReplayObjective(model.config, None, ReplayArguments.reference())
    assert load_objective(objective, output)
    published_weight = torch.load(published / "vedas.pth", weights_only=True)["module.tokenSR.2.weight"]
    assert torch.equal(objective.replay_predictor[2].weight, published_weight)


def test_another_scaling_is_another_model(published, tmp_path):
    folders = [
        convert_vedas(published, tmp_path / str(alpha), reference_checkpoint=published / "vedas.pth", lora_alpha=alpha)
        for alpha in (1, 2)
    ]
    first, second = (weights_of(folder) for folder in folders)
    different = {name for name in first if not torch.equal(first[name], second[name])}
    assert different == {name for name in first if name.endswith("self_attn.q_proj.weight")}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda w: w.pop(next(n for n in w if n.endswith("layers.2.mlp.up_proj.weight"))),
            "missing .*layers.2.mlp.up_proj",
        ),
        (lambda w: w.update({"module.base_causallm.extra": torch.ones(1)}), "unknown .*extra"),
        (lambda w: w.update({n: w[n][:3] for n in w if n.endswith("model.norm.weight")}), r"norm.weight is \(3,\)"),
        (lambda w: w.pop(next(n for n in w if "lora_B" in n)), "lora_B"),
        (lambda w: w.pop(next(n for n in w if "tokenSR.0.bias" in n)), "tokenSR.0.bias"),
        (lambda w: w.update({"module.note": "text"}), "dictionary of tensors"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(published, tmp_path, change, message):
    weights = torch.load(published / "vedas.pth", weights_only=True)
    change(weights)
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message):
        convert_vedas(published, tmp_path / "out", reference_checkpoint=tmp_path / "other.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.pth"]


def test_a_pickle_that_runs_code_is_refused(published, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        convert_vedas(published, tmp_path / "out", reference_checkpoint=tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the authors' recorded adapters are not beside this checkout")
def test_the_authors_own_adapters(published, tmp_path, imposed_order):
    """Tensors of a PEFT run of theirs, too large to ship; the picked tokens come in its machine's order."""
    output = convert_vedas(published, tmp_path / "out", reference_checkpoint=SHARED / "weights.safetensors")
    model = VedasForConditionalGeneration.from_pretrained(output)
    model.config.latent_token_id = 316
    golden = load_file(SHARED / "infer.safetensors")
    imposed_order += [golden[f"pass{number}.selected_rel_idx"][None] for number in range(3)]
    check_decoding(decode(model, golden), golden)
