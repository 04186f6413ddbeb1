"""D8: how large are latents beside what the language model was trained to read?

By kind of column and by layer, E||h_l|| (l = 0: the input embeddings; L + 1: behind the final norm), and the ratios
E||z|| / E||embed|| and E||h_last|| / E||embed|| for text and image (GAP 2605.12374; Monet: 546 and 8.7).
"""

import numpy as np

from evaluation.faithfulness.columns import IMAGE, KINDS, LATENT, TEXT
from evaluation.faithfulness.observation import Observed
from evaluation.faithfulness.result import Curve, Result


def measure_norms(observed: dict[int, Observed]) -> Result:
    means: dict[tuple[int, int], float] = {}
    places = {place for seen in observed.values() for place in seen.norms}
    for place in places:
        means[place] = float(
            np.mean(np.concatenate([seen.norms[place] for seen in observed.values() if seen.norms[place]]))
        )
    last = max(layer for _, layer in places)
    rows, series = [], {}
    for kind, name in enumerate(KINDS):
        by_layer = [(layer, means[kind, layer]) for layer in range(last + 1) if (kind, layer) in means]
        if by_layer:
            series[name] = by_layer
            rows.append({"columns": name} | {layer_name(layer, last): norm for layer, norm in by_layer})
    ratios = []
    for name, value in (("input z", means[LATENT, 0]), ("last hidden state of latents", means[LATENT, last])):
        row = {"norm of": name, "mean": value}
        for kind in (TEXT, IMAGE):
            if (kind, 0) in means:
                row[f"over {KINDS[kind]} embeddings"] = value / max(means[kind, 0], 1e-12)
        ratios.append(row)
    return Result(
        "D8",
        "D8: norms",
        "Mean Euclidean norm of states by kind of column and layer, and the ratio of latents to "
        "what stands at the input.",
        tables={"ratios": ratios, "norms by layer": rows},
        curves=[Curve("mean norm by layer", "layer (0: input)", "norm", series)],
        notes=[
            "Ratios far from 1 at the input mean that latents lie outside of what the language model "
            "was trained to read."
        ],
    )


def layer_name(layer: int, last: int) -> str:
    return "input" if layer == 0 else "final norm" if layer == last else str(layer)
