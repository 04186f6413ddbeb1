"""Turn a Qwen2-VL or Qwen2.5-VL checkpoint into a Vedas one: the backbone bit for bit, and fresh routers.

    python -m conversion.convert_vedas --backbone Qwen/Qwen2.5-VL-7B-Instruct --output out/vedas
    python -m conversion.convert_vedas --backbone BACKBONE_FOLDER --output OUT --set num_latent_steps=3 --seed 1
    python -m conversion.convert_vedas --backbone FOLDER --reference-checkpoint published.pth --output OUT

The backbone is streamed, so memory stays near its largest shard. The gates start nearly closed: a fresh model is near
its backbone until it is trained. The output loads with `AutoModel.from_pretrained(OUT, trust_remote_code=True)`.
"""

from pathlib import Path

from conversion.commands import CommandParser
from conversion.converter_options import backbone_parser
from conversion.qwen_backbone import Architecture, convert_backbone, run_converter
from conversion.reference_vedas import BACKBONES, convert_reference
from modeling_latentvlm import VedasForConditionalGeneration
from processing_latentvlm import VedasProcessor
from processing_latentvlm.processing_vedas import LATENT_TOKEN


VEDAS = Architecture(
    model_class=VedasForConditionalGeneration,
    processor_class=VedasProcessor,
    tokens={"latent_token_id": LATENT_TOKEN},
    backbones=BACKBONES,
    fields_of=lambda model_type: {"backbone": model_type},
)


def convert_vedas(
    backbone: str | Path,
    output: str | Path,
    reference_checkpoint: str | Path | None = None,
    lora_alpha: float | None = None,
    **arguments,
) -> Path:
    """Write a fresh Vedas checkpoint around a backbone's weights (`convert_backbone` says what the arguments are), or one
    from a published checkpoint (`convert_reference`), whose numbers are all given.
    """
    if reference_checkpoint is not None:
        given = [name for name in ("dtype", "overrides", "seed") if arguments.pop(name, None)]
        if given:
            raise ValueError(f"{given} cannot be set with a reference checkpoint: it decides them.")
        return convert_reference(backbone, output, reference_checkpoint, lora_alpha, **arguments)
    if lora_alpha is not None:
        raise ValueError("`lora_alpha` needs a `reference_checkpoint` to be of.")
    return convert_backbone(VEDAS, backbone, output, **arguments)


def build_parser() -> CommandParser:
    parser = backbone_parser(__doc__)
    parser.add_argument("--reference-checkpoint", metavar="FILE", help="a published .pth, or safetensors")
    parser.add_argument("--lora-alpha", type=float, help="of the published adapters (default: r / 4)")
    return parser


def main() -> None:
    run_converter(build_parser(), convert_vedas)


if __name__ == "__main__":
    main()
