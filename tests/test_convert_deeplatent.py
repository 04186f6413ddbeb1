"""Conversion: the backbone bit for bit, the new weights a known set, the folder whole or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CHAT_TEMPLATE, backbone_fields, build_tokenizer, encode, picture, user_turn
from helpers import run_strictly
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from configuration_latentvlm import DeepLatentConfig
from conversion import backbone as backbone_module
from conversion import checkpoint_io, convert_deeplatent, qwen_backbone
from conversion.backbone import (
    add_tokens,
    check_overrides,
    find_license,
    load_image_processor,
    parse_overrides,
    reference_picture,
)
from conversion.checkpoint_io import (
    Layout,
    SourceWeights,
    extend_vocabulary,
    grown_vocabulary,
    write_safetensors,
)
from conversion.convert_deeplatent import convert_deeplatent as convert
from modeling_latentvlm import DeepLatentForConditionalGeneration
from processing_latentvlm.processing_deeplatent import LATENT_TOKENS


VOCABULARY = {"model.embed_tokens.weight", "lm_head.weight"}
BLOCKS = "latent_blocks."
NEW_WEIGHTS = {
    "latent_control.weight",
    *(f"{BLOCKS}scale_head.{side}.{kind}" for side in ("height", "width") for kind in ("weight", "bias")),
    f"{BLOCKS}queries.weight",
    f"{BLOCKS}image_index.weight",
    *(
        f"{BLOCKS}{base}_modulation.{part}_proj.{kind}"
        for base in ("query", "image")
        for part in ("up", "down")
        for kind in ("weight", "bias")
    ),
    *(f"{BLOCKS}layers.0.{norm}_norm.weight" for norm in ("self", "cross", "image")),
    *(f"{BLOCKS}layers.0.{kind}_attention.{part}_proj.weight" for kind in ("self", "cross") for part in "qkvo"),
}
ROOT = Path(convert_deeplatent.__file__).resolve().parent.parent


def write_backbone(
    folder: Path,
    spare_rows: int = 8,
    tied: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **save_arguments,
) -> Path:
    """Save a tiny stock checkpoint the way transformers does, in several shards."""
    tokenizer = tokenizer or build_tokenizer()
    fields = backbone_fields(tokenizer, spare_rows) | {"tie_word_embeddings": tied}
    fields["text_config"]["tie_word_embeddings"] = tied
    torch.manual_seed(7)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**fields)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    end, pad = fields["text_config"]["eos_token_id"], fields["text_config"]["pad_token_id"]
    model.generation_config = GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad, repetition_penalty=1.05)
    model.save_pretrained(folder, **({"max_shard_size": "60KB"} | save_arguments))
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 16).save_pretrained(folder)
    return folder


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def edit_json(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def drop_weight(folder: Path, name: str) -> Path:
    """Take a weight out of the shard that holds it."""
    for file in folder.glob("*.safetensors"):
        weights = load_file(file)
        if weights.pop(name, None) is not None:
            save_file(weights, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    """Never written to by a test."""
    return write_backbone(tmp_path_factory.mktemp("stock") / "tiny-vl")


@pytest.fixture(scope="module")
def converted(backbone, tmp_path_factory) -> Path:
    return convert(backbone, tmp_path_factory.mktemp("converted") / "deeplatent")


# The backbone's weights


@pytest.mark.core
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("original_names", [True, False])
def test_every_backbone_weight_is_copied_bit_for_bit(tmp_path, tied, original_names):
    """Under the name it had, whichever of the two kinds of names the checkpoint has."""
    folder = write_backbone(tmp_path / "in", tied=tied, save_original_format=original_names)
    output = convert(folder, tmp_path / "out")
    before, after = read_weights(folder), read_weights(output)
    assert ("visual.patch_embed.proj.weight" in before) == original_names
    assert ("lm_head.weight" in before) != tied
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert set(after) - set(before) == NEW_WEIGHTS
    added = json.loads((output / "config.json").read_text())["latent_start_token_id"]
    for name, weight in before.items():
        same = (bits(weight) == bits(after[name])).all(dim=-1)
        if name.endswith("embed_tokens.weight") or name == "lm_head.weight":
            same[added : added + 3] = True
        assert same.all(), name
        assert after[name].dtype == weight.dtype
    loaded, info = DeepLatentForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert not any(info.values()), info
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied


@pytest.mark.core
def test_loaded_model_has_the_written_weights(converted):
    """Guards the renaming on load and transformers' habit of initialising again what it takes for missing."""
    model = DeepLatentForConditionalGeneration.from_pretrained(converted)
    state = model.state_dict()
    written = {convert_deeplatent.rename_weight(name): weight for name, weight in read_weights(converted).items()}
    assert state.keys() == written.keys()
    assert all(torch.equal(state[name], weight) for name, weight in written.items())


@pytest.mark.core
def test_without_blocks_the_logits_are_the_backbones(backbone, converted):
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(backbone, dtype=torch.float32).eval()
    model = DeepLatentForConditionalGeneration.from_pretrained(converted, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(converted)
    inputs = encode(processor, [user_turn("what colour?", picture())])
    with torch.no_grad():
        expected, actual = stock(**inputs).logits, model(**inputs).logits
    num_tokens = model.config.latent_start_token_id
    torch.testing.assert_close(actual[..., :num_tokens], expected[..., :num_tokens], rtol=0, atol=0)


def test_conversion_keeps_every_dtype_unless_told(tmp_path):
    folder = write_backbone(tmp_path / "in")
    name = "visual.merger.mlp.0.weight"
    for file in folder.glob("*.safetensors"):
        weights = load_file(file)
        if name in weights:
            weights[name] = weights[name].float() + 1e-6  # not a bfloat16
            save_file(weights, file, {"format": "pt"})
    kept, cast = convert(folder, tmp_path / "kept"), convert(folder, tmp_path / "cast", dtype="float16")
    before = read_weights(folder)
    assert torch.equal(read_weights(kept)[name], before[name])
    assert read_weights(kept)["model.norm.weight"].dtype == torch.bfloat16
    assert {read_weights(cast)[name].dtype for name in before} == {torch.float16}
    assert torch.equal(read_weights(cast)[name], before[name].half())
    for output, dtype in ((kept, torch.bfloat16), (cast, torch.float16)):
        model = DeepLatentForConditionalGeneration.from_pretrained(output, dtype="auto")
        assert model.dtype == model.get_input_embeddings().weight.dtype == dtype
        assert model.latent_control.weight.dtype == read_weights(output)["latent_control.weight"].dtype


def test_writer_takes_every_dtype_and_shape(tmp_path):
    """Read back by safetensors itself; every tensor starts at a multiple of its element size."""
    tensors = {
        "a.flags": torch.tensor([True, False, True]),
        "b.odd": torch.randn(3, 1).bfloat16(),
        "c.scalar": torch.tensor(2.5, dtype=torch.float64),
        "d.none": torch.empty(0, 4, dtype=torch.float16),
        "e.turned": torch.arange(6, dtype=torch.int32).view(2, 3).T,
        "f.wide": torch.randn(5),
    }
    layout = Layout({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    path = tmp_path / "x.safetensors"
    with tqdm(disable=True) as progress:
        write_safetensors(path, layout, tensors.__getitem__, progress)
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    assert all(entry["data_offsets"][0] % tensors[name].itemsize == 0 for name, entry in header.items())


def test_index_and_permissions(converted):
    """`save_file` would write files that only their owner can read."""
    for file in converted.glob("*.safetensors"):
        assert file.stat().st_mode & 0o777 == (converted / "config.json").stat().st_mode & 0o777
    index = json.loads((converted / checkpoint_io.INDEX_FILE).read_text())
    assert set(index["weight_map"]) == set(read_weights(converted))
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in read_weights(converted).values())


# Tokens and their rows


def test_tokens_move_into_spare_rows(backbone, converted):
    """Untrained spare rows are neither in the mean nor kept by a token that moves in; the others stay."""
    count = len(build_tokenizer())
    config = DeepLatentConfig.from_pretrained(converted)
    assert config.text_config.vocab_size == count + 8
    ids = [config.latent_start_token_id, config.latent_pad_token_id, config.latent_end_token_id]
    assert ids == [count, count + 1, count + 2]
    before, after = read_weights(backbone), read_weights(converted)
    for name in VOCABULARY:
        mean = before[name][:count].double().mean(dim=0)
        torch.testing.assert_close(after[name][ids].double(), mean.expand(3, -1), rtol=2**-8, atol=1e-6)
        assert torch.equal(bits(after[name][count + 3 :]), bits(before[name][count + 3 :]))


@pytest.mark.parametrize("spare_rows", [0, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_vocabulary_grows_where_there_is_no_room(tmp_path, spare_rows, tied):
    folder = write_backbone(tmp_path / "in", spare_rows=spare_rows, tied=tied)
    output = convert(folder, tmp_path / "out")
    count = len(build_tokenizer())
    before, after = read_weights(folder), read_weights(output)
    model, info = DeepLatentForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.text_config.vocab_size == 320 > count + spare_rows
    assert model.config.latent_end_token_id == count + 2
    for name in VOCABULARY & before.keys():
        assert len(after[name]) == 320
        assert torch.equal(bits(after[name][:count]), bits(before[name][:count]))
        mean = before[name][:count].double().mean(dim=0)
        torch.testing.assert_close(after[name][count:].double(), mean.expand(320 - count, -1), rtol=2**-8, atol=1e-6)


def test_known_latent_tokens_keep_ids_and_rows(tmp_path):
    tokenizer = build_tokenizer(LATENT_TOKENS)
    folder = write_backbone(tmp_path / "in", tokenizer=tokenizer)
    output = convert(folder, tmp_path / "out")
    before, after = read_weights(folder), read_weights(output)
    assert all(torch.equal(bits(weight), bits(after[name])) for name, weight in before.items())
    config = DeepLatentConfig.from_pretrained(output)
    ids = [config.latent_start_token_id, config.latent_pad_token_id, config.latent_end_token_id]
    assert ids == tokenizer.convert_tokens_to_ids(list(LATENT_TOKENS))


def test_mean_row_is_accumulated_in_float32_and_over_known_tokens_only():
    """A sum in bfloat16 would stop growing at 256 of these rows; the spare row would pull the mean far away."""
    rows = torch.ones(10_001, 4, dtype=torch.bfloat16)
    rows[-1] = 1000.0
    extended = extend_vocabulary(rows, 10_048, known_ids=range(10_000), added_ids=[10_000])
    assert torch.equal(extended[10_000:], torch.ones(48, 4, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "num_rows, ids, expected",
    [(152064, [151665, 151667], 152064), (10, [9], 10), (10, [10], 64), (64, [64], 128), (63, [62, 63], 64)],
)
def test_grown_vocabulary(num_rows, ids, expected):
    assert grown_vocabulary(num_rows, ids) == expected


def test_saved_tokenizer_has_the_tokens_and_forgets_none(converted):
    processor = AutoProcessor.from_pretrained(converted)
    tokenizer, stock = processor.tokenizer, build_tokenizer()
    config = DeepLatentConfig.from_pretrained(converted)
    text = f"red{''.join(LATENT_TOKENS)}blue<|im_end|>"
    assert tokenizer(text).input_ids == [
        *stock("red").input_ids,
        config.latent_start_token_id,
        config.latent_pad_token_id,
        config.latent_end_token_id,
        *stock("blue<|im_end|>").input_ids,
    ]
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == "redblue"
    assert set(stock.all_special_tokens) | set(LATENT_TOKENS) == set(tokenizer.all_special_tokens)
    assert all(not tokenizer.added_tokens_decoder[config.latent_start_token_id + i].normalized for i in range(3))


def test_token_ids_with_gaps_are_refused():
    """Such a tokenizer hands out ids that are taken, and two tokens would share a row."""
    words = Tokenizer(models.WordLevel({"a": 0, "c": 2, "b": 5}))
    with pytest.raises(ValueError, match=r"must be 0\.\.2.*also those of \{'b': 5\}"):
        add_tokens(PreTrainedTokenizerFast(tokenizer_object=words), LATENT_TOKENS)


# New weights


def test_new_weights_follow_the_seed_alone(backbone, converted, tmp_path):
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    again = read_weights(convert(backbone, tmp_path / "again"))
    assert torch.equal(torch.random.get_rng_state(), state)
    other = read_weights(convert(backbone, tmp_path / "other", seed=1))
    first = read_weights(converted)
    assert all(torch.equal(bits(weight), bits(again[name])) for name, weight in first.items())
    differing = {name for name in first if not torch.equal(first[name], other[name])}
    constant = {name for name in NEW_WEIGHTS if "norm" in name or "bias" in name or "down_proj" in name}
    assert differing == NEW_WEIGHTS - constant - {f"{BLOCKS}image_index.weight"}


def test_new_weights_start_as_the_model_starts_them(converted):
    """The identity modulation, and queries as large as image features."""
    weights, config = read_weights(converted), DeepLatentConfig.from_pretrained(converted)
    bias = weights[f"{BLOCKS}query_modulation.down_proj.bias"].float()
    assert not weights[f"{BLOCKS}query_modulation.down_proj.weight"].any()
    assert bias.view(3, -1).unique(dim=1).flatten().tolist() == [0.0, 0.0, config.log_sigma_init]
    assert weights[f"{BLOCKS}layers.0.self_norm.weight"].eq(1).all()
    queries = weights[f"{BLOCKS}queries.weight"].float()
    assert queries.square().mean().sqrt().item() == pytest.approx(config.latent_query_rms, rel=0.05)
    assert weights["latent_control.weight"].float().std().item() == pytest.approx(0.02, rel=0.25)


def test_query_size_is_that_of_the_backbones_image_features(backbone, converted):
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(backbone, dtype=torch.float32).eval()
    inputs = load_image_processor(backbone)(images=[reference_picture()], return_tensors="pt")
    with torch.no_grad():
        features = torch.cat(tuple(stock.get_image_features(**inputs).pooler_output))
    expected = features.square().mean().sqrt().item()
    assert DeepLatentConfig.from_pretrained(converted).latent_query_rms == pytest.approx(expected, rel=1e-5)


def test_given_query_size_is_not_measured(backbone, tmp_path, monkeypatch):
    monkeypatch.delattr(convert_deeplatent, "measure_image_features")
    output = convert(backbone, tmp_path / "out", overrides={"latent_query_rms": 3})
    assert DeepLatentConfig.from_pretrained(output).latent_query_rms == 3.0
    assert read_weights(output)[f"{BLOCKS}queries.weight"].float().std().item() == pytest.approx(3, rel=0.05)


def test_reference_picture_is_drawn_where_the_photo_is_missing(monkeypatch, tmp_path):
    photo = reference_picture()
    monkeypatch.setattr(backbone_module, "REFERENCE_PHOTO", tmp_path / "none.jpg")
    drawn = reference_picture()
    assert drawn.mode == photo.mode == "RGB" and drawn.size == photo.size
    assert drawn.tobytes() == reference_picture().tobytes() != photo.tobytes()


def test_features_without_a_size_are_refused(tmp_path):
    folder = write_backbone(tmp_path / "in", max_shard_size="1GB")
    weights = load_file(folder / "model.safetensors")
    for kind in ("weight", "bias"):
        weights[f"visual.merger.mlp.2.{kind}"].zero_()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"image features .* above 0, got 0\.0"):
        convert(folder, tmp_path / "out")


# Config, generation config, processor, card


def test_config_carries_the_backbones_fields(backbone, converted):
    stock, config = (json.loads((folder / "config.json").read_text()) for folder in (backbone, converted))
    assert config["model_type"] == "deeplatent"
    assert config["architectures"] == ["DeepLatentForConditionalGeneration"]
    assert config["dtype"] == "bfloat16"
    for name in stock.keys() - {"model_type", "architectures"}:
        assert config[name] == stock[name], name


def test_flat_config_of_the_first_releases(tmp_path):
    """Qwen's own repositories: text fields at the top, `rope_scaling`, `chat_template.json`, `min_pixels`."""
    folder = write_backbone(tmp_path / "in", tied=True)
    fields = json.loads((folder / "config.json").read_text())
    text = fields.pop("text_config")
    rope = text.pop("rope_parameters")
    for name in ("model_type", "layer_types"):
        text.pop(name)
    fields["vision_config"] |= {"in_chans": 3, "spatial_patch_size": 14, "hidden_act": "silu"}
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat = text | fields | {"rope_theta": 123.0, "rope_scaling": scaling, "torch_dtype": fields.pop("dtype")}
    (folder / "config.json").write_text(json.dumps(flat))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'legacy' }}"}))
    (folder / "chat_template.jinja").unlink()
    sizes = {"min_pixels": 784, "max_pixels": 12544, "image_processor_type": "Qwen2VLImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes | {"processor_class": "Qwen2_5_VLProcessor"}))

    output = convert(folder, tmp_path / "out")
    model, info = DeepLatentForConditionalGeneration.from_pretrained(output, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    text_config = model.config.text_config
    assert (text_config.hidden_size, text_config.num_hidden_layers) == (64, 3)
    assert text_config.rope_parameters["rope_theta"] == 123.0
    assert text_config.rope_parameters["mrope_section"] == rope["mrope_section"]
    assert text_config.eos_token_id == text["eos_token_id"]
    assert model.config.tie_word_embeddings and model.dtype == torch.bfloat16
    processor = AutoProcessor.from_pretrained(output)
    assert processor.chat_template == "{{ 'legacy' }}"
    assert processor.image_processor.size["longest_edge"] == 12544


def test_generation_config_keeps_every_stop_token_and_is_explicit(backbone, converted, tmp_path):
    """transformers derives one marked `_from_model_config` anew from the model config, which has one stop token."""
    end, pad = build_tokenizer().convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    written = json.loads((converted / "generation_config.json").read_text())
    assert written["eos_token_id"] == [end, pad]
    assert written["repetition_penalty"] == 1.05
    model = DeepLatentForConditionalGeneration.from_pretrained(converted)
    assert model.generation_config.eos_token_id == [end, pad]

    derived = write_backbone(tmp_path / "derived")
    edit_json(derived / "generation_config.json", _from_model_config=True, num_beam_steps=3)
    model = DeepLatentForConditionalGeneration.from_pretrained(convert(derived, tmp_path / "out"))
    assert model.generation_config.eos_token_id == [end, pad]
    assert model.generation_config.num_beam_steps == 3


def test_generation_config_is_made_where_the_backbone_has_none(tmp_path):
    folder = write_backbone(tmp_path / "in")
    (folder / "generation_config.json").unlink()
    output = convert(folder, tmp_path / "out")
    end, pad = build_tokenizer().convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    written = json.loads((output / "generation_config.json").read_text())
    assert written == {"eos_token_id": end, "pad_token_id": pad}


def test_processor_is_ours_with_the_backbones_parts(backbone, converted, tmp_path):
    written = json.loads((converted / "processor_config.json").read_text())
    assert written["processor_class"] == "DeepLatentProcessor"
    processor = AutoProcessor.from_pretrained(converted)
    assert processor.chat_template == CHAT_TEMPLATE
    assert processor.num_control_tokens == 3
    stock = Qwen2VLImageProcessorPil.from_pretrained(backbone)
    assert processor.image_processor.size == stock.size
    autoregressive = convert(backbone, tmp_path / "out", overrides={"latent_mode": "autoregressive"})
    assert AutoProcessor.from_pretrained(autoregressive).num_control_tokens == 0
    for name in ("tokenizer_config.json", "processor_config.json"):
        assert "local_files_only" not in (converted / name).read_text()


@pytest.mark.parametrize(
    "front_matter, expected",
    [
        ("license: apache-2.0\n", "apache-2.0"),
        ("license_name: qwen-research\n", "other"),
        ("license: [mit, apache-2.0]\n", "mit, apache-2.0"),
        ("language: en\n", None),
        (None, None),
    ],
)
def test_license_comes_from_the_front_matter(tmp_path, front_matter, expected):
    text = "license: not this one\n" if front_matter is None else f"---\n{front_matter}---\n\n# A model\n"
    (tmp_path / "README.md").write_text(text)
    assert find_license(tmp_path) == expected


def test_card_names_backbone_and_license(tmp_path):
    folder = write_backbone(tmp_path / "tiny-vl")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The backbone's own card\n")
    (folder / "LICENSE").write_text("the text of the licence")
    output = convert(folder, tmp_path / "out")
    config = DeepLatentConfig.from_pretrained(output)
    assert (config.base_model, config.base_model_license) == ("tiny-vl", "apache-2.0")
    card = (output / "README.md").read_text()
    assert "license: apache-2.0\n" in card and "local backbone (`tiny-vl`)" in card and "own card" not in card
    assert (output / "LICENSE").read_text() == "the text of the licence"
    given = convert(folder, tmp_path / "given", license="mit")
    assert DeepLatentConfig.from_pretrained(given).base_model_license == "mit"


def test_hub_ids(backbone, tmp_path, monkeypatch):
    """Nothing but configs, safetensors and tokenizer files is downloaded; a snapshot folder gives its id back."""
    asked = {}

    def download(repo_id, **arguments):
        asked.update(arguments, repo_id=repo_id)
        return str(backbone)

    monkeypatch.setattr(backbone_module, "snapshot_download", download)
    output = convert("Some/Tiny-VL", tmp_path / "out")
    assert asked["repo_id"] == "Some/Tiny-VL"
    assert {"*.json", "*.safetensors"} <= set(asked["allow_patterns"])
    assert not {"*", "*.bin", "*.pth", "*.py"} & set(asked["allow_patterns"])
    assert DeepLatentConfig.from_pretrained(output).base_model == "Some/Tiny-VL"
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen2.5-VL-3B-Instruct" / "snapshots" / "66285546"
    snapshot.mkdir(parents=True)
    assert backbone_module.name_backbone(snapshot) == "Qwen/Qwen2.5-VL-3B-Instruct"


@pytest.mark.parametrize(
    "name, message",
    [
        ("no-such/repository", "folder or the id of a Hub repository, got no-such/repository"),
        ("./no/such/folder", "There is no folder no/such/folder"),  # a path is not looked for on the Hub
    ],
)
def test_unknown_backbone_is_refused(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        convert(name, tmp_path / "out")


# Refusals


def test_missing_weight_is_named(tmp_path):
    folder = drop_weight(write_backbone(tmp_path / "in"), "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ValueError, match=r"1 missing: model\.language_model\.layers\.1\.mlp\.up_proj\.weight"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_head_of_an_untied_backbone_is_named(tmp_path):
    folder = drop_weight(write_backbone(tmp_path / "in"), "lm_head.weight")
    with pytest.raises(ValueError, match=r"1 missing: lm_head\.weight"):
        convert(folder, tmp_path / "out")


def test_unexpected_and_misshapen_weights_are_named(tmp_path):
    folder = write_backbone(tmp_path / "in", max_shard_size="1GB")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.9.input_layernorm.weight"] = torch.ones(64, dtype=torch.bfloat16)
    weights["model.norm.weight"] = torch.ones(65, dtype=torch.bfloat16)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError) as error:
        convert(folder, tmp_path / "out")
    assert "1 unexpected: model.layers.9.input_layernorm.weight" in str(error.value)
    assert "model.language_model.norm.weight [65] instead of [64]" in str(error.value)


def test_embedding_that_does_not_fit_the_config_is_named(tmp_path):
    folder = write_backbone(tmp_path / "in")
    text_config = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config=text_config | {"vocab_size": 400})
    with pytest.raises(ValueError, match=r"embed_tokens\.weight \[315, 64\] instead of \[400, 64\]"):
        convert(folder, tmp_path / "out")


def test_only_safetensors_are_read(tmp_path):
    folder = write_backbone(tmp_path / "in", max_shard_size="1GB")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"got only pytorch_model\.bin: save them as safetensors"):
        convert(folder, tmp_path / "out")
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="got neither"):
        convert(folder, tmp_path / "out")


def test_incomplete_downloads_are_named(tmp_path):
    folder = write_backbone(tmp_path / "in")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{second.name} must be a complete safetensors file"):
        SourceWeights(folder)
    first.unlink()
    with pytest.raises(ValueError, match=rf"\['{first.name}'\] are missing"):
        SourceWeights(folder)


def test_weights_of_fewer_bits_are_refused(tmp_path):
    save_file({"w": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="got F8_E4M3 for w in"):
        SourceWeights(tmp_path)


def test_other_backbones_are_refused(backbone, converted, tmp_path):
    with pytest.raises(ValueError, match="`model_type` must be 'qwen2_5_vl', got 'deeplatent'"):
        convert(converted, tmp_path / "out")
    folder = write_backbone(tmp_path / "in")
    edit_json(folder / "config.json", quantization_config={"quant_method": "awq"})
    with pytest.raises(ValueError, match="not be quantised, got `quant_method` 'awq'"):
        convert(folder, tmp_path / "out")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="must hold a config.json"):
        convert(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="`dtype` must be one of"):
        convert(backbone, tmp_path / "out", dtype="int8")


@pytest.mark.parametrize("name", ["preprocessor_config.json", "tokenizer.json"])
def test_backbone_without_preprocessing_is_refused(tmp_path, name):
    folder = write_backbone(tmp_path / "in")
    (folder / name).unlink()
    with pytest.raises(ValueError, match="tokenizer"):
        convert(folder, tmp_path / "out")


def test_image_token_that_the_tokenizer_does_not_know_is_refused(tmp_path):
    folder = write_backbone(tmp_path / "in")
    edit_json(folder / "config.json", image_token_id=5)
    with pytest.raises(ValueError, match=r"`image_token_id` is 5, .* gives '<\|image_pad\|>' the id 305"):
        convert(folder, tmp_path / "out")


# The output folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_output_that_holds_something_is_refused_without_force(backbone, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("precious")
    with pytest.raises(ValueError, match="`output` must be a new or empty folder"):
        convert(backbone, output)
    assert snapshot(tmp_path) == {"out/config.json": b"precious"}
    convert(backbone, output, force=True)
    assert not list(tmp_path.glob("out.*"))
    assert json.loads((output / "config.json").read_text())["model_type"] == "deeplatent"


def test_force_replaces_nothing_but_checkpoints(backbone, tmp_path):
    (tmp_path / "thesis.tex").write_text("three years of work")
    with pytest.raises(ValueError, match="replaces only a checkpoint folder"):
        convert(backbone, tmp_path, force=True)
    with pytest.raises(ValueError, match="must be a folder, got the file"):
        convert(backbone, tmp_path / "thesis.tex", force=True)
    for output in (backbone, backbone.parent):
        with pytest.raises(ValueError, match="must not be or contain the backbone"):
            convert(backbone, output, force=True)
    assert snapshot(tmp_path) == {"thesis.tex": b"three years of work"}


def test_empty_output_folder_is_used(backbone, tmp_path):
    (tmp_path / "out").mkdir()
    assert (convert(backbone, tmp_path / "out") / "config.json").is_file()
    assert convert(backbone, tmp_path / "deep" / "er").is_dir()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("where", ["weights", "processor", "rename"])
@pytest.mark.parametrize("force", [False, True])
def test_interruption_leaves_everything_as_it_was(backbone, tmp_path, monkeypatch, error, where, force):
    output = tmp_path / "out"
    if force:
        output.mkdir()
        (output / "config.json").write_text("the old checkpoint")
    before = snapshot(tmp_path)
    seen = []

    def interrupt_second(function):
        def interrupted(*args, **kwargs):
            seen.append([path.name for path in tmp_path.iterdir()])
            if len(seen) == 2:
                raise error("interrupted")
            return function(*args, **kwargs)

        return interrupted

    if where == "weights":
        monkeypatch.setattr(checkpoint_io, "write_safetensors", interrupt_second(checkpoint_io.write_safetensors))
    elif where == "processor":
        seen.append([])
        monkeypatch.setattr(qwen_backbone, "copy_legal_files", interrupt_second(None))
    else:
        rename = Path.rename

        def fail_to_publish(path, target):
            if ".partial-" in path.name:
                seen.append([path.name])
                raise error("interrupted")
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", fail_to_publish)
    with pytest.raises(error, match="interrupted"):
        convert(backbone, output, force=force)
    assert any(".partial-" in name for name in seen[-1])
    assert snapshot(tmp_path) == before
    assert output.exists() == force and len(list(tmp_path.iterdir())) == int(force)


# `--set` and the command


def test_overrides_are_json_or_strings():
    assignments = ["a=1", "b=2.5", "c=[4, 6]", "d=true", "e=null", "f=fixed", 'g="3"', "h=NaN", "i=x=y"]
    assert parse_overrides(assignments) == {
        "a": 1,
        "b": 2.5,
        "c": [4, 6],
        "d": True,
        "e": None,
        "f": "fixed",
        "g": "3",
        "h": "NaN",
        "i": "x=y",
    }
    with pytest.raises(ValueError, match="takes field=value, got 'latent_mode'"):
        parse_overrides(["latent_mode"])
    with pytest.raises(ValueError, match="gives `a` twice"):
        parse_overrides(["a=1", "a=2"])


@pytest.mark.parametrize("field", ["nope", "vision_config", "image_token_id", "latent_pad_token_id", "model_type"])
def test_only_fields_of_the_architecture_can_be_set(backbone, tmp_path, field):
    with pytest.raises(ValueError, match=rf"latent_grid_size.*, got {field}\."):
        convert(backbone, tmp_path / "out", overrides={field: 1})


def test_set_fields_arrive(backbone, tmp_path):
    fields = {"latent_grid_size": 3, "latentformer_layers": 0, "fixed_latent_grid": [2, 3], "log_sigma_init": -2}
    output = convert(backbone, tmp_path / "out", overrides=fields)
    model, info = DeepLatentForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert not any(info.values()), info
    assert {name: getattr(model.config, name) for name in fields} == fields
    assert model.latent_blocks.queries.weight.shape == (3, 3, 64)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("latent_grid_size", 0, "must be >= 1, got 0"),
        ("latent_grid_size", "big", "expected int, got str"),
        ("latent_query_rms", "NaN", "expected float, got str"),
        ("latentformer_heads", 3, r"`latentformer_heads` \(3\) must divide"),
    ],
)
def test_the_config_judges_values(backbone, tmp_path, field, value, message):
    with pytest.raises(StrictDataclassError, match=message):
        convert(backbone, tmp_path / "out", overrides={field: value})
    assert not (tmp_path / "out").exists()


def test_whole_numbers_are_floats_where_a_field_is_one():
    fields = {"latent_query_rms": 2, "latent_grid_size": 2, "modulate_queries": True}
    checked = check_overrides(fields, DeepLatentConfig, Qwen2_5_VLConfig, ())
    assert {name: type(value) for name, value in checked.items()} == {
        "latent_query_rms": float,
        "latent_grid_size": int,
        "modulate_queries": bool,
    }


def run_command(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["convert_deeplatent", *map(str, arguments)])
    try:
        convert_deeplatent.main()
    except SystemExit as error:
        return error.code
    return 0


def test_command_reports_what_is_new(backbone, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    fields = ("latent_grid_size=5", "max_latent_blocks=2")
    assert run_command(monkeypatch, "--backbone", backbone, "--output", output, "--set", *fields, "--seed", 3) == 0
    out, err = capsys.readouterr()
    assert out == f"{output}\n"
    weights = read_weights(output)
    listed = {line.split()[0] for line in err.splitlines() if line.startswith("  ")}
    assert listed == NEW_WEIGHTS
    assert f"{sum(weights[name].nbytes for name in NEW_WEIGHTS) / 2**20:.1f} MiB" in err
    assert DeepLatentConfig.from_pretrained(output).max_latent_blocks == 2


@pytest.mark.parametrize("assignment", ["nope=1", "latent_grid_size=0", "latent_grid_size"])
def test_command_ends_with_one_line_and_status_2(backbone, tmp_path, monkeypatch, capsys, assignment):
    status = run_command(monkeypatch, "--backbone", backbone, "--output", tmp_path / "out", "--set", assignment)
    out, err = capsys.readouterr()
    assert status == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# Elsewhere


CLEAN_LOAD = """
import json, sys
from transformers import AutoModel, AutoProcessor
model, info = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = processor.apply_chat_template(
    [{"role": "user", "content": [{"type": "text", "text": "what"}]}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
tokens = model.generate(**inputs, max_new_tokens=2, do_sample=False)
print(json.dumps({
    "class": type(model).__name__,
    "processor": type(processor).__name__,
    "info": {name: sorted(map(str, keys)) for name, keys in info.items()},
    "ours": [name for name in sys.modules if name.startswith(("modeling_latentvlm", "conversion"))],
    "length": tokens.shape[1] - inputs["input_ids"].shape[1],
}))
"""


@pytest.mark.core
def test_output_loads_where_the_library_is_not_installed(converted, tmp_path):
    """In a clean process, offline, with the code that lies beside the weights."""
    # -I leaves out the current folder and PYTHONPATH; an editable install would still be found.
    blocked = "import sys; sys.meta_path.insert(0, type('Blocked', (), {'find_spec': staticmethod(lambda name, *_: (_ for _ in ()).throw(ModuleNotFoundError(name)) if name.split('.')[0] in ('configuration_latentvlm', 'modeling_latentvlm', 'processing_latentvlm') else None)})())\n"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin", "OMP_NUM_THREADS": "1"}
    result = run_strictly("-I", "-c", blocked + CLEAN_LOAD, str(converted), cwd="/", env=environment)
    loaded = json.loads(result.stdout.splitlines()[-1])
    assert (loaded["class"], loaded["processor"]) == ("DeepLatentForConditionalGeneration", "DeepLatentProcessor")
    assert not any(loaded["info"].values()), loaded["info"]
    assert not loaded["ours"] and loaded["length"] > 0


PEAK_MEMORY = """
import json, sys
from pathlib import Path
from conversion.convert_deeplatent import convert_deeplatent

def read_status(field):  # MiB
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

small, large, output, arguments = sys.argv[1:]
convert_deeplatent(small, output + "-small")
before = read_status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
convert_deeplatent(large, output + "-large", **json.loads(arguments))
print(read_status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("arguments", [{"known_answers": False}, {"known_answers": False, "dtype": "float32"}])
def test_memory_stays_near_the_largest_shard(backbone, tmp_path, arguments):
    """A checkpoint of 200 MB in shards of 50 MB; measured over what a tiny conversion has used already."""
    fields = backbone_fields(build_tokenizer()) | {"tie_word_embeddings": True}
    fields["text_config"] |= {"intermediate_size": 2**16, "num_hidden_layers": 8}
    large = tmp_path / "large"
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**fields))
    shapes = {name: weight.shape for name, weight in model.to(torch.bfloat16).state_dict().items()}
    state = {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}
    model.save_pretrained(large, state_dict=state, max_shard_size="50MB")
    for file in backbone.iterdir():
        if not (large / file.name).exists() and file.suffix != ".safetensors":
            (large / file.name).write_bytes(file.read_bytes())
    sizes = [file.stat().st_size / 2**20 for file in large.glob("*.safetensors")]
    assert sum(sizes) > 190 and max(sizes) < 55

    result = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY, str(backbone), str(large), str(tmp_path / "out"), json.dumps(arguments)],
        cwd=ROOT,
        # What glibc does anyway with the tensors of a real checkpoint: give every freed one back to the system.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    written = [file.stat().st_size / 2**20 for file in Path(f"{tmp_path}/out-large").glob("*.safetensors")]
    assert float(result.stdout.splitlines()[-1]) < 1.5 * max(written)


def test_the_tokenizer_pads_where_generation_needs_it(converted):
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(converted).padding_side == "left"
