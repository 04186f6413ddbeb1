"""Text prefix reconstruction (LaRe, eq. 8): from the latents alone, how the reasoning begins.

A fresh forward of the language model over `[<bot> ; Z ; <eot> ; r_1 .. r_n]`, positions from zero and no cache: the keys that
the answer's cache holds for Z contain image and question, so masking those out would not be enough.

Shapes: B rows, T latents, n prefix tokens, D hidden size.
"""

import torch
from torch import Tensor, nn

from train.lare.data import IGNORED


def text_prefix_loss(model, latents: Tensor, latent_mask: Tensor, prefix: Tensor, prefix_mask: Tensor) -> Tensor:
    """Mean over rows with a prefix of their mean cross-entropy; zero without such a row.

    Args:
        model: a `LaReForCausalLM`.
        latents: (B, T, D), of all steps.
        latent_mask: (B, T) bool.
        prefix: (B, n) tokens of the reasoning.
        prefix_mask: (B, n) bool.
    """
    embed, rows = model.get_input_embeddings(), len(latents)
    ids = torch.tensor([model.config.bot_token_id, model.config.eot_token_id], device=prefix.device)
    bot, eot = embed(ids.expand(rows, 2)).split(1, dim=1)
    embeds = torch.cat([bot, latents.to(bot.dtype), eot, embed(prefix)], dim=1)
    one = torch.ones_like(prefix_mask[:, :1])
    mask = torch.cat([one, latent_mask, one, prefix_mask], dim=1)
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=mask.long(),
        position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
        use_cache=False,
    ).last_hidden_state
    logits = model.lm_head(hidden[:, -prefix.shape[1] - 1 : -1])
    losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), prefix.flatten(), reduction="none")
    by_row = (losses.view_as(prefix) * prefix_mask).sum(1) / prefix_mask.sum(1).clamp(min=1)
    exists = prefix_mask.any(1)
    return (by_row * exists).sum() / exists.sum().clamp(min=1)


def word_loss(model: nn.Module, latents: Tensor, latent_mask: Tensor, words: Tensor | None) -> Tensor:
    """Mean of 1 - cos(last latent of a step, embedding of the word that it stands for), over the steps that have both.

    The text that goes on behind the latents then finds there what it found in words. With `text_prefix_loss` in its place, pointer
    chasing took three times as many steps to learn what comes behind one latent step, and what comes behind two was not learned at all.

    Args:
        latents: (B, N, K, D).
        latent_mask: (B, N) bool.
        words: (B, N) tokens, `IGNORED` where there is none.

    Raises:
        ValueError: the batch does not say which words (it is not a curriculum's).
    """
    if words is None:
        raise ValueError(
            "`word_loss_weight` needs a `curriculum`: only there a latent step stands for a step in words."
        )
    exists = latent_mask & (words != IGNORED)
    embeddings = model.get_input_embeddings()(words.clamp(min=0)).detach().float()
    distances = 1 - nn.functional.cosine_similarity(latents[:, :, -1].float(), embeddings, dim=-1)  # (B, N)
    return (distances * exists).sum() / exists.sum().clamp(min=1)
