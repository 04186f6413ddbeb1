"""Pictures changed in one respect (D4): what should move the latents, and what should not."""

from collections.abc import Callable
from dataclasses import replace

from PIL import Image, ImageEnhance, ImageOps, ImageStat

from evaluation.faithfulness.items import Item, NotApplicable
from train.data.reasoning_data import ReasoningSample


Edit = Callable[[Image.Image, Item], Image.Image]


def turn_hues(picture: Image.Image, item: Item) -> Image.Image:
    """Turn every hue by half the circle: red becomes cyan."""
    hue, saturation, value = picture.convert("HSV").split()
    return Image.merge("HSV", (hue.point([(level + 128) % 256 for level in range(256)]), saturation, value)).convert(
        "RGB"
    )


def flip(picture: Image.Image, item: Item) -> Image.Image:
    return ImageOps.mirror(picture)


def remove(picture: Image.Image, item: Item) -> Image.Image:
    """Paint the regions that the question is about in the picture's mean colour."""
    picture = picture.copy()
    mean = tuple(round(value) for value in ImageStat.Stat(picture).mean)
    for box in item.boxes:
        picture.paste(mean, tuple(round(side) for side in box))
    return picture


def crop(share: float) -> Edit:
    def cut(picture: Image.Image, item: Item) -> Image.Image:
        width, height = picture.size
        left, top = width * (1 - share) / 2, height * (1 - share) / 2
        return picture.resize(picture.size, Image.Resampling.BICUBIC, box=(left, top, width - left, height - top))

    return cut


def brighten(picture: Image.Image, item: Item) -> Image.Image:
    return ImageEnhance.Brightness(picture).enhance(1.1)


# What may change the answer, and what may not.
EDITS: dict[str, Edit] = {"colour": turn_hues, "removal": remove, "spatial: mirrored": flip, "crop to 60 %": crop(0.6)}
AUGMENTATIONS: dict[str, Edit] = {"10 % brighter": brighten, "crop to 95 %": crop(0.95)}
UNAVAILABLE = {
    "shape": "a picture does not say which pixels to redraw as another shape; the tasks' own scenes would have to"
}


def check_edit(name: str, items: list[Item]) -> None:
    """Raise where the data do not say what to edit.

    Raises:
        NotApplicable: they do not.
    """
    if name == "removal" and not all(item.boxes for item in items):
        raise NotApplicable("not all questions bring the regions (`boxes`) that they are about")


def edit_sample(item: Item, edit: Edit) -> ReasoningSample:
    return replace(item.sample, images=[edit(image, item) for image in item.sample.load_images()])
