"""Count what a reader has to read: functions and files of ours from `<latent>` to the logits behind its block.

    python tests/reading_path.py

A tiny DeepLatent model answers; of the one decoding step whose token is `<latent>` every function that runs is noted in the order in
which it is first called. Functions of transformers and torch are not counted, nor are comprehensions and generated methods.
"""

import os
import sys
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))


PACKAGES = ("configuration_latentvlm", "modeling_latentvlm")


def trace_block_step(**fields) -> list[tuple[str, str]]:
    """(file, function) in the order of the first call, over one decoding step with a block.

    Args:
        fields: of the config.
    """
    from same_numbers_models import (
        GREEDY,
        LATENT_START,
        QWEN_PROMPTS,
        QWEN_SIZES,
        build_deeplatent,
        pad_rows,
        qwen_pixels,
    )

    import configuration_latentvlm

    tree = Path(configuration_latentvlm.__file__).resolve().parent.parent
    model = build_deeplatent(**fields)
    forward, seen = model.forward, {}

    def note(frame, event: str, argument) -> None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_qualname
        if event == "call" and path.parent.parent == tree and path.parent.name in PACKAGES and not name.endswith(">"):
            seen[path.name, name] = None

    def traced(*args, **kwargs):
        input_ids = kwargs.get("input_ids")
        if input_ids is None or input_ids.tolist() != [[LATENT_START]]:
            return forward(*args, **kwargs)
        sys.setprofile(note)
        try:
            return forward(*args, **kwargs)
        finally:
            sys.setprofile(None)

    model.forward = traced
    inputs = pad_rows(QWEN_PROMPTS[:1]) | qwen_pixels(QWEN_SIZES[:1])
    model.generate(**inputs, **GREEDY, min_latent_blocks=1, max_latent_blocks=1)
    return list(seen)


if __name__ == "__main__":
    path = trace_block_step()
    for file, function in path:
        print(f"{file:<32} {function}")
    print(f"{len(path)} functions in {len({file for file, _ in path})} files")
