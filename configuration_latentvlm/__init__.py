"""Configurations of the latentvlm architectures, registered with `AutoConfig`.

Registration lives here and not in the modules, which travel with checkpoints: a checkpoint's code must never replace
the one that another checkpoint brought (see `hub_code.py`).
"""

from transformers import AutoConfig

from configuration_latentvlm.configuration_deeplatent import DeepLatentConfig
from configuration_latentvlm.configuration_lare import LaReConfig
from configuration_latentvlm.configuration_vedas import VedasConfig
from configuration_latentvlm.hub_code import __version__


# The one list of architectures; what each of them is stands on its config class (see `latent_architecture.py`).
ARCHITECTURES = {config_class.model_type: config_class for config_class in (DeepLatentConfig, LaReConfig, VedasConfig)}

for model_type, config_class in ARCHITECTURES.items():
    AutoConfig.register(model_type, config_class)

__all__ = ["DeepLatentConfig", "LaReConfig", "VedasConfig", "__version__"]
