"""Turn a Qwen2-VL or Qwen2.5-VL checkpoint into a Vedas one: the backbone bit for bit, and fresh routers.

    python -m conversion.convert_vedas --backbone Qwen/Qwen2.5-VL-7B-Instruct --output out/vedas
    python -m conversion.convert_vedas --backbone BACKBONE_FOLDER --output OUT --set num_latent_steps=3 --seed 1

The backbone is streamed, so memory stays near its largest shard. The gates start nearly closed: a fresh model is near
its backbone until it is trained. The output loads with `AutoModel.from_pretrained(OUT, trust_remote_code=True)`.
"""

from pathlib import Path

from transformers import Qwen2_5_VLConfig, Qwen2VLConfig

from conversion.qwen_backbone import Architecture, convert_backbone, run_converter
from modeling_latentvlm import VedasForConditionalGeneration
from processing_latentvlm import VedasProcessor
from processing_latentvlm.processing_vedas import LATENT_TOKEN


VEDAS = Architecture(
    model_class=VedasForConditionalGeneration,
    processor_class=VedasProcessor,
    tokens={"latent_token_id": LATENT_TOKEN},
    is_new=lambda name: ".router." in name,
    backbones={"qwen2_5_vl": Qwen2_5_VLConfig, "qwen2_vl": Qwen2VLConfig},
    fields_of=lambda model_type: {"backbone": model_type},
)


def convert_vedas(backbone: str | Path, output: str | Path, **arguments) -> Path:
    """Write a Vedas checkpoint around a backbone's weights; the arguments are those of `convert_backbone`."""
    return convert_backbone(VEDAS, backbone, output, **arguments)


def main() -> None:
    run_converter(__doc__, convert_vedas)


if __name__ == "__main__":
    main()
