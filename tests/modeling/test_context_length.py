"""An answer that leaves the context is warned of once, by every architecture."""

import logging

import pytest
from conftest import encode, picture, user_turn
from evaluation_material import save_checkpoint
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging as transformers_logging

import modeling_latentvlm  # noqa: F401
import processing_latentvlm  # noqa: F401
from modeling_latentvlm import generation_common


@pytest.mark.core
@pytest.mark.parametrize(
    "kind, fields",
    [("deeplatent", {}), ("deeplatent", {"latent_mode": "autoregressive"}), ("lare", {}), ("vedas", {})],
    ids=["parallel", "autoregressive", "lare", "vedas"],
)
def test_an_answer_that_leaves_the_context_is_warned_of_once(kind, fields, tmp_path):
    folder = save_checkpoint(kind, tmp_path / kind, **fields)
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = encode(processor, [user_turn("what colour?", picture(56, 56))])
    found, handler = [], logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger(generation_common.__name__)
    logger.addHandler(handler)
    transformers_logging.warning_once.cache_clear()
    try:
        settings = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
        model.generate(**inputs, **settings)
        assert not found
        latents = model.generate(**inputs, **settings, return_dict_in_generate=True).num_latents.max()
        text = model.config.get_text_config()
        text.max_position_embeddings = inputs["input_ids"].shape[1] + 4 + int(latents)
        if kind == "lare":
            text.max_position_embeddings += 1
        for _ in range(2):
            model.generate(**inputs, **settings)
        (warning,) = found
        assert f"the context of {text.max_position_embeddings} positions" in warning
    finally:
        logger.removeHandler(handler)
