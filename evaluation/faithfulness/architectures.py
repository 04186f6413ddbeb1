"""Latents that are steps and latents that are blocks, for the report: how latents are switched off, counted and read under teacher forcing.

Shapes: B rows, P prompt columns, T answer tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.utils.rnn import pad_sequence

from configuration_latentvlm import ARCHITECTURES
from configuration_latentvlm.latent_architecture import changed_fields, has_latents
from evaluation.analyses.collection import check_steps
from evaluation.faithfulness.items import NotApplicable
from modeling_latentvlm.trace import LatentStep


SWEEP = (0, 1, 2, 3, 4, 6, 8, 12, 16, 20)
IGNORED = -100


class StepArchitecture:
    """Latent steps between prompt and answer."""

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
        fields, arguments = self.config.limit_latents(count)
        with changed_fields(self.config, **fields):
            yield arguments

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
        slots = self.config.step_tokens()
        # Without any, labels tell where an answer begins.
        return self.joined(inputs, answers, slots, has_labels=not slots)

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

    @contextmanager
    def markers_only(self, inputs: dict, answer_tokens: list[list[int]]) -> Iterator[tuple[dict, dict, list[int]]]:
        """A context in which `generate` gets the markers of latents and no latents; it gives (inputs, settings, answer
        tokens that stand in the prompt by now).

        Raises:
            NotApplicable: there are no markers.
        """
        markers = self.config.marker_ids
        if not markers:
            raise NotApplicable(f"{self.config.model_type} puts no markers around its latents")
        prompt, mask = inputs["input_ids"], inputs["attention_mask"]
        added = torch.tensor(markers, device=prompt.device).expand(len(prompt), -1)
        changed = dict(inputs) | {
            "input_ids": torch.cat([prompt, added], dim=1),
            "attention_mask": torch.cat([mask, torch.ones_like(added)], dim=1),
        }
        with self.as_ordinary_tokens() as settings:
            yield changed, settings | {"suppress_tokens": markers}, [0] * len(prompt)

    @contextmanager
    def as_ordinary_tokens(self) -> Iterator[dict]:
        """No latents, and the architecture's own tokens taken for tokens of the backbone; gives settings of `generate`.

        Without latents a model drops or refuses its tokens: under other ids it does not know them.
        """
        ids = dict.fromkeys(self.config.latent_token_fields, self.config.unused_token_id)
        with self.with_latents(0) as settings, changed_fields(self.config, **ids):
            yield settings


class BlockArchitecture(StepArchitecture):
    """Latent blocks that the model opens in its text."""

    def check(self) -> None:
        if self.config.latent_count < 1:
            raise ValueError(
                f"The model opens no latent blocks: `{self.config.latent_count_field}` is {self.config.latent_count}."
            )

    def settings(self) -> dict:
        return {self.config.least_count_argument: self.min_latent_blocks} if self.min_latent_blocks else {}

    @contextmanager
    def with_latents(self, count: int) -> Iterator[dict]:
        """Blocks of `count` x `count` latents (autoregressive: 1 x `count`); none with 0."""
        if count == 0:
            with self.with_steps(0) as settings:
                yield settings
            return
        has_grid = self.config.latent_grid_limit is not None
        yield self.settings() | {self.config.latent_grid_argument: (count if has_grid else 1, count)}

    @contextmanager
    def with_steps(self, count: int) -> Iterator[dict]:
        fields, arguments = self.config.limit_latents(count)
        with changed_fields(self.config, **fields):
            yield arguments | {self.config.least_count_argument: min(count, self.min_latent_blocks)}

    def sweep(self) -> list[tuple[str, int]]:
        most = self.config.latent_grid_limit
        if most is not None:
            sides = [side for side in (1, 2, 4, 8, 16, 24) if side <= most]
            return [("no blocks", 0), *((f"{side} x {side} = {side * side} latents", side) for side in sides)]
        return [(f"{count} latents", count) for count in SWEEP]

    def visible(self, tokens: list[int]) -> list[int]:
        return [token for token in tokens if token != self.config.opening_token_id]

    def scored(self, tokens: list[int], has_latents: bool = True) -> list[int]:
        start = self.config.opening_token_id
        first = tokens.index(start) if start in tokens else len(tokens)
        return [place for place, token in enumerate(tokens) if place > first and token != start]

    def teacher_forced(self, inputs: dict, answers: list[list[int]], steps: list[list[LatentStep]]) -> dict:
        arguments = self.joined(inputs, answers, [])
        start, grids = self.config.opening_token_id, []
        for tokens, row in zip(answers, steps):
            if start in tokens:
                grids += [step.grid for step in row[: tokens.count(start)]]
        if grids:
            arguments["latent_grid_hw"] = torch.tensor(grids, dtype=torch.long)
        return arguments

    @contextmanager
    def markers_only(self, inputs: dict, answer_tokens: list[list[int]]):
        config = self.config
        start, end = config.marker_ids
        begun = [tokens[: tokens.index(start)] if start in tokens else [] for tokens in answer_tokens]
        begun = [[*tokens, start, end] if start in whole else [] for tokens, whole in zip(begun, answer_tokens)]
        changed = put_before(inputs, begun, config.get_text_config().pad_token_id or 0)
        inner = [getattr(config, name) for name in config.latent_token_fields]
        with self.as_ordinary_tokens() as settings:
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


def architecture_of(model, min_latent_blocks: int = 0) -> StepArchitecture:
    """The architecture of a model, checked to make latents.

    Raises:
        ValueError: a model without latents, or one that is configured to make none.
    """
    if not has_latents(model.config):
        raise ValueError(
            f"The report needs a model with latents, one of {sorted(ARCHITECTURES)}; this one is a "
            f"{model.config.model_type!r}, which has none."
        )
    kind = BlockArchitecture if model.config.latent_unit == "block" else StepArchitecture
    found = kind(model, min_latent_blocks)
    found.check()
    return found
