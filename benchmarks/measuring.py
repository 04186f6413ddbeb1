"""How everything here is measured: arms that take turns in one run, medians after a warm-up, peaks of the allocator.

On a CPU with one thread the clock counts the process's own time, so that what other jobs of the machine take does not
count (what they do to caches and frequency does); otherwise it is the wall clock, behind a synchronisation.
"""

import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from tqdm import tqdm
from transformers.generation import LogitsProcessor, LogitsProcessorList


LONG_RUN_MS = 90_000
Arm = Callable[[], float]  # runs once and returns its seconds


@dataclass(frozen=True)
class Setting:
    """Where and how often is measured."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    repeats: int = 7


def now(device: str) -> float:
    """Seconds on the clock that fits the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def timed(call: Callable[[], object], device: str, prepare: Callable[[], object] | None = None) -> Arm:
    """An arm that runs `call` once; `prepare` comes before it and is not timed."""

    def run() -> float:
        if prepare is not None:
            prepare()
        start = now(device)
        call()
        return now(device) - start

    return run


class Times(dict):
    """Milliseconds of every round, by arm."""

    def median(self, arm: str) -> float:
        return statistics.median(self[arm])

    def ratio(self, arm: str, other: str) -> float:
        """Median of the ratios of one round each: what drifts from round to round drops out."""
        return statistics.median(a / b for a, b in zip(self[arm], self[other]))


def interleave(arms: dict[str, Arm], repeats: int) -> Times:
    """Run every arm once a round, in turn forwards and backwards; the first round warms up and does not count."""
    times = Times({name: [] for name in arms})
    for number in tqdm(range(repeats + 1), leave=False):
        if number > 1 and sum(map(sum, times.values())) > LONG_RUN_MS:
            break  # what takes so long varies little
        for name in list(arms)[:: -1 if number % 2 else 1]:
            milliseconds = 1000 * arms[name]()
            if number:
                times[name].append(milliseconds)
    return times


class StepClock(LogitsProcessor):
    """Notes when each decoding step of a `generate` has its logits."""

    def __init__(self, device: str):
        self.device, self.stamps = device, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.stamps.append(now(self.device))
        return scores


def decoding_steps(model, inputs: dict, device: str, new_tokens: int, **kwargs) -> list[float]:
    """Seconds of every step of a greedy answer but the first, which is the prompt's."""
    clock = StepClock(device)
    model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        logits_processor=LogitsProcessorList([clock]),
        **kwargs,
    )
    return [after - before for before, after in zip(clock.stamps, clock.stamps[1:])]


def peak_memory(run: Callable[[], object], device: str) -> int:
    """Bytes that tensors hold at the worst moment of `run()` beyond those held before: exact, unlike a process's size."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def free_memory(device: str) -> int:
    """Bytes that can still be allocated."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    with open("/proc/meminfo") as lines:
        fields = dict(line.split(":") for line in lines)
    return 1024 * int(fields["MemAvailable"].split()[0])


def describe_machine(device: str) -> dict:
    """What the numbers depend on."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "clock": "process time" if device == "cpu" and torch.get_num_threads() == 1 else "wall clock",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
