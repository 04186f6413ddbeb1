"""The page: what it computes without gradio, that it builds with it, and, slow, that it works in a browser.

The last two are skipped where gradio, Playwright and Chromium are missing: `pip install -e ".[demo]" playwright`, and a
`chromium` of the system or `playwright install chromium`.
"""

import shutil
from urllib.parse import urlsplit

import pytest
from conftest import picture
from evaluation_material import save_checkpoint

from examples import looking, page
from train.checkpoints import SUMS, WEIGHTS, digest


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Random models in the place of those that ship."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in looking.NAMES:
        save_checkpoint(name, folder / name)
    lines = [f"{digest(folder / name / WEIGHTS)}  {name}/{WEIGHTS}\n" for name in looking.NAMES]
    (folder / SUMS).write_text("".join(lines))
    return folder


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(looking, "MOST_TOKENS", 6)


@pytest.mark.parametrize("name", looking.NAMES)
def test_an_answer_comes_with_what_its_latents_looked_at(name, checkpoints):
    model, processor = looking.load_checkpoint(name, checkpoints)
    if name == "deeplatent":  # a random one opens no block by itself
        model.generation_config.min_latent_blocks = 1
    sample = looking.draw_sample("search", 7)
    found = looking.look(model, processor, sample.image, sample.question)
    assert found.answer.num_latents > 0 and found.drawing.width > looking.SIDE
    asked = looking.ask_about(sample.image, sample.question)
    (alone,), _ = looking.answer_with_trace(model, processor, [asked])
    assert alone.text == found.answer.text
    assert found.without != found.answer.text and found.swapped is not None
