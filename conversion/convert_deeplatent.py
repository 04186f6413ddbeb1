"""Turn a Qwen2.5-VL checkpoint into a DeepLatent one: the backbone bit for bit, and the new modules at their start.

    python -m conversion.convert_deeplatent --backbone Qwen/Qwen2.5-VL-7B-Instruct --output checkpoints/deeplatent-7b
    python -m conversion.convert_deeplatent --backbone BACKBONE_FOLDER --output OUT --set latent_grid_size=24 --seed 1

The backbone is streamed, so memory stays near its largest shard; only the vision tower is loaded, in float32, to
measure how large image features are (`latent_query_rms`). Then, where the memory suffices, the whole checkpoint is
loaded in float32 once, to record its known answers (`--no-known-answers` leaves that out). The output loads with
`AutoModel.from_pretrained(OUT, trust_remote_code=True)`, also where this library is not installed.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen2_5_VLConfig

from conversion.backbone import Backbone, reference_picture, root_mean_square
from conversion.commands import CommandParser
from conversion.converter_options import backbone_parser
from conversion.qwen_backbone import VISION, Architecture, convert_backbone, rename_weight, report, run_converter
from modeling_latentvlm.modeling_deeplatent import DeepLatentForConditionalGeneration
from processing_latentvlm.processing_deeplatent import LATENT_TOKENS, DeepLatentProcessor


@torch.no_grad()
def measure_image_features(backbone: Backbone, tower_class: type[PreTrainedModel]) -> float:
    """Root mean square of a photo's merged features, from the vision tower alone, in float32."""
    names = [name for name in backbone.weights.entries if rename_weight(name).startswith(VISION)]
    weights = {rename_weight(name).removeprefix(VISION): backbone.weights.read(name) for name in names}
    config = backbone.config.vision_config
    tower = tower_class.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32).eval()
    inputs = backbone.image_processor(images=[reference_picture()], return_tensors="pt")
    return root_mean_square(tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output)


def measure(source: Backbone, config, model: PreTrainedModel, overrides: dict[str, Any]) -> None:
    """Let the query grid start at the size of the image features."""
    if "latent_query_rms" not in overrides:
        config.latent_query_rms = measure_image_features(source, type(model.model.visual))
        report(f"Image features have a root mean square of {config.latent_query_rms:.4g}.")


DEEPLATENT = Architecture(
    model_class=DeepLatentForConditionalGeneration,
    processor_class=DeepLatentProcessor,
    tokens=dict(zip(("latent_start_token_id", "latent_pad_token_id", "latent_end_token_id"), LATENT_TOKENS)),
    backbones={"qwen2_5_vl": Qwen2_5_VLConfig},
    measure=measure,
)


def convert_deeplatent(backbone: str | Path, output: str | Path, **arguments) -> Path:
    """Write a DeepLatent checkpoint around a backbone's weights; the arguments are those of `convert_backbone`."""
    return convert_backbone(DEEPLATENT, backbone, output, **arguments)


def build_parser() -> CommandParser:
    return backbone_parser(__doc__)


def main() -> None:
    run_converter(build_parser(), convert_deeplatent)


if __name__ == "__main__":
    main()
