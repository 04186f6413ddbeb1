"""A model of questions that need one step after the other, whose use of its latents is known: no weights, no training.

A picture of 4 x 4 cells shows a ring of 8 tiles, each of which leads to one other; the question names a tile and a number of moves k.
The model takes four latent steps (as Vedas does) and replays one image token at each.

    steps     latent i says which tile one is on after i moves, made from latent i - 1 and the picture; who has arrived stays. The answer is
              read off the last latent
    useless   latents are constant, and the answer is read off the picture
    first     latent 1 says all that comes, as a list; the others are empty

A latent that says nothing clearly (a mean of several) makes the answer "well, well". The replayed token of step i is the tile of step i
("steps"), or always the first token.
"""

from dataclasses import dataclass
from random import Random
from types import SimpleNamespace

import torch
from PIL import Image
from toy_subject import EOS, GARBAGE, ToyConfig, ToyModel, ToyProcessor
from transformers import BatchFeature

from evaluation.faithfulness.items import Item
from evaluation.faithfulness.subject import Subject
from evaluation.rows import EvaluationRow
from modeling_latentvlm.trace import LatentStep, LatentTrace


COLORS = ("red", "green", "blue", "yellow", "white", "black", "purple", "cyan")
MOVES, CELL, SIDE = 4, 4, 4  # largest k and number of steps; pixels a cell; cells a side
NUMBER, WORD = 20, 60  # first tokens of numbers and of colors
SIZE = MOVES * len(COLORS)


def serial_items(count: int = 128, seed: int = 0) -> list[Item]:
    """Questions about as many pictures; k = 1..4 in turn."""
    random, items = Random(seed), []
    for index in range(count):
        ring, cells, need = random.sample(range(8), 8), random.sample(range(SIDE * SIDE), 8), 1 + index % MOVES
        picture = Image.new("RGB", (SIDE * CELL, SIDE * CELL), (index % 256, index // 256, 0))
        for place, color in enumerate(ring):
            # What the processor reads: where each color leads, and its cell.
            picture.putpixel((color, 0), (ring[(place + 1) % 8], cells[color], 0))
        names = [COLORS[color] for color in ring]
        boxes = [box_of(cells[color]) for color in ring[1 : need + 1]]
        serial = {
            "start": names[0],
            "num_steps": need,
            "way": names,
            "following": dict(zip(names, names[1:] + names[:1])),
            "contents": {name: name for name in COLORS},
        }
        row = EvaluationRow(
            [picture],
            f"{need} {names[0]}",
            [],
            names[need],
            f"Line {index}",
            id=f"q{index}",
            data="data.jsonl",
            family="serial",
            task="hops",
            choices=COLORS,
            is_lettered=False,
            answer_format="choice",
        )
        items.append(Item(row, boxes, row=row, serial=serial))
    return items


def box_of(cell: int) -> tuple[int, int, int, int]:
    top, left = (CELL * line for line in divmod(cell, SIDE))
    return left, top, left + CELL, top + CELL


class SerialProcessor(ToyProcessor):
    """Tokens: the number of moves, the start, where each color leads, and the cell of each color."""

    def apply_chat_template(self, conversations, **settings) -> BatchFeature:
        rows = []
        for ((image, text),) in (tuple(message["content"] for message in one) for one in conversations):
            need, start = text["text"].split()
            pixels = [image["image"].getpixel((color, 0)) for color in range(len(COLORS))]
            values = [int(need), COLORS.index(start), *(one[0] for one in pixels), *(one[1] for one in pixels)]
            rows.append([NUMBER + value for value in values])
        ids = torch.tensor(rows)
        return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def decode(self, tokens, skip_special_tokens=True) -> str:
        named = {WORD + place: f"It is \\boxed{{{color}}}." for place, color in enumerate(COLORS)}
        return "".join((named | {GARBAGE: "well, well"}).get(token, "") for token in tokens)


@dataclass
class SerialModel(ToyModel):
    def __post_init__(self):
        self.config = ToyConfig(num_latent_steps=MOVES)

    def walk(self, prompt: list[int]) -> tuple[int, list[int], list[int], list[int]]:
        """(k, the tiles after 0, 1, .. moves until one has arrived, where each tile leads, their cells)."""
        values = [token - NUMBER for token in prompt]
        need, start, following, cells = values[0], values[1], values[2:10], values[10:18]
        way = [start]
        for _ in range(need):
            way.append(following[way[-1]])
        return need, way, following, cells

    def think(self, prompts: list[list[int]], intervention) -> tuple[list[list[LatentStep]], list[list[int]]]:
        taken: list[list[LatentStep]] = [[] for _ in prompts]
        for place in range(self.config.num_latent_steps):
            for row, prompt in enumerate(prompts):
                need, way, following, cells = self.walk(prompt)
                tile = cells[way[min(place + 1, need)]] if self.kind == "steps" else 0
                before = taken[row][-1].latents if taken[row] else None
                own = self.next_latent(place, need, way, following, before)
                step = LatentStep(
                    row, place, len(prompt), (1, 1), own, [(SIDE, SIDE)], picked_tokens=torch.tensor([tile])
                )
                if intervention is not None:
                    step.latents = intervention(own, step)
                taken[row].append(step)
        return taken, [[self.answer_to(prompt, steps), EOS] for prompt, steps in zip(prompts, taken)]

    def next_latent(self, place: int, need: int, way: list[int], following: list[int], before) -> torch.Tensor:
        """(1, SIZE)"""
        value = torch.zeros(1, SIZE)
        if self.kind == "steps":
            now = way[0] if before is None else clear(before[0, : len(COLORS)])
            if now is not None:
                value[0, following[now] if place < need else now] = 1
        elif self.kind == "first" and place == 0:
            for move in range(MOVES):
                value[0, move * len(COLORS) + way[min(move + 1, need)]] = 1
        return value

    def answer_to(self, prompt: list[int], steps: list[LatentStep]) -> int:
        need, way, _, _ = self.walk(prompt)
        said = way[-1]
        if self.kind == "steps":
            said = clear(steps[-1].latents[0, : len(COLORS)]) if steps else way[0]
        elif self.kind == "first":
            said = clear(steps[0].latents[0].unflatten(0, (MOVES, -1))[need - 1]) if steps else None
        return GARBAGE if said is None else WORD + said

    def generate(self, input_ids, attention_mask, latent_intervention=None, **settings):
        taken, answers = self.think(input_ids.tolist(), latent_intervention)
        counts = torch.tensor([len(row) for row in taken])
        return SimpleNamespace(
            sequences=torch.cat([input_ids, torch.tensor(answers)], dim=1),
            latent_trace=LatentTrace(len(answers), [step for row in taken for step in row]),
            stop_reason=["eos"] * len(answers),
            num_latent_blocks=counts,
            num_latents=counts,
        )


def clear(values: torch.Tensor) -> int | None:
    """The color that a one-hot vector says; None for what says nothing."""
    return int(values.argmax()) if float(values.max()) > 0.9 else None


def serial_subject(kind: str, items: list[Item] | None = None, batch_size: int = 32, seed: int = 0) -> Subject:
    return Subject(
        SerialModel(kind), SerialProcessor(), serial_items() if items is None else items, batch_size, 4, seed=seed
    )
