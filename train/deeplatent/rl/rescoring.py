"""Run a policy over stored trajectories: what it says now of every word and of every latent drawn then.

One teacher-forced pass. The blocks are built from the stored actions, detached: the loss on words cannot reach the
modulation through the latents, only the densities of the actions themselves can. Vocabulary-wide tensors exist for
`LOGITS_AT_ONCE` positions at a time, forward and backward.

Shapes: R trajectories, P all their tokens in a row, D hidden size, V vocabulary.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from modeling_latentvlm.decoding_blocks import BlockDecoder
from modeling_latentvlm.decoding_deeplatent import DeepLatentContext
from modeling_latentvlm.row_images import RowImages
from modeling_latentvlm.trace import LatentTrace
from train.deeplatent.rl.actions import act, categorical_divergence, limit_logits
from train.deeplatent.rl.rollouts import RolloutArguments, Trajectory


LOGITS_AT_ONCE = 256


class StoredActions:
    """A modulator that gives stored actions back, and keeps what the policy now says of them."""

    def __init__(self, trajectories: list[Trajectory]):
        self.trajectories = trajectories
        self.statistics: list[dict] = [{} for _ in trajectories]  # (block, kind) -> (3, D), with gradients
        self.bases: list[dict] = [{} for _ in trajectories]  # (block, kind) -> (N, D)

    def __call__(self, row: int, block: int, kind: str, base: Tensor, *statistics: Tensor) -> Tensor:
        self.statistics[row][block, kind] = torch.stack(statistics).float()
        self.bases[row][block, kind] = base.detach()
        return self.action(row, block, kind).to(base.dtype)

    def action(self, row: int, block: int, kind: str) -> Tensor:
        """(N, D) float32, the very bits of the rollout."""
        trajectory = self.trajectories[row]
        base = self.bases[row][block, kind]
        return act(base, trajectory.statistics[block, kind], trajectory.seed, block, kind)


@dataclass
class Replayed:
    """What a policy makes of trajectories."""

    hidden: Tensor  # (P, D) the state that each token was predicted from
    actions: StoredActions
    trace: LatentTrace | None = None


@dataclass
class Words:
    """The tokens of trajectories in a row, and what was allowed at each."""

    tokens: Tensor  # (P,)
    is_full: Tensor  # (P,) bool: `<latent>` could not be written
    is_forced: Tensor  # (P,) bool: nothing else could
    lengths: list[int] = field(default_factory=list)  # R numbers that add up to P

    @classmethod
    def of(cls, trajectories: list[Trajectory], config, arguments: RolloutArguments, device: torch.device) -> "Words":
        most = config.max_latent_blocks if arguments.max_latent_blocks is None else arguments.max_latent_blocks
        full, forced = [], []
        for trajectory in trajectories:
            is_start = (trajectory.tokens == config.latent_start_token_id).long()
            opened = is_start.cumsum(0) - is_start
            can_open = torch.tensor(trajectory.prompt.images is not None)
            full.append(~can_open | (opened >= most))
            forced.append(can_open & (opened < arguments.min_latent_blocks))
        return cls(
            torch.cat([trajectory.tokens for trajectory in trajectories]).to(device),
            torch.cat(full).to(device),
            torch.cat(forced).to(device),
            [len(trajectory.tokens) for trajectory in trajectories],
        )


def replay(model, trajectories: list[Trajectory], output_latents: bool = False) -> Replayed:
    """Run `model` over trajectories, with gradients where they are on.

    Not through the model's `forward`: that would make logits of all positions at once, and encode the images anew.
    """
    config, device = model.config, model.get_input_embeddings().weight.device
    # The last token is only predicted: where it is a `<latent>`, no block was built.
    rows = [torch.cat([trajectory.prompt.input_ids, trajectory.tokens[:-1]]) for trajectory in trajectories]
    lengths = [len(row) for row in rows]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=config.get_text_config().pad_token_id or 0)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long().to(device)
    input_ids = input_ids.to(device)
    images = [move(trajectory.prompt.images, device) for trajectory in trajectories]
    actions = StoredActions(trajectories)
    context = DeepLatentContext(images=images, output_latents=output_latents, modulator=actions)
    grids = [grid for trajectory in trajectories for grid in trajectory.grids]
    sites = model.find_blocks(input_ids, torch.tensor(grids) if grids else None)
    decoder = BlockDecoder(model, context, None, False, {})
    prompts = torch.tensor([len(trajectory.prompt.input_ids) for trajectory in trajectories], device=device)
    in_prompt = torch.arange(max(lengths), device=device) < prompts[:, None]
    embeds = embed(model, input_ids, in_prompt, images)
    decoded = decoder.run(input_ids, embeds, mask, place(model, input_ids, in_prompt, mask, images), sites)
    hidden = [
        decoded.last_hidden_state[row, length - len(trajectory.tokens) : length]
        for row, (trajectory, length) in enumerate(zip(trajectories, lengths))
    ]
    return Replayed(torch.cat(hidden), actions, decoded.trace)


def move(images: RowImages | None, device: torch.device) -> RowImages | None:
    return None if images is None else RowImages(images.features.to(device), images.grids, images.columns)


def embed(model, input_ids: Tensor, in_prompt: Tensor, images: list[RowImages | None]) -> Tensor:
    """(R, S, D) embeddings, with image features in the prompts' placeholders; an answer that holds one means the word."""
    embeds = model.get_input_embeddings()(input_ids)
    features = [row.features for row in images if row is not None]
    if not features:
        return embeds
    is_image = ((input_ids == model.config.image_token_id) & in_prompt)[..., None]
    return embeds.masked_scatter(is_image, torch.cat(features).to(embeds.dtype))


def place(model, input_ids: Tensor, in_prompt: Tensor, mask: Tensor, images: list[RowImages | None]) -> Tensor:
    """(3, R, S) rotary positions."""
    is_word = (model._token_types(input_ids) > 0) & ~in_prompt
    input_ids = input_ids.masked_fill(is_word, model.config.latent_start_token_id)  # as any other word
    merge = model.model.visual.spatial_merge_size
    grids = [(1, height * merge, width * merge) for row in images if row is not None for height, width in row.grids]
    vision = {"image_grid_thw": torch.tensor(grids, device=input_ids.device) if grids else None}
    return model._rope_positions(input_ids, mask, vision | dict.fromkeys(("video_grid_thw", "second_per_grid_ts")))


def score_words(
    model,
    hidden: Tensor,  # (P, D)
    words: Words,
    temperature: float,
    reference: torch.nn.Module | None = None,
    reference_hidden: Tensor | None = None,  # (P, D)
) -> tuple[Tensor, Tensor, Tensor]:  # 3 x (P,) float32
    """Log-probability of every token, KL(policy || reference) and entropy there.

    All under the temperature of the rollout and what it forbade. Without a reference the KL is 0.
    """

    def log_softmax(head, states, start, end):
        logits = limit_logits(head(states).float(), model.config, words.is_full[start:end], words.is_forced[start:end])
        return (logits / temperature).log_softmax(-1)

    def score(states, other, start, end):
        log_probs = log_softmax(model.lm_head, states, start, end)
        chosen = log_probs.gather(1, words.tokens[start:end, None])[:, 0]
        entropy = -(log_probs.detach().exp() * log_probs.detach().clamp(min=-1e4)).sum(-1)
        if other is None:
            return chosen, torch.zeros_like(chosen), entropy
        with torch.no_grad():
            expected = log_softmax(reference.lm_head, other, start, end)
        return chosen, categorical_divergence(log_probs, expected), entropy

    parts = []
    for start in range(0, len(hidden), LOGITS_AT_ONCE):
        end = min(start + LOGITS_AT_ONCE, len(hidden))
        other = None if reference_hidden is None else reference_hidden[start:end]
        parts.append(checkpoint(score, hidden[start:end], other, start, end, use_reentrant=False))
    return tuple(torch.cat(values) for values in zip(*parts))
