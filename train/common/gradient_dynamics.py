"""Gradient dynamics of training (Vedas, figure 1): which tokens and which layers still move.

Every so many steps, by decoder layer:

    visual, text           mean over the prompt's tokens of |d loss / d hidden state of the token|, images and words apart
    q_proj .. o_proj       nuclear norm of the gradient of the projection, not clipped (`LatentTrainer` tells when); with
                           LoRA of its two factors, `q_proj.lora_A` ..

go to `gradient_dynamics.csv` in the output folder as they are measured, and into `gradient_dynamics.png` at every save.
"""

import csv
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from conversion.writing import replaced_file


NAME = "gradient_dynamics"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
FIELDS = ("step", "layer", "what", "norm")


class GradientDynamics(TrainerCallback):
    """Records gradients of a model of this library that has `model.language_model`, also inside a `TrainingModel`.

    Args:
        folder: where table and plot go.
        every: steps from one record to the next.
    """

    def __init__(self, folder: str | Path, every: int):
        if every < 1:
            raise ValueError(f"`every` must be >= 1, got {every}.")
        self.table, self.plot, self.every = Path(folder) / f"{NAME}.csv", Path(folder) / f"{NAME}.png", every
        self.hooks: list = []

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        rows = []
        if self.table.is_file() and state.global_step:  # resumed: what was lost comes again
            with self.table.open(newline="") as lines:
                rows = [row for row in list(csv.reader(lines))[1:] if len(row) == len(FIELDS)]
            rows = [row for row in rows if int(row[0]) < state.global_step]
        self.table.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(self.table) as partial, partial.open("w", newline="") as lines:
            csv.writer(lines).writerows([FIELDS, *rows])

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every:
            return
        base = find_base(model)
        self.projections: list[tuple] = []
        self.norms: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
        self.prompt: dict[str, Tensor] = {}
        self.hooks = [base.register_forward_pre_hook(self.see_batch, with_kwargs=True)]
        for number, layer in enumerate(base.model.language_model.layers):
            self.hooks.append(layer.register_forward_hook(self.watch(number)))

    def see_batch(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note where images and words of the prompt stand, in front of every micro-batch."""
        ids, mask, labels = (kwargs.get(name) for name in ("input_ids", "attention_mask", "labels"))
        known = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if labels is not None:
            known = known & (labels != -100).long().cumsum(1).eq(0)
        slots = ids == model.config.latent_token_id if hasattr(model.config, "latent_token_id") else ids < 0
        known = known & slots.long().cumsum(1).eq(0)
        visual = known & (ids == model.config.image_token_id)
        self.prompt = {"visual": visual, "text": known & ~visual}
        self.seen: set[int] = set()

    def watch(self, number: int):
        def hook(layer: nn.Module, args: tuple, output) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            # The prompt is the first thing that every layer sees of a batch.
            if not hidden.requires_grad or number in self.seen:
                return
            self.seen.add(number)
            prompt = self.prompt

            def note(gradient: Tensor) -> None:
                norms = gradient.detach().float().norm(dim=-1)
                for kind, columns in prompt.items():
                    columns = columns[:, : norms.shape[1]].to(norms.device)
                    if columns.any():
                        self.norms[number, kind].append(norms[:, : columns.shape[1]][columns].mean())

            hidden.register_hook(note)

        return hook

    def before_clipping(self, model: nn.Module) -> None:
        """Measure the projections. `LatentTrainer` calls it: no callback of `Trainer` comes before gradients are clipped."""
        if self.hooks:
            layers = find_base(model).model.language_model.layers
            self.projections = [(n, *found) for n, layer in enumerate(layers) for found in nuclear_norms(layer)]

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.hooks:
            return
        if not self.projections:  # nothing clips
            self.before_clipping(model)
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        rows = [(*place, torch.stack(values).mean()) for place, values in self.norms.items()] + self.projections
        if state.is_world_process_zero:
            with self.table.open("a", newline="") as lines:
                csv.writer(lines).writerows(
                    (state.global_step, layer, what, float(norm)) for layer, what, norm in rows
                )

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            draw(self.table, self.plot)

    on_train_end = on_save


def find_base(model: nn.Module) -> nn.Module:
    """The model of this library inside DDP, `TrainingModel` and PEFT."""
    for name in ("module", "model", "base_model", "model"):
        if not hasattr(getattr(model, "model", None), "language_model") and hasattr(model, name):
            model = getattr(model, name)
    return model


def nuclear_norms(layer: nn.Module) -> list[tuple[str, Tensor]]:
    """The sum of the singular values of each projection's gradient."""
    found = []
    for name, parameter in layer.self_attn.named_parameters():
        projection = name.split(".")[0]
        if projection not in PROJECTIONS or parameter.grad is None or parameter.ndim != 2:
            continue
        factor = next((part for part in name.split(".") if part.startswith("lora_")), None)
        gradient = parameter.grad.detach()
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        label = projection if factor is None else f"{projection}.{factor}"
        found.append((label, torch.linalg.svdvals(gradient.float()).sum()))
    return found


def draw(table: Path, plot: Path) -> None:
    """Draw the table: one panel per quantity, a line per layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with table.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    kinds = list(dict.fromkeys(row["what"] for row in rows))
    if not kinds:
        return
    layers = sorted({int(row["layer"]) for row in rows})
    colors = matplotlib.colormaps["viridis"]
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(3.2 * len(kinds), 3), squeeze=False)
    for axis, kind in zip(axes[0], kinds):
        for layer in layers:
            points = [
                (int(r["step"]), float(r["norm"])) for r in rows if r["what"] == kind and int(r["layer"]) == layer
            ]
            axis.plot(*zip(*points), color=colors(layer / max(layers[-1], 1)), linewidth=1) if points else None
        axis.set(title=kind, xlabel="step", yscale="log")
    figure.colorbar(pyplot.cm.ScalarMappable(pyplot.Normalize(0, layers[-1]), colors), ax=axes[0, -1], label="layer")
    figure.tight_layout()
    with replaced_file(plot) as partial:
        figure.savefig(partial, dpi=110)
    pyplot.close(figure)
