"""Keep the processes of a sharded model in step.

Every forward of a sharded layer gathers its weights from all processes, so all must run it equally often: one whose rows
hold fewer blocks, or no image, runs the rest on nothing, and adds the outcome times zero to what it returns.

`lockstep_blocks.py` does so for models that open blocks.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Lockstep:
    """The most work that any process has in one forward, and what was run for other processes alone."""

    block_steps: list[int]  # by number of the block in its row: forwards of the language model inside it
    num_vision_passes: int
    idle: list[Tensor] = field(default_factory=list)


def is_scattered(weight: Tensor) -> bool:
    """Whether a weight lies in parts on several processes: by FSDP2 as a `DTensor`, or by DeepSpeed's ZeRO-3."""
    return hasattr(weight, "placements") or hasattr(weight, "ds_id")


def is_sharded(model: nn.Module) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return any(is_scattered(weight) for weight in model.parameters())


def agree_on_work(block_steps: list[int], num_vision_passes: int, device: torch.device) -> Lockstep:
    """The maximum over all processes of what each of them has to do."""

    def largest(values: list[int]) -> list[int]:
        counts = torch.tensor(values, device=device)
        torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX)
        return counts.tolist()

    num_blocks, num_vision_passes = largest([len(block_steps), num_vision_passes])
    if num_blocks:
        block_steps = largest(block_steps + [0] * (num_blocks - len(block_steps)))
    return Lockstep(block_steps, num_vision_passes)


def keep_in_graph(values: Tensor, idle: list[Tensor]) -> Tensor:
    """Tie what was run for the others alone to a result, whose value stays as it is."""
    return values + sum(0 * unused.float().mean() for unused in idle).to(values) if idle else values


def keep_weights_in_graph(loss: Tensor, modules: list[nn.Module]) -> Tensor:
    """Give every weight of `modules` a gradient of zero: a replica whose batch uses fewer of them must not stall the others."""
    plain = [weight for module in modules for weight in module.parameters()]
    plain = [weight for weight in plain if weight.requires_grad and not is_scattered(weight)]
    return loss + sum((0 * weight.sum() for weight in plain), torch.zeros_like(loss))
