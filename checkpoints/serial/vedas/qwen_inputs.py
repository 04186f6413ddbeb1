"""Images, videos and rotary positions of the Qwen-VL backbones, as the architectures on them need them."""

import torch
from torch import Tensor

from .prompt_checks import check_grids
from .row_images import collect_row_images


class QwenInputsMixin:
    """For a class around a `Qwen2VLModel` or `Qwen2_5_VLModel` as `self.model`."""

    @property
    def latent_placeholder_id(self) -> int:
        """The token whose columns take no position of their own."""
        raise NotImplementedError

    def _token_types(self, input_ids: Tensor) -> Tensor:
        """1 for image, 2 for video tokens. The backbone drops M-RoPE without a word where they are missing."""
        config = self.config
        return (input_ids == config.image_token_id).int() + 2 * (input_ids == config.video_token_id).int()

    def _rope_positions(self, input_ids: Tensor, attention_mask: Tensor | None, vision: dict) -> Tensor:
        """(3, B, S) rotary positions as if latents took none: the decoder adds what they take."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        mask = mask * (input_ids != self.latent_placeholder_id)
        grids = {name: vision[name] for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")}
        if grids["image_grid_thw"] is None and grids["video_grid_thw"] is None:
            return (mask.cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
        positions, _ = self.model.get_rope_index(
            input_ids, mm_token_type_ids=self._token_types(input_ids), attention_mask=mask, **grids
        )
        return positions

    def _check_vision(self, vision: dict) -> dict[str, list[tuple[int, int, int]]]:
        """By kind, (t, h, w) in patches of all images and videos, read from the device once.

        Raises:
            ValueError: pixels without a grid or a grid without pixels, a grid that is none, or one of another size.
        """
        found = {}
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            pixels, grid_thw = vision[name], vision[f"{kind}_grid_thw"]
            if (pixels is None) != (grid_thw is None):
                raise ValueError(f"The pixels and the `{kind}_grid_thw` of {kind}s must be given together.")
            if pixels is None:
                continue
            found[kind] = check_grids(grid_thw, kind, self.model.visual.spatial_merge_size)
            num_patches = sum(t * h * w for t, h, w in found[kind])
            if len(pixels) != num_patches:
                raise ValueError(f"`{kind}_grid_thw` names {num_patches} patches, but the {kind}s have {len(pixels)}.")
        return found

    def _encode_images(self, input_ids: Tensor, vision: dict, earlier: list | None = None, seen: int = 0):
        """Run the vision tower once and deal its features out to the rows; those of earlier turns come first."""
        merge = self.model.visual.spatial_merge_size
        features, grids = {}, {}
        sizes = self._check_vision(vision)
        for kind, token, pixels, encode in (
            ("image", self.config.image_token_id, vision["pixel_values"], self.model.get_image_features),
            ("video", self.config.video_token_id, vision["pixel_values_videos"], self.model.get_video_features),
        ):
            if kind in sizes:
                device = self._input_device(pixels)
                grid_thw = vision[f"{kind}_grid_thw"].to(device)
                features[token] = encode(pixels.to(device), grid_thw, return_dict=True).pooler_output
                grids[token] = [(t, h // merge, w // merge) for t, h, w in sizes[kind]]
        tokens = {self.config.image_token_id: "image", self.config.video_token_id: "video"}
        return collect_row_images(input_ids, tokens, features, grids, earlier or [None] * input_ids.shape[0], seen)


# The Hub's names of Qwen-VL's weights, in which checkpoints are written, and the prefixes of the modules.
HUB_PREFIXES = {"visual.": "model.visual.", "model.": "model.language_model."}
MODULE_PREFIXES = ("model.visual.", "model.language_model.")


def rename_hub_weights(module, state: dict, prefix: str, *_) -> None:
    """A hook before `load_state_dict`: weights may have the names of the Hub as well as those of the modules.

    `transformers.Trainer` resumes, and loads the best model, by `load_state_dict` of a file that `save_pretrained` wrote with
    the Hub's names. Without this nearly every weight would stay as it was, with no more than a line about missing keys.
    """
    for name in [name for name in state if name.startswith(prefix)]:
        own = name.removeprefix(prefix)
        hub = next((hub for hub in HUB_PREFIXES if own.startswith(hub)), None)
        if hub is not None and not own.startswith(MODULE_PREFIXES):
            state[prefix + HUB_PREFIXES[hub] + own.removeprefix(hub)] = state.pop(name)
