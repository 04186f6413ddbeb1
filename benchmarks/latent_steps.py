"""The steps of LaRe and Vedas against stock work over as many tokens.

LaRe: its language model's prefill and cached forwards of as many tokens as its steps have. LaRe does the rest besides: the
saliency row of every layer, window, Extractor, `<bot>` and `<eot>`. Vedas: a whole answer against a stock answer behind a
prompt that is as much longer as the steps are, for every routing scope.
"""

import torch
from transformers import DynamicCache

from benchmarks.measuring import Setting, interleave, timed
from benchmarks.models import Pair, lare, lare_inputs, qwen_inputs, vedas
from benchmarks.report import Row
from benchmarks.sizes import Sizes
from configuration_latentvlm.transformers_api import cache_keyword
from modeling_latentvlm.decoding_lare import PromptEnds, RefocusContext, RefocusDecoder


SCOPES = ("incremental", "context", "reference")


@torch.no_grad()
def plain_steps(pair: Pair, embeds: torch.Tensor) -> None:
    """Prefill, then a forward on the cache for every step."""
    config, text_model = pair.ours.config, pair.text_model
    cache = DynamicCache(config=text_model.config)
    text_model(inputs_embeds=embeds, use_cache=True, **cache_keyword(cache))
    for _ in range(config.num_refocus_steps):
        step = embeds[:, : config.num_step_latents]
        text_model(inputs_embeds=step, use_cache=True, **cache_keyword(cache))


@torch.no_grad()
def refocusing_steps(pair: Pair, input_ids: torch.Tensor, embeds: torch.Tensor) -> None:
    """Prefill, then the refocusing steps; `embeds` have a `<bot>` more than `input_ids`."""
    end = torch.full((len(embeds),), input_ids.shape[1], device=embeds.device)
    decoder = RefocusDecoder(pair.ours, RefocusContext([None]), None, True, {})
    decoder.run(input_ids, embeds, torch.ones_like(input_ids, dtype=torch.bool), PromptEnds(end, end))


def lare_calls(sizes: Sizes, setting: Setting, **fields) -> tuple[Pair, dict]:
    pair = lare(sizes.shape, setting, **fields)
    ids = lare_inputs(pair, sizes.words)["input_ids"]
    shape = (len(ids), ids.shape[1] + 1, pair.hidden_size)
    embeds = torch.randn(shape, device=setting.device, dtype=setting.dtype) * 0.02
    calls = {"stock": lambda: plain_steps(pair, embeds[:, :-1]), "LaRe": lambda: refocusing_steps(pair, ids, embeds)}
    return pair, calls


def vedas_calls(sizes: Sizes, setting: Setting, words: int, new_tokens: int, scopes=SCOPES) -> dict:
    """Answers over equally long contexts, by routing scope."""
    calls, settings = {}, {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
    for scope in scopes:
        fields = {"num_latent_steps": sizes.vedas_steps, "num_replay_tokens": sizes.replayed}
        pair = vedas(sizes.shape, setting, routing_scope=scope, **fields)
        inputs = qwen_inputs(pair, words)
        calls[scope] = lambda model=pair.ours, inputs=inputs: model.generate(**inputs, **settings)
        if "stock" not in calls:
            longer = qwen_inputs(pair, words + sizes.vedas_steps * (sizes.replayed + 1))
            calls["stock"] = lambda model=pair.stock, inputs=longer: model.generate(**inputs, **settings)
    return calls


def measure(sizes: Sizes, setting: Setting) -> list[Row]:
    pair, calls = lare_calls(sizes, setting)
    times = interleave({name: timed(call, setting.device) for name, call in calls.items()}, setting.repeats)
    case = f"LaRe, {pair.ours.config.num_refocus_steps} steps of {pair.ours.config.num_step_latents}"
    rows = [Row("steps", case, times.median("LaRe"), "ms", times.median("stock"), times.ratio("LaRe", "stock"))]
    calls = vedas_calls(sizes, setting, sizes.words, sizes.new_tokens)
    times = interleave({name: timed(call, setting.device) for name, call in calls.items()}, setting.repeats)
    for scope in SCOPES:
        case = f"Vedas {scope}, {sizes.vedas_steps} steps of {sizes.replayed}, {sizes.new_tokens} new tokens"
        rows.append(Row("steps", case, times.median(scope), "ms", times.median("stock"), times.ratio(scope, "stock")))
    return rows
