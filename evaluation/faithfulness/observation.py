"""Read clean answers once more and look inside: who attends to what, how large states are, what emits the answer.

Every forward of the language model is watched by hooks; `columns.py` tells its new columns apart.
Of attention, rows of single queries alone are computed (`saliency.attention_row`): O(S) memory, with SDPA and the like.

Shapes: B rows, T new columns, S keys, A heads, P prompt columns, M image tokens, D hidden size.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from evaluation.donors import draw_seed
from evaluation.faithfulness.columns import ANSWER, IMAGE, KINDS, LATENT, TEXT, ColumnKinds
from evaluation.faithfulness.lending import table_of
from evaluation.faithfulness.subject import Arm, Subject
from modeling_latentvlm.saliency import SaliencyRecorder, attention_row, record_attention


QUERIES = (LATENT, ANSWER)
MOST_QUERIES = 24  # of a kind in one forward, spread evenly


@dataclass
class Attention:
    """Sums over queries of one kind in one layer of one item."""

    mass: Tensor = field(default_factory=lambda: torch.zeros(len(KINDS)))  # by kind of key
    entropy: float = 0.0  # nats, over all keys
    image_entropy: float = 0.0  # nats, over image tokens, renormalized
    image: Tensor | None = None  # (M,)
    latents: Tensor | None = None  # (latents,)
    queries: int = 0


@dataclass
class Observed:
    """What was seen of one item."""

    attention: dict[tuple[int, int], Attention] = field(
        default_factory=lambda: defaultdict(Attention)
    )  # (kind, layer)
    norms: dict[tuple[int, int], list[float]] = field(
        default_factory=lambda: defaultdict(list)
    )  # (kind, layer; 0: input)
    emitting: Tensor | None = None  # (D,) the last hidden state that predicts the first token of the answer
    question: Tensor | None = None  # (D,) mean text embedding of the prompt
    visual: Tensor | None = None  # (D,) mean image embedding of the prompt
    samples: dict[int, Tensor] = field(default_factory=dict)  # kind -> (n, D) input vectors, for baselines
    outputs: dict[int, Tensor] = field(default_factory=dict)  # kind -> (n, D) last hidden states, of latents alone


class RowRecorder(SaliencyRecorder):
    """Takes the attention rows of chosen queries, beside what the model's own recorder takes."""

    def __init__(self, watcher: "Watcher", inner: SaliencyRecorder | None):
        super().__init__(has_gradients=False)
        self.watcher, self.inner, self.seen = watcher, inner, set()

    def record(self, layer: int, query: Tensor, key: Tensor, attention_mask: Tensor | None, scaling: float) -> None:
        if self.inner is not None:
            self.inner.record(layer, query, key, attention_mask, scaling)
        if layer not in self.seen and query.shape[2] == self.watcher.kinds.shape[1]:
            self.seen.add(layer)
            self.watcher.take_rows(layer, query, key, attention_mask, scaling)


class Watcher(ColumnKinds):
    """Hooks on one forward of a model over a batch."""

    def __init__(self, subject: Subject, numbers: list[int], input_ids: Tensor):
        super().__init__(subject, [subject.clean[number].steps for number in numbers], input_ids)
        self.numbers = numbers
        self.rows = [Observed() for _ in numbers]

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict):
        """Tell the new columns apart and have their attention recorded."""
        embeds = kwargs["inputs_embeds"]
        if self.follow(kwargs):
            self.take_embeddings(embeds)
        self.take_norms(0, embeds)
        return args, kwargs | {"saliency": RowRecorder(self, kwargs.get("saliency"))}

    def take_embeddings(self, embeds: Tensor) -> None:
        for row, seen in enumerate(self.rows):
            if seen.question is not None:
                continue
            identity = self.subject.items[self.numbers[row]].identity
            generator = torch.Generator().manual_seed(draw_seed(self.subject.seed, identity))
            for kind in (TEXT, IMAGE):
                values = embeds[row][self.kinds[row] == kind].float().cpu()
                if len(values):
                    seen.samples[kind] = values[
                        torch.randperm(len(values), generator=generator)[: len(self.latents[row])]
                    ]
                mean = values.mean(dim=0) if len(values) else torch.zeros(embeds.shape[-1])
                setattr(seen, "question" if kind == TEXT else "visual", mean)

    def take_norms(self, layer: int, states: Tensor) -> None:
        norms = states.float().norm(dim=-1)
        for row, seen in enumerate(self.rows):
            for kind in range(len(KINDS)):
                found = norms[row][self.kinds[row] == kind]
                if len(found):
                    seen.norms[kind, layer] += found.tolist()

    def take_outputs(self, states: Tensor) -> None:
        """Keep the last hidden states in the columns of latents; what runs again counts as it ran last."""
        order = self.key_order[:, -states.shape[1] :]
        for row, seen in enumerate(self.rows):
            is_latent = self.kinds[row] == LATENT
            if bool(is_latent.any()):
                empty = torch.full((len(self.latents[row]), states.shape[-1]), float("nan"))
                seen.outputs.setdefault(LATENT, empty)[order[row][is_latent].cpu()] = (
                    states[row][is_latent].float().cpu()
                )

    def take_rows(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> None:
        """Attention of latent and answer columns, mean over heads, added up by kind of key."""
        for kind in QUERIES:
            columns = (self.kinds == kind).any(dim=0).nonzero().flatten()
            if len(columns) > MOST_QUERIES:
                columns = columns[torch.linspace(0, len(columns) - 1, MOST_QUERIES).long()]
            for column in columns.tolist():
                chosen = torch.full((len(query),), column, device=query.device)
                attention = attention_row(query, key, mask, scaling, chosen).mean(dim=1)  # (B, S)
                for row in (self.kinds[:, column] == kind).nonzero().flatten().tolist():
                    self.add_row(kind, layer, row, attention[row])

    def add_row(self, kind: int, layer: int, row: int, attention: Tensor) -> None:
        keys = self.keys[row]
        if kind == LATENT and not bool((keys == IMAGE).any()):
            return  # read once more without the image, for an answer that is not to see it
        total = self.rows[row].attention[kind, layer]
        mass = torch.stack([attention[keys == kind].sum() for kind in range(len(KINDS))])
        total.mass += mass.cpu()
        total.entropy += entropy(attention)
        image = attention[keys == IMAGE]
        if len(image):
            total.image_entropy += entropy(image / image.sum().clamp(min=1e-12))
            total.image = image.cpu() + (0 if total.image is None else total.image)
        is_latent = keys == LATENT
        by_latent = torch.zeros(len(self.latents[row]), device=attention.device)
        by_latent.index_add_(0, self.key_order[row][is_latent], attention[is_latent])
        total.latents = by_latent.cpu() + (0 if total.latents is None else total.latents)
        total.queries += 1


def entropy(values: Tensor) -> float:
    """-sum p ln p in nats."""
    return float(-(values * values.clamp(min=1e-12).log()).sum())


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    model = watcher.subject.model
    text_model = model.model.language_model
    record_attention(text_model)
    hooks = [text_model.register_forward_pre_hook(watcher.before_forward, with_kwargs=True)]

    def keep(layer: int):
        return lambda module, args, output: watcher.take_norms(
            layer, output[0] if isinstance(output, tuple) else output
        )

    for number, layer in enumerate(text_model.layers, 1):
        hooks.append(layer.register_forward_hook(keep(number)))

    def keep_last(module: nn.Module, args: tuple, output) -> None:
        watcher.take_norms(len(text_model.layers) + 1, output.last_hidden_state)
        watcher.take_outputs(output.last_hidden_state)

    hooks.append(text_model.register_forward_hook(keep_last))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def answer_place(subject: Subject, number: int) -> int:
    """Which token of a clean answer begins what is compared with the reference: inside `\\boxed{}`, else behind the latents."""
    tokens = subject.given([number])[0][0]
    places = subject.architecture.scored(tokens)
    clean = subject.clean[number]
    at = clean.written.rfind("\\boxed{")
    if at >= 0:
        for place in range(len(tokens)):
            if len(subject.tokenizer.decode(tokens[: place + 1], skip_special_tokens=True)) > at + len("\\boxed{"):
                return place
    return places[0] if places else max(0, len(tokens) - 1)


@torch.no_grad()
def observe(subject: Subject) -> dict[int, Observed]:
    """Watch the model read its own clean answers: by number of the item, those with latents."""
    observed = {}
    replay = Arm("replay", "clean latents", table_of(subject, {number: number for number in subject.with_latents}))
    for batch in subject.batches("looking inside", subject.with_latents):
        inputs = subject.encode([subject.items[number].sample for number in batch])
        watcher, emitted = Watcher(subject, batch, inputs["input_ids"]), []
        hook = subject.model.lm_head.register_forward_pre_hook(lambda module, args: emitted.append(args[0]))  # noqa: B023
        try:
            with watched(watcher):
                width = subject.read(batch, replay)[0].shape[1]
        finally:
            hook.remove()
        for row, number in enumerate(batch):
            place = answer_place(subject, number)
            watcher.rows[row].emitting = emitted[-1][row, -width:][place].float().cpu()
            observed[number] = watcher.rows[row]
    return observed
