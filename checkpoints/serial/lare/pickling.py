"""Models that pickle, `torch.save` and `deepcopy` take after they have run, and that run on in a process that has built none.

transformers leaves traces of its recording of hidden states in two places that a pickled model does not survive: hooks that are
local functions, in the parts that have returned them (a vision tower here, and that of a stock LLaVA), and a registry that a
model enters when it is built.
"""

from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY


RECORDING = "transformers.utils.output_capturing"  # the module of the hooks


def remove_recording_hooks(model: nn.Module) -> None:
    """Take away the hooks that recorded hidden states; transformers installs them again at the next call."""
    for module in model.modules():
        module.__dict__.pop("_output_capturing_hooks_installed", None)
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", None) == RECORDING:
                del module._forward_hooks[key]


def register_recorded_outputs(model: nn.Module) -> None:
    """Enter the parts of a model into the registry of what can be recorded."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            # By name of the class in every version, although newer ones also take the model itself as the key.
            dict.__setitem__(_CAN_RECORD_REGISTRY, str(module.__class__), module._can_record_outputs)


class PicklingMixin:
    """For a model; lies before `PreTrainedModel`."""

    def __getstate__(self) -> dict:
        """Not while another thread runs the model: it would record nothing."""
        remove_recording_hooks(self)
        return super().__getstate__()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        register_recorded_outputs(self)
