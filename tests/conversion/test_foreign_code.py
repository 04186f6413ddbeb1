"""Whose code runs: conversion passes on nobody's but ours, and commands run that of other model types only when told to."""

import json
from pathlib import Path

import pytest
import torch
from test_convert_deeplatent import convert, write_backbone
from test_convert_lare import SMALL, save_language_model, save_tower
from transformers import AutoModel, AutoProcessor

from conversion.backbone import without_code
from conversion.config_overrides import load_config
from conversion.convert_lare import convert_lare
from conversion.convert_vedas import convert_vedas
from conversion.own_models import TRUST_HELP
from conversion.reference_vedas import save_processor
from evaluation.harnesses.answerer import Answerer
from evaluation.loading import load_model, load_processor
from train.deeplatent import sft


HOSTILE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nraise SystemExit('foreign code ran')\n"
OWN = ("configuration_", "modeling_", "processing_")


def add_foreign_code(folder: Path) -> None:
    """As a third party's backbone may have it: classes of its own, named by the tokenizer, the images and the config."""
    (folder / "foreign.py").write_text(HOSTILE)
    for name, auto_class in (
        ("tokenizer_config.json", {"AutoTokenizer": ["foreign.Tokenizer", "foreign.Tokenizer"]}),
        ("preprocessor_config.json", {"AutoImageProcessor": "foreign.Images"}),
        ("config.json", {"AutoConfig": "foreign.Config", "AutoModel": "foreign.Model"}),
    ):
        path = folder / name
        if path.is_file():
            path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_class}))


class Parts:
    """Saves a processor's parts as they are: the tokens of the published code are not in this tokenizer."""

    def __init__(self, images, tokenizer, chat_template=None):
        self.parts = images, tokenizer

    def save_pretrained(self, folder: Path) -> None:
        for part in self.parts:
            part.save_pretrained(folder)


def codes_named(folder: Path) -> set[str]:
    """All that an `auto_map` of any JSON file names, at any depth."""
    found = set()

    def walk(value):
        if isinstance(value, dict):
            for name, part in value.items():
                if name == "auto_map":
                    found.update(json.dumps(one) for one in part.values())
                walk(part)
        elif isinstance(value, list):
            for part in value:
                walk(part)

    for path in folder.glob("*.json"):
        walk(json.loads(path.read_text()))
    return found


@pytest.mark.core
@pytest.mark.parametrize("architecture", ["deeplatent", "vedas", "lare", "reference_vedas"])
def test_conversion_passes_no_foreign_code_on(architecture, tmp_path):
    torch.manual_seed(0)
    if architecture == "lare":
        parts = [save_tower(tmp_path / "clip", "whole"), save_language_model(tmp_path / "qwen", "qwen2")[0]]
    else:
        parts = [write_backbone(tmp_path / "qwen")]
    for part in parts:
        add_foreign_code(Path(part))
        assert any("foreign" in name for name in codes_named(Path(part)))
    out = tmp_path / "out"
    if architecture == "lare":
        convert_lare(*parts, out, overrides=dict(SMALL))
    elif architecture == "vedas":
        convert_vedas(*parts, out, overrides={"num_latent_steps": 2, "num_replay_tokens": 3, "num_routed_tokens": 4})
    elif architecture == "deeplatent":
        convert(*parts, out)
    else:
        rows = json.loads((parts[0] / "config.json").read_text())["text_config"]["vocab_size"]
        out.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("conversion.reference_vedas.REFERENCE_TOKENS", ())
            patch.setattr("conversion.reference_vedas.VedasProcessor", Parts)
            save_processor(out, parts[0], rows)
    named = codes_named(out)
    assert all(name.strip('"').startswith(OWN) for name in named) and (named or architecture == "reference_vedas")
    assert not (out / "foreign.py").exists() and not list(tmp_path.rglob("ran"))
    if architecture != "reference_vedas":  # as our README loads it
        AutoProcessor.from_pretrained(out, trust_remote_code=True)
        AutoModel.from_pretrained(out, trust_remote_code=True)


def test_nested_code_is_dropped():
    fields = {"a": 1, "auto_map": {}, "text_config": {"auto_map": {}, "b": [{"auto_map": 2, "c": 3}]}}
    assert without_code(fields) == {"a": 1, "text_config": {"b": [{"c": 3}]}}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A checkpoint of a model type that is not ours, whose code must not run."""
    folder = tmp_path_factory.mktemp("hostile") / "other"
    folder.mkdir()
    names = {
        "AutoConfig": "foreign.Config",
        "AutoModel": "foreign.Model",
        "AutoModelForImageTextToText": "foreign.Model",
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": names}))
    (folder / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "foreign.Processor"}}))
    (folder / "foreign.py").write_text(HOSTILE)
    return folder


LOADERS = {
    "model": lambda folder, trust: load_model(folder, trust_remote_code=trust),
    "processor": lambda folder, trust: load_processor(folder, trust_remote_code=trust),
    "config": lambda folder, trust: load_config(folder, (), trust),
    "harness": lambda folder, trust: Answerer(folder, trust_remote_code=trust),
    "sft": lambda folder, trust: sft.load_processor(folder, None, trust),
}


@pytest.mark.parametrize("loader", list(LOADERS))
def test_foreign_code_runs_only_where_it_is_trusted(loader, hostile):
    with pytest.raises(ValueError, match="trust_remote_code"):
        LOADERS[loader](str(hostile), False)
    with pytest.raises(SystemExit, match="foreign code ran"):  # what was asked for
        LOADERS[loader](str(hostile), True)


def test_every_command_that_loads_a_model_has_the_switch_and_is_off_by_default(hostile, tmp_path):
    from evaluation import evaluate
    from evaluation.analyses import collection
    from evaluation.faithfulness.__main__ import build_parser
    from train import cache_teacher_states, train_deeplatent_rl, train_lare, train_vedas

    classes = (
        evaluate.EvaluationArguments,
        train_vedas.ScriptArguments,
        train_lare.ScriptArguments,
        train_deeplatent_rl.ScriptArguments,
        sft.SftArguments,
        cache_teacher_states.CacheArguments,
    )
    for one in classes:
        field = one.__dataclass_fields__["trust_remote_code"]
        assert field.default is False and field.metadata["help"] == TRUST_HELP
    required = ["--model", "m", "--data", "d", "--output", "o"]
    for parser in (build_parser(), collection.analysis_parser("a", "study")):
        assert parser.parse_args(required).trust_remote_code is False
        assert parser.parse_args([*required, "--trust-remote-code"]).trust_remote_code is True
    lare = train_lare.ScriptArguments(stage=1, model_path=str(hostile), data_path="d")
    vedas = train_vedas.ScriptArguments(model_path=str(hostile), data_path="d")
    for module, args in ((train_lare, lare), (train_vedas, vedas)):
        with pytest.raises(ValueError, match="trust_remote_code"):
            module.load_model(args)


def test_code_that_lies_in_a_checkpoint_of_ours_is_not_run(tmp_path, tokenizer, processor):
    """Of our own model types the installed code is taken, with the switch and without."""
    from conftest import build_model

    folder = tmp_path / "deeplatent"
    build_model(tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)
    for path in folder.glob("*.py"):
        path.write_text(HOSTILE)
    for trust in (False, True):
        assert (
            type(load_model(str(folder), trust_remote_code=trust)).__module__
            == "modeling_latentvlm.modeling_deeplatent"
        )
        assert type(load_processor(str(folder), trust)).__module__ == "processing_latentvlm.processing_deeplatent"
