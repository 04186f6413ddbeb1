"""Keep the gradients that the two kinds of action give to the language model apart, and scale one before they are added.

The log-density of a modulation is a sum over all its elements, so that its gradient grows with the width of the model: in the
language model, which both kinds of action train, it is hundreds of times as long as that of the words, and thousands of times
in a wide one (`benchmarks/gradient_shares.py`). A clip of their sum would scale the words away. So each kind has a backward
pass and a buffer of its own, and when the step is whole

    g = g_words + min(1, limit * |g_words| / |g_latents|) * g_latents

The norms are of the whole step, over all micro-batches and processes: they are measured and not estimated, at the price of one
more backward pass and of one more gradient of the language model in memory. What the latents give to their own weights, the
modulation, is left as it is.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ApartGradients:
    """The gradient of the latents in weights that the words train too.

    Args:
        limit: largest ratio of its norm to that of the words' gradient.
    """

    def __init__(self, limit: float):
        self.limit = limit
        self.latents: dict[nn.Parameter, Tensor | None] = {}

    @contextmanager
    def of_latents(self, shared: Iterable[nn.Parameter]) -> Iterator[None]:
        """Gradients that are computed inside are added to the latents', not to the words'."""
        shared = list(shared)
        words = [parameter.grad for parameter in shared]
        for parameter in shared:
            parameter.grad = self.latents.get(parameter)
        try:
            yield
        finally:
            for parameter, grad in zip(shared, words):
                self.latents[parameter], parameter.grad = parameter.grad, grad

    @torch.no_grad()
    def merge(
        self, shared: list[nn.Parameter], others: list[nn.Parameter], num_processes: int = 1
    ) -> dict[str, Tensor]:
        """Average all gradients over the processes, add those of the latents, scaled, to the words', and forget them.

        Args:
            shared: weights that both kinds train.
            others: weights whose gradients were not exchanged either.

        Returns:
            The norms in `shared` before it, `words` and `latents`, and the `scale` of the latents.
        """
        if num_processes > 1:
            self.exchange(shared, others, num_processes)
        latents = {parameter: grad for parameter in shared if (grad := self.latents.get(parameter)) is not None}
        words = norm_of([parameter.grad for parameter in shared if parameter.grad is not None], shared[0])
        length = norm_of(list(latents.values()), shared[0])
        # Without a gradient of words there is nothing to outweigh.
        is_free = (words == 0) | (length <= self.limit * words)
        scale = torch.where(is_free, torch.ones_like(words), self.limit * words / length)
        for parameter, grad in latents.items():
            grad = grad * scale.to(grad)
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        self.latents.clear()
        return {"words": words, "latents": length, "scale": scale}

    def exchange(self, shared: list[nn.Parameter], others: list[nn.Parameter], num_processes: int) -> None:
        """All processes take part for every weight, also those whose batch gave it no gradient."""

        def average(grad: Tensor | None, parameter: nn.Parameter) -> Tensor:
            grad = torch.zeros_like(parameter) if grad is None else grad
            torch.distributed.all_reduce(grad)
            return grad.div_(num_processes)

        for parameter in (*shared, *others):
            parameter.grad = average(parameter.grad, parameter)
        for parameter in shared:
            self.latents[parameter] = average(self.latents.get(parameter), parameter)


def norm_of(gradients: list[Tensor], like: Tensor) -> Tensor:
    """Length of gradients as one vector, float32 scalar on the device of `like`."""
    if not gradients:
        return torch.zeros((), device=like.device)
    return torch.stack([grad.float().norm() for grad in gradients]).norm()
