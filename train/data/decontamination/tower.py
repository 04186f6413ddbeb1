"""Image files to unit vectors, by the vision half of a CLIP or SigLIP checkpoint in a local folder.

Shapes: B images, D embedding size.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    SiglipVisionModel,
)
from transformers.utils import logging

from processing_latentvlm.pictures import open_picture
from train.data.decontamination.samples import batched


# The text half of a full checkpoint is never loaded. CLIP's image features are behind its projection.
VISION_HALVES = {"clip": CLIPVisionModelWithProjection, "siglip": SiglipVisionModel}
LOCAL = {"local_files_only": True, "trust_remote_code": False}
PROJECTED = CLIPVisionModelWithProjection.__name__


class ImageEmbedder:
    """A frozen vision tower with its preprocessing.

    Threads decode and shrink the images one by one, so that memory holds no more full-size images than threads.

    Raises:
        ValueError: the folder holds no vision tower in safetensors, or lacks some of its weights.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: str, batch_size: int, num_threads: int):
        self.device, self.batch_size, self.num_threads = device, batch_size, num_threads
        self.processor = AutoImageProcessor.from_pretrained(folder, **LOCAL)
        self.model = load_tower(folder, dtype).to(device)

    @torch.inference_mode()
    def embed(self, images: Iterable[Path]) -> tuple[Tensor, dict[Path, str]]:
        """Return the unit vectors (B, D) in float32 of the readable images, and why the others are not readable."""
        embeds, unreadable = [], {}
        with ThreadPoolExecutor(self.num_threads) as threads:
            for paths in batched(images, self.batch_size):
                pixels = dict(zip(paths, threads.map(self.preprocess, paths)))
                unreadable |= {path: found for path, found in pixels.items() if isinstance(found, str)}
                readable = [path for path in paths if path not in unreadable]
                if readable:
                    embeds.append(self.embed_pixels(torch.cat([pixels[path] for path in readable]), readable))
        return torch.cat(embeds) if embeds else torch.empty(0, 0), unreadable

    def preprocess(self, path: Path) -> Tensor | str:
        """The pixel values of an image, or the reason that there are none."""
        try:
            image = open_picture(path, "it")
        except ValueError as error:
            return str(error)
        return self.processor(images=image, return_tensors="pt")["pixel_values"]

    def embed_pixels(self, pixels: Tensor, paths: list[Path]) -> Tensor:  # (B, D)
        output = self.model(pixel_values=pixels.to(self.device, self.model.dtype))
        embeds = (output.image_embeds if "image_embeds" in output else output.pooler_output).float()
        norms = embeds.norm(dim=-1)
        broken = (~(norms.isfinite() & (norms > 0))).nonzero().flatten().tolist()
        if broken:  # nothing compares as similar to NaN: such images would pass for clean
            names = ", ".join(str(paths[row]) for row in broken)
            raise ValueError(f"Embeddings must be finite and not zero in {self.model.dtype}, but are not for {names}.")
        return F.normalize(embeds, dim=-1)


def load_tower(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder, **LOCAL)
    model_class = CLIPVisionModelWithProjection if PROJECTED in (config.architectures or []) else AutoModel
    if config.model_type in VISION_HALVES:
        model_class, whole = VISION_HALVES[config.model_type], config
        config = whole.vision_config
        if model_class is CLIPVisionModelWithProjection:  # a whole CLIP says the width outside of its halves
            config.projection_dim = whole.projection_dim
    try:
        with only_errors():  # not a table of every weight of the other half
            model, loading = model_class.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **LOCAL,
            )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"`vision_tower` must hold its weights as intact safetensors: {error}") from error
    # Checked here, because such weights get random values with only a warning.
    missing = sorted(loading["missing_keys"]) + sorted(key[0] for key in loading["mismatched_keys"])
    if missing:
        name = type(model).__name__
        raise ValueError(
            f"`vision_tower` must hold all weights of {name}, but {folder} lacks {len(missing)}: {missing[:4]}."
        )
    if model.main_input_name != "pixel_values":
        raise ValueError(f"`vision_tower` must take images, but {type(model).__name__} takes {model.main_input_name}.")
    return model.eval()


@contextmanager
def only_errors() -> Iterator[None]:
    """Keep transformers' warnings back."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
