"""Run prompt, refocusing steps and answer of LaRe through the language model, each once, on the KV cache.

    [X ; <bot>]          H_1: the last position at every decoder layer; a_1: where that position looks
    [Z_i]                H_i+1, a_i+1; in a row whose last step this is, [Z_i ; <eot>]
    answer

With `answer_sees_image=False` the answer starts on an empty cache, `[X without its images ; <bot> ; Z_1 .. Z_N ; <eot>]`: what it
knows of the images came through the latents and no other way.

Rows take their own number of steps. A segment is as wide as its widest row and aligned to the right, so that the position
to read is always the last; what a row does not fill is masked and consumes no position.

Shapes: B rows, S columns of `input_ids`, L decoder layers, K latents of a step, M image tokens of a row, D hidden size.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .decoding_common import DecodingContext, SegmentDecoder
from .saliency import LastStateRecorder, SaliencyRecorder
from .sliding_window_lare import Focus, VisualTokens, focus_on_all, focus_on_windows
from .trace import LatentStep


@dataclass
class RefocusContext(DecodingContext):
    """`DecodingContext` for refocusing steps."""

    latents: list[Tensor] = field(default_factory=list)  # per step (B, K, D), with gradients
    is_taken: list[Tensor] = field(default_factory=list)  # per step (B,) bool
    windows: list[Tensor] = field(default_factory=list)  # per step (B, W, 3) image, top, left


@dataclass
class LastPositionStates:
    """What the language model has at the last position of each row."""

    hidden: Tensor  # (B, T, D) last hidden states of the segment
    states: Tensor | None = None  # (B, L, D)
    saliency: Tensor | None = None  # (B, slots) attention to everything so far, summed over layers and heads


@dataclass
class PromptEnds:
    """Where every row's prompt ends: the columns before `ends`, and the answer from `starts` on."""

    ends: Tensor  # (B,)
    starts: Tensor  # (B,) two columns later in rows with a `<bot>` and an `<eot>` of their own


def slice_rows(values: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Take columns `starts` to `ends` of every row: (B, S, ...) to (B, T, ...), what is beyond a row's end arbitrary."""
    first, last = torch.stack([starts, ends]).tolist()  # once: every look waits for the device
    if len(set(first)) == 1:
        return values[:, first[0] : max(last)]
    width = max(0, *(end - start for start, end in zip(first, last)))
    columns = starts[:, None] + torch.arange(width, device=starts.device)
    return values[torch.arange(len(values), device=starts.device)[:, None], columns.clamp(max=values.shape[1] - 1)]


def measure_change(latents: Tensor, earlier: Tensor, measure: str) -> Tensor:
    """(B,) how much the mean latent changed between two steps, (B, K, D) each, without a unit."""
    now, before = latents.float().mean(dim=1), earlier.float().mean(dim=1)
    if measure == "cosine":
        return 1 - torch.cosine_similarity(now, before, dim=-1)
    order = 1 if measure == "l1" else 2
    return (now - before).norm(p=order, dim=-1) / before.norm(p=order, dim=-1).clamp(min=1e-12)


class RefocusDecoder(SegmentDecoder):
    """One run over prompt, refocusing steps and answer, or over one more token of an answer."""

    def __init__(self, model, context: RefocusContext, cache: Cache | None, use_cache: bool | None, kwargs: dict):
        super().__init__(model, context, cache, use_cache, kwargs)

    def embed_prompt(self, input_ids: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        embeds = super().embed_prompt(input_ids, inputs_embeds)
        if self.model.training and not any(self.context.images):
            embeds = embeds + run_dummy_vision(self.model, embeds)
        return embeds

    def run(self, input_ids: Tensor, embeds: Tensor, mask: Tensor, places: PromptEnds) -> Tensor:
        """Decode everything; return the hidden states of every column, (B, S, D).

        The last column of a prompt, or the row's own `<eot>`, has the hidden state that follows the latents.

        Args:
            embeds: (B, S + 1, D) of `input_ids` and of a `<bot>`, which is where a prompt wants it, so that nothing as large
                as the prompt is held twice; (B, S, D) where no steps are taken.
            mask: (B, S) bool, without `<bot>` and `<eot>`.
        """
        rows, length = input_ids.shape
        self.prepare_cache(rows, embeds, self.config.step_limit > 0)
        self.state.images = [self.context.of_row(self.context.images, row, rows) for row in range(rows)]
        if self.config.step_limit == 0:
            hidden = self.answer_at_once(embeds, mask, places)
        else:
            hidden = self.refocus_and_answer(input_ids == self.config.image_token_id, embeds, mask, places)
        self.context.check_latents()
        self.context.check_reached(rows)
        self.state.remember(input_ids, length)
        self.context.decode_step += 1
        return hidden

    def answer_at_once(self, embeds: Tensor, mask: Tensor, places: PromptEnds) -> Tensor:
        """Without steps nothing stands in the place of a row's `<bot><eot>`: both have what the column before has."""
        hidden = self.run_cached(embeds, mask)
        if bool((places.starts == places.ends).all()):
            return hidden
        columns = torch.arange(mask.shape[1], device=mask.device)
        is_own = (columns >= places.ends[:, None]) & (columns < places.starts[:, None])
        sources = torch.where(is_own, (places.ends[:, None] - 1).clamp(min=0), columns)
        return hidden[torch.arange(len(hidden), device=mask.device)[:, None], sources]

    def decode_next_token(self, input_ids: Tensor, embeds: Tensor) -> Tensor:
        """One more token of an answer."""
        self.prepare_cache(len(embeds), embeds, False)
        self.state.remember(input_ids, input_ids.shape[1])
        self.context.decode_step += 1
        return self.run_cached(embeds, None)

    def run_cached(self, embeds: Tensor, attended: Tensor | None, **kwargs) -> Tensor:
        """Run what is new on the cache, behind what is there: (B, T, D)."""
        attended = None if attended is None or bool(attended.all()) else attended
        positions = self.place(None, attended, *embeds.shape[:2], embeds.device)
        return self.decode(embeds, positions[0], attended, None, **kwargs)[0].to(embeds.device)

    def observe(self, embeds: Tensor, attended: Tensor | None, is_followed: bool) -> LastPositionStates:
        """Run a segment of the latent phase, and record what the step behind it needs."""
        if not is_followed:
            return LastPositionStates(self.run_cached(embeds, attended))
        states = LastStateRecorder()
        saliency = SaliencyRecorder(has_gradients=False) if self.watches else None
        hidden = self.run_cached(embeds, attended, last_states=states, saliency=saliency)
        stacked = states.stack() if self.config.backprop_through_latents else states.stack().detach()
        return LastPositionStates(hidden, stacked, None if saliency is None else saliency.sum())

    @property
    def watches(self) -> bool:
        """Whether steps need the saliency map: to place a window, or to show it."""
        return self.tokens.exists.shape[1] > 0 and (self.config.use_window or self.context.output_latents)

    def refocus_and_answer(self, is_image: Tensor, embeds: Tensor, mask: Tensor, places: PromptEnds) -> Tensor:
        rows, length = mask.shape
        columns = torch.arange(length, device=mask.device)
        in_prompt = columns < places.ends[:, None]
        zeros = torch.zeros_like(places.ends)
        self.columns = places.ends.tolist()
        with_bot, embeds, bot, eot = embeds, embeds[:, :-1], embeds[:, -1:], self.embed_eot(embeds)
        prompt, width = slice_rows(embeds, zeros, places.ends), max(self.columns)
        self.tokens = VisualTokens.find((is_image & mask & in_prompt)[:, :width], prompt, self.config.image_grid_size)
        self.num_images = (self.tokens.exists.sum(dim=1) // self.config.image_grid_size**2).tolist()
        attended = torch.cat([(mask & in_prompt)[:, :width], torch.ones_like(mask[:, :1])], dim=1)
        opened = with_bot if min(self.columns) == length else torch.cat([prompt, bot], dim=1)
        thought = self.observe(opened, attended, True)
        end = self.refocus(thought, eot)
        if not self.config.answer_sees_image:
            end = self.read_latents(prompt, bot, eot, (mask & in_prompt & ~is_image)[:, :width])

        stops = torch.full_like(places.starts, length)
        answer = slice_rows(embeds, places.starts, stops)
        hidden = torch.cat([thought.hidden, end[:, None]], dim=1)  # (B, width + 2, D): prompt, <bot>, <eot>
        if answer.shape[1]:
            in_answer = columns[: answer.shape[1]] < (stops - places.starts)[:, None]
            hidden = torch.cat(
                [hidden, self.run_cached(answer, slice_rows(mask, places.starts, stops) & in_answer)], dim=1
            )
        return hidden[torch.arange(rows, device=mask.device)[:, None], self.sources(columns, places, width)]

    def read_latents(self, prompt: Tensor, bot: Tensor, eot: Tensor, is_text: Tensor) -> Tensor:
        """Start the answer on the prompt's text and the latents alone: (B, D), the hidden state of `<eot>`.

        The keys of latents in the cache of the steps have seen the images, so masking the images out would not be enough.
        """
        rows = torch.arange(len(prompt), device=prompt.device)[:, None]
        width = int(is_text.sum(dim=1).max())
        columns = is_text.int().argsort(dim=1, stable=True)[
            :, is_text.shape[1] - width :
        ]  # a row's text, to the right
        latents = torch.cat(self.context.latents, dim=1)
        taken = torch.stack(self.context.is_taken, dim=1).repeat_interleave(self.context.latents[0].shape[1], dim=1)
        one = torch.ones_like(taken[:, :1])
        self.start_afresh()
        embeds = torch.cat([prompt[rows, columns], bot, latents, eot], dim=1)
        return self.run_cached(embeds, torch.cat([is_text[rows, columns], one, taken, one], dim=1))[:, -1]

    def sources(self, columns: Tensor, places: PromptEnds, width: int) -> Tensor:
        """(B, S) which of the hidden states [prompt ; <bot> ; <eot> ; answer] each column of `input_ids` has."""
        ends, starts = places.ends[:, None], places.starts[:, None]
        has_own = starts > ends
        source = torch.where(columns < ends, columns, width + columns - ends)  # its own <bot> and <eot>
        source = torch.where(~has_own & (columns == ends - 1), width + 1, source)
        return torch.where(columns >= starts, width + 2 + columns - starts, source)

    def embed_eot(self, embeds: Tensor) -> Tensor:  # (B, 1, D)
        ids = torch.tensor([[self.config.eot_token_id]], device=embeds.device)
        return self.model.get_input_embeddings()(ids).to(embeds.dtype).expand(len(embeds), -1, -1)

    def refocus(self, thought: LastPositionStates, eot: Tensor) -> Tensor:
        """Take the steps of every row: (B, D), the hidden state of its `<eot>`."""
        limit, measure = self.config.step_limit, self.config.adaptive_stop
        active = torch.ones(len(eot), dtype=torch.bool, device=eot.device)
        end, earlier = eot[:, 0], None
        for step in range(limit):
            latents = self.make_latents(step, thought, active)
            ending = active if step == limit - 1 else torch.zeros_like(active)
            if measure is not None and earlier is not None:
                is_still = measure_change(latents, earlier, measure) < self.config.stop_threshold
                ending = ending | (active & is_still)
            going = active & ~ending
            # In training all take as many forwards: processes that share a model must not wait for each other.
            may_stop = measure is not None and not self.model.training
            is_last = step == limit - 1 or (may_stop and not bool(going.any()))
            if is_last and not self.config.answer_sees_image:
                break  # nothing reads this cache any more
            thought = self.observe(*self.segment(latents, eot, active, ending, is_last), is_followed=not is_last)
            end = torch.where(ending[:, None], thought.hidden[:, -1], end)
            active, earlier = going, latents
            if is_last:
                break
        return end

    def segment(self, latents: Tensor, eot: Tensor, active: Tensor, ending: Tensor, is_last: bool):
        """The new columns and which of them a row attends: [Z ; <eot>] where it ends, else [pad ; Z], or nothing."""
        if self.config.adaptive_stop is None:
            return torch.cat([latents, eot], dim=1) if is_last else latents, None
        if not bool(ending.any()):
            return latents, active[:, None].expand(-1, latents.shape[1])
        ends = ending[:, None, None]
        embeds = torch.where(
            ends, torch.cat([latents, eot], dim=1), torch.cat([torch.zeros_like(eot), latents], dim=1)
        )
        behind_pad = torch.arange(embeds.shape[1], device=eot.device) > 0
        return embeds, (ending[:, None] | behind_pad) & active[:, None]

    def make_latents(self, step: int, thought: LastPositionStates, active: Tensor) -> Tensor:
        """Build Z of one step (LaRe, eq. 1-5), as the caller wants it changed: (B, K, D)."""
        config, tokens = self.config, self.tokens
        latents, focus, weights, maps = thought.states, None, None, None
        if tokens.exists.shape[1]:
            maps = None if thought.saliency is None else tokens.maps(thought.saliency)
            focus = focus_on_all(tokens)
            if config.use_window:
                focus = focus_on_windows(maps, config.window_size, config.num_windows)
        if config.use_extractor:
            visual, attended = self.gather_visual(focus, thought.states)
            latents, weights = self.model.refocus(thought.states, visual, attended, self.context.output_latents)
        latents = latents.to(tokens.prompt.device, tokens.prompt.dtype)
        latents = self.record(step, latents, active, focus, weights, maps)
        taken = latents.masked_fill(~active[:, None, None], 0)
        self.context.latents.append(taken)
        if self.context.finite is not None:
            self.context.finite.append((list(range(len(taken))), taken.isfinite().flatten(1).all(dim=1)))
        self.context.is_taken.append(active)
        if focus is not None and focus.windows is not None:
            self.context.windows.append(focus.windows)
        return latents

    def gather_visual(self, focus: Focus | None, states: Tensor) -> tuple[Tensor, Tensor]:
        """The image tokens in focus, (B, T, D), and which exist; one that does not where there is no image."""
        if focus is None:
            empty = torch.zeros_like(states[:, :1])
            return empty, torch.zeros(empty.shape[:2], dtype=torch.bool, device=empty.device)
        return self.tokens.take(focus.tokens), focus.exists

    def record(self, step: int, latents: Tensor, active: Tensor, focus, weights, maps) -> Tensor:
        """Apply the intervention and keep the record of every row that takes the step: (B, K, D)."""
        context, rows = self.context, len(latents)
        if context.intervention is None and not context.output_latents:
            return latents
        taking = active.nonzero().flatten().tolist()
        windows = None if focus is None or focus.windows is None else focus.windows.tolist()
        steps = []
        for row in taking:
            one = self.describe(step, row, rows, latents[row], windows)
            if context.output_latents and one.image_grids:
                self.add_maps(one, focus, weights, maps)
            steps.append(one)
        if context.intervention is not None:
            changed = list(latents)
            for row, values in zip(taking, context.intervene(steps, rows)):
                changed[row] = values
            latents = torch.stack(changed)
        for one, row in zip(steps, taking):
            one.latents = latents[row].detach() if context.output_latents else None
        context.steps += steps
        return latents

    def describe(self, step: int, row: int, rows: int, latents: Tensor, windows: list | None) -> LatentStep:
        images, size = self.context.of_row(self.context.images, row, rows), self.config.window_size
        seen = self.num_images[row]  # an image behind the latents is none that they saw
        return LatentStep(
            row=row,
            index=step,
            column=self.columns[row],
            grid=(1, len(latents)),
            latents=latents,
            image_grids=images.grids[:seen] if seen else [],
            windows=[(*window, size, size) for window in windows[row]] if windows and seen else None,
            decode_step=self.context.decode_step,
        )

    def add_maps(self, one: LatentStep, focus: Focus, weights: Tensor | None, maps: Tensor | None) -> None:
        """Where the language model and the Extractor looked, over all image tokens of the row."""
        count = sum(height * width for height, width in one.image_grids)
        if maps is not None:
            one.saliency = maps[one.row].flatten()[:count]
        if weights is None:
            return
        weights, kept = weights[one.row].detach().to(focus.tokens.device), focus.exists[one.row]
        attention = weights.new_zeros(len(weights), count)
        attention[:, focus.tokens[one.row][kept]] = weights[:, kept]
        is_pooled = len(one.latents) != len(attention)
        one.image_attention = attention.mean(dim=0, keepdim=True) if is_pooled else attention


def run_dummy_vision(model, embeds: Tensor) -> Tensor:
    """Zero, by way of vision tower and projector: a process without an image must not leave the others waiting."""
    config = model.config.vision_config
    height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    dtype = model.model.multi_modal_projector.linear_1.weight.dtype
    empty = embeds.new_zeros(1, config.num_channels, height, width).to(dtype)
    features = model.model.get_image_features(empty, return_dict=True).pooler_output
    return 0 * features[0].sum().to(embeds)
