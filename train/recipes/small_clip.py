"""Make a small CLIP tower, a small language model and a small image tokenizer with random weights, to train LaRe from nothing.

    python -m train.data.tasks --task all --n 2000 --seed 0 --image-size 112 --output data/tasks
    python -m train.recipes.small_clip --data data/tasks/data.jsonl --output out/small
    python -m conversion.convert_lare --vision-tower out/small/vision --language-model out/small/language --output out/lare \
        --set window_size=2 extractor_hidden_size=128 extractor_num_heads=4

The folders look like published ones: the converter takes them as it takes those from the Hub.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2ForCausalLM
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from conversion.commands import CommandParser, exit_on_error
from conversion.writing import replaced_folder
from train.data.small_tokenizer import CHAT_TEMPLATE, texts_of, train_tokenizer
from train.lare.image_reconstruction import CODE_CHANNELS


def write_vision_tower(folder: Path, hidden_size: int, num_layers: int, image_size: int, patch_size: int) -> None:
    config = CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=hidden_size,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=size).save_pretrained(folder)


def write_language_model(folder: Path, texts: list[str], hidden_size: int, num_layers: int, vocab_size: int) -> None:
    tokenizer = train_tokenizer(texts, vocab_size)
    tokenizer.chat_template = CHAT_TEMPLATE
    config = Qwen2Config(
        vocab_size=-(-(len(tokenizer) + 8) // 8) * 8,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
        initializer_range=hidden_size**-0.5,  # see `train.recipes.small_backbone`
        max_position_embeddings=2048,
        # Qwen2.5's. With so few head dimensions 1e4 leaves too many that turn within an image: searching took 1,000 steps instead of 600.
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_vae(folder: Path, code_channels: int = CODE_CHANNELS) -> None:
    """A small KL autoencoder that reduces 4-fold; random, it still gives every crop a code of its own."""
    blocks = 3
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(16,) * blocks,
        norm_num_groups=8,
        latent_channels=code_channels,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    ).save_pretrained(folder)


def write_small(
    texts: list[str],
    output: str | Path,
    hidden_size: int = 128,
    num_layers: int = 4,
    vocab_size: int = 600,
    image_size: int = 112,
    patch_size: int = 14,
    seed: int = 0,
) -> Path:
    """Write `vision`, `language` and `vae` under a folder.

    Raises:
        ValueError: a hidden size that is no multiple of 64, or an image that is no whole number of patches.
    """
    if hidden_size % 64 or hidden_size < 64 or image_size % patch_size:
        raise ValueError(
            f"`hidden_size` must be a multiple of 64 and `image_size` of `patch_size`, got {hidden_size}, {image_size} and "
            f"{patch_size}."
        )
    output = Path(output)
    torch.manual_seed(seed)
    with replaced_folder(output, keeps_others=True) as folder:
        write_vision_tower(folder / "vision", hidden_size, 4, image_size, patch_size)
        write_language_model(folder / "language", texts, hidden_size, num_layers, vocab_size)
        write_vae(folder / "vae")
    return output


OPTIONS = {
    "hidden-size": "width of tower and language model, a multiple of 64",
    "num-layers": "layers of the language model",
    "vocab-size": "tokens of the tokenizer that is trained",
    "image-size": "pixels that the tower reads",
    "patch-size": "pixels of a patch",
    "seed": "seed of the new weights",
}


def build_parser() -> CommandParser:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", required=True, help="JSONL of `train.data.tasks`, for the tokenizer")
    parser.add_argument("--output", required=True, help="folder to write")
    defaults = {"hidden-size": 128, "num-layers": 4, "vocab-size": 600, "image-size": 112, "patch-size": 14, "seed": 0}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=OPTIONS[name])
    return parser


def main() -> None:
    arguments = vars(build_parser().parse_args())
    print(write_small(texts_of(*arguments.pop("data")), **arguments))


if __name__ == "__main__":
    with exit_on_error():
        main()
