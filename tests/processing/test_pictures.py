"""The one function that opens pictures: every kind of input, what is special about some, and that nobody opens their own."""

import base64
import io
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tokenizer, encode, picture, user_turn
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from evaluation.rows import read_evaluation
from processing_latentvlm import LaReProcessor
from processing_latentvlm.pictures import open_picture, read_size
from processing_latentvlm.processing_lare import REFOCUS_TOKENS
from train.data.chats import read_trajectories
from train.data.reasoning_data import ReasoningSample
from train.deeplatent.trajectories import Trajectories
from train.lare.data import read_llava


ROOT = Path(__file__).resolve().parents[2]
ORIENTATION = 0x0112


def png(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def turned(image: Image.Image, orientation: int = 6, kind: str = "PNG") -> bytes:
    """A file whose pixels lie on their side, and whose EXIF says so."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    buffer = io.BytesIO()
    image.transpose(Image.Transpose.ROTATE_90).save(buffer, kind, exif=exif)
    return buffer.getvalue()


def same(actual: Image.Image, expected: Image.Image) -> bool:
    return actual.mode == "RGB" and actual.size == expected.size and actual.tobytes() == expected.tobytes()


@pytest.fixture
def lare() -> LaReProcessor:
    tokenizer = build_tokenizer(REFOCUS_TOKENS)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    images = CLIPImageProcessorPil(size={"height": 56, "width": 56}, do_center_crop=False)
    return LaReProcessor(images, tokenizer, patch_size=14, image_size=56)


def test_every_kind_of_input_is_the_same_picture(tmp_path):
    image = picture()
    data, path = png(image), tmp_path / "p.png"
    path.write_bytes(data)
    array = np.asarray(image)
    text = base64.b64encode(data).decode()
    given = [
        *(image, str(path), path, data, bytearray(data), memoryview(data), io.BytesIO(data)),
        *({"bytes": data, "path": None}, {"bytes": None, "path": str(path)}, {"path": path}),
        *(text, f"data:image/png;base64,{text}"),
        *(
            array,
            array.transpose(2, 0, 1),
            torch.from_numpy(array.copy()),
            torch.from_numpy(array.copy()).permute(2, 0, 1),
        ),
        *(array / 255, array.astype(np.float32) / 255, array.astype(np.float64), array.astype(np.int64)),
        *(torch.from_numpy(array / 255).float(), np.dstack([array, np.full(array.shape[:2], 255, np.uint8)])),
    ]
    for number, one in enumerate(given):
        assert same(open_picture(one), image), number
        assert read_size(one) == image.size, number
    grey = image.convert("L")
    for one in (grey, np.asarray(grey), np.asarray(grey)[None], np.asarray(grey)[..., None], np.asarray(grey) / 255):
        assert same(open_picture(one), grey.convert("RGB"))
    stream = io.BytesIO(data)
    open_picture(stream), open_picture(stream)  # it is the user's: not closed, and read again


def test_16_bits_are_scaled():
    """Cut off at 255, all but the darkest 256th of the values would be white."""
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    expected = np.rint(ramp / 257).astype(np.uint8)
    image = Image.fromarray(ramp)
    assert image.mode == "I;16"
    tiff = io.BytesIO()
    image.save(tiff, "TIFF")
    whole = Image.fromarray(ramp.astype(np.int32))
    for one in (image, png(image), tiff.getvalue(), whole, ramp, ramp.astype(np.int32)):
        assert np.array_equal(np.asarray(open_picture(one))[..., 0], expected)
    dark = Image.fromarray(np.full((2, 2), 200, np.uint16))  # of 65,535: black
    assert open_picture(png(dark)).getpixel((0, 0)) == (1, 1, 1)
    hidden = open_picture(png(image, transparency=int(ramp[0, 3])))
    assert hidden.getpixel((3, 0)) == (255, 255, 255) and hidden.getpixel((4, 0)) == (expected[0, 4],) * 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_exif_turns_files_and_opened_pictures_alike(kind, tmp_path):
    image = picture(40, 24)
    data = turned(image, kind=kind)
    path = tmp_path / "turned"
    path.write_bytes(data)
    seen = open_picture(path)
    assert (
        seen.size == (40, 24) and np.abs(np.asarray(seen, int) - np.asarray(image, int)).max() <= (kind == "JPEG") * 60
    )
    for one in (data, Image.open(path), seen):
        assert same(open_picture(one), seen) and read_size(one) == (40, 24)
    assert read_size(path) == (40, 24)


def test_transparency_is_white():
    """What lies under the alpha is nobody's to see: usually black, or rests of what was cut out."""
    pixels = np.zeros((2, 5, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = 200, [[0, 51, 255, 255, 255]] * 2
    expected = [(255, 255, 255), (244, 204, 204), (200, 0, 0)]
    image = Image.fromarray(pixels)
    palette = Image.new("P", (3, 2), 1)
    palette.putpalette([9, 9, 9, 10, 20, 30])
    palette.putpixel((0, 0), 0)
    for one in (image, png(image), pixels, pixels.transpose(2, 0, 1)):
        assert [open_picture(one).getpixel((x, 0)) for x in range(3)] == expected
    seen = open_picture(png(palette, transparency=0))
    assert seen.getpixel((0, 0)) == (255, 255, 255) and seen.getpixel((1, 0)) == (10, 20, 30)
    opaque = picture().convert("RGBA")
    assert same(open_picture(opaque), picture())


def wrong_inputs(folder: Path) -> list:
    """(input, what the error says)."""
    broken = folder / "broken.png"
    broken.write_bytes(b"not a picture")
    pipe = folder / "pipe.png"
    os.mkfifo(pipe)
    eps = io.BytesIO()
    picture().save(eps, "EPS")
    half = png(picture(112, 112))[:900]
    return [
        (None, "NoneType"),
        (5, "int"),
        (2.5, "float"),
        ({}, "`bytes` or `path`"),
        ({"url": "x"}, "`bytes` or `path`"),
        ({"bytes": None}, "NoneType"),
        (b"", "no image of a known format"),
        (half, "cannot be read"),
        (broken, "no image of a known format"),
        (str(folder / "missing.png"), "no such file"),
        ("x." * 2500, "no such file"),
        ("a\0b", "no such file"),
        (folder, "no regular file"),
        (str(pipe), "no regular file"),
        ("data:image/png;base64,%%", "no base64"),
        (eps.getvalue(), "PostScript"),
        (Image.new("RGB", (0, 5)), "at least one pixel"),
        (np.zeros((0, 4, 3), np.uint8), "at least one pixel"),
        (np.zeros((5, 5, 2), np.uint8), r"\(5, 5, 2\)"),
        (np.full((4, 4), np.nan), "nan"),
        (np.full((4, 4), -1.0), "-1.0"),
        (np.full((4, 4), 300.0), "300.0"),
        (np.full((4, 4), 70000), "70000"),
        (np.full((4, 4), "a"), "numbers"),
        (torch.zeros(2, 3, 4, 4, 4), r"\(2, 3, 4, 4, 4\)"),
    ]


def test_what_is_no_picture_is_a_value_error_with_its_index(processor, lare, tmp_path):
    for wrong, message in wrong_inputs(tmp_path):
        with pytest.raises(ValueError, match="^this cannot be read: ") as raised:
            open_picture(wrong, "this")
        assert re.search(message, str(raised.value)), wrong
        for one in (processor, lare):
            with pytest.raises(ValueError, match=r"`images\[0\]\[1\]"):
                one(images=[[picture(), wrong]], text=one.image_token * 2)
    with pytest.raises(ValueError, match="addresses are not fetched here"):
        open_picture("http://127.0.0.1:9/p.png")


def test_bombs_are_refused_before_they_are_decoded(monkeypatch, processor):
    """Pillow's own error is no ValueError, and raises past every handler."""
    data = png(picture(56, 84))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 56 * 84 // 2 - 1)
    for one in (data, picture(56, 84), np.asarray(picture(56, 84))):
        with pytest.raises(ValueError, match=r"`images\[0\].*pixels"):
            processor(images=[one], text=processor.image_token)
        with pytest.raises(ValueError, match="pixels"):
            read_size(one)


def test_processors_read_what_the_function_reads(processor, lare, tmp_path):
    """All the same pixel values; floats in [0, 1] were rescaled twice, and came out black."""
    image = picture()
    path = tmp_path / "p.png"
    path.write_bytes(png(image))
    array = np.asarray(image)
    for one in (processor, lare):
        expected = one.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        for given in (
            path,
            png(image),
            {"bytes": png(image)},
            array / 255,
            torch.from_numpy(array.copy()).permute(2, 0, 1),
        ):
            inputs = one(images=[given], text=one.image_token, return_tensors="pt")
            torch.testing.assert_close(inputs["pixel_values"], expected, rtol=0, atol=0)
            assert torch.equal(encode(one, [user_turn("q", given)])["pixel_values"], expected)
        batch = np.stack([array, array])
        inputs = one(images=batch, text=one.image_token * 2, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], torch.cat([expected, expected]))


def test_who_says_how_arrays_are_read_is_taken_at_their_word(processor, lare):
    """`do_rescale=False` and `input_data_format` are about arrays: as 8 bits these would be wrong."""
    array = np.asarray(picture()).transpose(2, 0, 1)
    for one in (processor, lare):
        expected = one.image_processor(images=[picture()], return_tensors="pt")["pixel_values"]
        given = one(images=[array / 255], text=one.image_token, return_tensors="pt", do_rescale=False)
        torch.testing.assert_close(given["pixel_values"], expected, rtol=0, atol=0.02)
        given = one(images=[array], text=one.image_token, return_tensors="pt", input_data_format="channels_first")
        torch.testing.assert_close(given["pixel_values"], expected, rtol=0, atol=0)


def test_no_images_and_messages_that_are_none(processor, lare):
    for one in (processor, lare):
        plain = one(text="red", return_tensors="pt")["input_ids"]
        for empty in ([], [[]], ()):
            assert torch.equal(one(images=empty, text="red", return_tensors="pt")["input_ids"], plain)
            with pytest.raises(ValueError, match="placeholders"):
                one(images=empty, text=one.image_token)
        with pytest.raises(ValueError, match="an item of `content` must be a dict with a `type`, got 'red'"):
            one.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "a"}, "red"]}])
        with pytest.raises(ValueError, match="must be a text or a list of items, got '5'"):
            one.apply_chat_template([{"role": "user", "content": 5}])
        with pytest.raises(ValueError, match="Message 0 must be a dict"):
            one.apply_chat_template(["red"])
        with pytest.raises(ValueError, match=r"images\[0\]\[0\]|placeholders"):
            encode(one, [[{"role": "user", "content": [{"type": "image", "image": None}]}]])


def test_addresses_are_fetched_by_processors_alone(processor, lare, monkeypatch):
    data = png(picture())

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/p.png" else 404)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        there = f"http://127.0.0.1:{server.server_port}"
        for one in (processor, lare):
            expected = one(images=[picture()], text=one.image_token, return_tensors="pt")["pixel_values"]
            inputs = one(images=[f"{there}/p.png"], text=one.image_token, return_tensors="pt")
            assert torch.equal(inputs["pixel_values"], expected)
            with pytest.raises(ValueError, match=r"`images\[0\]. .*404"):
                one(images=[f"{there}/missing.png"], text=one.image_token)
        monkeypatch.setattr("processing_latentvlm.pictures.MAX_DOWNLOAD", 10)
        with pytest.raises(ValueError, match="more than 10 bytes"):
            processor(images=[f"{there}/p.png"], text=processor.image_token)
    finally:
        server.shutdown()
        server.server_close()
    for wrong in (f"{there}/p.png", "http://", "http://[::1"):  # nobody answers, or no address at all
        with pytest.raises(ValueError, match=r"`images\[0\]. .*cannot be read"):
            processor(images=[wrong], text=processor.image_token)


def test_training_evaluation_and_processor_see_the_same_picture(tmp_path):
    """An EXIF-turned 16-bit picture: every reader of data gives what the processors get."""
    values = (np.arange(24 * 40, dtype=np.uint16) * 64).reshape(24, 40)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(values).save(tmp_path / "p.png", exif=exif)
    expected = open_picture(tmp_path / "p.png")
    assert expected.size == (24, 40)
    (tmp_path / "e.jsonl").write_text('{"id": 1, "question": "q", "answer": "a", "image": "p.png"}')
    (tmp_path / "l.json").write_text(
        '[{"image": "p.png", "conversations": [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]}]'
    )
    shown = '{"type": "image", "image": "p.png"}'
    (tmp_path / "t.jsonl").write_text(
        f'{{"messages": [{{"role": "user", "content": [{shown}]}}, '
        f'{{"role": "assistant", "content": [{shown}, {{"type": "text", "text": "a"}}]}}]}}'
    )
    samples = [
        ReasoningSample([str(tmp_path / "p.png")], "q", [], "a", "here"),
        read_evaluation([tmp_path / "e.jsonl"])[0],
        read_llava(tmp_path / "l.json")[0],
    ]
    for sample in samples:
        assert same(sample.load_images()[0], expected) and sample.image_sizes() == [(24, 40)]
    rows = Trajectories(tmp_path / "t.jsonl")
    assert rows.question_image_sizes(0) == [(24, 40)]
    assert read_trajectories(tmp_path / "t.jsonl")[0]["messages"][0]["content"][0]["image"] == str(tmp_path / "p.png")


def test_nobody_opens_pictures_by_themselves():
    """Two ways to open a picture are two pictures: training saw one, and the model is asked about the other."""
    allowed = {
        "processing_latentvlm/pictures.py",
        "modeling_latentvlm/answer_check.py",  # the picture of a known answer, a plain PNG that we wrote; the processor opens it
        "docs/pictures.py",  # shrinks screenshots
        "docs/serial_pictures.py",  # reads what it has drawn
    }
    pattern = re.compile(r"Image\.open\(|load_image\(\w*url|exif_transpose|fetch_images|from PIL\.Image import")
    folders = ("*_latentvlm", "train", "evaluation", "examples", "conversion", "benchmarks", "docs")
    files = [path for folder in folders for path in ROOT.glob(f"{folder}/**/*.py")]
    found = {path.relative_to(ROOT).as_posix() for path in files if pattern.search(path.read_text(encoding="utf-8"))}
    assert found <= allowed and "processing_latentvlm/pictures.py" in found
