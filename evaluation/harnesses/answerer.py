"""A checkpoint that answers what a harness asks; what both adapters share, and no harness is imported here."""

from collections.abc import Sequence
from typing import Any

from transformers.utils import logging

from evaluation.answering import AnswerSettings, answer_batch, check_settings
from evaluation.final_answer import read_final_answer
from evaluation.loading import load_model, load_processor
from train.data.reasoning_data import ReasoningSample


logger = logging.get_logger(__name__)
PASSED_ON = ("max_new_tokens", "num_beams", "repetition_penalty")
READER = ReasoningSample([], "", [], "", "A question of the harness")  # reads images, and says what is wrong with them


class Answerer:
    """A checkpoint and how it is asked.

    Args:
        keep_reasoning: return all that was written; by default the final answer, where one is marked, since harnesses look for the
            answer in what they get.
        trust_remote_code: run what the checkpoint of another model type brings.
        settings: of `AnswerSettings`.
    """

    def __init__(
        self,
        model: str,
        dtype: str = "auto",
        device: str | None = None,
        attn_implementation: str | None = None,
        keep_reasoning: bool = False,
        trust_remote_code: bool = False,
        **settings: Any,
    ):
        self.settings = AnswerSettings(**settings)
        if self.settings.repeats > 1:
            raise ValueError(f"A harness asks as often as it likes: `repeats` must be 1, got {self.settings.repeats}.")
        if self.settings.latent_intervention == "swap":
            raise ValueError(
                "`latent_intervention=swap` needs questions with known answers and tasks to find donors among, which a harness does "
                "not give: use `python -m evaluation.evaluate`."
            )
        self.keep_reasoning = keep_reasoning
        self.model = load_model(model, dtype, device, attn_implementation, trust_remote_code)
        self.processor = load_processor(model, trust_remote_code)
        check_settings(self.model, self.settings)

    def answer(self, conversations: Sequence[list[dict]], seed: int = 0, **generate: Any) -> list[str]:
        answers = answer_batch(
            self.model, self.processor, conversations, self.settings, self.settings.seed + seed, **generate
        )
        return [answer.text if self.keep_reasoning else shorten(answer.text) for answer in answers]


def shorten(text: str) -> str:
    """The final answer where one is marked, else all that was written."""
    found = read_final_answer(text)
    return found.text if found.is_marked and found.text else text


def as_conversation(parts: Sequence[tuple[str, Any]]) -> list[dict]:
    """A question as a chat, of ("text", text) and ("image", path or PIL image), in their order.

    Raises:
        ValueError: another kind of part, or an image that cannot be read.
    """
    content: list[dict] = []
    for kind, value in parts:
        if kind == "text":
            content.append({"type": "text", "text": value})
        elif kind == "image":
            content.append({"type": "image", "image": READER.load_image(value)})
        else:
            raise ValueError(f"Questions are made of text and images, got a part of type {kind!r}.")
    return [{"role": "user", "content": content}]


def generation_settings(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What lmms-eval's `gen_kwargs` mean for `generate`, and the texts at which an answer ends.

    Sampling where a temperature above 0 is asked for, else greedy. The harness' default end, a blank line, is left out:
    reasoning has blank lines.

    Raises:
        ValueError: an argument with no meaning here.
    """
    given = dict(given)
    ends = given.pop("until", None) or []
    ends = [end for end in ([ends] if isinstance(ends, str) else ends) if end.strip()]
    temperature = given.pop("temperature", None)
    wanted: dict[str, Any] = {name: given.pop(name) for name in PASSED_ON if given.get(name) is not None}
    top_p = given.pop("top_p", None)
    if top_p not in (None, 1) and not temperature:
        logger.warning_once(
            f"`gen_kwargs` give top_p={top_p} without a temperature: answers are greedy, it means nothing."
        )
    given.pop("do_sample", None)  # as with the harness' own models, the temperature decides
    given.pop("image_aspect_ratio", None)  # how LLaVA lays out images; tasks name it for all models
    if temperature:
        wanted |= {"do_sample": True, "temperature": temperature} | ({} if top_p is None else {"top_p": top_p})
    left = {name: value for name, value in given.items() if value is not None}
    if left:
        raise ValueError(f"`gen_kwargs` may give until, temperature, top_p and {PASSED_ON}, got also {left}.")
    return wanted, ends


def cut(text: str, ends: Sequence[str]) -> str:
    """The text up to the first of its ends."""
    return text[: min((at for end in ends if (at := text.find(end)) >= 0), default=len(text))]
