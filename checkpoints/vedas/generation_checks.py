"""What a decoding loop may do with latent blocks, and why it stopped: checks, limits and reasons without state."""

import torch
from torch import Tensor
from transformers.generation import LogitsProcessor, StoppingCriteria, StopStringCriteria
from transformers.generation.configuration_utils import GenerationMode


SUPPORTED_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)


class LastTokens(StoppingCriteria):
    """Stops nothing; brings the tokens that a step wrote to the host, in the shadow of a read that waits anyway.

    To ask the device whether any of them opens a block would be a second wait for every token of text. The loop reads
    whether all rows are finished right after this was called; by then the copy that was started here has come, too.
    """

    def __init__(self):
        self.tokens, self.copied = None, None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        last = input_ids[:, -1]
        if last.device.type == "cuda":
            self.tokens = torch.empty(last.shape, dtype=last.dtype, pin_memory=True)
            self.tokens.copy_(last, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record(torch.cuda.current_stream(last.device))
        else:
            self.tokens = last.cpu()
        return torch.zeros_like(last, dtype=torch.bool)

    def take(self) -> list[int] | None:
        """The tokens, once; None where no step has left any."""
        tokens, self.tokens = self.tokens, None
        if tokens is None:
            return None
        if self.copied is not None:
            self.copied.synchronize()
        return tokens.tolist()


class NeverWritten(LogitsProcessor):
    """Keeps placeholders from being written.

    A class of our own: of two processors of one class transformers drops its own, which is the user's `suppress_tokens`.
    """

    def __init__(self, tokens: list[int]):
        self.tokens = torch.tensor(tokens, dtype=torch.long)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.tokens = self.tokens.to(scores.device)  # copied once
        return scores.index_fill(1, self.tokens, -float("inf"))


class LatentBlockLimits(LogitsProcessor):
    """Opens the first blocks, forbids more than the most, and keeps a block's inner tokens from being written.

    Reads the count off the generated tokens, so it is right for every beam and needs no state.
    """

    def __init__(self, prompt_length: int, tokens, can_open: Tensor, min_blocks: int, max_blocks: int):
        self.prompt_length, self.start = prompt_length, tokens.start
        # Without blocks `<latent>` is one more token that is never written, and nothing has to be counted.
        never = [tokens.pad, tokens.end, tokens.start]
        self.inner = torch.tensor(never if max_blocks == 0 else never[:2])
        self.can_open, self.min_blocks, self.max_blocks = can_open, min_blocks, max_blocks

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(self.can_open) != len(scores) or self.can_open.device != scores.device:  # once per call of `generate`
            self.can_open = self.can_open.to(scores.device).repeat_interleave(len(scores) // len(self.can_open))
            self.inner = self.inner.to(scores.device)
        scores = scores.index_fill(1, self.inner, -float("inf"))
        if self.max_blocks == 0:
            return scores
        opened = (input_ids[:, self.prompt_length :] == self.start).sum(dim=1)
        full = ~self.can_open | (opened >= self.max_blocks)
        scores[:, self.start] = scores[:, self.start].masked_fill(full, -float("inf"))
        if self.min_blocks:
            forced = self.can_open & (opened < self.min_blocks)
            only_start = torch.full_like(scores, -float("inf"))
            only_start[:, self.start] = 0
            scores = torch.where(forced[:, None], only_start, scores)
        return scores


def expansion(settings) -> int:
    """Rows that `generate` makes of one prompt."""
    return max(settings.num_beams or 1, settings.num_return_sequences or 1)


def check_settings(settings, kwargs: dict, output_latents: bool, device: torch.device) -> None:
    """Raise for what cannot work with latent blocks."""
    mode = settings.get_generation_mode(kwargs.get("assistant_model"))
    if mode not in SUPPORTED_MODES:
        raise ValueError(
            f"`{mode.value}` cannot open latent blocks: it rewinds or rescores tokens one by one. Supported: "
            f"{[supported.value for supported in SUPPORTED_MODES]}."
        )
    if settings.use_cache is False:
        raise ValueError("`use_cache=False` cannot work: latent blocks live in the key-value cache.")
    if settings.prefill_chunk_size is not None:
        raise ValueError(f"`prefill_chunk_size` cannot work with latent blocks, got {settings.prefill_chunk_size}.")
    if settings.output_attentions:
        raise ValueError("`output_attentions` has no one shape with latent blocks: use `output_latents=True`.")
    if settings.cache_implementation == "paged":
        raise ValueError("`cache_implementation='paged'` (continuous batching) cannot open latent blocks.")
    if "offloaded" in (settings.cache_implementation or "") and device.type == "cpu":
        raise ValueError(
            f"`cache_implementation={settings.cache_implementation!r}` moves a cache to the CPU, where it is already."
        )
    if settings.guidance_scale not in (None, 1):
        raise ValueError(f"`guidance_scale={settings.guidance_scale}` cannot work: its second branch has no latents.")
    if output_latents and not settings.return_dict_in_generate:
        raise ValueError("`output_latents=True` needs `return_dict_in_generate=True`.")


def infer_attention_mask(input_ids: Tensor, settings) -> Tensor | None:
    """As transformers does: padding is masked where the pad token is no end token."""
    pad, eos = settings.pad_token_id, settings.eos_token_id
    eos = eos if isinstance(eos, list | tuple) else [eos]
    if pad is None or pad in eos or not (input_ids == pad).any():
        return None
    return (input_ids != pad).long()


def stop_reasons(generated: Tensor, settings, tokenizer, prompt_length: int) -> list[str]:
    """Why each row ended, read off its generated tokens (rows, T)."""
    eos = settings.eos_token_id if isinstance(settings.eos_token_id, list | tuple) else [settings.eos_token_id]
    eos = {token for token in eos if token is not None}
    pad = settings.pad_token_id if settings.pad_token_id is not None else next(iter(eos), None)
    budget = settings.max_new_tokens
    if budget is None and settings.max_length is not None:
        budget = settings.max_length - prompt_length
    stop_strings = settings.stop_strings and StopStringCriteria(tokenizer, settings.stop_strings)
    reasons = []
    for row in generated:
        ids = row.tolist()
        while ids and ids[-1] == pad and pad not in eos:
            ids.pop()
        end = next((index for index, token in enumerate(ids) if token in eos), None)
        kept = row[: len(ids) if end is None else end]
        if stop_strings and len(kept) and bool(stop_strings(kept[None], None)[0]):
            reasons.append("stop_string")
        elif end is not None:
            reasons.append("eos")
        else:
            reasons.append("max_length" if budget is None or len(ids) >= budget else "stopping_criteria")
    return reasons
