"""Curves to SVG text that stands in a page by itself."""

import io
import json
import math
import re
import zlib

from matplotlib import rc_context
from matplotlib.figure import Figure

from evaluation.faithfulness.result import Curve


def draw(curve: Curve) -> str:
    """The plot as an `<svg>` element; the same curve gives the same text."""
    count = max((len(points) for points in curve.series.values()), default=0)
    width = max(5.0, 1.2 + 0.55 * count) if curve.kind == "bar" else 5.5
    figure = Figure(figsize=(min(width, 12), 3.4), layout="constrained")
    axis = figure.subplots()
    for name, points in curve.series.items():
        points = [point for point in points if not math.isnan(point[1])]
        if not points:
            continue
        x, y = [point[0] for point in points], [point[1] for point in points]
        errors = None
        if all(len(point) == 4 for point in points):
            errors = [[max(0.0, p[1] - p[2]) for p in points], [max(0.0, p[3] - p[1]) for p in points]]
        if curve.kind == "bar":
            axis.bar([str(one) for one in x], y, yerr=errors, capsize=3, color="tab:blue")
        else:
            axis.errorbar(x, y, yerr=errors, marker="o", markersize=3, capsize=2, label=name)
    if curve.kind == "bar":
        axis.axhline(0, color="black", linewidth=0.6)
        axis.tick_params(axis="x", labelrotation=40 if count > 4 else 0)
    elif len(curve.series) > 1:
        axis.legend(fontsize="small")
    axis.set(title=curve.title, xlabel=curve.x_label, ylabel=curve.y_label)
    axis.title.set_fontsize("medium")
    text = io.StringIO()
    with rc_context({"svg.hashsalt": "latentvlm"}):  # ids that do not change from run to run
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    # Without XML header and metadata: they name addresses, and the page names none.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{hash_of(curve)}-", svg)


def hash_of(curve: Curve) -> int:
    """Keeps the ids of several plots in one page apart."""
    return zlib.crc32(json.dumps([curve.title, curve.series]).encode())
