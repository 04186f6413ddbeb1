"""Draw a chase: the question's picture, then for every latent step the tile that it is about, with an arrow from the one before."""

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from train.data.tasks import Sample


PANEL, GAP, MARGIN = 208, 14, 18  # pixels
HEAD, FOOT = 58, 44  # above and below the panels
INK, PALE, PAPER = "#20242c", "#7b8494", "#ffffff"
MARK, RIGHT, WRONG = "#e6007e", "#0b8a4a", "#c62828"  # no tile has the color of the mark
FADED = 0.62  # how much of a tile that the way has not come to is paper


@dataclass
class Stop:
    """One latent step: the color of its tile, and how that is seen."""

    verb: str  # "says", "looks at"
    tile: str | None  # None: it is about no tile
    word: str = ""  # what it says in place of a tile


@dataclass
class Panel:
    """One board: which tiles are bright, which are numbered, and the arrows between them."""

    title: str
    note: str
    path: list[str]  # tiles in order, no two neighbours alike
    color: str = MARK
    number: str = ""
    framed: str | None = None
    is_move: bool = False  # whether the last arrow is new


def draw_chase(sample: Sample, stops: list[Stop], answer: str, is_right: bool, replaced: str = "") -> Image.Image:
    """One panel with the question, one a latent step, and one with the answer.

    Args:
        replaced: which latents are another picture's; what is answered then is neither right nor wrong.

    Steps behind as many as the question has hops have arrived: where they look is shown, and leads nowhere.
    """
    start = sample.serial.start
    panels = [Panel("question", f"from {start}", [start], framed=start)]
    path = [start]
    for number, stop in enumerate(stops, 1):
        note = f"{stop.verb} {stop.tile or stop.word or 'no tile'}"
        if number > sample.serial.num_steps:
            panels.append(Panel(f"latent step {number} (arrived)", note, path, PALE, "", stop.tile))
            continue
        # The first look comes before any latent: it is no step of the way, which begins on the start.
        is_move = stop.tile not in (None, path[-1]) and (number > 1 or stop.verb == "says")
        path = [*path, stop.tile] if is_move else path
        panels.append(Panel(f"latent step {number}", note, path, MARK, str(number), stop.tile, is_move))
    told = answer.strip().lower()
    is_tile = any(thing["color"] == told for thing in sample.objects)
    color, verdict = (RIGHT, " (right)") if is_right else (WRONG, f" (wrong, it is {sample.answer})")
    if replaced:
        color, verdict = MARK, ""
    is_move = is_tile and told != path[-1]
    path = [*path, told] if is_move else path
    end = told if is_tile else None
    panels.append(Panel("answer", f"{answer or 'none'}{verdict}", path, color, "", end, is_move))
    title = sample.question + (f"  With the latent of {replaced} of another picture." if replaced else "")
    return join([draw_panel(sample, panel) for panel in panels], panels, title)


def font(size: int):
    return ImageFont.load_default(size=size)


def join(boards: list[Image.Image], panels: list[Panel], title: str) -> Image.Image:
    width = 2 * MARGIN + len(boards) * PANEL + (len(boards) - 1) * GAP
    canvas = Image.new("RGB", (width, HEAD + PANEL + FOOT), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, 12), title, fill=INK, font=font(22))
    for place, (board, panel) in enumerate(zip(boards, panels)):
        left = MARGIN + place * (PANEL + GAP)
        canvas.paste(board, (left, HEAD))
        draw.text((left, HEAD + PANEL + 5), panel.title, fill=PALE, font=font(13))
        draw.text(
            (left, HEAD + PANEL + 20), panel.note, fill=panel.color if panel.title == "answer" else INK, font=font(16)
        )
    return canvas


def draw_panel(sample: Sample, panel: Panel) -> Image.Image:
    scale = PANEL / sample.image.width
    board = sample.image.convert("RGB").resize((PANEL, PANEL), Image.Resampling.LANCZOS)
    pale = Image.blend(board, Image.new("RGB", board.size, PAPER), FADED)
    boxes = {thing["color"]: [round(scale * side) for side in thing["box"]] for thing in sample.objects}
    if panel.title == "question":
        pale = board
    for tile in {*panel.path, panel.framed} - {None}:
        pale.paste(board.crop(boxes[tile]), boxes[tile][:2])
    large = pale.resize((2 * PANEL, 2 * PANEL), Image.Resampling.LANCZOS)  # drawn twice as large, for smooth lines
    draw = ImageDraw.Draw(large)
    boxes = {tile: [2 * side for side in box] for tile, box in boxes.items()}
    if panel.framed is not None:
        frame(draw, boxes[panel.framed], panel.color)
    moves = list(zip(panel.path, panel.path[1:]))
    for place, (one, other) in enumerate(moves):
        is_last = panel.is_move and place == len(moves) - 1
        draw_arrow(draw, boxes[one], boxes[other], panel.color if is_last else INK, 9 if is_last else 5)
    if panel.framed is not None and panel.number:
        badge(draw, boxes[panel.framed], panel.number, panel.color)
    return large.resize((PANEL, PANEL), Image.Resampling.LANCZOS)


def frame(draw: ImageDraw.ImageDraw, box: list[int], color: str) -> None:
    left, top, right, bottom = box
    draw.rounded_rectangle((left - 3, top - 3, right + 2, bottom + 2), 8, outline="white", width=14)
    draw.rounded_rectangle((left - 1, top - 1, right, bottom), 8, outline=color, width=9)


def badge(draw: ImageDraw.ImageDraw, box: list[int], text: str, color: str) -> None:
    """A number in a disc on the corner of a tile that lies farther from the picture's edge."""
    x = box[2] - 8 if box[2] < 2 * PANEL - 24 else box[0] + 8
    y = box[1] + 8 if box[1] > 24 else box[3] - 8
    draw.ellipse((x - 22, y - 22, x + 22, y + 22), fill=color, outline="white", width=4)
    draw.text((x, y), text, fill="white", font=font(30), anchor="mm")


def draw_arrow(draw: ImageDraw.ImageDraw, start: list[int], end: list[int], color: str, width: int) -> None:
    """From the middle of one tile to the edge of another, with a white rim, so that it is seen on every color."""
    (x, y), (to_x, to_y) = (((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in (start, end))
    length = math.hypot(to_x - x, to_y - y)
    dx, dy = (to_x - x) / length, (to_y - y) / length
    short = 0.30 * (end[2] - end[0])  # the disc of the tile stays to be seen
    tip = (to_x - short * dx, to_y - short * dy)
    head = 3.0 * width + 4
    back = (tip[0] - head * dx, tip[1] - head * dy)
    wings = [(back[0] + side * 0.62 * head * dy, back[1] - side * 0.62 * head * dx) for side in (1, -1)]
    draw.ellipse((x - width - 3, y - width - 3, x + width + 3, y + width + 3), fill="white")
    draw.line((x, y, *back), fill="white", width=width + 7)
    draw.polygon([tip, *wings], fill="white", outline="white", width=8)
    draw.ellipse((x - width, y - width, x + width, y + width), fill=color)
    draw.line((x, y, *back), fill=color, width=width)
    draw.polygon([tip, *wings], fill=color)
