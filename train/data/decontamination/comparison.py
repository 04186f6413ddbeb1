"""Compare training samples with test samples, batch by batch, and say which must go.

A sample goes for the first of these reasons that holds:

    exact match            one of its question-answer pairs is, normalised, a pair of the test samples
    near-duplicate image   max over test images j of cos(e_i, e_j) >= threshold, e the tower's embeddings
    unreadable image       nobody can say whether it is a duplicate (only where the user said to go on)

Memory holds the test samples' digests and embeddings and one training batch, however long the training file is.

Shapes: B training images of a batch, T test images, D embedding size.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from train.data.decontamination.journal import Entry, Journal, key_of
from train.data.decontamination.samples import Sample, batched
from train.data.decontamination.survey import NUM_NAMED, HeldOut, Place
from train.data.decontamination.tower import ImageEmbedder


EXACT, IMAGE, UNREADABLE = "exact match", "near-duplicate image", "unreadable image"
UNREADABLE_TEST = "unreadable test image"
DECIMALS = 6  # of a similarity: what float32 holds of it, so that a copy has 1.0 in every batch


class Comparison:
    """Works through both splits, and remembers in the journal what it found.

    Raises:
        ValueError: an image cannot be read and `skip_unreadable` is off; the message names it. What was done before is
            in the journal.
    """

    def __init__(
        self, held_out: HeldOut, embedder: ImageEmbedder, journal: Journal, threshold: float, skip_unreadable: bool
    ):
        self.held_out, self.embedder, self.journal = held_out, embedder, journal
        self.threshold, self.skip_unreadable = threshold, skip_unreadable
        self.test_records, self.test_places, self.test_embeds, self.test_key = self.embed_held_out()

    def embed_held_out(self) -> tuple[list[dict], list[Place], Tensor, bytes]:
        """Embed the test images; returns what was unreadable, and place by place the embeddings (T, D), and their key."""
        records, places, embeds, keys = [], [], [], []
        images = self.held_out.images
        with tqdm(total=len(images), desc="Embedding test images", unit="image") as progress:
            for number, paths in enumerate(batched(images, self.embedder.batch_size)):
                keys.append(key_of(paths))
                entry = self.remember("test", number, keys[-1], partial(self.embed_test_images, paths))
                unreadable = {tuple(record[name] for name in Place._fields) for record in entry.records}
                readable = [images[path] for path in paths if images[path] not in unreadable]
                if readable:
                    embeds.append(
                        torch.frombuffer(bytearray(entry.embeds), dtype=torch.float32).view(len(readable), -1)
                    )
                records += entry.records
                places += readable
                progress.update(len(paths))
        matrix = torch.cat(embeds).to(self.embedder.device) if embeds else torch.empty(0, 0)
        return records, places, matrix, key_of((), *keys)

    def embed_test_images(self, paths: list[Path]) -> Entry:
        embeds, unreadable = self.embedder.embed(paths)
        places = self.held_out.images
        records = [
            {"stage": UNREADABLE_TEST, **places[path]._asdict(), "reason": reason}
            for path, reason in unreadable.items()
        ]
        return Entry(records, embeds.cpu().numpy().tobytes())

    def compare_all(self, samples: Iterable[Sample], progress: tqdm) -> None:
        """Bring every batch of training samples into the journal."""
        for number, batch in enumerate(batched(samples, self.embedder.batch_size)):
            key = key_of((path for sample in batch for path in sample.images), self.test_key)
            self.remember("train", number, key, partial(self.compare, batch))
            progress.update(len(batch))

    def compare(self, samples: list[Sample]) -> Entry:
        return Entry(list(self.find_contaminated(samples)))

    def find_contaminated(self, samples: list[Sample]) -> Iterator[dict[str, Any]]:
        """Yield a record for each sample that must go, exact matches first."""
        remaining = []
        for sample in samples:
            if place := self.held_out.find_pair(sample):
                yield {"line": sample.number, "stage": EXACT, **place._asdict()}
            else:
                remaining.append(sample)
        if not self.test_places:
            return
        images = dict.fromkeys(path for sample in remaining for path in sample.images)
        embeds, unreadable = self.embedder.embed(images)
        readable = [path for path in images if path not in unreadable]
        nearest = dict(zip(readable, find_nearest(embeds, self.test_embeds))) if readable else {}
        for sample in remaining:
            record = next(filter(None, self.judge_images(sample, nearest, unreadable)), None)
            if record:
                yield {"line": sample.number, **record}

    def judge_images(
        self, sample: Sample, nearest: dict[Path, tuple[float, int]], unreadable: dict[Path, str]
    ) -> Iterator[dict[str, Any] | None]:
        for name, path in zip(sample.image_names, sample.images):
            if path in unreadable:
                yield {"stage": UNREADABLE, "image": name, "reason": unreadable[path]}
                continue
            similarity, row = nearest[path]
            if similarity >= self.threshold:
                yield {"stage": IMAGE, "image": name, **self.test_places[row]._asdict(), "similarity": similarity}

    def remember(self, split: str, number: int, key: bytes, work: Callable[[], Entry]) -> Entry:
        """The journal's entry, or that of `work`, written down."""
        entry = self.journal.read(split, number, key)
        if entry is None or (find_unreadable(entry) and not self.skip_unreadable):
            entry = work()
            self.require_readable(find_unreadable(entry))
            self.journal.write(split, number, key, entry)
        return entry

    def require_readable(self, records: list[dict[str, Any]]) -> None:
        if not records or self.skip_unreadable:
            return
        named = ", ".join(describe_unreadable(record) for record in records[:NUM_NAMED])
        raise ValueError(
            f"{len(records)} images of a batch of {self.embedder.batch_size} cannot be read: {named}. What was done "
            f"before is kept in {self.journal.path}: replace them and run the same command again, or pass "
            "`--skip-unreadable` as well, to remove their samples and go on from there."
        )


def find_unreadable(entry: Entry) -> list[dict[str, Any]]:
    return [record for record in entry.records if record["stage"] in (UNREADABLE, UNREADABLE_TEST)]


def describe_unreadable(record: dict[str, Any]) -> str:
    if record["stage"] == UNREADABLE:
        return f"{record['image']} (line {record['line']} of the training file; {record['reason']})"
    return f"{record['test_image']} (line {record['test_line']} of {record['test_file']}; {record['reason']})"


def find_nearest(
    embeds: Tensor,  # (B, D)
    test_embeds: Tensor,  # (T, D)
) -> list[tuple[float, int]]:
    """Cosine similarity and row of the most similar test image; of equal ones the first."""
    scaled = (embeds.to(test_embeds.device) @ test_embeds.T).mul(10**DECIMALS).round()  # (B, T)
    best, rows = scaled.max(dim=1)
    return [(value / 10**DECIMALS, row) for value, row in zip(best.tolist(), rows.tolist())]
