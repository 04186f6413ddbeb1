"""What differs between architectures, for the report: how latents are switched off, counted and read under teacher forcing.

Shapes: B rows, P prompt columns, T answer tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.utils.rnn import pad_sequence

from evaluation.analyses.collection import STEP_FIELDS, check_steps
from evaluation.faithfulness.items import NotApplicable
from modeling_latentvlm.trace import LatentStep


SWEEP = (0, 1, 2, 3, 4, 6, 8, 12, 16, 20)
IGNORED = -100


@contextmanager
def changed_fields(config, **fields) -> Iterator[None]:
    """Set config fields for a while."""
    kept = {name: getattr(config, name) for name in fields}
    try:
        for name, value in fields.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(config, name, value)


class Architecture:
    """Latent steps between prompt and answer (LaRe, Vedas)."""

    names_oracle = False  # whether pictures of the assistant taught the latents

    def __init__(self, model, min_latent_blocks: int = 0):
        self.model, self.config, self.min_latent_blocks = model, model.config, min_latent_blocks

    @property
    def image_token_id(self) -> int:
        return self.config.image_token_id

    def settings(self) -> dict:
        """For every call of `generate`."""
        return {}

    def check(self) -> None:
        """Raise where the model makes no latents.

        Raises:
            ValueError: it is configured to take no steps.
        """
        check_steps(self.config)

    @contextmanager
    def with_latents(self, count: int) -> Iterator[dict]:
        """Take `count` steps (0: none); gives settings of `generate`."""
        fields = {STEP_FIELDS[self.config.model_type]: count}
        if hasattr(self.config, "adaptive_stop"):
            fields["adaptive_stop"] = None
        with changed_fields(self.config, **fields):
            yield {}

    @contextmanager
    def with_steps(self, count: int) -> Iterator[dict]:
        """Take `count` steps, or open at most so many blocks; gives settings of `generate`."""
        with self.with_latents(count) as settings:
            yield settings

    def sweep(self) -> list[tuple[str, int]]:
        """(label, count for `with_latents`) of the K sweep (D13: 0..20)."""
        return [(f"{count} steps", count) for count in SWEEP]

    def visible(self, tokens: list[int]) -> list[int]:
        """An answer without what opens blocks."""
        return tokens

    def scored(self, tokens: list[int], has_latents: bool = True) -> list[int]:
        """Which tokens of an answer (as `visible` counts them) are written behind the first latent."""
        return list(range(len(tokens)))

    def teacher_forced(self, inputs: dict, answers: list[list[int]], steps: list[list[LatentStep]]) -> dict:
        """Arguments of `forward`; of its last T + 1 columns, column j predicts token j of the answer."""
        return self.joined(inputs, answers, [])

    def joined(self, inputs: dict, answers: list[list[int]], slots: list[int], has_labels: bool = False) -> dict:
        """Prompt (padded on the left), what stands for latents, and answer (padded on the right)."""
        prompt, mask = inputs["input_ids"], inputs["attention_mask"]
        device = prompt.device
        rows = [torch.tensor(tokens, dtype=torch.long, device=device) for tokens in answers]
        padded = pad_sequence(rows, batch_first=True, padding_value=IGNORED)
        is_real = padded != IGNORED
        places = torch.tensor(slots, dtype=prompt.dtype, device=device).expand(len(prompt), -1)
        arguments = {name: value for name, value in inputs.items() if name.startswith(("pixel", "image_grid"))}
        pad = self.config.get_text_config().pad_token_id or 0
        arguments["input_ids"] = torch.cat([prompt, places, padded.masked_fill(~is_real, pad)], dim=1)
        arguments["attention_mask"] = torch.cat([mask, torch.ones_like(places), is_real.to(mask)], dim=1)
        if has_labels:
            nothing = torch.full_like(torch.cat([prompt, places], dim=1), IGNORED)
            arguments["labels"] = torch.cat([nothing, padded], dim=1)
        else:
            arguments["logits_to_keep"] = padded.shape[1] + 1
        return arguments

    def markers_only(self, inputs: dict, answer_tokens: list[list[int]]):
        """A context in which `generate` gets the markers of latents and no latents; it gives (inputs, settings, answer
        tokens that stand in the prompt by now).

        Raises:
            NotApplicable: there are no markers.
        """
        raise NotApplicable("this architecture puts no markers around its latents")


class LaReArchitecture(Architecture):
    def __init__(self, model, min_latent_blocks: int = 0):
        super().__init__(model, min_latent_blocks)
        self.markers = [self.config.bot_token_id, self.config.eot_token_id]

    @contextmanager
    def with_latents(self, count: int) -> Iterator[dict]:
        most = max(count, self.config.max_refocus_steps)
        with changed_fields(self.config, max_refocus_steps=most), super().with_latents(count) as settings:
            yield settings

    def teacher_forced(self, inputs: dict, answers: list[list[int]], steps: list[list[LatentStep]]) -> dict:
        return self.joined(inputs, answers, self.markers)  # side by side they say where latents go, with K = 0 too

    @contextmanager
    def markers_only(self, inputs: dict, answer_tokens: list[list[int]]):
        prompt, mask = inputs["input_ids"], inputs["attention_mask"]
        markers = torch.tensor(self.markers, device=prompt.device).expand(len(prompt), -1)
        changed = dict(inputs) | {
            "input_ids": torch.cat([prompt, markers], dim=1),
            "attention_mask": torch.cat([mask, torch.ones_like(markers)], dim=1),
        }
        # Without steps LaRe drops both markers: under other ids they are ordinary tokens of its backbone.
        ids = {"bot_token_id": -1, "eot_token_id": -1}
        with self.with_latents(0) as settings, changed_fields(self.config, **ids):
            yield changed, settings | {"suppress_tokens": self.markers}, [0] * len(prompt)


class VedasArchitecture(Architecture):
    def teacher_forced(self, inputs: dict, answers: list[list[int]], steps: list[list[LatentStep]]) -> dict:
        slots = [self.config.latent_token_id] * self.config.num_latent_steps
        return self.joined(
            inputs, answers, slots, has_labels=not slots
        )  # without slots labels tell where an answer begins

    def markers_only(self, inputs: dict, answer_tokens: list[list[int]]):
        raise NotApplicable("Vedas puts no markers around its latents: a step is replayed image tokens and z alone")


class DeepLatentArchitecture(Architecture):
    """Latent blocks that the model opens in its text."""

    names_oracle = True

    def check(self) -> None:
        if self.config.max_latent_blocks < 1:
            raise ValueError(
                f"The model opens no latent blocks: `max_latent_blocks` is {self.config.max_latent_blocks}."
            )

    def settings(self) -> dict:
        return {"min_latent_blocks": self.min_latent_blocks} if self.min_latent_blocks else {}

    @contextmanager
    def with_latents(self, count: int) -> Iterator[dict]:
        """Blocks of `count` x `count` latents (autoregressive: 1 x `count`); none with 0."""
        if count == 0:
            yield {"max_latent_blocks": 0, "min_latent_blocks": 0}
            return
        is_parallel = self.config.latent_mode == "parallel"
        yield self.settings() | {"latent_grid": (count if is_parallel else 1, count)}

    @contextmanager
    def with_steps(self, count: int) -> Iterator[dict]:
        yield {"max_latent_blocks": count, "min_latent_blocks": min(count, self.min_latent_blocks)}

    def sweep(self) -> list[tuple[str, int]]:
        if self.config.latent_mode == "parallel":
            sides = [side for side in (1, 2, 4, 8, 16, 24) if side <= self.config.latent_grid_size]
            return [("no blocks", 0), *((f"{side} x {side} = {side * side} latents", side) for side in sides)]
        return [(f"{count} latents", count) for count in SWEEP]

    def visible(self, tokens: list[int]) -> list[int]:
        return [token for token in tokens if token != self.config.latent_start_token_id]

    def scored(self, tokens: list[int], has_latents: bool = True) -> list[int]:
        start = self.config.latent_start_token_id
        first = tokens.index(start) if start in tokens else len(tokens)
        return [place for place, token in enumerate(tokens) if place > first and token != start]

    def teacher_forced(self, inputs: dict, answers: list[list[int]], steps: list[list[LatentStep]]) -> dict:
        arguments = self.joined(inputs, answers, [])
        start, grids = self.config.latent_start_token_id, []
        for tokens, row in zip(answers, steps):
            if start in tokens:
                grids += [step.grid for step in row[: tokens.count(start)]]
        if grids:
            arguments["latent_grid_hw"] = torch.tensor(grids, dtype=torch.long)
        return arguments

    @contextmanager
    def markers_only(self, inputs: dict, answer_tokens: list[list[int]]):
        config = self.config
        start, end = config.latent_start_token_id, config.latent_end_token_id
        inner = [start, config.latent_pad_token_id, end]
        begun = [tokens[: tokens.index(start)] if start in tokens else [] for tokens in answer_tokens]
        begun = [[*tokens, start, end] if start in whole else [] for tokens, whole in zip(begun, answer_tokens)]
        changed = put_before(inputs, begun, config.get_text_config().pad_token_id or 0)
        # `<latent>` and `</latent>` alone would be a broken block; under another id, that nothing here uses, they are tokens.
        unused = config.video_token_id
        ids = dict.fromkeys(("latent_start_token_id", "latent_pad_token_id", "latent_end_token_id"), unused)
        with self.with_latents(0) as settings, changed_fields(config, **ids):
            yield changed, settings | {"suppress_tokens": inner}, [len(tokens) for tokens in begun]


def put_before(inputs: dict, tokens: list[list[int]], pad: int) -> dict:
    """Extend every prompt by tokens of its own, padded on the left again."""
    prompt, mask = inputs["input_ids"], inputs["attention_mask"]
    device = prompt.device
    rows = [
        torch.cat([row[kept.bool()], torch.tensor(more, dtype=torch.long, device=device)])
        for row, kept, more in zip(prompt, mask, tokens)
    ]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
    ones = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return {name: value for name, value in inputs.items() if name != "mm_token_type_ids"} | {
        "input_ids": ids,
        "attention_mask": ones.to(mask),
    }


ARCHITECTURES: dict[str, type[Architecture]] = {
    "lare": LaReArchitecture,
    "vedas": VedasArchitecture,
    "deeplatent": DeepLatentArchitecture,
}


def architecture_of(model, min_latent_blocks: int = 0) -> Architecture:
    """The architecture of a model, checked to make latents.

    Raises:
        ValueError: a model of another kind, or one that is configured to make none.
    """
    kind = ARCHITECTURES.get(model.config.model_type)
    if kind is None:
        raise ValueError(
            f"The report needs a model with latents, one of {sorted(ARCHITECTURES)}; this one is a "
            f"{model.config.model_type!r}, which has none."
        )
    found = kind(model, min_latent_blocks)
    found.check()
    return found
