"""Teacher states on disk: equal to live ones, whole after any interruption, refused when they are stale."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import build_model, picture, user_turn
from helpers import assert_near
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from train import cache_teacher_states
from train.cache_teacher_states import build_parser
from train.deeplatent import teacher_states
from train.deeplatent.collator import DeepLatentCollator
from train.deeplatent.distillation import SftObjective
from train.deeplatent.teacher_states import (
    TeacherCache,
    choose_layers,
    hash_weights,
    make_fingerprint,
    pool_states,
    read_hidden_states,
)
from train.deeplatent.trajectories import Trajectories


LAYERS = (1, 2, 3)
SIZES = [[(84, 56)], [], [(56, 56), (28, 84)], [(200, 100)], [(28, 28), (56, 28), (40, 90)]]


@pytest.fixture(scope="module")
def folder(tokenizer, processor, tmp_path_factory) -> Path:
    """An SFT-1 checkpoint."""
    folder = tmp_path_factory.mktemp("model")
    build_model(tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Samples with none to three assistant images."""
    folder, rows = tmp_path_factory.mktemp("data"), []
    for number, sizes in enumerate(SIZES):
        picture(56, 84, number).save(folder / f"{number}.png")
        content = [{"type": "text", "text": f"look {number}"}]
        for part, size in enumerate(sizes):
            picture(*size, 10 * number + part).save(folder / f"{number}-{part}.png")
            content.append({"type": "image", "image": f"{number}-{part}.png"})
        asked = user_turn(f"what is {number}?", f"{number}.png")
        rows.append(
            {"messages": [*asked, {"role": "assistant", "content": [*content, {"type": "text", "text": "red"}]}]}
        )
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "data.jsonl"


def settings_of(folder, data, output, **settings) -> dict:
    paths = {"model": str(folder), "data_path": str(data), "output": str(output)}
    defaults = {"samples_per_shard": 2, "states_dtype": "float32", "align_layers": list(LAYERS), "device": "cpu"}
    return defaults | paths | settings


def cache(*paths, **settings) -> Path:
    arguments = settings_of(*paths, **settings)
    cache_teacher_states.main(*build_parser().parse_dict(arguments))
    return Path(arguments["output"])


def fingerprint(model, folder, data, processor, layers=LAYERS, **settings) -> dict:
    collator = DeepLatentCollator(processor, model.config, "latent", **settings)
    return make_fingerprint(Trajectories(data), folder, processor, collator.sizes, layers)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def states(folder, data, tmp_path_factory) -> Path:
    return cache(folder, data, tmp_path_factory.mktemp("states"))


def test_layers_are_evenly_spaced_and_end_with_the_last():
    assert choose_layers(28) == (7, 14, 21, 28) and choose_layers(36) == (9, 18, 27, 36)
    assert choose_layers(3) == (1, 2, 3) and choose_layers(2) == (1, 2) and choose_layers(6) == (2, 3, 4, 6)
    assert choose_layers(28, [28, 3]) == (3, 28)
    for wrong in ([], [0], [29], [3, 3]):
        with pytest.raises(ValueError, match=r"`align_layers` must be distinct numbers within 1\.\.28"):
            choose_layers(28, wrong)


def test_states_are_the_hidden_states_of_the_pictures_in_raster_order(shared_model, processor, data):
    """The last layer after the final norm; the earlier ones before it."""
    samples = list(Trajectories(data))
    collator = DeepLatentCollator(processor, shared_model.config, "image")
    inputs = collator.teacher_inputs([collator.open(samples[2])])
    columns, lengths = inputs.pop("columns"), inputs.pop("lengths")
    assert lengths.tolist() == [4, 3] and int(columns.sum()) == 7
    found = read_hidden_states(shared_model, inputs, LAYERS, columns)
    assert found.shape == (3, 7, 64) and not found.requires_grad
    outputs = []
    hooks = [
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
        for layer in shared_model.model.language_model.layers
    ]
    logits = shared_model(**inputs).logits
    for hook in hooks:
        hook.remove()
    images = (inputs["input_ids"] == processor.image_token_id)[0].nonzero().flatten()[-7:]
    assert_near(found[0], outputs[0][0, images])
    assert_near(found[1], outputs[1][0, images])
    assert_near(shared_model.lm_head(found[2]), logits[0, images])


def test_cached_states_equal_live_ones(model, processor, folder, data, states):
    """Exactly in float32; in bfloat16 as rounded; in a ragged batch up to the order of sums."""
    samples = list(Trajectories(data))
    cached = TeacherCache(states, fingerprint(model, folder, data, processor))
    read = DeepLatentCollator(processor, model.config, "latent", teacher_states=cached)
    ask = DeepLatentCollator(processor, model.config, "latent", has_live_teacher=True)
    teacher = AutoModel.from_pretrained(folder, trust_remote_code=True)
    objective = SftObjective(model.config, 4.0, LAYERS, teacher)
    for sample, sizes in zip(samples, SIZES):
        live = objective.ask_teacher(**ask([sample])["teacher_inputs"])
        assert (live is None) == (not sizes)
        if sizes:
            assert torch.equal(read([sample])["teacher_states"], live)
    assert "teacher_states" not in read([samples[1]])
    both = read(samples), ask(samples)
    assert_near(both[0]["teacher_states"], objective.ask_teacher(**both[1]["teacher_inputs"]))
    losses = [objective(model.eval(), **batch)["losses"]["align_loss"] for batch in both]
    assert_near(*losses)
    assert losses[0] > 0.1 and not list(objective.parameters()) and not objective.state_dict()
    assert all(weight.grad is None for weight in teacher.parameters())


def test_states_are_rounded_to_bfloat16_by_default(folder, data, states, tmp_path):
    exact, rounded = states, cache(folder, data, tmp_path / "out", states_dtype="bfloat16")
    for path in sorted(rounded.glob("*.safetensors")):
        tensors, expected = load_file(path), load_file(exact / path.name)
        assert tensors.keys() == expected.keys() and tensors
        assert all(torch.equal(value, expected[name].bfloat16()) for name, value in tensors.items())
    assert build_parser().parse_dict({"model": "m", "data_path": "d", "output": "o"})[0].states_dtype == "bfloat16"


def test_the_size_is_said_before_anything_is_written(folder, data, tmp_path, capsys, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_teacher_states, "load_model", stop)
    with pytest.raises(KeyboardInterrupt):
        cache(folder, data, tmp_path)
    tokens = 6 + 7 + 8 + (1 + 2 + 3)
    said = capsys.readouterr().out
    assert f"5 samples with {tokens} image tokens" in said and not list(tmp_path.glob("*.safetensors"))
    assert f"{tokens * 3 * 64 * 4 / 1e9:.3f} GB in 3 shards" in said


def test_a_stale_cache_is_refused(model, processor, folder, data, states, tmp_path):
    good = fingerprint(model, folder, data, processor)
    assert TeacherCache(states, good).read(0).shape == (3, 6, 64)
    other_data, other_model = shutil.copytree(data.parent, tmp_path / "data"), shutil.copytree(folder, tmp_path / "m")
    picture(84, 56, 99).save(other_data / "0-0.png")
    weights = load_file(other_model / "model.safetensors")
    name = next(name for name in weights if "layers.1" in name and "q_proj.weight" in name)
    weights[name][0, 0] += 1
    save_file(weights, other_model / "model.safetensors", metadata={"format": "pt"})
    changed = {
        "data": fingerprint(model, folder, other_data / "data.jsonl", processor),
        "model": fingerprint(model, other_model, data, processor),
        "settings and layers": fingerprint(model, folder, data, processor, layers=(1, 3)),
        "settings": fingerprint(model, folder, data, processor, max_question_pixels=56 * 56),
    }
    model.config.latent_grid_size = 3
    changed["settings "] = fingerprint(model, folder, data, processor)
    for what, stale in changed.items():
        with pytest.raises(ValueError, match=f"were made from other {what.strip()}:"):
            TeacherCache(states, stale)
    for stale in (folder, other_model):
        before = contents(states)
        with pytest.raises(ValueError, match="states-00000.safetensors were made from other"):
            cache(stale, data, states, **({"states_dtype": "bfloat16"} if stale == folder else {}))
        assert contents(states) == before


def test_latent_weights_and_the_cut_into_files_play_no_part(folder, tmp_path, model):
    expected = hash_weights(folder)
    weights = load_file(folder / "model.safetensors")
    changed = {name: value + 1 if name.startswith("latent") else value for name, value in weights.items()}
    names = sorted(changed)
    for part in range(2):
        save_file({name: changed[name] for name in names[part::2]}, tmp_path / f"model-{part}.safetensors")
    assert hash_weights(tmp_path) == expected
    with pytest.raises(ValueError, match="holds no weights"):
        hash_weights(tmp_path / "none")


def test_an_unfinished_cache_is_refused(model, processor, folder, data, states, tmp_path):
    cut = shutil.copytree(states, tmp_path / "cut")
    (cut / "index.json").unlink()
    with pytest.raises(ValueError, match="holds no finished teacher states"):
        TeacherCache(cut, fingerprint(model, folder, data, processor))


@pytest.mark.parametrize("place", ["before the second shard", "while the second shard is written"])
def test_killed_and_resumed_equals_uninterrupted(folder, data, states, tmp_path, place):
    """By SIGKILL, after which nothing is tidied up."""

    def run_until_killed():
        calls = []

        def kill_at(function, number):
            def call(*args):
                calls.append(None)
                if len(calls) > number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args)

            return call

        if place.startswith("before"):
            teacher_states.TeacherCacheWriter.write = kill_at(teacher_states.TeacherCacheWriter.write, 1)
        else:
            os.replace = kill_at(os.replace, 1)  # the second shard is whole, but under another name
        cache(folder, data, tmp_path)

    process = multiprocessing.get_context("fork").Process(target=run_until_killed)
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    left = {path.name for path in tmp_path.iterdir()}
    unfinished = {name for name in left if name.startswith("states-00001.partial-")}
    assert left - unfinished - {".states-00001.safetensors.lock"} == {"states-00000.safetensors"}
    assert len(unfinished) == place.startswith("while")
    assert contents(cache(folder, data, tmp_path)) == contents(states)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in states.iterdir()}


def test_an_error_in_the_middle_of_a_shard_leaves_what_was_done(folder, data, states, tmp_path, monkeypatch):
    read, calls = cache_teacher_states.read_hidden_states, []

    def fail(*args):
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("lost the GPU")
        return read(*args)

    with monkeypatch.context() as patch:
        patch.setattr(cache_teacher_states, "read_hidden_states", fail)
        with pytest.raises(RuntimeError):
            cache(folder, data, tmp_path)
    done = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert list(done) == ["states-00000.safetensors"]
    assert contents(cache(folder, data, tmp_path)) == contents(states)
    assert (tmp_path / "states-00000.safetensors").stat().st_mtime_ns == done["states-00000.safetensors"]


def test_a_full_disk_is_named_and_what_was_written_stays(folder, data, states, tmp_path, monkeypatch):
    sync, files = os.fsync, []

    def full(file):
        files.append(os.fstat(file).st_ino)
        if len(files) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            OSError, match="samples 2 to 3 could not be written .No space left.*1 of 3 shards"
        ) as error:
            cache(folder, data, tmp_path)
    assert error.value.errno == errno.ENOSPC
    (left,) = tmp_path.iterdir()
    assert left.name == "states-00000.safetensors"
    assert left.stat().st_ino == files[0]  # the file that was synced, and no copy of it
    assert contents(cache(folder, data, tmp_path)) == contents(states)


def test_processes_share_the_work(folder, data, states, tmp_path, capsys, monkeypatch):
    cache(folder, data, tmp_path, num_shards=2, shard=1)
    assert [path.name for path in tmp_path.iterdir()] == ["states-00001.safetensors"]
    assert "Other processes still write" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    cache(folder, data, tmp_path)
    assert contents(tmp_path) == contents(states)
    with pytest.raises(ValueError, match="`shard` must lie within 0 and `num_shards` - 1, got 2 of 2"):
        cache(folder, data, tmp_path, shard=2)


def test_a_batch_of_samples_gives_the_states_of_each(folder, data, states, tmp_path):
    batched = cache(folder, data, tmp_path, batch_size=2)
    for path in states.glob("*.safetensors"):
        expected = load_file(path)
        assert load_file(batched / path.name).keys() == expected.keys()
        for name, value in load_file(batched / path.name).items():
            assert_near(value, expected[name])


def test_states_that_do_not_fit_their_sample_are_named(model, processor, folder, data, states):
    samples = list(Trajectories(data))
    cached = TeacherCache(states, fingerprint(model, folder, data, processor))
    collator = DeepLatentCollator(processor, model.config, "latent", teacher_states=cached)
    wrong = samples[0] | {"number": 2}
    with pytest.raises(ValueError, match="Line 1 of .*have 6 tokens, but the teacher's states are 7"):
        collator([wrong])


def test_autoregressive_latents_learn_from_pooled_states(model, processor, folder, data, states):
    model.config.latent_mode = "autoregressive"
    samples = [Trajectories(data)[2]]
    cached = TeacherCache(states, fingerprint(model, folder, data, processor))
    pooled = DeepLatentCollator(processor, model.config, "latent", teacher_states=cached)(samples)["teacher_states"]
    first, second = cached.read(2).split([4, 3], dim=1)
    assert_near(pooled, torch.cat([pool_states(first, 3), second], dim=1))
    assert_near(pool_states(first, 2), first.unflatten(1, (2, 2)).mean(dim=2))
    ask = DeepLatentCollator(processor, model.config, "latent", has_live_teacher=True)(samples)["teacher_inputs"]
    teacher = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert_near(SftObjective(model.config, 4.0, LAYERS, teacher).ask_teacher(**ask), pooled)
