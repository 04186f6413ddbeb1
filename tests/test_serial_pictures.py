"""The README's pictures of serial questions: the staircase that a report holds, and a chase that is answered right."""

import json

import numpy as np
import pytest
from PIL import Image

from docs import serial_pictures


def report(right: dict[tuple[int, int], float], **about) -> dict:
    """A report whose D14 has these accuracies, by (latents given, need)."""
    rows = [
        {"given": str(given), "need k": str(need), "items": 9, "accuracy": value, "low": value - 5, "high": value + 5}
        | {"chance": 12.5, "mean latents": 1.0 * given}
        for (given, need), value in right.items()
    ]
    rows.append(rows[0] | {"need k": "all"})
    return {"about": about, "diagnostics": {"D14": {"tables": {"accuracy": rows}}}}


STAIRS = {(given, need): 95.0 if need <= given else 15.0 for given in range(4) for need in (1, 2, 3)}


def test_a_staircase_is_read_and_drawn(tmp_path):
    full, alone = tmp_path / "a" / "faithfulness.json", tmp_path / "mine" / "need.json"
    for path, content in (
        (full, report(STAIRS, architecture="lare")),
        (alone, report(STAIRS)["diagnostics"]["D14"]),
    ):
        path.parent.mkdir()
        path.write_text(json.dumps(content))
    name, rows = serial_pictures.read_need(full)
    assert name == "LaRe" and serial_pictures.read_need(alone)[0] == "mine" and len(rows) == 12
    series = serial_pictures.series_of(rows)
    assert series[2] == [(0, 15.0, 10.0, 20.0), (1, 15.0, 10.0, 20.0), (2, 95.0, 90.0, 100.0), (3, 95.0, 90.0, 100.0)]
    sized = [row | {"given": f"{row['given']} x 2", "mean latents": 2.0 * int(row["given"])} for row in rows]
    assert [point[0] for point in serial_pictures.series_of(sized)[1]] == [0.0, 2.0, 4.0, 6.0]  # sizes of one block
    serial_pictures.main(["staircase", str(full), "--output", str(tmp_path)])
    one = Image.open(tmp_path / "staircase.png").size
    serial_pictures.main(["staircase", str(full), str(alone), "--output", str(tmp_path)])
    two = Image.open(tmp_path / "staircase.png")
    assert two.width > 1.5 * one[0] and two.height == one[1]
    drawn = {tuple(color) for color in np.asarray(two.convert("RGB")).reshape(-1, 3)}
    lines = [tuple(int(color[at : at + 2], 16) for at in (1, 3, 5)) for color in serial_pictures.COLORS]
    assert [line in drawn for line in lines[:4]] == [True, True, True, False]  # one for each need


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "be a faithfulness.json"),
        ("[]", "it holds none"),
        (json.dumps({"diagnostics": {}}), "it holds none"),
        (json.dumps({"diagnostics": {"D14": {"tables": {}, "not_applicable": {"all": "no need"}}}}), "no need"),
    ],
)
def test_a_file_without_a_staircase_is_named(content, message, tmp_path):
    path = tmp_path / "faithfulness.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"faithfulness.json must .*{message}"):
        serial_pictures.read_need(path)


def test_a_chase_is_drawn_with_and_without_a_swap(tmp_path, capsys):
    serial_pictures.main(["chase", "--output", str(tmp_path)])
    one = Image.open(tmp_path / "chase.png").size
    serial_pictures.main(["chase", "--replace", "2", "--output", str(tmp_path)])
    assert Image.open(tmp_path / "chase.png").size == (one[0], 2 * one[1])
    assert "this picture followed on from the other's tile: after 2 hops" in capsys.readouterr().out
