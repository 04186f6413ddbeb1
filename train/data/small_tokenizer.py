"""A small tokenizer of one's own, trained on the texts that a small model will read and write."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conversion.reading import read_json_lines


SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
ROLES = ("user", "assistant")  # every chat holds them: one token each, where questions alone would never teach them
# `generation` marks what the assistant writes, for losses on nothing else (TRL's `assistant_only_loss`).
CHAT_TEMPLATE = (
    "{% macro render(content) %}"
    "{% if content is string %}{{ content }}{% else %}{% for item in content %}"
    "{% if item['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif item['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in item %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ render(message['content']) }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ render(message['content']) }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with Qwen's special tokens and the roles of a chat: any text goes in and comes out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    fast.add_tokens([AddedToken(role, single_word=True, normalized=False) for role in ROLES])
    return fast


def texts_of(*paths: str | Path) -> list[str]:
    """Questions, steps and answers of files that `train.data.tasks` wrote.

    Raises:
        ValueError: a row is not what it writes; the message names it.
    """
    texts = []
    for path in paths:
        for origin, row in read_json_lines(path):
            row = row if isinstance(row, dict) else {}
            rationale = row.get("rationale")
            found = [row.get("question"), *(rationale if isinstance(rationale, list) else [None]), row.get("answer")]
            if not all(isinstance(text, str) for text in found):
                raise ValueError(
                    f"{origin} must be a sample of `train.data.tasks`, with `question`, `rationale` and `answer`."
                )
            texts += [*found, "The answer is \\boxed{"]
    return texts
