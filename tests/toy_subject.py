"""A model whose use of its latents is known, for tests of the report and of the evaluation: no weights, no training.

It takes three latent steps (as Vedas does) and answers in one word what number a picture shows, "red" or "one" for 0 by task.

    content   the answer is read off the latents alone
    task      latents say which task it is; with those of another the answer is wrong
    place     latents are constant at every place; the answer is right where each stands in its place, else it has no form
    useless   latents say what the picture shows, and nothing looks at them
    form      latents say what the picture shows; without exactly those the answer is right and loses its form

A latent is one-hot in three parts: number (8), task (2) and place (3), as far as the kind has them.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from PIL import Image
from transformers import BatchFeature

from configuration_latentvlm.latent_architecture import LatentArchitectureMixin
from evaluation.faithfulness.items import Item
from evaluation.faithfulness.subject import Subject
from evaluation.rows import EvaluationRow
from modeling_latentvlm.trace import LatentStep, LatentTrace


WORDS = {
    "color": ("red", "green", "blue", "yellow", "white", "black", "purple", "cyan"),
    "count": ("one", "two", "three", "four", "five", "six", "seven", "eight"),
}
TASKS, COUNT, STEPS = tuple(WORDS), 8, 3
PAD, EOS, LATENT, GARBAGE, TASK, NUMBER, WORD = 0, 1, 2, 3, 10, 20, 40
VOCABULARY = WORD + 2 * COUNT
SIZE = COUNT + len(TASKS) + STEPS


@dataclass
class ToyConfig(LatentArchitectureMixin):
    latent_unit = "step"
    latent_count_field = "num_latent_steps"
    replays_image_tokens = True

    num_latent_steps: int = STEPS
    model_type: str = "vedas"
    image_token_id: int = -1
    latent_token_id: int = LATENT
    pad_token_id: int = PAD
    routing_scope: str = "latent"

    def get_text_config(self):
        return self

    def step_tokens(self) -> list[int]:
        return [self.latent_token_id] * self.num_latent_steps

    def to_dict(self) -> dict:
        return vars(self)

    def validate(self) -> None:
        pass


@dataclass
class ToyModel:
    kind: str
    silent: tuple[int, ...] = ()  # numbers about which no latent step is taken
    config: ToyConfig = field(default_factory=ToyConfig)
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    generation_config: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD, num_beams=1)
    )

    def eval(self):
        return self

    def latent(self, task: int, number: int, place: int) -> torch.Tensor:
        """(1, SIZE)"""
        value = torch.zeros(1, SIZE)
        if self.kind in ("content", "useless", "form"):
            value[0, number] = 1
        if self.kind in ("content", "task"):
            value[0, COUNT + task] = 1
        value[0, COUNT + len(TASKS) + place] = 1
        return value

    def think(self, prompts: list[list[int]], intervention) -> tuple[list[list[LatentStep]], list[list[int]]]:
        """By row the steps that were taken, changed, and the answer's tokens."""
        asked = [([token for token in row if token != PAD][:2]) for row in prompts]
        taken: list[list[LatentStep]] = [[] for _ in asked]
        for place in range(self.config.num_latent_steps):
            for row, (task, number) in enumerate(asked):
                if number - NUMBER in self.silent:
                    continue
                own = self.latent(task - TASK, number - NUMBER, place)
                step = LatentStep(row, place, len(prompts[0]), (1, 1), own, [])
                if intervention is not None:
                    step.latents = intervention(own, step)
                taken[row].append(step)
        answers = [
            [self.answer(task - TASK, number - NUMBER, steps), EOS] for (task, number), steps in zip(asked, taken)
        ]
        return taken, answers

    def answer(self, task: int, number: int, steps: list[LatentStep]) -> int:
        own = WORD + COUNT * task + number
        if self.kind == "useless" or number in self.silent:
            return own
        if not steps:
            return GARBAGE
        values = torch.cat([step.latents for step in steps])  # (STEPS, SIZE)
        total = values.sum(dim=0)
        if self.kind == "content":
            return WORD + COUNT * task + int(total[:COUNT].argmax())
        if self.kind == "task":
            is_own = int(total[COUNT : COUNT + len(TASKS)].argmax()) == task
            return own if is_own else WORD + COUNT * task + (number + 1) % COUNT
        if self.kind == "form":
            return own if int(total[:COUNT].argmax()) == number else GARBAGE
        places = values[:, COUNT + len(TASKS) :].argmax(dim=1)
        return own if places.tolist() == list(range(STEPS)) else GARBAGE

    def generate(self, input_ids, attention_mask, latent_intervention=None, **settings):
        taken, answers = self.think(input_ids.tolist(), latent_intervention)
        steps = [step for row in taken for step in row]
        counts = torch.tensor([len(row) for row in taken])
        return SimpleNamespace(
            sequences=torch.cat([input_ids, torch.tensor(answers)], dim=1),
            latent_trace=LatentTrace(len(answers), steps),
            stop_reason=["eos"] * len(answers),
            num_latent_blocks=counts,
            num_latents=counts,
        )

    def __call__(self, input_ids, attention_mask, latent_intervention=None, logits_to_keep=0, labels=None):
        """Logits of the last columns; column j of them predicts token j of the answer."""
        _, answers = self.think(input_ids.tolist(), latent_intervention)
        width = 1 + len(answers[0])
        logits = torch.zeros(len(answers), width, VOCABULARY)
        for row, tokens in enumerate(answers):
            for column, token in enumerate(tokens):
                logits[row, column, token] = 8.0
        return SimpleNamespace(logits=logits)


class ToyProcessor:
    """One token for the task, one for what the picture shows."""

    eos_token_id, pad_token_id = EOS, PAD

    @property
    def tokenizer(self):
        return self

    def apply_chat_template(self, conversations, **settings) -> BatchFeature:
        rows = []
        for ((image, text),) in (tuple(message["content"] for message in one) for one in conversations):
            rows.append([TASK + TASKS.index(text["text"].rstrip("?")), NUMBER + image["image"].getpixel((0, 0))[0]])
        ids = torch.tensor(rows)
        return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def decode(self, tokens, skip_special_tokens=True) -> str:
        words = [word for task in TASKS for word in WORDS[task]]
        named = {WORD + place: f"It is \\boxed{{{word}}}." for place, word in enumerate(words)}
        return "".join((named | {GARBAGE: "well, well"}).get(token, "") for token in tokens)

    def batch_decode(self, rows, skip_special_tokens=True) -> list[str]:
        return [self.decode(row.tolist()) for row in rows]


def toy_rows(count: int = 96) -> list[EvaluationRow]:
    """Questions of both tasks in turn, every number equally often, each about a picture of its own."""
    rows = []
    for place in range(count):
        task, number = TASKS[place % 2], place // 2 % COUNT
        picture = Image.new("RGB", (4, 4), (number, place % 256, place // 256))
        rows.append(
            EvaluationRow(
                [picture],
                f"{task}?",
                [],
                WORDS[task][number],
                f"Line {place}",
                id=f"q{place}",
                data="data.jsonl",
                family=task,
                task=task,
                choices=WORDS[task],
                is_lettered=False,
                answer_format="choice",
            )
        )
    return rows


def toy_subject(
    kind: str,
    rows: list[EvaluationRow] | None = None,
    silent: tuple[int, ...] = (),
    batch_size: int = 32,
    seed: int = 0,
) -> Subject:
    rows = toy_rows() if rows is None else rows
    items = [Item(row, row=row) for row in rows]
    return Subject(ToyModel(kind, silent), ToyProcessor(), items, batch_size, 4, seed=seed)
