"""A page on this machine: pick a picture, ask one of the checkpoints, and see where its latents look.

    pip install -c constraints.txt -e ".[demo]"
    python -m examples.page        # http://127.0.0.1:7860

Only this machine is answered, nothing is sent anywhere, and nothing is fetched.
"""

import os
import secrets
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from conversion.commands import CommandParser, exit_on_error
from examples.chase_tab import build_tab
from examples.demo_common import (
    LONGEST,
    NAMES,
    Look,
    check_checkpoints,
    count_latents,
    draw_sample,
    is_right,
    load_checkpoint,
    look,
    told,
)
from train.recipes.shipping import CHECKPOINTS


TITLE = "Where do the latents look?"
ABOUT = (
    "Small models (1 to 2 million weights) that reason in latent space, trained on two kinds of question: the color of one "
    "shape among many, and which piece of a puzzle belongs where. Of other pictures and questions they know nothing, and "
    "answer all the same."
)
BUTTONS = {"search": "New picture to search", "jigsaw": "New puzzle"}
# Pictures have few pixels, and are shown larger than they are.
STYLE = "#picture img { width: 100% !important; height: 100% !important; object-fit: contain !important; }"
NOTHING = "(no latents to swap)"
LARGEST_UPLOAD = 10 * 2**20  # bytes
HOSTS = ("127.0.0.1", "localhost")  # a page of another site may send requests here, under its own name or origin


def new_picture(kind: str, seed: int | None = None):
    """(picture, question, what is known of it) for a fresh picture."""
    sample = draw_sample(kind, secrets.randbelow(2**31) if seed is None else seed)
    return sample.image, sample.question, {"kind": kind, "question": sample.question, "answer": sample.answer}


def forget(known: dict) -> dict:
    """What is left to know when somebody brings a picture of their own."""
    return {"kind": known["kind"]}


def describe(name: str, result: Look, question: str, known: dict) -> tuple:
    """(answer, without latents, with another picture's, drawing, what it wrote, counts) as the page shows them."""
    said, right = told(result.answer.text), known.get("answer")
    if right is not None and question == known["question"]:
        said += " (right)" if is_right(result.answer.text, right) else f" (wrong, it is {right})"
    swapped = NOTHING if result.swapped is None else told(result.swapped)
    counts = f"{count_latents(name, result.answer)}, {result.answer.num_tokens} tokens of text"
    return said, told(result.without), swapped, result.drawing, result.answer.text, counts


def answer(name: str, picture, question: str, known: dict, folder: Path = CHECKPOINTS) -> tuple:
    """What the page shows when somebody asks.

    Raises:
        ValueError: no picture, no question, or no such checkpoint.
    """
    model, processor = load_checkpoint(name, folder)
    # Another seed than any that was drawn: pictures to swap with are other pictures.
    result = look(model, processor, picture, question, known["kind"], seed=2**31)
    return describe(name, result, question, known)


def build_page(folder: Path = CHECKPOINTS):
    """The page as `gradio.Blocks`; importing this module does not need gradio."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    def guard(function):
        def shown(*inputs):
            try:
                return function(*inputs)
            except ValueError as error:
                raise gr.Error(str(error)) from error

        return shown

    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}")
        with gr.Tab("Look"):
            build_looking(gr, guard, folder)
        with gr.Tab("Chase"):
            build_tab(gr, guard, folder)
    return page


def build_looking(gr, guard, folder: Path) -> None:
    """The tab in which any picture is asked about; arguments as in `build_tab`."""
    first_picture, first_question, first_known = new_picture("search", seed=0)
    known = gr.State(first_known)
    gr.Markdown(ABOUT)
    with gr.Row():
        with gr.Column(scale=2):
            name = gr.Radio(NAMES, value=NAMES[0], label="Architecture")
            picture = gr.Image(
                first_picture,
                type="pil",
                sources=["upload"],
                label="Picture",
                height=300,
                buttons=[],
                elem_id="picture",
            )
            with gr.Row():
                buttons = {kind: gr.Button(label) for kind, label in BUTTONS.items()}
            question = gr.Textbox(first_question, label="Question", max_length=LONGEST)
            go = gr.Button("Ask", variant="primary")
        with gr.Column(scale=3):
            with gr.Row():
                told_as = gr.Textbox(label="Answer", max_lines=3)
                without = gr.Textbox(label="Without latents", max_lines=3)
                swapped = gr.Textbox(label="With another picture's latents", max_lines=3)
            gr.Markdown("Where its latents looked")
            drawing = gr.Image(show_label=False, format="png", buttons=["download", "fullscreen"], elem_id="drawing")
            written = gr.Textbox(label="What it wrote")
            counts = gr.Textbox(label="At a cost of")
    shown = [told_as, without, swapped, drawing, written, counts]
    for kind, button in buttons.items():
        button.click(partial(new_picture, kind), None, [picture, question, known])
    picture.upload(forget, known, known)
    ask = guard(partial(answer, folder=folder))
    gr.on([go.click, question.submit], ask, [name, picture, question, known], shown)


def host_of(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:  # such as a bracket that is not closed
        return None


class LocalOnly:
    """Middleware that answers requests of this machine's own pages alone, and bodies of a limited size.

    A site that somebody visits can make their browser send requests here: under a name that it lets point to this machine (the
    `Host` tells), or from a page of its own (the `Origin` tells).
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get("origin")
        hosts = [host_of(f"//{headers.get('host', '')}"), HOSTS[0] if origin is None else host_of(origin)]
        length = headers.get("content-length", "0")
        if any(host not in HOSTS for host in hosts):
            refusal = 403, b"Only pages of this machine are answered."
        elif not length.isdecimal() or int(length) > LARGEST_UPLOAD or "transfer-encoding" in headers:
            refusal = 413, b"At most %d bytes are taken, and their number must be said." % LARGEST_UPLOAD
        else:
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        await send(
            {"type": "http.response.start", "status": refusal[0], "headers": [(b"content-type", b"text/plain")]}
        )
        await send({"type": "http.response.body", "body": refusal[1]})


def launch(page, port: int | None = None, **settings):
    """Serve the page to this machine alone, in fonts that it has."""
    import gradio as gr
    from starlette.middleware import Middleware

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return page.launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        theme=theme,
        css=STYLE,
        footer_links=[],
        quiet=True,
        max_file_size=LARGEST_UPLOAD,
        app_kwargs={"middleware": [Middleware(LocalOnly)]},
        **settings,
    )


def build_parser() -> CommandParser:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=7860, help="port of the page on this machine")
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="folder of the checkpoints that ship")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    check_checkpoints(args.checkpoints)  # what is missing is said now, and the first question does not wait
    print(f"http://127.0.0.1:{args.port}", flush=True)
    launch(build_page(args.checkpoints), args.port)


if __name__ == "__main__":
    with exit_on_error():
        main()
