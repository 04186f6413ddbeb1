"""Which layers sharding and device maps keep whole."""

from torch import nn


def keep_present_layers(model: nn.Module) -> None:
    """Leave in `_no_split_modules` the classes of layers that the model has. Call it at the end of `__init__`.

    A class names the layers of all backbones that it may get, and transformers adds those that the backbone's own classes
    name; FSDP refuses a model that lacks one of them.
    """
    present = {type(module).__name__ for module in model.modules()}
    model._no_split_modules = present.intersection(model._no_split_modules)
