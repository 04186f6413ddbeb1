"""The page: one HTML file that needs nothing beside it, and the same numbers as JSON."""

import json
import math
from html import escape
from pathlib import Path

from conversion.writing import write_file
from evaluation.faithfulness.plots import draw
from evaluation.faithfulness.result import Result


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: .8rem 0; font-size: 13px; display: block; overflow-x: auto; }
th, td { border: 1px solid #ddd; padding: .2rem .5rem; text-align: right; } th { background: #f4f4f4; }
td:first-child, th:first-child, td.text { text-align: left; } .missing { color: #845; } .note { color: #345; }
svg { max-width: 100%; height: auto; margin: .5rem 1rem .5rem 0; } nav a { margin-right: 1rem; }
"""


def write_report(results: list[Result], about: dict, output: Path) -> tuple[Path, Path]:
    """Write `faithfulness.html` and `faithfulness.json`."""
    page, data = output / "faithfulness.html", output / "faithfulness.json"
    record = {"about": about, "diagnostics": {result.name: result.record() for result in results}}
    write_file(data, json.dumps(without_nan(record), indent=1, allow_nan=False) + "\n")
    write_file(page, render(results, about))
    return page, data


def render(results: list[Result], about: dict) -> str:
    links = "".join(f'<a href="#{escape(result.name)}">{escape(result.title)}</a>' for result in results)
    facts = "".join(
        f"<tr><td>{escape(name)}</td><td class=text>{escape(str(value))}</td></tr>" for name, value in about.items()
    )
    body = "\n".join(section(result) for result in results)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Faithfulness report</title>'
        f"<style>{STYLE}</style></head><body><h1>Do the latents carry anything?</h1><table>{facts}</table>"
        f"<nav>{links}</nav>{body}</body></html>\n"
    )


def section(result: Result) -> str:
    parts = [f'<section id="{escape(result.name)}"><h2>{escape(result.title)}</h2><p>{escape(result.definition)}</p>']
    parts += [f"<h4>{escape(name)}</h4>{table(rows)}" for name, rows in result.tables.items() if rows]
    parts += [draw(curve) for curve in result.curves if any(curve.series.values())]
    parts += [f"<p class=note>{escape(note)}</p>" for note in result.notes]
    for part, reason in result.not_applicable.items():
        parts.append(f"<p class=missing>{escape(part)}: not applicable: {escape(reason)}.</p>")
    return "".join(parts) + "</section>"


def table(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(cell(row.get(name)) for name in columns) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def cell(value) -> str:
    if isinstance(value, str):
        return f"<td class=text>{escape(value)}</td>"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "<td>-</td>"
    return f"<td>{value}</td>" if isinstance(value, int) else f"<td>{value:.4g}</td>"


def without_nan(value):
    """JSON has no NaN: null stands for what could not be measured."""
    if isinstance(value, dict):
        return {str(name): without_nan(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
