"""Questions with known answers as a model gets them, and whether its answers are right."""

from collections.abc import Sequence

from train.reasoning_data import ReasoningSample


BOX = "\\boxed{"


def find_box(text: str) -> str | None:
    """What the last closed `\\boxed{...}` holds, braces inside it included; None without one."""
    start = text.rfind(BOX)
    while start >= 0:
        depth = 1
        for at in range(start + len(BOX), len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if not depth:
                return text[start + len(BOX) : at].strip()
        start = text.rfind(BOX, 0, start)
    return None


def extract_answer(text: str) -> str:
    """What the last closed `\\boxed{...}` holds; without one, the whole text."""
    box = find_box(text)
    return text.strip() if box is None else box


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


def accuracy(answers: list[str], samples: list[ReasoningSample]) -> float:
    """The share of answers that are right, letter case and blanks aside."""
    right = [normalize(answer) == normalize(sample.answer) for answer, sample in zip(answers, samples)]
    return sum(right) / len(right)
