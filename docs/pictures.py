"""Make the pictures of README and docs from the checkpoints that ship: docs/trace.png, docs/page.png and docs/block.svg.

`serial_pictures.py` makes the others.

    python -m docs.pictures --architecture lare --trace 2

Needs what the page needs, Playwright and a Chromium. The trace is the one that `make demo` draws for that question. `python -m
docs.diagrams` draws block.svg alone, and needs nothing.
"""

import re
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect, sync_playwright

from conversion.commands import CommandParser, exit_on_error
from docs import diagrams
from docs.serial_pictures import save_small
from examples import demo, page
from examples.demo_common import NAMES
from train.recipes.shipping import CHECKPOINTS


DOCS = Path(__file__).parent
SIZE = {"width": 1080, "height": 640}


def shoot_page(folder: Path, architecture: str, path: Path) -> None:
    """Open the page, ask its first question, and save what it shows."""
    built = page.build_page(folder)
    _, url, _ = page.launch(built, prevent_thread_lock=True)
    program = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
            tab = chromium.new_page(viewport=SIZE)
            tab.goto(url)
            tab.get_by_label(architecture, exact=True).check()
            tab.get_by_role("button", name="Ask").click()
            expect(tab.get_by_label("At a cost of")).to_have_value(re.compile("tokens"), timeout=120_000)
            tab.wait_for_timeout(1000)  # the drawing is fetched after it
            tab.screenshot(path=path, full_page=True)
            chromium.close()
    finally:
        built.close()


def build_parser() -> CommandParser:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", choices=NAMES, default=NAMES[0], help="whose picture is made")
    parser.add_argument("--trace", type=int, default=1, help="number of the demo's question whose trace is shown")
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="folder of the checkpoints that ship")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder for the pictures")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    diagrams.main(args.output)
    with tempfile.TemporaryDirectory() as drawn:
        demo.main(["--checkpoints", str(args.checkpoints), "--output", drawn, "--n", str(max(6, args.trace))])
        trace = Path(drawn) / f"{args.architecture}-{args.trace}.png"
        if not trace.is_file():
            raise ValueError(f"{args.architecture} took no latents for question {args.trace}: try another.")
        save_small(Image.open(trace), args.output / "trace.png")
        shot = Path(drawn) / "page.png"
        shoot_page(args.checkpoints, args.architecture, shot)
        save_small(Image.open(shot), args.output / "page.png")


if __name__ == "__main__":
    with exit_on_error():
        main()
