"""A curriculum for LaRe: in its stage j the reasoning loses its first j steps, and j refocusing steps stand in their place.

Stage 0 is plain chain of thought without refocusing, the last stage answers from the latents alone. As in Vedas' curriculum
(`train/vedas/curriculum.py`), longer rationales are merged into as many steps as the last stage leaves out, and shorter ones are used
up earlier: every row of a stage takes the same number of refocusing steps, and a model that has its answer before the last
of them learns to hold it. What the latents are to give back (L_text) and to lie near (L_align) is the reasoning that they stand
for: the steps that were left out.

The first refocusing step reads the state at `<bot>`, and the text goes on behind `<eot>`. To a model that has learned to reason
in words both are tokens it has never met: on pointer chasing nothing was learned in 375 steps, while with the embedding
of the token behind which the plain model begins its answer 25 steps were enough (`start_delimiters`).
"""

import torch
from torch import Tensor, nn

from train.data.reasoning_data import ReasoningSample, merge_steps
from train.lare.data import IGNORED, Conversation, LaReCollator, from_reasoning


def shorten(sample: ReasoningSample, num_left_out: int, most_steps: int) -> Conversation:
    """A question whose answer lost the first steps of its reasoning, which latents stand for.

    Args:
        most_steps: longer rationales are merged into so many.
    """
    steps = merge_steps(sample.steps, most_steps)
    rest = ReasoningSample(sample.images, sample.question, steps[num_left_out:], sample.answer, sample.origin)
    conversation = from_reasoning(rest)
    conversation.reasoning = "\n".join(steps[:num_left_out])
    return conversation


class RefocusCurriculumCollator:
    """Samples to batches at the current stage.

    Args:
        collate: makes batches of conversations.
        most_steps: what longer rationales are merged into.
        takes_steps: whether refocusing steps stand in the place of what is left out; otherwise nothing does (a twin).
    """

    def __init__(self, collate: LaReCollator, most_steps: int, takes_steps: bool = True):
        self.collate, self.most_steps, self.takes_steps = collate, most_steps, takes_steps
        # Shared, so that worker processes that live through several epochs follow it.
        self._stage = torch.zeros((), dtype=torch.long).share_memory_()

    @property
    def stage(self) -> int:
        return int(self._stage)

    @stage.setter
    def stage(self, stage: int) -> None:
        self._stage.fill_(stage)

    def __call__(self, samples: list[ReasoningSample]) -> dict[str, Tensor | int]:
        batch = self.collate([self.conversation(sample) for sample in samples])
        if self.takes_steps and self.stage:
            batch["step_words"] = torch.tensor([self.step_words(sample) for sample in samples])
        return batch | {"num_refocus_steps": self.stage if self.takes_steps else 0}

    def step_words(self, sample: ReasoningSample) -> list[int]:
        """The first token of every step that latents stand for: a rationale that has come to its end stays at its last step."""
        steps = merge_steps(sample.steps, self.most_steps)
        if not steps:
            return [IGNORED] * self.stage
        return [self.collate.tokens(steps[min(number, len(steps) - 1)])[0] for number in range(self.stage)]

    def conversation(self, sample: ReasoningSample) -> Conversation:
        return shorten(sample, self.stage, self.most_steps)

    # What `check_rows` asks of a collator:

    @property
    def max_length(self) -> int | None:
        return self.collate.max_length

    @property
    def long_rows(self) -> str:
        return self.collate.long_rows

    def is_too_long(self, sample: ReasoningSample) -> bool:
        return self.collate.is_too_long(self.conversation(sample))

    def encode(self, sample: ReasoningSample) -> tuple[Tensor, Tensor]:
        return self.collate.encode(self.conversation(sample))


def opening_token(processor) -> int:
    """The token behind which a model begins its answer: the last of what the chat template writes before it.

    Raises:
        ValueError: the template writes nothing there.
    """
    message = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    asked, opened = (
        processor.apply_chat_template(message, tokenize=False, add_generation_prompt=is_open)
        for is_open in (False, True)
    )
    ids = processor.tokenizer(opened.removeprefix(asked), add_special_tokens=False)["input_ids"]
    if opened == asked or not ids:
        raise ValueError("The chat template must write something before the answer, whose last token is copied.")
    return ids[-1]


@torch.no_grad()
def start_delimiters(model: nn.Module, processor) -> None:
    """Give `<bot>` and `<eot>` the embedding of the token behind which the plain model begins its answer."""
    weight, config = model.get_input_embeddings().weight, model.config
    weight[[config.bot_token_id, config.eot_token_id]] = weight[opening_token(processor)].clone()
