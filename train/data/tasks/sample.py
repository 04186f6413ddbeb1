"""What every task produces: one question with its answer, its reasoning steps and the pictures between them."""

import hashlib
import itertools
import math
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from random import Random
from typing import Any, NamedTuple

from PIL import Image

from train.data.tasks.families import family_of


# A merged patch of Qwen2-VL and Qwen2.5-VL: sides in multiples of it reach the model without another resize.
PATCH_MULTIPLE = 28


class Step(NamedTuple):
    """One sentence of the rationale, and the picture the model looks at right after it.

    A picture comes with the box of the question's image that it shows. Steps of several questions about one image that show
    the same picture give it the same name, so that it is saved once.
    """

    text: str
    image: Image.Image | None = None
    box: tuple[int, int, int, int] | None = None  # left, top, right, bottom in pixels
    name: str | None = None


@dataclass(frozen=True)
class SerialAnswer:
    """Where every way through a picture leads, for questions that ask what stands where one is after so many moves.

    A state is a place to be in, named as every other picture of the task and level names it: a state that was reached in one
    picture can be continued in another (`continue_from`).

    Args:
        start: the state in which the asked way begins.
        num_steps: the moves that are asked for.
        way: the states from the start on, `way[num_steps]` being the one asked for; it goes on beyond it.
        following: the state after each state. A state without one is an end.
        contents: what stands at each state, which is how it is asked for and named in the rationale.
    """

    start: str
    num_steps: int
    way: tuple[str, ...]
    following: dict[str, str]
    contents: dict[str, str]


def continue_from(record: dict[str, Any], state: str, num_steps: int | None) -> str:
    """Return what the answer would be in the picture of a row of `data.jsonl`, `num_steps` moves after `state`.

    `continue_from(row, row["serial"]["start"], row["serial"]["num_steps"])` is the row's answer. Another row's
    `row["serial"]["way"][i]` is the state in which that row is after i moves.

    Args:
        num_steps: None goes on to the end of the way, which is what `trace` asks for whatever the number of moves.

    Raises:
        ValueError: a row of a task that is not serial, an unknown state, a way that ends before, or without an end.
    """
    serial = record.get("serial")
    if serial is None:
        raise ValueError(f"Row {record.get('id')} must be of a serial task, but task {record.get('task')} is none.")
    if state not in serial["contents"]:
        known = ", ".join(serial["contents"])
        raise ValueError(f"`state` must be one of {known} for row {record.get('id')}; got {state!r}.")
    if num_steps is not None and num_steps < 0:
        raise ValueError(f"`num_steps` must be >= 0, got {num_steps}.")
    for done in itertools.count() if num_steps is None else range(num_steps):
        if state not in serial["following"]:
            if num_steps is None:
                break
            raise ValueError(
                f"`num_steps` must be at most {done} from the given state of row {record.get('id')}, where its way ends; "
                f"got {num_steps}."
            )
        if done > len(serial["following"]) and num_steps is None:
            raise ValueError(
                f"`num_steps` must be a number for row {record.get('id')}: its way goes round without end."
            )
        state = serial["following"][state]
    return serial["contents"][state]


@dataclass(frozen=True)
class Request:
    """The coordinates of one sample. Everything a task draws follows from them, on any machine.

    `image_size` is no part of the seed: where the family's pictures scale, another size shows the same scene.
    """

    task: str
    split: str
    seed: int
    index: int
    image_size: int
    level: str = "easy"

    @cached_property
    def rng(self) -> Random:
        return self._random("scene", self.index)

    def balanced(self, choices: tuple[str, ...]) -> str:
        """Pick the answer so that any `len(choices)` consecutive samples, counted from 0, hold every choice once.

        Drawn before the scene and independent of it, so that neither the question nor the distractors give it away.
        """
        block, place = divmod(self.index, len(choices))
        return self._random("answers", block).sample(choices, len(choices))[place]

    def _random(self, purpose: str, number: int) -> Random:
        # Never `hash()`: it is salted per process.
        level = () if self.level == "easy" else (self.level,)
        name = "|".join(map(str, (self.task, self.split, self.seed, purpose, number, *level)))
        return Random(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))


@dataclass
class Sample:
    """A question about `image`. `objects` says what was drawn where, for tests and for measures of attention.

    `grid` is the number of cells a side in which the objects stand, each in cells of its own; None where they stand freely.
    `serial` says where other ways would have led, in the tasks that ask for the end of one. `variant` tells the questions
    about one picture apart.
    """

    request: Request
    image: Image.Image
    question: str
    answer: str
    choices: tuple[str, ...]
    steps: list[Step]
    objects: list[dict[str, Any]] = field(default_factory=list)
    grid: int | None = None
    serial: SerialAnswer | None = None
    variant: str | None = None

    @property
    def id(self) -> str:
        return self.picture_id if self.variant is None else f"{self.picture_id}-{self.variant}"

    @property
    def picture_id(self) -> str:
        """The same for all questions about one picture."""
        level = "" if self.request.level == "easy" else f"-{self.request.level}"
        return f"{self.request.task}{level}-{self.request.split}-{self.request.seed}-{self.request.index:06d}"

    @property
    def answer_type(self) -> str:
        """ "number", "letter" or "word"."""
        if all(choice.isdigit() for choice in self.choices):
            return "number"
        return "letter" if all(len(choice) == 1 for choice in self.choices) else "word"

    @property
    def rationale(self) -> list[str]:
        return [step.text for step in self.steps]

    @property
    def assistant_images(self) -> list[Image.Image]:
        return [step.image for step in self.steps if step.image is not None]

    @property
    def boxes(self) -> list[tuple[int, int, int, int]]:
        return [step.box for step in self.steps if step.image is not None]

    def messages(self, image: Any = None, assistant_images: list[Any] | None = None) -> list[dict[str, Any]]:
        """Return the sample as a chat. Pictures are PIL images unless paths are given in their place."""
        pictures = iter(self.assistant_images if assistant_images is None else assistant_images)
        reasoning = []
        for step in self.steps:
            reasoning.append({"type": "text", "text": step.text})
            if step.image is not None:
                reasoning.append({"type": "image", "image": next(pictures)})
        reasoning.append({"type": "text", "text": f"The answer is \\boxed{{{self.answer}}}."})
        question = [
            {"type": "image", "image": self.image if image is None else image},
            {"type": "text", "text": self.question},
        ]
        return [{"role": "user", "content": question}, {"role": "assistant", "content": reasoning}]

    def record(self) -> dict[str, Any]:
        """Return the line of `data.jsonl`, with pictures as paths relative to it."""
        image = f"images/{self.picture_id}.png"
        names = [step.name for step in self.steps if step.image is not None]
        assistant_images = [
            f"images/{self.id}_crop{number}.png" if name is None else f"images/{self.picture_id}_{name}.png"
            for number, name in enumerate(names)
        ]
        record = {
            "id": self.id,
            "task": self.request.task,
            "family": family_of(self.request.task),
            "level": self.request.level,
            "split": self.request.split,
            "question": self.question,
            "answer": self.answer,
            "answer_type": self.answer_type,
            "choices": list(self.choices),
            "chance": 1 / len(self.choices),
            "rationale": self.rationale,
            "image": image,
            "assistant_images": assistant_images,
            "boxes": [list(box) for box in self.boxes],
            "objects": self.objects,
            "grid": self.grid,
            "messages": self.messages(image, assistant_images),
        }
        if self.serial is not None:  # other rows stay what they were
            record["serial"] = {**asdict(self.serial), "way": list(self.serial.way)}
        return record


def join_pictures(sample: Sample) -> Sample:
    """Return the sample with the pictures of all its steps as one, side by side in their order, behind its last step.

    A model that draws in one block draws the whole way at once. The box of the picture is that of the whole image.
    """
    shown = [step.image for step in sample.steps if step.image is not None]
    if not shown:
        return sample
    joined = Image.new("RGB", (sum(one.width for one in shown), max(one.height for one in shown)), (128, 128, 128))
    left = 0
    for one in shown:
        joined.paste(one, (left, 0))
        left += one.width
    steps = [Step(step.text) for step in sample.steps]
    steps[-1] = Step(steps[-1].text, joined, (0, 0, *sample.image.size))
    return replace(sample, steps=steps)


def zoom_step(text: str, image: Image.Image, box: tuple[int, int, int, int], context: float = 1.7) -> Step:
    """Return a step that looks at the surroundings of `box`, enlarged to half the side of `image`.

    Args:
        context: side of the region looked at, in sides of `box`.
    """
    left, top, right, bottom = box
    side = round(max(right - left, bottom - top) * context)
    left = min(max((left + right - side) // 2, 0), image.width - side)
    top = min(max((top + bottom - side) // 2, 0), image.height - side)
    region = (left, top, left + side, top + side)
    zoomed = PATCH_MULTIPLE * math.ceil(image.width / 2 / PATCH_MULTIPLE)
    return Step(text, image.resize((zoomed, zoomed), Image.Resampling.BICUBIC, box=region), region)


def crop_step(text: str, image: Image.Image, box: tuple[int, int, int, int], least_width: int = 2) -> Step:
    """Return a step that looks at the merged patches of which `box` has a part, at least two by two, in their own size.

    What a tower has learned about a cell of the picture holds for the crop too, token by token.

    Args:
        least_width: patches from left to right.
    """
    left, right = _patches(box[0], box[2], image.width, least_width)
    top, bottom = _patches(box[1], box[3], image.height, 2)
    region = (left, top, right, bottom)
    return Step(text, image.crop(region), region)


def _patches(first: int, last: int, size: int, least: int) -> tuple[int, int]:
    """The pixels from `first` to `last`, grown to the borders of patches and to `least` of them."""
    first, last = first // PATCH_MULTIPLE * PATCH_MULTIPLE, -(-last // PATCH_MULTIPLE) * PATCH_MULTIPLE
    last = min(max(last, first + least * PATCH_MULTIPLE), size)
    return min(first, last - least * PATCH_MULTIPLE), last
