"""The gradients of words and of latents in the language model: apart, of like length, and the same by any way of batching."""

import copy
import math

import pytest
import torch
from conftest import build_model, picture
from helpers import assert_near
from test_grpo import JOINT, ROLLOUT, first_letter, fond_of_latents, sample_of, train

from benchmarks.gradient_shares import measure_norms
from train.deeplatent.rl.gradients import ApartGradients
from train.deeplatent.rl.grpo_trainer import GRPOTrainingArguments
from train.deeplatent.rl.objective import ObjectiveArguments


@pytest.fixture(scope="module")
def samples() -> list:
    return [sample_of("what colour?", picture(56, 84, 1)), sample_of("hello"), sample_of("where?", picture(56, 56, 2))]


def filled(words: list[float], latents: list[float] | None, limit: float):
    """One weight with a gradient of words and one of latents."""
    weight = torch.nn.Parameter(torch.zeros(len(words)))
    apart = ApartGradients(limit)
    (weight @ torch.tensor(words)).backward()
    if latents is not None:
        with apart.of_latents([weight]):
            (weight @ torch.tensor(latents)).backward()
    assert weight.grad.tolist() == words
    return weight, apart


@pytest.mark.parametrize(
    "words, latents, limit, merged, scale",
    [
        ([3.0, 4.0], [0.0, 500.0], 1.0, [3.0, 9.0], 0.01),
        ([3.0, 4.0], [0.0, 500.0], 2.0, [3.0, 14.0], 0.02),
        ([3.0, 4.0], [0.0, 0.5], 1.0, [3.0, 4.5], 1.0),  # shorter than the words': left alone
        ([3.0, 4.0], None, 1.0, [3.0, 4.0], 1.0),
        ([0.0, 0.0], [0.0, 7.0], 1.0, [0.0, 7.0], 1.0),  # no words to outweigh
    ],
)
def test_the_latents_gradient_is_scaled_to_the_words(words, latents, limit, merged, scale):
    weight, apart = filled(words, latents, limit)
    norms = apart.merge([weight], [])
    assert_near(weight.grad, torch.tensor(merged))
    assert float(norms["scale"]) == pytest.approx(scale) and float(norms["words"]) == pytest.approx(math.hypot(*words))
    assert float(norms["latents"]) == pytest.approx(math.hypot(*(latents or [0.0])))
    assert not apart.latents  # the next step begins anew


def test_an_overflow_is_seen_by_the_scaler_of_float16():
    weight, apart = filled([3.0, 4.0], [0.0, math.inf], 1.0)
    apart.merge([weight], [])
    assert not weight.grad.isfinite().all()


@pytest.mark.parametrize("width", [32, 128, 512])
def test_words_and_latents_are_within_a_factor_of_ten_at_any_width(width):
    """What the default does, and that it is needed: left alone the latents outweigh the words, more so in wide models."""
    norms = measure_norms(width, "sum", ObjectiveArguments().latent_gradient_limit)
    assert norms["latents"] > width / 2 * norms["words"] > 0
    assert 0.1 < norms["scale"] * norms["latents"] / norms["words"] < 10


def step(tokenizer, processor, samples, tmp_path, limit: float, **fields):
    """The weights before and after one plain step without clipping, and what was logged."""
    model = fond_of_latents(build_model(tokenizer))
    before = copy.deepcopy(model.state_dict())
    settings = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1e-2, "weight_decay": 0.0} | fields
    objective = ObjectiveArguments(latent_gradient_limit=limit)
    trainer = train(model, processor, samples, tmp_path, first_letter, objective, **settings)
    change = {name: weight - before[name] for name, weight in model.state_dict().items()}
    return change, trainer.state.log_history[0]


def test_a_step_is_that_of_the_words_and_as_much_of_the_latents(tokenizer, processor, samples, tmp_path):
    """Kept apart and not limited it is the one backward pass; limited, the language model's part of the latents shrinks."""
    together, _ = step(tokenizer, processor, samples, tmp_path, 0.0)
    free, logged = step(tokenizer, processor, samples, tmp_path, 1e9)
    limited, log = step(tokenizer, processor, samples, tmp_path, 1.0)
    half, _ = step(tokenizer, processor, samples, tmp_path, 0.5)
    assert logged["latent_gradient_scale"] == 1 and log["latent_gradient_share"] == pytest.approx(0.5, abs=1e-3)
    assert log["grad_norm_latents"] > 3 * log["grad_norm_words"] > 0
    assert logged["latent_gradient_share"] > 0.75
    for name, change in together.items():
        assert (free[name] - change).norm() <= 1e-3 * change.norm() + 1e-7, name
        if "modulation" in name:  # its own gradient is nobody's to outweigh
            assert torch.equal(limited[name], free[name])
    moved = [name for name, change in together.items() if "language_model" in name and change.any()]
    scale, other = log["latent_gradient_scale"], log["latent_gradient_scale"] / 2
    parts = [(free[name] - limited[name]).norm() / (1 - scale) / 1e-2 for name in (*moved, "lm_head.weight")]
    assert float(torch.stack(parts).norm()) == pytest.approx(log["grad_norm_latents"], rel=1e-2)
    for name in moved:  # words + s * latents, at two values of s
        latents = (free[name] - limited[name]) / (1 - scale)
        expected = free[name] - (1 - other) * latents
        assert (half[name] - expected).norm() <= 1e-2 * expected.norm() + 1e-7, name


def test_micro_batches_and_accumulation_leave_the_limited_step(tokenizer, processor, samples, tmp_path):
    """The norms are those of the whole step."""
    whole, _ = step(tokenizer, processor, samples, tmp_path, 1.0, micro_batch_size=9)
    parts, _ = step(tokenizer, processor, samples, tmp_path, 1.0, micro_batch_size=2)
    assert any(change.abs().max() > 1e-5 for change in whole.values())
    for name, change in whole.items():
        assert (parts[name] - change).norm() <= 1e-3 * change.norm() + 1e-7, name


def test_a_missing_reward_is_counted_and_ends_nothing(tokenizer, processor, samples, tmp_path):
    def own(found):
        rewards = first_letter(found)
        return [None if number % 3 == 1 else reward for number, reward in enumerate(rewards)]

    own.may_be_missing = True
    model = fond_of_latents(build_model(tokenizer))
    trainer = train(model, processor, samples, tmp_path, own)
    log = trainer.state.log_history[0]
    assert log["reward_missing"] == pytest.approx(1 / 3) and math.isfinite(log["reward_std"])
    assert math.isfinite(log["loss"]) and math.isfinite(log["grad_norm"])
    missing = [trajectory for trajectory in trainer.batches[0] if trajectory.reward is None]
    assert len(missing) == 3 and all(trajectory.advantage == 0 for trajectory in missing)
    present = [one.reward for one in trainer.batches[0] if one.reward is not None]
    assert log["reward"] == log["reward_own"] == pytest.approx(sum(present) / 6)


def arguments(tmp_path, world_size: int = 1, **fields) -> GRPOTrainingArguments:
    class Launched(GRPOTrainingArguments):
        world_size = property(lambda self: launched)

    launched = world_size
    return Launched(output_dir=str(tmp_path), use_cpu=True, report_to="none", **fields)


@pytest.mark.parametrize(
    "world_size, fields, batches, questions",
    [
        (1, {}, 8, 64),  # the paper's 64, whatever the number of processes
        (8, {}, 1, 64),
        (4, {"per_device_train_batch_size": 2}, 8, 64),
        (2, {"global_batch_size": 32}, 2, 32),
        (2, {"gradient_accumulation_steps": 3}, 3, 48),  # as before
        (2, {"gradient_accumulation_steps": 2, "global_batch_size": 32}, 2, 32),
    ],
)
def test_the_batch_is_global(tmp_path, world_size, fields, batches, questions):
    found = arguments(tmp_path, world_size, **fields)
    assert (found.gradient_accumulation_steps, found.global_batch_size) == (batches, questions)


@pytest.mark.parametrize(
    "world_size, fields, message",
    [
        (3, {}, "multiple of the 24 questions that 3 processes sample at once, 8 each .*got 64"),
        (16, {}, "multiple of the 128 questions"),
        (1, {"global_batch_size": 0}, "got 0"),
        (
            2,
            {"gradient_accumulation_steps": 3, "global_batch_size": 32},
            "is 3, but a `global_batch_size` of 32 takes 2",
        ),
    ],
)
def test_batches_that_cannot_be(tmp_path, world_size, fields, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, world_size, **fields)


@pytest.mark.parametrize("fields", [{"kl_average": "sum"}, {"latent_gradient_limit": -1.0}])
def test_objectives_that_cannot_be_balanced(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        ObjectiveArguments(**fields)


def test_the_defaults_are_said(tmp_path):
    assert JOINT.latent_gradient_limit == 1 and JOINT.kl_average == "kind" and ROLLOUT.num_generations == 3
