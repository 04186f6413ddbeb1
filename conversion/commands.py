"""How a command ends."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End a command with one line and status 2 where a user's input, folder or disk is at fault.

    `LATENTVLM_TRACEBACK=1` shows where it was raised.
    """
    try:
        yield
    except (OSError, ValueError, StrictDataclassError, subprocess.CalledProcessError) as error:
        if os.environ.get("LATENTVLM_TRACEBACK"):
            raise
        text = str(error).encode(errors="backslashreplace").decode()  # a lone surrogate could not be printed
        print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
        sys.exit(2)
