"""A token of text, without latents, against the stock backbone around the same weights. Goal: 1.02."""

import statistics

from benchmarks.measuring import Arm, Setting, decoding_steps, interleave
from benchmarks.models import deeplatent, lare, lare_inputs, qwen_inputs, vedas
from benchmarks.report import Row
from benchmarks.sizes import Sizes


def token_arm(model, inputs: dict, setting: Setting, new_tokens: int, **kwargs) -> Arm:
    """The median step of one answer."""
    return lambda: statistics.median(decoding_steps(model, inputs, setting.device, new_tokens, **kwargs))


def measure(sizes: Sizes, setting: Setting) -> list[Row]:
    rows = []

    def compare(pair, inputs: dict, cases: dict[str, dict]) -> None:
        arms = {"stock": token_arm(pair.stock, inputs, setting, sizes.new_tokens)}
        for case, kwargs in cases.items():
            arms[case] = token_arm(pair.ours, inputs, setting, sizes.new_tokens, **kwargs)
        times = interleave(arms, setting.repeats)
        for case in cases:
            ratio = times.ratio(case, "stock")
            rows.append(
                Row("text token", case, times.median(case), "ms", times.median("stock"), ratio, goal="<= 1.02")
            )

    pair = deeplatent(sizes.shape, setting)
    cases = {"DeepLatent, blocks forbidden": {"max_latent_blocks": 0}, "DeepLatent, blocks allowed": {}}
    compare(pair, qwen_inputs(pair, sizes.words), cases)
    pair = vedas(sizes.shape, setting, num_latent_steps=0)
    compare(pair, qwen_inputs(pair, sizes.words), {"Vedas, no steps": {}})
    pair = lare(sizes.shape, setting, num_refocus_steps=0)
    compare(pair, lare_inputs(pair, sizes.words), {"LaRe, no steps": {}})
    return rows
