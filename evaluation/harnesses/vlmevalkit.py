"""Our checkpoints in VLMEvalKit (`nvidia-vlmeval`), in its own environment.

    LMUData=FOLDER_OF_TSVS python -m evaluation.harnesses.vlmevalkit --checkpoint lare=out/lare --max_new_tokens 256 \
        --model lare --data MMVP --judge exact_matching --work-dir out/vlmevalkit

`--checkpoint NAME=FOLDER` names models for the harness; further options are `AnswerSettings`' and `Answerer`'s, and all
others go to `vlmeval.run`. In a script of one's own: `register("lare", "out/lare")`, then VLMEvalKit as usual.
"""

import sys
from dataclasses import dataclass, field, fields
from functools import partial

from vlmeval.config import supported_VLM
from vlmeval.run import main as run
from vlmeval.vlm.base import BaseModel

from conversion.commands import exit_on_error
from conversion.dataclass_parser import DataclassParser
from evaluation.answering import AnswerSettings
from evaluation.harnesses.answerer import Answerer, as_conversation


@dataclass
class CheckpointArguments:
    """Which checkpoints the harness gets to know, and how they are loaded."""

    checkpoint: list[str] = field(metadata={"help": "NAME=FOLDER of a checkpoint; more than one may be given."})
    dtype: str = field(default="auto", metadata={"help": "Of the weights."})
    device: str | None = field(default=None, metadata={"help": "By default a GPU where there is one."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Of the language model."})
    keep_reasoning: bool = field(default=False, metadata={"help": "Hand over all that is written, not the box alone."})


class LatentVLM(BaseModel):
    """A checkpoint of any architecture, or a plain one, asked one question at a time as the harness does."""

    INTERLEAVE = True
    allowed_types = ("text", "image")

    def __init__(self, model: str, **settings):
        super().__init__()
        self.answerer = Answerer(model, **({"batch_size": 1} | settings))

    def generate_inner(self, message: list[dict], dataset: str | None = None) -> str:
        return self.answerer.answer([as_conversation([(item["type"], item["value"]) for item in message])])[0]


def register(name: str, model: str, **settings) -> None:
    """Make a checkpoint known to VLMEvalKit under a name.

    Raises:
        ValueError: the name is taken.
    """
    if name in supported_VLM:
        raise ValueError(f"VLMEvalKit has a model named {name!r} already.")
    supported_VLM[name] = partial(LatentVLM, model=model, **settings)


def main() -> None:
    parser = DataclassParser((CheckpointArguments, AnswerSettings), description=__doc__.splitlines()[0])
    with exit_on_error():
        checkpoints, settings, others = parser.parse_args_into_dataclasses(return_remaining_strings=True)
        loading = {one.name: getattr(checkpoints, one.name) for one in fields(checkpoints) if one.name != "checkpoint"}
        for one in checkpoints.checkpoint:
            name, equals, folder = one.partition("=")
            if not equals:
                raise ValueError(f"`checkpoint` takes NAME=FOLDER, got {one!r}.")
            register(name, folder, **loading, **settings.to_dict())
    sys.argv = [sys.argv[0], *others]
    run()


if __name__ == "__main__":
    with exit_on_error():
        main()
