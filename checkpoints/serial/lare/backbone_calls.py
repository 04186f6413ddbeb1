"""Calls of the backbone that would leave the latents out: TRL's are answered with latents, all others are refused.

The trainers of TRL do not use the logits of `forward`. They replace it (`trl.trainer.utils.add_fused_lm_head`) by one that
takes the labels away, runs `model.base_model(...)` on the rest and multiplies its hidden states with the weight of the head
in tiles. The backbone alone knows nothing of latents, so three things are put in its place:

    model(.., labels=.., fused_lm_head=True)    `__call__` keeps the labels in a `FusedCall`, which travels as an argument
    model.base_model(.., fused_call=..)         `LatentBackbone` runs the model's own `forward` up to the hidden states
    model.model(..)                             raises, unless `forward` itself called it

Nothing is kept on the model, so two threads or two copies of a model do not meet.

Shapes: B rows, S columns of `input_ids`, D hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


FROM_FORWARD = "from_forward"  # the argument by which `forward` tells the backbone that it is the caller


@dataclass
class FusedCall:
    """One call by the fused head of TRL: what it hides from the backbone, and what the latents add to its loss."""

    labels: Tensor  # (B, S), -100 where nothing is learned
    latent_loss: Tensor | None = None  # set by `forward`: a weighted loss beside the next-token loss


class LatentBackbone:
    """`model.base_model`: called by TRL it runs latents too; everything else is that of the backbone, `model.model`."""

    def __init__(self, model: nn.Module):
        object.__setattr__(self, "latent_owner", model)

    def __call__(self, *args, fused_call: FusedCall | None = None, **kwargs):
        owner = self.latent_owner
        if fused_call is None:
            raise ValueError(refusal(owner))
        return type(owner).forward(owner, *args, fused_call=fused_call, **kwargs)

    def __getattr__(self, name: str):
        return getattr(object.__getattribute__(self, "latent_owner").model, name)

    def __setattr__(self, name: str, value) -> None:
        setattr(self.latent_owner.model, name, value)

    def __eq__(self, other) -> bool:
        return other is self.latent_owner.model or (
            isinstance(other, LatentBackbone) and other.latent_owner is self.latent_owner
        )

    def __hash__(self) -> int:
        return hash(self.latent_owner.model)


def refusal(model: nn.Module) -> str:
    return (
        f"The backbone of {type(model).__name__} was called past the model's `forward`, where it runs without latents. Call "
        "the model itself. TRL's trainers are served where they give `labels` and `fused_lm_head=True` to the model, as its "
        "SFTTrainer and GRPOTrainer do."
    )


def guard_backbone(model: nn.Module) -> None:
    """Make `model.model(...)` raise for every caller but `forward`, which says `from_forward=True`."""
    message = refusal(model)
    model.model.register_forward_pre_hook(BackboneGuard(message), with_kwargs=True)


class BackboneGuard:
    """A forward pre-hook that lets only `forward` in. A class, so that models with it can be copied and pickled."""

    def __init__(self, message: str):
        self.message = message

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict):
        if not kwargs.pop(FROM_FORWARD, False):
            raise ValueError(self.message)
        return args, kwargs


class BackboneCallsMixin:
    """For a model around a backbone `self.model`, whose `forward` takes `fused_call`. Lies before `PreTrainedModel`."""

    @property
    def base_model(self):
        return self if getattr(self, "model", None) is None else LatentBackbone(self)

    def never_labels(self, input_ids: Tensor) -> Tensor:
        """(B, S) bool: columns that are no targets, whatever the labels say."""
        return torch.zeros_like(input_ids, dtype=torch.bool)

    def __call__(self, *args, **kwargs):
        """As in torch, but the labels that TRL's fused head would keep to itself reach `forward`.

        Raises:
            ValueError: labels that were shifted (sequence parallelism), or rows without `input_ids`.
        """
        if not kwargs.get("fused_lm_head"):
            return super().__call__(*args, **kwargs)
        labels, input_ids = kwargs.get("labels"), kwargs.get("input_ids")
        if kwargs.get("shift_labels") is not None or labels is None or input_ids is None:
            raise ValueError(
                "TRL's fused head needs `input_ids` and `labels` of whole rows here: latents are taken at the first label of "
                "a row. `shift_labels`, which context and sequence parallelism give, cannot be used."
            )
        if kwargs.get("position_ids") is not None or kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError(
                "`packing` and `padding_free` put several rows into one, and latents belong to a row each: set both to False."
            )
        if labels.shape != input_ids.shape:
            raise ValueError(
                f"`labels` must have the shape of `input_ids` {tuple(input_ids.shape)}, got {tuple(labels.shape)}: adapters "
                "that prepend virtual tokens cannot be used."
            )
        kwargs["labels"] = labels = labels.masked_fill(self.never_labels(input_ids), -100)
        kwargs["fused_call"] = call = FusedCall(labels)
        output = super().__call__(*args, **kwargs)
        return output if call.latent_loss is None else add_latent_loss(output, call.latent_loss)


def add_latent_loss(output, latent_loss: Tensor):
    """Add a loss of the latents to what TRL's fused head returned.

    SFTTrainer computes its loss as the mean of `-log_probs` over the labels, so each label carries the same share.

    Raises:
        ValueError: the head is another trainer's, for which log-probabilities are no loss.
    """
    # What the trainers ask of their head tells them apart; only SFTTrainer has no other use of the log-probabilities.
    if output.is_top1 is None or output.mean_logits is not None:
        raise ValueError(
            "Among TRL's trainers only SFTTrainer can train on latent blocks, since they bring a loss of their own (L_scale): "
            "for reinforcement learning use `python -m train.train_deeplatent_rl`."
        )
    output.log_probs = output.log_probs - latent_loss.to(output.log_probs) * output.label_mask
    output.loss = output.loss + latent_loss.to(output.loss)
    return output


def check_answer_starts(answer_starts: Tensor, input_ids: Tensor) -> Tensor:
    """`answer_starts` as given.

    Raises:
        ValueError: they are no tensor with a column of every row.
    """
    rows, length = input_ids.shape
    if not isinstance(answer_starts, Tensor):
        raise ValueError(
            f"`answer_starts` must be a tensor of {rows} whole numbers, got {type(answer_starts).__name__}."
        )
    if answer_starts.shape != (rows,) or answer_starts.is_floating_point() or answer_starts.dtype == torch.bool:
        raise ValueError(
            f"`answer_starts` must be {rows} whole numbers, one for each row, got shape {tuple(answer_starts.shape)} of "
            f"{answer_starts.dtype}."
        )
    wrong = ((answer_starts < 1) | (answer_starts > length)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"`answer_starts` must lie within 1 and {length}, but rows {wrong} have {answer_starts[wrong].tolist()}."
        )
    return answer_starts


def find_answers(labels: Tensor, attention_mask: Tensor, is_fused: bool = False) -> Tensor:
    """(B,) the column of every row's first label; behind its last token in a row without labels.

    Args:
        is_fused: TRL is the caller. It joins several samples, or the turns of a conversation, to one row without saying so.

    Raises:
        ValueError: a row learns from its first token on, so that no prompt is left to think about, or (`is_fused`) it has
            several answers.
    """
    labels = labels.to(attention_mask.device)
    columns = torch.arange(labels.shape[1], device=labels.device)
    learned = (labels != -100) & attention_mask.bool()
    starts = learned.int().argmax(dim=1)
    without_prompt = learned.any(dim=1) & (starts <= attention_mask.int().argmax(dim=1))
    if without_prompt.any():
        raise ValueError(
            f"Latents are taken between prompt and answer, but rows {without_prompt.nonzero().flatten().tolist()} have a "
            "label at their first token, so there is no prompt. Set the labels of the prompt to -100 (with TRL: rows of "
            "`prompt` and `completion`, or `assistant_only_loss=True`)."
        )
    if is_fused:
        several = (learned.int().diff(dim=1) == 1).sum(dim=1) > 1
        if several.any():
            raise ValueError(
                f"Latents are taken once a row, before its first label, but rows {several.nonzero().flatten().tolist()} have "
                "several answers, of which only the first would have latents: set `packing=False`, and give one row for each "
                "turn of a conversation."
            )
    return torch.where(learned.any(dim=1), starts, ((columns + 1) * attention_mask.bool()).amax(dim=1))
