"""The objective of GRPO over words and latents (DeepLatent, eq. 9-16).

Per trajectory i with advantage A_i, over all its actions k, words and modulations alike:

    r_k = pi_theta(a_k) / pi_old(a_k)
    J_i = mean over k of min(r_k A_i, clip(r_k, 1 - e, 1 + e) A_i), and at least c A_i where A_i < 0
    L   = mean over i of (-J_i + w KL_words + w KL_latents)

KL_words is the mean over the words of a trajectory of the KL of two categoricals over the vocabulary. KL_latents is the
mean over its modulations of the closed form for Gaussians, which is summed over channels and averaged over positions.

Kinds: R trajectories of a micro-batch, P their tokens in a row.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train.deeplatent_rl.actions import clipped_objective, gaussian_divergence, log_density_ratio, ratio_of
from train.deeplatent_rl.replay import Replayed, Words, replay, score_words
from train.deeplatent_rl.rollouts import RolloutArguments, Trajectory


VARIANTS = ("joint", "text")
LOG_PROBS = ("sum", "mean")


@dataclass
class ObjectiveArguments:
    """What is maximized. The defaults are the design's."""

    variant: str = field(
        default="joint",
        metadata={"help": "joint: words and modulations are actions; text: words alone, the modulation is frozen."},
    )
    clip: float = field(default=0.2, metadata={"help": "A ratio counts within 1 - clip and 1 + clip."})
    dual_clip: float = field(
        default=3.0, metadata={"help": "Bounds the ratio of actions with negative advantage; 0: not at all."}
    )
    kl_weight: float = field(default=1e-3, metadata={"help": "Of both KLs to the reference; 0: no reference is kept."})
    continuous_logprob: str = field(
        default="sum", metadata={"help": "Log-density of a modulation: sum over its elements (the paper's), or mean."}
    )
    train_latent_former: bool = field(default=False, metadata={"help": "The ablation that also trains LatentFormer."})

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(f"`variant` must be one of {VARIANTS}, got {self.variant!r}.")
        if self.continuous_logprob not in LOG_PROBS:
            raise ValueError(f"`continuous_logprob` must be one of {LOG_PROBS}, got {self.continuous_logprob!r}.")
        if not 0 < self.clip < 1:
            raise ValueError(f"`clip` must lie between 0 and 1, got {self.clip}.")
        if self.dual_clip and not self.dual_clip > 1:
            raise ValueError(f"`dual_clip` must be 0 or > 1, got {self.dual_clip}.")
        if not 0 <= self.kl_weight < float("inf"):
            raise ValueError(f"`kl_weight` must be >= 0 and finite, got {self.kl_weight}.")


@dataclass
class Scores:
    """What a policy says of trajectories, by trajectory."""

    log_probs: list[Tensor]  # R x (T,)
    divergences: list[Tensor]  # R x (T,), of words from the reference
    entropies: Tensor  # (P,)
    replayed: Replayed
    reference: Replayed | None


class GRPOObjective(nn.Module):
    """The loss of a micro-batch of trajectories, and what a log wants to know of it.

    Args:
        reference: a frozen copy of the policy, or None: it is the policy with its adapters switched off.
    """

    def __init__(self, arguments: ObjectiveArguments, rollout: RolloutArguments, reference: nn.Module | None = None):
        super().__init__()
        self.arguments, self.rollout = arguments, rollout
        self._reference = [reference]  # in a list: neither a weight to save, nor one to synchronise

    def move_reference(self, device: torch.device) -> None:
        if self._reference[0] is not None:
            self._reference[0].to(device)

    def forward(self, model: nn.Module, trajectories: list[Trajectory], only_scores: bool = False) -> dict:
        """Return `loss`, and `sums`: by name, a sum and of how many values it is.

        Args:
            only_scores: return `log_probs` and `statistics` instead, the `old` ones of later updates.
        """
        policy = model.get_base_model() if hasattr(model, "peft_config") else model
        scores = self.score(model, policy, trajectories, with_reference=not only_scores)
        if only_scores:
            return {"log_probs": scores.log_probs, "statistics": scores.replayed.actions.statistics}
        losses, sums = [], {}
        for row, trajectory in enumerate(trajectories):
            losses.append(self.loss_of(row, trajectory, scores, sums))
        count(sums, "entropy", scores.entropies)
        loss = policy._touch_latents(torch.stack(losses).mean())
        return {"loss": loss, "sums": sums}

    def score(self, model, policy, trajectories: list[Trajectory], with_reference: bool) -> Scores:
        reference = self._reference[0]
        words = Words.of(trajectories, policy.config, self.rollout, policy.get_input_embeddings().weight.device)
        expected = None
        if with_reference and self.arguments.kl_weight:
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                if reference is None:
                    stack.enter_context(model.disable_adapter())
                expected = replay(policy if reference is None else reference, trajectories)
        now = replay(policy, trajectories)
        log_probs, divergences, entropies = score_words(
            policy,
            now.hidden,
            words,
            self.rollout.temperature,
            policy if reference is None else reference,
            None if expected is None else expected.hidden,
        )
        lengths = words.lengths
        return Scores(log_probs.split(lengths), divergences.split(lengths), entropies, now, expected)

    def loss_of(self, row: int, trajectory: Trajectory, scores: Scores, sums: dict) -> Tensor:
        """The loss of one trajectory; adds to the sums of the log."""
        arguments = self.arguments
        log_probs = scores.log_probs[row]
        old = trajectory.old_log_probs
        old = log_probs.detach() if old is None else old.to(log_probs.device)
        ratios, kl = [ratio_of(log_probs - old)], scores.divergences[row].mean()
        count(sums, "kl_text", scores.divergences[row].mean()[None])
        if arguments.variant == "joint":
            latent_ratios, latent_kls = self.compare_latents(row, trajectory, scores)
            if latent_ratios:
                ratios.append(torch.stack(latent_ratios).to(log_probs))
                latent_kl = torch.stack(latent_kls).to(log_probs)
                count(sums, "kl_latent", latent_kl.mean()[None])
                kl = kl + latent_kl.mean()
        advantage = torch.tensor(trajectory.advantage, device=log_probs.device, dtype=log_probs.dtype)
        objective, names = 0.0, ("text", "latent")
        for name, ratio in zip(names, ratios):
            surrogate, is_clipped = clipped_objective(ratio, advantage, arguments.clip, arguments.dual_clip or None)
            objective = objective + surrogate.sum()
            count(sums, f"clip_{name}", is_clipped.float())
            count(sums, f"ratio_{name}", ratio)
        return -objective / sum(len(ratio) for ratio in ratios) + arguments.kl_weight * kl

    def compare_latents(self, row: int, trajectory: Trajectory, scores: Scores) -> tuple[list[Tensor], list[Tensor]]:
        """Ratio and KL of every modulation of a trajectory, in float64."""
        actions, ratios, divergences = scores.replayed.actions, [], []
        for (block, kind), statistics in actions.statistics[row].items():
            base, old = actions.bases[row][block, kind], statistics.detach()
            if trajectory.old_statistics is not None:
                old = trajectory.old_statistics[block, kind].to(old)

            def log_ratio(statistics, old, place=(row, block, kind), base=base):
                return log_density_ratio(actions.action(*place), base, statistics, old)

            # Nothing as large as the action is kept for the backward pass.
            difference = checkpoint(log_ratio, statistics, old, use_reentrant=False)
            if self.arguments.continuous_logprob == "mean":
                difference = difference / base.numel()
            ratios.append(ratio_of(difference))
            if scores.reference is None:
                divergences.append(torch.zeros_like(ratios[-1]))
                continue
            expected = scores.reference.actions.statistics[row][block, kind]
            divergences.append(checkpoint(gaussian_divergence, base, statistics, expected, use_reentrant=False))
        return ratios, divergences


def count(sums: dict, name: str, values: Tensor) -> None:
    """Add values to a sum and to how many there were, so that means over many micro-batches stay means."""
    values = values.detach().double()
    sums[name] = sums.get(name, 0) + torch.stack([values.sum(), torch.full_like(values.sum(), values.numel())])
