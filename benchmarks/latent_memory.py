"""Peak memory of prompt, latents and one token, above the weights, against stock over a context of equal length."""

from benchmarks.latent_steps import lare_calls, vedas_calls
from benchmarks.measuring import Setting, peak_memory
from benchmarks.models import deeplatent, qwen_inputs
from benchmarks.report import Row
from benchmarks.sizes import Sizes


MEBIBYTE = 2**20


def measure(sizes: Sizes, setting: Setting) -> list[Row]:
    rows = []

    def compare(case: str, ours, stock) -> None:
        peaks = [peak_memory(call, setting.device) / MEBIBYTE for call in (ours, stock)]
        rows.append(Row("memory of latents", case, peaks[0], "MiB", peaks[1], peaks[0] / peaks[1]))

    pair, settings = deeplatent(sizes.shape, setting), {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
    height, width = sizes.grids[-1]
    short, long = (qwen_inputs(pair, sizes.words + extra) for extra in (0, 5 + height * width))
    block = {"min_latent_blocks": 1, "max_latent_blocks": 1, "latent_grid": (height, width)}
    compare(
        f"DeepLatent, N = {height * width}",
        lambda: pair.ours.generate(**short, **settings, **block),
        lambda: pair.stock.generate(**long, **settings),
    )
    _, calls = lare_calls(sizes, setting)
    compare("LaRe", calls["LaRe"], calls["stock"])
    for words in (sizes.words, sizes.lengths[-1]):
        calls = vedas_calls(sizes, setting, words, 1, scopes=("incremental", "context"))
        for scope in ("incremental", "context"):
            compare(f"Vedas {scope}, {words} words", calls[scope], calls["stock"])
    return rows
