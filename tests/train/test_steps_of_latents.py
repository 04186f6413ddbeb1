"""D14, D15 and D16 on models of which it is known what each latent holds (`serial_toy.py`), and on all architectures."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from serial_toy import MOVES, serial_items, serial_subject
from test_faithfulness import data, make, makers  # noqa: F401
from toy_subject import toy_subject

from evaluation.faithfulness.__main__ import summary
from evaluation.faithfulness.items import NotApplicable, read_items, read_serial
from evaluation.faithfulness.lending import table_of
from evaluation.faithfulness.looked_at import Look, describe, maps_of, touch
from evaluation.faithfulness.need import measure_need
from evaluation.faithfulness.report import write_report
from evaluation.faithfulness.run import DIAGNOSTICS
from evaluation.faithfulness.serial_items import Unit, Way, at_unit, find_units, find_ways
from evaluation.faithfulness.step_content import measure_step_content
from evaluation.faithfulness.subject import Answer, Arm
from evaluation.faithfulness.whose_answer import measure_whose_answer
from modeling_latentvlm.trace import LatentStep
from train.data.tasks import generate_sample


KINDS = ("steps", "useless", "first")
NEEDS = range(1, MOVES + 1)
WAYS = [Way(item) for item in serial_items()]


@pytest.fixture(scope="module", params=KINDS)
def found(request) -> tuple[str, dict]:
    """A kind of model, and what the three diagnostics say of it over 128 questions, 32 of each need."""
    subject = serial_subject(request.param)
    return request.param, {
        "D14": measure_need(subject),
        "D15": measure_whose_answer(subject),
        "D16": measure_step_content(subject),
    }


# D14


def test_as_many_latents_serve_as_the_question_needs(found):
    kind, results = found
    rows = {(row["given"], row["need k"]): row for row in results["D14"].tables["accuracy"]}
    assert set(rows) == {(str(n), need) for n in range(5) for need in ("all", "1", "2", "3", "4")}
    for given in range(5):
        for need in NEEDS:
            is_right = {"steps": need <= given, "useless": True, "first": given > 0}[kind]
            row = rows[str(given), str(need)]
            assert (row["items"], row["accuracy"], row["chance"]) == (32, 100 * is_right, 12.5)
            assert row["low"] < row["high"] and row["low"] <= row["accuracy"] <= row["high"]
        assert rows[str(given), "all"]["mean latents"] == given
        assert rows[str(given), "all"]["items"] == 128
    steps = results["D14"].tables["staircase"]
    assert [row["latents n"] for row in steps] == [0, 1, 2, 3, 4]
    assert [row["k <= n, items"] for row in steps] == [0, 32, 64, 96, 128] and math.isnan(steps[0]["k <= n"])
    served = {"steps": [0, 1, 2, 3, 4], "useless": [4] * 5, "first": [0, 4, 4, 4, 4]}[kind]
    assert [row["serves k up to"] for row in steps] == served
    if kind == "steps":
        assert [row["k <= n"] for row in steps[1:]] == [100] * 4 and [row["k > n"] for row in steps[:4]] == [0] * 4
        assert (
            "k <= n steps with 100.0 % or more, and those that need more with 0.0 % or less" in results["D14"].notes[0]
        )
    assert "chance is 12.5 %" in results["D14"].notes[0]
    (curve,) = results["D14"].curves
    assert {name: [point[0] for point in points] for name, points in curve.series.items()} == {
        f"k = {need}": [0, 1, 2, 3, 4] for need in NEEDS
    }


# D15


def test_whose_answer_a_swap_gives(found):
    kind, results = found
    rows = {(row["swapped"], row["need k"]): row for row in results["D15"].tables["whose answer"]}
    assert set(rows) == {
        (latent, need) for latent in ("all", "1", "2", "3", "4") for need in ("all", "1", "2", "3", "4")
    }
    for latent in ("all", "1", "2", "3", "4"):
        for need in NEEDS:
            row = rows[latent, str(need)]
            goes_on = latent != "all" and need > int(latent)
            whose = {
                "steps": "continued" if goes_on else "donor's",
                "useless": "own",
                "first": "donor's" if latent in ("all", "1") else "own",
            }[kind]
            shares = {name: row[name] for name in ("donor's", "own", "continued")}
            expected = {name: float(name == whose) for name in shares}
            if not goes_on:
                assert math.isnan(shares.pop("continued")) and expected.pop("continued") == 0
            assert shares == expected and row["nobody's"] == 0
            assert (row["items"], row["without donor"]) == (32, 0) and row["own, by chance"] == 0.125
            if latent != "all" and need < int(latent):  # one has arrived: no answer is expected of a chain
                assert math.isnan(row["expected"]) and math.isnan(row["expected, by chance"])
            else:
                assert row["expected"] == row["continued" if goes_on else "donor's"]
            assert row["donor's, low"] <= row["donor's"] <= row["donor's, high"]
            if whose != "own":  # one of six or seven other colors
                assert row[f"{whose}, by chance"] == pytest.approx(1 / 7, abs=0.08)
    share = {"steps": 1.0, "useless": 0.0, "first": None}[kind]
    if share is not None:
        assert all(rows[latent, "all"]["expected"] == share for latent in ("all", "1", "2", "3", "4"))
    assert ("all: 100.0 % (" in results["D15"].notes[0]) == (kind != "useless")


def test_donors_need_as_many_steps_and_all_answers_differ():
    subject = serial_subject("steps", serial_items(64))
    result = measure_whose_answer(subject)
    items = {item.name: item for item in subject.items}
    assert len(result.details["donors"]) == 64 * 5
    for row in result.details["donors"]:
        own, donor = Way(items[row["id"]]), Way(items[row["donor_id"]])
        assert own.need == donor.need and own.answer != donor.answer
        moves = own.need if row["swapped"] == "all" else min(int(row["swapped"]), own.need)
        if moves < own.need:
            on = own.continued(donor.state(moves), moves)
            assert len({own.answer, donor.answer, on}) == 3 and row["answer"] == on
        else:
            assert row["answer"] == donor.answer


def test_items_without_a_donor_are_excluded_and_counted():
    """One question alone needs four steps, so nobody lends to it; two that need one step have the same answer."""
    items = [one for one in serial_items() if one.serial["num_steps"] in (2, 3)][:40]
    items += [one for one in serial_items() if one.serial["num_steps"] == 4][:1]
    same = [one for one in serial_items() if one.serial["num_steps"] == 1 and one.answer == "red"][:2]
    result = measure_whose_answer(serial_subject("steps", items + same))
    rows = {row["need k"]: row for row in result.tables["whose answer"] if row["swapped"] == "all"}
    assert rows["all"]["items"] == 40 and rows["all"]["without donor"] == 3 and set(rows) == {"all", "2", "3"}
    with pytest.raises(NotApplicable, match="no item has a donor"):
        measure_whose_answer(serial_subject("steps", same + items[-1:]))


# D16


def test_probes_find_the_step_that_a_latent_holds(found):
    kind, results = found
    rows = {(row["latent i"], row["step j"]): row for row in results["D16"].tables.get("probes", [])}
    assert len(rows) == 4 * 5
    for (latent, step), row in rows.items():
        assert row["shuffled"] < 0.4 and row["chance"] < 0.4 and row["low"] <= row["accuracy"] <= row["high"]
        least = 1 if step == "min(i, k)" else max(int(latent), int(step))
        moves = int(latent) if step == "min(i, k)" else int(step)
        counts = Counter(way.content(moves) for way in WAYS if way.need >= least)
        assert row["items"] == sum(count for count in counts.values() if count > 1)
        holds = {
            "steps": step in (latent, "min(i, k)"),
            "useless": False,
            "first": latent == "1",
        }[kind]
        # "first" hides it among what else latent 1 says, from a probe that learns from 26 items.
        assert row["accuracy"] >= (1 if kind == "steps" else 0.8) if holds else row["accuracy"] < 0.4, (latent, step)
    note = results["D16"].notes[0]
    assert ("1: 100.0 (shuffled" in note) == (kind != "useless") and ("4: 100.0 (shuffled" in note) == (
        kind == "steps"
    )


def test_replacing_one_latent_costs_what_it_held(found):
    kind, results = found
    rows = {(row["replaced latent"], row["need k"]): row for row in results["D16"].tables["replaced by the mean"]}
    assert len(rows) == 4 * 5
    for (latent, need), row in rows.items():
        is_lost = {"steps": True, "useless": False, "first": latent == "1"}[kind]
        count = 128 if need == "all" else 32
        assert (row["accuracy"], row["clean accuracy"], row["items"]) == (0 if is_lost else 100, 100, count)
        assert (row["b"], row["c"]) == (count if is_lost else 0, 0) and (row["p"] < 1e-9) == is_lost


def test_where_latents_look(found):
    """One token is replayed: that of the step's tile, or the first of the picture, which is the tile of one in 16."""
    kind, results = found
    rows = {(row["latent i"], row["tile of step"]): row for row in results["D16"].tables["where latents look"]}
    assert set(rows) == {(str(i), j) for i in NEEDS for j in (i - 1, i) if j >= 1}
    for (latent, step), row in rows.items():
        assert row["what"] == "replayed tokens" and row["area"] == 1 / 16 and row["items"] == 32 * (5 - step)
        assert 0.01 < row["other items' tiles"] < 0.12
        if kind == "steps":  # at a step's tile; where one has arrived before, at the last
            is_there = step == int(latent)
            assert row["share"] == (1 if is_there else pytest.approx(32 / row["items"]) if step < int(latent) else 0)
        else:
            assert row["share"] < 0.15


# Looks of the other architectures, by hand


def test_windows_and_attention_by_hand():
    unit = Unit("1", ((0, None),), 1)
    lare = LatentStep(
        0, 0, 0, (1, 3), torch.zeros(3, 2), [(4, 4)], windows=[(0, 0, 0, 2, 2), (0, 0, 2, 2, 2), (1, 0, 0, 2, 2)]
    )
    look = maps_of(lare, unit)["windows"]
    assert look.field.sum() == pytest.approx(2 / 3)  # a third lies on another picture
    assert look.field[0, 0] == look.field[1, 2] == pytest.approx(1 / 12) and not look.field[2].any()
    region = torch.zeros(4, 4)
    region[1, 1] = 1
    # One of two windows has the tile; of 9 places where a window of 2 x 2 can be, 4 have it.
    assert touch(look, region) == (0.5, pytest.approx(4 / 9))
    attention = torch.zeros(4, 17)
    attention[:, 16] = 0.5  # on a second picture
    attention[torch.arange(4), torch.tensor([0, 5, 5, 15])] = 0.5
    block = LatentStep(0, 0, 0, (2, 2), torch.zeros(4, 2), [(4, 4), (1, 1)], image_attention=attention)
    assert maps_of(block, unit)["attention"].field[1, 1] == 0.25
    assert maps_of(block, Unit("2-3", ((0, 1), (0, 2)), 2))["attention"].field[1, 1] == 0.5
    vedas = LatentStep(0, 0, 0, (1, 1), torch.zeros(1, 2), [(4, 4)], picked_tokens=torch.tensor([5, 5, 20, 3]))
    vedas.windows = [(0, 0, 0, 2, 2)]  # where most of what was replayed lies: no window of its own
    found = maps_of(vedas, unit)
    assert set(found) == {"replayed tokens"} and found["replayed tokens"].field[1, 1] == 0.5


def test_shares_stand_beside_two_chances():
    """Every look is at the first column; so are the tiles of half of the items."""
    subject = serial_subject("useless", serial_items(16))
    ways = {number: Way(item) for number, item in enumerate(subject.items)}
    field = torch.zeros(4, 4)
    field[:, 0] = 0.25
    for number, item in enumerate(subject.items):
        item.boxes = [(0, 0, 4, 4) if number % 2 else (8, 8, 12, 12)] * 4

    def tile_of(number: int) -> torch.Tensor:
        tile = torch.zeros(4, 4)
        tile[(0, 0) if number % 2 else (2, 2)] = 1
        return tile

    looks = [Look(number, field, []) for number in ways]
    row = describe(subject, ways, looks, 1)
    assert row["share"] == 0.125 and row["area"] == 1 / 16 and row["other items' tiles"] == pytest.approx(0.125)
    # Each looks at its own tile, which 7 of 15 others share.
    seeing = [Look(number, tile_of(number), []) for number in ways]
    row = describe(subject, ways, seeing, 1)
    assert row["share"] == 1 and row["other items' tiles"] == pytest.approx(7 / 15)
    assert "touching" not in row and describe(subject, ways, looks[:1], 1) is None
    assert describe(subject, ways, looks, 4)["items"] == 4 and describe(subject, ways, looks, 0) is None


# Ways, latents and data


def test_ways_of_every_serial_task():
    for task in ("hops", "arrows", "trace"):
        for index in range(6):
            record = json.loads(json.dumps(generate_sample(task, 0, index, image_size=112).record()))
            item = replace(serial_items(1)[0], serial=read_serial(record, "row"))
            way = Way(item)
            assert way.answer == record["answer"] and way.content(99) == way.answer
            assert [way.content(moves) for moves in range(1, way.need + 1)] == [
                text.rsplit(" ", 1)[0] for text in record["rationale"]
            ]
            assert all(way.continued(way.state(moves), moves) == way.answer for moves in range(way.need + 1))
            assert way.continued("nowhere", 1) is None
            assert len(record["boxes"]) == way.need


def test_latents_are_steps_or_parts_of_the_only_block():
    def subject_of(*grids):
        steps = [
            LatentStep(0, index, 0, grid, torch.zeros(math.prod(grid), 2), []) for index, grid in enumerate(grids)
        ]
        subject = toy_subject("useless")
        subject.__dict__["clean"] = [Answer([], "", steps, "eos")]
        return subject, subject.clean[0]

    subject, answer = subject_of((1, 1), (1, 1), (1, 1))
    units = find_units(subject, [0])
    assert [(unit.label, unit.places, unit.number) for unit in units] == [
        (str(n + 1), ((n, None),), n + 1) for n in range(3)
    ]
    subject, answer = subject_of((2, 2))
    units = find_units(subject, [0])
    assert [unit.places for unit in units] == [((0, position),) for position in range(4)]
    subject, answer = subject_of((5, 4))
    units = find_units(subject, [0])
    assert len(units) == 16 and units[0].places == ((0, 0), (0, 1)) and units[0].label == "1-2"
    assert units[-1].places == ((0, 19),) and units[-1].is_in(answer)
    assert not Unit("x", ((0, 20),), 1).is_in(answer) and not Unit("x", ((1, None),), 1).is_in(answer)


def test_data_without_a_need_are_not_applicable():
    subject = toy_subject("content")
    for measure in (measure_need, measure_whose_answer, measure_step_content):
        with pytest.raises(NotApplicable, match="the data do not say how many steps a question needs"):
            measure(subject)
    with pytest.raises(NotApplicable, match="the data do not say"):
        find_ways(subject)


def test_items_that_say_no_need_are_left_out_and_counted():
    items = serial_items(48)
    items[3] = replace(items[3], serial=None)
    result = measure_need(serial_subject("steps", items))
    assert "1 items say no need or took no latents, and are left out." in result.notes
    assert result.tables["accuracy"][0]["items"] == 47


def test_what_data_say_of_a_way_is_checked(tmp_path):
    record = json.loads(json.dumps(generate_sample("hops", 0, 0, image_size=112).record()))
    serial, answer = record["serial"], record["answer"]
    assert read_serial(record, "row") == serial and read_serial({"answer": "x"}, "row") is None
    for changed, message in (
        ({"answer": answer, "serial": {"start": "red"}}, r"row 7: `serial` must hold .*, got \['start'\]"),
        ({"answer": answer, "serial": [1]}, "got list"),
        ({"answer": answer, "serial": serial | {"num_steps": 8}}, "got 8 and a way of 7 moves"),
        ({"answer": answer, "serial": serial | {"num_steps": "2"}}, "got '2'"),
        ({"answer": answer, "serial": serial | {"contents": {}}}, "states all are in `contents`"),
        ({"answer": "nothing", "serial": serial}, "must lead to the answer 'nothing', but after 1 moves there is"),
    ):
        with pytest.raises(ValueError, match=message):
            read_serial(changed, "row 7")
    sample = generate_sample("hops", 0, 0, image_size=112)
    (tmp_path / "images").mkdir()
    for path, picture in zip([record["image"], *record["assistant_images"]], [sample.image, *sample.assistant_images]):
        picture.save(tmp_path / path)
    (tmp_path / "data.jsonl").write_text((json.dumps(record) + "\n") * 4)
    items = read_items(tmp_path / "data.jsonl", "steps", "train", None)
    assert items[0].serial == serial and Way(items[0]).need == len(items[0].boxes) == serial["num_steps"]


# Real models, whose weights are random


def with_ways(subject):
    """Questions that need one step or two in turn; `make` takes every other of the data, whose answers alternate."""
    for number, item in enumerate(subject.items):
        need = 1 + number // 2 % 2
        way = ["blue", item.answer, "white"] if need == 1 else ["blue", "white", item.answer]
        contents = {color: color for color in ("blue", "white", "red", "green")}
        item.serial = {
            "start": "blue",
            "num_steps": need,
            "way": way,
            "following": dict(zip(way, way[1:])) | {"green": "blue", "red": "blue"},
            "contents": contents,
        }
        item.boxes = [(0, 0, 28, 28)] * need
    return subject


@pytest.mark.parametrize(
    "kind, blocks, count",
    [("lare", 0, 3), ("vedas", 0, 2), ("deeplatent", 2, 2), ("deeplatent", 1, None), ("autoregressive", 1, 3)],
)
def test_every_architecture(kind, blocks, count, makers, data):  # noqa: F811 (pytest's fixtures)
    """One or two quarters of the picture are tiles; a swapped latent is the donor's, and what is before it stays."""
    settings = {"min_latent_blocks": blocks} if blocks else {}
    subject = with_ways(make(makers, kind, data, batch_size=4, **settings))
    has_steps = blocks != 1
    units = find_units(subject, subject.with_latents)
    assert count in (None, len(units)) and (units[0].places[0][1] is None) == has_steps
    donors = {0: 1, 1: 0}
    arm = Arm("one", "one", at_unit(table_of(subject, donors), units[1]), only={0, 1}, donors=donors)
    changed = subject.answer(arm, [0, 1])
    for number in (0, 1):
        clean, lent, got = subject.clean[number].steps, subject.clean[1 - number].steps, changed[number].steps
        if has_steps:
            torch.testing.assert_close(got[0].latents, clean[0].latents, atol=1e-4, rtol=1e-4)
            if got[1].grid == lent[1].grid:
                torch.testing.assert_close(got[1].latents, lent[1].latents, atol=1e-4, rtol=1e-4)
        elif got[0].grid == lent[0].grid:
            torch.testing.assert_close(got[0].latents[1], lent[0].latents[1], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(got[0].latents[0], clean[0].latents[0], atol=1e-4, rtol=1e-4)
    rows = {(row["given"], row["need k"]): row for row in measure_need(subject).tables["accuracy"]}
    clean = 100 * sum(subject.is_right(subject.clean)) / 4
    if has_steps:
        assert rows[str(count), "all"]["accuracy"] == clean and rows["0", "all"]["mean latents"] == 0
        assert (
            rows["1", "all"]["mean latents"] * count == rows[str(count), "all"]["mean latents"] or kind == "deeplatent"
        )
    swapped = measure_whose_answer(subject).tables["whose answer"]
    assert {row["swapped"] for row in swapped} <= {"all", *(unit.label for unit in units)}
    assert all(row["items"] + row["without donor"] <= 4 for row in swapped)
    result = measure_step_content(subject)
    if kind == "autoregressive":
        assert "does not say where its latents look" in result.not_applicable["where latents look"]
        return
    looks = result.tables["where latents look"]
    names = {"lare": {"windows", "attention"}, "vedas": {"replayed tokens"}, "deeplatent": {"attention"}}[kind]
    assert {row["what"] for row in looks} == names
    for row in looks:
        assert (
            0 <= row["share"] <= 1
            and row["area"] == 1 / 4
            and row["share"] == pytest.approx(row["other items' tiles"])
        )


# The page


def test_the_page_shows_them_and_the_terminal_says_them(found, tmp_path):
    kind, results = found
    assert {"D14", "D15", "D16"} <= set(DIAGNOSTICS)
    if kind != "steps":
        return
    page, record = write_report(list(results.values()), {"model": kind}, tmp_path)
    text = page.read_text()
    assert all(f'<section id="{name}">' in text for name in results)
    assert text.count("<svg") == sum(len(result.curves) for result in results.values()) == 1 + 4 + 3
    kept = json.loads(record.read_text())["diagnostics"]
    assert len(kept["D15"]["details"]["donors"]) == 128 * 5
    assert "D14 n latents serve" in summary(results.values()) and "D16 Probe of latent i" in summary(results.values())


@pytest.mark.parametrize("order", ["reversed", "batches"])
def test_neither_order_nor_batches_change_anything(order):
    items = serial_items(64)
    one = serial_subject("first", items)
    other = serial_subject("first", items[::-1]) if order == "reversed" else serial_subject("first", items, 7)
    for measure in (measure_need, measure_whose_answer):
        first, second = measure(one).tables, measure(other).tables
        assert json.dumps(first, default=str) == json.dumps(second, default=str)
