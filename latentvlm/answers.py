"""Does a checkpoint still answer as it did when it was written?"""

import os

from transformers import AutoModel

from modeling_latentvlm.answer_check import AnswerReport


def check_known_answers(checkpoint: str | os.PathLike, **loading) -> AnswerReport:
    """Load a checkpoint and compare its answer to the question it carries with the one it had when it was written.

    Args:
        loading: arguments of `AutoModel.from_pretrained`, such as `dtype` and `device_map`.

    Raises:
        ValueError: the checkpoint carries no known answers, or its weights or config are others than those that answered.
    """
    return AutoModel.from_pretrained(checkpoint, **loading).check_known_answers()
