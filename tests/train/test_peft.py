"""PEFT around every architecture: LoRA on full and quantized weights, adapters that are loaded, virtual tokens."""

import copy
import json

import pytest
import torch
from helpers import GREEDY, assert_near, step_logits
from packaging.version import Version
from shipped import (
    CHECKPOINTS,
    CLASSES,
    encode_rows,
    is_unread,
    load,
    load_shaken,
    new_weights,
    question,
    training_batch,
)
from transformers import AutoProcessor, BitsAndBytesConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from configuration_latentvlm.transformers_api import IS_RENAMED


peft = pytest.importorskip("peft")
ALL = pytest.mark.parametrize("name", list(CLASSES))
TARGETS = {"target_modules": r".*language_model.*\.(q_proj|v_proj)"}


def train(model, batch: dict, steps: int = 2) -> dict[str, torch.Tensor]:
    """The trainable weights as they were. LoRA's A has no gradient before B has moved, so two steps."""
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()
    return before


@torch.no_grad()
def logits_of(model, batch: dict) -> torch.Tensor:
    return model.eval()(**batch).logits


@ALL
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_lora_moves_every_weight_and_is_loaded_again(task_type, name, tmp_path):
    model, processor = load_shaken(name)
    batch = training_batch(name, processor)
    config = peft.LoraConfig(**TARGETS, task_type=task_type)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    assert_near(logits_of(adapted, batch), logits_of(model, batch))
    before = train(adapted, batch)
    assert not [
        key for key, weight in adapted.named_parameters() if key in before and torch.equal(weight, before[key])
    ]
    expected = logits_of(adapted, batch)
    assert not torch.allclose(expected, logits_of(model, batch), atol=1e-4)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert_near(logits_of(loaded, batch), expected)
    assert_near(logits_of(loaded.merge_and_unload(), batch), expected, 1e-3)  # sums in another order


@ALL
def test_adapters_on_a_model_of_remote_code(name, tmp_path):
    """Another class of the same name, loaded from a folder that brings its own code."""
    from configuration_latentvlm.hub_code import export_code

    model = load(name)
    batch = training_batch(name, AutoProcessor.from_pretrained(CHECKPOINTS / name))
    model.save_pretrained(tmp_path / "model")
    export_code(model.config.hub_classes, tmp_path / "model")
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**TARGETS, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits_of(adapted, batch)
    assert not torch.allclose(expected, logits_of(model, batch), atol=1e-3)

    def remote():
        reference = json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"]["AutoModel"]
        found = get_class_from_dynamic_module(reference, tmp_path / "model")
        assert found is not type(model) and found.__module__.startswith("transformers_modules")
        return found.from_pretrained(tmp_path / "model", dtype=torch.float32)

    assert_near(logits_of(peft.PeftModel.from_pretrained(remote(), tmp_path / "adapter"), batch), expected)
    loaded = remote()
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert_near(logits_of(loaded, batch), expected)


@ALL
def test_qlora(name, tmp_path):
    """nf4: the backbone is quantized and the new weights are not; trained, saved, loaded and merged."""
    pytest.importorskip("bitsandbytes")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def quantized():
        return load(name, quantization_config=settings)

    model = quantized()
    four_bit = {key for key, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert any("language_model" in key for key in four_bit)
    new = new_weights(model)
    assert new and not [key for key in new if key.rpartition(".")[0] in four_bit]
    assert {weight.dtype for weight in new.values()} == {torch.float32}
    batch = training_batch(name, AutoProcessor.from_pretrained(CHECKPOINTS / name))
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    own = {"deeplatent": ["latent_control"], "lare": ["refocus"], "vedas": ["router"]}[name]
    adapted = peft.get_peft_model(model, peft.LoraConfig(**TARGETS, modules_to_save=own, task_type="CAUSAL_LM"))
    before = train(adapted, batch)
    still = [key for key, weight in adapted.named_parameters() if key in before and torch.equal(weight, before[key])]
    assert not [key for key in still if not is_unread(model, key.replace("modules_to_save.default.", ""))]
    expected = logits_of(adapted, batch)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(quantized(), tmp_path / "adapter")
    assert_near(logits_of(loaded, batch), expected)
    merged = loaded.merge_and_unload()
    assert type(merged) is CLASSES[name]
    merged.save_pretrained(tmp_path / "merged")
    assert_near(logits_of(load(name, tmp_path / "merged"), batch), logits_of(merged, batch))


def test_the_extractor_of_a_half_precision_model_stays_one(tmp_path):
    """Only a quantized LaRe holds its extractor in float32."""
    model = load("lare", dtype=torch.float16)
    assert {weight.dtype for weight in model.parameters()} == {torch.float16}


VIRTUAL = {
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("kind", list(VIRTUAL))
@pytest.mark.parametrize("name", ["deeplatent", "vedas"])
def test_virtual_tokens_are_refused_where_positions_are_those_of_grids(name, kind):
    model, processor = load_shaken(name)
    adapted = peft.get_peft_model(model, VIRTUAL[kind])
    inputs = encode_rows(processor, [question("what?", 1)], add_generation_prompt=True)
    with pytest.raises(ValueError, match="virtual tokens|belongs to `generate`"):
        adapted(**inputs)
    with pytest.raises(ValueError):
        adapted.generate(**inputs, max_new_tokens=2)


def test_prefix_tuning_of_lare_is_refused():
    model, processor = load_shaken("lare")
    adapted = peft.get_peft_model(model, VIRTUAL["prefix"])
    inputs = encode_rows(processor, [question("what?", 1)], add_generation_prompt=True)
    with pytest.raises(ValueError, match="cache of their own"):
        adapted(**inputs)
    with pytest.raises(ValueError):
        adapted.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
def test_prompt_tuning_of_lare(kind):
    """The virtual tokens are a part of the prompt: trained, and decoded as `inputs_embeds` that begin with them."""
    model, processor = load_shaken("lare")
    batch = training_batch("lare", processor)
    inputs = encode_rows(processor, [question("what?", 1), question("which colour?", 2)], add_generation_prompt=True)
    adapted = peft.get_peft_model(copy.deepcopy(model), VIRTUAL[kind])
    before = train(adapted, batch)
    assert before and not [
        key for key, value in adapted.named_parameters() if key in before and torch.equal(value, before[key])
    ]
    if IS_RENAMED and Version(peft.__version__) < Version("0.22"):
        # This PEFT looks for the cache by its old name, finds none, and would start the prompt anew at every token.
        with pytest.raises(ValueError, match="virtual tokens"):
            adapted.generate(**inputs, **GREEDY)
        return
    output = adapted.generate(**inputs, **GREEDY)
    virtual = adapted.get_prompt(2).detach()
    embeds = torch.cat([virtual, model.get_input_embeddings()(inputs["input_ids"]).detach()], dim=1)
    mask = torch.cat([torch.ones(2, 3, dtype=torch.long), inputs["attention_mask"]], dim=1)
    expected = model.generate(inputs_embeds=embeds, attention_mask=mask, pixel_values=inputs["pixel_values"], **GREEDY)
    assert_near(step_logits(output), step_logits(expected))
    assert output.num_latents.tolist() == expected.num_latents.tolist()
