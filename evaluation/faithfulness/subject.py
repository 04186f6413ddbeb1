"""A model under study: what it answers, and what it thinks of answers that were given, with latents as an arm makes them.

Shapes: B rows of a batch, T answer tokens, N latents of a step, D hidden size, M image tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from tqdm import tqdm

from evaluation.answers import encode_questions, extract_answer
from evaluation.donors import Donors
from evaluation.faithfulness.architectures import StepArchitecture, architecture_of
from evaluation.faithfulness.items import Item, NotApplicable
from evaluation.final_answer import normalize
from evaluation.scoring import Reading, known_answers, read_answer
from modeling_latentvlm.trace import LatentStep
from train.data.reasoning_data import ReasoningSample


Change = Callable[[Tensor, LatentStep, int], Tensor]  # (latents (N, D), step, number of the item) -> (N, D)


# Maps of a trace that nothing here reads, and that would be kept for every item.
UNUSED = dict.fromkeys(("image_attention", "saliency", "picked_tokens", "windows", "routed_tokens"))


@dataclass
class Answer:
    """What the model wrote to one question."""

    tokens: list[int]  # up to the end token, included
    written: str
    steps: list[LatentStep]  # on the CPU, as they entered the language model
    stop_reason: str

    @property
    def text(self) -> str:
        return normalize(extract_answer(self.written))

    @property
    def num_latents(self) -> int:
        return sum(len(step.latents) for step in self.steps)

    def latents(self) -> Tensor:  # (all latents, D) float32
        return torch.cat([step.latents for step in self.steps]).float()


@dataclass
class Score:
    """What a given answer is worth under an arm."""

    logprob: float  # nats, summed over the tokens behind the first latent
    kl: float  # KL(clean || arm), nats per token, mean over the same tokens
    num_tokens: int


@dataclass
class Arm:
    """One way to replace latents. `inside` is a context that gives settings of `generate`; most arms need none."""

    name: str
    title: str
    change: Change | None = None
    inside: Callable[[], AbstractContextManager] = nullcontext
    is_without_latents: bool = False
    only: set[int] | None = None  # items that the arm can be asked about; None: all
    donors: dict[int, int] | None = None  # by item whose latents it gets, where they are another item's
    more: tuple["Arm", ...] = ()  # the same arm drawn again: other donors, another set of vectors
    has_shared_draws: bool = False  # a draw is the same thing for all items, and not drawn for each of them

    @property
    def draws(self) -> list["Arm"]:
        return [self, *self.more]


CLEAN = Arm("clean", "as it is")


class Subject:
    """A model, its processor and its questions.

    Raises:
        ValueError: a model without latents.
    """

    def __init__(
        self,
        model,
        processor,
        items: list[Item],
        batch_size: int = 8,
        max_new_tokens: int = 64,
        min_latent_blocks: int = 0,
        seed: int = 0,
    ):
        self.model, self.processor, self.items = model.eval(), processor, items
        self.architecture: StepArchitecture = architecture_of(model, min_latent_blocks)
        self.batch_size, self.max_new_tokens, self.seed = batch_size, max_new_tokens, seed
        self.asked: dict[str, list[Answer]] = {}
        self.encoded: tuple[list[int], dict] = ([], {})  # of the last batch: many arms read one after the other

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    def encode(self, samples: list[ReasoningSample]) -> dict:
        return dict(encode_questions(self.processor, samples).to(self.model.device))

    def batches(self, title: str, numbers: list[int] | None = None) -> Iterator[list[int]]:
        """Numbers of items, a batch at a time, with a progress bar."""
        numbers = list(range(len(self.items))) if numbers is None else numbers
        starts = range(0, len(numbers), self.batch_size)
        for start in tqdm(starts, desc=title, leave=False):
            yield numbers[start : start + self.batch_size]

    @cached_property
    def clean(self) -> list[Answer]:
        """Answers as the model gives them, with its latents."""
        return self.answer(CLEAN)

    @cached_property
    def with_latents(self) -> list[int]:
        """The items that entered latent mode.

        Raises:
            NotApplicable: none did.
        """
        found = [number for number, answer in enumerate(self.clean) if answer.num_latents]
        if not found:
            raise NotApplicable(
                f"none of the {len(self.items)} questions made the model open a latent block; `--min-latent-blocks 1` "
                "makes it open one"
            )
        return found

    @cached_property
    def known(self) -> dict[str, frozenset[str]]:
        """By task the answers that are true of some item."""
        return known_answers(item.row for item in self.items)

    @cached_property
    def donors(self) -> Donors:
        """Who may lend latents to whom, among the items that have any."""
        return Donors([item.candidate for item in self.items], self.seed, self.with_latents)

    def readings(self, answers: list[Answer], numbers: list[int] | None = None) -> list[Reading]:
        """What answers say, read as `evaluation.evaluate` does."""
        numbers = range(len(answers)) if numbers is None else numbers
        rows = [self.items[number].row for number in numbers]
        return [read_answer(answer.written, row, self.known[row.task]) for answer, row in zip(answers, rows)]

    def is_right(self, answers: list[Answer], numbers: list[int] | None = None) -> list[bool]:
        return [reading.is_right for reading in self.readings(answers, numbers)]

    def tasks(self, numbers: list[int] | None = None) -> dict[str, list[int]]:
        """By task the items of it, all of them under "all"; a single task is not named again."""
        numbers = list(range(len(self.items))) if numbers is None else numbers
        names = sorted({self.items[number].task for number in numbers})
        groups = {name: [number for number in numbers if self.items[number].task == name] for name in names}
        if "all" in groups:  # a task may have that name
            groups["task all"] = groups.pop("all")
        return {"all": numbers} | (groups if len(names) > 1 else {})

    def ask(self, arm: Arm) -> list[Answer]:
        """The answers to all questions under an arm, once; the clean one where the arm has nothing to say about an item."""
        if arm.name not in self.asked:
            numbers = None if arm.only is None else sorted(arm.only)
            found = self.answer(arm, numbers)
            if numbers is not None:
                asked = dict(zip(numbers, found))
                found = [asked.get(number, clean) for number, clean in enumerate(self.clean)]
            self.asked[arm.name] = found
        return self.asked[arm.name]

    @torch.no_grad()
    def answer(
        self,
        arm: Arm,
        numbers: list[int] | None = None,
        edit: Callable[[Item], ReasoningSample] | None = None,
        **settings,
    ) -> list[Answer]:
        """Answer greedily.

        Args:
            numbers: of the items; all by default.
            edit: gives the question in the place of an item's own.
        """
        answers = []
        with arm.inside() as inner:
            for batch in self.batches(f"answering, {arm.title}", numbers):
                samples = [self.items[number].sample if edit is None else edit(self.items[number]) for number in batch]
                answers += self.generate(self.encode(samples), arm, batch, **(inner or {}) | settings)
        return answers

    def generate(
        self, inputs: dict, arm: Arm, numbers: list[int], keeps_maps: bool = False, **settings
    ) -> list[Answer]:
        """Answer a batch.

        Args:
            keeps_maps: keep where latents looked, too.
        """
        settings = self.architecture.settings() | settings
        output = self.model.generate(
            **inputs,
            **{"max_new_tokens": self.max_new_tokens} | settings,
            do_sample=False,
            return_dict_in_generate=True,
            output_latents=True,
            latent_intervention=bind(arm.change, numbers),
        )
        written = output.sequences[:, inputs["input_ids"].shape[1] :]
        trace = output.latent_trace.to("cpu")
        answers = []
        for row, tokens in enumerate(written.tolist()):
            tokens = self.trimmed(tokens)
            unused = {} if keeps_maps else UNUSED
            steps = [replace(step, **unused) for step in trace.row(row) if len(step.latents)]
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            answers.append(Answer(tokens, text, steps, output.stop_reason[row]))
        return answers

    def trimmed(self, tokens: list[int]) -> list[int]:
        """Up to the first end token, included, or without the padding behind."""
        eos = self.model.generation_config.eos_token_id
        eos = self.tokenizer.eos_token_id if eos is None else eos
        ends = set(eos if isinstance(eos, list) else [eos])
        for place, token in enumerate(tokens):
            if token in ends:
                return tokens[: place + 1]
        pad = self.tokenizer.pad_token_id
        while tokens and tokens[-1] == pad:
            tokens = tokens[:-1]
        return tokens

    def given(
        self, numbers: list[int], is_without_latents: bool = False
    ) -> tuple[list[list[int]], list[list[LatentStep]]]:
        """Tokens and steps of clean answers, fit to be read again."""
        answers, steps = [], []
        for number in numbers:
            clean = self.clean[number]
            tokens, taken = clean.tokens, clean.steps
            if is_without_latents:
                tokens, taken = self.architecture.visible(tokens), []
            else:
                start = self.architecture.config.opening_token_id
                if start is not None and tokens and tokens[-1] == start and tokens.count(start) > len(taken):
                    tokens = tokens[:-1]  # cut off before its block was built
            answers.append(tokens)
            steps.append(taken)
        return answers, steps

    def read(self, numbers: list[int], arm: Arm, **settings):
        """One forward over questions and their clean answers: (logits (B, T + 1, V), answers' tokens)."""
        if self.encoded[0] != numbers:
            self.encoded = (list(numbers), self.encode([self.items[number].sample for number in numbers]))
        inputs = self.encoded[1]
        answers, steps = self.given(numbers, arm.is_without_latents)
        arguments = self.architecture.teacher_forced(inputs, answers, steps) | settings
        change = None if arm.is_without_latents else bind(arm.change, numbers)
        width = max(map(len, answers)) + 1
        return self.model(**arguments, latent_intervention=change).logits[:, -width:], answers

    @torch.no_grad()
    def logprobs(self, numbers: list[int], arm: Arm) -> list[Tensor]:
        """Per item (tokens behind the first latent, V) log-probabilities, teacher-forced on the clean answer."""
        with arm.inside():
            logits, answers = self.read(numbers, arm)
        found = []
        for row, number in enumerate(numbers):
            clean = self.given([number])[0][0]
            places = self.architecture.scored(clean)
            if arm.is_without_latents and places:  # the same tokens, where what opens blocks is left out
                start = len(self.architecture.visible(clean[: places[0]]))
                places = list(range(start, start + len(places)))
            found.append(logits[row, places].float().log_softmax(dim=-1))
        return found

    def score(self, arms: list[Arm], title: str = "scoring answers") -> dict[str, list[Score]]:
        """Score the clean answers of all items with latents under every arm; the first arm is what KL is against."""
        scores: dict[str, list[Score]] = {arm.name: [] for arm in arms}
        for batch in self.batches(title, self.with_latents):
            targets = [self.targets(number) for number in batch]
            reference = self.logprobs(batch, arms[0])
            for arm in arms:
                found = reference if arm is arms[0] else self.logprobs(batch, arm)
                for clean, other, tokens in zip(reference, found, targets):
                    scores[arm.name].append(compare(clean, other, tokens))
        return scores

    def targets(self, number: int) -> list[int]:
        """The tokens of a clean answer that are scored."""
        clean = self.given([number])[0][0]
        return [clean[place] for place in self.architecture.scored(clean)]

    @torch.no_grad()
    def image_features(self, numbers: list[int]) -> list[Tensor]:
        """Per item the image tokens as the language model gets them: (M, D) float32 on the CPU, all images in order."""
        inputs = self.encode([self.items[number].sample for number in numbers])
        return self.features_of(inputs, [len(self.items[number].sample.images) for number in numbers])

    @torch.no_grad()
    def features_of(self, inputs: dict, counts: list[int]) -> list[Tensor]:
        named = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
        named["pixel_values"] = named["pixel_values"].to(self.model.dtype)
        images = iter(self.model.model.get_image_features(**named, return_dict=True).pooler_output)
        return [torch.cat([next(images) for _ in range(count)]).float().cpu() for count in counts]


def bind(change: Change | None, numbers: list[int]):
    """A `latent_intervention` for a batch of these items."""
    if change is None:
        return None
    return lambda latents, step: change(latents, step, numbers[step.row])


def compare(clean: Tensor, other: Tensor, tokens: list[int]) -> Score:
    """Log-likelihood of the tokens, and KL(clean || other) = sum_v p ln(p / q), averaged over tokens; (T, V) each."""
    if not tokens:
        return Score(float("nan"), float("nan"), 0)
    chosen = torch.tensor(tokens, device=other.device)[:, None]
    divergence = (clean.exp() * (clean - other)).nan_to_num(0.0).sum(dim=-1).mean()
    return Score(float(other.gather(1, chosen).sum()), float(divergence), len(tokens))


def without_latents(architecture: StepArchitecture) -> Arm:
    """K = 0."""
    return Arm("skip", "no latents (K = 0)", inside=lambda: architecture.with_latents(0), is_without_latents=True)
