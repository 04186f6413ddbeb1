"""Answers that may not attend to the picture: what they know of it must pass through the latents (CVRR 2609.06746).

A forward pre-hook on every self-attention hides columns from the answer's queries. Latents are made as ever; what is written
behind the first of them sees, of the kinds in `columns.py`,

    "image"     no image tokens, and none that are replayed. The question's own columns, which have read the picture, stay
    "prompt"    nothing but latents and what is already written of the answer
    "vectors"   the same, and the columns of the latents see nothing but latents as well: in the two ways above they still read
                the picture in every layer, here all that is left of it is the vectors that went in

A token that is emitted at the last latent itself (Vedas, LaRe: the first one of the answer) is predicted by a column that sees
all: it is no answer's query.

Shapes: B rows, T new columns, S keys.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from evaluation.faithfulness.columns import ANSWER, IMAGE, LATENT, REPLAY, TEXT, ColumnKinds
from evaluation.faithfulness.items import NotApplicable
from evaluation.faithfulness.subject import Answer, Arm, Subject
from modeling_latentvlm.trace import LatentStep


# By name of the cut: which queries do not see which keys.
CUTS = {
    "image": ((ANSWER,), (IMAGE, REPLAY)),
    "prompt": ((ANSWER,), (IMAGE, REPLAY, TEXT)),
    "vectors": ((ANSWER, LATENT), (IMAGE, REPLAY, TEXT)),
}


def hide(mask: Tensor | None, kinds: Tensor, keys: Tensor, what: str, dtype: torch.dtype) -> Tensor | None:
    """The attention mask (B, 1, T, S) with one of `CUTS` made.

    Args:
        mask: as the attention gets it: None for causal, bool (True: attend), or floating-point to be added.
        kinds: (B, T) of the queries.
        keys: (B, S) kinds of the keys.

    Raises:
        ValueError: a mask of another form.
    """
    queries_cut, keys_hidden = (torch.tensor(kinds_of, device=keys.device) for kinds_of in CUTS[what])
    is_cut = torch.isin(kinds, queries_cut)
    if not bool(is_cut.any()):
        return mask
    forbidden = is_cut[:, :, None] & torch.isin(keys, keys_hidden)[:, None, :]
    queries, length = kinds.shape[1], keys.shape[1]
    if mask is None:
        mask = torch.ones(queries, length, dtype=torch.bool, device=keys.device).tril(length - queries)[None, None]
    if mask.ndim != 4 or mask.shape[2:] != (queries, length):
        raise ValueError(
            f"The attention can be cut with masks of shape (rows, heads, {queries}, {length}) alone, got {tuple(mask.shape)}: "
            "load the model with `attn_implementation` sdpa or eager."
        )
    if mask.dtype == torch.bool:
        return mask & ~forbidden[:, None]
    return mask.expand(len(kinds), -1, -1, -1).masked_fill(forbidden[:, None], torch.finfo(dtype).min)


@contextmanager
def cut_attention(
    subject: Subject, what: str, served: list[list[LatentStep]], input_ids: Tensor
) -> Iterator[ColumnKinds]:
    """Within it the attention of this batch is cut as `CUTS[what]` says."""
    text_model, columns = subject.model.model.language_model, ColumnKinds(subject, served, input_ids)

    def follow(module: nn.Module, args: tuple, kwargs: dict) -> None:
        columns.follow(kwargs)

    def cut(module: nn.Module, args: tuple, kwargs: dict):
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if states.shape[1] != columns.kinds.shape[1]:
            return None  # a routed pass of Vedas over chosen tokens, of which none is an answer's
        mask = hide(kwargs.get("attention_mask"), columns.kinds, columns.keys, what, states.dtype)
        return args, kwargs | {"attention_mask": mask}

    hooks = [text_model.register_forward_pre_hook(follow, with_kwargs=True)]
    hooks += [layer.self_attn.register_forward_pre_hook(cut, with_kwargs=True) for layer in text_model.layers]
    try:
        yield columns
    finally:
        for hook in hooks:
            hook.remove()


def answer_cut(subject: Subject, arm: Arm, served: dict[int, list[LatentStep]], what: str) -> list[Answer]:
    """Answers of the items in `served`, in their order, under an arm that serves these latents.

    Raises:
        NotApplicable: `routing_scope="reference"`, where answers run deeper too, in a pass that no mask reaches.
    """
    if subject.model.config.recomputes_sequence:
        raise NotApplicable("with `routing_scope='reference'` answers are routed as well, and that pass cannot be cut")
    answers: list[Answer] = []
    for batch in subject.batches(f"answering, {arm.title}, {what} cut", list(served)):
        inputs = subject.encode([subject.items[number].sample for number in batch])
        with cut_attention(subject, what, [served[number] for number in batch], inputs["input_ids"]):
            answers += subject.generate(inputs, arm, batch)
    return answers
