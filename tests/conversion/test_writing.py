"""Writers: whole or not at all, one at a time, and nothing left of processes that were killed."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from conversion import writing
from conversion.writing import filled_folder, link_missing, locked, replaced_file, replaced_folder, write_file


FORK = multiprocessing.get_context("fork")


def run_and_kill(function) -> None:
    """Run in a process that kills itself with SIGKILL, after which nothing is tidied up."""
    process = FORK.Process(target=function)
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def fill(folder: Path, text: str) -> None:
    (folder / "data.txt").write_text(text)


def test_a_file_is_replaced_whole_and_its_suffix_stays(tmp_path):
    path = tmp_path / "plot.v1.png"
    write_file(path, "a\nb\n")
    with replaced_file(path) as partial:
        assert partial.suffix == ".png" and partial.parent == tmp_path and path.read_bytes() == b"a\nb\n"
        partial.write_bytes(b"new")
    assert path.read_bytes() == b"new" and visible(tmp_path) == {"plot.v1.png"}


def test_a_full_disk_leaves_a_file_as_it_was(tmp_path, monkeypatch):
    write_file(tmp_path / "a.json", b"old")

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "a.json", b"half")
    assert (tmp_path / "a.json").read_bytes() == b"old" and visible(tmp_path) == {"a.json"}


def test_what_a_killed_writer_of_a_file_left_is_deleted_by_the_next(tmp_path):
    def killed():
        os.replace = die
        write_file(tmp_path / "a.json", "half")

    run_and_kill(killed)
    (left,) = visible(tmp_path) - {".a.json.lock"}
    assert left.startswith("a.partial-") and not (tmp_path / "a.json").exists()
    other = tmp_path / "a.partial-is-mine.json"
    other.write_text("kept")
    write_file(tmp_path / "a.json", "whole")
    assert visible(tmp_path) == {"a.json", other.name}


@pytest.mark.parametrize("place", ["while it is written", "between the two renames"])
@pytest.mark.parametrize("is_there", [False, True])
def test_killed_writer_of_a_folder(tmp_path, place, is_there):
    output = tmp_path / "out"
    if is_there:
        with replaced_folder(output) as folder:
            fill(folder, "old")

    def killed():
        if place.startswith("between"):
            rename = Path.rename

            def rename_once(path, target):
                if ".partial-" in path.name:
                    die()
                return rename(path, target)

            Path.rename = rename_once
        with replaced_folder(output) as folder:
            fill(folder, "new")
            if place.startswith("while"):
                die()

    run_and_kill(killed)
    assert any(".partial-" in name for name in visible(tmp_path))
    writing.recover_folder(output)
    assert visible(tmp_path) == ({"out"} if is_there else set())
    assert not is_there or (output / "data.txt").read_text() == "old"
    with replaced_folder(output) as folder:
        fill(folder, "new")
    assert (output / "data.txt").read_text() == "new" and visible(tmp_path) == {"out"}


def test_two_writers_of_one_name_do_not_meet(tmp_path):
    with replaced_folder(tmp_path / "out") as folder:
        fill(folder, "first")
        busy = pytest.raises(ValueError, match="Another process writes .*out: let it finish")
        with busy, replaced_folder(tmp_path / "out"):
            pass
        assert (folder / "data.txt").is_file()  # of a living process
        with replaced_folder(tmp_path / "other") as second:
            fill(second, "second")
    assert visible(tmp_path) == {"out", "other"}


def test_a_lock_is_never_held_twice_while_it_is_made_and_deleted(tmp_path):
    """Holders delete the file that they lock: who waited for it must see that it is gone."""
    inside, most, stop = [], [], time.monotonic() + 2

    def work():
        while time.monotonic() < stop:
            with locked(tmp_path / "out", wait=10):
                inside.append(None)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert max(most) == 1 and len(most) > 50 and not visible(tmp_path)


def test_who_waited_for_a_lock_that_was_deleted_waits_for_the_new_one(tmp_path):
    path, entered = tmp_path / ".out.lock", threading.Event()
    first, second = FileLock(path), FileLock(path)
    first.acquire()

    def wait():
        with locked(tmp_path / "out", wait=20):
            entered.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    time.sleep(0.3)
    path.unlink()
    second.acquire(timeout=5)
    first.release()
    assert not entered.wait(0.5)
    second.release()
    assert entered.wait(20)
    waiter.join()


def test_a_lock_is_free_when_its_process_is_killed(tmp_path):
    def killed():
        with locked(tmp_path / "out"):
            die()

    run_and_kill(killed)
    with locked(tmp_path / "out"):
        pass


def test_others_of_a_folder_are_taken_over_and_never_written_through(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "images").mkdir(parents=True)
    (new / "images").mkdir(parents=True)
    for folder, text in ((old, "old"), (new, "new")):
        (folder / "images" / "0.png").write_text(text)
    (old / "images" / "1.png").write_text("old")
    (old / "notes.txt").write_text("mine")
    (old / "link").symlink_to("notes.txt")
    link_missing(old, new)
    assert (new / "images" / "0.png").read_text() == "new" and (old / "images" / "0.png").read_text() == "old"
    assert (new / "images" / "1.png").read_text() == "old" and os.readlink(new / "link") == "notes.txt"


def test_the_marker_of_a_filled_folder_comes_last_and_goes_first(tmp_path, monkeypatch):
    for name in ("config.json", "model.safetensors", "training/objective.safetensors", "checkpoint-5/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    moved, replace = [], os.replace

    def watch(source, target):
        moved.append(str(Path(target).relative_to(tmp_path)))
        assert not (tmp_path / "config.json").exists()
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    with filled_folder(tmp_path) as folder:
        for name in ("config.json", "model.safetensors", "training/objective.safetensors"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("new")
        assert (tmp_path / "config.json").read_text() == "old"
    assert moved[-1] == "config.json" and len(moved) == 3
    assert {(tmp_path / name).read_text() for name in moved} == {"new"}
    assert (tmp_path / "checkpoint-5" / "config.json").read_text() == "old" and ".partial" not in visible(tmp_path)


def test_two_commands_at_once(tmp_path):
    """The second ends with one line and status 2, and the first is not harmed."""
    command = [
        sys.executable,
        "-m",
        "train.data.tasks",
        "--task",
        "color",
        "--output",
        str(tmp_path / "set"),
        "--force",
    ]
    first = subprocess.Popen([*command, "--n", "400"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (tmp_path / ".set.lock").exists() or not list(tmp_path.glob("set.partial-*")):
        time.sleep(0.02)
        assert first.poll() is None
    second = subprocess.run([*command, "--n", "3"], capture_output=True, text=True)
    assert second.returncode == 2 and "Another process writes" in second.stderr.splitlines()[-1]
    assert first.wait(timeout=120) == 0
    assert len((tmp_path / "set" / "data.jsonl").read_text().splitlines()) == 400
    assert visible(tmp_path) == {"set"}
