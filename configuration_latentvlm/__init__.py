"""Configurations of the latentvlm architectures, registered with `AutoConfig`.

Registration lives here and not in the modules, which travel with checkpoints: a checkpoint's code must never replace
the one that another checkpoint brought (see `hub_code.py`).
"""

from transformers import AutoConfig

from configuration_latentvlm.configuration_deeplatent import DeepLatentConfig
from configuration_latentvlm.configuration_lare import LaReConfig
from configuration_latentvlm.configuration_vedas import VedasConfig
from configuration_latentvlm.hub_code import __version__


for config_class in (DeepLatentConfig, LaReConfig, VedasConfig):
    AutoConfig.register(config_class.model_type, config_class)

__all__ = ["DeepLatentConfig", "LaReConfig", "VedasConfig", "__version__"]
