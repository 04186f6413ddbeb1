"""How a batch with latent blocks is cut into segments.

A block's latents depend on the hidden states before it, so a sequence with K blocks enters the language model as K + 1
segments, each one forward over what is new:

    segment 0:  text ... <latent> controls          segment 1:  z_1 .. z_N </latent> text ...

Rows of a batch open blocks at different places and of different sizes. Segment k of every row is padded to the longest;
padding is masked out of the cache and consumes no position. Training and `generate` go through the same code.

Shapes: B rows, T tokens of a segment (padded to the longest row), D hidden size.
"""

from dataclasses import dataclass, field

from torch import Tensor

from .block_sites import BlockSite


@dataclass
class Block:
    """A block that was opened and is to be decoded: what the next segment of its row begins with."""

    site: BlockSite
    latents: Tensor  # (P, D) those not decoded yet: all, or the last in autoregressive mode
    positions: Tensor  # (P, 3)
    end_position: Tensor  # (3,)
    decoded: list[list[Tensor]] = field(default_factory=list)  # per layer, hidden states of latents decoded already
    scale_logits: tuple[Tensor, Tensor] | None = None  # 2 x (G,), where the model predicts height and width


@dataclass
class RowText:
    """A row cut at its blocks: the text of each of its segments."""

    embeds: tuple[Tensor, ...]  # (text, D)
    positions: tuple[Tensor, ...]  # (text, 3), as if blocks took no position
    attended: tuple[Tensor, ...]  # (text,) bool
    shift: int = 0  # positions that the blocks so far took


@dataclass
class SegmentRow:
    """One row's part of one segment: [latents][</latent>][text][controls]."""

    block: Block | None
    opening: BlockSite | None
    num_latents: int = 0
    num_ends: int = 0
    num_text: int = 0
    open_position: Tensor | None = None  # (3,) of the `<latent>` that ends the text
    embeds: Tensor | None = None
    positions: Tensor | None = None
    attended: Tensor | None = None
    is_token: Tensor | None = None
    text: RowText | None = None
    row: int = 0


@dataclass
class Segment:
    rows: list[SegmentRow]
    layers: list[Tensor]  # (B, T, D): the last hidden state, then one per layer if asked for
