"""Ask a model questions with known answers, in batches, and compare."""

import re
from collections.abc import Sequence

import torch
from tqdm import tqdm

from train.reasoning_data import ReasoningSample


BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


def extract_answer(text: str) -> str:
    """What the last `\\boxed{...}` holds; without one, the whole text."""
    boxed = BOXED.findall(text)
    return (boxed[-1] if boxed else text).strip()


def normalize(answer: str) -> str:
    return " ".join(answer.lower().strip(" .").split())


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


@torch.no_grad()
def answer_questions(
    model, processor, samples: list[ReasoningSample], batch_size: int = 32, progress: bool = False, **settings
) -> list[str]:
    """Generate an answer to every question, greedily, and return what stands in the boxes.

    Args:
        settings: of `generate`, such as `latent_intervention="zero"` or `max_new_tokens`.
    """
    settings = {"do_sample": False, "max_new_tokens": 64} | settings
    answers = []
    for start in tqdm(range(0, len(samples), batch_size), desc="answering", disable=not progress):
        inputs = encode_questions(processor, samples[start : start + batch_size]).to(model.device)
        written = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        answers += [extract_answer(text) for text in processor.batch_decode(written, skip_special_tokens=True)]
    return answers


def accuracy(answers: list[str], samples: list[ReasoningSample]) -> float:
    """The share of answers that are right, letter case and blanks aside."""
    right = [normalize(answer) == normalize(sample.answer) for answer, sample in zip(answers, samples)]
    return sum(right) / len(right)
