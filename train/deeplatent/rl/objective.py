"""The objective of GRPO over words and latents (DeepLatent, eq. 9-16).

Per trajectory i with advantage A_i, over all its actions k, words and modulations alike:

    r_k = pi_theta(a_k) / pi_old(a_k)
    J_i = mean over k of min(r_k A_i, clip(r_k, 1 - e, 1 + e) A_i), and at least c A_i where A_i < 0
    L   = mean over i of (-J_i + w KL_i)

The KL of an action is that of two categoricals over the vocabulary for a word, and the closed form for Gaussians for a
modulation, summed over channels and averaged over positions. The paper averages it in two ways, `kl_average`:

    kind     KL_i = mean over the words + mean over the modulations    its appendix ("average over positions and samples"), default
    action   KL_i = sum over words and modulations / number of both    its eq. 11, where the KL stands inside the mean over actions

They differ in how much a modulation weighs beside a word: under `action` a hundredth of it in an answer of a hundred words.

L is the sum of a part of the words and one of the latents, which are returned apart: their gradients in the language model differ
by orders of magnitude, and `gradients.py` keeps one from hiding the other.

Kinds: R trajectories of a micro-batch, P their tokens in a row.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train.deeplatent.rl.actions import clipped_objective, gaussian_divergence, log_density_ratio, ratio_of
from train.deeplatent.rl.rescoring import Replayed, Words, replay, score_words
from train.deeplatent.rl.rollouts import RolloutArguments, Trajectory


VARIANTS = ("joint", "text")
LOG_PROBS = ("sum", "mean")
KL_AVERAGES = ("kind", "action")


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
    kl_average: str = field(
        default="kind",
        metadata={
            "help": "kind: mean KL of words plus mean KL of modulations (the paper's appendix); action: its eq. 11."
        },
    )
    latent_gradient_limit: float = field(
        default=1.0,
        metadata={
            "help": "Longest gradient of the latents in the language model, in lengths of the words'; 0: not limited, one pass."
        },
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
        if self.kl_average not in KL_AVERAGES:
            raise ValueError(f"`kl_average` must be one of {KL_AVERAGES}, got {self.kl_average!r}.")
        for name in ("kl_weight", "latent_gradient_limit"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must be >= 0 and finite, got {getattr(self, name)}.")


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
        """Return `loss`, its `parts` ("words" and "latents", None without any), and `sums`: by name, a sum and of how many.

        Args:
            only_scores: return `log_probs` and `statistics` instead, the `old` ones of later updates.
        """
        policy = model.get_base_model() if hasattr(model, "peft_config") else model
        scores = self.score(model, policy, trajectories, with_reference=not only_scores)
        if only_scores:
            return {"log_probs": scores.log_probs, "statistics": scores.replayed.actions.statistics}
        losses, sums = [], {}
        for row, trajectory in enumerate(trajectories):
            losses.append(self.losses_of(row, trajectory, scores, sums))
        count(sums, "entropy", scores.entropies)
        words = policy._keep_latents_in_graph(torch.stack([loss for loss, _ in losses]).mean())
        found = [loss for _, loss in losses if loss is not None]
        latents = torch.stack(found).sum() / len(losses) if found else None
        loss = words if latents is None else words + latents
        return {"loss": loss, "parts": {"words": words, "latents": latents}, "sums": sums}

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

    def losses_of(self, row: int, trajectory: Trajectory, scores: Scores, sums: dict) -> tuple[Tensor, Tensor | None]:
        """The loss of one trajectory, the parts of its words and of its latents; adds to the sums of the log."""
        arguments = self.arguments
        log_probs = scores.log_probs[row]
        old = trajectory.old_log_probs
        old = log_probs.detach() if old is None else old.to(log_probs.device)
        kinds = [("text", ratio_of(log_probs - old), scores.divergences[row])]
        if arguments.variant == "joint":
            latent_ratios, latent_kls = self.compare_latents(row, trajectory, scores)
            if latent_ratios:
                latents = (torch.stack(values).to(log_probs) for values in (latent_ratios, latent_kls))
                kinds.append(("latent", *latents))
        number = sum(len(ratios) for _, ratios, _ in kinds)
        advantage = torch.tensor(trajectory.advantage, device=log_probs.device, dtype=log_probs.dtype)
        losses = []
        for name, ratios, divergences in kinds:
            surrogate, is_clipped = clipped_objective(ratios, advantage, arguments.clip, arguments.dual_clip or None)
            kl = divergences.mean() if arguments.kl_average == "kind" else divergences.sum() / number
            losses.append(arguments.kl_weight * kl - surrogate.sum() / number)
            count(sums, f"kl_{name}", divergences.mean()[None])
            count(sums, f"clip_{name}", is_clipped.float())
            count(sums, f"ratio_{name}", ratios)
        return losses[0], losses[1] if len(losses) > 1 else None

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
