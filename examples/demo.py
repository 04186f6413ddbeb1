"""What `make demo` runs: a question about a real photo, one latent block on the way, and a picture of it.

Until checkpoints trained by this library ship with it, the model is the real SmolLM2-135M-Instruct language model with a
fresh vision tower and fresh latent modules: it writes English, but it has never seen anything.
"""

from pathlib import Path

from PIL import Image
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging

from configuration_latentvlm import DeepLatentConfig, __version__
from conversion.convert_deeplatent import convert_deeplatent
from conversion.fetch_assets import FORMAT, fetch_smollm2_backbone, find_cache_root
from processing_latentvlm import draw_trace


PHOTO = Path("train/photos/chelsea.jpg")
TRACE = Path("out/demo_trace.png")
QUESTION = "What animal is in the picture?"
UNTRAINED = (
    "Its sight is untrained: the language is SmolLM2's, but the vision tower and the latent modules are at their random start. "
    "The answer is a guess from the words alone, and the picture shows where untrained latents look."
)


def demo_checkpoint() -> Path:
    """Convert the backbone once a version; later calls refresh the code in the folder alone."""
    folder = find_cache_root() / f"deeplatent-smollm2-135m-{__version__}-{FORMAT}"
    if (folder / "config.json").is_file():
        DeepLatentConfig.from_pretrained(folder).save_pretrained(folder)
        return folder
    return convert_deeplatent(fetch_smollm2_backbone(), folder, dtype="float32")


def encode(processor, messages: list[dict]):
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def main() -> None:
    folder = demo_checkpoint()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    # Untrained features are noise to the language model: a few of them leave it its English.
    processor.image_processor.size = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 64}
    image = Image.open(PHOTO)

    # Turn 1: look. One block is forced, so that the whole path runs: controls, size, LatentFormer, insertion.
    look = {
        "role": "user",
        "content": [{"type": "image", "image": image}, {"type": "text", "text": "Look at the picture."}],
    }
    seen = model.generate(
        **encode(processor, [look]),
        min_latent_blocks=1,
        max_latent_blocks=1,
        max_new_tokens=2,  # `<latent>`, and what follows its block
        do_sample=False,
        return_dict_in_generate=True,
        output_latents=True,
    )
    (step,) = seen.latent_trace.steps

    # Turn 2: the block stands in the history, at its size; the answer is read behind it.
    history = [look, {"role": "assistant", "content": [{"type": "latent", "grid": step.grid}]}]
    inputs = encode(processor, [*history, {"role": "user", "content": [{"type": "text", "text": QUESTION}]}])
    output = model.generate(**inputs, max_latent_blocks=0, max_new_tokens=32, do_sample=False)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    TRACE.parent.mkdir(exist_ok=True)
    draw_trace(seen.latent_trace, [image], TRACE)
    print(f"Question: {QUESTION} ({PHOTO})")
    print(f"Answer: {answer}")
    print(f"blocks: {seen.num_latent_blocks.item()} ({step.grid[0]} x {step.grid[1]} latents)")
    print(f"trace: {TRACE}")
    print(UNTRAINED)


if __name__ == "__main__":
    main()
