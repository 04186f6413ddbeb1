"""What sizes of pictures a model is trained with, taken down in its processor before the first step.

The checkpoint's processor then says once when it is given another size (`QwenLatentProcessor.trained_image_sizes`). LaRe's
resizes every picture to the size of its tower: there is nothing to take down.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm


Sizes = list[tuple[int, int]]  # (width, height) in pixels


def record_image_sizes(processor, samples: Iterable[Any], sizes_of: Callable[[Any], Sizes]) -> None:
    """Read the size of every picture of the questions off its file, and tell the processor.

    Args:
        sizes_of: the sizes of a sample's pictures as the processor gets them.

    Raises:
        ValueError: a picture cannot be read; the message names it.
    """
    if not hasattr(processor, "add_trained_sizes"):
        return
    found = set()
    with ThreadPoolExecutor() as pool:
        for sizes in tqdm(pool.map(sizes_of, samples), desc="reading image sizes", leave=False):
            found.update(sizes)
    processor.add_trained_sizes(found)
