"""Peak of what tensors hold while a function runs, above what they held before: exact, unlike the process's size."""

from collections.abc import Callable

import torch


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes allocated at the worst moment of `run()`: by CUDA's allocator, or counted from the CPU's by the profiler."""
    if torch.cuda.is_available():
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
