"""How large everything is, suite by suite."""

from dataclasses import dataclass, replace

from benchmarks.models import SEVEN_B, SMALL, TINY, Shape


@dataclass(frozen=True)
class Sizes:
    shape: Shape
    new_tokens: int  # of an answer whose tokens are timed
    words: int  # of a question
    grids: tuple[tuple[int, int], ...]  # blocks of 8, 64, 82 and 256 latents
    paper_grid: tuple[int, int]  # the block of the paper's own measurement
    vedas_steps: int
    replayed: int
    train_words: int  # of the question, and of each stretch of answer
    lengths: tuple[int, ...]  # prompts
    batches: tuple[int, ...]
    image_sides: tuple[int, ...]  # merged patches
    block_counts: tuple[int, ...]
    training_shape: Shape  # smaller, where weights, gradients and activations would not fit, or take too long


CPU = Sizes(
    SMALL,
    new_tokens=33,
    words=64,
    grids=((2, 4), (8, 8), (2, 41), (16, 16)),
    paper_grid=(2, 41),
    vedas_steps=3,
    replayed=32,
    train_words=64,
    lengths=(256, 512, 1024, 2048, 4096),
    batches=(1, 4, 16),  # 64 rows would take minutes a run on one core
    image_sides=(8, 16, 32),
    block_counts=(1, 2, 4),
    training_shape=replace(SMALL, text=SMALL.text | {"num_hidden_layers": 4}, vocab_size=4096),
)
CPU_QUICK = replace(
    CPU,
    new_tokens=13,
    grids=((2, 4), (8, 8)),
    paper_grid=(8, 8),
    lengths=(512, 1024),
    batches=(1, 4),
    image_sides=(8, 16),
)
GPU = replace(
    CPU,
    shape=SEVEN_B,
    lengths=(256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
    batches=(1, 4, 16, 64),
    image_sides=(8, 16, 32, 64),
    training_shape=replace(SEVEN_B, text=SEVEN_B.text | {"num_hidden_layers": 8}),
)
GPU_QUICK = replace(GPU, grids=((2, 4), (2, 41)), lengths=(512, 4096), batches=(1, 16), image_sides=(8, 32))
SMOKE = Sizes(
    TINY,
    new_tokens=4,
    words=6,
    grids=((1, 2), (2, 2)),
    paper_grid=(2, 2),
    vedas_steps=2,
    replayed=3,
    train_words=4,
    lengths=(24, 40),
    batches=(1, 2),
    image_sides=(2, 4),
    block_counts=(1, 2),
    training_shape=TINY,
)
