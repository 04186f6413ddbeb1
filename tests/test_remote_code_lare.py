"""A LaRe checkpoint carries its own code: loaded, run and saved again where this package cannot be imported."""

import os
from pathlib import Path

import pytest
import torch
from conftest import build_tokenizer, encode, picture, user_turn
from helpers import GREEDY, run_strictly
from test_lare import DECODERS, build
from test_processing_lare import QWEN_TEMPLATE, exact
from test_remote_code import AUTO_CLASSES, OURS, ROOT, code_of, digest
from transformers import AutoModel, AutoProcessor

from modeling_latentvlm import LaReForCausalLM
from processing_latentvlm import LaReProcessor
from processing_latentvlm.processing_lare import BOT, EOT, IMAGE, REFOCUS_TOKENS


pytestmark = pytest.mark.core

CLEAN_PROCESS = """
import sys
import torch, transformers

sys.modules.update(dict.fromkeys({ours!r}))  # Python takes None for `there is no such module`
torch.set_num_threads(1)
folder, second = {folder!r}, {second!r}
processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
turns = [[{{"role": "user", "content": [{{"type": "image", "image": {image!r}}}, {{"type": "text", "text": "what?"}}]}}]]
inputs = processor.apply_chat_template(
    turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
logits, classes, missing = [], [], []
for name in {auto_classes!r}:
    auto_class = getattr(transformers, name)
    model, info = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    output = model.generate(**inputs, output_latents=True, **{settings!r})
    logits.append(torch.stack(output.logits, dim=1))
    classes.append(type(model).__module__.split(".")[0] + " " + type(model).__name__)
    missing += [key for keys in info.values() for key in keys]
model.save_pretrained(second)
processor.save_pretrained(second)
torch.save({{"logits": logits, "classes": classes, "missing": missing, "ids": inputs["input_ids"]}}, {out!r})
"""


def run_clean(root: Path, folder: Path, image: Path) -> dict:
    """Run `CLEAN_PROCESS` in a process that shares neither environment, module cache nor package with this one."""
    root.mkdir()
    job = {"ours": OURS, "auto_classes": AUTO_CLASSES, "settings": GREEDY, "image": str(image)}
    job |= {"folder": str(folder), "second": str(root / "saved"), "out": str(root / "seen.pt")}
    script = root / "clean_process.py"
    script.write_text(CLEAN_PROCESS.format(**job), encoding="utf-8")
    kept = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
    environment = {
        **{name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ},
        "HOME": str(root),
        "PYTHONPATH": os.pathsep.join(kept),
        "HF_HOME": str(root / "hf_home"),
        "HF_MODULES_CACHE": str(root / "modules"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    run_strictly(str(script), env=environment, cwd="/")
    return torch.load(root / "seen.pt", weights_only=True)


def with_vocabulary(decoder: str, tokenizer) -> LaReForCausalLM:
    """A model whose tokens are the tokenizer's."""
    bot, eot, image = tokenizer.convert_tokens_to_ids([BOT, EOT, IMAGE])
    model = build(decoder)
    fields = {name: value for name, value in model.config.to_dict().items() if name not in ("auto_map", "model_type")}
    fields["text_config"] |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    fields |= {"bot_token_id": bot, "eot_token_id": eot, "image_token_index": image}
    torch.manual_seed(5)
    return LaReForCausalLM(type(model.config)(**fields)).eval()


@pytest.mark.parametrize("decoder", DECODERS)
def test_saved_loaded_elsewhere_and_saved_again(decoder, tmp_path):
    """Twice: what the clean process saved is loaded by another one. Weights, code and answers stay the same."""
    tokenizer = build_tokenizer(REFOCUS_TOKENS)
    tokenizer.chat_template = QWEN_TEMPLATE
    processor = LaReProcessor(exact(), tokenizer, patch_size=14, image_size=56)
    model, first = with_vocabulary(decoder, tokenizer), tmp_path / "first"
    model.save_pretrained(first)
    processor.save_pretrained(first)
    image = tmp_path / "photo.png"
    picture().save(image)
    inputs = encode(processor, [user_turn("what?", str(image))])
    expected = torch.stack(model.generate(**inputs, **GREEDY).logits, dim=1)
    folder = first
    for round_number in range(2):
        root = tmp_path / f"process {round_number}"
        seen = run_clean(root, folder, image)
        assert not seen["missing"]
        assert seen["classes"] == ["transformers_modules LaReForCausalLM"] * 3
        assert torch.equal(seen["ids"], inputs["input_ids"])
        for logits in seen["logits"]:
            torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)
        folder = root / "saved"
        assert code_of(folder) == code_of(first)
        assert {path.name for path in folder.iterdir()} == {path.name for path in first.iterdir()}
        assert digest(LaReForCausalLM.from_pretrained(folder)) == digest(model)
    assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)) is LaReForCausalLM
    assert type(AutoProcessor.from_pretrained(folder, trust_remote_code=True)) is LaReProcessor


def test_the_code_is_flat_and_needs_no_package(tmp_path):
    build().save_pretrained(tmp_path)
    code = code_of(tmp_path)
    assert {
        "configuration_lare.py",
        "modeling_lare.py",
        "processing_lare.py",
        "refocus_extractor_lare.py",
    } <= code.keys()
    assert "modeling_vedas.py" not in code and "modeling_deeplatent.py" not in code
    for text in code.values():
        assert "_latentvlm." not in "\n".join(line for line in text.splitlines() if " import " in line)
