"""Half precision and quantization: the backbone shrinks, the new modules keep what they need."""

import pytest
import torch
from conftest import DeepLatentConfig, DeepLatentForConditionalGeneration, backbone_fields, shake
from helpers import GREEDY, step_logits


ONE = GREEDY | {"min_latent_blocks": 1, "max_latent_blocks": 1}


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """Sizes that 4-bit kernels take: multiples of their block of 64."""
    fields = backbone_fields(tokenizer)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    fields["text_config"] |= {"hidden_size": 128, "intermediate_size": 256, "rope_parameters": rope}
    fields["vision_config"] |= {"hidden_size": 128, "intermediate_size": 256, "out_hidden_size": 128}
    names = ("latent_start_token_id", "latent_pad_token_id", "latent_end_token_id")
    tokens = tokenizer.convert_tokens_to_ids(["<|latent_start|>", "<|latent_pad|>", "<|latent_end|>"])
    config = DeepLatentConfig(**fields, **dict(zip(names, tokens)), latent_grid_size=4)
    folder = tmp_path_factory.mktemp("model")
    shake(DeepLatentForConditionalGeneration(config)).save_pretrained(folder)
    return folder


@pytest.mark.core
@pytest.mark.parametrize("dtype, kept, tolerance", [("float16", "float32", 0.02), ("bfloat16", "bfloat16", 0.2)])
def test_half_precision(folder, rows, dtype, kept, tolerance):
    """float16 keeps the new modules in float32; the latents still enter the language model in its own dtype."""
    exact = DeepLatentForConditionalGeneration.from_pretrained(folder)
    half = DeepLatentForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype))
    assert half.lm_head.weight.dtype == getattr(torch, dtype)
    assert half.latent_blocks.queries.weight.dtype == half.latent_control.weight.dtype == getattr(torch, kept)
    settings = ONE | {"output_latents": True, "latent_grid": (2, 3)}
    output, expected = (model.generate(**rows[0], **settings) for model in (half, exact))
    assert output.latent_trace.steps[0].latents.dtype == getattr(torch, dtype)
    error = (step_logits(output)[:, :2] - step_logits(expected)[:, :2]).abs().max()
    assert 0 < error < tolerance * step_logits(expected).abs().max()


def test_four_bit_loading_skips_the_new_modules(folder, rows):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = DeepLatentForConditionalGeneration.from_pretrained(
        folder, quantization_config=settings, dtype=torch.bfloat16
    )
    assert isinstance(model.model.language_model.layers[0].self_attn.q_proj, Linear4bit)
    assert not any(isinstance(module, Linear4bit) for module in model.latent_blocks.modules())
    output = model.generate(**rows[0].to(model.device), **ONE)
    assert output.num_latent_blocks.tolist() == [1] and step_logits(output).isfinite().all()
