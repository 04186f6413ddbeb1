"""Our checkpoints inside the evaluation harnesses of others; each adapter runs in its harness' environment."""

import sys
from importlib.util import find_spec

import torch


def declare_torchvision_operators() -> torch.library.Library | None:
    """Let a CUDA build of torchvision be imported beside a CPU build of torch, which it refuses without its operators.

    Two schemas are all that the import asks for. Transforms work then, `torchvision.ops` does not. Where torchvision can be
    imported, or is not there, nothing is done.
    """
    if torch.version.cuda is not None or find_spec("torchvision") is None:
        return None
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


# Here, because it must come before the first import of transformers. The operators go when the library does.
TORCHVISION_OPERATORS = declare_torchvision_operators()
