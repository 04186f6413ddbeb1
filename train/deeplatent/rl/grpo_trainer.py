"""`Trainer` for GRPO with words and latents: sample, reward, compare, update.

Built on `transformers.Trainer`, and not on TRL's `GRPOTrainer`, which would have to be overridden nearly whole: it scores
tokens through the backbone, past the `forward` that builds latent blocks; its batches are tensors split along the first
axis, where blocks and images are lists of unequal length; it estimates the KL from the sampled token where the paper has
the KL of distributions; it clips all gradients together; and it forgets its rollouts when a run is resumed.

One optimizer step sees `global_batch_size` questions, over all processes, each with `num_generations` answers: that many batches
of `per_device_train_batch_size` a process follow from it. A batch of questions is sampled in one call of `generate`, and learned from in micro-batches of
`micro_batch_size` answers. With `num_iterations > 1` the same answers serve several steps; ratios differ from 1, and
clipping acts, from the second of them on.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainingArguments
from transformers.utils import logging

from train.common.training_model import LatentTrainer
from train.data.seeds import mix
from train.deeplatent.rl.actions import group_advantages, has_no_signal
from train.deeplatent.rl.dump import RolloutDump
from train.deeplatent.rl.gradients import ApartGradients
from train.deeplatent.rl.objective import GRPOObjective
from train.deeplatent.rl.rewards import WeightedRewards
from train.deeplatent.rl.rollouts import Prompt, Trajectory, read_prompts, roll_out


MODULATION = ("query_modulation", "image_modulation")
ROLLOUTS_FILE = "rollouts_{}.pt"  # of a process
PAPER_BATCH = 64  # questions of a step
MANY_TRUNCATED = 0.25  # share of answers from which on a run is told so
logger = logging.get_logger(__name__)


@dataclass
class GRPOTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the paper's defaults. Batch sizes count questions."""

    learning_rate: float = 1e-6
    weight_decay: float = 0.01
    lr_scheduler_type: str = "constant"
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Questions sampled in one `generate`."})
    gradient_accumulation_steps: int | None = field(
        default=None, metadata={"help": "Batches of a step; by default what `global_batch_size` needs."}
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Questions of a step, over all processes; by default the paper's 64, or what `gradient_accumulation_steps` gives."
        },
    )
    micro_batch_size: int = field(default=4, metadata={"help": "Answers in one forward and backward pass."})
    num_iterations: int = field(default=1, metadata={"help": "Optimizer steps on the same answers."})
    logging_steps: float = 1
    remove_unused_columns: bool = False

    def __post_init__(self):
        given, self.gradient_accumulation_steps = (
            self.gradient_accumulation_steps,
            self.gradient_accumulation_steps or 1,
        )
        super().__post_init__()
        self.gradient_accumulation_steps = self.batches_of_step(given)
        self.global_batch_size = self.gradient_accumulation_steps * self.train_batch_size * self.world_size
        for name in ("micro_batch_size", "num_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1, got {getattr(self, name)}.")

    def batches_of_step(self, given: int | None) -> int:
        """How many batches a process learns from in a step of `global_batch_size` questions.

        Raises:
            ValueError: it is no whole number, or not the one that was given.
        """
        if given is not None and self.global_batch_size is None:
            return given
        at_once = self.train_batch_size * self.world_size
        wanted = PAPER_BATCH if self.global_batch_size is None else self.global_batch_size
        if wanted < 1 or wanted % at_once:
            raise ValueError(
                f"`global_batch_size` must be a multiple of the {at_once} questions that {self.world_size} processes sample at "
                f"once, {self.train_batch_size} each (`per_device_train_batch_size`), got {wanted}."
            )
        if given not in (None, wanted // at_once):
            raise ValueError(
                f"`gradient_accumulation_steps` is {given}, but a `global_batch_size` of {wanted} takes {wanted // at_once} "
                f"batches of {at_once} questions: give one of the two."
            )
        return wanted // at_once


class RepeatedChunks(Sampler[int]):
    """Shuffled samples in chunks of one optimizer step, each chunk `repeats` times in a row.

    Samples that do not fill a last chunk wait for the next epoch, which is shuffled anew.

    Args:
        epoch: a function that says which epoch begins.
    """

    def __init__(self, num_samples: int, chunk: int, repeats: int, seed: int, epoch):
        if num_samples < chunk:
            raise ValueError(f"One step takes {chunk} questions, but the data hold {num_samples}.")
        self.num_samples, self.chunk, self.repeats, self.seed, self.epoch = num_samples, chunk, repeats, seed, epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(mix(self.seed, "order", self.epoch()))
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        for start in range(0, self.num_samples - self.chunk + 1, self.chunk):
            for _ in range(self.repeats):
                yield from order[start : start + self.chunk]

    def __len__(self) -> int:
        return self.num_samples // self.chunk * self.chunk * self.repeats


class GRPOTrainer(LatentTrainer):
    """Trains the `TrainingModel` of a policy and a `GRPOObjective`.

    Args:
        rewards: writes the rewards into trajectories.
        dump: looks at all trajectories of a step, or None.
    """

    def __init__(self, *args, rewards: WeightedRewards, dump: RolloutDump | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "Rollouts need whole weights in every process, and clipping apart needs whole gradients: use DDP instead "
                "of FSDP or DeepSpeed."
            )
        self.rewards, self.dump = rewards, dump
        # Two backward passes between two exchanges are nothing DDP knows of: what is kept apart is exchanged by itself.
        limit = self.objective.arguments.latent_gradient_limit
        is_joint = self.objective.arguments.variant == "joint"
        self.apart = ApartGradients(limit) if limit and is_joint else None
        self.batches: list[list[Trajectory]] = []
        self.sums: dict[str, Tensor] = {}
        self.resumed_from: str | None = None
        self.objective.move_reference(self.args.device)

    @property
    def objective(self) -> GRPOObjective:
        return self.accelerator.unwrap_model(self.model).objective

    @property
    def policy(self):
        model = self.accelerator.unwrap_model(self.model).model
        return model.get_base_model() if hasattr(model, "peft_config") else model

    def _get_train_sampler(self, train_dataset=None) -> RepeatedChunks:
        args, data = self.args, self.train_dataset if train_dataset is None else train_dataset
        chunk = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return RepeatedChunks(len(data), chunk, args.num_iterations, args.seed, lambda: int(self.state.epoch or 0))

    def get_batch_samples(self, epoch_iterator, num_batches: int, device):
        """The trajectories of one optimizer step: sampled, or those of the step before once more."""
        questions, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        is_first = self.state.global_step % self.args.num_iterations == 0
        if is_first:
            self.batches = [self.sample(batch, number) for number, batch in enumerate(questions)]
            if self.dump is not None:
                self.dump(
                    self.policy, self.processing_class, self.batches, self.state.global_step, self.args.process_index
                )
        elif not self.batches:
            self.batches = self.load_trajectories([read_prompts(self.policy, batch) for batch in questions])
        return self.batches, None

    def sample(self, batch: dict, number: int) -> list[Trajectory]:
        """Roll out a batch of questions, reward the answers, and note what the policy says of them now."""
        # Processes take batches in turn: the same answers whatever their number.
        place = number * self.args.world_size + self.args.process_index
        seed = mix(self.args.seed, self.state.global_step, place)
        with self.accelerator.autocast():
            trajectories = roll_out(self.policy, self.processing_class, batch, self.objective.rollout, seed)
        self.rewards(trajectories)
        missing = [math.nan if one.reward is None else one.reward for one in trajectories]
        rewards = torch.tensor(missing, dtype=torch.float64)
        groups = rewards.view(-1, self.objective.rollout.num_generations)
        for trajectory, advantage in zip(trajectories, group_advantages(groups).flatten().tolist()):
            trajectory.advantage = advantage
        self.note_rollouts(trajectories, groups)
        if self.args.num_iterations > 1:
            self.note_old_policy(trajectories)
        return trajectories

    @torch.no_grad()
    def note_old_policy(self, trajectories: list[Trajectory]) -> None:
        """Score by the forward that will also score the updates, in the same micro-batches: `generate` rounds differently."""
        model = self.accelerator.unwrap_model(self.model)
        model.train()
        for part in self.micro_batches(trajectories):
            with self.compute_loss_context_manager(), self.accelerator.autocast():
                old = model(trajectories=part, only_scores=True)
            for trajectory, log_probs, statistics in zip(part, old["log_probs"], old["statistics"]):
                trajectory.old_log_probs = log_probs.cpu()
                trajectory.old_statistics = {place: values.cpu() for place, values in statistics.items()}

    def micro_batches(self, trajectories: list[Trajectory]) -> list[list[Trajectory]]:
        size = self.args.micro_batch_size
        return [trajectories[start : start + size] for start in range(0, len(trajectories), size)]

    def training_step(self, model, inputs: list[Trajectory], num_items_in_batch=None) -> Tensor:
        model.train()
        parts, total = self.micro_batches(inputs), torch.zeros((), device=self.args.device)
        for number, part in enumerate(parts):
            # Gradients are exchanged once, behind the last micro-batch.
            waits = self.apart is not None or number + 1 < len(parts)
            share = len(part) / len(inputs) / self.current_gradient_accumulation_steps
            with self.accelerator.no_sync(model) if waits else nullcontext():
                with self.compute_loss_context_manager():
                    outputs = model(trajectories=part)
                self.backward(model, outputs, share)
            total += outputs["loss"].detach() * share
            self.add_sums(outputs["sums"])
        if self.apart is not None and self.accelerator.sync_gradients:
            self.merge_gradients(model)
        return total

    def backward(self, model, outputs: dict, share: float) -> None:
        """Add the gradient of a micro-batch, that of the latents apart."""
        words, latents = outputs["parts"]["words"], outputs["parts"]["latents"]
        if self.apart is None:
            self.accelerator.backward(outputs["loss"] * share)
            return
        self.accelerator.backward(words * share, retain_graph=latents is not None)
        if latents is not None:
            with self.apart.of_latents(self.parameter_groups(model)["language_model"]):
                self.accelerator.backward(latents * share)

    def merge_gradients(self, model) -> None:
        """At the end of a step: one gradient of the language model out of those of words and latents."""
        groups = self.parameter_groups(model)
        norms = self.apart.merge(groups["language_model"], groups.get("modulation", []), self.args.world_size)
        scaler = getattr(self.accelerator, "scaler", None)  # of float16, whose gradients are larger by this
        unit = 1.0 if scaler is None else scaler.get_scale()
        words, latents, scale = (float(norms[name]) for name in ("words", "latents", "scale"))
        values = {"grad_norm_words": words / unit, "grad_norm_latents": latents / unit, "latent_gradient_scale": scale}
        if words + latents > 0:
            values["latent_gradient_share"] = scale * latents / (words + scale * latents)
        self.add_sums({name: torch.tensor([value, 1.0], dtype=torch.float64) for name, value in values.items()})

    def _clip_grad_norm(self, model):
        """Clip language model and modulation apart: the few weights of one would vanish beside the other's."""
        norms = {}
        for name, parameters in self.parameter_groups(model).items():
            norms[name] = self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)
        self.note_norms(norms)
        return torch.stack([torch.as_tensor(norm) for norm in norms.values()]).norm()

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is not None:
            return grad_norm
        norms = {
            name: self.accelerator.clip_grad_norm_(parameters, math.inf)
            for name, parameters in self.parameter_groups(model).items()
        }
        self.note_norms(norms)
        return torch.stack([torch.as_tensor(norm) for norm in norms.values()]).norm()

    def parameter_groups(self, model) -> dict[str, list[Tensor]]:
        """The trained weights that are clipped together."""
        groups: dict[str, list[Tensor]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                is_latent = any(part in name for part in MODULATION)
                groups.setdefault("modulation" if is_latent else "language_model", []).append(parameter)
        return groups

    def floating_point_ops(self, inputs) -> int:
        return 0  # trajectories have no one shape to estimate it from

    def note_norms(self, norms: dict) -> None:
        norms = {f"grad_norm_{name}": norm for name, norm in norms.items() if norm is not None}
        self.add_sums({name: torch.tensor([float(norm), 1.0], dtype=torch.float64) for name, norm in norms.items()})

    def note_rollouts(self, trajectories: list[Trajectory], groups: Tensor) -> None:
        truncated = sum(one.is_truncated for one in trajectories) / len(trajectories)
        if truncated >= MANY_TRUNCATED:
            logger.warning_once(
                f"More than {100 * MANY_TRUNCATED:.0f} % of the answers sampled in a step were cut off at `max_new_tokens`="
                f"{self.objective.rollout.max_new_tokens}, perhaps before they said anything: `truncated` in the logs has their share."
            )
        values = {
            "reward": groups[~groups.isnan()],
            "reward_missing": groups.isnan().flatten().double(),
            "reward_std": torch.tensor(
                [group[~group.isnan()].std() for group in groups if (~group.isnan()).sum() > 1]
            ),
            "groups_without_signal": has_no_signal(groups).double(),
            "blocks_per_sample": torch.tensor([len(one.grids) for one in trajectories]),
            "latents_per_block": torch.tensor([height * width for one in trajectories for height, width in one.grids]),
            "tokens_per_sample": torch.tensor([len(one.tokens) for one in trajectories]),
            "truncated": torch.tensor([one.is_truncated for one in trajectories]),
        }
        for name in self.rewards.weights:
            values[f"reward_{name}"] = torch.tensor(
                [v for one in trajectories if (v := one.rewards[name]) is not None]
            )
        self.add_sums({name: torch.tensor([float(part.sum()), len(part)]) for name, part in values.items()})

    def add_sums(self, sums: dict[str, Tensor]) -> None:
        for name, pair in sums.items():
            self.sums[name] = self.sums.get(name, 0) + pair.double().cpu()

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            # Every process logs the same names: some may have seen no latent.
            names = sorted({name for name, _ in self.gather_names()})
            pairs = torch.stack([self.sums.pop(name, torch.zeros(2, dtype=torch.float64)) for name in names])
            pairs = self.accelerator.reduce(pairs.float().to(self.args.device), "sum").tolist() if names else []
            logs |= {name: total / number for name, (total, number) in zip(names, pairs) if number}
        super().log(logs, *args, **kwargs)

    def gather_names(self) -> list[tuple[str, int]]:
        own = [(name, 0) for name in self.sums]
        if self.accelerator.num_processes == 1:
            return own
        from accelerate.utils import gather_object

        return gather_object(own)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.state.global_step % self.args.num_iterations:
            states = [[trajectory.state() for trajectory in batch] for batch in self.batches]
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            torch.save(states, Path(output_dir) / ROLLOUTS_FILE.format(self.args.process_index))

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self.resumed_from = checkpoint

    def load_trajectories(self, prompts: list[list[Prompt]]) -> list[list[Trajectory]]:
        """The answers that the interrupted run was learning from.

        Raises:
            ValueError: the checkpoint has none, or not as many as there are questions.
        """
        path = Path(self.resumed_from or "") / ROLLOUTS_FILE.format(self.args.process_index)
        if not path.is_file():
            raise ValueError(
                f"The run was interrupted between two updates on the same answers, but {path} is missing."
            )
        states = torch.load(path, weights_only=True)
        count = self.objective.rollout.num_generations
        if [len(batch) for batch in states] != [count * len(batch) for batch in prompts]:
            raise ValueError(f"{path} does not hold {count} answers to each question: other arguments wrote it.")
        return [
            [Trajectory(prompt=own[row // count], **state) for row, state in enumerate(batch)]
            for own, batch in zip(prompts, states)
        ]
