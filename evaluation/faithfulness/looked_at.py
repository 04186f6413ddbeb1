"""D16, where latents look: the share of it that lies on the tile of their step.

    windows           of LaRe: each refocusing window counts the same, its cells too
    attention         of LaRe's Extractor and of DeepLatent's latents, over the tokens of the first picture
    replayed tokens   of Vedas: the image tokens that it feeds again before a latent

Step j's tile is the box of its picture (`boxes` of the data, one a step). Beside the share stand two chances: the share of the picture
that the tile covers, and the share that lies on the tiles of the same step of the other items, which is more than that where latents
like some places in any picture. A window larger than a tile cannot lie on it as a whole: "touching" is the share of windows that have
a part of it, beside that of all places where a window could be.

Shapes: H, W grid of the first picture's tokens; all pictures of a comparison have one grid.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evaluation.faithfulness.attention import grid_box
from evaluation.faithfulness.items import NotApplicable
from evaluation.faithfulness.result import Curve, Result
from evaluation.faithfulness.serial_items import Unit, Way
from evaluation.faithfulness.statistics import mean_interval
from evaluation.faithfulness.subject import CLEAN, Subject
from modeling_latentvlm.trace import LatentStep


@dataclass
class Look:
    """Where one latent of one item looked: (H, W), summing to one over all pictures of the item."""

    number: int
    field: Tensor
    windows: list[tuple[int, int, int, int]]  # (top, left, height, width) in the first picture


def maps_of(step: LatentStep, unit: Unit) -> dict[str, Look]:
    """By what it is, where a latent looked."""
    height, width = step.image_grids[0]
    count, found = height * width, {}
    if step.picked_tokens is not None and len(step.picked_tokens):
        field = torch.zeros(count)
        picked = step.picked_tokens[step.picked_tokens < count].long()
        field.index_add_(0, picked, torch.ones(len(picked)))
        found["replayed tokens"] = Look(-1, (field / len(step.picked_tokens)).unflatten(0, (height, width)), [])
    elif step.windows:
        field, windows = torch.zeros(height, width), [tuple(window[1:]) for window in step.windows if window[0] == 0]
        for top, left, tall, wide in windows:
            part = field[top : top + tall, left : left + wide]
            part += 1 / (len(step.windows) * part.numel())
        found["windows"] = Look(-1, field, windows)
    if step.image_attention is not None:
        weights = step.image_attention.float()
        positions = [position for _, position in unit.places if position is not None]
        if positions and len(weights) > 1:
            weights = weights[positions]
        found["attention"] = Look(-1, weights.mean(dim=0)[:count].unflatten(0, (height, width)), [])
    return found


def collect_looks(subject: Subject, numbers: list[int], units: list[Unit]) -> dict[tuple[str, int], list[Look]]:
    """By (what it is, place among the latents) where the latents of some items looked."""
    looks = defaultdict(list)
    for batch in subject.batches("looking where latents look", numbers):
        inputs = subject.encode([subject.items[number].sample for number in batch])
        with torch.no_grad():
            answers = subject.generate(inputs, CLEAN, batch, keeps_maps=True)
        for number, answer in zip(batch, answers):
            for place, unit in enumerate(units):
                if not unit.is_in(answer) or not answer.steps[unit.places[0][0]].image_grids:
                    continue
                for name, look in maps_of(answer.steps[unit.places[0][0]], unit).items():
                    look.number = number
                    looks[name, place].append(look)
    return looks


def region_of(subject: Subject, way: Way, number: int, step: int, grid: tuple[int, int]) -> Tensor | None:
    """(H, W) one on the tile of a step; None where the item's question has no such step."""
    if not 1 <= step <= way.need:
        return None
    item = subject.items[number]
    top, left, height, width = grid_box(item.boxes[step - 1], item.sample.load_images()[0].size, grid)
    region = torch.zeros(grid)
    region[top : top + height, left : left + width] = 1
    return region


def measure_looks(subject: Subject, ways: dict[int, Way], units: list[Unit], result: Result) -> None:
    """Add the table and curve of where latents look, for their own step's tile and that of the step before.

    Raises:
        NotApplicable: the data bring no box for each step, or the model does not say where its latents look.
    """
    numbers = [number for number, way in ways.items() if len(subject.items[number].boxes) == way.need]
    if not numbers:
        raise NotApplicable("the data bring no box for each step (`boxes`)")
    looks = collect_looks(subject, numbers, units)
    if not looks:
        raise NotApplicable("this model's trace does not say where its latents look")
    rows, series = [], {}
    for (name, place), found in sorted(looks.items()):
        unit = units[place]
        for step in (unit.number - 1, unit.number):
            row = describe(subject, ways, found, step)
            if row is None:
                continue
            rows.append({"what": name, "latent i": unit.label, "tile of step": step} | row)
            if step == unit.number:
                series.setdefault(name, []).append((unit.number, row["share"], row["low"], row["high"]))
                series.setdefault("area of the tile", []).append((unit.number, row["area"]))
    result.tables["where latents look"] = rows
    result.curves.append(Curve("share of what a latent looks at on the tile of its step", "latent", "share", series))


def describe(subject: Subject, ways: dict[int, Way], looks: list[Look], step: int) -> dict | None:
    """Share on the tile of a step, over the items whose question has that step; None where there are fewer than two."""
    regions = {
        one.number: region_of(subject, ways[one.number], one.number, step, tuple(one.field.shape)) for one in looks
    }
    looks = [one for one in looks if regions[one.number] is not None]
    grids = {tuple(one.field.shape) for one in looks}
    if len(looks) < 2 or len(grids) > 1:
        return None
    fields = torch.stack([one.field for one in looks]).double()  # (N, H, W)
    tiles = torch.stack([regions[one.number] for one in looks]).double()
    shares = (fields * tiles).sum(dim=(1, 2))
    others = (tiles.sum(dim=0) - tiles) / (len(looks) - 1)  # of each item, the mean tile of the others
    share, low, high = mean_interval(shares.numpy(), subject.seed)
    row = {
        "items": len(looks),
        "share": share,
        "low": low,
        "high": high,
        "area": float(tiles.mean()),
        "other items' tiles": float((fields * others).sum(dim=(1, 2)).mean()),
    }
    touching = [touch(one, regions[one.number]) for one in looks if one.windows]
    if touching:
        row |= {"touching": float(np.mean([one for one, _ in touching]))}
        row |= {"touching, by chance": float(np.mean([one for _, one in touching]))}
    return row


def touch(look: Look, region: Tensor) -> tuple[float, float]:
    """The share of an item's windows that have a part of a region, and that of all places where such a window could be."""
    height, width = region.shape

    def has(top: int, left: int, tall: int, wide: int) -> bool:
        return bool(region[top : top + tall, left : left + wide].any())

    tall, wide = look.windows[0][2:]
    places = [(top, left) for top in range(height - tall + 1) for left in range(width - wide + 1)]
    return float(np.mean([has(*one) for one in look.windows])), float(
        np.mean([has(*one, tall, wide) for one in places])
    )
