"""What a run ran on, in words, as records and model cards give it."""

import os
import platform


def hardware() -> str:
    """The device with its libraries; without a GPU the cores and the threads that torch takes of them."""
    import torch
    import transformers

    device = f"{os.cpu_count()} CPU cores ({platform.machine()}, {torch.get_num_threads()} threads)"
    if torch.cuda.is_available():
        device = f"one {torch.cuda.get_device_name()}"
    return f"{device}, torch {torch.__version__}, transformers {transformers.__version__}"
