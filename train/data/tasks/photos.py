"""Backgrounds: regions of the public domain photos in `train/data/photos` (see `LICENSE.md` there)."""

from functools import cache
from pathlib import Path

from PIL import Image, ImageEnhance

from train.data.tasks.sample import Request


PHOTO_FOLDER = Path(__file__).parent.parent / "photos"

# Whole photos, not regions, are dealt to the splits: no background of one split is ever seen in another.
PHOTOS = {
    "train": ("astronaut", "brick", "camera", "coffee", "gravel", "retina"),
    "val": ("grass", "rocket"),
    "test": ("chelsea", "hubble"),
}
TEXTURES = ("brick", "gravel", "grass", "hubble")


@cache
def load_photo(name: str) -> Image.Image:
    from processing_latentvlm.pictures import open_picture  # here, since it imports torch

    return open_picture(PHOTO_FOLDER / f"{name}.jpg", f"the photo {name}")


def draw_background(request: Request) -> Image.Image:
    """Return a square region of a photo of the request's split, with random place, size, mirroring and brightness."""
    rng, size = request.rng, request.image_size
    photo = load_photo(rng.choice(PHOTOS[request.split]))
    side = rng.uniform(0.5, 1.0) * min(photo.size)
    left, top = rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side)
    region = photo.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    if rng.random() < 0.5:
        region = region.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return ImageEnhance.Brightness(region).enhance(rng.uniform(0.7, 1.2))


def draw_calm_background(request: Request) -> Image.Image:
    """Return a region as `draw_background` does, with half of its contrast, for small things to stand out."""
    region = draw_background(request)
    return Image.blend(region, region.resize((1, 1), Image.Resampling.BOX).resize(region.size), 0.5)


def draw_structured_region(request: Request) -> Image.Image:
    """Return most of a photo that has parts to tell apart, for puzzles: no texture, whose parts all look alike."""
    rng = request.rng
    photo = load_photo(rng.choice([name for name in PHOTOS[request.split] if name not in TEXTURES]))
    side = rng.uniform(0.8, 1.0) * min(photo.size)
    left, top = rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side)
    size = (request.image_size, request.image_size)
    return photo.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
