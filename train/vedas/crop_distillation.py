"""Self-distillation of visual replay (Vedas, SCF-VR): what a step looks at must tell what stands there.

Training only; it costs nothing at inference. At every latent step t and for every row with an image:

    window = the W x W part of one image's token grid that holds most tokens picked at step t      eq. 7
    u_ref  = mean(vision tower(that part of the original image, enlarged)), detached               eq. 8
    L_t    = mean over d of (F_SR(sum of the weighted picks) - u_ref)^2                            eq. 9
    L      = CE + weight * mean over steps and rows of L_t                                         eq. 13

Shapes: B rows, T latent steps, K picked tokens, D hidden size.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from modeling_latentvlm.visual_replay_vedas import Replay, densest_window
from processing_latentvlm.pictures import open_picture


PREDICTORS = ("mlp", "linear", "pointwise_conv", "conv")
LARGE_HIDDEN_SIZE = 3584  # of the 7B backbones, for which the paper gives the smaller weight


@dataclass
class ReplayArguments:
    """The crop branch. The defaults are the paper's; `reference()` is the published code."""

    replay_loss_weight: float | None = field(
        default=None,
        metadata={"help": "lambda; by default 1.0, or 0.2 from a hidden size of 3584 on. 0 switches it off."},
    )
    replay_window: int | None = field(default=None, metadata={"help": "W: in place of the config's."})
    replay_crop_size: int = field(
        default=0, metadata={"help": "Sides of the enlarged crop in pixels; 0: those of the image it was taken from."}
    )
    replay_predictor: str = field(default="mlp", metadata={"help": f"F_SR, one of {PREDICTORS}."})
    replay_weighted: bool = field(
        default=True, metadata={"help": "Predict from the weighted sum of the picks; else from their plain mean."}
    )
    replay_last_step_only: bool = field(default=False, metadata={"help": "Count the last step only."})
    replay_detach_target: bool = field(default=True, metadata={"help": "No gradient through u_ref."})

    def __post_init__(self):
        if self.replay_predictor not in PREDICTORS:
            raise ValueError(f"`replay_predictor` must be one of {PREDICTORS}, got {self.replay_predictor!r}.")
        if self.replay_window is not None and self.replay_window < 1:
            raise ValueError(f"`replay_window` must be >= 1, got {self.replay_window}.")
        if self.replay_crop_size < 0:
            raise ValueError(f"`replay_crop_size` must be >= 0, got {self.replay_crop_size}.")
        if self.replay_loss_weight is not None and not 0 <= self.replay_loss_weight < float("inf"):
            raise ValueError(f"`replay_loss_weight` must be >= 0 and finite, got {self.replay_loss_weight}.")

    @classmethod
    def reference(cls) -> "ReplayArguments":
        """What the published code does beside its preset (W = 4): plain mean of the picks, the last step alone, a target with gradient."""
        return cls(0.2, replay_weighted=False, replay_last_step_only=True, replay_detach_target=False)


class ReplayPredictor(nn.Sequential):
    """F_SR: from what a step replayed to what the vision tower makes of the window. (B, D), or (B, D, K) for `conv`."""

    def __init__(self, hidden_size: int, kind: str = "mlp"):
        size = hidden_size
        layers = {
            "mlp": lambda: (nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size)),
            "linear": lambda: (nn.Linear(size, size),),
            "pointwise_conv": lambda: (nn.Conv1d(size, size, 1), nn.ReLU(), nn.Conv1d(size, size, 1)),
            "conv": lambda: (nn.Conv1d(size, size, 3, padding=1), nn.ReLU(), nn.Conv1d(size, size, 3, padding=1)),
        }
        super().__init__(*layers[kind]())
        self.is_convolution = "conv" in kind


def crop_window(
    image: Image.Image, window: tuple[int, int, int, int, int], grid: tuple[int, int], size: int
) -> Image.Image:
    """Cut a window of a token grid out of the original image and enlarge it."""
    _, top, left, height, width = window
    upper, lower = (edge * image.height // grid[0] for edge in (top, top + height))
    first, last = (edge * image.width // grid[1] for edge in (left, left + width))
    box = [first, upper, max(last, first + 1), max(lower, upper + 1)]  # grids may be finer than tiny images
    target = (size, size) if size else image.size
    pixels = torch.from_numpy(np.array(open_picture(image).crop(box))).permute(2, 0, 1)[None]
    # In [0, 1] and cut off to 8 bits, as the published code does by way of torchvision.
    enlarged = nn.functional.interpolate(pixels / 255, target[::-1], mode="bilinear", align_corners=False)
    return Image.fromarray((enlarged[0] * 255).permute(1, 2, 0).to(torch.uint8).numpy())


class ReplayObjective(nn.Module):
    """Cross-entropy and the crop branch. Holds F_SR, the only weights that training adds.

    Args:
        image_processor: the model's, for the enlarged crops.
        merge_size: patches along a side of one merged patch.
    """

    def __init__(self, config, image_processor, arguments: ReplayArguments):
        super().__init__()
        hidden_size = config.get_text_config().hidden_size
        self.arguments, self.image_processor = arguments, image_processor
        self.merge_size = config.vision_config.spatial_merge_size
        self.window = arguments.replay_window or config.replay_window
        self.weight = arguments.replay_loss_weight
        if self.weight is None:
            self.weight = 0.2 if hidden_size >= LARGE_HIDDEN_SIZE else 1.0
        self.replay_predictor = ReplayPredictor(hidden_size, arguments.replay_predictor)

    def forward(self, model: nn.Module, original_images: list[list[Image.Image]] | None = None, **inputs) -> dict:
        """`model`'s loss with the crop branch: `loss`, `logits`, and the terms by name, detached, as `losses`.

        Args:
            original_images: by row its images, in the order of `image_grid_thw`. None leaves the crop branch out.
        """
        with_crops = self.weight > 0 and original_images is not None
        output = model(**inputs, output_latents=with_crops)
        losses = {"ce_loss": output.loss.detach()}
        loss = output.loss
        if with_crops:
            replay_loss = self.replay_loss(model, output.replays, original_images, inputs.get("image_grid_thw"))
            loss = loss + self.weight * replay_loss
            losses["replay_loss"] = replay_loss.detach()
        return {"loss": loss, "logits": output.logits, "losses": losses}

    def replay_loss(
        self, model: nn.Module, replays: tuple[Replay, ...], images: list[list[Image.Image]], image_grid_thw
    ) -> Tensor:
        """Mean of eq. 9 over steps and rows; without anything replayed a zero in which F_SR still takes part."""
        replays = replays[-1:] if self.arguments.replay_last_step_only else replays
        sites = self.find_sites(replays, images, image_grid_thw)
        if not sites:
            # Every rank of a distributed run must touch every weight.
            return 0.0 * sum(parameter.float().sum() for parameter in self.replay_predictor.parameters())
        target = self.encode_crops(model, [crop for _, _, crop in sites])
        steps = torch.tensor([step for step, _, _ in sites])
        rows = torch.tensor([row for _, row, _ in sites])
        predicted = self.predict(replays)[steps, rows]
        return (predicted.float() - target.to(predicted.device).float()).square().mean()

    def find_sites(self, replays, images, image_grid_thw) -> list[tuple[int, int, Image.Image]]:
        """(step, row, crop) for every step of every row that picked something."""
        if not replays or image_grid_thw is None:
            return []
        grids = iter([(h // self.merge_size, w // self.merge_size) for _, h, w in image_grid_thw.tolist()])
        of_row = [[next(grids) for _ in row] for row in images]
        picked = torch.stack([replay.tokens for replay in replays]).tolist()  # one read for all steps
        sites = []
        for step, tokens in enumerate(picked):
            for row, numbers in enumerate(tokens):
                window = densest_window([n for n in numbers if n >= 0], of_row[row], self.window)
                if window is not None:
                    image, grid = images[row][window[0]], of_row[row][window[0]]
                    sites.append((step, row, crop_window(image, window, grid, self.arguments.replay_crop_size)))
        return sites

    def predict(self, replays: tuple[Replay, ...]) -> Tensor:  # (T, B, D)
        """F_SR of every step's picks."""
        if self.arguments.replay_weighted:
            kept = torch.stack([replay.attended for replay in replays])[..., None]  # (T, B, K, 1)
            tokens = torch.stack([replay.embeds for replay in replays]) * kept
        else:
            kept = torch.stack([replay.tokens >= 0 for replay in replays])[..., None]
            tokens = torch.stack([replay.picked_embeds for replay in replays]) * kept
            tokens = tokens / kept.sum(dim=2, keepdim=True).clamp(min=1)
        tokens = tokens.to(next(self.replay_predictor.parameters()).dtype)
        if not self.replay_predictor.is_convolution:
            return self.replay_predictor(tokens.sum(dim=2))
        states, kept = tokens.flatten(0, 1).mT, kept.flatten(0, 1).mT
        for layer in self.replay_predictor:
            states = layer(states) * kept  # a slot that nothing fills is like the end of the sequence
        return states.sum(dim=2).unflatten(0, tokens.shape[:2])

    def encode_crops(self, model: nn.Module, crops: list[Image.Image]) -> Tensor:  # (crops, D)
        """u_ref: the mean feature of each crop, by the model's own vision tower."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        encoded = self.image_processor(images=crops, return_tensors="pt")
        device = base._input_device(next(self.replay_predictor.parameters()))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.arguments.replay_detach_target):
            features = base.model.get_image_features(
                encoded["pixel_values"].to(device), encoded["image_grid_thw"].to(device), return_dict=True
            ).pooler_output
        return torch.stack([one.mean(dim=0) for one in features])
