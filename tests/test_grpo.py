"""GRPO over words and latents: what was sampled is scored exactly, and only what may learn does."""

import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import build_model, picture
from helpers import assert_near, enable_checkpointing
from torch.distributions import Categorical, Normal, kl_divergence
from transformers import AutoModel, HfArgumentParser

from modeling_latentvlm.generation_checks import LatentBlockLimits
from train.common.training_model import TrainingModel
from train.data.reasoning_data import ReasoningSample
from train.deeplatent.rl import grpo_trainer, rollouts
from train.deeplatent.rl.actions import (
    act,
    categorical_divergence,
    clipped_objective,
    gaussian_divergence,
    group_advantages,
    limit_logits,
    log_density,
    log_density_ratio,
    ratio_of,
)
from train.deeplatent.rl.grpo_trainer import GRPOTrainer, GRPOTrainingArguments, RepeatedChunks
from train.deeplatent.rl.objective import GRPOObjective, ObjectiveArguments
from train.deeplatent.rl.policy import AdapterArguments, check_policy, prepare_policy
from train.deeplatent.rl.progress import describe_progress
from train.deeplatent.rl.rescoring import Words, replay, score_words
from train.deeplatent.rl.rewards import RewardArguments, WeightedRewards
from train.deeplatent.rl.rollouts import QuestionCollator, RolloutArguments, roll_out
from train.train_deeplatent_rl import ARGUMENTS, main


ROLLOUT = RolloutArguments(num_generations=3, temperature=0.5, max_new_tokens=9, max_latent_blocks=3)
JOINT = ObjectiveArguments()


def sample_of(question: str, *images) -> ReasoningSample:
    return ReasoningSample(list(images), question, [], "red", f"Line of {question!r}")


@pytest.fixture(scope="module")
def samples() -> list[ReasoningSample]:
    """Rows of unequal length, with one image, two images of unequal size, and none."""
    return [
        sample_of("what colour?", picture(56, 84, 1)),
        sample_of("which of the two is the small round one?", picture(112, 112, 2), picture(56, 28, 3)),
        sample_of("hello"),
    ]


@pytest.fixture(scope="module")
def questions(processor, samples) -> dict:
    return QuestionCollator(processor)(samples)


def fond_of_latents(model):
    """Make a model write `<latent>`, image tokens and ends more often than a random one does."""
    config = model.config
    with torch.no_grad():
        model.lm_head.weight[config.latent_start_token_id] *= 2.3
        model.lm_head.weight[config.image_token_id] *= 2.5
        model.lm_head.weight[config.get_text_config().eos_token_id] *= 1.5
        for part in (model.latent_blocks.query_modulation, model.latent_blocks.image_modulation):
            # Where sigma is tiny beside the mean, float32 leaves few digits of a density to compare.
            part.down_proj.weight *= 0.05
            part.down_proj.bias *= 0.1
            part.down_proj.bias[-config.get_text_config().hidden_size :] -= 1
    return model


@pytest.fixture(scope="module")
def policy(tokenizer):
    """For tests that leave its weights alone."""
    return fond_of_latents(build_model(tokenizer))


@pytest.fixture(scope="module")
def trajectories(policy, processor, questions) -> list:
    found = roll_out(policy, processor, questions, ROLLOUT, seed=6)
    for number, trajectory in enumerate(found):
        trajectory.advantage = (-1) ** number * (1.0 + number / 4)
    return found


def moved(model, by: float = 0.02, only: str = ""):
    """A copy with other weights."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if only in name and "visual" not in name:
                parameter += by * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
    return other


def score(model, trajectories, reference=None, temperature=ROLLOUT.temperature):
    words = Words.of(trajectories, model.config, ROLLOUT, model.device)
    expected = None if reference is None else replay(reference, trajectories).hidden
    return score_words(model, replay(model, trajectories).hidden, words, temperature, reference, expected)


# Distributions


@pytest.fixture
def gaussians():
    base = torch.randn(20, 8) * 3
    one, two = torch.randn(2, 3, 8) * 0.3
    return base, one, two


def normal_of(base, statistics) -> Normal:
    gamma, beta, log_sigma = statistics.double()
    base = base.double()
    return Normal((1 + gamma) * base + beta, log_sigma.exp() * base.square().mean().sqrt())


def test_an_action_has_the_mean_and_the_spread_it_says(gaussians):
    base, statistics, _ = gaussians
    drawn = torch.stack([act(base, statistics, seed, 0, "query") for seed in range(4000)])
    expected = normal_of(base, statistics)
    assert_near(drawn.mean(0).double(), expected.mean, 0.3)
    assert_near(drawn.std(0).double(), expected.stddev.expand(20, 8), 0.3)


def test_noise_depends_on_every_number_and_on_nothing_else(gaussians):
    base, statistics, _ = gaussians
    first = act(base, statistics, 1, 0, "query")
    torch.rand(5)
    assert torch.equal(first, act(base, statistics, 1, 0, "query"))
    for other in ((2, 0, "query"), (1, 1, "query"), (1, 0, "image")):
        assert not torch.equal(first, act(base, statistics, *other))


def test_densities_and_divergence_are_those_of_torch(gaussians):
    base, one, two = gaussians
    action = act(base, one, 3, 0, "query")
    p, q = normal_of(base, one), normal_of(base, two)
    assert_near(log_density(action, base, one), p.log_prob(action.double()).sum(), 1e-4)
    expected = (q.log_prob(action.double()) - p.log_prob(action.double())).sum()
    assert_near(log_density_ratio(action, base, two, one), expected, 1e-4)
    assert_near(gaussian_divergence(base, two, one), kl_divergence(q, p).sum(-1).mean(), 1e-4)
    assert log_density_ratio(action, base, one, one) == 0 and gaussian_divergence(base, one, one) == 0


def test_the_ratio_of_millions_of_elements_keeps_its_digits():
    """A small step of the policy: two summed densities of float32 subtracted are wrong by more than the ratio itself."""
    base, statistics = torch.randn(2048, 1024), torch.zeros(3, 1024)
    statistics[2] = -4
    action, near = act(base, statistics, 0, 0, "image"), statistics + 1e-7
    p, q = normal_of(base, near), normal_of(base, statistics)
    expected = (p.log_prob(action.double()) - q.log_prob(action.double())).sum()
    error = (log_density_ratio(action, base, near, statistics) - expected).abs()
    naive = log_density(action, base, near).float() - log_density(action, base, statistics).float()
    assert error < 0.05 * expected.abs()
    assert (naive - expected).abs() > 5 * error


def test_divergence_of_words_is_that_of_torch(policy):
    logits = torch.randn(2, 6, policy.config.get_text_config().vocab_size)
    full, forced = torch.tensor([0, 1, 0, 1, 0, 0]).bool(), torch.tensor([0, 0, 0, 0, 1, 0]).bool()
    one, two = (limit_logits(part, policy.config, full, forced).log_softmax(-1) for part in logits)
    one.requires_grad_()
    found = categorical_divergence(one, two)
    allowed = [row > -float("inf") for row in one]
    expected = [
        kl_divergence(Categorical(logits=p[kept]), Categorical(logits=q[kept]))
        for p, q, kept in zip(one, two, allowed)
    ]
    assert_near(found, torch.stack(expected))
    found.sum().backward()
    assert one.grad.isfinite().all()


@pytest.mark.parametrize("least, most", [(0, 2), (1, 3), (2, 2), (0, 0)])
def test_known_tokens_are_limited_as_written_ones(policy, trajectories, least, most):
    arguments = RolloutArguments(min_latent_blocks=least, max_latent_blocks=most)
    for trajectory in trajectories:
        words = Words.of([trajectory], policy.config, arguments, policy.device)
        logits = torch.randn(len(trajectory.tokens), policy.config.get_text_config().vocab_size)
        found = limit_logits(logits, policy.config, words.is_full, words.is_forced)
        can_open = torch.tensor([trajectory.prompt.images is not None])
        for at in range(len(logits)):
            limits = LatentBlockLimits(0, policy.block_tokens, can_open, least, most)
            assert torch.equal(found[at : at + 1], limits(trajectory.tokens[None, :at], logits[at : at + 1].clone()))


# What was sampled


def test_rows_differ_in_what_they_hold(trajectories, policy):
    """Otherwise the tests below would prove less than they say."""
    assert {len(trajectory.grids) for trajectory in trajectories} == {0, 1, 2, 3}
    assert len({tuple(grid) for trajectory in trajectories for grid in trajectory.grids}) > 1
    assert len({len(trajectory.tokens) for trajectory in trajectories}) > 1
    assert any(trajectory.num_latent_tokens > len(trajectory.grids) for trajectory in trajectories)
    assert any((trajectory.tokens == policy.config.image_token_id).any() for trajectory in trajectories)


def watch_generate(monkeypatch, model) -> list:
    """Keep what `generate` returns, scores and trace included."""
    outputs, generate = [], model.generate

    def watched(*args, generation_config, **kwargs):
        generation_config.update(output_scores=True)
        outputs.append(generate(*args, generation_config=generation_config, output_latents=True, **kwargs))
        return outputs[-1]

    monkeypatch.setattr(model, "generate", watched)
    return outputs


def test_words_are_scored_as_they_were_sampled(monkeypatch, policy, processor, questions, trajectories):
    """Temperature, forbidden tokens, latents, positions: all of it stands in the scores that `generate` sampled from."""
    monkeypatch.setattr(policy.generation_config, "repetition_penalty", 1.3)  # as Qwen's checkpoints have
    monkeypatch.setattr(policy.generation_config, "top_k", 3)
    outputs = watch_generate(monkeypatch, policy)
    again = roll_out(policy, processor, questions, ROLLOUT, seed=6)
    assert policy.generation_config.top_k == 3
    found = score(policy, trajectories)[0].split([len(trajectory.tokens) for trajectory in trajectories])
    for row, (trajectory, log_probs) in enumerate(zip(again, found)):
        assert torch.equal(trajectory.tokens, trajectories[row].tokens)
        written = torch.stack([outputs[0].scores[at][row] for at in range(len(trajectory.tokens))]).log_softmax(-1)
        assert_near(log_probs, written.gather(1, trajectory.tokens[:, None])[:, 0], 1e-4)


def test_actions_are_those_of_the_rollout_bit_for_bit(monkeypatch, policy, processor, questions, trajectories):
    drawn = {}

    def watched(base, statistics, seed, block, kind):
        drawn[seed, block, kind] = act(base, statistics, seed, block, kind)
        return drawn[seed, block, kind]

    monkeypatch.setattr(rollouts, "act", watched)
    roll_out(policy, processor, questions, ROLLOUT, seed=6)
    seen = 0
    for batch in (trajectories, trajectories[4:6], trajectories[:1]):
        actions = replay(policy, batch).actions
        for row, trajectory in enumerate(batch):
            assert set(actions.statistics[row]) == set(trajectory.statistics)
            for place in trajectory.statistics:
                assert torch.equal(actions.action(row, *place), drawn[(trajectory.seed, *place)])
                seen += 1
    assert seen > len(drawn) > 0


def test_latents_are_those_of_the_rollout_bit_for_bit(monkeypatch, policy, processor, samples):
    """Rows that open their block together are one batch then and now, so not even the order of a sum differs."""
    arguments = RolloutArguments(num_generations=2, max_new_tokens=4, min_latent_blocks=1, max_latent_blocks=1)
    outputs = watch_generate(monkeypatch, policy)
    found = roll_out(policy, processor, QuestionCollator(processor)(samples[1:2]), arguments, seed=3)
    then = outputs[0].latent_trace.steps
    now = replay(policy, found, output_latents=True).trace.steps
    assert len(then) == len(now) == 2
    for step, other in zip(then, now):
        assert torch.equal(step.latents, other.latents)
    assert not torch.equal(then[0].latents, then[1].latents)


def test_a_rollout_is_a_function_of_its_seed(policy, processor, questions, trajectories):
    before = torch.get_rng_state()
    torch.rand(3)
    again = roll_out(policy, processor, questions, ROLLOUT, seed=6)
    other = roll_out(policy, processor, questions, ROLLOUT, seed=7)
    torch.set_rng_state(before)
    assert [one.tokens.tolist() for one in again] == [one.tokens.tolist() for one in trajectories]
    assert [one.tokens.tolist() for one in other] != [one.tokens.tolist() for one in trajectories]
    assert not policy.training


def test_answers_that_were_cut_off_are_known_and_told(
    policy, tokenizer, processor, samples, trajectories, tmp_path, monkeypatch
):
    ends = policy.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    assert [one.is_truncated for one in trajectories] == [int(one.tokens[-1]) not in ends for one in trajectories]
    told = []
    monkeypatch.setattr(grpo_trainer.logger, "warning", told.append)
    short = replace(ROLLOUT, max_new_tokens=3)  # of no other test: warned once is warned for good
    trainer = train(build_model(tokenizer), processor, samples, tmp_path, first_letter, rollout=short, max_steps=2)
    shares = [entry["truncated"] for entry in trainer.state.log_history if "truncated" in entry]
    assert len(shares) == 2 and min(shares) >= 0.25
    assert len(told) == 1 and "`max_new_tokens`=3," in told[0]


# The objective


def objective_of(reference=None, **fields) -> GRPOObjective:
    return GRPOObjective(ObjectiveArguments(**fields), ROLLOUT, reference)


def mean_of(sums: dict, name: str) -> float:
    return float(sums[name][0] / sums[name][1])


def test_before_the_first_update_ratios_are_one_and_divergences_zero(policy, trajectories):
    """With old scores noted without gradients, as for a later update, on a ragged batch of 0 to 3 blocks."""
    reference = copy.deepcopy(policy)
    objective, noted = objective_of(reference), copy.deepcopy(trajectories)
    with torch.no_grad():
        old = objective(policy, noted, only_scores=True)
    for trajectory, log_probs, statistics in zip(noted, old["log_probs"], old["statistics"]):
        trajectory.old_log_probs, trajectory.old_statistics = log_probs, statistics
    sums = objective(policy, noted)["sums"]
    for kind in ("text", "latent"):
        # Not to the last bit: where a copy of a weight lies in memory can change the order of a sum.
        assert mean_of(sums, f"ratio_{kind}") == pytest.approx(1, abs=1e-5) and mean_of(sums, f"clip_{kind}") == 0
        assert mean_of(sums, f"kl_{kind}") == pytest.approx(0, abs=1e-6)
    assert sums["ratio_latent"][1] == 2 * sum(len(trajectory.grids) for trajectory in trajectories)
    assert sums["ratio_text"][1] == sum(len(trajectory.tokens) for trajectory in trajectories)


def naive_loss(policy, old, reference, trajectory, variant: str, how: str, average: str) -> torch.Tensor:
    """The objective of one trajectory, written out in float64 with the distributions of torch."""
    words = [score(model, [trajectory], reference)[:2] for model in (policy, old)]
    runs = {
        name: replay(model, [trajectory]).actions
        for name, model in (("now", policy), ("old", old), ("ref", reference))
    }
    ratios = list((words[0][0] - words[1][0]).double().exp())
    divergences = []
    for place in trajectory.statistics if variant == "joint" else ():
        base, action = runs["now"].bases[0][place], runs["now"].action(0, *place).double()
        now, then, ref = (normal_of(base, runs[name].statistics[0][place]) for name in ("now", "old", "ref"))
        difference = now.log_prob(action) - then.log_prob(action)
        ratios.append((difference.sum() if how == "sum" else difference.mean()).clamp(-20, 20).exp())
        divergences.append(kl_divergence(now, ref).sum(-1).mean())
    total, advantage = 0, trajectory.advantage
    for ratio in ratios:
        value = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
        total = total + (max(value, 3 * advantage) if advantage < 0 else value)
    if average == "action":  # eq. 11 has the KL inside the mean over all actions
        kl = (words[0][1].double().sum() + sum(divergences)) / len(ratios)
    else:
        kl = words[0][1].double().mean() + (sum(divergences) / len(divergences) if divergences else 0)
    return -total / len(ratios) + 0.1 * kl


@pytest.mark.parametrize(
    "variant, how, average",
    [
        ("joint", "sum", "kind"),
        ("joint", "mean", "kind"),
        ("text", "sum", "kind"),
        ("joint", "sum", "action"),
        ("text", "sum", "action"),
    ],
)
def test_the_loss_and_its_gradient_are_those_of_the_formula(policy, trajectories, variant, how, average):
    """Old policy, new policy and reference all differ, on trajectories with either sign of advantage."""
    now, old, reference = moved(policy, 0.01), policy, moved(policy, 0.03)
    objective = objective_of(reference, kl_weight=0.1, variant=variant, continuous_logprob=how, kl_average=average)
    noted = copy.deepcopy(trajectories[:6])
    with torch.no_grad():
        scores = objective(old, noted, only_scores=True)
    for trajectory, log_probs, statistics in zip(noted, scores["log_probs"], scores["statistics"]):
        trajectory.old_log_probs, trajectory.old_statistics = log_probs, statistics
    weights = [weight for name, weight in now.named_parameters() if "q_proj" in name or "query_modulation" in name]
    outputs = objective(now, noted)
    loss, parts = outputs["loss"], [part for part in outputs["parts"].values() if part is not None]
    assert len(parts) == (2 if variant == "joint" else 1) and torch.equal(loss, sum(parts))
    expected = torch.stack([naive_loss(now, old, reference, one, variant, how, average) for one in noted]).mean()
    assert_near(loss.double(), expected, 1e-4)
    ours, theirs = (torch.autograd.grad(value, weights, allow_unused=True) for value in (loss, expected))
    for one, other in zip(ours, theirs):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).norm() < 1e-3 * other.norm() + 1e-6


@pytest.mark.parametrize("ratio", [0.1, 0.79, 0.81, 1.0, 1.19, 1.21, 2.9, 3.1, 50.0])
@pytest.mark.parametrize("advantage", [-1.5, 0.0, 2.0])
def test_clip_and_dual_clip(ratio, advantage):
    found, is_clipped = clipped_objective(torch.tensor([ratio]), torch.tensor(advantage), 0.2, 3.0)
    expected = min(ratio * advantage, max(0.8, min(1.2, ratio)) * advantage)
    if advantage < 0:
        expected = max(expected, 3.0 * advantage)
    assert float(found) == pytest.approx(expected)
    holds = (advantage > 0 and ratio > 1.2) or (advantage < 0 and (ratio < 0.8 or ratio > 3))
    assert bool(is_clipped) == holds
    unbounded, _ = clipped_objective(torch.tensor([ratio]), torch.tensor(-1.0), 0.2, None)
    assert float(unbounded) == pytest.approx(-max(ratio, 0.8))


def test_a_ratio_that_cannot_be_represented_is_bounded():
    log_ratio = torch.tensor([-1e9, -20.5, 0.0, 3.0, 1e9], dtype=torch.float64, requires_grad=True)
    ratio = ratio_of(log_ratio)
    assert_near(ratio.detach(), torch.tensor([-20.0, -20.0, 0.0, 3.0, 20.0]).double().exp())
    ratio.sum().backward()
    assert log_ratio.grad.isfinite().all()


def test_advantages_compare_within_a_group_and_are_zero_where_all_are_equal():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.3, 0.3, 0.3, 0.3], [0.0, 0.0, 0.0, 0.1]], dtype=torch.float64)
    found = group_advantages(rewards)
    spread = math.sqrt(1 / 3)
    assert_near(found[0], torch.tensor([1, -1, -1, 1]).double() * 0.5 / (spread + 1e-4))
    assert not found[1].any()
    assert not group_advantages(torch.full((1, 3), 0.1, dtype=torch.float64)).any()  # whose mean is not 0.1
    assert found[2, 3] == pytest.approx(0.075 / (0.05 + 1e-4))


def test_no_gradient_runs_from_words_through_latents_into_the_modulation(policy, trajectories):
    """The latents do move the words: LatentFormer, behind the stored actions, gets a gradient."""
    model = copy.deepcopy(policy)
    score(model, trajectories)[0].sum().backward()
    grads = {name: weight.grad for name, weight in model.named_parameters()}
    assert all(grads[name] is None for name in grads if "modulation" in name)
    assert all(grads[name].any() for name in grads if "latent_blocks.layers" in name)
    assert all(grads[name].any() for name in grads if "language_model" in name and "k_proj.bias" not in name)


def test_the_modulation_learns_from_its_densities(policy, trajectories):
    model, reference = moved(policy), copy.deepcopy(policy)
    objective_of(reference)(model, trajectories)["loss"].backward()
    assert all(weight.grad.any() for name, weight in model.named_parameters() if "modulation" in name)


def test_micro_batches_and_gradient_checkpointing_leave_the_gradient(policy, trajectories):
    def gradients(model, parts):
        model.train()
        for part in parts:
            (objective_of(reference)(model, part)["loss"] * len(part) / len(trajectories)).backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    reference = moved(policy, 0.01)
    expected = gradients(copy.deepcopy(policy), [trajectories])
    checkpointed = copy.deepcopy(policy)
    enable_checkpointing(checkpointed, {"use_reentrant": False})
    for other in (
        gradients(copy.deepcopy(policy), [trajectories[:2], trajectories[2:3], trajectories[3:]]),
        gradients(checkpointed, [trajectories]),
    ):
        assert other.keys() == expected.keys()
        for name in expected:
            assert (other[name] - expected[name]).norm() < 1e-4 * expected[name].norm() + 1e-6, name


def test_the_modulation_stays_in_float32_under_autocast(policy, trajectories):
    """Rounded to 16 bits, gamma is off by as much as sigma, and a ratio over all elements is noise."""
    (trajectory, *_) = (one for one in trajectories if one.grids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = replay(policy, [trajectory]).actions
    (statistics, *_), (base, *_) = found.statistics[0].values(), found.bases[0].values()
    assert base.dtype == torch.float32
    assert not torch.equal(statistics, statistics.bfloat16().float())


def test_in_16_bits_policy_and_reference_are_one_function(policy, trajectories):
    """Trained weights are kept in float32 and computed with in bfloat16, as the reference's are."""
    half = copy.deepcopy(policy).to(torch.bfloat16)
    model, reference = prepare_policy(half, JOINT, AdapterArguments(), in_16_bits=True)
    assert all(weight.dtype == torch.float32 for weight in model.parameters() if weight.requires_grad)
    assert reference.model.language_model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = objective_of(reference)(model, trajectories)
    for kind in ("text", "latent"):
        assert mean_of(outputs["sums"], f"kl_{kind}") == pytest.approx(0, abs=1e-6)
    outputs["loss"].backward()
    assert all(weight.grad.isfinite().all() for name, weight in model.named_parameters() if "modulation" in name)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"variant": "both"}, "variant"),
        ({"clip": 1.5}, "clip"),
        ({"dual_clip": 0.5}, "dual_clip"),
        ({"kl_weight": -1.0}, "kl_weight"),
        ({"continuous_logprob": "max"}, "continuous_logprob"),
    ],
)
def test_objectives_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveArguments(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_generations": 1}, "num_generations"),
        ({"temperature": 0.0}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_latent_blocks": 0, "min_latent_blocks": 1}, "max_latent_blocks"),
    ],
)
def test_rollouts_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        RolloutArguments(**fields)


def test_a_model_without_modulation_or_data_without_images_are_refused(tokenizer, policy, samples):
    with pytest.raises(ValueError, match="No sample has an image"):
        check_policy(policy, JOINT, samples[2:])
    for fields in ({"latent_mode": "autoregressive"}, {"modulate_queries": False, "modulate_images": False}):
        with pytest.raises(ValueError, match="variant='text'"):
            check_policy(build_model(tokenizer, **fields), JOINT, samples)
        check_policy(build_model(tokenizer, **fields), ObjectiveArguments(variant="text"), samples)


# Training


def train(model, processor, samples, tmp_path, reward, objective=JOINT, rollout=ROLLOUT, **fields) -> GRPOTrainer:
    fields = {
        "optim": "adamw_torch",
        "max_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "micro_batch_size": 3,
    } | fields
    args = GRPOTrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=len(samples),
        gradient_accumulation_steps=1,
        **fields,
    )
    model, reference = prepare_policy(model, objective, AdapterArguments(), in_16_bits=False)
    rewards = WeightedRewards(RewardArguments())
    rewards.weights, rewards.rewards = {"own": 1.0}, {"own": reward}
    trainer = GRPOTrainer(
        model=TrainingModel(model, GRPOObjective(objective, rollout, reference)),
        args=args,
        train_dataset=samples,
        data_collator=QuestionCollator(processor),
        processing_class=processor,
        rewards=rewards,
    )
    trainer.train()
    return trainer


def first_letter(trajectories) -> list[float]:
    """Different for every answer, so that there is always something to learn."""
    return [float(int(trajectory.tokens.sum()) % 7) for trajectory in trajectories]


LEARNS = {
    "joint": {"model.language_model", "lm_head", "latent_blocks.query_modulation", "latent_blocks.image_modulation"},
    "text": {"model.language_model", "lm_head"},
}


@pytest.mark.parametrize("variant", ["joint", "text"])
@pytest.mark.parametrize("with_former", [False, True])
def test_freezing_is_exact(tokenizer, processor, samples, tmp_path, variant, with_former):
    """Every tensor compared after one step, in the policy and in the reference."""
    model = fond_of_latents(build_model(tokenizer))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    objective = ObjectiveArguments(variant=variant, train_latent_former=with_former)
    trainer = train(model, processor, samples, tmp_path, first_letter, objective, weight_decay=0.1)
    learns = tuple(LEARNS[variant] | ({"latent_blocks.layers", "latent_blocks.image_index"} if with_former else set()))
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if name.startswith(learns)}
    assert changed == {name for name, weight in model.named_parameters() if weight.requires_grad}
    reference = trainer.objective._reference[0].state_dict()
    assert all(torch.equal(weight, before[name]) for name, weight in reference.items())


def test_gradients_are_clipped_apart_and_logged(tokenizer, processor, samples, tmp_path):
    model = fond_of_latents(build_model(tokenizer))
    trainer = train(
        model, processor, samples, tmp_path, first_letter, max_grad_norm=1e-3, max_steps=2, num_iterations=2
    )
    groups = trainer.parameter_groups(trainer.model)
    assert {name: len(weights) for name, weights in groups.items()}.keys() == {"language_model", "modulation"}
    for weights in groups.values():
        for weight in weights:
            weight.grad = torch.ones_like(weight)
    expected = math.sqrt(sum(weight.numel() for weights in groups.values() for weight in weights))
    assert float(trainer._clip_grad_norm(trainer.model)) == pytest.approx(expected, rel=1e-4)
    for weights in groups.values():
        assert sum(float(weight.grad.square().sum()) for weight in weights) ** 0.5 == pytest.approx(1e-3, rel=1e-3)
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    wanted = {"reward", "reward_own", "reward_std", "groups_without_signal", "blocks_per_sample", "tokens_per_sample"}
    wanted |= {"truncated", "reward_missing"}
    learned = {"clip_text", "clip_latent", "kl_text", "kl_latent", "ratio_text", "ratio_latent", "entropy"}
    norms = {"grad_norm_language_model", "grad_norm_modulation", "grad_norm_words", "grad_norm_latents"}
    norms |= {"latent_gradient_scale", "latent_gradient_share"}
    assert wanted | learned | norms <= first.keys()
    assert learned | norms <= second.keys() and not wanted & second.keys()  # the same answers once more
    for kind in ("text", "latent"):
        assert abs(first[f"kl_{kind}"]) < 1e-6 < 1e-4 < second[f"kl_{kind}"]
        assert abs(first[f"ratio_{kind}"] - 1) < 1e-5 < 1e-4 < abs(second[f"ratio_{kind}"] - 1)
    assert 0 < first["blocks_per_sample"] < 3


def test_the_size_of_micro_batches_changes_no_update(tokenizer, processor, samples, tmp_path):
    """Nine answers as 4 + 4 + 1, and as one; without clipping, which would hide the size of the gradient."""
    trained, settings = [], {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1e-4, "num_iterations": 2}
    for size in (4, 9):
        model = fond_of_latents(build_model(tokenizer))
        trainer = train(
            *(model, processor, samples, tmp_path, first_letter), max_steps=2, micro_batch_size=size, **settings
        )
        assert trainer.state.log_history[0]["grad_norm_modulation"] > 0
        trained.append(model.state_dict())
    for name, weight in trained[0].items():
        assert_near(weight, trained[1][name])
    before = fond_of_latents(build_model(tokenizer)).state_dict()
    assert any((weight - before[name]).abs().max() > 1e-3 for name, weight in trained[0].items())


def test_equal_rewards_move_nothing(tokenizer, processor, samples, tmp_path):
    model = fond_of_latents(build_model(tokenizer))
    before = copy.deepcopy(model.state_dict())
    objective, equal = ObjectiveArguments(kl_weight=0.0), lambda found: [0.3] * len(found)
    trainer = train(model, processor, samples, tmp_path, equal, objective, weight_decay=0.0)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert trainer.state.log_history[0]["groups_without_signal"] == 1


@pytest.mark.parametrize("variant", ["joint", "text"])
def test_what_only_the_modulation_can_earn(tokenizer, processor, samples, tmp_path, variant):
    """Two arms: the queries of the one block are drawn to either side. Which side pays cannot be said in words."""
    model = build_model(tokenizer, modulate_images=False)
    # As in a fresh model: what the words do to the hidden states does not move the latents either.
    torch.nn.init.zeros_(model.latent_blocks.query_modulation.down_proj.weight)
    generator = torch.Generator().manual_seed(2)
    side = torch.randn(model.config.get_text_config().hidden_size, generator=generator)

    def arm(trajectory) -> float:
        base = model.latent_blocks.queries(*trajectory.grids[0]).detach()
        statistics = trajectory.statistics[0, "query"]
        noise = act(base, statistics, trajectory.seed, 0, "query") - (1 + start[0]) * base - start[1]
        return float((noise.mean(0) @ side) > 0)

    rollout = RolloutArguments(num_generations=8, max_new_tokens=2, min_latent_blocks=1, max_latent_blocks=1)
    (first, *_) = roll_out(model, processor, QuestionCollator(processor)(samples[:1]), rollout, 0)
    start = first.statistics[0, "query"]
    objective = ObjectiveArguments(variant=variant, kl_weight=0.0, continuous_logprob="mean")
    trainer = train(
        model,
        processor,
        samples[:1],
        tmp_path,
        lambda found: [arm(trajectory) for trajectory in found],
        objective,
        rollout,
        max_steps=25,
        micro_batch_size=8,
    )
    earned = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    early, late = sum(earned[:5]) / 5, sum(earned[-5:]) / 5
    assert 0.1 < early < 0.9
    assert late > 0.95 if variant == "joint" else late < 0.85


def test_chunks_are_repeated_and_shuffled_by_epoch():
    epoch = 0
    order = RepeatedChunks(10, 4, 2, 0, lambda: epoch)
    first = list(order)
    assert len(first) == len(order) == 16
    assert first[:4] == first[4:8] and first[8:12] == first[12:] and len(set(first)) == 8
    assert first == list(order)
    epoch = 1
    assert first != list(order)
    with pytest.raises(ValueError, match="takes 4 questions, but the data hold 3"):
        RepeatedChunks(3, 4, 1, 0, int)


# The command


@pytest.fixture(scope="module")
def folder(policy, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    policy.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four questions with an image and an answer, and no rationale."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number in range(4):
        picture(56 + 28 * (number % 2), 56, number).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": f"what colour is {number}?", "answer": "red"})
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def command_of(folder, data, output, *options) -> list[str]:
    command = (
        f"--model_path {folder} --data_path {data} --output_dir {output} --use_cpu --report_to none --disable_tqdm 1"
    )
    command += " --num_generations 4 --max_new_tokens 6 --max_latent_blocks 2 --learning_rate 3e-3 --optim adamw_torch"
    command += (
        " --per_device_train_batch_size 1 --gradient_accumulation_steps 2 --micro_batch_size 3 --save_strategy no"
    )
    return [*command.split(), *map(str, options)]


def run(folder, data, output, *options) -> GRPOTrainer:
    return main(*HfArgumentParser(ARGUMENTS).parse_args_into_dataclasses(command_of(folder, data, output, *options)))


def early_words(trajectories) -> list[float]:
    """An easy reward: the share of tokens in the first half of the vocabulary."""
    return [float((trajectory.tokens < 150).float().mean()) for trajectory in trajectories]


EASY = ("--rewards", "test_grpo:early_words")


def test_the_command_trains_what_auto_model_loads(folder, data, tmp_path, policy):
    trainer = run(
        *(folder, data, tmp_path / "out", *EASY, "--max_steps", 24, "--latent_reward_weight", 0.01),
        *("--dump_rollouts", tmp_path / "seen", "--dump_every", 23, "--dump_pictures", 1),
    )
    earned = [entry["reward_test_grpo:early_words"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(earned) == 24
    assert sum(earned[-5:]) / 5 > sum(earned[:5]) / 5 + 0.2
    assert describe_progress(tmp_path / "out", ("reward", "reward_judge"))[0].startswith("reward ")
    loaded = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    trained = trainer.policy.state_dict()
    assert all(torch.equal(weight, trained[name]) for name, weight in loaded.state_dict().items())
    lines = (tmp_path / "seen" / "rollouts-0.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 2 * 4 and {path.name for path in (tmp_path / "seen").glob("*.jsonl")} == {
        "rollouts-0.jsonl",
        "rollouts-23.jsonl",
    }
    with_blocks = next(row for row in rows if row["blocks"])
    height, width = with_blocks["blocks"][0]["grid"]
    assert f"<|latent_start|>{height}x{width}<|latent_end|>" in with_blocks["text"]
    assert with_blocks["text"].count("<|latent_start|>") == len(with_blocks["blocks"])
    assert with_blocks["rewards"].keys() == {"test_grpo:early_words", "latent"}
    assert sum(row["advantage"] for row in rows) == pytest.approx(0, abs=1e-4)
    assert list((tmp_path / "seen").glob("rollouts-0-*.png"))


@pytest.mark.parametrize("killed_at, adapters", [(3, ()), (4, ()), (3, ("--lora", "--lora_r", 4))])
def test_resumed_is_uninterrupted(folder, data, tmp_path, killed_at, adapters):
    """Between two updates on the same answers, and before new ones; into a second epoch of another order."""
    options = (*EASY, "--max_steps", 6, "--num_iterations", 2, "--lr_scheduler_type", "linear", "--save_steps", 1)
    options += ("--save_strategy", "steps", *adapters)
    whole = run(folder, data, tmp_path / "whole", *options)
    parts = run(
        folder,
        data,
        tmp_path / "parts",
        *options,
        "--resume_from_checkpoint",
        tmp_path / f"whole/checkpoint-{killed_at}",
    )
    for (name, weight), other in zip(whole.policy.state_dict().items(), parts.policy.state_dict().values()):
        assert torch.equal(weight, other), name
    drop = ("runtime", "per_second", "flos", "train_loss")
    logs = [
        [
            {key: value for key, value in entry.items() if not any(part in key for part in drop)}
            for entry in trainer.state.log_history
        ]
        for trainer in (whole, parts)
    ]
    assert logs[0] == logs[1]
    with_rollouts = [path.parent.name for path in (tmp_path / "whole").glob("checkpoint-*/rollouts_0.pt")]
    assert sorted(with_rollouts) == ["checkpoint-1", "checkpoint-3", "checkpoint-5"]


def test_a_run_that_was_at_its_end_takes_no_further_step(folder, data, tmp_path, monkeypatch):
    options = (
        *EASY,
        "--max_steps",
        2,
        "--save_steps",
        1,
        "--save_strategy",
        "steps",
        "--resume_from_checkpoint",
        "last",
    )
    run(folder, data, tmp_path, *options)
    names = ("model.safetensors", "trainer_state.json")
    before = [(tmp_path / name).read_bytes() for name in names]
    with monkeypatch.context() as patch:
        patch.setattr(GRPOTrainer, "training_step", None)
        again = run(folder, data, tmp_path, *options)
    assert again.state.global_step == 2
    assert [(tmp_path / name).read_bytes() for name in names][0] == before[0]
    assert len(json.loads((tmp_path / names[1]).read_text())["log_history"]) >= 2


def test_two_processes_equal_one(folder, data, tmp_path):
    """Although one of them may see no latent at all: the data hold a question without an image."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows = [
        row | {"image": None if number == 1 else str(data.parent / row["image"])} for number, row in enumerate(rows)
    ]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join(map(json.dumps, rows)))
    options = [*EASY, "--max_steps", 2, "--num_iterations", 2, "--optim", "sgd", "--seed", 1]
    options += ["--max_grad_norm", 1e6, "--learning_rate", 1e-4]  # so that the size of a gradient counts
    one = run(folder, mixed, tmp_path / "one", *options)
    options += ["--gradient_accumulation_steps", 1, "--ddp_backend", "gloo"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["-m", "train.train_deeplatent_rl", *command_of(folder, mixed, tmp_path / "two", *options)]
    paths = f"{Path(__file__).parents[1]}{os.pathsep}{Path(__file__).parent}"
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, timeout=120)
    two = AutoModel.from_pretrained(tmp_path / "two", trust_remote_code=True).state_dict()
    before = AutoModel.from_pretrained(folder, trust_remote_code=True).state_dict()
    for name, weight in one.policy.state_dict().items():
        assert_near(two[name], weight)
    assert any((two[name] - before[name]).abs().max() > 1e-3 for name in before)


@pytest.mark.parametrize("options", [(), ("--train_latent_former",)])
def test_adapters_train_beside_their_own_reference(folder, data, tmp_path, policy, options):
    pytest.importorskip("peft")
    trainer = run(
        folder, data, tmp_path, *EASY, *options, "--lora", "--lora_r", 4, "--max_steps", 4, "--num_iterations", 2
    )
    assert trainer.objective._reference[0] is None
    logs = [entry for entry in trainer.state.log_history if "kl_text" in entry]
    for kind in ("kl_text", "kl_latent"):
        assert logs[0][kind] < 1e-5 < logs[1][kind]
    loaded, before = AutoModel.from_pretrained(tmp_path, trust_remote_code=True).state_dict(), policy.state_dict()
    assert loaded.keys() == before.keys()
    changed = {name for name, weight in loaded.items() if not torch.equal(weight, before[name])}
    learns = ("_proj.", "_modulation.", *(("latent_blocks.layers.", "image_index.") if options else ()))
    assert changed and all(any(part in name for part in learns) for name in changed)
    assert not any("visual" in name for name in changed)
    assert any("latent_blocks.layers" in name for name in changed) == bool(options)
    assert (tmp_path / "adapter").is_dir()
