"""A chase: questions, the tile of every latent, its picture, and whose answer a swap gives, with the checkpoints that ship."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from examples import chase, chase_tab
from examples.chase import answers_after, chase_all, draw_question, find_donor, load_serial, say_whose, serial_names
from examples.chase_picture import HEAD, PANEL, Stop, draw_chase
from examples.demo_common import told
from modeling_latentvlm.trace import LatentStep
from train.recipes.shipping import CHECKPOINTS


NAMES = serial_names()


@pytest.fixture(scope="module", params=NAMES)
def loaded(request):
    return load_serial(request.param)


def test_questions_are_new_and_have_the_hops_that_are_asked_for(tmp_path):
    assert NAMES and serial_names(tmp_path) == ()
    found = [draw_question(hops, 3, turn) for hops in (1, 4) for turn in (0, 1, 8)]
    assert [one.serial.num_steps for one in found] == [1, 1, 1, 4, 4, 4]
    assert len({one.picture_id for one in found}) == 6 and all(one.request.split == "test" for one in found)
    for wrong in (0, 5):
        with pytest.raises(ValueError, match=f"1 to 4 hops, got {wrong}"):
            draw_question(wrong, 0)


def test_every_latent_of_the_way_is_about_its_tile(loaded):
    """Vedas' latent i says where one is after i hops, LaRe's window lies on where one was before; chance is 1 in 8.

    LaRe's first window is placed before there is any latent, and need not lie on the start.
    """
    samples = [draw_question(hops, 5, turn) for hops in (1, 2, 3, 4) for turn in range(4)]
    hits = []
    for one in chase_all(*loaded, samples):
        assert len(one.stops) == len(one.steps) == 4
        is_look = one.stops[0].verb == "looks at"
        moves = range(1 + is_look, one.sample.serial.num_steps + 1)
        hits += [one.stops[step - 1].tile == one.sample.serial.way[step - is_look] for step in moves]
    assert len(hits) in (40, 24) and np.mean(hits) > 0.8


def test_one_latent_of_another_picture_leads_on_from_its_tile(loaded):
    own = draw_question(4, 11)
    mine, donor = (chase_all(*loaded, [one])[0] for one in (own, find_donor(own, 12)))
    assert mine.is_right and donor.is_right
    expected = [answers_after(own, donor.sample, moves) for moves in (1, 2, 3, 4)]
    said = [told(chase.swap(*loaded, mine, donor, number).answer.text) for number in (1, 2, 3, 4, None)]
    wanted = [one["continued"] for one in expected[:3]] + [donor.sample.answer] * 2
    assert sum(one == other for one, other in zip(said, wanted)) >= 4
    assert told(chase.swap(*loaded, mine, mine, None).answer.text) == own.answer  # its own again
    with pytest.raises(ValueError, match="took 4 latent steps: there is no step 5"):
        chase.swap(*loaded, mine, donor, 5)
    with pytest.raises(ValueError, match="The other picture's answer took 0 latent steps"):
        chase.swap(*loaded, mine, replace(donor, steps=[]), None)


def test_it_is_said_whose_an_answer_is():
    own = draw_question(3, 1)
    donor = find_donor(own, 2)
    for moves in (1, 2):
        possible = answers_after(own, donor, moves)
        state = donor.serial.way[moves]
        for _ in range(3 - moves):
            state = own.serial.following[state]
        assert possible == {"donor's": donor.answer, "own": own.answer, "continued": state}
        assert len(set(possible.values())) == 3
        sentence = say_whose(own, donor, moves, state.upper())
        assert f"the other is at {donor.serial.way[moves]}, and {3 - moves} more" in sentence
    assert "still this picture's own" in say_whose(own, donor, 2, own.answer)
    for number in (3, 4, None):
        assert set(answers_after(own, donor, 3)) == {"donor's", "own"}
        assert "the other picture's answer" in say_whose(own, donor, number, donor.answer)
    others = set(own.choices) - {own.answer, donor.answer}
    assert all("nobody's answer" in say_whose(own, donor, None, one) for one in others)
    assert say_whose(own, donor, None, "").startswith("Nothing is nobody's")


def test_windows_and_attention_are_found_on_their_tile():
    sample = draw_question(2, 4)
    box = sample.objects[3]["box"]
    column, row = box[0] // 28, box[1] // 28
    step = LatentStep(0, 0, 9, (1, 4), torch.zeros(4, 8), [(4, 4)], windows=[(0, row, column, 1, 1)])
    assert chase.find_tile(sample, step) == sample.objects[3]["color"]
    free = {(one, other) for one in range(4) for other in range(4)}
    free -= {(thing["box"][1] // 28, thing["box"][0] // 28) for thing in sample.objects}
    assert chase.find_tile(sample, replace(step, windows=[(0, *min(free), 1, 1)])) is None
    weights = torch.full((4, 16), 0.01)
    weights[:, 4 * row + column] = 0.85
    assert chase.find_tile(sample, replace(step, windows=None, image_attention=weights)) == sample.objects[3]["color"]
    assert chase.find_tile(sample, replace(step, windows=None)) is None


def share_kept(picture, number: int, box: list[int]) -> float:
    """The share of a tile's pixels that a panel shows as the question's panel does."""
    scale = PANEL / 112
    width, pixels = PANEL + 14, np.asarray(picture).astype(int)
    (x, y), (to_x, to_y) = ([round(scale * side) for side in corner] for corner in (box[:2], box[2:]))
    first, shown = (
        pixels[HEAD + y : HEAD + to_y, 18 + one * width + x : 18 + one * width + to_x] for one in (0, number)
    )
    return float((np.abs(first - shown).max(axis=-1) < 12).mean())


def test_the_picture_shows_the_way_so_far():
    """In each panel the tiles that the way has come to keep their color, and others fade."""
    sample = draw_question(2, 6)
    boxes = {thing["color"]: thing["box"] for thing in sample.objects}
    way = sample.serial.way
    stops = [Stop("says", way[1]), Stop("says", way[2]), Stop("says", None, '"The"'), Stop("says", None, '"The"')]
    picture = draw_chase(sample, stops, sample.answer, True)
    assert picture.size == (2 * 18 + 6 * PANEL + 5 * 14, HEAD + PANEL + 44)
    for panel, come in ((1, 1), (2, 2), (4, 2), (5, 2)):
        kept = {tile: share_kept(picture, panel, boxes[tile]) for tile in way}
        assert all(kept[tile] > 0.4 for tile in way[: come + 1]), (panel, kept)
        assert all(kept[tile] < 0.3 for tile in way[come + 1 :] if tile != "white"), (panel, kept)  # white cannot fade
    looks = [Stop("looks at", tile) for tile in (way[4], way[1], None, way[5])]  # the first one is no part of the way
    picture = draw_chase(sample, looks, sample.answer, True)
    assert share_kept(picture, 1, boxes[way[4]]) > 0.4 > 0.3 > share_kept(picture, 2, boxes[way[4]])
    assert all(share_kept(picture, 5, boxes[tile]) > 0.4 for tile in way[:3])
    assert share_kept(picture, 4, boxes[way[5]]) > 0.4 > 0.3 > share_kept(picture, 5, boxes[way[5]])
    wrong = draw_chase(sample, [], "nonsense", False)  # no latents, and no tile
    assert wrong.width == 2 * 18 + 2 * PANEL + 14


def test_the_tab_shows_a_chase_and_a_swap():
    name = NAMES[0]
    known = {"hops": 4, "seed": 11}
    way, lent, step, changed, said, whose, kept = chase_tab.show_chase(name, 4, known)
    assert kept == known and (step, changed) == ("none", None) and way.size == lent.size and way != lent
    assert said == draw_question(4, 11).answer and whose.startswith("Its own")
    picture, now, sentence = chase_tab.replace_step(name, "2", known)
    assert picture.size == way.size and picture != way and now != said and sentence.startswith(now)
    own = draw_question(4, 11)
    possible = answers_after(own, find_donor(own, 12), 2)
    assert now == possible["continued"] and chase_tab.replace_step(name, "all", known)[1] == possible["donor's"]
    assert chase_tab.replace_step(name, "none", known) == (None, said, whose)
    fresh = chase_tab.show_chase(name, 4, known, is_new=True)[-1]
    assert fresh["hops"] == 4 and fresh != known
    assert chase_tab.show_chase(name, 1, known)[-1]["hops"] == 1  # another number of hops needs another picture
    with pytest.raises(ValueError, match="one of none, 1, 2, 3, 4, all, got '7'"):
        chase_tab.replace_step(name, "7", known)
    with pytest.raises(ValueError, match="no checkpoint 'lara'.*git checkout checkpoints/serial"):
        chase_tab.show_chase("lara", 4, known, CHECKPOINTS)
