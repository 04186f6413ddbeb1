"""A model together with what only its training needs, and a `Trainer` that keeps the two apart on disk.

`TrainingModel` is what DDP, FSDP and DeepSpeed wrap, so the weights of an objective (F_SR, heads, a U-Net) are sharded and
synchronised like all others. A checkpoint holds the model where users look for it, and the objective's weights in
`training/objective.safetensors`, which inference never reads.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from configuration_latentvlm.model_card import write_model_card
from configuration_latentvlm.transformers_contract import check_contract
from conversion.known_answers import record_answers, record_answers_apart
from conversion.writing import filled_folder, locked


check_contract("training")

logger = logging.get_logger(__name__)
OBJECTIVE_FILE = Path("training") / "objective.safetensors"


class TrainingModel(nn.Module):
    """`objective(model, **inputs)` as one module; whatever else is asked of it, the model answers.

    Args:
        model: a model of this library, or a `PeftModel` around one.
        objective: a module whose forward takes the model and a batch and returns a dict with `loss`, and with `losses`,
            the terms by name, detached. It may have weights that a checkpoint keeps in the model: `folded`, the prefixes of
            their names, `fold_state(state)`, which moves them there, and `unfold_state(model)`, which takes them back.
    """

    def __init__(self, model: nn.Module, objective: nn.Module):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, **inputs) -> dict:
        return self.objective(self.model, **inputs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


@dataclass
class StepPart:
    """A micro-batch as a part of its optimizer step, for an objective with `sees_whole_step`.

    Args:
        seed: of everything random in it: what is computed ahead must be what is computed with gradients.
        others: what the objective returned as `rows` of the other parts; None while they are being computed.
    """

    seed: int
    others: list | None = None

    @contextmanager
    def random_state(self, device: torch.device) -> Iterator[None]:
        with torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            yield


def split_state(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def save_objective(state: dict[str, torch.Tensor], folder: str | Path) -> None:
    """Write an objective's weights beside a checkpoint; nothing where it has none."""
    if not state:
        return
    path = Path(folder) / OBJECTIVE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in state.items()}, path, metadata={"format": "pt"})


def load_objective(objective: nn.Module, folder: str | Path) -> bool:
    """Read an objective's weights from beside a checkpoint; False where there are none.

    Raises:
        ValueError: they belong to another objective.
    """
    path = Path(folder) / OBJECTIVE_FILE
    if not path.is_file():
        return False
    folded = getattr(objective, "folded", ())  # weights that a checkpoint keeps in the model
    own = {name: value for name, value in objective.state_dict().items() if not name.startswith(folded)}
    parts = {name.split(".")[0] for name in own}
    # A term that was trained before and is switched off now has no part here.
    stored = {name: value for name, value in load_file(path).items() if name.split(".")[0] in parts}
    wrong = sorted(own.keys() ^ stored.keys()) or [name for name in own if own[name].shape != stored[name].shape]
    if wrong:
        raise ValueError(f"{path} does not fit the objective: names or shapes differ, first {wrong[0]!r}.")
    objective.load_state_dict(stored, strict=False)
    return True


def seed_of(*numbers: int) -> int:
    """A seed of 63 bits that depends on every number, and on their order."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1


def map_tensors(function: Callable, values):
    """Apply a function to all tensors in dicts and tuples."""
    if isinstance(values, torch.Tensor):
        return function(values)
    if isinstance(values, dict):
        return {name: map_tensors(function, value) for name, value in values.items()}
    return tuple(map_tensors(function, value) for value in values)


def scaled(rate: Callable[[int], float], callbacks: list) -> Callable[[int], float]:
    """The learning rate of a step with the factors of callbacks. A function: a checkpoint stores nothing of it."""

    def scale(step: int) -> float:
        return rate(step) * math.prod(callback.scale_rate(step) for callback in callbacks)

    return scale


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest `checkpoint-N` of a run that was written to its end: the trainer's state is what comes last."""
    found = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/trainer_state.json"):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # cut off in the middle, perhaps of a character
            continue
        found[int(path.parent.name.rsplit("-", 1)[1])] = str(path.parent)
    return found[max(found)] if found else None


class LatentTrainer(Trainer):
    """`Trainer` for a `TrainingModel`: logs every loss term, saves and loads model and objective apart.

    A callback may add to the logs by a method `log_terms`, see the gradients by a method `before_clipping`, put a factor on the
    learning rate of a step by a method `scale_rate`, and say by `is_finished` that a run that is resumed was at its end.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.label_names = ["labels"]  # `TrainingModel.forward` takes any batch, so they cannot be read off it
        self._terms: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._step_batches: list[dict] = []  # of the step that begins, where its parts have to know each other
        self._step_parts: list[StepPart] = []  # of the micro-batches that are still to come

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs):
        epochs, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs
        )
        # transformers would begin the epoch that `max_steps` lies in again, and take one step before it looks.
        is_finished = self.state.global_step >= max_steps or any(
            callback.is_finished(self.state) for callback in self._callbacks_with("is_finished")
        )
        return (num_train_epochs, 0) if is_finished else (epochs, batches)

    def _callbacks_with(self, method: str) -> list:
        return [callback for callback in self.callback_handler.callbacks if hasattr(callback, method)]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        is_new = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        scaling = self._callbacks_with("scale_rate")
        if is_new and scaling and isinstance(scheduler, LambdaLR):
            scheduler.lr_lambdas = [scaled(rate, scaling) for rate in scheduler.lr_lambdas]
        return scheduler

    def get_batch_samples(self, epoch_iterator, num_batches: int, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        objective = self.accelerator.unwrap_model(self.model).objective
        self._step_parts = []
        self._step_batches = batches if len(batches) > 1 and getattr(objective, "sees_whole_step", False) else []
        return batches, num_items

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._step_batches:
            # Not in `get_batch_samples`: a resumed run restores its random state only behind that.
            self._step_parts, self._step_batches = self._compute_ahead(model), []
        if self._step_parts:
            inputs = dict(inputs) | {"part": self._step_parts.pop(0)}
        return super().training_step(model, inputs, num_items_in_batch)

    def _compute_ahead(self, model) -> list[StepPart]:
        """Run all micro-batches of a step once for what each has to know of the others (gradient caching)."""
        model.train()
        place = self.args.seed, self.state.global_step, self.args.process_index
        parts = [StepPart(seed_of(*place, number)) for number in range(len(self._step_batches))]
        is_sharded, rows = self.is_fsdp_enabled or self.is_deepspeed_enabled, []
        # With gradients, which are dropped, the same code runs as in the pass that needs them; sharded models would wait for
        # a backward pass, and DDP's wrapper as well.
        whole = model if is_sharded else self.accelerator.unwrap_model(model)
        for batch, part in zip(self._step_batches, parts):
            with torch.set_grad_enabled(not is_sharded), self.compute_loss_context_manager():
                batch = send_to_device(batch, self.args.device)
                rows.append(map_tensors(torch.Tensor.detach, whole(**batch, part=part)["rows"]))
        return [StepPart(part.seed, [*rows[:number], *rows[number + 1 :]]) for number, part in enumerate(parts)]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        losses = outputs.pop("losses")
        for name, value in losses.items():
            self._terms[name if model.training else f"eval_{name}"].append(value.detach().float())
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model: nn.Module):
        for callback in self._callbacks_with("before_clipping"):
            callback.before_clipping(self.model)
        return super()._clip_grad_norm(model)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        is_eval = any(name.startswith("eval_") for name in logs)
        if is_eval or "loss" in logs:
            for name in [name for name in self._terms if name.startswith("eval_") == is_eval]:
                mean = torch.stack(self._terms.pop(name)).mean()
                logs[name] = float(self.accelerator.reduce(mean, "mean"))
            for callback in self._callbacks_with("log_terms"):
                logs |= callback.log_terms()
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._is_checkpoint = _internal_call
        super().save_model(output_dir, _internal_call)

    def save_whole(self, folder: str | Path) -> None:
        """Write the model as others read it, which is not how a run's own checkpoints have it."""
        self._is_checkpoint = False
        super().save_model(str(folder), _internal_call=True)  # `True` pushes nothing to the Hub

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        whole = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        state = whole.state_dict() if state_dict is None else state_dict
        state = whole.objective.fold_state(state) if hasattr(whole.objective, "fold_state") else state
        # A run's own checkpoints have the names of the modules, which `Trainer` reads back; what is for others the hub's.
        is_own = self._is_checkpoint and not hasattr(whole.model, "peft_config")
        kept = {"save_original_format": False} if is_own else {}
        whole.model.save_pretrained(output_dir, state_dict=split_state(state, "model."), **kept)
        save_objective(split_state(state, "objective."), output_dir)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        whole = self.model if model is None else model
        if self.is_fsdp_enabled:  # model and objective lie together in shards
            return super()._load_from_checkpoint(resume_from_checkpoint, whole)
        super()._load_from_checkpoint(resume_from_checkpoint, whole.model)
        load_objective(whole.objective, resume_from_checkpoint)
        if hasattr(whole.objective, "unfold_state"):
            whole.objective.unfold_state(whole.model)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def create_model_card(self, *args, **kwargs) -> None:
        """Keep the card of the architecture, in place of the one about a training run."""
        if args or any(value is not None for value in kwargs.values()):
            logger.warning_once(f"The model card is the architecture's: {sorted(kwargs)} are not written into it.")
        if self.is_world_process_zero():
            write_model_card(self.accelerator.unwrap_model(self.model).config, Path(self.args.output_dir))


def save_trained(trainer: LatentTrainer) -> None:
    """Leave a whole checkpoint in the output folder, adapters merged, with its known answers; `config.json` comes last."""
    whole, folder = trainer.accelerator.unwrap_model(trainer.model), Path(trainer.args.output_dir)
    is_writer, is_sharded = trainer.args.should_save, trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    with filled_folder(folder, "config.json", is_writer, trainer.accelerator.wait_for_everyone) as partial:
        if hasattr(whole.model, "peft_config") and not is_sharded:
            if is_writer:
                whole.model.save_pretrained(partial / "adapter")
            whole.model = whole.model.merge_and_unload()
        trainer.save_whole(partial)
        if is_writer and (partial / "config.json").is_file():
            is_alone = trainer.args.world_size == 1 and not is_sharded
            (record_answers if is_alone else record_answers_apart)(partial)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def run_training(trainer: LatentTrainer, keeps_log: bool = False) -> None:
    """Train to the end, from the last checkpoint with `--resume_from_checkpoint last`, and save.

    A run that was at its end takes no further step. No other process may train into the same folder meanwhile.

    Args:
        keeps_log: leave `trainer_state.json`, with all that was logged, beside the model.

    Raises:
        ValueError: another process writes the output folder.
    """
    args = trainer.args
    # The workers of a run that was killed hold its lock until they notice.
    with locked(args.output_dir, wait=30) if args.should_save else nullcontext():
        resume = args.resume_from_checkpoint
        trainer.train(last_complete_checkpoint(args.output_dir) if resume == "last" else resume)
        if keeps_log:
            trainer.save_state()
        save_trained(trainer)
