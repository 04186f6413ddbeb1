"""The reference preset reproduces the authors' published code: layer, language model, latent loop, decoding, loss."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from configuration_latentvlm import VedasConfig
from modeling_latentvlm import VedasForConditionalGeneration
from modeling_latentvlm.routing_vedas import RoutedQwen2_5_VLDecoderLayer, Routing
from modeling_latentvlm.saliency import SaliencyRecorder, record_attention
from modeling_latentvlm.visual_replay_vedas import densest_window
from train.vedas.crop_distillation import ReplayArguments, ReplayObjective


pytestmark = pytest.mark.core

GOLDEN = Path(__file__).parent / "golden" / "vedas"
CONFIGS = json.loads((GOLDEN / "configs.json").read_text())
TOLERANCE = 2e-5
BACKBONES = {"c": "qwen2_5_vl", "c280": "qwen2_5_vl", "c2": "qwen2_vl", "b": "qwen2_5_vl", "a": "qwen2_5_vl"}


def assert_golden(actual, expected):
    assert_close(actual, expected, atol=TOLERANCE, rtol=0)


def build(case: str, **fields) -> VedasForConditionalGeneration:
    """The reference preset at the sizes of a case."""
    published, ids = CONFIGS[case]["config"], CONFIGS[case]["ids"] or {}
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
    )
    text = {name: published[name] for name in names} | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": published["rope_theta"],
            "mrope_section": published["rope_scaling"]["mrope_section"],
        },
        "bos_token_id": None,
        "eos_token_id": ids.get("eos"),
        "pad_token_id": ids.get("pad"),
    }
    vision = {name: value for name, value in published["vision_config"].items() if name != "model_type"}
    config = VedasConfig.preset(
        "reference",
        backbone=BACKBONES[case],
        text_config=text,
        vision_config=vision,
        latent_token_id=ids.get("latent", 1),
        **{name: published[name] for name in ("image_token_id", "video_token_id")},
        **fields,
    )
    return VedasForConditionalGeneration(config).eval()


def load(model, weights: dict, drop_routers: bool = False) -> VedasForConditionalGeneration:
    """Put published weights, under their published names, into a model."""
    renamed = {}
    for name, value in weights.items():
        name = re.sub(r"^visual\.", "model.visual.", name.removeprefix("base_causallm.").removeprefix("weight."))
        name = re.sub(r"^model\.(?!visual\.|language_model\.)", "model.language_model.", name)
        if not (drop_routers and ".router." in name):
            renamed[name.replace("router.router", "router.score")] = value
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    assert not unexpected
    assert all(name.endswith("depth_scale") or "visual" in name for name in missing)  # e^(d) is ours, and one
    return model


@pytest.mark.parametrize("case", ["plain", "padded3d", "exact32"])
@pytest.mark.parametrize("aligned", [False, True])
def test_routed_layer(case, aligned):
    golden, model = load_file(GOLDEN / "layer.safetensors"), build("a")
    text_config = model.config.get_text_config()
    text_config._attn_implementation = "eager"
    layer = RoutedQwen2_5_VLDecoderLayer(text_config, 1, 1).eval()
    weights = {
        name[7:].replace("router.router", "router.score"): golden[name] for name in golden if name[:7] == "weight."
    }
    assert layer.load_state_dict(weights, strict=False).missing_keys == ["router.depth_scale"]
    states = golden[f"{case}.hidden_in"]
    tables = Qwen2_5_VLRotaryEmbedding(text_config)(states, golden[f"{case}.position_ids"])
    everything = torch.ones(states.shape[:2], dtype=torch.bool)
    routing = Routing(everything, [32] * 6, "softmax", aligned=aligned)
    with torch.no_grad():
        output = layer(
            states, attention_mask=golden[f"{case}.attention_mask_4d"], position_embeddings=tables, routing=routing
        )
    assert_golden(output, golden[f"{case}.{'output_aligned_scatter' if aligned else 'output'}"])
    assert torch.equal(routing.picked[1], golden[f"{case}.kept_position_order"])


@pytest.mark.parametrize("case", ["plain", "mrope3d"])
@pytest.mark.parametrize("aligned", [False, True])
def test_language_model(case, aligned):
    golden = load_file(GOLDEN / "language_model.safetensors")
    model = load(build("b"), {name: golden[name] for name in golden if name.startswith("weight.")})
    text_model, embeds = model.model.language_model, golden[f"{case}.inputs_embeds"]
    positions = golden[f"{case}.position_ids"]
    positions = positions.expand(3, *positions.shape) if positions.ndim == 2 else positions
    record_attention(text_model)
    recorder = SaliencyRecorder()
    everything = torch.ones(embeds.shape[:2], dtype=torch.bool)
    routing = Routing(everything, [32] * 6, "softmax", aligned=aligned)
    with torch.no_grad():
        hidden = text_model(
            inputs_embeds=embeds,
            attention_mask=golden[f"{case}.attention_mask"],
            position_ids=positions,
            use_cache=False,
            saliency=recorder,
            routing=routing,
        ).last_hidden_state
    if aligned:
        assert_golden(model.lm_head(hidden), golden[f"{case}.logits_aligned_scatter"])
    else:
        assert_golden(hidden, golden[f"{case}.last_hidden_state"])
        assert_golden(model.lm_head(hidden), golden[f"{case}.logits"])
        assert_golden(recorder.mean(), golden[f"{case}.saliency_last_row"])


def decode(model, golden):
    return model.generate(
        golden["input_ids"],
        pixel_values=golden["pixel_values"],
        image_grid_thw=golden["image_grid_thw"],
        max_new_tokens=len(golden["generated_ids"]),
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        output_latents=True,
    )


def check_decoding(output, golden):
    assert_golden(torch.stack(output.logits, dim=1)[0], golden["decode_step_logits"])
    length = golden["input_ids"].shape[1]
    assert torch.equal(output.sequences[0, length:], golden["generated_ids"])


@pytest.mark.parametrize("case", ["c", "c2"])
def test_latent_loop_and_greedy_decoding(case):
    golden = load_file(GOLDEN / f"{case}_infer.safetensors")
    output = decode(load(build(case), load_file(GOLDEN / f"{case}_weights.safetensors")), golden)
    check_decoding(output, golden)
    assert len(output.latent_trace.steps) == 3
    for number, step in enumerate(output.latent_trace.steps):
        assert torch.equal(step.picked_tokens, golden[f"pass{number}.selected_rel_idx"])
        assert_golden(step.latents[0], golden[f"pass{number}.latent_z"])


def test_the_papers_geometry(imposed_order):
    golden = load_file(GOLDEN / "c280_infer.safetensors")
    imposed_order += [golden[f"pass{number}.selected_rel_idx"][None] for number in range(3)]
    check_decoding(decode(load(build("c280"), load_file(GOLDEN / "c280_weights.safetensors")), golden), golden)


def test_qwen2_vl_as_released_has_no_routed_layer(imposed_order):
    golden = load_file(GOLDEN / "c2_released_infer.safetensors")
    imposed_order += [golden[f"pass{number}.selected_rel_idx"][None] for number in range(3)]
    model = load(build("c2", routed_layers=[]), load_file(GOLDEN / "c2_weights.safetensors"), drop_routers=True)
    check_decoding(decode(model, golden), golden)


@pytest.fixture(params=["c", "c2"])
def recorded(request):
    """A case with gradients: tensors, what only JSON holds, and the model."""
    case = request.param
    golden = load_file(GOLDEN / f"{case}_train.safetensors")
    model = load(build(case), load_file(GOLDEN / f"{case}_weights.safetensors"))
    return golden, json.loads((GOLDEN / f"{case}_train.json").read_text()), model


def training_inputs(golden) -> dict:
    return {
        "input_ids": golden["in.input_ids"],
        "attention_mask": golden["in.attention_mask"],
        "labels": golden["in.labels"],
        "pixel_values": golden["in.pixel_values"].flatten(0, 1),
        "image_grid_thw": golden["in.image_grid_thw"],
    }


def test_training_loss_and_gradients(recorded, imposed_order, monkeypatch):
    """Cross-entropy, crops, their features, F_SR's prediction, the whole loss, and the gradient of every weight."""
    golden, record, model = recorded
    picked = golden["selected_rel_idx_pass_major"].unflatten(0, (3, 2))
    imposed_order += list(picked)
    image_processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=80 * 80)
    images = [[Image.fromarray(image.permute(1, 2, 0).numpy())] for image in golden["in.ori_image"]]
    objective = ReplayObjective(model.config, image_processor, ReplayArguments.reference())
    weights = {name[8:]: value for name, value in golden.items() if name.startswith("tokenSR.")}
    objective.replay_predictor.load_state_dict(weights)
    seen = {}
    for name in ("predict", "encode_crops"):
        method = getattr(objective, name)
        monkeypatch.setattr(
            objective, name, lambda *args, name=name, method=method: seen.setdefault(name, (args, method(*args)))[1]
        )
    output = objective(model, images, **training_inputs(golden))
    assert_golden(output["losses"]["ce_loss"], golden["ce"])
    crops = np.stack([np.array(crop) for crop in seen["encode_crops"][0][1]])
    assert np.array_equal(crops, golden["crop_images_uint8_pass_major"][4:].numpy())
    assert_golden(seen["encode_crops"][1], golden["tokensr_target_pass_major"][4:])
    assert_golden(seen["predict"][1][0], golden["tokensr_recon_pass_major"][4:])
    assert_golden(output["losses"]["replay_loss"], golden["tokensr_all_terms_pass_major"][4:].mean())
    assert_golden(output["loss"], golden["loss"])
    output["loss"].backward()
    check_gradients(model, objective, golden, record)


def check_gradients(model, objective, golden, record):
    """Recorded gradients, and the recorded norm of every other one."""
    gradients = {f"tokenSR.{name}": value.grad for name, value in objective.replay_predictor.named_parameters()}
    for name, value in model.named_parameters():
        name = (
            name.removeprefix("model.").replace("language_model.", "model.").replace("router.score", "router.router")
        )
        gradients[f"base_causallm.{name}"] = value.grad
    for name, norm in record["grad_l2_norms"].items():
        if "embed_tokens" in name:  # theirs also collects the gradient at z, which replaced these rows in place
            continue
        assert_close(gradients[name].norm(), torch.tensor(norm), rtol=1e-3, atol=TOLERANCE)
        if f"grad.{name}" in golden:
            assert_golden(gradients[name], golden[f"grad.{name}"])


def test_windows(recorded):
    golden, record, _ = recorded
    for picked, (top, left) in zip(golden["selected_rel_idx_pass_major"].tolist(), record["windows"]):
        assert densest_window(picked, [(10, 10)], 4) == (0, top, left, 4, 4)
