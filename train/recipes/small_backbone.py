"""Make a small Qwen2.5-VL backbone with random weights and a tokenizer of its own, to train from nothing on a CPU.

    python -m train.data.tasks --task all --n 2000 --seed 0 --image-size 112 --output data/tasks
    python -m train.recipes.small_backbone --data data/tasks/data.jsonl --output out/backbone
    python -m conversion.convert_vedas --backbone out/backbone --output out/vedas

The folder looks like a published backbone: the converters take it as they take one from the Hub.
"""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from conversion.commands import CommandParser, exit_on_error
from conversion.writing import replaced_folder
from train.data.small_tokenizer import CHAT_TEMPLATE, texts_of, train_tokenizer


PATCH = 14


def build_config(tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int) -> Qwen2_5_VLConfig:
    """About `12 * num_layers * hidden_size**2` weights in the language model, a third of them in the vision tower."""
    token = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": -(-(len(tokenizer) + 8) // 8) * 8,  # with room for latent tokens
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": hidden_size // 32,
            "num_key_value_heads": hidden_size // 64,
            "initializer_range": hidden_size
            ** -0.5,  # the usual 0.02 is for widths of thousands: here attention would start flat
            "max_position_embeddings": 2048,
            # Columns of a picture get the slowest six of 16 frequencies: at 1e4 those of four columns differ by 0.01 in angle.
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": max(2, num_layers // 2),
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_heads": hidden_size // 32,
            "out_hidden_size": hidden_size,
            "patch_size": PATCH,
            "window_size": 8 * PATCH,
            "fullatt_block_indexes": list(range(max(2, num_layers // 2))),
        },
        tie_word_embeddings=True,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )


def write_backbone(
    texts: list[str],
    output: str | Path,
    hidden_size: int = 128,
    num_layers: int = 6,
    vocab_size: int = 600,
    seed: int = 0,
) -> Path:
    """Write a backbone folder with random weights.

    Raises:
        ValueError: a hidden size that is no multiple of 64, or fewer than 2 layers.
    """
    if hidden_size < 64 or hidden_size % 64 or num_layers < 2:
        raise ValueError(
            f"`hidden_size` must be a multiple of 64 and `num_layers` >= 2, got {hidden_size} and {num_layers}."
        )
    tokenizer = train_tokenizer(texts, vocab_size)
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(build_config(tokenizer, hidden_size, num_layers))
    smallest = (2 * PATCH) ** 2
    images = Qwen2VLImageProcessorPil(patch_size=PATCH, min_pixels=4 * smallest, max_pixels=256 * smallest)
    with replaced_folder(output, keeps_others=True) as folder:
        for part in (model, tokenizer, images):
            part.save_pretrained(folder)
    return Path(output)


OPTIONS = {
    "hidden-size": "width of the language model",
    "num-layers": "layers of the language model",
    "vocab-size": "tokens of the tokenizer that is trained",
    "seed": "seed of the new weights",
}


def build_parser() -> CommandParser:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", required=True, help="JSONL of `train.data.tasks`, for the tokenizer")
    parser.add_argument("--output", required=True, help="folder to write")
    for name, default in {"hidden-size": 128, "num-layers": 6, "vocab-size": 600, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=OPTIONS[name])
    return parser


def main() -> None:
    arguments = vars(build_parser().parse_args())
    print(write_backbone(texts_of(*arguments.pop("data")), **arguments))


if __name__ == "__main__":
    with exit_on_error():
        main()
