"""Vision-language models that reason in latent space: the public names, and the models as `transformers` finds them.

    import latentvlm
    from transformers import AutoModel

    model = AutoModel.from_pretrained("checkpoints/lare")      # without `trust_remote_code`: the installed code runs

The import itself takes milliseconds. A name is loaded when it is first used, and the architectures are registered when the auto
classes of transformers are (`registration.py`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from latentvlm.registration import register_with_transformers


if TYPE_CHECKING:
    from configuration_latentvlm import DeepLatentConfig, LaReConfig, VedasConfig, __version__
    from latentvlm.answers import check_known_answers
    from modeling_latentvlm import (
        DeepLatentForConditionalGeneration,
        LaReForCausalLM,
        LatentStep,
        LatentTrace,
        VedasForConditionalGeneration,
    )
    from modeling_latentvlm.interventions import ChangeAt, draw_by_row
    from processing_latentvlm import DeepLatentProcessor, LaReProcessor, VedasProcessor, draw_trace

# Where each public name is; that module is imported when the name is first used.
_HOMES = {
    "DeepLatentConfig": "configuration_latentvlm",
    "LaReConfig": "configuration_latentvlm",
    "VedasConfig": "configuration_latentvlm",
    "__version__": "configuration_latentvlm",
    "DeepLatentForConditionalGeneration": "modeling_latentvlm",
    "LaReForCausalLM": "modeling_latentvlm",
    "VedasForConditionalGeneration": "modeling_latentvlm",
    "LatentStep": "modeling_latentvlm",
    "LatentTrace": "modeling_latentvlm",
    "ChangeAt": "modeling_latentvlm.interventions",
    "draw_by_row": "modeling_latentvlm.interventions",
    "DeepLatentProcessor": "processing_latentvlm",
    "LaReProcessor": "processing_latentvlm",
    "VedasProcessor": "processing_latentvlm",
    "draw_trace": "processing_latentvlm",
    "check_known_answers": "latentvlm.answers",
}

__all__ = [
    "ChangeAt",
    "DeepLatentConfig",
    "DeepLatentForConditionalGeneration",
    "DeepLatentProcessor",
    "LaReConfig",
    "LaReForCausalLM",
    "LaReProcessor",
    "LatentStep",
    "LatentTrace",
    "VedasConfig",
    "VedasForConditionalGeneration",
    "VedasProcessor",
    "__version__",
    "check_known_answers",
    "draw_by_row",
    "draw_trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'latentvlm' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
