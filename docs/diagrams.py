"""Draw the diagram of docs/concepts.md as an SVG: the columns of one block, their positions, and what attends to what.

    python -m docs.diagrams

Positions are computed as the model computes them; a test compares them with `position_ids` of the model and holds docs/block.svg to this script.
"""

from dataclasses import dataclass
from html import escape
from pathlib import Path

from conversion.commands import exit_on_error


CELL, LEFT, TOP = 54, 150, 96  # pixels
COLORS = {"text": "#e8eaf6", "image": "#c8e6c9", "control": "#ffe0b2", "latent": "#ffab91", "marker": "#d1c4e9"}
ATTENDED = "#90a4ae"


@dataclass
class Column:
    """One column of the language model: what stands there, of which kind, and its (time, height, width) position."""

    name: str
    kind: str
    position: tuple[int, int, int]


def lay_out(image: tuple[int, int] = (2, 2), block: tuple[int, int] = (2, 2)) -> list[Column]:
    """The columns of a prompt with an image and of an answer that opens a block; sizes are (height, width) in merged patches."""
    columns: list[Column] = []

    def add_line(name: str, kind: str, start: int) -> int:
        columns.append(Column(name, kind, (start,) * 3))
        return start + 1

    def add_grid(name: str, kind: str, size: tuple[int, int], start: int) -> int:
        height, width = size
        columns.extend(
            Column(f"{name}{row * width + column + 1}", kind, (start, start + row, start + column))
            for row in range(height)
            for column in range(width)
        )
        return start + max(height, width)

    place = add_line("text", "text", 0)
    place = add_grid("v", "image", image, place)
    place = add_line("text", "text", place)
    place = add_line("<latent>", "marker", place)
    for control in ("e_s", "e_q", "e_v"):
        place = add_line(control, "control", place)
    place = add_grid("z", "latent", block, place)
    place = add_line("</latent>", "marker", place)
    add_line("text", "text", place)
    return columns


def draw(columns: list[Column]) -> str:
    """The SVG: names, three rows of positions, and the mask with a row for each query."""
    width, height = LEFT + CELL * len(columns) + 16, TOP + 3 * 22 + 40 + CELL * len(columns) // 2 + 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]

    def box(x: float, y: float, w: float, h: float, fill: str) -> None:
        parts.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="{fill}" stroke="#ffffff"/>')

    def text(x: float, y: float, words: str, anchor: str = "middle", extra: str = "") -> None:
        parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}" {extra}>{escape(words)}</text>')

    text(LEFT - 10, TOP - 44, "column", "end")
    for number, column in enumerate(columns):
        x = LEFT + CELL * number
        box(x, TOP - 70, CELL, 40, COLORS[column.kind])
        text(x + CELL / 2, TOP - 45, column.name, extra='font-size="10"')
        for line, value in enumerate(column.position):
            text(x + CELL / 2, TOP + 22 * line, str(value))
    for line, name in enumerate(("time", "height", "width")):
        text(LEFT - 10, TOP + 22 * line, f"position: {name}", "end")

    start = TOP + 3 * 22 + 20
    text(LEFT - 10, start - 10, "attends to", "end")
    row_height = CELL / 2
    for number, column in enumerate(columns):
        y = start + row_height * number
        text(LEFT - 10, y + 15, column.name, "end")
        for other in range(len(columns)):
            box(LEFT + CELL * other, y, CELL, row_height, ATTENDED if other <= number else "#f5f5f5")
    y = start + row_height * len(columns) + 26
    names = {
        "text": "text",
        "image": "image tokens",
        "marker": "markers",
        "control": "controls",
        "latent": "latents",
    }
    for number, (kind, name) in enumerate(names.items()):
        box(LEFT + 130 * number, y - 12, 14, 14, COLORS[kind])
        text(LEFT + 130 * number + 20, y, name, "start")
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def main(folder: Path = Path(__file__).parent) -> None:
    (folder / "block.svg").write_text(draw(lay_out()), encoding="utf-8")


if __name__ == "__main__":
    with exit_on_error():
        main()
