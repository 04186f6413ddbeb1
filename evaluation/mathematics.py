"""Compare mathematics by `math-verify`, in a process that is stopped when it does not come to an end.

`9^{9^{9}}` is a short text, and calculating it never ends: no time limit inside the process helps, since those of
`math-verify` need signals, which a thread cannot have and which do not interrupt one long operation. So a worker process
compares, one pair of texts at a time, and is ended where it calculates longer than `LIMIT`. Its own time counts, not that on the
wall: a right answer must not become a wrong one because the machine has other work to do. What could not be compared counts as
different; that is logged. Every process has one worker, started when it is first needed (`worker_mathematics.py`).
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from transformers.utils import logging


LIMIT = 5.0  # seconds of calculating for one pair
# As long as the process waits for its turn on a busy machine. Without timers of its own (Windows) only the wall can tell.
PATIENCE = 24 if hasattr(signal, "setitimer") else 1
START_LIMIT = 300.0  # seconds until the worker has imported what it needs
WORKER = Path(__file__).with_name("worker_mathematics.py")
logger = logging.get_logger(__name__)


class Worker:
    """A process that compares pairs of texts, started anew after it was killed."""

    def __init__(self):
        self.lock, self.process = threading.Lock(), None

    def compare(self, answer: str, truth: str, limit: float) -> bool | None:
        """Whether two texts are the same mathematics; None where the process did not say so within its `limit` seconds."""
        patience = PATIENCE * limit
        with self.lock:
            if self.process is not None and self.process.poll() is not None:
                self.stop()  # it died while nobody asked
            if self.process is None:
                # -P: modules beside the worker's file must not displace those of the libraries.
                command = [sys.executable, "-P", str(WORKER)]
                self.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
                if self.read(START_LIMIT) is None:
                    raise RuntimeError(f"The process that compares mathematics does not start: {' '.join(command)}")
            try:
                self.process.stdin.write(json.dumps([answer, truth, limit, patience]).encode() + b"\n")
                self.process.stdin.flush()
            except BrokenPipeError:
                self.stop()
                return None
            return self.read(patience)

    def read(self, limit: float) -> bool | None:
        """The next line of the process; it is killed after `limit` seconds."""
        timer = threading.Timer(limit, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        timer.join()  # else it could kill the process while the next pair is compared
        if line.endswith(b"\n"):
            return json.loads(line)
        self.stop()
        return None

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


WORKERS: dict[int, Worker] = {}  # by process: a fork must not share the pipes of its parent


@atexit.register
def stop_worker() -> None:
    if os.getpid() in WORKERS:
        WORKERS.pop(os.getpid()).stop()


def compare_mathematics(answer: str, truth: str) -> bool | None:
    """Whether two texts are the same mathematics, after `LIMIT` seconds of work at most; None without `math-verify`."""
    if find_spec("math_verify") is None:
        return None
    return compare_within(answer, truth, LIMIT)


@lru_cache(maxsize=4096)  # answers of one group are often the same, the endless ones too
def compare_within(answer: str, truth: str, limit: float) -> bool:
    same = WORKERS.setdefault(os.getpid(), Worker()).compare(answer, truth, limit)
    if same is None:
        logger.warning(
            f"{answer[:80]!r} could not be compared with {truth[:80]!r} within {limit:g} s: it counts as different."
        )
    return bool(same)
