"""Trajectories: what the model wrote and which latents it drew, sampled by its own batched `generate`.

A trajectory keeps its tokens, the grid of every block, and per modulation the three vectors (gamma, beta, log sigma) it
was drawn from; the tensors themselves are drawn again when they are needed (`actions.py`). Image features are kept once
per prompt: the vision tower is frozen. So a trajectory takes 24 * D bytes a block, whatever the sizes of grid and image.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import GenerationConfig

from modeling_latentvlm.row_images import RowImages
from train.data.reasoning_data import ReasoningSample
from train.data.seeds import mix
from train.deeplatent.rl.actions import act


BlockStatistics = dict[tuple[int, str], Tensor]  # (number of the block, kind) -> (3, D) float32


@dataclass
class Prompt:
    """A question as the model reads it."""

    sample: ReasoningSample
    input_ids: Tensor  # (S,) without padding
    images: RowImages | None  # features of the frozen vision tower


@dataclass
class Trajectory:
    """One sampled answer. All tensors lie on the CPU."""

    prompt: Prompt
    tokens: Tensor  # (T,) what was written, its end token included
    text: str  # the same for people and rewards, without special tokens
    seed: int  # of the noise of its latents
    grids: list[tuple[int, int]]  # of the blocks that were built
    statistics: BlockStatistics  # what the latents were drawn from
    num_latent_tokens: int  # `<latent>` written; the last may not have been built
    is_truncated: bool = False  # `max_new_tokens` came before its end
    rewards: dict[str, float | None] = field(default_factory=dict)
    reward: float | None = 0.0  # None: missing, the trajectory is left out of its group
    advantage: float = 0.0
    old_log_probs: Tensor | None = None  # (T,) of `tokens` before the first update; None: there is one update only
    old_statistics: BlockStatistics | None = None

    @property
    def sample(self) -> ReasoningSample:
        return self.prompt.sample

    def state(self) -> dict:
        """All but the prompt, which its data set has, for a checkpoint."""
        return {name: value for name, value in vars(self).items() if name != "prompt"}


@dataclass
class RolloutArguments:
    """How answers are sampled. The defaults are the paper's."""

    num_generations: int = field(default=8, metadata={"help": "Answers sampled to each question, at least 2."})
    temperature: float = field(default=0.5, metadata={"help": "Of rollouts, and of all log-probabilities."})
    max_new_tokens: int = field(default=2048, metadata={"help": "Most tokens of an answer."})
    min_latent_blocks: int = field(default=0, metadata={"help": "Blocks opened first, without a choice."})
    max_latent_blocks: int | None = field(default=None, metadata={"help": "In place of the checkpoint's."})

    def __post_init__(self):
        if self.num_generations < 2:
            raise ValueError(f"`num_generations` must be >= 2: answers compete, got {self.num_generations}.")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"`temperature` must be > 0 and finite, got {self.temperature}.")
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be >= 1, got {self.max_new_tokens}.")
        if self.max_latent_blocks is not None and self.max_latent_blocks < self.min_latent_blocks:
            raise ValueError(
                f"`max_latent_blocks` ({self.max_latent_blocks}) must be >= `min_latent_blocks` ({self.min_latent_blocks})."
            )


class DrawnActions:
    """A modulator that draws the actions of a batch of trajectories and keeps what they were drawn from."""

    def __init__(self, seeds: list[int]):
        self.seeds = seeds
        self.statistics: list[BlockStatistics] = [{} for _ in seeds]

    def __call__(self, row: int, block: int, kind: str, base: Tensor, *statistics: Tensor) -> Tensor:
        stacked = torch.stack(statistics).detach().float()
        self.statistics[row][block, kind] = stacked.cpu()
        return act(base, stacked, self.seeds[row], block, kind).to(base.dtype)


class QuestionCollator:
    """Renders and pads questions for `generate`.

    Args:
        instruction: put behind every question, on a line of its own.
    """

    def __init__(self, processor, instruction: str = ""):
        self.processor, self.instruction = processor, instruction

    def __call__(self, samples: list[ReasoningSample]) -> dict:
        conversations = []
        for sample in samples:
            items: list[dict] = [{"type": "image", "image": image} for image in sample.load_images()]
            question = "\n".join(part for part in (sample.question, self.instruction) if part)
            conversations.append([{"role": "user", "content": [*items, {"type": "text", "text": question}]}])
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        return {"inputs": dict(inputs), "samples": samples}


@contextmanager
def plain_generation(model) -> Iterator[GenerationConfig]:
    """Leave nothing in force that would bend the distribution: no top-k, no top-p, no repetition penalty."""
    own = model.generation_config
    ends = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ends)
    try:
        yield GenerationConfig(**ends, do_sample=True, top_k=0, top_p=1.0, return_dict_in_generate=True)
    finally:
        model.generation_config = own


def read_prompts(model, batch: dict) -> list[Prompt]:
    """Take the padding off the prompts and encode their images."""
    inputs = batch["inputs"]
    vision = {name: inputs.get(name) for name in ("pixel_values", "image_grid_thw")}
    vision |= dict.fromkeys(("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"))
    images, _ = model._encode_images(inputs["input_ids"], vision)
    prompts = []
    for row, sample in enumerate(batch["samples"]):
        kept = inputs["attention_mask"][row].bool()
        shift = int(kept.int().argmax())
        found = images[row]
        if found is not None:
            columns = [column - shift for column in found.columns]
            found = replace(found, features=found.features.cpu(), columns=columns)
        prompts.append(Prompt(sample, inputs["input_ids"][row][kept].cpu(), found))
    return prompts


@torch.no_grad()
def roll_out(model, processor, batch: dict, arguments: RolloutArguments, seed: int) -> list[Trajectory]:
    """Sample `num_generations` answers to every question, those of one question side by side.

    A function of the weights, the batch and the seed alone: the state of the random generators is left as it was.
    """
    prompts, count = read_prompts(model, batch), arguments.num_generations
    seeds = [mix(seed, row) for row in range(count * len(prompts))]
    drawn = DrawnActions(seeds)
    devices = [model.device] if model.device.type == "cuda" else []
    was_training = model.training
    model.eval()
    try:
        with plain_generation(model) as config, torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            config.update(temperature=arguments.temperature, max_new_tokens=arguments.max_new_tokens)
            config.update(num_return_sequences=count)
            output = model.generate(
                **batch["inputs"],
                generation_config=config,
                min_latent_blocks=arguments.min_latent_blocks,
                max_latent_blocks=arguments.max_latent_blocks,
                latent_modulator=drawn,
            )
    finally:
        model.train(was_training)
    written = output.sequences[:, batch["inputs"]["input_ids"].shape[1] :].cpu()
    grids = iter(map(tuple, output.latent_grid_hw.tolist()))
    ends = model.generation_config.eos_token_id
    trajectories = []
    for row, (tokens, num_blocks) in enumerate(zip(written, output.num_latent_blocks.tolist())):
        tokens = cut_at_end(tokens, ends)
        trajectories.append(
            Trajectory(
                prompt=prompts[row // count],
                tokens=tokens,
                text=processor.tokenizer.decode(tokens, skip_special_tokens=True),
                seed=seeds[row],
                grids=[next(grids) for _ in range(num_blocks)],
                statistics=drawn.statistics[row],
                num_latent_tokens=int((tokens == model.config.latent_start_token_id).sum()),
                is_truncated=output.stop_reason[row] == "max_length",
            )
        )
    return trajectories


def cut_at_end(tokens: Tensor, ends: int | list[int] | None) -> Tensor:
    """Keep what was written up to its end token, itself included; what follows is padding."""
    known = torch.tensor([] if ends is None else ends if isinstance(ends, list) else [ends], dtype=tokens.dtype)
    found = torch.isin(tokens, known).nonzero().flatten()
    return tokens[: int(found[0]) + 1] if len(found) else tokens
