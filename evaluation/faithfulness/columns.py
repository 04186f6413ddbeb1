"""What stands in each column of a forward: text, image, latent, replayed image tokens, or answer.

New columns are told apart by what went in:

    image     columns of image tokens in the prompt
    latent    vectors equal to a latent that is served; they are equal to the bit
    replay    image tokens that a step feeds again before its latent
    answer    text behind the first latent of its row (delimiters of latents included)
    text      all other text

Shapes: B rows, T new columns, D hidden size.
"""

import torch
from torch import Tensor

from configuration_latentvlm.transformers_api import CACHE
from evaluation.faithfulness.subject import Subject
from modeling_latentvlm.trace import LatentStep


KINDS = ("text", "image", "latent", "replay", "answer")
TEXT, IMAGE, LATENT, REPLAY, ANSWER = range(len(KINDS))
PADDING = -1
COMPARED = 8  # elements of a vector that tell whether it is a latent


class ColumnKinds:
    """Follows the forwards of one call of a model over a batch.

    Args:
        served: the latents that each row is going to get, step by step.
        input_ids: the prompt, padded on the left.
    """

    def __init__(self, subject: Subject, served: list[list[LatentStep]], input_ids: Tensor):
        self.subject = subject
        self.prompt_kinds = torch.full_like(input_ids, TEXT).masked_fill(
            input_ids == subject.architecture.image_token_id, IMAGE
        )
        nothing = torch.zeros(0, COMPARED)
        latents = [torch.cat([step.latents for step in steps]) if steps else nothing for steps in served]
        self.latents = [values.to(input_ids.device) for values in latents]
        self.cached = torch.zeros(len(served), 0, dtype=torch.long, device=input_ids.device)
        self.order = torch.zeros_like(self.cached)  # which latent of its row a column is
        self.kinds = self.keys = self.cached  # (B, T) of the new columns, (B, S) of all that they can attend to
        self.has_started = False
        self.key_order = self.order

    def follow(self, kwargs: dict) -> bool:
        """Take in the arguments of a forward of the language model; returns whether it begins with the prompt."""
        embeds, mask, cache = kwargs["inputs_embeds"], kwargs.get("attention_mask"), kwargs.get(CACHE)
        is_cached = cache is not None
        seen = int(cache.get_seq_length()) if is_cached else 0  # less than before where an answer starts afresh (LaRe)
        earlier = self.cached[:, :seen]
        replays = self.subject.model.config.replays_image_tokens
        has_prompt = seen == 0 and (replays or not self.has_started)
        self.has_started = True
        self.kinds, order = self.classify(embeds, mask, earlier, has_prompt, replays)
        self.keys = torch.cat([earlier, self.kinds], dim=1)
        self.key_order = torch.cat([self.order[:, : earlier.shape[1]], order], dim=1)
        if is_cached:
            self.cached, self.order = self.keys, self.key_order
        return has_prompt

    def classify(
        self, embeds: Tensor, mask: Tensor | None, earlier: Tensor, has_prompt: bool, replays: bool
    ) -> tuple[Tensor, Tensor]:
        """(B, T) kinds of the new columns, and which latent of its row each is (0 for others)."""
        rows, length = embeds.shape[:2]
        kinds = torch.full((rows, length), TEXT, device=embeds.device)
        order = torch.zeros_like(kinds)
        width = min(self.prompt_kinds.shape[1], length) if has_prompt else 0
        kinds[:, :width] = self.prompt_kinds[:, :width]
        columns = torch.arange(length, device=embeds.device)
        for row in range(rows):
            known = self.latents[row]
            if not len(known):
                continue
            same = (embeds[row][:, None, :COMPARED] == known.to(embeds)[None, :, :COMPARED]).all(
                dim=-1
            )  # (T, latents)
            is_latent = same.any(dim=1) & (columns >= width)
            before = int((earlier[row] == LATENT).sum())
            order[row] = same.int().argmax(dim=1)
            if bool((same[is_latent].sum(dim=1) > 1).any()):  # equal latents: in the order in which they come
                order[row] = (before + is_latent.long().cumsum(0) - 1).clamp(0, len(known) - 1)
            kinds[row][is_latent] = LATENT
            behind = (columns >= width) & ~is_latent
            if replays and bool(is_latent.any()):
                kinds[row][behind & (columns < int(is_latent.nonzero()[-1]))] = REPLAY
            else:
                kinds[row][behind & ((is_latent.long().cumsum(0) > 0) | (before > 0))] = ANSWER
        if mask is not None:
            kinds = kinds.masked_fill(mask[:, -length:] == 0, PADDING)
        return kinds, order
