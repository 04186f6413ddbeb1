"""Run a batch with latent blocks through the language model, one forward per segment.

Segment k of a row is the latents of its block k - 1 (with `</latent>`, where `input_ids` leaves it to the model), then
text up to and including the `<latent>` of block k, then the controls. `block_segments.py` says why. What the latents of a block
are is said by `model.block_latents`.

Shapes: B rows, S new tokens, T tokens of a segment (padded to the longest row), N latents, D hidden size.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache

from .block_segments import Block, RowText, Segment, SegmentRow
from .block_sites import BlockSite
from .decoding_common import DecodingContext, SegmentDecoder
from .generation_checks import LastTokens
from .row_images import RowImages
from .trace import LatentStep, LatentTrace


@dataclass
class BlockContext(DecodingContext):
    """`DecodingContext` for blocks."""

    grid: tuple[int, int] | None = None  # forced on every block that `generate` opens
    max_blocks: int = 0  # most blocks of an answer, for the size of a static cache
    prompt_sites: list | None = None  # the blocks that stand in the prompt already, by row
    last_tokens: LastTokens | None = None  # what every row wrote last, where that is known on the host
    earlier_grids: list = field(default_factory=list)  # by prompt row, of the blocks in a continued cache
    is_unused: bool = False  # whether blocks could have been opened and none was
    state_layers: tuple[int, ...] = ()  # numbers into `hidden_states`, of which latents' states are returned

    def written_sites(self, input_ids: Tensor, start: int) -> list | None:
        """The blocks that the tokens written last open, without asking the device; None where it has to be asked."""
        written = None if self.last_tokens is None else self.last_tokens.take()
        if written is None or input_ids.shape != (len(written), 1):
            return None
        return [[BlockSite(row, 0, 0, None)] if token == start else [] for row, token in enumerate(written)]


@dataclass
class DecodedBlocks:
    """The hidden states of every column of `input_ids`; a `<latent>` alone has those of its `</latent>`."""

    last_hidden_state: Tensor  # (B, S, D)
    hidden_states: tuple[Tensor, ...] | None
    cache: Cache | None
    blocks: list[Block]  # by row, then in order
    trace: LatentTrace | None = None
    latent_states: Tensor | None = None  # (layers, latents of all blocks, D)


class BlockDecoder(SegmentDecoder):
    """One run over new tokens, with the blocks that open in them."""

    always_in_segments = False  # whether segments are run where no block opens, too

    def __init__(self, model, context: BlockContext, cache: Cache | None, use_cache: bool | None, kwargs: dict):
        super().__init__(model, context, cache, use_cache, kwargs)
        self.latents = model.block_latents
        self.blocks: dict[tuple[int, int], Block] = {}  # by row and number in it
        self.latent_states: dict[tuple[int, int], Tensor] = {}
        self.wanted = {"output_hidden_states": True} if context.state_layers else {}

    def run(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        sites: list[list[BlockSite]],
    ) -> DecodedBlocks:
        embeds = inputs_embeds if input_ids is None else self.embed_prompt(input_ids, inputs_embeds)
        rows, length = embeds.shape[:2]
        mask = None if attention_mask is None else attention_mask[:, -length:].bool().to(embeds.device)
        has_blocks = any(sites) or self.always_in_segments
        self.prepare_cache(rows, embeds, has_blocks)
        if self.context.decode_step < 0:
            self.state.images = [self.context.of_row(self.context.images, row, rows) for row in range(rows)]
        positions = self.place(position_ids, mask, rows, length, embeds.device)
        if has_blocks:
            segments = self.run_segments(embeds, positions, mask, sites)
            self.context.check_latents()
            count = len(segments[0].layers)
            layers = [torch.stack([join_row(segments, row, layer) for row in range(rows)]) for layer in range(count)]
        else:
            layers = self.decode(embeds, positions, mask, None)
        self.state.remember(input_ids, length)
        self.context.decode_step += 1
        places = [(row, number) for row, found in enumerate(sites) for number in range(len(found))]
        return DecodedBlocks(
            layers[0],
            tuple(layers[1:]) or None,
            self.returned_cache,
            [self.blocks[place] for place in places],
            LatentTrace(rows, self.context.sorted_steps()) if self.context.output_latents else None,
            torch.cat([self.latent_states[place] for place in places], dim=1) if self.latent_states else None,
        )

    def run_segments(self, embeds: Tensor, positions: Tensor, mask: Tensor | None, sites) -> list[Segment]:
        attended = torch.ones_like(positions[0], dtype=torch.bool) if mask is None else mask
        texts = [
            RowText(*(split_text(values, found) for values in (embeds[row], positions[:, row].T, attended[row])))
            for row, found in enumerate(sites)
        ]
        blocks: dict[int, Block] = {}
        segments: list[Segment] = []
        for number in range(max(map(len, sites)) + 1):
            # Read: what each row has before its next block, padded to the longest row.
            parts = [self.make_row(text, sites[row], number, blocks.get(row), row) for row, text in enumerate(texts)]
            is_even = len({len(part.embeds) for part in parts}) == 1 and mask is None
            layers = self.decode(
                pad_sequence([part.embeds for part in parts], batch_first=True),
                pad_sequence([part.positions for part in parts], batch_first=True).permute(2, 0, 1),
                None if is_even else pad_sequence([part.attended for part in parts], batch_first=True),
                pad_sequence([part.is_token for part in parts], batch_first=True),
                **self.wanted,
            )
            if self.context.state_layers:
                layers = self.keep_latent_states(parts, layers, number - 1)
            segments.append(Segment(parts, layers))
            # Build: the blocks that open where it ended, which the next segment begins with.
            opened = {row: found[number] for row, found in enumerate(sites) if number < len(found)}
            if opened:
                blocks = self.latents.build(self, opened, segments[-1], number)
                self.blocks |= {(row, number): block for row, block in blocks.items()}
        return segments

    def keep_latent_states(self, parts: list[SegmentRow], layers: list[Tensor], number: int) -> list[Tensor]:
        """Copy the states of block `number`'s latents; the other states of all layers are kept only where asked for."""
        for row, part in enumerate(parts):
            if part.block is not None:
                self.latent_states[row, number] = torch.stack(
                    [
                        torch.cat(
                            [states[1 + layer] for states in part.block.decoded]
                            + [layers[1 + layer][row, : part.num_latents]]
                        )
                        for layer in self.context.state_layers
                    ]
                )
        is_asked = self.kwargs.get("output_hidden_states", self.text_model.config.output_hidden_states)
        return layers if is_asked else layers[:1]

    def make_row(
        self, text: RowText, sites: list[BlockSite], number: int, block: Block | None, row: int
    ) -> SegmentRow:
        """One row's part of a segment; empty once the row has no more segments."""
        opening = sites[number] if number < len(sites) else None
        device = text.embeds[0].device
        part = SegmentRow(block=block, opening=opening, text=text, row=row)
        # What it consists of: embeddings, positions, which of them are attended (None: all), whether they are columns of
        # `input_ids`. The first part is empty, so that a row without any has tensors too.
        pieces = [(text.embeds[0][:0].detach(), text.positions[0][:0], text.attended[0][:0], True)]
        if block is not None:
            pieces.append((block.latents, block.positions, None, block.site.num_pads > 0))
            part.num_latents = len(block.latents)
            if not block.site.num_pads:
                end = torch.full((1, 1), self.model.block_tokens.end, device=device)
                end = self.text_model.get_input_embeddings()(end)[0].to(device)
                pieces.append((end, block.end_position[None], None, False))
                part.num_ends = 1
        if number <= len(sites):
            positions = text.positions[number] + text.shift
            pieces.append((text.embeds[number], positions, text.attended[number], True))
            part.num_text = len(text.embeds[number])
            if opening is not None:
                part.open_position = positions[-1]
                if self.latents.num_controls:
                    controls = self.latents.embed_controls(device).to(text.embeds[0])
                    places = positions[-1] + 1 + torch.arange(len(controls), device=device)[:, None]
                    pieces.append((controls, places, None, opening.num_pads > 0))
        embeds, positions, attended, is_token = zip(*pieces)
        part.embeds, part.positions = torch.cat(embeds), torch.cat(positions)
        ones = [torch.ones(len(values), dtype=torch.bool, device=device) for values in embeds]
        part.attended = torch.cat([one if seen is None else seen for one, seen in zip(ones, attended)])
        part.is_token = torch.cat([one & flag for one, flag in zip(ones, is_token)])
        return part

    def bind_block(self, part: SegmentRow, latents: Tensor, positions: Tensor, span: int) -> Block:
        """Bind latents to their row, whose later tokens move behind them by `span` positions and the controls."""
        site, controls = part.opening, self.latents.num_controls
        taken = controls + span + (0 if site.num_pads else 1)
        part.text.shift += taken
        self.state.next_position[part.row] += taken
        return Block(site, latents, positions, part.open_position + 1 + controls + span)

    def images_of(self, row: int, site: BlockSite) -> RowImages | None:
        """The images that a block may look at: those before it."""
        images = self.state.images[row]
        return None if images is None else images.before(self.state.num_tokens + site.column)

    def describe(self, row: int, site: BlockSite, grid, latents: Tensor, images: RowImages | None) -> LatentStep:
        return LatentStep(
            row=row,
            index=sum(step.row == row for step in self.context.steps),
            column=self.state.num_tokens + site.column,
            grid=tuple(grid),
            latents=latents,
            image_grids=[] if images is None else images.grids,
            decode_step=self.context.decode_step,
        )

    def record(self, step: LatentStep, latents: Tensor) -> None:
        """Keep what happened; the tensors only where they were asked for."""
        kept = latents.detach() if self.context.output_latents else None
        self.context.steps.append(replace(step, latents=kept))
        self.state.grids[step.row].append(step.grid)


def split_text(values: Tensor, sites: list[BlockSite]) -> tuple[Tensor, ...]:
    """Cut one row at its blocks; placeholders and what stands between `<latent>` and `</latent>` fall away."""
    sizes, at = [], 0
    for site in sites:
        sizes += [site.column + 1 - at, site.num_pads]
        at = site.column + 1 + site.num_pads
    return values.split([*sizes, values.shape[0] - at])[::2]


def join_row(segments: list[Segment], row: int, layer: int) -> Tensor:
    """Put the hidden states of one row back in the order of its `input_ids`: (S, D)."""
    parts = []
    for segment in segments:
        part, values = segment.rows[row], segment.layers[layer][row]
        sizes = [part.num_latents, part.num_ends, part.num_text]
        latents, end, text, rest = values.split([*sizes, values.shape[0] - sum(sizes)])
        if part.block is not None and part.block.site.num_pads:
            parts += [decoded[layer] for decoded in part.block.decoded] + [latents]
        parts.append(end)
        if part.opening is None:
            parts.append(text)
        elif part.opening.num_pads:
            parts += [text, rest[: len(part.embeds) - sum(sizes)]]
        else:
            # A lone `<latent>` answers with what follows its `</latent>`, in the next segment.
            parts.append(text[:-1])
    return torch.cat(parts)
