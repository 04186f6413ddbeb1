"""How often the host waits for the device, and how many operations it launches, per token of text, block and step.

On a CPU nothing waits, so what would wait on a GPU is counted: single values that are read, lists made of tensors, shapes
that depend on values (`nonzero`, masks as indices), and tensors made of Python numbers, which are copied from pageable memory. On
a GPU CUDA says itself where it was waited for (`torch.cuda.set_sync_debug_mode`).
"""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measuring import Setting
from benchmarks.models import deeplatent, lare, lare_inputs, qwen_inputs, vedas
from benchmarks.report import Row
from benchmarks.sizes import Sizes
from modeling_latentvlm.generation_checks import LastTokens


READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
VIEWS = {
    "_unsafe_view", "alias", "as_strided", "chunk", "detach", "expand", "lift_fresh", "permute", "reshape", "select", "slice",
    "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip


class DeviceReads(TorchDispatchMode):
    """Counts `waits` and `launches` while it is active."""

    def __init__(self):
        super().__init__()
        self.waits = self.launches = 0
        self.patches = ExitStack()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        self.launches += name not in VIEWS
        by_mask = name in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        self.waits += name in READS or by_mask
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        def counted(original: Callable) -> Callable:
            def call(*args, **kwargs):
                self.waits += 1
                return original(*args, **kwargs)

            return call

        def uncounted(watch: LastTokens):  # reads what lies on the host already
            waits, tokens = self.waits, take(watch)
            self.waits = waits
            return tokens

        take = LastTokens.take
        self.patches.enter_context(mock.patch.object(torch.Tensor, "tolist", counted(torch.Tensor.tolist)))
        self.patches.enter_context(mock.patch.object(torch, "tensor", counted(torch.tensor)))
        self.patches.enter_context(mock.patch.object(LastTokens, "take", uncounted))
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.close()
        return super().__exit__(*error)


def count(run: Callable[[], object], device: str) -> tuple[int, int]:
    """Waits and launches of one run."""
    if device == "cuda":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = sum("synchronizing CUDA operation" in str(one.message) for one in caught)
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            run()
        return waits, sum("LaunchKernel" in event.name for event in profiler.events())
    with DeviceReads() as reads:
        run()
    return reads.waits, reads.launches


def grown(run: Callable[[int], object], few: int, many: int, device: str) -> tuple[float, float]:
    """Waits and launches that one more of something costs."""
    pairs = zip(count(lambda: run(many), device), count(lambda: run(few), device))
    return tuple((more - less) / (many - few) for more, less in pairs)


def measure(sizes: Sizes, setting: Setting) -> list[Row]:
    rows, greedy, device = [], {"do_sample": False, "eos_token_id": None}, setting.device

    def tokens(model, inputs: dict, **kwargs) -> tuple[float, float]:
        return grown(lambda n: model.generate(**inputs, max_new_tokens=n, **greedy, **kwargs), 3, 8, device)

    def compare(case: str, ours: tuple[float, float], stock: tuple[float, float]) -> None:
        for kind, own, other, goal in zip(("waits", "operations"), ours, stock, ("<= 1", "")):
            rows.append(Row(f"{kind} per token", case, own, "", other, own / other, goal))

    pair = deeplatent(sizes.shape, setting)
    inputs = qwen_inputs(pair, sizes.words)
    stock = tokens(pair.stock, inputs)
    compare("DeepLatent, blocks forbidden", tokens(pair.ours, inputs, max_latent_blocks=0), stock)
    compare("DeepLatent, blocks allowed", tokens(pair.ours, inputs), stock)
    for case, grid in (("size given", sizes.grids[0]), ("size predicted", None)):

        def blocks(n: int, grid=grid):
            limits = {"min_latent_blocks": n, "max_latent_blocks": 3, "latent_grid": grid}
            return pair.ours.generate(**inputs, max_new_tokens=4, **limits, **greedy)

        waits, launches = grown(blocks, 1, 3, device)
        rows.append(Row("waits per block", f"DeepLatent, {case}", waits, "", note=f"{launches:.0f} operations"))

    pair = vedas(sizes.shape, setting, num_replay_tokens=min(sizes.replayed, sizes.shape.image_side**2 // 3))
    inputs = qwen_inputs(pair, sizes.words)
    pair.ours.config.num_latent_steps = 1
    compare("Vedas", tokens(pair.ours, inputs), tokens(pair.stock, inputs))
    waits, launches = grown(steps_of(pair.ours, inputs, "num_latent_steps", greedy), 1, 3, device)
    rows.append(Row("waits per step", "Vedas", waits, "", note=f"{launches:.0f} operations"))

    pair = lare(sizes.shape, setting)
    inputs = lare_inputs(pair, sizes.words)
    compare("LaRe", tokens(pair.ours, inputs), tokens(pair.stock, inputs))
    waits, launches = grown(steps_of(pair.ours, inputs, "num_refocus_steps", greedy), 1, 3, device)
    rows.append(Row("waits per step", "LaRe", waits, "", note=f"{launches:.0f} operations"))
    return rows


def steps_of(model, inputs: dict, name: str, settings: dict) -> Callable[[int], object]:
    """An answer behind so many latent steps."""

    def run(count: int):
        setattr(model.config, name, count)
        return model.generate(**inputs, max_new_tokens=2, **settings)

    return run
