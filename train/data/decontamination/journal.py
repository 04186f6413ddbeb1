"""What a long pass has already found out, on disk: a killed run goes on where it stopped.

A journal is one SQLite file. Each batch is one transaction, so a kill at any moment leaves all of it or nothing of it.
It belongs to the inputs and settings that it was begun with, and refuses others; each batch also to the state of its
images (size, time of change), and is worked out anew where one was replaced.
"""

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers


TABLES = (
    "CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT)",
    "CREATE TABLE IF NOT EXISTS batches"
    " (split TEXT, number INTEGER, key BLOB, records TEXT, embeds BLOB, PRIMARY KEY (split, number))",
)
HASH_BLOCK = 1 << 20  # bytes


class Entry(NamedTuple):
    """The outcome of a batch: lines for the report, and, of test images, the bytes of their float32 embeddings."""

    records: list[dict[str, Any]]
    embeds: bytes = b""


class Journal:
    """Outcomes of batches by split and number.

    Raises:
        ValueError: the file is another kind of file, in use, or was begun with other inputs or settings.
    """

    def __init__(self, path: Path, fingerprint: dict[str, Any]):
        self.path = path
        self.database = sqlite3.connect(path, timeout=1, isolation_level=None)
        try:
            self.database.execute("PRAGMA locking_mode = EXCLUSIVE")  # a second run would work on the same batches
            with self.transaction():
                for table in TABLES:
                    self.database.execute(table)
                self.bind(json.loads(json.dumps(fingerprint)))
        except sqlite3.DatabaseError as error:
            self.database.close()
            raise ValueError(f"{path} must be a journal that no other process uses: {error}.") from error
        except ValueError:
            self.database.close()
            raise

    def transaction(self) -> sqlite3.Connection:
        """A context whose changes are all kept, or none where it is left by an exception."""
        self.database.execute("BEGIN IMMEDIATE")
        return self.database

    def bind(self, fingerprint: dict[str, Any]) -> None:
        begun_with = self.recall("fingerprint")
        if begun_with is None:
            self.note("fingerprint", fingerprint)
        elif begun_with != fingerprint:
            names = sorted(begun_with.keys() | fingerprint.keys())
            values = [(name, begun_with.get(name), fingerprint.get(name)) for name in names]
            changed = ", ".join(f"`{name}` {old} then, {new} now" for name, old, new in values if old != new)
            raise ValueError(
                f"{self.path} holds the progress of a run with other inputs or settings: {changed}. "
                "Run it to its end with those, or delete it to begin anew."
            )

    def note(self, name: str, value: Any) -> None:
        self.database.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def recall(self, name: str) -> Any:
        row = self.database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return row and json.loads(row[0])

    def write(self, split: str, number: int, key: bytes, entry: Entry) -> None:
        with self.transaction():
            values = (split, number, key, json.dumps(entry.records), entry.embeds)
            self.database.execute("INSERT OR REPLACE INTO batches VALUES (?, ?, ?, ?, ?)", values)

    def read(self, split: str, number: int, key: bytes) -> Entry | None:
        """The outcome of a batch, if it was worked out in the state that `key` stands for."""
        query = "SELECT records, embeds FROM batches WHERE split = ? AND number = ? AND key = ?"
        row = self.database.execute(query, (split, number, key)).fetchone()
        return row and Entry(json.loads(row[0]), row[1])

    def records(self, split: str, number: int) -> list[dict[str, Any]]:
        query = "SELECT records FROM batches WHERE split = ? AND number = ?"
        return json.loads(self.database.execute(query, (split, number)).fetchone()[0])

    def close(self) -> None:
        self.database.close()

    def delete(self) -> None:
        self.close()
        self.path.unlink()


def fingerprint_of(train: Path, test: list[Path], vision_tower: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What the outcome depends on: contents of the files, the tower's config and weights, the settings, the libraries."""
    tower_files = sorted(path for path in vision_tower.iterdir() if path.suffix in (".json", ".safetensors"))
    return {
        "train": [str(train), hash_file(train)],
        "test": [[str(path), hash_file(path)] for path in test],
        "vision_tower": {path.name: hash_file(path) for path in tower_files},
        "libraries": [torch.__version__, transformers.__version__],
        **settings,
    }


def hash_file(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def key_of(images: Iterable[Path], *parents: bytes) -> bytes:
    """A digest of the state of images, and of other keys that they are compared under."""
    digest = hashlib.blake2b(b"".join(parents), digest_size=16)
    for path in images:
        state = find_state(path)
        digest.update(f"{path}\n{state}\n".encode("utf-8", "surrogatepass"))
    return digest.digest()


def find_state(path: Path) -> tuple[int, int] | None:
    """Size in bytes and time of change in nanoseconds, or None where there is no such file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # a path with a null character is a `ValueError`
        return None
    return status.st_size, status.st_mtime_ns
