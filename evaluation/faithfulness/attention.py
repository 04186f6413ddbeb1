"""D9: who looks at whom.

By layer, averaged over heads, queries and items: the mass that latents put on image tokens, the mass that the answer's
tokens put on latents (and on image tokens), the entropy of both, and where the data bring regions the enrichment

    rho_l = mass on the region / mean mass of all windows of its size that do not touch it

1 means the region gets as much as any other place (field definition D9).
"""

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from evaluation.faithfulness.columns import ANSWER, IMAGE, LATENT
from evaluation.faithfulness.items import Box
from evaluation.faithfulness.observation import Attention, Observed
from evaluation.faithfulness.result import Curve, Result
from evaluation.faithfulness.statistics import mean_interval
from evaluation.faithfulness.subject import Subject


def grid_box(box: Box, size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int, int, int]:
    """The cells (top, left, height, width) of a grid that a box in pixels touches; `size` is (width, height) in pixels."""
    height, width = grid
    left, top, right, bottom = box
    first_column, first_row = int(left * width / size[0]), int(top * height / size[1])
    last_column = min(width - 1, int(np.ceil(right * width / size[0])) - 1)
    last_row = min(height - 1, int(np.ceil(bottom * height / size[1])) - 1)
    return first_row, first_column, max(1, last_row - first_row + 1), max(1, last_column - first_column + 1)


def enrichment(attention: Tensor, grid: tuple[int, int], region: tuple[int, int, int, int]) -> float:
    """rho of one map, (M,) in raster order of `grid`; nan where no window of the region's size fits beside it."""
    field = attention[: grid[0] * grid[1]].unflatten(0, grid).double()
    top, left, height, width = region
    sums = torch.nn.functional.avg_pool2d(field[None, None], (height, width), 1)[0, 0] * (height * width)
    rows, columns = (torch.arange(count) for count in sums.shape)
    apart = ((rows - top).abs() >= height)[:, None] | ((columns - left).abs() >= width)[None]
    if not bool(apart.any()):
        return float("nan")
    return float(sums[top, left] / sums[apart].mean().clamp(min=1e-12))


def average(observed: dict[int, Observed], kind: int, layer: int, read) -> list[float]:
    """`read(attention)` of every item, over its number of queries."""
    found = [seen.attention[kind, layer] for seen in observed.values() if (kind, layer) in seen.attention]
    return [read(one) / one.queries for one in found if one.queries]


def regions_of(subject: Subject, observed: dict[int, Observed]) -> dict[int, tuple]:
    """Per item with boxes: (grid, region) of its first image."""
    found = {}
    for number in observed:
        item, grids = subject.items[number], subject.clean[number].steps[0].image_grids
        if item.boxes and grids:
            size = item.sample.load_images()[0].size
            found[number] = (grids[0], grid_box(item.boxes[0], size, grids[0]))
    return found


def measure_attention(subject: Subject, observed: dict[int, Observed]) -> Result:
    layers = sorted({layer for seen in observed.values() for _, layer in seen.attention})
    regions = regions_of(subject, observed)
    measures = {
        "latent -> image": (LATENT, lambda one: float(one.mass[IMAGE])),
        "answer -> latents": (ANSWER, lambda one: float(one.mass[LATENT])),
        "answer -> image": (ANSWER, lambda one: float(one.mass[IMAGE])),
        "entropy of latents, nats": (LATENT, lambda one: one.entropy),
        "entropy of latents over the image, nats": (LATENT, lambda one: one.image_entropy),
        "entropy of the answer, nats": (ANSWER, lambda one: one.entropy),
    }
    rows, series = [], {}
    for layer in layers:
        row = {"layer": layer + 1}
        for name, (kind, read) in measures.items():
            values = average(observed, kind, layer, read)
            if values:
                mean, low, high = mean_interval(values, subject.seed)
                row[name] = mean
                series.setdefault(name, []).append((layer + 1, mean, low, high))
        for name, kind in (("latent", LATENT), ("answer", ANSWER)):
            rho = enrichments(observed, regions, kind, layer)
            if rho:
                mean, low, high = mean_interval(rho, subject.seed)
                row[f"region enrichment, {name}"] = mean
                series.setdefault(f"region enrichment, {name}", []).append((layer + 1, mean, low, high))
        rows.append(row)
    masses = {name: points for name, points in series.items() if "->" in name}
    rho = {name: points for name, points in series.items() if "enrichment" in name}
    result = Result(
        "D9",
        "D9: attention",
        "Share of attention by layer, mean over heads and items, of latents and of the answer's "
        "tokens (teacher-forced); rows of single "
        "queries, no maps. Enrichment: mass on the region of the data's boxes over the mean mass "
        "of windows of its size apart from it.",
        tables={"by layer": rows},
        curves=[Curve("where attention goes", "layer", "share of attention", masses)],
        notes=[
            "`python -m evaluation.analyses.attention` tests the first answer token's share on the image "
            "with and without steps."
        ],
    )
    if rho:
        result.curves.append(
            Curve("attention to the region that the question is about", "layer", "enrichment (1: none)", rho)
        )
        result.tables["tests"] = [
            enrichment_tests(observed, regions, kind, name, layers)
            for kind, name in ((LATENT, "latent"), (ANSWER, "answer"))
        ]
    else:
        result.not_applicable["region enrichment"] = "the data bring no regions (`boxes`), or they fill the picture"
    return result


def enrichments(observed: dict[int, Observed], regions: dict[int, tuple], kind: int, layer: int) -> list[float]:
    found = []
    for number, (grid, region) in regions.items():
        one: Attention | None = observed[number].attention.get((kind, layer))
        if one is not None and one.image is not None:
            found.append(enrichment(one.image, grid, region))
    return [value for value in found if not np.isnan(value)]


def enrichment_tests(observed: dict, regions: dict, kind: int, name: str, layers: list[int]) -> dict:
    """One-sample t-test and Wilcoxon's test of rho, averaged over layers, against 1."""
    by_layer = [enrichments(observed, regions, kind, layer) for layer in layers]
    by_layer = [values for values in by_layer if values]
    row = {"queries": name, "items": len(by_layer[0]) if by_layer else 0}
    if row["items"] < 2:
        return row
    rho = np.mean(by_layer, axis=0)
    row["mean enrichment"] = float(rho.mean())
    if np.ptp(rho) > 0:
        row["p, t-test against 1"] = float(stats.ttest_1samp(rho, 1.0).pvalue)
        row["p, Wilcoxon against 1"] = float(stats.wilcoxon(rho - 1.0).pvalue)
    return row
