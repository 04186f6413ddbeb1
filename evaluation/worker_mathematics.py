"""The process behind `mathematics.py`: reads pairs of texts, a line of JSON each, and writes whether they are the same.

It imports nothing of this library, and ends with its input, or by itself when its parent died while it was calculating.
"""

import json
import signal
import sys

from math_verify import parse, verify


MEMORY_LIMIT = 2**32  # bytes of address space: a tower of powers asks for more
GRACE = 5.0  # seconds behind the patience of the parent, which then kills this process anyway


def limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def set_timers(work: float, patience: float) -> None:
    """End this process by a signal, inside C code too: after `work` seconds of calculating, or `patience` of waiting; 0 is never."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, work)
        signal.setitimer(signal.ITIMER_REAL, patience)


def main() -> None:
    limit_memory()
    out, sys.stdout = sys.stdout, sys.stderr  # nothing that a library prints is an answer
    print("true", file=out, flush=True)
    for line in sys.stdin:
        answer, truth, limit, patience = json.loads(line)
        set_timers(limit, patience + GRACE)
        # Without the time limits of `math-verify`, which set one of these timers.
        told, known = (parse(f"${text}$", parsing_timeout=None) for text in (answer, truth))
        same = bool(verify(known, told, timeout_seconds=None))
        set_timers(0, 0)
        print(json.dumps(same), file=out, flush=True)


if __name__ == "__main__":
    main()
