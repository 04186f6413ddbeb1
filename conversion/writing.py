"""The one place where results are written to disk: a file or folder appears under its name complete, or not at all.

    write_file(path, text)                          a small file
    with replaced_file(path) as partial: ...        a file that a library writes, such as a figure
    with replaced_folder(output) as folder: ...     a folder, swapped for the one that was there
    with filled_folder(output) as folder: ...       files added to a folder that keeps its others, `config.json` last
    with locked(path): ...                          keep other processes away from an output while a command runs

Everything is written to a temporary beside its place (the same file system), flushed to the disk, and renamed by `os.replace`.
A lock (`.NAME.lock` beside it) belongs to every name. Who holds it is the only writer, so that every `NAME.partial-*`
found there was left by a process that died, and is deleted; the system frees the locks of dead processes.
"""

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout


FEW_FILES = 64  # more are flushed by one call for the whole system, which is faster than one call each
LONGEST_WAIT = 60  # seconds for the lock of a single file, which is held for as long as writing it takes


@contextmanager
def locked(target: str | Path, wait: float = 0.0, waiting: str | None = None) -> Iterator[None]:
    """Be the only process that writes `target`, a file or folder that need not exist yet.

    Args:
        wait: seconds to wait for another process; below 0 for as long as it takes.
        waiting: what to print before a wait.

    Raises:
        ValueError: another process holds the lock.
    """
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    path = lock_of(target)
    lock = _acquire(path, target, wait, waiting)
    try:
        yield
    finally:
        if lock is not None:
            if os.name == "posix":  # elsewhere an open file cannot be deleted
                path.unlink(missing_ok=True)
            lock.release()


def lock_of(target: str | Path) -> Path:
    """The file that is locked while `target` is written. A process that was killed leaves it, unlocked."""
    target = Path(target).absolute()
    return target.with_name(f".{target.name}.lock")


def _acquire(path: Path, target: Path, wait: float, waiting: str | None) -> FileLock | None:
    """Lock a file that other processes delete when they release it; None where the file system has no locks."""
    while True:
        # While this is open, the number of its inode cannot be used again: equal numbers below mean one file all the time.
        witness = os.open(path, os.O_RDWR | os.O_CREAT, 0o666) if os.name == "posix" else None
        try:
            lock = FileLock(path)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if wait == 0:
                    raise ValueError(f"Another process writes {target}: let it finish, or stop it.") from None
                if waiting:
                    print(waiting, file=sys.stderr, flush=True)
                try:
                    lock.acquire(timeout=wait)
                except Timeout:
                    raise ValueError(f"Another process has been writing {target} for {wait} seconds.") from None
            except NotImplementedError:
                print(f"No lock can be had for {target}: let no other process write it.", file=sys.stderr)
                return None
            with suppress(FileNotFoundError):
                if witness is None or os.path.samestat(os.fstat(witness), os.stat(path)):
                    return lock
            lock.release()  # of a file that its holder deleted meanwhile
        finally:
            if witness is not None:
                os.close(witness)


def partial_name(path: Path) -> Path:
    """A new temporary beside a file or folder. A suffix stays at the end: libraries choose formats by it."""
    return path.with_name(f"{path.stem}.partial-{uuid4().hex[:8]}{path.suffix}")


def leftovers(path: Path, kind: str) -> list[Path]:
    """What dead processes left of a name; only the holder of its lock knows that they are dead."""
    start, end = f"{path.stem}.{kind}-", path.suffix
    found = [one for one in path.parent.iterdir() if one.name.startswith(start) and one.name.endswith(end)]
    return sorted(one for one in found if len(one.name) == len(start) + 8 + len(end))


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or a folder with all that it holds, is on the disk."""
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    if len(files) > FEW_FILES and hasattr(os, "sync"):
        os.sync()
        return
    for file in files:
        # Windows flushes only what is open for writing.
        with file.open("rb+" if os.name == "nt" and os.access(file, os.W_OK) else "rb") as opened:
            synchronize(opened.fileno())
    if path.is_dir():
        flush_names(path)


def synchronize(descriptor: int) -> None:
    """`fsync`, where the file system has it. A full disk is an error, here at the latest."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise


def flush_names(folder: Path) -> None:
    """So that the names in a folder survive a loss of power too; Windows has no such call."""
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
            synchronize(opened)
        finally:
            os.close(opened)


@contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """Give a path to write to, and rename it to `path` if the block ends well; otherwise leave no trace of it.

    Raises:
        ValueError: another process writes the same file, and does not come to an end.
    """
    path = Path(path).absolute()
    with locked(path, LONGEST_WAIT):
        for left in leftovers(path, "partial"):
            remove(left)
        partial = partial_name(path)
        try:
            yield partial
            flush(partial)
            os.replace(partial, path)
            flush_names(path.parent)
        finally:
            remove(partial)


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write a file that appears under its name complete or not at all. Text is UTF-8, its lines end as they are given."""
    with replaced_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def append_lines(path: str | Path, text: str) -> None:
    """Add whole lines to a file, and wait until they are on the disk."""
    with Path(path).open("a", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def recover_folder(output: Path) -> None:
    """Put a folder back that a process was killed over while it swapped it, and delete what dead processes left.

    Raises:
        ValueError: another process writes it.
    """
    output = output.resolve()
    if output.parent.is_dir():
        with locked(output):
            _recover(output)


def _recover(output: Path) -> None:
    for retired in leftovers(output, "replaced"):
        if output.exists():
            remove(retired)
        else:
            retired.rename(output)
    for partial in leftovers(output, "partial"):
        remove(partial)


@contextmanager
def replaced_folder(output: str | Path, keeps_others: bool = False) -> Iterator[Path]:
    """Give a folder to write to, and rename it to `output` if the block ends well; otherwise leave no trace of it.

    Args:
        keeps_others: take over the files of the old folder that the new one does not have (by links where possible).

    Raises:
        ValueError: another process writes the same folder.
    """
    output = Path(output).resolve()
    with locked(output):
        _recover(output)
        partial = partial_name(output)
        # Not `tempfile`, which would leave a folder that only its owner can read.
        try:
            partial.mkdir()
            yield partial
            if keeps_others and output.exists():
                link_missing(output, partial)
            flush(partial)
            publish(partial, output)
        finally:
            remove(partial)


def publish(partial: Path, output: Path) -> None:
    """Rename `partial` to `output`; what was there is deleted only afterwards. A kill in between is mended by `_recover`."""
    retired = output.with_name(f"{output.stem}.replaced-{uuid4().hex[:8]}{output.suffix}")
    if output.exists():
        output.rename(retired)
    try:
        partial.rename(output)
    finally:
        if retired.exists() and not output.exists():
            retired.rename(output)
    flush_names(output.parent)
    remove(retired)


def link_missing(source: Path, target: Path) -> None:
    """Link every file of `source` that `target` does not have into it, or copy it where links are not possible."""
    for entry in sorted(source.iterdir()):
        other = target / entry.name
        if entry.is_dir() and not entry.is_symlink():
            if not other.exists():
                other.mkdir()
            if other.is_dir():
                link_missing(entry, other)
        elif not (other.exists() or other.is_symlink()):
            try:
                os.link(entry, other, follow_symlinks=False)
            except (OSError, NotImplementedError):
                shutil.copy2(entry, other, follow_symlinks=False)


@contextmanager
def filled_folder(
    output: str | Path, marker: str = "config.json", is_writer: bool = True, wait_for_all: Callable | None = None
) -> Iterator[Path]:
    """Give a folder whose files move into `output` at the end, `marker` last: where it stands, all others do.

    For an output that keeps its other files, as the folder of a training run keeps its checkpoints. The caller holds the
    lock of `output`.

    Args:
        is_writer: whether this process makes and moves files; the others of a distributed run only get the path.
        wait_for_all: waits for all processes of a distributed run.
    """
    output = Path(output)
    partial, wait_for_all = output / ".partial", wait_for_all or (lambda: None)
    if is_writer:
        remove(partial)
        partial.mkdir(parents=True)
    wait_for_all()
    try:
        yield partial
        wait_for_all()
        if is_writer:
            flush(partial)
            (output / marker).unlink(missing_ok=True)
            flush_names(output)
            files = [one.relative_to(partial) for one in sorted(partial.rglob("*")) if one.is_file()]
            for file in sorted(files, key=lambda one: one == Path(marker)):
                (output / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(partial / file, output / file)
            flush_names(output)
    finally:
        if is_writer:
            remove(partial)
