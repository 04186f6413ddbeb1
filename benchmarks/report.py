"""Rows of measurements, and what is made of them: a table, JSON, and plots of what scales."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from conversion.writing import replaced_file, write_file


@dataclass
class Row:
    """One thing measured, beside what it is compared with."""

    subject: str
    case: str
    value: float | None  # None: skipped, and the note says why
    unit: str
    reference: float | None = None  # of the counterpart, in the same run
    ratio: float | None = None
    goal: str = ""  # "<= 1.02" or ">= 0.8", of the ratio
    note: str = ""
    x: float | None = None  # of a point on a curve

    @property
    def verdict(self) -> str:
        """Whether the goal was met, or by how much it was missed."""
        if not self.goal or self.ratio is None:
            return ""
        sign, bound = self.goal.split()
        is_met = self.ratio <= float(bound) if sign == "<=" else self.ratio >= float(bound)
        return "met" if is_met else f"missed by {abs(self.ratio - float(bound)):.3f}"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def to_markdown(rows: Iterable[Row]) -> str:
    lines = ["| subject | case | measured | counterpart | ratio | goal | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        measured = "skipped" if row.value is None else f"{number(row.value)} {row.unit}"
        reference = "" if row.reference is None else f"{number(row.reference)} {row.unit}"
        remark = "; ".join(part for part in (row.verdict, row.note) if part)
        lines.append(f"| {row.subject} | {row.case} | {measured} | {reference} | {ratio} | {row.goal} | {remark} |")
    return "\n".join(lines) + "\n"


def write_report(folder: Path, suite: str, settings: dict, rows: list[Row]) -> None:
    """`SUITE.json`, `SUITE.md` and, where curves were measured, `SUITE.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"settings": settings, "rows": [asdict(row) | {"verdict": row.verdict} for row in rows]}
    write_file(folder / f"{suite}.json", json.dumps(content, indent=2))
    about = ", ".join(f"{name} {value}" for name, value in settings.items())
    write_file(folder / f"{suite}.md", f"{about}\n\n{to_markdown(rows)}")
    draw_curves(folder / f"{suite}.png", [row for row in rows if row.x is not None and row.value is not None])


def draw_curves(path: Path, rows: list[Row]) -> None:
    """One panel per subject and unit, logarithmic in both directions."""
    if not rows:
        return
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row.subject, row.unit) for row in rows))
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.8 * lines), layout="constrained")
    places = figure.subplots(lines, columns, squeeze=False).flat
    for axes, panel in zip(places, panels):
        points = [row for row in rows if (row.subject, row.unit) == panel]
        for case in dict.fromkeys(row.case.rsplit(", ", 1)[0] for row in points):
            curve = [row for row in points if row.case.rsplit(", ", 1)[0] == case]
            axes.loglog([row.x for row in curve], [row.value for row in curve], marker="o", label=case)
        axes.set_title(panel[0], fontsize=9)
        axes.set_ylabel(panel[1])
        ticks = sorted({row.x for row in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7)
        axes.xaxis.minorticks_off()
        axes.tick_params(axis="y", which="both", labelsize=7)
        axes.legend(fontsize=7)
    with replaced_file(path) as partial:
        figure.savefig(partial, dpi=110)
