"""Questions that need one step after the other, asked of the checkpoints of `checkpoints/serial`: `demo.py` prints, `page.py` shows.

"Which tile is 3 hops after blue?": the disc in a tile has the color of the next one. Each latent step takes one hop, and here stands how
it is seen which, and what the answer becomes when a latent is another picture's.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

from evaluation.answering import Answer
from evaluation.faithfulness.attention import grid_box
from evaluation.faithfulness.looked_at import maps_of
from evaluation.faithfulness.serial_items import Unit
from evaluation.swapping import Swap
from examples.chase_picture import Stop, draw_chase
from examples.demo_common import answer_with_trace, ask_about, is_right, load_checkpoint, told
from modeling_latentvlm.interventions import ChangeAt
from modeling_latentvlm.trace import LatentStep
from train.data.tasks import Sample, generate_sample
from train.data.tasks.sample import continue_from
from train.data.tasks.tiles import MOST_STEPS, TILE_COLORS
from train.recipes.shipping import CHECKPOINTS, SERIAL, read_sums
from train.recipes.small_models import IMAGE_SIZE


TASK = "hops"
NUM_ANSWERS, MOST = len(TILE_COLORS["easy"]), MOST_STEPS["easy"]
DONORS_TRIED = 200


@dataclass
class Chase:
    """A question, its answer, and the tile of every latent step."""

    sample: Sample
    answer: Answer
    stops: list[Stop]
    steps: list[LatentStep]  # empty: no latents were taken
    replaced: str = ""  # which latents are another picture's

    @property
    def is_right(self) -> bool:
        return is_right(self.answer.text, self.sample.answer)

    def draw(self) -> Image.Image:
        return draw_chase(self.sample, self.stops, told(self.answer.text), self.is_right, self.replaced)


def serial_names(folder: Path = CHECKPOINTS) -> tuple[str, ...]:
    """The checkpoints of serial questions that ship in a folder of checkpoints."""
    return tuple(sorted(read_sums(folder / SERIAL)))


def load_serial(name: str, folder: Path = CHECKPOINTS):
    """Model and processor.

    Raises:
        ValueError: it is missing, or not what was shipped.
    """
    return load_checkpoint(name, folder / SERIAL)


def draw_question(num_hops: int, seed: int, turn: int = 0) -> Sample:
    """A picture and a question that no checkpoint was trained on.

    Args:
        turn: another picture of the same seed for every number.

    Raises:
        ValueError: so many hops are not asked for.
    """
    if not 1 <= num_hops <= MOST:
        raise ValueError(f"A chase must have 1 to {MOST} hops, got {num_hops}.")
    rounds, place = divmod(
        turn, NUM_ANSWERS
    )  # the task asks for one hop in as many pictures as there are tiles, then for two
    index = NUM_ANSWERS * (MOST * rounds + num_hops - 1) + place
    return generate_sample(TASK, seed, index, "test", IMAGE_SIZE)


def chase_all(model, processor, samples: list[Sample], **generate) -> list[Chase]:
    """Ask questions and follow the latents of each answer.

    Args:
        generate: more arguments of the model's `generate`.
    """
    conversations = [ask_about(sample.image, sample.question) for sample in samples]
    answers, trace = answer_with_trace(model, processor, conversations, **generate)
    found = []
    for row, (sample, answer) in enumerate(zip(samples, answers)):
        steps = trace.row(row)
        found.append(Chase(sample, answer, [read_stop(model, processor, sample, step) for step in steps], steps))
    return found


def read_stop(model, processor, sample: Sample, step: LatentStep) -> Stop:
    """The tile that a latent step is about.

    Vedas' latent is the last hidden state itself, so that the model's own head reads it as a word. Of the others it is the tile with the
    largest share of the windows, or where there are none of the attention.
    """
    if model.config.replays_image_tokens:  # such a latent is the last hidden state
        word = read_word(model, processor, step)
        is_tile = word in {thing["color"] for thing in sample.objects}
        return Stop("says", word if is_tile else None, f'"{word}"')
    return Stop("looks at", find_tile(sample, step))


def find_tile(sample: Sample, step: LatentStep) -> str | None:
    """The color of the tile on which most of what a step looks at lies; None where nothing does."""
    places = Unit(str(step.index + 1), ((step.index, None),), step.index + 1)
    looks = maps_of(step, places)
    if not looks:
        return None
    field = looks["windows" if "windows" in looks else "attention"].field
    shares = {thing["color"]: float(share_on(field, thing["box"], sample.image.size)) for thing in sample.objects}
    best = max(shares, key=shares.get)
    return best if shares[best] > 0 else None


def share_on(field: torch.Tensor, box: list[int], size: tuple[int, int]) -> torch.Tensor:
    top, left, height, width = grid_box(box, size, tuple(field.shape))
    return field[top : top + height, left : left + width].sum()


@torch.no_grad()
def read_word(model, processor, step: LatentStep) -> str:
    """The word that the language model's head reads off the mean of a step's latents."""
    logits = model.lm_head(model.model.language_model.norm(step.latents.mean(dim=0, keepdim=True)))
    return processor.tokenizer.decode([int(logits[0].argmax())]).strip()


def find_donor(own: Sample, seed: int) -> Sample:
    """A question with as many hops about another picture, so that after any swap it can be told whose the answer is.

    Raises:
        ValueError: none was found.
    """
    for turn in range(DONORS_TRIED):
        donor = draw_question(own.serial.num_steps, seed, turn)
        possible = [answers_after(own, donor, moves) for moves in range(1, MOST + 1)]
        if donor.image != own.image and all(len(set(one.values())) == len(one) for one in possible):
            return donor
    raise ValueError(f"Of {DONORS_TRIED} pictures of seed {seed} none has latents to lend to {own.id}.")


def answers_after(own: Sample, donor: Sample, moves: int) -> dict[str, str]:
    """By whose it is, what would be answered were latent `moves` the donor's (`evaluation/faithfulness/whose_answer.py`)."""
    need = own.serial.num_steps
    found = {"donor's": donor.answer, "own": own.answer}
    if moves < need:
        record = {"id": own.id, "task": TASK, "serial": asdict(own.serial)}
        found["continued"] = continue_from(record, donor.serial.way[moves], need - moves)
    return found


def swap(model, processor, chase: Chase, donor: Chase, number: int | None) -> Chase:
    """Ask again with latents of another picture.

    Args:
        number: of the step whose latents are replaced, from 1; None: of all.

    Raises:
        ValueError: one of the two took no such step.
    """
    for one, whose in ((chase, "This picture"), (donor, "The other picture")):
        if len(one.steps) < (number or 1):
            raise ValueError(
                f"{whose}'s answer took {len(one.steps)} latent steps: there is no step {number or 1} to replace."
            )
    change = Swap({0: donor.steps}, getattr(model.config, "latent_mode", None))
    if number is not None:
        change = ChangeAt(change, [(number - 1, None)])
    changed = chase_all(model, processor, [chase.sample], latent_intervention=change)[0]
    changed.replaced = "every step" if number is None else f"step {number}"
    return changed


def say_whose(own: Sample, donor: Sample, number: int | None, said: str) -> str:
    """In a sentence whose answer was given after a swap; arguments as in `swap`."""
    need = own.serial.num_steps
    moves = need if number is None else min(number, need)
    possible = answers_after(own, donor, moves)
    if is_same(said, possible["own"]):
        return f"{said} is still this picture's own answer."
    if "continued" in possible and is_same(said, possible["continued"]):
        left = need - moves
        return (
            f"{said} is this picture followed on from the other's tile: after {moves} {hops(moves)} the other is at "
            f"{donor.serial.way[moves]}, and {left} more {hops(left)} from {donor.serial.way[moves]} lead here to {said}."
        )
    if is_same(said, possible["donor's"]):
        return f"{said} is the other picture's answer."
    return f"{said or 'Nothing'} is nobody's answer: this picture's own is {own.answer}, the other's {donor.answer}."


def is_same(said: str, answer: str) -> bool:
    return said.strip().lower() == answer


def hops(number: int) -> str:
    return "hop" if number == 1 else "hops"
