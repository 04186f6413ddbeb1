"""Mathematics is compared in a process that can be stopped, from wherever it is asked."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from evaluation import mathematics
from evaluation.final_answer import is_right


pytest.importorskip("math_verify")
ENDLESS = "9^{9^{9}}"


@pytest.fixture
def limit(monkeypatch) -> float:
    monkeypatch.setattr(mathematics, "LIMIT", 1.0)
    mathematics.compare_within.cache_clear()
    return 1.0


def test_an_answer_that_never_ends_is_wrong_in_time(limit, caplog):
    began = time.perf_counter()
    assert not is_right(ENDLESS, "3") and not is_right(ENDLESS, "3")  # the second time it is known
    assert time.perf_counter() - began < mathematics.PATIENCE * limit + 10
    assert is_right(r"\frac{1}{2}", "0.5") and not is_right(r"\frac{1}{2}", "0.25")  # by a new process


def test_a_process_without_a_clock_of_its_own_is_killed(tmp_path, monkeypatch):
    """Where there are no timers (Windows), nothing but the kill ends it; this one would answer after 20 seconds."""
    stub = tmp_path / "worker.py"
    stub.write_text("import time\nprint('true', flush=True)\ninput()\ntime.sleep(20)\nprint('true', flush=True)\n")
    monkeypatch.setattr(mathematics, "WORKER", stub)
    monkeypatch.setattr(mathematics, "PATIENCE", 1)
    worker = mathematics.Worker()
    assert worker.compare("1", "1", 0.5) is None and worker.process is None


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs signals")
def test_a_process_that_has_to_wait_is_not_given_up(limit):
    """On a busy machine: two seconds without a turn made `4x + 1` and `1 + 4x` different."""
    assert is_right("2x + 2", "2 + 2x")
    pid = mathematics.WORKERS[os.getpid()].process.pid
    os.kill(pid, signal.SIGSTOP)
    wake = threading.Timer(2 * limit, os.kill, (pid, signal.SIGCONT))
    wake.start()
    assert is_right("4x + 1", "1 + 4x")
    wake.join()


def test_a_process_that_dies_is_started_anew(limit):
    assert is_right("2x + 1", "1 + 2x")
    worker = mathematics.WORKERS[os.getpid()]
    worker.process.kill()
    worker.process.wait()
    assert is_right("3x + 1", "1 + 3x") and not is_right("3x + 1", "1 + 4x")


def test_threads_take_turns(limit):
    found = {}

    def ask(number: int) -> None:
        found[number] = (
            is_right(rf"\frac{{{number}}}{{2}}", str(number / 2)),
            is_right(rf"\frac{{{number}}}{{3}}", "0.1"),
        )

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(1, 9), (True, False))


def answer_in_child(queue) -> None:
    queue.put((is_right(r"\frac{5}{2}", "2.5"), is_right(r"\frac{5}{2}", "2.6")))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_has_a_worker_of_its_own(limit):
    assert is_right(r"\frac{3}{2}", "1.5")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=answer_in_child, args=(queue,), daemon=True)  # as those of a DataLoader
    child.start()
    assert queue.get(timeout=60) == (True, False)
    child.join()
    assert is_right(r"\frac{7}{2}", "3.5") and not is_right(r"\frac{7}{2}", "3.6")


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_a_worker_does_not_outlive_its_parent(tmp_path):
    """Killed while its worker calculates for ever: the worker ends by its own clock."""
    program = (
        "import os, threading, time\nfrom evaluation import mathematics\nmathematics.compare_within('1', '1', 1.0)\n"
        "print(mathematics.WORKERS[os.getpid()].process.pid, flush=True)\n"
        f"threading.Thread(target=mathematics.compare_within, args=({ENDLESS!r}, '3', 2.0), daemon=True).start()\n"
        "time.sleep(1)\nos._exit(0)\n"
    )
    root = Path(__file__).parents[2]
    pid = int(subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True).stdout)

    def is_running() -> bool:
        try:
            os.kill(pid, 0)
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    deadline = time.monotonic() + 60
    while is_running() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not is_running()
