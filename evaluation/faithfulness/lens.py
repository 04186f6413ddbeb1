"""D10: what do latents say in words? (logit lens; LVR: the top token is always "<"; Laser and CODI show several)

    input     lm_head(norm(z)): the latent as it enters the language model, read as if it were the last state
    output    lm_head of the last hidden state in the latent's column: the word that would follow it

By task, and by the place of the latent: the most frequent top token and its share, the mean entropy of the distribution in nats
(log of the vocabulary: all words alike), and how often the answer's first token is the top one, or among the `TOP`.
"""

from collections import Counter

import torch
from torch import Tensor

from evaluation.faithfulness.collapse import tasks_of
from evaluation.faithfulness.columns import LATENT
from evaluation.faithfulness.observation import Observed, answer_place
from evaluation.faithfulness.result import Result
from evaluation.faithfulness.subject import Subject


TOP = 5
MOST_PLACES = 16  # rows of a task, spread evenly


@torch.no_grad()
def read_words(subject: Subject, states: Tensor, is_input: bool) -> Tensor:
    """(n, V) log-probabilities on the CPU of states (n, D)."""
    model = subject.model
    weight = model.lm_head.weight
    states = states.to(weight.device, weight.dtype)
    states = model.model.language_model.norm(states) if is_input else states
    return model.lm_head(states).float().log_softmax(dim=-1).cpu()


def first_token(subject: Subject, number: int) -> int:
    """The token of the clean answer that begins what is compared with the reference."""
    return subject.given([number])[0][0][answer_place(subject, number)]


def describe_place(subject: Subject, logprobs: list[Tensor], answers: list[int]) -> dict:
    """One row: log-probabilities (V,) of several items at one place, and the first tokens of their answers."""
    values = torch.stack(logprobs)
    top = values.topk(min(TOP, values.shape[1]), dim=-1).indices
    token, count = Counter(top[:, 0].tolist()).most_common(1)[0]
    target = torch.tensor(answers)[:, None]
    frequent = [name for name, _ in Counter(top.flatten().tolist()).most_common(TOP)]
    return {
        "items": len(values),
        "top token": subject.tokenizer.decode([token]),
        "its share": count / len(values),
        "frequent": " ".join(repr(subject.tokenizer.decode([name])) for name in frequent),
        "entropy, nats": float(-(values.exp() * values).sum(dim=-1).mean()),
        "answer on top": float((top[:, :1] == target).float().mean()),
        f"answer in top {TOP}": float((top == target).any(dim=-1).float().mean()),
    }


def measure_lens(subject: Subject, observed: dict[int, Observed]) -> Result:
    """D10, by task and place."""
    rows = []
    for task, members in tasks_of(subject, list(observed)).items():
        read: dict[tuple[str, int], list[tuple[Tensor, int]]] = {}
        for number in members:
            answer = first_token(subject, number)
            states = {"input": subject.clean[number].latents(), "output": observed[number].outputs.get(LATENT)}
            for kind, values in states.items():
                if values is None:
                    continue
                for place, logprobs in enumerate(read_words(subject, values, kind == "input")):
                    read.setdefault((kind, place), []).append((logprobs, answer))
        for kind in ("input", "output"):
            places = sorted(place for one, place in read if one == kind)
            if not places:
                continue
            chosen = torch.linspace(0, len(places) - 1, min(len(places), MOST_PLACES)).long().tolist()
            for place in sorted({places[index] for index in chosen}):
                logprobs, answers = zip(*read[kind, place])
                where = {"task": task, "state": kind, "place": place + 1}
                rows.append(where | describe_place(subject, list(logprobs), list(answers)))
    return Result(
        "D10",
        "D10: latents read as words",
        "The head of the language model on each latent as it enters (input) and on the last hidden state in its column "
        "(output): the most frequent top token, the entropy, and how often the answer's first token is on top.",
        tables={"words": rows},
        notes=[
            "One top token with a share near 1 at every place: read as words, the latents say the same of every picture."
        ],
    )
