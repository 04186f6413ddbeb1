"""D11: is what is trained what is run?

    lengths      latents per block (per question, where steps are taken) in the data and in the clean answers
    free cosine  teacher-forced on its own clean answer, without anything served: the cosine of each latent with that of the
                 free run. 1 where training and generation are one computation
    gradients    share of items in which the loss of the clean answer has a gradient to latent t, and its mean norm: without
                 one nothing depends on the latent. "taught": the gradient goes on to what made it; as published IVT-LR and
                 Vedas cut it there
    checkpointing  largest difference of loss and of these gradients with gradient checkpointing on and off

The model is left as it was. Shapes: B rows, T answer tokens.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from configuration_latentvlm.transformers_api import CHECKPOINTING
from evaluation.faithfulness.collapse import tasks_of
from evaluation.faithfulness.items import NotApplicable
from evaluation.faithfulness.result import Curve, Result
from evaluation.faithfulness.subject import Subject
from modeling_latentvlm.trace import LatentStep


MOST_ITEMS = 32  # whose gradients are taken


@contextmanager
def checkpointed(model, is_on: bool) -> Iterator[None]:
    """Train mode without dropout, with gradient checkpointing or without."""
    dropouts = {module: module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    was_training, needed = model.training, [weight.requires_grad for weight in model.parameters()]
    try:
        model.train()
        for module in dropouts:
            module.p = 0.0
        if is_on:
            getattr(model, f"{CHECKPOINTING}_enable")()
        yield
    finally:
        if is_on:
            getattr(model, f"{CHECKPOINTING}_disable")()
        for module, share in dropouts.items():
            module.p = share
        for weight, wanted in zip(model.parameters(), needed):
            weight.requires_grad_(wanted)
        model.train(was_training)


@dataclass
class Gradients:
    """What the loss of the clean answers of a batch does to its latents, by (row, place)."""

    loss: float
    by_place: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # (D,) to the latent as it enters
    taught: set[tuple[int, int]] = field(default_factory=set)  # where the gradient goes on to what made the latent


def read_gradients(subject: Subject, numbers: list[int], is_on: bool) -> Gradients:
    """Read the clean answers of a batch as in training, with gradient checkpointing or without."""
    latents: dict[tuple[int, int], Tensor] = {}
    taught: set[tuple[int, int]] = set()

    def keep(values: Tensor, step: LatentStep) -> Tensor:
        if values.requires_grad:
            taught.add((step.row, step.index * 10_000 + step.offset))
        else:
            values = values.detach().requires_grad_()
        values.retain_grad()
        # What is checkpointed runs twice; gradients reach the latents of the last run.
        latents[step.row, step.index * 10_000 + step.offset] = values
        return values

    inputs = subject.encode([subject.items[number].sample for number in numbers])
    answers, steps = subject.given(numbers)
    arguments = subject.architecture.teacher_forced(inputs, answers, steps)
    width = max(map(len, answers))
    targets = torch.full((len(answers), width), -100)
    for row, tokens in enumerate(answers):
        targets[row, : len(tokens)] = torch.tensor(tokens)
        start = subject.architecture.config.opening_token_id
        if start is not None:
            targets[row][targets[row] == start] = -100
    torch.manual_seed(subject.seed)  # of what is drawn while a model trains
    with checkpointed(subject.model, is_on), torch.enable_grad():
        logits = subject.model(**arguments, latent_intervention=keep).logits[:, -width - 1 : -1]
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.to(logits.device).flatten(), reduction="sum")
        loss.backward()
        subject.model.zero_grad(set_to_none=True)
    found = Gradients(float(loss.detach()))
    places: Counter = Counter()
    for (row, order), values in sorted(latents.items()):
        gradient = torch.zeros_like(values) if values.grad is None else values.grad
        for one in gradient.float().cpu():
            found.by_place[row, places[row]] = one
            if (row, order) in taught:
                found.taught.add((row, places[row]))
            places[row] += 1
    return found


@torch.no_grad()
def free_cosines(subject: Subject, numbers: list[int]) -> list[Tensor]:
    """By item the cosine of each latent, teacher-forced and not served, with that of the free run."""
    inputs = subject.encode([subject.items[number].sample for number in numbers])
    answers, steps = subject.given(numbers)
    arguments = subject.architecture.teacher_forced(inputs, answers, steps)
    trace = subject.model(**arguments, output_latents=True).latent_trace.to("cpu")
    found = []
    for row, number in enumerate(numbers):
        forced = torch.cat([step.latents for step in trace.row(row) if len(step.latents)]).float()
        free = torch.cat([step.latents for step in steps[row]]).float()
        if forced.shape != free.shape:
            raise NotApplicable(
                f"item {number} has {len(free)} latents in the free run and {len(forced)} teacher-forced: they cannot be compared"
            )
        found.append(torch.cosine_similarity(forced, free, dim=-1))
    return found


def length_rows(subject: Subject) -> list[dict]:
    """How many latents the steps or blocks of the clean answers have, by task."""
    rows = []
    for task, members in tasks_of(subject, subject.with_latents).items():
        made = Counter(
            f"{h} x {w}" for number in members for h, w in (step.grid for step in subject.clean[number].steps)
        )
        shown = [len(subject.items[number].assistant_images) for number in members]
        rows.append(
            {
                "task": task,
                "blocks or steps a question": sum(len(subject.clean[number].steps) for number in members)
                / len(members),
                "pictures of the assistant a question": sum(shown) / len(members),
                "grids": ", ".join(f"{grid} ({count})" for grid, count in made.most_common(5)),
            }
        )
    return rows


def measure_parity(subject: Subject) -> Result:
    """D11, by task and place."""
    numbers = subject.with_latents[:MOST_ITEMS]
    norms: dict[int, list[float]] = {}
    cosines: dict[int, list[float]] = {}
    taught: Counter = Counter()
    losses = gradients = 0.0
    for batch in subject.batches("gradients of the latents", numbers):
        plain, again = (read_gradients(subject, batch, is_on) for is_on in (False, True))
        losses = max(losses, abs(plain.loss - again.loss) / max(1.0, abs(plain.loss)))
        taught.update(place for _, place in plain.taught)
        for place, gradient in plain.by_place.items():
            norms.setdefault(place[1], []).append(float(gradient.norm()))
            scale = max(1e-12, float(gradient.norm()))
            gradients = max(gradients, float((again.by_place[place] - gradient).norm()) / scale)
        for found in free_cosines(subject, batch):
            for place, cosine in enumerate(found.tolist()):
                cosines.setdefault(place, []).append(cosine)
    rows = [
        {
            "place": place + 1,
            "items": len(values),
            "with a gradient": sum(value > 0 for value in values) / len(values),
            "taught": taught[place] / len(values),
            "mean norm of the gradient": sum(values) / len(values),
            "free cosine": sum(cosines[place]) / len(cosines[place]),
            "least free cosine": min(cosines[place]),
        }
        for place, values in sorted(norms.items())
    ]
    silent = [row["place"] for row in rows if row["with a gradient"] < 1]
    return Result(
        "D11",
        "D11: training is generation",
        "The clean answers read again as in training: the cosine of each latent with that of the free run, whether the loss has "
        "a gradient to it, and what gradient checkpointing changes. Beside it how many latents data and answers have.",
        tables={
            "latents": rows,
            "checkpointing": [{"relative difference of the loss": losses, "of the gradients": gradients}],
            "lengths": length_rows(subject),
        },
        curves=[
            Curve(
                "gradient of the loss to each latent",
                "place",
                "mean norm",
                {"latents": [(row["place"], row["mean norm of the gradient"]) for row in rows]},
            )
        ],
        notes=[
            f"Places {silent} have items without a gradient: nothing that follows depends on these latents."
            if silent
            else "The loss depends on every latent of every item that was read."
        ],
    )
