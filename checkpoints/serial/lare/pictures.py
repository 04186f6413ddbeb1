"""The one place where pictures are opened: processors, training, evaluation and examples all see the same pixels.

`open_picture` returns an 8-bit RGB picture, whatever it is given:

    path (text or `Path`), bytes, file object, {"bytes": .., "path": ..} as `datasets` stores it, base64 text,
    http(s) address (only where the caller allows it), PIL picture, numpy array, torch tensor

| what is special                  | what is done                                                            |
|----------------------------------|-------------------------------------------------------------------------|
| EXIF orientation                 | the picture is turned upright, from a file and opened by the user alike |
| transparency                     | composited on white                                                     |
| 16-bit grayscale                 | scaled to 8 bits: 65,535 is white                                       |
| floats                           | in [0, 1]: scaled to 8 bits; else in [0, 255]: rounded                  |
| arrays (H, W), (H, W, C), (C, H, W) | 1, 3 or 4 channels; where both ends could be channels the first is   |
| several frames                   | the first one                                                           |

A picture of more pixels than Pillow accepts (`PIL.Image.MAX_IMAGE_PIXELS`), a pipe, a device and a PostScript file, which
Pillow would run, are refused.
"""

import base64
import binascii
import io
import os
import struct
import zlib
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError


# What Pillow raises over broken files, by format and place.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
MAX_DOWNLOAD = 100 * 2**20  # bytes of a picture behind an address
TIMEOUT = 60.0  # seconds without an answer
ADDRESSES = ("http://", "https://")
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
CHANNELS = (1, 3, 4)


def open_picture(picture: Any, name: str = "the image", allow_addresses: bool = False) -> Image.Image:
    """Decode a picture to upright 8-bit RGB on white.

    Args:
        picture: see the module.
        name: what it is called where it cannot be read.
        allow_addresses: fetch an http(s) address.

    Raises:
        ValueError: it is no picture or cannot be read; the message starts with `name`.
    """
    try:
        if isinstance(picture, np.ndarray | torch.Tensor):
            return read_array(picture)
        if isinstance(picture, Image.Image):
            return read_pixels(picture)
        with Image.open(locate(picture, allow_addresses)) as opened:
            return read_pixels(opened)
    except UNREADABLE as error:
        raise ValueError(f"{name} cannot be read: {explain(error)}") from error


def read_size(picture: Any, name: str = "the image") -> tuple[int, int]:
    """(width, height) in pixels of what `open_picture` returns, read off the header of a file.

    Raises:
        ValueError: as `open_picture`; what is broken behind the header is not noticed.
    """
    try:
        if isinstance(picture, np.ndarray | torch.Tensor):
            return read_array(picture).size
        if isinstance(picture, Image.Image):
            return upright_size(picture)
        with Image.open(locate(picture, allow_addresses=False)) as opened:
            return upright_size(opened)
    except UNREADABLE as error:
        raise ValueError(f"{name} cannot be read: {explain(error)}") from error


def describe_picture(picture: Any) -> str:
    """Say briefly what was given, for messages."""
    if isinstance(picture, bytes | bytearray | memoryview):
        return f"{len(picture)} bytes"
    if isinstance(picture, np.ndarray | torch.Tensor):
        return f"{type(picture).__name__} of {tuple(picture.shape)}"
    return repr(picture)[:200]


def explain(error: Exception) -> str:
    """A sentence of an error of Pillow, some of which hold a number or an address in memory alone."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no image of a known format, or damaged"
    return str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"


def locate(picture: Any, allow_addresses: bool) -> Any:
    """What Pillow can open: a path or a file object."""
    if isinstance(picture, dict):
        if not {"bytes", "path"} & picture.keys():
            raise ValueError(f"a dict must hold `bytes` or `path`, it has {sorted(map(str, picture))}")
        picture = picture["bytes"] if picture.get("bytes") is not None else picture.get("path")
    if isinstance(picture, bytes | bytearray | memoryview):
        return io.BytesIO(picture)
    if isinstance(picture, str) and picture.startswith(ADDRESSES):
        if not allow_addresses:
            raise ValueError("addresses are not fetched here, give a file")
        return io.BytesIO(fetch_bytes(picture))
    if isinstance(picture, str) and picture.startswith("data:image/"):
        return io.BytesIO(decode_base64(picture.partition(",")[2]))
    if isinstance(picture, str | os.PathLike):
        return find_file(picture)
    if callable(getattr(picture, "read", None)) and callable(getattr(picture, "seek", None)):
        return picture
    raise ValueError(
        "it must be a path, bytes, a file object, an array or a PIL image, or a dict with `bytes` or `path`, "
        f"got {type(picture).__name__}"
    )


def find_file(path: str | os.PathLike) -> Any:
    """The path of a regular file, or the bytes that a text holds as base64."""
    # Not `Path.is_file`, which raises where a name is too long. A pipe would block for ever, a device never end.
    if os.path.isfile(path):
        return path
    if os.path.exists(path):
        raise ValueError("it is no regular file")
    if isinstance(path, str) and len(path) >= 64:  # no picture is shorter
        try:
            return io.BytesIO(decode_base64(path))
        except ValueError:
            pass  # a path after all
    raise FileNotFoundError("there is no such file")


def decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, UnicodeError) as error:
        raise ValueError(f"it is no base64: {error}") from error


def fetch_bytes(address: str) -> bytes:
    """Download with the client that transformers uses, with a limit on time and size."""
    from transformers.image_utils import httpx

    content = bytearray()
    try:
        with httpx.stream("GET", address, timeout=TIMEOUT, follow_redirects=True) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MAX_DOWNLOAD:
                    raise ValueError(f"it has more than {MAX_DOWNLOAD} bytes")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
    return bytes(content)


def check_size(size: tuple[int, int]) -> None:
    """Refuse an empty picture, and one that would take the machine's memory, before it is decoded."""
    if 0 in size:
        raise ValueError(f"it must have at least one pixel, its size is {size}")
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and size[0] * size[1] > 2 * most:  # where Pillow raises too, but only for files
        raise ValueError(f"it has {size[0]} x {size[1]} pixels, more than {2 * most}")


def upright_size(image: Image.Image) -> tuple[int, int]:
    check_size(image.size)
    # Pillow turns TIFF by itself, and says its size accordingly.
    is_turned = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
    return image.size[::-1] if is_turned else image.size


def read_pixels(image: Image.Image) -> Image.Image:
    """A PIL picture as upright RGB on white."""
    check_size(image.size)
    if image.format == "EPS":
        raise ValueError("it is PostScript, a program that would have to be run")
    has_16_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format is not None)
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        levels = scale_to_8_bits(values, has_16_bits)
        if isinstance(hidden := image.info.get("transparency"), int):  # of 16-bit PNG: one value is transparent
            levels = np.where(values == hidden, np.uint8(255), levels)
        return Image.fromarray(levels).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def read_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    """An array of 1, 3 or 4 channels, first or last, or of none, as RGB."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    if array.ndim == 3:
        first, last = array.shape[0], array.shape[2]
        # The first as in transformers, where both could be; four rows of pixels are likelier than four channels in front.
        if first in (1, 3) or (first == 4 and last not in CHANNELS):
            array = np.moveaxis(array, 0, -1)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in CHANNELS):
        raise ValueError(f"an array must be (H, W), (H, W, C) or (C, H, W) with C in {CHANNELS}, got {array.shape}")
    check_size((array.shape[1], array.shape[0]))
    levels = np.ascontiguousarray(scale_to_8_bits(array, array.dtype == np.uint16))
    return read_pixels(Image.fromarray(levels[:, :, 0] if levels.ndim == 3 and levels.shape[2] == 1 else levels))


def scale_to_8_bits(values: np.ndarray, has_16_bits: bool) -> np.ndarray:
    """Values of a picture as uint8.

    Args:
        has_16_bits: 65,535 is white even where no value is above 255.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind not in "iuf":
        raise ValueError(f"an array must hold numbers, got {values.dtype}")
    low, high = float(values.min()), float(values.max())  # NaN where a value is NaN
    if values.dtype.kind == "f":
        if not (low >= 0 and high <= 255):
            raise ValueError(f"floats must lie in [0, 1] or [0, 255], got {low} to {high}")
        return np.rint(values * (255.0 if high <= 1 else 1.0)).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ValueError(
            f"whole numbers must lie in [0, 255], or in [0, 65535] of 16 bits, got {low:.0f} to {high:.0f}"
        )
    if has_16_bits or high > 255:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return values.astype(np.uint8)
