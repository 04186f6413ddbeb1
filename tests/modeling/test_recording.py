"""What a call records lies in that call: threads share a model, and a used model is copied, pickled and offloaded."""

import copy
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import CHAT_TEMPLATE, build_model, build_tokenizer, encode, user_turn
from conftest import picture as draw
from helpers import GREEDY, assert_near, enable_checkpointing, step_logits
from test_lare import IMAGE
from test_lare import build as build_lare
from test_vedas import build as build_vedas
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from modeling_latentvlm.saliency import SUFFIX, RecordingConfig, SaliencyRecorder, record_attention
from processing_latentvlm import VedasProcessor
from processing_latentvlm.processing_vedas import LATENT_TOKEN


pytestmark = pytest.mark.core

KINDS = ("deeplatent", "lare", "lare without Extractor", "lare without window", "vedas incremental", "vedas context")
SHORT = GREEDY | {"max_new_tokens": 3}


def lare_inputs(seed: int) -> dict:
    """A prompt of its own length and picture."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(2, 100, (4 + seed % 3,), generator=generator)
    ids = torch.cat([words[:1], torch.full((16,), IMAGE), words])[None]
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 56, 56, generator=generator)}


def qwen_inputs(processor, seed: int) -> dict:
    return dict(encode(processor, [user_turn("what colour?" + " left" * (seed % 3), draw(56, 84, seed))]))


def model_and_requests(kind: str, tokenizer, processor, image_processor, count: int = 4):
    """A model, its requests, and what `generate` is asked beside them."""
    name, _, rest = kind.partition(" ")
    if name == "deeplatent":
        return (
            build_model(tokenizer),
            [qwen_inputs(processor, seed) for seed in range(count)],
            {"min_latent_blocks": 1},
        )
    if name == "vedas":
        tokenizer = build_tokenizer((LATENT_TOKEN,))
        processor = VedasProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)
        model = build_vedas(tokenizer, routing_scope=rest or "incremental")
        return model, [qwen_inputs(processor, seed) for seed in range(count)], {}
    switches = {"without Extractor": {"use_extractor": False}, "without window": {"use_window": False}}
    return build_lare(**switches.get(rest, {})), [lare_inputs(seed) for seed in range(count)], {}


@pytest.fixture(params=KINDS)
def used(request, tokenizer, processor, image_processor):
    """A model that has generated, a request, and its settings and logits."""
    model, requests, settings = model_and_requests(request.param, tokenizer, processor, image_processor, count=1)
    settings = SHORT | settings
    return model, requests[0], settings, step_logits(model.generate(**requests[0], **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_200_requests_of_4_threads(kind, tokenizer, processor, image_processor):
    """Every answer is the one that a single thread gets, to the last bit."""
    model, requests, settings = model_and_requests(kind, tokenizer, processor, image_processor)
    settings = SHORT | settings
    expected = [step_logits(model.generate(**inputs, **settings)) for inputs in requests]
    assert not torch.equal(expected[0], expected[3])

    def answer(number: int) -> torch.Tensor:
        return step_logits(model.generate(**requests[number % 4], **settings))

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(answer, range(200)))
    wrong = [number for number, logits in enumerate(answers) if not torch.equal(logits, expected[number % 4])]
    assert not wrong


def test_nothing_is_left_on_the_model(used):
    """Neither a name in the config nor an attribute or a hook on a module."""
    model, inputs, settings, _ = used
    config = model.config.get_text_config()
    assert config._attn_implementation == model.model.language_model.config._attn_implementation == "sdpa"
    before = {
        name: (set(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }
    model.generate(**inputs, **settings)
    assert before == {
        name: (set(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


# Not `weights_only=True`: that a whole model can be pickled and opened elsewhere is what is tested, on a file of this test.
OPEN = """
import sys, torch
model, inputs, settings, expected = torch.load(sys.argv[1], weights_only=False)
actual = torch.stack(model.generate(**inputs, **settings).logits, dim=1)
torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
"""


def test_copied_and_saved(used, request, tmp_path):
    """By `deepcopy`, pickle and `torch.save`, and opened where nothing has run yet; what was stored answers on as before."""
    model, inputs, settings, expected = used
    copied = copy.deepcopy(model)
    assert copied.model.language_model.config is not model.model.language_model.config
    copied.model.language_model.set_attn_implementation("eager")  # what a copy is told does not reach the original
    assert model.model.language_model.layers[0].self_attn.config._attn_implementation.startswith("sdpa")
    assert_near(step_logits(copied.generate(**inputs, **settings)), expected)
    pickle.dumps(model)
    assert_near(step_logits(model.generate(**inputs, **settings)), expected)
    if model.config.model_type == "deeplatent" or "without" in request.node.name or "context" in request.node.name:
        return  # a new process takes seconds
    torch.save((model, dict(inputs), settings, expected), tmp_path / "model.pt")
    done = subprocess.run(
        [sys.executable, "-c", OPEN, tmp_path / "model.pt"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_weights_on_disk(used, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, inputs, settings, expected = used
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert_near(step_logits(model.generate(**inputs, **settings)), expected)


@pytest.mark.parametrize(
    "kind", ["lare", *(pytest.param(f"vedas {scope}", marks=pytest.mark.slow) for scope in ("incremental", "context"))]
)
def test_compiled_language_model(kind, tokenizer, processor, image_processor):
    """Recorders are filled by a compiled language model too: the latents are those of the plain one."""
    model, requests, settings = model_and_requests(kind, tokenizer, processor, image_processor, count=1)
    expected = step_logits(model.generate(**requests[0], **SHORT, **settings))
    torch._dynamo.reset()
    model.model.language_model.compile(backend="eager", dynamic=True)
    assert_near(step_logits(model.generate(**requests[0], **SHORT, **settings)), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["lare", "lare without Extractor"])
def test_gradients_under_checkpointing(kind, tokenizer, processor, image_processor):
    """What a layer records when it runs again in the backward pass is not what the steps read."""
    model, requests, _ = model_and_requests(kind, tokenizer, processor, image_processor, count=1)
    ids = requests[0]["input_ids"]
    inputs = requests[0] | {"labels": ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - 2, -100)}

    def gradients() -> dict:
        model.zero_grad()
        model(**inputs).loss.backward()
        return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}

    expected = gradients() if not model.train() else gradients()
    enable_checkpointing(model)
    actual = gradients()
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_near(actual[name], gradient)


def test_two_threads_in_training_mode(tokenizer, processor, image_processor):
    """With gradient checkpointing on, too: whether a layer keeps its cache is the thread's own matter."""
    model, requests, settings = model_and_requests("vedas incremental", tokenizer, processor, image_processor)
    enable_checkpointing(model.train())
    expected = [step_logits(model.generate(**inputs, **SHORT, **settings)) for inputs in requests]
    with ThreadPoolExecutor(4) as pool:
        answers = list(
            pool.map(lambda number: step_logits(model.generate(**requests[number % 4], **SHORT)), range(24))
        )
    assert all(torch.equal(logits, expected[number % 4]) for number, logits in enumerate(answers))
    assert not any(layer._can_checkpoint_with_cache for layer in model.model.language_model.layers)


def test_the_view_of_a_config_is_the_config():
    model = build_lare()
    config, view = model.model.language_model.config, model.model.language_model.layers[0].self_attn.config
    assert isinstance(view, RecordingConfig) and view.hidden_size == 64
    view.hidden_act = "relu"
    assert config.hidden_act == "relu"
    config._attn_implementation = "eager"
    assert view._attn_implementation == "eager" + SUFFIX
    with pytest.raises(AttributeError, match="no_such_field"):
        view.no_such_field  # noqa: B018
    record_attention(model.model.language_model)  # once more
    assert model.model.language_model.layers[0].self_attn.config is view
    assert len(model.model.language_model.layers[0]._forward_hooks) == 1


def test_a_kernel_sees_its_own_name():
    """FlashAttention's function reads off the config which of its kernels to load."""
    names = []

    def attend(module, *args, **kwargs):
        names.append((module.config._attn_implementation, module.layer_idx))
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("flash_of_a_test", attend)
    model, inputs = build_lare(), lare_inputs(0)
    expected = step_logits(model.generate(**inputs, **SHORT))
    model.model.language_model.config._attn_implementation = "flash_of_a_test"
    model.generate(**inputs, **SHORT)
    assert set(names) == {("flash_of_a_test", layer) for layer in range(3)}
    assert expected.isfinite().all()


def test_flex_attention_is_refused():
    model = build_lare()
    with pytest.raises(ValueError, match="flex"):
        model.set_attn_implementation("flex_attention")
    model.model.language_model.set_attn_implementation("flex_attention")  # the language model itself could
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # how this transformers calls torch for the mask
        with pytest.raises(ValueError, match="'flex_attention'.*row of attention.*'sdpa'"):
            model.generate(**lare_inputs(0), **SHORT)


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_float32_under_autocast(base):
    """The row is that of float32 products over what the kernel got; half precision would be some percent off."""
    from modeling_latentvlm.saliency import attention_row

    query, key = torch.randn(2, 4, 5, 16) * 3, torch.randn(2, 2, 9, 16)
    expected = attention_row(query, key, None, 0.25, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention_row(query, key, None, 0.25, None), expected)
    model = build_lare()
    model.model.language_model.set_attn_implementation(base)
    recorder, seen = SaliencyRecorder(), []
    plain = recorder.record
    recorder.record = lambda *args: (seen.append(args), plain(*args))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.model.language_model(lare_inputs(0)["input_ids"].clamp(max=99), saliency=recorder)
    assert len(seen) == 3
    for layer, query, key, mask, scaling in seen:
        row = attention_row(query.float(), key.float(), mask, scaling, None).mean(dim=1)
        assert torch.equal(recorder.rows[layer], row)
