"""The shipped models with weights that all matter, for tests of what others put around every architecture."""

from pathlib import Path

import torch
from conftest import picture, shake, user_turn
from transformers import AutoProcessor

from modeling_latentvlm import DeepLatentForConditionalGeneration, LaReForCausalLM, VedasForConditionalGeneration
from train.common.chat_collator import TrajectoryCollator


CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
CLASSES = {
    "deeplatent": DeepLatentForConditionalGeneration,
    "lare": LaReForCausalLM,
    "vedas": VedasForConditionalGeneration,
}


def load(name: str, folder=None, **settings):
    return CLASSES[name].from_pretrained(folder or CHECKPOINTS / name, **{"dtype": torch.float32, **settings}).eval()


def load_shaken(name: str):
    return shake(load(name)), AutoProcessor.from_pretrained(CHECKPOINTS / name)


def new_weights(model) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.named_parameters() if model.config.is_new_weight(key)}


def is_unread(model, weight: str) -> bool:
    """The last layer of Vedas runs again over tokens of the prompt that nothing reads any more."""
    return f".layers.{model.config.get_text_config().num_hidden_layers - 1}.router." in weight


def question(text: str, *seeds: int) -> list[dict]:
    return user_turn(text, *(picture(56, 84, seed) for seed in seeds))


def encode_rows(processor, conversations: list, **settings) -> dict:
    inputs = processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
        **settings,
    )
    return dict(inputs)


def training_batch(name: str, processor) -> dict:
    """Two questions with an answer each; DeepLatent's hold a block."""
    rows = []
    for seed, text in ((1, "red"), (2, "the answer is blue")):
        latent = [{"type": "latent", "grid": [2, seed]}] if name == "deeplatent" else []
        answer = {"role": "assistant", "content": [*latent, {"type": "text", "text": text}]}
        rows.append({"messages": [*question("what colour?", seed), answer]})
    return TrajectoryCollator(processor)(rows)
