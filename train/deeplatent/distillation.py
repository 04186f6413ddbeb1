"""The objective of both SFT stages (DeepLatent, eq. 5-8).

    L = L_ntp + 4.0 * L_align + 0.5 * L_scale

`forward` of the model gives L_ntp and L_scale; this adds L_align: the states at latents shall point where the teacher's did at
the tokens of the picture that a block stands for. In SFT 1 there are no blocks and L_ntp is all.

Shapes: N latents of all blocks of a batch, D hidden size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.deeplatent.teacher_states import pool_states, read_hidden_states


def align_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over layers and latents of `1 - cos`, in float32 (eq. 6).

    Args:
        student, teacher: (layers, N, D).

    Raises:
        ValueError: they do not match one to one.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"The student has states {tuple(student.shape)} at its latents, the teacher {tuple(teacher.shape)} at its image tokens."
        )
    return (1 - F.cosine_similarity(student.float(), teacher.to(student.device).float(), dim=-1)).mean()


class SftObjective(nn.Module):
    """L_ntp, L_scale and L_align. Holds no weights.

    Args:
        align_loss_weight: 0 leaves L_align out (the ablation without distillation).
        align_layers: numbers into `hidden_states`, of `choose_layers`.
        teacher: a frozen SFT-1 model, for batches that bring `teacher_inputs` in place of `teacher_states`.
    """

    def __init__(self, config, align_loss_weight: float, align_layers: Sequence[int] = (), teacher=None):
        super().__init__()
        if not 0 <= align_loss_weight < float("inf"):
            raise ValueError(f"`align_loss_weight` must be >= 0 and finite, got {align_loss_weight}.")
        self.config, self.weight, self.layers = config, align_loss_weight, tuple(align_layers)
        # In a tuple, so that it is no part of the model that is trained, sharded and saved.
        self.teacher = () if teacher is None else (teacher.eval().requires_grad_(False),)

    def forward(
        self,
        model: nn.Module,
        teacher_states: Tensor | None = None,  # (layers, N, D)
        teacher_inputs: dict | None = None,
        **inputs,
    ) -> dict:
        if teacher_inputs is not None:
            teacher_states = self.ask_teacher(**teacher_inputs)
        is_aligned = self.weight > 0 and teacher_states is not None
        output = model(**inputs, latent_state_layers=self.layers if is_aligned else ())
        loss, zero = output.loss, output.loss.new_zeros(())
        scale_loss = getattr(output, "scale_loss", None)
        scale_loss = zero if scale_loss is None else scale_loss.detach()
        losses = {"ntp_loss": loss.detach() - self.config.scale_loss_weight * scale_loss, "scale_loss": scale_loss}
        if self.weight > 0:
            aligned = align_loss(output.latent_states, teacher_states) if is_aligned else zero
            loss = loss + self.weight * aligned
            losses["align_loss"] = aligned.detach()
        return {"loss": loss, "logits": output.logits, "losses": losses}

    def ask_teacher(self, columns: Tensor, lengths: Tensor, **inputs) -> Tensor | None:
        """The live teacher's states at the assistant's pictures, as the cache would give them; None without any.

        Args:
            columns: (B, S) bool, the tokens of those pictures.
            lengths: (blocks,) the tokens of each.
        """
        if not len(lengths):
            return None
        (teacher,) = self.teacher
        if teacher.device != columns.device:
            teacher.to(columns.device)
        states = read_hidden_states(teacher, inputs, self.layers, columns)
        if self.config.latent_mode != "autoregressive":
            return states
        pooled = [
            pool_states(block, self.config.num_autoregressive_latents) for block in states.split(lengths.tolist(), 1)
        ]
        return torch.cat(pooled, dim=1)
