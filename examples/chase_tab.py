"""The page's second tab: a chase hop by hop, and the same with one latent of another picture.

What a person sees follows from a model, a number of hops and a seed, so that nothing but these is kept between two requests.
"""

import secrets
from functools import partial
from pathlib import Path

from examples.chase import (
    MOST,
    chase_all,
    draw_question,
    find_donor,
    load_serial,
    say_whose,
    serial_names,
    swap,
)
from examples.demo_common import told
from train.recipes.shipping import CHECKPOINTS


ABOUT = (
    "Which tile is so many hops after another? The disc in a tile has the color of the next one. These models have never been allowed a "
    "word on the way: each of their latent steps takes one hop, and holds the answer when it has arrived. Give a step the latent that "
    "another picture's question had there, and see where the way goes on."
)
ALL, NONE = "all", "none"
STEPS = (NONE, *(str(number) for number in range(1, MOST + 1)), ALL)
FIRST_HOPS = 3
NO_SERIAL = "No checkpoint of serial questions is here: `git checkout checkpoints/serial` brings them back."


def ask_both(name: str, known: dict, folder: Path):
    """(model, processor, the chase, that of the picture that lends its latents)."""
    model, processor = load_serial(name, folder)
    own = draw_question(known["hops"], known["seed"])
    donor = find_donor(own, known["seed"] + 1)
    # Each by itself: in a batch of other rows the last bits of an answer may be others.
    return model, processor, *(chase_all(model, processor, [sample])[0] for sample in (own, donor))


def show_chase(name: str, hops: int, known: dict | None, folder: Path = CHECKPOINTS, is_new: bool = False) -> tuple:
    """(the way, the other picture's way, the step that is replaced, the way with it, the answer, whose it is, what is known).

    Args:
        known: the number of hops and the seed of what is shown; None, or `is_new`: another picture is drawn.

    Raises:
        ValueError: no such checkpoint.
    """
    hops = int(hops)
    if is_new or known is None or known["hops"] != hops:
        known = {"hops": hops, "seed": secrets.randbelow(2**31)}
    _, _, own, donor = ask_both(name, known, folder)
    return own.draw(), donor.draw(), NONE, None, told(own.answer.text), "Its own: nothing is replaced.", known


def replace_step(name: str, step: str, known: dict | None, folder: Path = CHECKPOINTS) -> tuple:
    """(the way with one step's latents replaced, the answer, whose it is).

    Args:
        step: one of `STEPS`.

    Raises:
        ValueError: another step, one that was not taken, or there is no chase yet.
    """
    if known is None:
        raise ValueError("A chase is needed: draw one.")
    if step not in STEPS:
        raise ValueError(f"The latent step to replace must be one of {', '.join(STEPS)}, got {step!r}.")
    model, processor, own, donor = ask_both(name, known, folder)
    if step == NONE:
        return None, told(own.answer.text), "Its own: nothing is replaced."
    number = None if step == ALL else int(step)
    swapped = swap(model, processor, own, donor, number)
    said = told(swapped.answer.text)
    return swapped.draw(), said, say_whose(own.sample, donor.sample, number, said)


def build_tab(gr, guard, folder: Path = CHECKPOINTS) -> None:
    """Fill the tab that is being built.

    Args:
        gr: gradio, which this module does not import.
        guard: makes of a function one whose `ValueError` the page shows.
    """
    names = serial_names(folder)
    if not names:
        gr.Markdown(NO_SERIAL)
        return
    gr.Markdown(ABOUT)
    known = gr.State(None)
    with gr.Row():
        name = gr.Radio(names, value=names[0], label="Model")
        hops = gr.Radio(list(range(1, MOST + 1)), value=FIRST_HOPS, label="Hops")
        new = gr.Button("New chase", variant="primary")
    picture = partial(gr.Image, format="png", buttons=["download", "fullscreen"], interactive=False)
    way = picture(label="The way of its latents", elem_id="way")
    lent = picture(label="The picture that lends its latents", elem_id="lent")
    with gr.Row():
        step = gr.Radio(STEPS, value=NONE, label="Replace the latent of step")
        answer = gr.Textbox(label="Answer now", max_lines=2)
        whose = gr.Textbox(label="Whose answer is it?", max_lines=4)
    changed = picture(label="The way with that latent", elem_id="changed")
    shown = [way, lent, step, changed, answer, whose, known]
    new.click(guard(partial(show_chase, folder=folder, is_new=True)), [name, hops, known], shown, api_name="new_chase")
    gr.on([name.input, hops.input], guard(partial(show_chase, folder=folder)), [name, hops, known], shown)
    ready = partial(replace_step, folder=folder)
    step.input(guard(ready), [name, step, known], [changed, answer, whose], api_name="replace_latent")
