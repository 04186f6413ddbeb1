"""LaRe's four stages through the command: what each moves, what it writes, and what it refuses."""

import functools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import CHECKPOINTING
from safetensors.torch import load_file
from test_convert_lare import SMALL as REFOCUS
from test_convert_lare import save_language_model, save_tower, weights_of
from test_lare_objective import write_vae
from torch.testing import assert_close
from transformers import AutoModel, AutoProcessor, HfArgumentParser

from conversion.convert_lare import convert_lare
from modeling_latentvlm import LaReForCausalLM
from train import train_lare
from train.common.training_model import LatentTrainer, last_complete_checkpoint
from train.data.small_tokenizer import texts_of
from train.data.tasks import write_dataset
from train.lare.data import LaReCollator, read_llava
from train.lare.objective import LaReObjective, LatentLossArguments
from train.recipes.small_clip import write_small
from train.train_lare import LaReTrainingArguments, ScriptArguments, complete_arguments


OBJECTIVE = "training/objective.safetensors"
EMBEDDING = "model.language_model.embed_tokens.weight"
TERMS = ("ntp_loss", "align_loss", "image_loss", "text_loss")
TINY = {"crop_size": 32, "unet_channels": (8, 8, 16, 16)}
PLAIN_SGD = {"optim": "sgd", "learning_rate": 1.0, "weight_decay": 0, "max_grad_norm": 0, "warmup_steps": 0}


class RecordingTrainer(LatentTrainer):
    """Keeps every tensor as it was when training began."""

    def train(self, *args, **kwargs):
        self.before = {name: value.clone() for name, value in self.model.state_dict().items()}
        return super().train(*args, **kwargs)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    """Procedural questions in both formats; one of the conversations has no picture."""
    folder = tmp_path_factory.mktemp("data") / "tasks"
    steps = write_dataset("all", 6, 0, folder, image_size=112)
    rows = []
    for line in steps.read_text().splitlines():
        row = json.loads(line)
        turns = [("human", f"<image>\n{row['question']}"), ("gpt", row["answer"]), ("human", "sure?"), ("gpt", "yes")]
        turns = [{"from": who, "value": value} for who, value in turns]
        rows.append({"image": row["image"], "conversations": turns})
    del rows[3]["image"]
    rows[3]["conversations"][0]["value"] = "hello"
    (folder / "llava.json").write_text(json.dumps(rows))
    return {"steps": steps, "llava": folder / "llava.json"}


@pytest.fixture(scope="module")
def vae_path(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def bases(data, tmp_path_factory) -> dict:
    """A tied model of the small recipe, and a Llama whose output layer is its own."""
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    small = write_small(texts_of(data["steps"]), folder / "small", 64, 2, 400, image_size=56)
    language, _ = save_language_model(folder / "llama", "llama", tied=False)
    tower = save_tower(folder / "tower", "alone")
    return {
        "tied": convert_lare(small / "vision", small / "language", folder / "tied", overrides=dict(REFOCUS)),
        "untied": convert_lare(tower, language, folder / "untied", overrides=dict(REFOCUS)),
    }


@pytest.fixture(scope="module")
def run(data, vae_path):
    def start(stage: int, model_path, output_dir, **options) -> RecordingTrainer:
        """The command with its defaults made small; None leaves an option out."""
        options = {
            "stage": stage,
            "model_path": model_path,
            "data_path": data["llava" if stage in (1, 3) else "steps"],
            "output_dir": output_dir,
            "vae_path": vae_path,
            "max_steps": 1,
            "per_device_train_batch_size": 2,
            "global_batch_size": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **TINY,
            **options,
        }
        words = []
        for name, value in options.items():
            if value is not None:
                values = value if isinstance(value, tuple) else (value,)
                words += [f"--{name}", *map(str, values)]
        parser = HfArgumentParser((ScriptArguments, LatentLossArguments, LaReTrainingArguments))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_lare, "LatentTrainer", RecordingTrainer)
            return train_lare.main(*parser.parse_args_into_dataclasses(words))

    return start


@pytest.fixture(scope="module")
def chain_of(bases, run, data, tmp_path_factory):
    """All four stages, one after the other: the folder before each, the folder behind it, and its trainer."""

    @functools.cache
    def make(kind: str) -> dict:
        folder, model_path, done = tmp_path_factory.mktemp(kind), bases[kind], {}
        for stage in (1, 2, 3, 4):
            options = {"learning_rate": 1e-2, "warmup_steps": 0, "seed": 1}
            if stage == 4:
                options |= {"eval_strategy": "steps", "eval_steps": 1, "eval_data_path": data["steps"]}
            output = folder / f"stage-{stage}"
            done[stage] = (model_path, output, run(stage, model_path, output, **options))
            model_path = output
        return done

    return make


@pytest.fixture(params=["tied", "untied"])
def chain(request, chain_of) -> dict:
    return chain_of(request.param)


# Stages


def test_every_stage_moves_exactly_its_own(chain):
    """With weight decay on, so that a weight that is merely without a gradient would move too."""
    for stage, (before, after, trainer) in chain.items():
        assert trainer.args.weight_decay == 0.05
        first, second = weights_of(before), weights_of(after)
        assert first.keys() == second.keys()
        moved = {name for name in first if not torch.equal(first[name], second[name])}
        if stage == 1:
            expected = {name for name in first if name.startswith("model.multi_modal_projector.")}
        elif stage == 2:
            expected = {name for name in first if name.startswith("refocus.")} | {EMBEDDING}
        else:
            expected = {name for name in first if "vision_tower" not in name}
        assert moved == expected and len(moved) > 3
        model = trainer.model.model
        bot_and_eot = sorted([model.config.bot_token_id, model.config.eot_token_id])
        rows = (first[EMBEDDING] != second[EMBEDDING]).any(dim=1).nonzero().flatten().tolist()
        assert rows == {1: [], 2: bot_and_eot}.get(stage, list(range(len(first[EMBEDDING]))))

        modules = {name for name in trainer.before if name.startswith("objective.")}
        state = trainer.model.state_dict()
        assert state.keys() == trainer.before.keys() and bool(modules) == (stage > 1)
        still = {name for name in modules if torch.equal(trainer.before[name], state[name])}
        assert all("norm" in name or "bias" in name for name in still)  # not decayed; one image has no negatives
        assert len(still) <= 2 and (stage == 3 or not any("alignment" in name for name in still))


def test_the_optimizer_of_stage_two_holds_two_rows_of_the_embedding(chain):
    """Not the vocabulary, which weight decay would move."""
    model = chain[2][2].model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if not name.startswith(("model.refocus.", "objective."))} == set()
    assert model.objective.delimiters.rows.shape == (2, 64)


def test_the_terms_are_logged_and_finite(chain):
    for stage, (_, _, trainer) in chain.items():
        terms = TERMS[:1] if stage == 1 else TERMS
        (log,) = [log for log in trainer.state.log_history if "loss" in log]
        for name in ("loss", "grad_norm", *terms):
            assert math.isfinite(log[name]) and log[name] > 0, (stage, name)
        assert not set(TERMS[len(terms) :]) & set(log)
        if stage > 1:
            arguments = LatentLossArguments()
            weights = {name: getattr(arguments, f"{name}_weight") for name in TERMS[1:]}
            assert weights == {"align_loss": 0.1, "image_loss": 1.0, "text_loss": 0.5}
            expected = log["ntp_loss"] + sum(weight * log[name] for name, weight in weights.items())
            assert log["loss"] == pytest.approx(expected, rel=1e-3)
        if stage == 4:
            (log,) = [log for log in trainer.state.log_history if "eval_loss" in log]
            assert all(math.isfinite(log[f"eval_{name}"]) for name in TERMS)


def test_what_only_training_needs_lies_beside_the_checkpoint(chain):
    for stage, (_, after, _) in chain.items():
        assert {"config.json", "model.safetensors", "modeling_lare.py", "README.md"} <= {
            path.name for path in after.iterdir()
        }
        names = weights_of(after).keys()
        assert {name.split(".")[0] for name in names} <= {"model", "lm_head", "refocus"}
        assert (after / OBJECTIVE).is_file() == (stage > 1)
        if stage > 1:
            kept = load_file(after / OBJECTIVE)
            assert {name.split(".")[0] for name in kept} == {"alignment", "image_reconstruction"}
            assert {name.split(".")[1] for name in kept if name.startswith("image")} == {"unet", "condition"}


def test_the_next_stage_goes_on_with_the_heads_and_the_u_net(chain):
    for stage in (3, 4):
        before, _, trainer = chain[stage]
        stored = load_file(before / OBJECTIVE)
        found = {name: value for name, value in trainer.before.items() if name.startswith("objective.")}
        assert {f"objective.{name}" for name in stored} == set(found)
        assert all(torch.equal(found[f"objective.{name}"], value) for name, value in stored.items())


def test_what_a_stage_writes_loads_in_the_normal_way(chain):
    for stage, (_, after, trainer) in chain.items():
        state = trainer.model.model.state_dict()
        if stage == 2:
            objective = trainer.model.objective
            state[EMBEDDING] = state[EMBEDDING].clone()
            state[EMBEDDING][objective.delimiters.ids] = objective.delimiters.rows.detach()
            if trainer.model.model.config.get_text_config().tie_word_embeddings:
                state["lm_head.weight"] = state[EMBEDDING]
        model, info = AutoModel.from_pretrained(after, trust_remote_code=True, output_loading_info=True)
        assert not any(info.values())
        assert model.check_known_answers().worst < 0.5, stage  # recorded at the end of the stage
        loaded = model.state_dict()
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], state[name]) for name in state), stage
        is_tied = model.config.get_text_config().tie_word_embeddings
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == is_tied
        assert model.config.num_refocus_steps == 2  # stage 1 takes none, and says nothing of it
        assert AutoProcessor.from_pretrained(after, trust_remote_code=True).image_size == 56


# What the stage decides


@pytest.mark.parametrize("stage, rate, batch", [(1, 1e-3, 256), (2, 1e-4, 128), (3, 2e-5, 128), (4, 2e-5, 128)])
def test_defaults_of_the_stages(stage, rate, batch, tmp_path):
    def complete(script: dict | None = None, **fields) -> LaReTrainingArguments:
        arguments = LaReTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **fields)
        complete_arguments(ScriptArguments(stage, "m", "d", **(script or {})), arguments)
        return arguments

    arguments = complete(per_device_train_batch_size=4)
    assert (arguments.learning_rate, arguments.gradient_accumulation_steps) == (rate, batch // 4)
    assert (arguments.weight_decay, arguments.warmup_steps, arguments.lr_scheduler_type) == (0.05, 0.03, "cosine")
    assert arguments.get_warmup_steps(200) == 6 and "adamw" in arguments.optim
    arguments = complete({"global_batch_size": 24}, per_device_train_batch_size=8, learning_rate=0.5)
    assert (arguments.learning_rate, arguments.gradient_accumulation_steps) == (0.5, 3)
    assert complete(per_device_train_batch_size=4, gradient_accumulation_steps=7).gradient_accumulation_steps == 7
    both = complete({"global_batch_size": 24}, per_device_train_batch_size=8, gradient_accumulation_steps=7)
    assert both.gradient_accumulation_steps == 3
    with pytest.raises(ValueError, match=rf"A batch of {batch} .* cannot be made of batches of 3"):
        complete(per_device_train_batch_size=3)
    with pytest.raises(ValueError, match="A batch of 2 .* cannot be made of batches of 4"):
        complete({"global_batch_size": 2}, per_device_train_batch_size=4)


def test_stages_that_do_not_exist():
    with pytest.raises(ValueError, match=r"`stage` must be one of \[0, 1, 2, 3, 4\], got 5"):
        ScriptArguments(5, "m", "d")


def test_a_checkpoint_that_lacks_what_the_stage_needs_is_refused(bases, run, tmp_path):
    base = bases["tied"]
    for stage in (3, 4):
        with pytest.raises(ValueError, match=f"Stage {stage} needs the heads and the U-Net of stage 2, but .* has no"):
            run(stage, base, tmp_path / "out")
    with pytest.raises(ValueError, match="`image_loss_weight` needs a `vae_path`"):
        run(2, base, tmp_path / "out", vae_path=None)
    still = shutil.copytree(base, tmp_path / "still")
    config = json.loads((still / "config.json").read_text())
    (still / "config.json").write_text(json.dumps(config | {"num_refocus_steps": 0}))
    for stage in (2, 3, 4):
        with pytest.raises(ValueError, match=f"Stage {stage} needs refocusing steps, but .* is 0"):
            run(stage, still, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_objective_is_refused(chain_of, run, tmp_path):
    chain = chain_of("tied")
    with pytest.raises(ValueError, match=r"objective.safetensors does not fit the objective"):
        run(3, chain[2][1], tmp_path / "out", unet_channels=(8, 8, 16, 24))


def test_a_term_that_was_trained_before_may_be_switched_off(chain_of, run, tmp_path):
    trainer = run(3, chain_of("tied")[2][1], tmp_path / "out", image_loss_weight=0)
    assert {name.split(".")[0] for name in load_file(tmp_path / "out" / OBJECTIVE)} == {"alignment"}
    assert "image_loss" not in trainer.state.log_history[0]


def test_a_fresh_objective_is_taken_where_the_user_says_so(bases, run, tmp_path):
    trainer = run(3, bases["untied"], tmp_path / "out", fresh_objective=True, image_loss_weight=0)
    assert {name.split(".")[0] for name in load_file(tmp_path / "out" / OBJECTIVE)} == {"alignment"}
    assert "image_loss" not in trainer.state.log_history[0]


def test_a_field_of_the_config_may_be_changed_and_is_saved(bases, run, tmp_path):
    trainer = run(1, bases["tied"], tmp_path / "out", config_overrides="answer_sees_image=false")
    assert trainer.model.model.config.answer_sees_image is False
    assert json.loads((bases["tied"] / "config.json").read_text())["answer_sees_image"] is True
    assert json.loads((tmp_path / "out" / "config.json").read_text())["answer_sees_image"] is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("extractor_num_layers=5", r"got \d+ missing, first refocus\.layers\.\d\S+$"),
        ("use_extractor=false", r"got \d+ unexpected, first refocus\.\S+$"),
        ("extractor_intermediate_size=20", r"got \d+ mismatched, first refocus\.\S+$"),
        ("bot_token_id=5", r"cannot change \['bot_token_id'\]"),
        ("image_token_index=5", r"cannot change \['image_token_index'\]"),
        ("no_field=5", "no_field"),
    ],
)
def test_changes_that_do_not_fit_the_weights_are_refused(bases, run, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        run(1, bases["tied"], tmp_path / "out", config_overrides=override)
    assert not (tmp_path / "out").exists()


# RowText


def losses_of(trainer) -> dict:
    names = ("loss", *TERMS)
    return {log["step"]: [log[name] for name in names] for log in trainer.state.log_history if "loss" in log}


@pytest.mark.parametrize("stage, kind", [(2, "tied"), (2, "untied"), (4, "tied")])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(chain_of, run, tmp_path, stage, kind):
    chain = chain_of(kind)
    start, whole, again = chain[stage][0], tmp_path / "whole", tmp_path / "again"
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 3e-3, "warmup_steps": 1}
    first = run(stage, start, whole, resume_from_checkpoint="last", **options)  # there is nothing to resume from
    shutil.copytree(whole / "checkpoint-2", again / "checkpoint-2")
    state = again / "checkpoint-2" / "trainer_state.json"
    state.write_text(state.read_text().replace('"log_history": [', '"log_history": [{"was": "here"},', 1))
    (again / "checkpoint-3").mkdir()  # killed while it was written
    (again / "checkpoint-3" / "trainer_state.json").write_text('{"epo')
    second = run(stage, start, again, resume_from_checkpoint="last", **options)
    assert list(losses_of(first)) == [1, 2, 3, 4]
    assert {"was": "here"} in second.state.log_history  # else it started anew, to the same end
    assert_close(losses_of(second), losses_of(first), atol=1e-6, rtol=1e-6)
    ours, theirs = second.model.state_dict(), first.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    moved = [name for name in ours if not torch.equal(ours[name], second.before[name])]
    assert len(moved) > 20
    for one, other in (
        (weights_of(whole), weights_of(again)),
        (load_file(whole / OBJECTIVE), load_file(again / OBJECTIVE)),
    ):
        assert one.keys() == other.keys()
        for name in one:
            assert_close(one[name], other[name], atol=1e-6, rtol=1e-6)
    if stage == 2:
        kept = weights_of(whole / "checkpoint-2")[EMBEDDING] != weights_of(whole)[EMBEDDING]
        config = first.model.model.config
        assert kept.any(dim=1).nonzero().flatten().tolist() == sorted([config.bot_token_id, config.eot_token_id])
        assert not any(name.startswith("delimiters") for name in load_file(again / OBJECTIVE))


def test_negatives_come_from_the_whole_step(bases, run, tmp_path):
    """One row a micro-batch: the loss is that of one batch of all rows, and never 0 as without the others."""
    cut = run(2, bases["tied"], tmp_path / "cut", per_device_train_batch_size=1, global_batch_size=3, max_steps=2)
    whole = run(2, bases["tied"], tmp_path / "whole", per_device_train_batch_size=3, global_batch_size=3, max_steps=2)
    losses = [
        [entry["align_loss"] for entry in one.state.log_history if "align_loss" in entry] for one in (cut, whole)
    ]
    assert losses[0][0] > 0.1 and losses[0][0] == pytest.approx(losses[1][0], abs=1e-5)
    assert all(entry["align_without_negative"] == 0 for entry in cut.state.log_history if "align_loss" in entry)


@pytest.mark.slow
def test_two_processes_that_accumulate_equal_one(bases, run, data, tmp_path):
    """Two processes with two micro-batches of one row each: loss, negatives and step are those of one process.

    By plain gradient descent, so that the weights show the gradients; against one process with as many micro-batches, since
    the other terms are means over micro-batches, and the alignment also against one batch of all rows.
    """
    rows = data["steps"].read_text().splitlines()[:4]
    four = data["steps"].with_name("four.jsonl")
    four.write_text("\n".join(rows))
    shared = PLAIN_SGD | {"data_path": four, "global_batch_size": 4, "image_loss_weight": 0, "align_loss_weight": 1}
    shared |= {"per_device_train_batch_size": 1}
    alone = run(2, bases["tied"], tmp_path / "alone", **shared)
    whole = run(2, bases["tied"], tmp_path / "whole", **shared | {"per_device_train_batch_size": 4})
    words = {"stage": 2, "model_path": bases["tied"], "output_dir": tmp_path / "two", "vae_path": None, "max_steps": 1}
    words |= {"logging_steps": 1, "save_steps": 1, "report_to": "none", "ddp_backend": "gloo", **shared}
    flags = [part for name, value in words.items() if value is not None for part in (f"--{name}", str(value))]
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "train.train_lare"]
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ended = subprocess.run(
        [sys.executable, *command, *flags, "--use_cpu"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    (log,) = [
        one
        for one in json.loads((tmp_path / "two" / "checkpoint-1" / "trainer_state.json").read_text())["log_history"]
        if "loss" in one
    ]
    (expected,), (at_once,) = (
        [one for one in trainer.state.log_history if "loss" in one] for trainer in (alone, whole)
    )
    assert log["align_without_negative"] == expected["align_without_negative"] == 0 and log["align_loss"] > 0.5
    for name in ("loss", "ntp_loss", "align_loss", "text_loss", "grad_norm"):
        assert log[name] == pytest.approx(expected[name], rel=1e-5), name
    assert log["align_loss"] == pytest.approx(at_once["align_loss"], rel=1e-5)
    for found, wanted in (
        (weights_of(tmp_path / "two"), weights_of(tmp_path / "alone")),
        (load_file(tmp_path / "two" / OBJECTIVE), load_file(tmp_path / "alone" / OBJECTIVE)),
    ):
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert_close(
                found[name], wanted[name], atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
    before = weights_of(bases["tied"])
    moved = [name for name, value in weights_of(tmp_path / "two").items() if not torch.equal(value, before[name])]
    assert len(moved) > 10


def test_a_run_without_any_negative_is_refused(bases, run, data, tmp_path):
    with pytest.raises(ValueError, match="the global batch holds 1 row: set `global_batch_size` to 2"):
        run(2, bases["tied"], tmp_path, per_device_train_batch_size=1, global_batch_size=1)
    line = data["steps"].read_text().splitlines()[0]
    twice = data["steps"].with_name("twice.jsonl")
    twice.write_text(f"{line}\n{line}\n")
    with pytest.raises(ValueError, match="all 2 rows of the data have the same reasoning"):
        run(2, bases["tied"], tmp_path, data_path=twice)
    run(2, bases["tied"], tmp_path, data_path=twice, align_loss_weight=0)


def test_the_last_complete_checkpoint(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    for number, text in ((9, "{}"), (10, "{}"), (11, '{"ep'), (12, None)):
        (tmp_path / f"checkpoint-{number}").mkdir()
        if text is not None:
            (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(text)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("stage, kind", [(1, "untied"), (2, "untied"), (4, "tied")])
def test_gradient_checkpointing_changes_nothing(chain_of, run, tmp_path, stage, kind):
    """By plain gradient descent, so that the weights show the gradients."""
    start = chain_of(kind)[stage][0]
    plain = run(stage, start, tmp_path / "plain", **PLAIN_SGD)
    thrifty = run(stage, start, tmp_path / "thrifty", **{CHECKPOINTING: True}, **PLAIN_SGD)
    layers = thrifty.model.model.model.language_model.layers
    assert all(layer.gradient_checkpointing for layer in layers)
    (one,), (other,) = ([log for log in trainer.state.log_history if "loss" in log] for trainer in (plain, thrifty))
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    ours, theirs, moved = plain.model.state_dict(), thrifty.model.state_dict(), 0
    for name in ours:
        assert_close(ours[name], theirs[name], atol=2e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        moved += not torch.equal(ours[name], plain.before[name])
    assert moved >= 4


def test_accumulated_gradients_are_the_mean_of_the_batches(bases, run, data, tmp_path):
    """Of two batches of one row, the second of which has no picture: the projector learns from the first alone."""
    rows = json.loads(data["llava"].read_text())
    folder = data["llava"].parent
    (folder / "two.json").write_text(json.dumps([rows[0], rows[3]]))
    options = PLAIN_SGD | {"per_device_train_batch_size": 1, "data_path": folder / "two.json"}
    trainer = run(1, bases["tied"], tmp_path / "out", **options)
    assert trainer.args.gradient_accumulation_steps == 2 and trainer.state.global_step == 1
    model = LaReForCausalLM.from_pretrained(bases["tied"])
    processor = AutoProcessor.from_pretrained(bases["tied"], trust_remote_code=True)
    objective = LaReObjective(model, processor.image_processor, LatentLossArguments(), False, False)
    collate = LaReCollator(processor)
    losses = [objective(model, **collate([row]))["loss"] for row in read_llava(folder / "two.json")]
    projector = dict(model.model.multi_modal_projector.named_parameters())
    grads = torch.autograd.grad(sum(losses) / 2, list(projector.values()))
    after = trainer.model.model.model.multi_modal_projector.state_dict()
    for (name, before), grad in zip(projector.items(), grads):
        assert bool((grad != 0).any())
        assert_close(before - after[name], grad, atol=1e-6, rtol=1e-4)
    assert trainer.state.log_history[0]["ntp_loss"] == pytest.approx(float(sum(losses).detach()) / 2, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 4])
def test_bfloat16_runs_and_keeps_weights_in_float32(chain_of, run, tmp_path, stage):
    chain = chain_of("tied")
    trainer = run(stage, chain[stage][0], tmp_path / "out", bf16=True, learning_rate=1e-3, warmup_steps=0)
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    assert all(math.isfinite(log[name]) for name in ("loss", "grad_norm"))
    weights = weights_of(tmp_path / "out")
    assert all(value.dtype == torch.float32 for value in weights.values())
    before = weights_of(chain[stage][0])
    assert any(not torch.equal(weights[name], before[name]) for name in weights)


def test_weights_in_bfloat16_and_eager_attention(bases, run, tmp_path):
    options = {"dtype": "bfloat16", "attn_implementation": "eager", "bf16": True, "learning_rate": 1e-2}
    trainer = run(2, bases["untied"], tmp_path / "out", warmup_steps=0, **options)
    assert trainer.model.model.config.get_text_config()._attn_implementation.startswith("eager")
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    weights = weights_of(tmp_path / "out")
    assert all(value.dtype == torch.bfloat16 for value in weights.values())


def test_an_unreadable_picture_stops_the_run_by_name_unless_the_user_lets_it_go(bases, run, data, tmp_path, capsys):
    rows = json.loads(data["llava"].read_text())
    folder = data["llava"].parent
    (folder / "broken.png").write_bytes(b"nothing")
    (folder / "broken.json").write_text(json.dumps([rows[0], rows[1] | {"image": "broken.png"}, rows[2]]))
    options = {"data_path": folder / "broken.json"}
    with pytest.raises(ValueError, match="Entry 1 of .*broken.png cannot be read"):
        run(1, bases["tied"], tmp_path / "out", **options)
    trainer = run(1, bases["tied"], tmp_path / "out", drop_incomplete=True, **options)
    assert len(trainer.train_dataset) == 2
    assert "1 rows of" in capsys.readouterr().out


def test_all_rows_are_checked_before_the_first_step(bases, run, data, tmp_path, capsys):
    """A row over `max_length` was an error of the data loader, whenever it came to it."""
    with pytest.raises(ValueError, match="tokens, but `max_length` is 20"):
        run(1, bases["tied"], tmp_path / "out", max_length=20)
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(ValueError, match="All .* rows have more tokens"):
        run(1, bases["tied"], tmp_path / "out", max_length=5, long_rows="drop")
