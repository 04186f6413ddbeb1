"""D7: does a latent look like what it was taught by? (2605.18445)

A block's prediction p_i is the mean of its latents, its oracle o_i the mean of the features of the assistant's picture that SFT
put in its place. Task by task, over the N items of one block:

    retrieval       share of items whose o_i is nearest to p_i among o_1 .. o_N (3.3 % of 300 in the paper; chance 1 / N)
    USP             share of items whose p_i is nearer to another item's prediction than to o_i
    cosine          mean of cos(p_i, o_i)

raw, and centred: less the means of all predictions and of all oracles. Nearness is the cosine. Of items with the same oracle
(the same picture of the assistant) the one that is retrieved may be any.

Shapes: N items, D size of a latent.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from evaluation.faithfulness.arms import oracle_table
from evaluation.faithfulness.collapse import tasks_of
from evaluation.faithfulness.items import NotApplicable
from evaluation.faithfulness.result import Result
from evaluation.faithfulness.statistics import share_interval
from evaluation.faithfulness.subject import Subject


SAME = 1e-6  # cosines that differ by less are of the same oracle


def compare_predictions(predicted: Tensor, oracles: Tensor) -> tuple[list[bool], list[bool], list[float]]:
    """By item: whether its oracle is retrieved, whether another prediction is nearer, and its cosine; (N, D) each, N >= 2."""
    own, others = normalize(predicted.double(), dim=-1), normalize(oracles.double(), dim=-1)
    to_oracles, to_predictions = own @ others.T, own @ own.T  # (N, N)
    cosine = to_oracles.diagonal()
    to_predictions.fill_diagonal_(float("-inf"))
    retrieved = cosine >= to_oracles.amax(dim=1) - SAME
    nearer = to_predictions.amax(dim=1) > cosine
    return retrieved.tolist(), nearer.tolist(), cosine.tolist()


def describe_block(predicted: Tensor, oracles: Tensor, seed: int) -> dict:
    """One row, raw and centred."""
    forms = {
        "": (predicted, oracles),
        "centred ": (predicted - predicted.mean(dim=0), oracles - oracles.mean(dim=0)),
    }
    row = {"items": len(predicted), "chance": 1 / len(predicted)}
    for form, values in forms.items():
        retrieved, nearer, cosine = compare_predictions(*values)
        share, low, high = share_interval([[one] for one in retrieved])
        row |= {f"{form}retrieval": share, f"{form}low": low, f"{form}high": high}
        row |= {f"{form}USP": sum(nearer) / len(nearer), f"{form}cosine": sum(cosine) / len(cosine)}
    return row


def measure_retrieval(subject: Subject) -> Result:
    """D7, by task and block.

    Raises:
        NotApplicable: no picture of the assistant taught the latents, or no two items of a task have one.
    """
    oracles = oracle_table(subject).steps
    rows = []
    for task, members in tasks_of(subject, [number for number in subject.with_latents if number in oracles]).items():
        pairs: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for number in members:
            for block, (step, (_, features)) in enumerate(zip(subject.clean[number].steps, oracles[number])):
                predicted = step.latents.float().mean(dim=0)
                pairs.setdefault(block, []).append((predicted, features.float().mean(dim=0)))
        for block, found in pairs.items():
            if len(found) > 1:
                predicted, taught = (torch.stack(values) for values in zip(*found))
                rows.append({"task": task, "block": block + 1} | describe_block(predicted, taught, subject.seed))
    if not rows:
        raise NotApplicable("retrieval needs two items of one task with latents and pictures of the assistant")
    return Result(
        "D7",
        "D7: retrieval of the oracle",
        "A block's mean latent against the mean features of the assistant's picture: is its own the nearest among all items of "
        "the task, and is another item's prediction nearer (USP)?",
        tables={"retrieval": rows},
        notes=[
            "Retrieval near chance and a USP near 1: predictions look like each other, and not like what they were taught by."
        ],
    )
