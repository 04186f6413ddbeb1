"""D12: does the model enter latent mode at all?

Share of items that do, blocks (or steps) an item, latents a block, share of latents among all positions that the answer
takes, and why answers end.
"""

from collections import Counter

import numpy as np

from evaluation.faithfulness.outcomes import describe_form
from evaluation.faithfulness.result import Curve, Result
from evaluation.faithfulness.statistics import share_interval
from evaluation.faithfulness.subject import Answer, Subject


def audit(answers: list[Answer]) -> dict:
    blocks = [len(answer.steps) for answer in answers]
    latents = [answer.num_latents for answer in answers]
    sizes = [len(step.latents) for answer in answers for step in answer.steps]
    words = [len(answer.tokens) for answer in answers]
    row = {
        "items": len(answers),
        "in latent mode": float(np.mean([count > 0 for count in blocks])),
        "blocks or steps an item": float(np.mean(blocks)),
        "latents a block or step": float(np.mean(sizes)) if sizes else 0.0,
        "latents an item": float(np.mean(latents)),
        "answer tokens an item": float(np.mean(words)),
        "share of latents": sum(latents) / max(1, sum(latents) + sum(words)),
    }
    return row | {
        f"stopped by {reason}": count / len(answers)
        for reason, count in sorted(Counter(answer.stop_reason for answer in answers).items())
    }


def audit_items(subject: Subject, numbers: list[int]) -> dict:
    """`audit` of some items, with the interval of the share that entered latent mode and the form of their answers."""
    answers = [subject.clean[number] for number in numbers]
    readings = subject.readings(answers, numbers)
    _, low, high = share_interval([[bool(answer.steps)] for answer in answers])
    return audit(answers) | {
        "in latent mode, low": low,
        "in latent mode, high": high,
        **describe_form(readings),
    }


def measure_invocation(subject: Subject) -> Result:
    counts = Counter(len(answer.steps) for answer in subject.clean)
    result = Result(
        "D12",
        "D12: is latent mode entered?",
        "Share of items with latents, how many, their share of all positions of the answers, and why answers end.",
        tables={
            "audit": [{"task": task} | audit_items(subject, numbers) for task, numbers in subject.tasks().items()]
        },
        curves=[
            Curve(
                "blocks or steps an item",
                "blocks or steps",
                "items",
                {"items": [(str(count), counts[count]) for count in sorted(counts)]},
                "bar",
            )
        ],
    )
    if subject.architecture.min_latent_blocks:
        result.notes.append(
            f"`--min-latent-blocks {subject.architecture.min_latent_blocks}`: blocks were forced open, "
            "so the share in latent mode says little."
        )
    if subject.model.config.latent_unit == "step":
        result.notes.append(
            "This architecture takes its steps behind every prompt, so the share in latent mode is 1 by construction."
        )
    unfinished = sum(answer.stop_reason == "max_length" for answer in subject.clean)
    if unfinished:
        result.notes.append(f"{unfinished} answers were cut off by the token budget ({subject.max_new_tokens}).")
    return result
