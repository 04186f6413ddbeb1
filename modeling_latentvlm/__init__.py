"""Models of the latentvlm architectures, registered with the auto classes (see `configuration_latentvlm/__init__.py`)."""

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from configuration_latentvlm import DeepLatentConfig, LaReConfig, VedasConfig
from modeling_latentvlm.modeling_deeplatent import DeepLatentForConditionalGeneration
from modeling_latentvlm.modeling_lare import LaReForCausalLM
from modeling_latentvlm.modeling_vedas import VedasForConditionalGeneration
from modeling_latentvlm.trace import LatentStep, LatentTrace


for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
    auto_class.register(DeepLatentConfig, DeepLatentForConditionalGeneration)
    auto_class.register(LaReConfig, LaReForCausalLM)
    auto_class.register(VedasConfig, VedasForConditionalGeneration)

__all__ = [
    "DeepLatentForConditionalGeneration",
    "LaReForCausalLM",
    "LatentStep",
    "LatentTrace",
    "VedasForConditionalGeneration",
]
