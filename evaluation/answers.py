"""Questions with known answers as a model gets them, and whether its answers are right."""

from collections.abc import Sequence

from evaluation.final_answer import BOX, find_box, is_right, normalize, read_final_answer
from train.data.reasoning_data import ReasoningSample


__all__ = ["BOX", "find_box", "normalize"]  # where they were before `evaluation.final_answer`


def extract_answer(text: str) -> str:
    """The final answer in a text, without the markup around it."""
    return read_final_answer(text).text


def encode_questions(processor, samples: list[ReasoningSample]):
    """Padded model inputs of the questions and their images, up to where the answers begin."""
    return encode_conversations(processor, [conversation_of(sample) for sample in samples])


def conversation_of(sample: ReasoningSample) -> list[dict]:
    """The question as a chat: its images, then its text."""
    images = [{"type": "image", "image": image} for image in sample.load_images()]
    return [{"role": "user", "content": [*images, {"type": "text", "text": sample.question}]}]


def encode_conversations(processor, conversations: Sequence[list[dict]]):
    """Padded model inputs of chats, up to where the answers begin."""
    return processor.apply_chat_template(
        list(conversations),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def accuracy(answers: list[str], samples: list[ReasoningSample]) -> float:
    """The share of answers that are right: the same text or the same choice."""
    right = [is_right(answer, sample.answer, may_calculate=False) for answer, sample in zip(answers, samples)]
    return sum(right) / len(right)
