"""The saliency row equals the row of eager's attention maps, on every fast path."""

import pytest
import torch
from conftest import build_model
from helpers import enable_checkpointing
from torch.testing import assert_close
from transformers import DynamicCache, LlamaConfig, LlamaModel, StaticCache

from configuration_latentvlm.transformers_api import cache_keyword
from modeling_latentvlm.saliency import SaliencyRecorder, record_attention


pytestmark = pytest.mark.core


@pytest.fixture(params=["qwen", "llama"])
def text_model(request, tokenizer):
    """Grouped-query attention in both."""
    if request.param == "qwen":
        return build_model(tokenizer).model.language_model
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model


def inputs_of(batch: int, length: int, pads: int = 0) -> dict:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :pads] = 0
    return {"inputs_embeds": torch.randn(batch, length, 64), "attention_mask": mask}


def eager_maps(text_model, inputs) -> torch.Tensor:  # (B, S, S)
    text_model.config._attn_implementation = "eager"
    maps = text_model(**inputs, output_attentions=True).attentions
    text_model.config._attn_implementation = "sdpa"  # also takes a recording twin away
    return torch.stack(maps).mean(dim=(0, 2))


def record(text_model, columns=None, **inputs) -> torch.Tensor:
    recorder = SaliencyRecorder(columns)
    record_attention(text_model)
    output = text_model(**inputs, saliency=recorder)
    return recorder.mean(), output.last_hidden_state


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("pads", [0, 4])
def test_the_row_is_eagers(text_model, implementation, pads):
    inputs = inputs_of(2, 11, pads)
    expected = eager_maps(text_model, inputs)
    text_model.config._attn_implementation = implementation
    row, hidden = record(text_model, **inputs)
    assert_close(row, expected[:, -1], atol=1e-5, rtol=1e-5)
    assert_close(row.sum(-1), torch.ones(2))
    assert torch.equal(hidden, text_model(**inputs).last_hidden_state)
    text_model.config._attn_implementation = implementation
    assert torch.equal(hidden, text_model(**inputs).last_hidden_state)  # the kernel is the one there was


def test_without_a_mask(text_model):
    inputs = inputs_of(1, 9)
    expected = eager_maps(text_model, inputs)
    row, _ = record(text_model, inputs_embeds=inputs["inputs_embeds"])
    assert_close(row, expected[:, -1], atol=1e-5, rtol=1e-5)


def test_each_row_may_ask_for_its_own_position(text_model):
    inputs = inputs_of(2, 11, 3)
    expected = eager_maps(text_model, inputs)
    columns = torch.tensor([7, 4])
    row, _ = record(text_model, columns, **inputs)
    assert_close(row, expected[torch.arange(2), columns], atol=1e-5, rtol=1e-5)
    alone, _ = record(text_model, columns[1:], inputs_embeds=inputs["inputs_embeds"][1:])
    assert_close(alone, expected[1:, 4], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_on_a_cache(text_model, cache):
    inputs = inputs_of(2, 11, 2)
    expected = eager_maps(text_model, inputs)
    config = text_model.config
    past = DynamicCache(config=config) if cache == "dynamic" else StaticCache(config=config, max_cache_len=16)
    embeds, mask = inputs["inputs_embeds"], inputs["attention_mask"]
    caching = cache_keyword(past) | {"use_cache": True}
    text_model(inputs_embeds=embeds[:, :6], attention_mask=mask[:, :6], **caching)
    row, _ = record(text_model, inputs_embeds=embeds[:, 6:], attention_mask=mask, **caching)
    assert_close(row[:, :11], expected[:, -1], atol=1e-5, rtol=1e-5)
    assert not row[:, 11:].any()


def test_flash_attentions_padding_mask():
    """FlashAttention gets no four-dimensional mask: causality is implied, padding comes as (B, S)."""
    from modeling_latentvlm.saliency import attention_row

    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8)
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[0, :3] = 0
    columns = torch.tensor([4, 2])
    causal = torch.arange(9) <= (4 + torch.arange(5))[:, None]
    full = (causal & padding[:, None].bool())[:, None]
    assert_close(attention_row(query, key, padding, 0.3, columns), attention_row(query, key, full, 0.3, columns))


def test_bfloat16_is_near_float32(text_model):
    inputs = inputs_of(2, 11)
    expected, _ = record(text_model, **inputs)
    half = text_model.to(torch.bfloat16)
    row, _ = record(half, inputs_embeds=inputs["inputs_embeds"].bfloat16(), attention_mask=inputs["attention_mask"])
    assert row.dtype == torch.float32
    assert_close(row.sum(-1), torch.ones(2))
    assert (row - expected).abs().max() < 0.05


def test_gradients_are_the_same_under_checkpointing(text_model):
    inputs = inputs_of(1, 7)
    text_model.train()
    weights = torch.randn(1, 7)

    def gradient() -> torch.Tensor:
        text_model.zero_grad()
        row, _ = record(text_model, use_cache=False, **inputs)
        (row * weights).sum().backward()
        return text_model.layers[0].self_attn.q_proj.weight.grad.clone()

    expected = gradient()
    assert expected.abs().max() > 0
    enable_checkpointing(text_model)
    assert_close(gradient(), expected, atol=1e-6, rtol=1e-5)


def test_memory_is_linear_in_the_sequence(text_model):
    """No tensor of the recorder is as large as an attention map."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                    self.size = max(self.size, tensor.numel())
            return result

    inputs = {"inputs_embeds": torch.randn(1, 600, 64)}
    with Largest() as largest, torch.no_grad():
        record(text_model, **inputs)
    assert largest.size < 600 * 600 // 2  # one head's map alone would be 360,000
