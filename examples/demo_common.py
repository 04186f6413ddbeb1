"""Ask the checkpoints that ship about pictures, and keep what their latents looked at.

`demo.py` prints it and `page.py` shows it. Pictures are those of the tasks that the checkpoints are trained on, of the
split "test": by construction none of them was in the training data.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from PIL import Image, ImageOps

from configuration_latentvlm import ARCHITECTURES
from evaluation import final_answer
from evaluation.answering import Answer, AnswerSettings, account, answer_batch
from evaluation.answers import encode_conversations, extract_answer
from evaluation.loading import load_model, load_processor
from evaluation.swapping import Swap
from modeling_latentvlm.trace import LatentTrace
from processing_latentvlm import draw_trace
from processing_latentvlm.pictures import open_picture
from train.data.tasks import Sample, generate_sample
from train.recipes.shipping import CHECKPOINTS, SERIAL, read_sums, shipped
from train.recipes.small_models import IMAGE_SIZE


NAMES = tuple(sorted(read_sums(CHECKPOINTS)))  # those that ship
KINDS = {"search": "search_color", "jigsaw": "jigsaw"}  # what the checkpoints are trained on
LONGEST = 200  # characters of a question: far beyond any that they know
MOST_TOKENS = 256  # of an answer
DONORS = 3  # pictures whose latents are asked for before there is nothing to swap with


@dataclass
class Look:
    """An answer, whether it has latents to look at, and what it is without them."""

    answer: Answer
    drawing: Image.Image | None  # None: no latents were taken
    without: str  # what it writes without latents
    swapped: str | None  # with the latents of another question about another picture; None: nothing to swap


@cache
def load_checkpoint(name: str, folder: Path = CHECKPOINTS):
    """Model and processor of a checkpoint that ships.

    Raises:
        ValueError: it is missing, or not what was shipped.
    """
    path = str(shipped(name, folder))
    # bfloat16 is how the weights are stored; CPUs are faster, and every machine nearer to the others, in float32.
    return load_model(path, "float32"), load_processor(path)


def check_checkpoints(folder: Path = CHECKPOINTS) -> None:
    """End the program with a table and status 1 unless every checkpoint that ships answers as it did when it was written.

    Under another version of a library, code may run without an error and answer nonsense.
    """
    serial = folder / SERIAL
    for name, place in [*((name, folder) for name in NAMES), *((name, serial) for name in sorted(read_sums(serial)))]:
        model, processor = load_checkpoint(name, place)
        report = model.check_known_answers(processor)
        if not report.passed:
            print(report)
            sys.exit(1)


def draw_sample(kind: str, seed: int, index: int = 0) -> Sample:
    """A picture and a question that no checkpoint was trained on.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {sorted(KINDS)}, got {kind!r}.")
    return generate_sample(KINDS[kind], seed, index, "test", IMAGE_SIZE)


def prepare_picture(picture: Image.Image | None) -> Image.Image:
    """The picture as the checkpoints know pictures: its middle, square, in color.

    Raises:
        ValueError: there is none.
    """
    if picture is None:
        raise ValueError("A picture is needed: draw or upload one.")
    picture = open_picture(picture, "The picture")
    side = (IMAGE_SIZE, IMAGE_SIZE)
    return picture if picture.size == side else ImageOps.fit(picture, side)


def check_question(question: str | None) -> str:
    """Raises:
    ValueError: there is none, or it is too long.
    """
    question = " ".join((question or "").split())
    if not 1 <= len(question) <= LONGEST:
        raise ValueError(f"A question of 1 to {LONGEST} characters is needed, got {len(question)}.")
    return question


def ask_about(picture: Image.Image, question: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]


def count_latents(name: str, answer: Answer) -> str:
    """In words how much an answer looked."""
    counts = {f"latent {ARCHITECTURES[name].latent_unit}": answer.num_latent_blocks, "latent": answer.num_latents}
    return ", ".join(f"{count} {what}{'' if count == 1 else 's'}" for what, count in counts.items())


@torch.no_grad()
def answer_with_trace(
    model, processor, conversations: Sequence[list[dict]], **generate
) -> tuple[list[Answer], LatentTrace]:
    """Answer greedily, as `evaluation` does, and return what the latents were.

    Args:
        generate: more arguments of the model's `generate`.
    """
    inputs = encode_conversations(processor, conversations).to(model.device)
    output = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=MOST_TOKENS,
        return_dict_in_generate=True,
        output_latents=True,
        **generate,
    )
    answers = account(model, processor, output, inputs["input_ids"].shape[1], is_direct=False)
    return answers, output.latent_trace


def told(text: str) -> str:
    """The answer in what was written."""
    return extract_answer(text)


def is_right(text: str, answer: str) -> bool:
    return final_answer.is_right(told(text), answer, may_calculate=False)


def look(model, processor, picture: Image.Image, question: str, kind: str = "search", seed: int = 0) -> Look:
    """Answer, draw the latents, and answer again without them and with those of another picture.

    Args:
        kind: of the pictures whose latents are swapped in, with questions of their own.
        seed: of those pictures.

    Raises:
        ValueError: no picture, no question or one that is too long.
    """
    picture, question = prepare_picture(picture), check_question(question)
    others = [draw_sample(kind, seed, index) for index in range(DONORS)]
    mine = ask_about(picture, question)
    answers, trace = answer_with_trace(
        model, processor, [mine, *(ask_about(other.image, other.question) for other in others)]
    )
    donors = [row for row in range(1, 1 + DONORS) if trace.row(row)]
    swapped = None
    if trace.row(0) and donors:
        swap = Swap({0: trace.row(donors[0])}, model.config.shows_latents_one_by_one)
        settings = AnswerSettings(max_new_tokens=MOST_TOKENS)
        swapped = answer_batch(model, processor, [mine], settings, latent_intervention=swap)[0].text
    off = AnswerSettings(latents="off", max_new_tokens=MOST_TOKENS)
    return Look(
        answer=answers[0],
        drawing=draw_trace(trace, [picture]) if trace.row(0) else None,
        without=answer_batch(model, processor, [mine], off)[0].text,
        swapped=swapped,
    )
