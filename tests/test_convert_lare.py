"""Conversion of a vision tower and a language model to a fresh LaRe model."""

import json
import shutil
import sys

import pytest
import torch
from conftest import build_tokenizer, encode, picture, user_turn
from helpers import GREEDY, assert_near, step_logits
from safetensors.torch import load_file, save_file
from test_lare import lare_fields
from test_processing_lare import QWEN_TEMPLATE
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from conversion import convert_lare as command
from conversion.convert_lare import VICUNA_TEMPLATE, convert_lare
from modeling_latentvlm import LaReForCausalLM
from processing_latentvlm.processing_lare import BOT, EOT, IMAGE


pytestmark = pytest.mark.core

SMALL = {"window_size": 2, "num_refocus_steps": 2, "extractor_hidden_size": 24, "extractor_num_heads": 2}
ATTENTION = {f"{kind}_attention.{part}_proj.weight" for kind in ("self", "cross") for part in "qkvo"}
EXTRACTOR = {
    *(
        f"{name}.{kind}"
        for name in ("state_proj", "visual_proj", "glu_proj", "ffn_up", "ffn_down", "out_proj")
        for kind in ("weight", "bias")
    ),
    *(f"{name}.weight" for name in ("state_norm", "visual_norm", "glu_norm", "ffn_norm", "layer_embedding")),
    *(
        f"layers.{layer}.{name}"
        for layer in (0, 1)
        for name in {"input_norm.weight", "cross_norm.weight", "linear.weight", "linear.bias"} | ATTENTION
    ),
}
PROJECTOR = {f"model.multi_modal_projector.linear_{layer}.{kind}" for layer in (1, 2) for kind in ("weight", "bias")}


def save_tower(folder, kind: str):
    """A CLIP model with or without its text tower, or a SigLIP tower."""
    vision = lare_fields("qwen2", "siglip_vision_model" if kind == "siglip" else "clip_vision_model")["vision_config"]
    config = AutoConfig.for_model(**vision)
    if kind == "whole":
        text = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "vocab_size": 20,
        }
        model = CLIPModel(CLIPConfig(vision_config=config.to_dict(), text_config=text))
    else:
        model = (SiglipVisionModel if kind == "siglip" else CLIPVisionModel)(config)
    model.save_pretrained(folder, max_shard_size="40KB")
    processor = SiglipImageProcessorPil if kind == "siglip" else CLIPImageProcessorPil
    processor(size={"shortest_edge": 56} if kind != "siglip" else {"height": 56, "width": 56}).save_pretrained(folder)
    return folder


def save_language_model(folder, decoder: str, tied: bool = False, template: str | None = QWEN_TEMPLATE):
    tokenizer = build_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    fields = lare_fields(decoder)["text_config"] | {
        "vocab_size": len(tokenizer) + 1,
        "tie_word_embeddings": tied,
        "eos_token_id": end,
        "pad_token_id": None,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    model.generation_config = GenerationConfig(eos_token_id=[end, tokenizer.pad_token_id])
    model.save_pretrained(folder, max_shard_size="60KB")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text("as you like")
    return folder, model.eval()


@pytest.fixture(scope="module", params=["whole", "alone"])
def tower(request, tmp_path_factory):
    torch.manual_seed(2)
    return save_tower(tmp_path_factory.mktemp("clip") / request.param, request.param)


@pytest.fixture(scope="module", params=[("qwen2", True), ("llama", False)], ids=["qwen2-tied", "llama"])
def language(request, tmp_path_factory):
    torch.manual_seed(3)
    return save_language_model(tmp_path_factory.mktemp("language") / request.param[0], *request.param)


@pytest.fixture(scope="module")
def converted(tower, language, tmp_path_factory):
    return convert_lare(tower, language[0], tmp_path_factory.mktemp("converted") / "lare", overrides=dict(SMALL))


def weights_of(folder) -> dict:
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def test_both_parts_bit_for_bit_and_exactly_the_rest_new(tower, language, converted):
    after, rows = weights_of(converted), len(build_tokenizer())
    seen = set()
    for name, weight in weights_of(language[0]).items():
        renamed = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
        kept = slice(rows) if "embed_tokens" in name or name == "lm_head.weight" else slice(None)
        assert torch.equal(after[renamed][kept], weight[kept])
        seen.add(renamed)
    for name, weight in weights_of(tower).items():
        if (
            name.startswith("vision_model.")
            or "text" not in name
            and "projection" not in name
            and name != "logit_scale"
        ):
            renamed = "model.vision_tower." + name.removeprefix("vision_model.")
            assert torch.equal(after[renamed], weight)
            seen.add(renamed)
    assert after.keys() - seen == {f"refocus.{name}" for name in EXTRACTOR} | PROJECTOR


def test_it_loads_and_answers_as_remote_code(converted, language):
    model, info = LaReForCausalLM.from_pretrained(converted, output_loading_info=True)
    assert not any(info.values())
    processor = AutoProcessor.from_pretrained(converted, trust_remote_code=True)
    token = processor.tokenizer.convert_tokens_to_ids
    config = model.config
    assert [config.bot_token_id, config.eot_token_id, config.image_token_id] == token([BOT, EOT, IMAGE])
    assert config.text_config.vocab_size % 64 == 0 and config.num_refocus_steps == 2
    rows = model.get_input_embeddings().weight[: len(build_tokenizer())]
    assert config.latent_rms == pytest.approx(rows.square().mean().sqrt().item(), rel=1e-5)
    inputs = encode(processor, [user_turn("what?", picture(80, 60)), user_turn("hello")])
    output = model.generate(**inputs, **GREEDY, output_latents=True)
    assert output.num_latents.tolist() == [6, 6]
    remote = AutoModel.from_pretrained(converted, trust_remote_code=True)
    assert_near(step_logits(remote.generate(**inputs, **GREEDY)), step_logits(output))
    fields = json.loads((converted / "generation_config.json").read_text())
    assert len(fields["eos_token_id"]) == 2 and fields["pad_token_id"] == processor.tokenizer.pad_token_id
    assert (converted / "LICENSE").read_text() == "as you like"
    card = (converted / "README.md").read_text()
    assert "LaReForCausalLM" in card and f"a local backbone (`{language[0].name}`)" in card


def test_text_without_steps_is_the_language_model(converted, language):
    model, processor = LaReForCausalLM.from_pretrained(converted), AutoProcessor.from_pretrained(converted)
    model.config.num_refocus_steps = 0
    inputs = encode(processor, [user_turn("hello")])
    rows = len(build_tokenizer())
    ours, theirs = model(**inputs).logits, language[1](**inputs).logits
    assert_near(ours[..., :rows], theirs[..., :rows])


def test_pictures_are_seen_whole(converted):
    processor = AutoProcessor.from_pretrained(converted)
    wide = picture(224, 56)
    wide.paste((255, 0, 0), (0, 0, 20, 56))
    pixels = processor(text=IMAGE, images=wide, return_tensors="pt")["pixel_values"]
    other = picture(224, 56)
    assert pixels.shape == (1, 3, 56, 56)
    assert not torch.equal(pixels, processor(text=IMAGE, images=other, return_tensors="pt")["pixel_values"])


def projector_shapes() -> dict:
    return {"0.weight": (64, 32), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}


def test_the_authors_projector(tower, language, tmp_path):
    weights = {f"model.mm_projector.{name}": torch.randn(shape) for name, shape in projector_shapes().items()}
    torch.save(weights, tmp_path / "mm_projector.bin")
    folder = convert_lare(tower, language[0], tmp_path / "out", tmp_path / "mm_projector.bin", overrides=dict(SMALL))
    after = weights_of(folder)
    for name, layer in (("0", "linear_1"), ("2", "linear_2")):
        for kind in ("weight", "bias"):
            expected = weights[f"model.mm_projector.{name}.{kind}"]
            assert torch.equal(after[f"model.multi_modal_projector.{layer}.{kind}"], expected)


def test_a_llava_checkpoints_projector_and_its_answers(tower, language, tmp_path):
    """With the projector of a whole LLaVA, and no steps, the converted model is it."""
    fields = lare_fields("qwen2")
    fields["text_config"] = language[1].config.to_dict()
    fields["image_token_index"] = 5
    llava = LlavaForConditionalGeneration(LlavaConfig(**fields)).eval()
    llava.model.language_model.load_state_dict(language[1].model.state_dict())
    llava.lm_head.load_state_dict(language[1].lm_head.state_dict())
    vision = (
        CLIPModel.from_pretrained(tower).vision_model
        if "whole" in tower.name
        else CLIPVisionModel.from_pretrained(tower)
    )
    llava.model.vision_tower.load_state_dict(vision.state_dict())
    llava.save_pretrained(tmp_path / "llava")
    folder = convert_lare(tower, language[0], tmp_path / "out", tmp_path / "llava", overrides=dict(SMALL))
    model = LaReForCausalLM.from_pretrained(folder)
    model.config.num_refocus_steps = 0
    pixels = torch.randn(1, 3, 56, 56)
    ids = torch.tensor([[40, *[model.config.image_token_id] * 16, 41, 42]])
    theirs = llava(ids.masked_fill(ids == model.config.image_token_id, 5), pixel_values=pixels).logits
    rows = len(build_tokenizer())
    assert_near(model(ids, pixel_values=pixels).logits[..., :rows], theirs[..., :rows])


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda weights: weights.update({"mm_projector.0.weight": torch.ones(64, 24)}),
            r"linear_1.weight must be \[64, 32\], got \[64, 24\]",
        ),
        (lambda weights: weights.pop("mm_projector.2.bias"), "two layers"),
        (lambda weights: [weights.pop(name) for name in list(weights)], "two layers"),
        (lambda weights: weights.update({"note": "text"}), "dictionary of tensors"),
    ],
)
def test_a_projector_that_does_not_fit_is_refused(tower, language, tmp_path, change, message):
    weights = {f"mm_projector.{name}": torch.ones(shape) for name, shape in projector_shapes().items()}
    change(weights)
    torch.save(weights, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match=message):
        convert_lare(tower, language[0], tmp_path / "out", tmp_path / "mm_projector.bin", overrides=dict(SMALL))
    assert [path.name for path in tmp_path.iterdir()] == ["mm_projector.bin"]


def test_a_pickle_that_runs_code_is_refused(tower, language, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"mm_projector.0.weight": Evil()}, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        convert_lare(tower, language[0], tmp_path / "out", tmp_path / "mm_projector.bin", overrides=dict(SMALL))
    assert not (tmp_path / "ran").exists()


def test_a_cast_reaches_every_weight(tower, language, tmp_path):
    folder = convert_lare(tower, language[0], tmp_path / "out", dtype="bfloat16", overrides=dict(SMALL))
    assert {weight.dtype for weight in weights_of(folder).values()} == {torch.bfloat16}
    assert LaReForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(4)
    return save_tower(folder / "clip", "whole"), save_language_model(folder / "vicuna", "llama", template=None)[0]


def test_a_tokenizer_without_a_template_gets_vicunas(parts, tmp_path, capsys):
    folder = convert_lare(*parts, tmp_path / "out", overrides=dict(SMALL))
    assert "Vicuna" in capsys.readouterr().err
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.chat_template.endswith(VICUNA_TEMPLATE)
    turns = [
        *user_turn("What is it?", picture()),
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ]
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
        f"polite answers to the user's questions. USER: {IMAGE}\nWhat is it? ASSISTANT: A cat.<|im_end|>USER: Sure? ASSISTANT:"
    )
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert processor.apply_chat_template(system) == "Be brief. USER: Hi "


def test_siglip(parts, tmp_path):
    tower = save_tower(tmp_path / "siglip", "siglip")
    folder = convert_lare(tower, parts[1], tmp_path / "out", overrides=dict(SMALL))
    model, info = LaReForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and model.config.vision_feature_select_strategy == "full"
    inputs = encode(AutoProcessor.from_pretrained(folder), [user_turn("what?", picture())])
    assert model.generate(**inputs, **GREEDY).num_latents.tolist() == [6]


def test_bad_parts_are_refused(parts, tmp_path):
    tower, language = parts
    output = tmp_path / "out"
    with pytest.raises(ValueError, match="`language-model` must be of a `model_type`.*'clip'"):
        convert_lare(tower, tower, output)
    with pytest.raises(ValueError, match="`vision-tower` must be of a `model_type`.*'llama'"):
        convert_lare(language, language, output)
    with pytest.raises(ValueError, match="`--set` knows the fields.*got bot_token_id"):
        convert_lare(tower, language, output, overrides={"bot_token_id": 3})
    with pytest.raises(Exception, match=r"`window_size` \(8\) must be at most .*\(4\)"):
        convert_lare(tower, language, output)
    with pytest.raises(ValueError, match="must not be or contain"):
        convert_lare(tower, language, tower, overrides=dict(SMALL))
    assert not output.exists() and sorted(path.name for path in tmp_path.iterdir()) == []


@pytest.mark.parametrize("part, name", [(0, "vision_model.post_layernorm.weight"), (1, "model.norm.weight")])
def test_a_missing_weight_is_named(parts, tmp_path, part, name):
    folders = [shutil.copytree(folder, tmp_path / str(number)) for number, folder in enumerate(parts)]
    for file in folders[part].glob("*.safetensors"):
        weights = load_file(file)
        if name in weights:
            weights.pop(name)
            save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 missing: model.*{name.rpartition('model.')[2]}"):
        convert_lare(*folders, tmp_path / "out", overrides=dict(SMALL))
    assert not (tmp_path / "out").exists()


def test_buffers_of_older_checkpoints_are_left_behind(parts, tmp_path):
    """Positions and frequencies that transformers computes by now."""
    buffers = ("vision_model.embeddings.position_ids", "model.layers.0.self_attn.rotary_emb.inv_freq")
    folders = [shutil.copytree(folder, tmp_path / str(number)) for number, folder in enumerate(parts)]
    for folder, name in zip(folders, buffers):
        file = next(iter(sorted(folder.glob("*.safetensors"))))
        save_file(load_file(file) | {name: torch.arange(4)}, file, {"format": "pt"})
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"][name] = file.name
        index.write_text(json.dumps(content))
    folder = convert_lare(*folders, tmp_path / "out", overrides=dict(SMALL))
    assert weights_of(folder).keys() == weights_of(convert_lare(*parts, tmp_path / "b", overrides=dict(SMALL))).keys()


def test_the_command(parts, tmp_path, monkeypatch, capsys):
    sizes = [f"{name}={value}" for name, value in SMALL.items()]
    arguments = ["--vision-tower", str(parts[0]), "--language-model", str(parts[1]), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["convert_lare", *arguments, "--set", *sizes])
    command.main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2 and "new or empty folder" in capsys.readouterr().err
