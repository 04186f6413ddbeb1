"""The page: what it computes without gradio, that it builds with it, and, slow, that it works in a browser.

The last two are skipped where gradio, Playwright and Chromium are missing: `pip install -e ".[demo]" playwright`, and a
`chromium` of the system or `playwright install chromium`.
"""

import http.client
import re
import shutil
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from conftest import picture
from evaluation_material import ship_random

from evaluation.answering import Answer
from examples import chase_tab, page
from examples import demo_common as looking
from train.recipes.small_models import IMAGE_SIZE


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Random models in the place of those that ship."""
    return ship_random(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(looking, "MOST_TOKENS", 6)


@pytest.mark.parametrize("name", ["lare", "vedas"])
def test_an_answer_comes_with_what_its_latents_looked_at(name, checkpoints):
    model, processor = looking.load_checkpoint(name, checkpoints)
    sample = looking.draw_sample("search", 7)
    found = looking.look(model, processor, sample.image, sample.question)
    assert found.answer.num_latents > 0 and found.drawing.width > IMAGE_SIZE
    asked = looking.ask_about(sample.image, sample.question)
    (alone,), _ = looking.answer_with_trace(model, processor, [asked])
    assert alone.text == found.answer.text  # the pictures to swap with are asked in the same batch
    assert len({found.without, found.answer.text, found.swapped}) == 3


def test_no_latents_is_said(checkpoints):
    """A random DeepLatent opens no block by itself."""
    sample = looking.draw_sample("search", 7)
    found = page.new_picture("search", 7)
    assert found[:2] == (sample.image, sample.question)
    shown = page.answer("deeplatent", *found, checkpoints)
    assert shown[2:4] == (page.NOTHING, None) and shown[5].startswith("0 latent blocks, 0 latents, ")
    assert shown[0].endswith(f"(wrong, it is {sample.answer})") and shown[1] == looking.told(shown[4])


def test_right_is_said_of_drawn_questions_alone():
    known = {"kind": "search", "question": "what?", "answer": "red"}
    result = looking.Look(Answer("The answer is \\boxed{Red}.", 7, 1, 4, "eos"), None, "blue", None)
    assert page.describe("lare", result, "what?", known)[0] == "Red (right)"
    assert page.describe("lare", result, "what?", known)[5] == "1 latent step, 4 latents, 7 tokens of text"
    assert page.describe("lare", result, "what else?", known)[0] == "Red"
    assert page.describe("lare", result, "what?", page.forget(known))[0] == "Red"


def test_pictures_are_new_and_fit():
    first, second = (page.new_picture("search") for _ in range(2))
    assert first[0] != second[0] and first[0].size == (IMAGE_SIZE, IMAGE_SIZE)
    assert looking.draw_sample("search", 3).id != looking.draw_sample("search", 3, 1).id
    assert looking.prepare_picture(picture(500, 90).convert("L")).size == (IMAGE_SIZE, IMAGE_SIZE)


@pytest.mark.parametrize(
    "picture, question, message",
    [(None, "what?", "A picture is needed"), (picture(), " ", "got 0"), (picture(), "a" * 201, "got 201")],
)
def test_what_cannot_be_asked(picture, question, message):
    with pytest.raises(ValueError, match=message):
        looking.look(None, None, picture, question)


def test_unknown_kinds_and_missing_checkpoints_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"one of \['jigsaw', 'search'\], got 'maze'"):
        looking.draw_sample("maze", 0)
    with pytest.raises(ValueError, match="no checkpoint 'lare' in .*make train-lare"):
        page.answer("lare", *page.new_picture("search", 0), tmp_path)


def test_the_page_builds_and_asks_nobody(checkpoints):
    pytest.importorskip("gradio", reason="gradio is not installed")
    built = page.build_page(checkpoints)
    labels = {block.label for block in built.blocks.values() if getattr(block, "label", None)}
    assert {"Architecture", "Picture", "Question", "Answer", "Without latents"} <= labels
    assert "Replace the latent of step" not in labels  # no serial checkpoint is among these
    texts = [str(getattr(block, "value", "")) for block in built.blocks.values()]
    assert chase_tab.NO_SERIAL in texts
    assert not built.analytics_enabled


def test_the_page_has_a_tab_for_chases_where_a_serial_checkpoint_ships():
    pytest.importorskip("gradio", reason="gradio is not installed")
    built = page.build_page()
    labels = {block.label for block in built.blocks.values() if getattr(block, "label", None)}
    assert {"Model", "Hops", "Replace the latent of step", "Answer now", "Whose answer is it?"} <= labels
    assert {"New chase", "Ask"} <= {
        getattr(block, "value", None) for block in built.blocks.values() if block.get_block_name() == "button"
    }


def test_a_latent_is_replaced_over_http(monkeypatch):
    """As the page's own script asks, with what one visitor has drawn kept from request to request."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    from gradio_client import Client

    monkeypatch.setattr(looking, "MOST_TOKENS", 64)
    monkeypatch.setattr(
        chase_tab, "secrets", SimpleNamespace(randbelow=lambda most: 11)
    )  # a chase that is answered right
    built = page.build_page()
    _, url, _ = page.launch(built, prevent_thread_lock=True)
    try:
        name, client = chase_tab.serial_names()[0], Client(url, verbose=False)
        with pytest.raises(Exception, match="A chase is needed"):
            client.predict(name, "all", api_name="/replace_latent")
        way, lent, step, changed, answer, whose = client.predict(name, 3, api_name="/new_chase")
        assert way != lent and (step, changed) == ("none", None) and whose.startswith("Its own")
        changed, now, whose = client.predict(name, "all", api_name="/replace_latent")
        assert changed and now != answer and whose.startswith(now)
    finally:
        built.close()


def test_only_pages_of_this_machine_are_answered_and_uploads_are_limited(checkpoints):
    pytest.importorskip("gradio", reason="gradio is not installed")
    built = page.build_page(checkpoints)
    _, url, _ = page.launch(built, prevent_thread_lock=True)
    port = urlsplit(url).port

    def ask(method: str = "GET", path: str = "/config", body: bytes | None = None, **headers: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.putrequest(method, path, skip_host=True)
            sent = {"Host": f"127.0.0.1:{port}"} | {name.replace("_", "-"): value for name, value in headers.items()}
            for name, value in sent.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            return connection.getresponse().status
        finally:
            connection.close()

    try:
        assert ask() == ask(Host=f"localhost:{port}") == ask(Origin=url.rstrip("/")) == 200
        for wrong in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "[", "169.254.169.254"):
            assert ask(Host=wrong) in (400, 403)
        for wrong in ("http://evil.example", "null", "https://127.0.0.1.evil.example", "file://", "http://["):
            assert ask(Origin=wrong) == 403
        most = page.LARGEST_UPLOAD
        upload = {"method": "POST", "path": "/gradio_api/upload", "Content_Type": "multipart/form-data; boundary=x"}
        assert ask(**upload, Content_Length=str(most + 1)) == 413
        assert ask(**upload, Transfer_Encoding="chunked") == 413
        body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nabc\r\n--x--\r\n'
        assert ask(**upload, Content_Length=str(len(body)), body=body) == 200
    finally:
        built.close()


@pytest.mark.slow
def test_the_page_works_in_a_browser(checkpoints):
    pytest.importorskip("gradio", reason="gradio is not installed")
    browser = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    built = page.build_page(checkpoints)
    _, url, _ = page.launch(built, prevent_thread_lock=True)
    asked = []
    try:
        with browser.sync_playwright() as playwright:
            try:
                chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
            except browser.Error as error:
                pytest.skip(f"no Chromium: {error}")
            tab = chromium.new_page()
            tab.on("request", lambda request: asked.append(request.url))
            tab.goto(url)
            tab.get_by_label("vedas", exact=True).first.check()
            tab.get_by_role("button", name="New picture to search").click()
            question = tab.get_by_label("Question")
            browser.expect(question).to_have_value(re.compile("^What color is the "), timeout=60_000)
            tab.get_by_role("button", name="Ask").click()
            browser.expect(tab.locator("#drawing img")).to_be_visible(timeout=120_000)
            browser.expect(tab.get_by_label("At a cost of")).to_have_value(re.compile("latents?, . tokens"))
            question.fill("")
            tab.get_by_role("button", name="Ask").click()
            browser.expect(tab.get_by_text("got 0")).to_be_visible(timeout=60_000)
            chromium.close()
    finally:
        built.close()
    hosts = {urlsplit(one).hostname for one in asked if not one.startswith(("data:", "blob:"))}
    assert hosts == {"127.0.0.1"}
