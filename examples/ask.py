"""Ask a model about a picture, count its latent blocks and draw them.

python -m examples.ask MODEL PICTURE "What is in the picture?" --min-blocks 1 --draw trace.png
"""

import argparse

from PIL import Image
from transformers import AutoModel, AutoProcessor

from processing_latentvlm import draw_trace


def ask(model, processor, image: Image.Image, question: str, min_blocks: int = 0, max_new_tokens: int = 64):
    """Return the answer's text and everything that `generate` returned with it."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        min_latent_blocks=min_blocks,
        max_latent_blocks=max(min_blocks, model.config.max_latent_blocks),
        return_dict_in_generate=True,
        output_latents=True,
    )
    answer = processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip(), output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("picture")
    parser.add_argument("question")
    parser.add_argument("--min-blocks", type=int, default=0)
    parser.add_argument("--draw", help="PNG to draw the trace to")
    args = parser.parse_args()
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModel.from_pretrained(args.model, trust_remote_code=True, dtype="auto")
    image = Image.open(args.picture)
    answer, output = ask(model, processor, image, args.question, args.min_blocks)
    print(f"Answer: {answer}")
    print(f"blocks: {output.num_latent_blocks.item()}")
    if args.draw and output.latent_trace.steps:
        draw_trace(output.latent_trace, [image], args.draw)
        print(f"trace: {args.draw}")


if __name__ == "__main__":
    main()
