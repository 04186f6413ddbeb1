"""Draw a trace over the image: per block or step its grid, where the latents looked, what was picked or cut out.

Takes any object with the fields of `LatentTrace` (`modeling_latentvlm/trace.py`), of any architecture. Each step is one
row of panels, per image: the mean attention of its latents as a heat map, and one dot per latent where it looked most,
coloured by the latent's place in the grid that is drawn beside.

Refocusing steps (LaRe) are columns instead, as in the paper's figure 3: a row of heat maps of where the language model
looked, with the window, and one of where in it the Extractor looked.
"""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from processing_latentvlm.pictures import open_picture


PANEL = 336  # pixels, longer side of an image panel
MARGIN, TITLE = 12, 30
HEAT = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], dtype=np.float32)


def draw_trace(trace, images: Sequence, output: str | Path | None = None, row: int = 0) -> Image.Image:
    """Draw all steps of one row over its images, in the order of the prompt. Writes a PNG where `output` says.

    Raises:
        ValueError: the row took no step, or its images are not as many as the trace saw.
    """
    steps = trace.row(row)
    if not steps:
        raise ValueError(f"Row {row} has no latent step to draw: its answer opened no block.")
    images = [open_picture(image, f"`images[{index}]`") for index, image in enumerate(images)]
    for step in steps:
        if len(step.image_grids) != len(images):
            raise ValueError(
                f"Step {step.index} of row {row} looked at {len(step.image_grids)} images, got {len(images)}."
            )
    images = [fit(image) for image in images]
    if any(step.saliency is not None for step in steps):
        rows = draw_refocusing(steps, images)
    else:
        rows = [draw_step(step, images) for step in steps]
    canvas = Image.new("RGB", (max(part.width for part in rows), sum(part.height for part in rows)), "white")
    top = 0
    for part in rows:
        canvas.paste(part, (0, top))
        top += part.height
    if output is not None:
        canvas.save(output)
    return canvas


def fit(image: Image.Image) -> Image.Image:
    scale = PANEL / max(image.size)
    return image.resize([max(1, round(side * scale)) for side in image.size])


def draw_step(step, images: list[Image.Image]) -> Image.Image:
    """One row of panels: the latents' grid, then for each image where they looked."""
    height, width = step.grid
    panels = [draw_grid(step)]
    for number, (image, attention) in enumerate(zip(images, split_by_image(step.image_attention, step.image_grids))):
        if attention is not None:
            panels.append(overlay(image, attention.mean(axis=0)))
            panels.append(draw_dots(image, attention, step.grid))
        else:
            panels.append(image.copy())
        mark_tokens(panels[-1], step, number)
    title = f"step {step.index + 1}: {height} x {width} = {height * width} latents, opened at token {step.column}"
    if step.image_attention is None and step.picked_tokens is None and step.windows is None:
        title += " (no attention to the image)"
    return join_panels(panels, title)


def join_panels(panels: list[Image.Image], title: str) -> Image.Image:
    """Panels side by side under a title."""
    canvas_width = sum(panel.width + MARGIN for panel in panels) + MARGIN
    canvas = Image.new("RGB", (canvas_width, TITLE + max(panel.height for panel in panels) + MARGIN), "white")
    ImageDraw.Draw(canvas).text((MARGIN, 8), title, fill="black", font=ImageFont.load_default(size=15))
    left = MARGIN
    for panel in panels:
        canvas.paste(panel, (left, TITLE))
        left += panel.width + MARGIN
    return canvas


def draw_refocusing(steps: list, images: list[Image.Image]) -> list[Image.Image]:
    """Per image two rows of panels, a picture and then a heat map per step: the language model's, and the Extractor's."""
    rows = []
    for field, what in (("saliency", "the language model"), ("image_attention", "the Extractor")):
        if all(getattr(step, field) is None for step in steps):
            continue
        for number, image in enumerate(images):
            panels = [image]
            for step in steps:
                attention = split_by_image(getattr(step, field), step.image_grids)[number]
                panels.append(image.copy() if attention is None else overlay(image, attention.mean(axis=0)))
                mark_tokens(panels[-1], step, number)
            rows.append(join_panels(panels, f"image {number + 1}: where {what} looked in steps 1 to {len(steps)}"))
    return rows


def split_by_image(values, grids: list[tuple[int, int]]) -> list[np.ndarray | None]:
    """Values of all image tokens, (M,) or (N, M), as a map for each image, (N, height, width)."""
    if values is None:
        return [None] * len(grids)
    values = values.detach().float().cpu().numpy()
    ends = np.cumsum([height * width for height, width in grids])[:-1]
    return [part.reshape(-1, *grid) for part, grid in zip(np.split(values, ends, axis=-1), grids)]


def place_colour(y: float, x: float) -> tuple[int, int, int]:
    """A colour for a relative place: hue around the centre, so that neighbours look alike."""
    angle = np.arctan2(y - 0.5, x - 0.5) / (2 * np.pi) % 1.0
    distance = min(1.0, 1.5 * float(np.hypot(y - 0.5, x - 0.5)))
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(angle, 0.25 + 0.75 * distance, 1.0))


def draw_grid(step) -> Image.Image:
    """The block's own grid: one cell per latent, in the colour of its dot, sized by the latent's norm."""
    height, width = step.grid
    cell = max(6, min(40, PANEL // max(height, width)))
    panel = Image.new("RGB", (width * cell + 1, height * cell + 1), "#222222")
    draw = ImageDraw.Draw(panel)
    norms = np.ones(height * width)
    if step.latents is not None:
        norms = step.latents.detach().float().norm(dim=-1).cpu().numpy().reshape(-1)
        norms = norms / max(float(norms.max()), 1e-12)
    for index in range(height * width):
        y, x = divmod(index, width)
        inset = (1 - 0.8 * float(norms[index])) * cell / 2
        box = [x * cell + inset, y * cell + inset, (x + 1) * cell - inset, (y + 1) * cell - inset]
        draw.rectangle(box, fill=place_colour((y + 0.5) / height, (x + 0.5) / width))
    return panel


def overlay(image: Image.Image, attention: np.ndarray) -> Image.Image:
    """Lay a heat map of (height, width) attention over an image."""
    scaled = (attention - attention.min()) / max(float(np.ptp(attention)), 1e-12)
    heat = Image.fromarray((255 * scaled).astype(np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
    level = np.asarray(heat, dtype=np.float32) / 255 * (len(HEAT) - 1)
    low = np.clip(level.astype(int), 0, len(HEAT) - 2)
    colour = HEAT[low] + (level - low)[..., None] * (HEAT[low + 1] - HEAT[low])
    grey = np.asarray(image.convert("L").convert("RGB"), dtype=np.float32)
    weight = 0.25 + 0.45 * level[..., None] / (len(HEAT) - 1)
    return Image.fromarray(((1 - weight) * grey + weight * colour).astype(np.uint8))


def draw_dots(image: Image.Image, attention: np.ndarray, grid: tuple[int, int]) -> Image.Image:
    """Mark where each latent looked most."""
    panel = image.copy()
    draw = ImageDraw.Draw(panel)
    rows, columns = attention.shape[1:]
    radius = max(2, min(7, PANEL // (3 * max(rows, columns))))
    for index, place in enumerate(attention.reshape(len(attention), -1).argmax(axis=1)):
        row, column = divmod(int(place), columns)
        x, y = (column + 0.5) / columns * image.width, (row + 0.5) / rows * image.height
        colour = place_colour((index // grid[1] + 0.5) / grid[0], (index % grid[1] + 0.5) / grid[1])
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour, outline="black")
    return panel


def mark_tokens(panel: Image.Image, step, number: int) -> None:
    """Outline picked tokens and windows on the panel of image `number`."""
    height, width = step.image_grids[number]
    first = sum(rows * columns for rows, columns in step.image_grids[:number])
    boxes = [box[1:] for box in step.windows or [] if box[0] == number]
    if step.picked_tokens is not None:
        inside = [token - first for token in step.picked_tokens.tolist() if 0 <= token - first < height * width]
        boxes += [(*divmod(token, width), 1, 1) for token in inside]
    draw = ImageDraw.Draw(panel)
    for top, left, rows, columns in boxes:
        corner = (left / width * panel.width, top / height * panel.height)
        end = ((left + columns) / width * panel.width - 1, (top + rows) / height * panel.height - 1)
        draw.rectangle([corner, end], outline="#00e5ff", width=2)
