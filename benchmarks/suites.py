"""The rows of a suite: `benchmarks.run` is its command."""

import gc
import importlib
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.measuring import Setting, describe_machine, free_memory
from benchmarks.models import Shape, deeplatent, weight_bytes
from benchmarks.report import Row, to_markdown, write_report
from benchmarks.run import SUITES
from benchmarks.sizes import CPU, CPU_QUICK, GPU, GPU_QUICK, Sizes


SIZES = {("cpu", False): CPU, ("cpu", True): CPU_QUICK, ("gpu", False): GPU, ("gpu", True): GPU_QUICK}


def gibibytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def weights_of(shape: Shape, setting: Setting) -> int:
    """Bytes of the largest model at this shape, without making it."""
    return weight_bytes(deeplatent(shape, replace(setting, device="meta")).ours)


def measure_subject(subject: str, sizes: Sizes, setting: Setting) -> list[Row]:
    """The rows of one subject; one that does not fit into memory is a row that says so."""
    needed, free = weights_of(sizes.shape, setting), free_memory(setting.device)
    # Training knows its own, smaller shape.
    if needed > free and subject != "training_steps":
        return [
            Row(subject, "all", None, "", note=f"the weights need {gibibytes(needed)}, {gibibytes(free)} are free")
        ]
    try:
        return importlib.import_module(f"benchmarks.{subject}").measure(sizes, setting)
    except torch.OutOfMemoryError:
        return [Row(subject, "all", None, "", note=f"out of memory; {gibibytes(free)} were free")]
    finally:
        gc.collect()
        if setting.device == "cuda":
            torch.cuda.empty_cache()


def run_suite(suite: str, sizes: Sizes, setting: Setting, only: list[str] | None, output: Path) -> list[Row]:
    """All rows. Tests call it for the gpu suite with tiny sizes on a CPU."""
    settings = describe_machine(setting.device)
    settings |= {"dtype": str(setting.dtype).removeprefix("torch."), "repeats": setting.repeats, "seed": 0}
    rows = []
    for subject in SUITES[suite]:
        if only and subject not in only:
            continue
        start = time.perf_counter()
        found = measure_subject(subject, sizes, setting)
        print(f"{subject}, {time.perf_counter() - start:.0f} s\n{to_markdown(found)}", flush=True)
        rows += found
        write_report(output, suite, settings, rows)
    return rows
