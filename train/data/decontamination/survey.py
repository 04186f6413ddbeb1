"""A first pass over all files: what is held out, and whether every line is a sample and every image a file."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from train.data.decontamination.journal import find_state
from train.data.decontamination.samples import Sample, digest_pair, read_samples


NUM_NAMED = 8  # missing images in an error; the rest is counted


class Place(NamedTuple):
    """Where something stands in the test files."""

    test_file: str
    test_line: int
    test_image: str | None = None


@dataclass
class HeldOut:
    """The test samples, each pair and image by the place where it stands first."""

    pairs: dict[bytes, Place] = field(default_factory=dict)
    images: dict[Path, Place] = field(default_factory=dict)

    def add(self, file: str, sample: Sample) -> None:
        for pair in sample.pairs:
            self.pairs.setdefault(digest_pair(*pair), Place(file, sample.number))
        for name, path in zip(sample.image_names, sample.images):
            self.images.setdefault(path, Place(file, sample.number, name))

    def find_pair(self, sample: Sample) -> Place | None:
        return next((place for pair in sample.pairs if (place := self.pairs.get(digest_pair(*pair)))), None)


class Survey:
    """A first pass over the files, before hours are spent: every line is a sample, every image a file."""

    def __init__(self):
        self.num_images, self.num_missing, self.named = 0, 0, []

    def read(self, path: Path) -> Iterator[Sample]:
        """Yield the samples of a file while noting which of their images are missing.

        Raises:
            ValueError: a line is no sample, or the file holds none.
        """
        number = 0
        for sample in tqdm(read_samples(path), desc=f"Reading {path.name}", unit="sample"):
            number = sample.number
            for name, image in zip(sample.image_names, sample.images):
                self.num_images += 1
                if find_state(image) is None:
                    self.num_missing += 1
                    self.named.append(f"{name} (line {number} of {path})")
                    del self.named[NUM_NAMED:]
            yield sample
        if not number:
            raise ValueError(f"{path} must hold samples, but is empty.")

    def require_images(self) -> None:
        if self.num_missing:
            raise ValueError(
                f"{self.num_missing} of {self.num_images} images are missing: {', '.join(self.named)}. Put them in "
                "their place, or pass `--skip-unreadable` to remove their samples and go on."
            )
