"""Run a batch with latent blocks through the language model, one forward per segment.

Segment k of a row is the latents of its block k - 1 (with `</latent>`, where `input_ids` leaves it to the model), then
text up to and including the `<latent>` of block k, then the control embeddings. `latent_state.py` says why.

Shapes: B rows, S new tokens, T tokens of a segment (padded to the longest row), N latents, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache

from modeling_latentvlm.block_segments import Block, RowText, Segment, SegmentRow, join_row, split_runs
from modeling_latentvlm.block_sites import BlockSite
from modeling_latentvlm.decoding_common import DecodingContext, SegmentDecoder
from modeling_latentvlm.generation_checks import LastTokens
from modeling_latentvlm.latent_former_deeplatent import grid_places
from modeling_latentvlm.lockstep import Lockstep, keep_in_graph
from modeling_latentvlm.row_images import RowImages
from modeling_latentvlm.trace import LatentStep, LatentTrace


@dataclass
class BlockContext(DecodingContext):
    """`DecodingContext` for blocks."""

    noise: bool = False  # the stochastic term of eq. 3
    modulator: Callable | None = None  # (row, number of the block in it, ...), then as `latent_former.Modulator`
    grid: tuple[int, int] | None = None  # forced on every block that `generate` opens
    max_blocks: int = 0  # most blocks of an answer, for the size of a static cache
    prompt_sites: list | None = None  # the blocks that stand in the prompt already, by row
    last_tokens: LastTokens | None = None  # what every row wrote last, where that is known on the host
    earlier_grids: list = field(default_factory=list)  # by prompt row, of the blocks in a continued cache
    is_unused: bool = False  # whether blocks could have been opened and none was
    state_layers: tuple[int, ...] = ()  # numbers into `hidden_states`, of which latents' states are returned
    lockstep: Lockstep | None = None  # what all processes of a sharded model run
    idle: list[Tensor] = field(default_factory=list)  # results of what was run for other processes alone

    def take_prompt_sites(self) -> list | None:
        """The prompt's blocks, once: later tokens of `generate` open blocks of their own."""
        sites, self.prompt_sites = self.prompt_sites, None
        return sites

    def written_sites(self, input_ids: Tensor, start: int) -> list | None:
        """The blocks that the tokens written last open, without asking the device; None where it has to be asked."""
        written = None if self.last_tokens is None else self.last_tokens.take()
        if written is None or input_ids.shape != (len(written), 1):
            return None
        return [[BlockSite(row, 0, 0, None)] if token == start else [] for row, token in enumerate(written)]


@dataclass
class Decoded:
    """The hidden states of every column of `input_ids`; a lone `<latent>` has those of its `</latent>`."""

    last_hidden_state: Tensor  # (B, S, D)
    hidden_states: tuple[Tensor, ...] | None
    cache: Cache | None
    scale_logits: tuple[Tensor, Tensor] | None = None  # 2 x (blocks, G)
    scale_targets: Tensor | None = None  # (blocks, 2)
    trace: LatentTrace | None = None
    latent_states: Tensor | None = None  # (layers, latents of all blocks, D)

    def scale_loss(self) -> Tensor | None:
        """Cross-entropy of height plus that of width, averaged over blocks (DeepLatent, eq. 7)."""
        if self.scale_logits is None:
            return None
        targets = self.scale_targets.to(self.scale_logits[0].device) - 1
        return sum(F.cross_entropy(logits, targets[:, axis]) for axis, logits in enumerate(self.scale_logits))


class BlockDecoder(SegmentDecoder):
    """One run over new tokens, with the blocks that open in them."""

    def __init__(self, model, context: BlockContext, cache: Cache | None, use_cache: bool | None, kwargs: dict):
        super().__init__(model, cache, use_cache, kwargs)
        self.context = context
        self.scale_logits: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.latent_states: dict[tuple[int, int], Tensor] = {}
        self.block_steps = [] if context.lockstep is None else context.lockstep.block_steps
        self.wanted = {"output_hidden_states": True} if context.state_layers else {}

    def run(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        sites: list[list[BlockSite]],
    ) -> Decoded:
        embeds = inputs_embeds
        if input_ids is not None:
            embeds = self.model._embed_prompt(input_ids, self.context, inputs_embeds)
        rows, length = embeds.shape[:2]
        mask = None if attention_mask is None else attention_mask[:, -length:].bool().to(embeds.device)
        has_blocks = any(sites) or bool(self.block_steps)
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
        layers[0] = keep_in_graph(layers[0], self.context.idle)
        self.state.remember(input_ids, length)
        self.context.decode_step += 1
        return self.decoded(layers, sites, rows)

    def run_segments(self, embeds: Tensor, positions: Tensor, mask: Tensor | None, sites) -> list[Segment]:
        rows = embeds.shape[0]
        runs = [
            RowText(
                split_runs(embeds[row], sites[row]),
                split_runs(positions[:, row].T, sites[row]),
                split_runs(
                    torch.ones_like(positions[0, row], dtype=torch.bool) if mask is None else mask[row], sites[row]
                ),
            )
            for row in range(rows)
        ]
        blocks: dict[int, Block] = {}
        segments: list[Segment] = []
        for number in range(max(len(self.block_steps), *(len(row) for row in sites)) + 1):
            pieces = [self.piece(runs[row], sites[row], number, blocks.get(row), row) for row in range(rows)]
            lengths = [len(piece.embeds) for piece in pieces]
            if not any(lengths):
                segments.append(Segment(pieces, self.run_dummy_forward(segments[-1].layers)))
                self.open_blocks({}, segments[-1], number)
                continue
            attended = pad_sequence([piece.attended for piece in pieces], batch_first=True)
            even = len(set(lengths)) == 1 and mask is None
            layers = self.decode(
                pad_sequence([piece.embeds for piece in pieces], batch_first=True),
                pad_sequence([piece.positions for piece in pieces], batch_first=True).permute(2, 0, 1),
                None if even else attended,
                pad_sequence([piece.is_token for piece in pieces], batch_first=True),
                **self.wanted,
            )
            segments.append(Segment(pieces, self.keep_latent_states(pieces, layers, number - 1)))
            opened = {row: sites[row][number] for row in range(rows) if number < len(sites[row])}
            blocks = self.open_blocks(opened, segments[-1], number)
        return segments

    def keep_latent_states(self, pieces: list[SegmentRow], layers: list[Tensor], number: int) -> list[Tensor]:
        """Copy the states of block `number`'s latents; the other states of all layers are kept only where asked for."""
        if not self.context.state_layers:
            return layers
        for row, piece in enumerate(pieces):
            if piece.block is not None:
                self.latent_states[row, number] = torch.stack(
                    [
                        torch.cat(
                            [states[1 + layer] for states in piece.block.decoded]
                            + [layers[1 + layer][row, : piece.num_latents]]
                        )
                        for layer in self.context.state_layers
                    ]
                )
        is_asked = self.kwargs.get("output_hidden_states", self.text_model.config.output_hidden_states)
        return layers if is_asked else layers[:1]

    def run_dummy_forward(self, layers: list[Tensor]) -> list[Tensor]:
        """One forward over a masked token, for the sake of other processes."""
        # From real states, so that the backward pass runs through it as it does elsewhere.
        embeds = 0 * layers[0][:, -1:]
        positions = torch.zeros(3, len(embeds), 1, dtype=torch.long, device=embeds.device)
        masked = torch.zeros(len(embeds), 1, dtype=torch.bool, device=embeds.device)
        decoded = self.decode(embeds, positions, masked, masked)
        self.context.idle.append(decoded[0])
        return decoded

    def run_dummy_block(self, states: Tensor) -> None:
        """One block of a single latent from an empty image, for the sake of other processes."""
        image = RowImages(states.new_zeros(1, states.shape[-1]), [(1, 1)], [0])
        built = self.model.latent_blocks(states[:1, -1:].expand(-1, 3, -1), [image], [(1, 1)])
        self.context.idle += built.latents
        if self.config.latent_scale == "predicted":
            self.context.idle += [built.height_logits, built.width_logits]

    def piece(self, runs: RowText, sites: list[BlockSite], number: int, block: Block | None, row: int) -> SegmentRow:
        """One row's part of a segment; empty once the row has no more segments."""
        opening = sites[number] if number < len(sites) else None
        device = runs.embeds[0].device
        embeds, positions, attended, is_token = [], [], [], []

        def add(values: Tensor, places: Tensor, are_tokens: bool, seen: Tensor | None = None) -> None:
            embeds.append(values)
            positions.append(places)
            attended.append(torch.ones(len(values), dtype=torch.bool, device=device) if seen is None else seen)
            is_token.append(torch.full((len(values),), are_tokens, device=device))

        piece = SegmentRow(block=block, opening=opening)
        if block is not None:
            add(block.latents, block.positions, block.site.num_pads > 0)
            piece.num_latents = len(block.latents)
            if not block.site.num_pads:
                end = torch.full((1, 1), self.config.latent_end_token_id, device=device)
                add(self.model.get_input_embeddings()(end)[0].to(device), block.end_position[None], False)
                piece.num_ends = 1
        if number <= len(sites):
            add(runs.embeds[number], runs.positions[number] + runs.shift, True, runs.attended[number])
            piece.num_run = len(runs.embeds[number])
            if opening is not None and self.config.num_control_tokens:
                control = torch.arange(self.config.num_control_tokens, device=device)
                places = runs.positions[number][-1] + runs.shift + 1 + control[:, None]
                add(self.model.latent_control(control).to(runs.embeds[0]), places, opening.num_pads > 0)
        if opening is not None:
            piece.open_position = runs.positions[number][-1] + runs.shift
            piece.runs, piece.row = runs, row
        piece.embeds = torch.cat(embeds) if embeds else runs.embeds[0][:0]
        piece.positions = torch.cat(positions) if positions else runs.positions[0][:0]
        piece.attended = torch.cat(attended) if attended else runs.attended[0][:0]
        piece.is_token = torch.cat(is_token) if is_token else runs.attended[0][:0]
        return piece

    def open_blocks(self, opened: dict[int, BlockSite], segment: Segment, number: int) -> dict[int, Block]:
        """Build the blocks that rows open at the end of a segment."""
        if self.config.latent_mode == "autoregressive":
            blocks = self.open_autoregressive(opened, segment, number) if opened else {}
            if number < len(self.block_steps):
                for _ in range(
                    self.block_steps[number] - max((site.grid[1] - 1 for site in opened.values()), default=0)
                ):
                    self.run_dummy_forward(segment.layers)
            return blocks
        if not opened:
            if number < len(self.block_steps):
                self.run_dummy_block(segment.layers[0])
            return {}
        ends = torch.stack([segment.layers[0][row, len(segment.pieces[row].embeds) - 3 :][:3] for row in opened])
        images = {row: self.images_of(row, site) for row, site in opened.items()}
        rows_without_image = [row for row in opened if images[row] is None]
        if rows_without_image:
            column = opened[rows_without_image[0]].column
            raise ValueError(
                f"Row {rows_without_image[0]} opens a latent block at column {column}, but has no image before it."
            )
        built = self.model.latent_blocks(
            ends,
            list(images.values()),
            [site.grid or self.context.grid for site in opened.values()],
            self.context.noise,
            self.context.output_latents,
            self.modulators(opened),
        )
        steps = [
            self.step(row, site, grid, latents.to(ends), images[row])
            for (row, site), grid, latents in zip(opened.items(), built.grids, built.latents)
        ]
        for step, attention in zip(steps, built.image_attention or ()):
            step.image_attention = attention.detach()
        blocks = {}
        for index, (step, latents) in enumerate(
            zip(steps, self.context.intervene(steps, len(self.state.attention_mask)))
        ):
            self.record(step, latents)
            row, (height, width) = step.row, step.grid
            self.scale_logits[row, number] = (built.height_logits[index], built.width_logits[index])
            piece = segment.pieces[row]
            first = piece.open_position + 1 + self.config.num_control_tokens
            offsets = F.pad(grid_places(height, width, first.device).long(), (1, 0))
            blocks[row] = self.block(piece, latents, first + offsets, max(height, width))
        return blocks

    def modulators(self, opened: dict[int, BlockSite]) -> list[Callable] | None:
        if self.context.modulator is None:
            return None
        numbers = [sum(step.row == row for step in self.context.steps) for row in opened]
        return [partial(self.context.modulator, row, number) for row, number in zip(opened, numbers)]

    def open_autoregressive(self, opened: dict[int, BlockSite], segment: Segment, number: int) -> dict[int, Block]:
        """Feed the last hidden state back, one latent a forward; the last latent is left to the next segment."""
        default = (1, self.config.num_autoregressive_latents)
        grids = {row: site.grid or self.context.grid or default for row, site in opened.items()}
        latents = {row: segment.layers[0][row, len(segment.pieces[row].embeds) - 1][None] for row in opened}
        collected: dict[int, list[Tensor]] = {row: [] for row in opened}
        decoded: dict[int, list[list[Tensor]]] = {row: [] for row in opened}
        first = {row: segment.pieces[row].open_position + 1 for row in opened}
        longest = max(width for _, width in grids.values())
        for index in range(longest):
            active = [row for row in opened if index < grids[row][1]]
            steps = [
                replace(
                    self.step(row, opened[row], (1, 1), latents[row], self.images_of(row, opened[row])), offset=index
                )
                for row in active
            ]
            for row, changed in zip(active, self.context.intervene(steps, len(self.state.attention_mask))):
                collected[row].append(changed)
            going_on = [row for row in active if index + 1 < grids[row][1]]
            if not going_on:
                continue
            layers = self.decode_one_latent(
                {row: (collected[row][-1], first[row] + index, opened[row]) for row in going_on}
            )
            for row in going_on:
                latents[row] = layers[0][row]
                decoded[row].append([layer[row] for layer in layers])
        blocks = {}
        for row, site in opened.items():
            self.record(
                self.step(row, site, grids[row], latents[row], self.images_of(row, site)), torch.cat(collected[row])
            )
            width = grids[row][1]
            block = self.block(segment.pieces[row], collected[row][-1], (first[row] + width - 1)[None], width)
            block.decoded = decoded[row]
            blocks[row] = block
        return blocks

    def decode_one_latent(self, latents: dict[int, tuple[Tensor, Tensor, BlockSite]]) -> list[Tensor]:
        """One forward over a single latent of some rows; the others are masked."""
        values, place, site = next(iter(latents.values()))
        nothing = (torch.zeros_like(values), torch.zeros_like(place), replace(site, num_pads=0))
        rows = range(self.state.attention_mask.shape[0])
        values, places, sites = zip(*(latents.get(row, nothing) for row in rows))
        # Stacked from what is on the device: a list of rows would be copied there, and waited for, at every latent.
        flags = [values[0].new_full((1,), flag, dtype=torch.bool) for flag in (False, True)]
        is_token = torch.stack([flags[site.num_pads > 0] for site in sites])
        attended = None
        if len(latents) < len(rows):
            attended = torch.stack([flags[row in latents] for row in rows])
        positions = torch.stack(places)[:, None].permute(2, 0, 1)
        return self.decode(torch.stack(values), positions, attended, is_token, **self.wanted)

    def block(self, piece: SegmentRow, latents: Tensor, positions: Tensor, span: int) -> Block:
        """Bind latents to their row, whose later tokens move behind them by `span` positions and the controls."""
        site, controls = piece.opening, self.config.num_control_tokens
        taken = controls + span + (0 if site.num_pads else 1)
        piece.runs.shift += taken
        self.state.next_position[piece.row] += taken
        return Block(site, latents, positions, piece.open_position + 1 + controls + span)

    def images_of(self, row: int, site: BlockSite) -> RowImages | None:
        images = self.state.images[row]
        return None if images is None else images.before(self.state.num_tokens + site.column)

    def step(self, row: int, site: BlockSite, grid, latents: Tensor, images: RowImages | None) -> LatentStep:
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

    def decoded(self, layers: list[Tensor], sites: list[list[BlockSite]], rows: int) -> Decoded:
        places = [(row, number) for row, found in enumerate(sites) for number in range(len(found))]
        logits = targets = None
        if self.scale_logits and self.config.latent_scale == "predicted":
            logits = tuple(torch.stack([self.scale_logits[place][axis] for place in places]) for axis in (0, 1))
            if all(site.grid is not None for found in sites for site in found):
                targets = torch.tensor([site.grid for found in sites for site in found])
        trace = None
        if self.context.output_latents:
            steps = sorted(self.context.steps, key=lambda step: (step.row, step.index))
            trace = LatentTrace(rows, steps)
        states = None
        if self.latent_states:
            states = torch.cat([self.latent_states[place] for place in places], dim=1)
        cache = self.returned_cache
        return Decoded(layers[0], tuple(layers[1:]) or None, cache, logits, targets, trace, states)
