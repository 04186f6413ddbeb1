"""Run prompt, latent steps and answer of Vedas through the language model.

A step is `[B_t ; z_t]`: replayed image tokens, then the last hidden state of the position before. The row of attention
that picks B_t and z_t itself come from one forward, at its last position, before B_t is there. What is computed again at
each step, and what competes in the routed layers, is the routing scope (`VedasConfig.routing_scope`):

    incremental   every segment once, on the KV cache; its own tokens compete
    context       prompt and latents so far, anew at every step; the answer once, on the cache, not routed
    reference     the whole sequence at every forward, answer, generated tokens and pads competing; no cache

Shapes: B rows, S columns of `input_ids`, P prompt columns (the longest row), K replayed tokens, D hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache

from .decoding_common import DecodingContext, SegmentDecoder
from .latent_state import EmbeddedBatch
from .routing_vedas import RoutedMemory, Routing
from .saliency import SaliencyRecorder
from .trace import LatentStep
from .visual_replay_vedas import ImageTokens, Replay, densest_window, pick_tokens


@dataclass
class StepContext(DecodingContext):
    """`DecodingContext` for latent steps."""

    position_ids: Tensor | None = None  # (3, prompt rows, S), as if slots took none
    num_steps: int = 0  # steps taken behind a prompt that has no slots of its own


class StepDecoder(SegmentDecoder):
    """One run over prompt, latent steps and answer, or over one more token of an answer."""

    def __init__(self, model, context: StepContext, cache: Cache | None, use_cache: bool | None, kwargs: dict):
        super().__init__(model, context, cache, use_cache, kwargs)
        self.memory = RoutedMemory()
        self.replays: list[Replay] = []  # by step
        self.routed: Routing | None = None  # of the last forward

    def run(
        self,
        input_ids: Tensor,
        embeds: Tensor,
        mask: Tensor,  # (B, S) bool
        positions: Tensor,  # (3, B, S), as if slots took none
        prompt_lengths: list[int],
        num_slots: int,
    ) -> Tensor:
        """Decode prompt, slots and answer; return the hidden states of every column, (B, S, D).

        A slot has the hidden state of its latent. Where the prompt has no slots but the context asks for steps, its last
        column holds the last latent's, from which the first answer token is predicted.
        """
        rows, length = input_ids.shape
        self.num_steps = num_slots or self.context.num_steps
        self.prepare_cache(rows, embeds, self.num_steps > 0 or min(prompt_lengths) < length)
        is_image = (input_ids == self.config.image_token_id) & mask
        prompt = slice_rows(embeds, mask, positions, [slice(0, end) for end in prompt_lengths])
        answer = slice_rows(embeds, mask, positions, [slice(end + num_slots, length) for end in prompt_lengths])
        self.columns = [[end + (step if num_slots else 0) for step in range(self.num_steps)] for end in prompt_lengths]
        self.image_grids = [self.grids_of(row, is_image) for row in range(rows)]
        in_prompt = pad_sequence([row[:end] for row, end in zip(is_image, prompt_lengths)], batch_first=True)
        self.tokens = ImageTokens.find(in_prompt, prompt.embeds, prompt.positions)
        if self.config.routing_scope == "reference":
            self.check_reference(prompt_lengths)
        self.next_position = start = prompt.reach()
        hidden_prompt, latents, hidden_answer = self.reason(prompt, answer, start)
        self.context.check_latents()
        self.context.check_reached(rows)
        self.state.next_position = self.next_position
        self.state.images = [self.context.of_row(self.context.images, row, rows) for row in range(rows)]
        self.state.remember(input_ids, length)
        self.context.decode_step += 1
        joined = []
        for row, end in enumerate(prompt_lengths):
            rest = length - end - num_slots
            if num_slots or not self.num_steps:
                parts = [hidden_prompt[row, :end], latents[row]]
            else:
                parts = [hidden_prompt[row, : end - 1], latents[row, -1:]]
            joined.append(torch.cat([*parts, hidden_answer[row, :rest]]))
        return torch.stack(joined)

    def grids_of(self, row: int, is_image: Tensor) -> list[tuple[int, int]]:
        """The grids in which picked tokens count: those of a row's images, without its videos' frames."""
        images = self.context.of_row(self.context.images, row, len(is_image))
        if images is None:
            return []
        if not self.context.output_latents:
            return images.grids
        kept = is_image[row, torch.tensor(images.columns, device=is_image.device)].tolist()
        return [grid for grid, is_kept in zip(images.grids, kept) if is_kept]

    def check_reference(self, prompt_lengths: list[int]) -> None:
        """Raise for pictures of which the published code makes something that no rule determines.

        It looks at a row's last image alone. Once it has replayed all tokens of that it appends zero vectors, attended and in
        an order that differs between devices, and NaN where none is left; K is then one less than the tokens there are.

        Raises:
            ValueError: a row with several images, or with too few image tokens for its steps.
        """
        if not self.num_steps or not (self.model.training or self.config.replay_at_inference):
            return
        counts, most = self.tokens.exists.sum(dim=1).tolist(), self.config.num_replay_tokens
        if not any(counts):
            return
        for row, (count, end) in enumerate(zip(counts, prompt_lengths)):
            images = self.context.of_row(self.context.images, row, len(counts))
            num_images = 0 if images is None else len({column for column in images.columns if column < end})
            if num_images != 1:
                raise ValueError(
                    f"`routing_scope='reference'` takes one image a row, as the published code does, but row {row} has {num_images}."
                )
            replayed = most if count > most else count - 1
            if count < self.num_steps * replayed or (count <= most and len(set(counts)) > 1):
                raise ValueError(
                    f"`routing_scope='reference'` replays {replayed} image tokens at each of {self.num_steps} steps, but the image of "
                    f"row {row} has {count}: the published code would append zero vectors or NaN. Use a larger picture "
                    f"(at least {self.num_steps * most} merged patches) or fewer steps."
                )

    def reason(self, prompt: EmbeddedBatch, answer: EmbeddedBatch, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take the steps, then the answer: hidden states (B, P, D), (B, steps, D), (B, A, D)."""
        if self.config.routing_scope == "incremental":
            return self.reason_incrementally(prompt, answer, start)
        return self.reason_in_context(prompt, answer, start)

    def reason_incrementally(self, prompt: EmbeddedBatch, answer: EmbeddedBatch, start: Tensor):
        recorder = self.recorder(0, prompt.last())
        hidden_prompt = self.run_cached(prompt, recorder, self.config.routed_token_counts())
        hidden = hidden_prompt[torch.arange(len(hidden_prompt)), prompt.last()]
        latents = []
        for step in range(self.num_steps):
            segment = self.segment(step, hidden, recorder)
            recorder = self.recorder(step + 1, None)
            hidden = self.run_cached(segment, recorder, self.config.routed_token_counts(step=True))[:, -1]
            self.note_routing(step)
            latents.append(hidden)
        hidden_answer = (
            self.run_cached(self.shift_after_latents(answer, start), None, None) if answer.length else answer.embeds
        )
        return hidden_prompt, stack_latents(latents, hidden), hidden_answer

    def reason_in_context(self, prompt: EmbeddedBatch, answer: EmbeddedBatch, start: Tensor):
        """Every step runs the whole prompt and all latents again; the last run fills the cache."""
        is_reference = self.config.routing_scope == "reference"
        so_far, ends, last = prompt, [], prompt.last()
        for step in range(self.num_steps):
            recorder = self.recorder(step, last)
            hidden = self.run_uncached(so_far, recorder)
            self.note_routing(step - 1)
            hidden = hidden[torch.arange(len(hidden)), last]
            so_far = so_far.join(self.segment(step, hidden, recorder))
            last = torch.full_like(last, so_far.length - 1)
            ends.append(so_far.length - 1)
        answer = self.shift_after_latents(answer, start)
        if is_reference:
            self.state.sequence = so_far.join(answer)
            hidden = self.run_uncached(self.state.sequence, None)
            self.note_routing(self.num_steps - 1)
            hidden_answer = hidden[:, so_far.length :]
        else:
            hidden = self.run_cached(so_far, None, self.config.routed_token_counts())
            self.note_routing(self.num_steps - 1)
            hidden_answer = self.run_cached(answer, None, None) if answer.length else answer.embeds
        return hidden[:, : prompt.length], hidden[:, ends], hidden_answer

    def decode_next_token(self, input_ids: Tensor, embeds: Tensor) -> Tensor:
        """One more token of an answer."""
        rows, length = input_ids.shape
        self.prepare_cache(rows, embeds, False)
        positions = self.place(None, None, rows, length, embeds.device)
        attended = torch.ones(rows, length, dtype=torch.bool, device=embeds.device)
        self.state.remember(input_ids, length)
        self.context.decode_step += 1
        if self.config.routing_scope != "reference":
            return self.decode(embeds, positions, None, None)[0]
        self.state.sequence = self.state.sequence.join(EmbeddedBatch(embeds, attended, positions))
        return self.run_uncached(self.state.sequence, None)[:, -length:]

    def recorder(self, step: int, columns: Tensor | None) -> SaliencyRecorder | None:
        """Records where step `step` looks; None where no step follows or nothing is replayed."""
        replays = self.model.training or self.config.replay_at_inference
        if step >= self.num_steps or not replays or not self.tokens.exists.shape[1]:
            return None
        return SaliencyRecorder(columns)

    def routing(self, competing: Tensor, num_tokens: list[int] | None) -> dict[str, Routing]:
        config = self.config
        if num_tokens is None or not config.routed_layers:
            return {}
        incremental = config.routing_scope == "incremental"
        self.memory = self.memory.following()
        self.routed = Routing(
            competing=torch.ones_like(competing) if config.routing_scope == "reference" else competing,
            num_tokens=num_tokens,
            gate=config.routing_gate,
            memory=self.memory if incremental else None,
            rotary=self.text_model.rotary_emb if config.routing_positions == "renumbered" else None,
            aligned=config.routing_scope != "reference",
        )
        return {"routing": self.routed}

    def note_routing(self, step: int) -> None:
        """Keep which columns of the forward behind a step ran deeper."""
        if not self.context.output_latents or self.routed is None:
            return
        for one in self.context.steps:
            if one.index == step:
                picked = {layer: columns[one.row] for layer, columns in self.routed.picked.items()}
                one.routed_tokens = {layer: columns[columns >= 0] for layer, columns in picked.items()}

    def run_cached(
        self, sequence: EmbeddedBatch, recorder: SaliencyRecorder | None, num_tokens: list[int] | None
    ) -> Tensor:
        """Run what is new on the cache, routed if `num_tokens` are given: (B, T, D)."""
        is_whole = sequence.is_whole or bool(sequence.attended.all())  # the first spares the wait for the second
        attended = None if is_whole else sequence.attended
        saliency = {} if recorder is None else {"saliency": recorder}
        routing = self.routing(sequence.attended, num_tokens)
        return self.decode(sequence.embeds, sequence.positions, attended, None, **saliency, **routing)[0]

    def run_uncached(self, sequence: EmbeddedBatch, recorder: SaliencyRecorder | None) -> Tensor:
        """Run a whole sequence without the cache: (B, T, D)."""
        positions = sequence.positions
        if self.config.routing_scope == "reference":  # one-dimensional, pads counted
            positions = torch.arange(sequence.length, device=positions.device).expand_as(positions)
        saliency = {} if recorder is None else {"saliency": recorder}
        return self.text_model(
            inputs_embeds=sequence.embeds,
            attention_mask=sequence.attended.long(),
            position_ids=positions,
            use_cache=False,
            **saliency,
            **self.routing(sequence.attended, self.config.routed_token_counts()),
            **self.kwargs,
        ).last_hidden_state

    def segment(self, step: int, hidden: Tensor, recorder: SaliencyRecorder | None) -> EmbeddedBatch:
        """The segment of one step, `[B_t ; z_t]`, behind what there is."""
        rows = len(hidden)
        replay = None if recorder is None else self.pick(recorder)
        latent = hidden if self.config.backprop_through_latents else hidden.detach()
        latent = self.apply_intervention(step, latent, replay)[:, None]
        one = torch.ones(rows, 1, dtype=torch.bool, device=hidden.device)
        if replay is None:
            position = self.next_position.clone()
            self.next_position = self.next_position + 1
            return EmbeddedBatch(latent, one, position[:, None].expand(3, -1, -1), is_whole=True)
        attended = torch.cat([replay.attended, one], dim=1)
        embeds = torch.cat([replay.embeds.to(latent.dtype), latent], dim=1)
        if self.config.replay_positions == "grid":
            own = self.next_position[:, None].expand(3, -1, -1)
            positions, taken = torch.cat([replay.positions, own], dim=2), 1
        else:
            order = (attended.long().cumsum(1) - 1).clamp(min=0)
            positions, taken = (self.next_position[:, None] + order).expand(3, -1, -1), attended.sum(1)
        self.next_position = self.next_position + taken
        return EmbeddedBatch(embeds, attended, positions, replay.is_full)

    def pick(self, recorder: SaliencyRecorder) -> Replay:
        config, count = self.config, self.config.num_replay_tokens
        if config.routing_scope == "reference" and self.tokens.exists.shape[1] <= count:
            count = self.tokens.exists.shape[1] - 1  # as the published code does
        self.replays.append(
            pick_tokens(recorder.mean(), self.tokens, count, config.replay_scale, config.replay_pattern)
        )
        return self.replays[-1]

    def apply_intervention(self, step: int, latent: Tensor, replay: Replay | None) -> Tensor:
        """Apply the intervention and keep the record: (B, D)."""
        rows, context = len(latent), self.context
        windows = self.windows(replay) if context.output_latents else [None] * rows
        is_seen = replay is not None and (context.output_latents or context.intervention is not None)
        steps = [
            LatentStep(
                row=row,
                index=step,
                column=self.columns[row][step],
                grid=(1, 1),
                latents=latent[row : row + 1],
                image_grids=self.image_grids[row],
                picked_tokens=replay.tokens[row][replay.tokens[row] >= 0] if is_seen else None,
                windows=windows[row],
                decode_step=context.decode_step,
            )
            for row in range(rows)
        ]
        changed = context.intervene(steps, rows)
        for one, values in zip(steps, changed):
            one.latents = values.detach() if context.output_latents else None
            context.steps.append(one)
        return torch.cat(changed)

    def windows(self, replay: Replay | None) -> list[list | None]:
        """By row the window that holds most of what a step picked, as the trace has it."""
        if replay is None:
            return [None] * len(self.image_grids)
        picked = [[token for token in row if token >= 0] for row in replay.tokens.tolist()]
        found = [densest_window(row, grids, self.config.replay_window) for row, grids in zip(picked, self.image_grids)]
        return [None if window is None else [window] for window in found]

    def shift_after_latents(self, answer: EmbeddedBatch, start: Tensor) -> EmbeddedBatch:
        """Move an answer behind the latent steps, and the next position behind the answer."""
        moved = EmbeddedBatch(answer.embeds, answer.attended, answer.positions + (self.next_position - start)[:, None])
        if answer.length:
            self.next_position = torch.maximum(self.next_position, moved.reach())
        return moved


def stack_latents(latents: list[Tensor], like: Tensor) -> Tensor:  # (B, steps, D)
    return torch.stack(latents, dim=1) if latents else like[:, None][:, :0]


def slice_rows(embeds: Tensor, mask: Tensor, positions: Tensor, parts: list[slice]) -> EmbeddedBatch:
    """Take one slice of every row and pad them to the longest."""
    if all(part == parts[0] for part in parts):  # as in `generate`: a view, since a copy would be the peak of memory
        return EmbeddedBatch(embeds[:, parts[0]], mask[:, parts[0]], positions[:, :, parts[0]])
    return EmbeddedBatch(
        pad_sequence([row[part] for row, part in zip(embeds, parts)], batch_first=True),
        pad_sequence([row[part] for row, part in zip(mask, parts)], batch_first=True),
        pad_sequence([row[part] for row, part in zip(positions.permute(1, 2, 0), parts)], batch_first=True).permute(
            2, 0, 1
        ),
    )
