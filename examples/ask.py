"""Ask a model of any architecture about a picture, count what its latents were, and draw where they looked.

python -m examples.ask checkpoints/lare picture.png "What is in the picture?" --draw trace.png
"""

from PIL import Image

from conversion.commands import CommandParser, exit_on_error
from conversion.reading import check_config_file


def ask(model, processor, image: Image.Image, question: str, min_blocks: int = 0, max_new_tokens: int = 256):
    """Return the answer's text and everything that `generate` returned with it.

    Args:
        min_blocks: latent blocks that the answer opens at least; models that take steps always take theirs.

    Raises:
        ValueError: `min_blocks` for a model without blocks.
    """
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    blocks = {}
    if min_blocks:
        blocks = model.config.force_latents(min_blocks)
    output = model.generate(
        **inputs,
        **blocks,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_latents=True,
    )
    answer = processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip(), output


def count_latents(model, output) -> str:
    """In words what a single answer took."""
    return (
        f"{model.config.latent_unit}s: {int(output.num_latent_blocks.sum())}, latents: {int(output.num_latents.sum())}"
    )


def build_parser() -> CommandParser:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id of a checkpoint")
    parser.add_argument("picture", help="image file")
    parser.add_argument("question", help="question about the picture, in quotes")
    parser.add_argument(
        "--min-blocks", type=int, default=0, help="latent blocks that the answer opens at least (DeepLatent)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="budget of the answer")
    parser.add_argument("--draw", help="PNG to draw the trace to")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    with exit_on_error():
        # Imported here: they take seconds, which `--help` and a wrong option need not wait for.
        from transformers import AutoModel, AutoProcessor

        from processing_latentvlm import draw_trace
        from processing_latentvlm.pictures import open_picture

        image = open_picture(args.picture, args.picture)
        check_config_file(args.model)
        processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
        model = AutoModel.from_pretrained(args.model, trust_remote_code=True, dtype="auto")
        answer, output = ask(model, processor, image, args.question, args.min_blocks, args.max_new_tokens)
        print(f"Answer: {answer}")
        print(count_latents(model, output))
        if args.draw and output.latent_trace.steps:
            draw_trace(output.latent_trace, [image], args.draw)
            print(f"trace: {args.draw}")


if __name__ == "__main__":
    main()
