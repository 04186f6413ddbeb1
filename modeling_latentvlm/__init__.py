"""Models of the latentvlm architectures, registered with the auto classes (see `configuration_latentvlm/__init__.py`)."""

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

import configuration_latentvlm  # noqa: F401
from modeling_latentvlm.modeling_deeplatent import DeepLatentForConditionalGeneration
from modeling_latentvlm.modeling_lare import LaReForCausalLM
from modeling_latentvlm.modeling_vedas import VedasForConditionalGeneration
from modeling_latentvlm.trace import LatentStep, LatentTrace


for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
    for model_class in (DeepLatentForConditionalGeneration, LaReForCausalLM, VedasForConditionalGeneration):
        auto_class.register(model_class.config_class, model_class)

__all__ = [
    "DeepLatentForConditionalGeneration",
    "LaReForCausalLM",
    "LatentStep",
    "LatentTrace",
    "VedasForConditionalGeneration",
]
