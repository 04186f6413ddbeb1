"""What everything outside an architecture's own files knows of it, declared once, on its config class.

Adding an architecture: its config class derives from `LatentArchitectureMixin` and says in class attributes and a few
properties what evaluation, the faithfulness report, analyses, examples and the commands need to know. Nothing outside
the architecture's own files asks for its name, so none of them changes. A minimal declaration:

    class EchoConfig(LatentArchitectureMixin, HubCodeMixin, Qwen2_5_VLConfig):
        model_type = "echo"
        hub_classes = {"AutoConfig": .., "AutoProcessor": .., "AutoModel": ..}   # the processor's and the model's class
        latent_unit = "step"                       # it takes steps behind the prompt; "block": it opens blocks in its text
        latent_count_field = "num_echo_steps"      # the field that counts them; 0 is the plain backbone
        latent_modules = ("echo_head",)            # its new weights: kept in full beside adapters, trained as a whole
        frozen_modules = ("visual",)               # what fine-tuning leaves as it is
        latent_token_fields = ("echo_token_id",)   # fields with the ids of its tokens
        training_command = "train.train_echo"

        def step_tokens(self):                     # what stands in `input_ids` for the steps of one answer
            return [self.echo_token_id] * self.num_echo_steps

The layers that sharding keeps whole are named on the model class, by transformers' `_no_split_modules`; of several
possible backbones all may be named, since a model keeps those that it has (`sharded_layers.py`). Numbers that a processor
needs of the config are read from there (`LatentProcessorMixin.numbers_of`).

`AutoConfig.register` in `configuration_latentvlm/__init__.py` makes it known; tests/test_architectures.py then holds the
declarations to the model: a module that is not there, a layer class that no layer has, or a count that `generate` does
not take, fails.

This file travels with every checkpoint, so it stays small, and its names stay as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar


UNITS = ("block", "step")


class LatentArchitectureMixin:
    """For a config class: what its architecture does with latents. Stands before the config of the backbone."""

    # "block": the model opens blocks of latents in its text; "step": it takes steps between prompt and answer.
    latent_unit: ClassVar[str] = ""
    # The field with the number of steps of an answer, or the most blocks that it opens; 0 is the plain backbone.
    latent_count_field: ClassVar[str] = ""
    # Arguments of `generate`, where it has them: one in the field's place, the least number of blocks, and their size.
    latent_count_argument: ClassVar[str | None] = None
    least_count_argument: ClassVar[str | None] = None
    latent_grid_argument: ClassVar[str | None] = None
    # Names of modules, anywhere in the model, whose weights no backbone has.
    latent_modules: ClassVar[tuple[str, ...]] = ()
    # Names of modules that fine-tuning leaves as they are: the vision tower.
    frozen_modules: ClassVar[tuple[str, ...]] = ()
    # Fields with the ids of its own tokens, and which of those enclose latents, opening and closing.
    latent_token_fields: ClassVar[tuple[str, ...]] = ()
    latent_marker_fields: ClassVar[tuple[str, ...]] = ()
    # The command that trains it, and the class whose `for_model` makes its batches of chats.
    training_command: ClassVar[str] = ""
    chat_collator: ClassVar[str] = "train.common.chat_collator.TrajectoryCollator"
    # Whether training teaches latents from pictures in assistant messages, or to give pictures back.
    learns_from_assistant_images: ClassVar[bool] = False
    reconstructs_images: ClassVar[bool] = False
    # Whether a step feeds image tokens of the prompt again, and forwards without a cache always begin with the prompt.
    replays_image_tokens: ClassVar[bool] = False

    # Whether the answer attends to the images of the prompt.
    answer_sees_image = True

    @property
    def shows_latents_one_by_one(self) -> bool:
        """Whether interventions get the latents of a block one at a time, and not all together."""
        return False

    @property
    def recomputes_sequence(self) -> bool:
        """Whether every forward computes the whole sequence anew, so that later tokens change earlier ones."""
        return False

    @property
    def latent_count(self) -> int:
        """Steps of an answer, or the most blocks that it opens."""
        return getattr(self, self.latent_count_field)

    @property
    def latent_count_limit(self) -> int | None:
        """The most that `latent_count_field` may be set to; None where nothing limits it."""
        return None

    @property
    def opening_token_id(self) -> int | None:
        """The token that opens a block when the model writes it; None where latents are steps."""
        return None

    @property
    def latent_grid_limit(self) -> int | None:
        """The largest height and width of a block whose latents form a grid; None where they form none."""
        return None

    @property
    def given_latent_grid(self) -> tuple[int, int] | None:
        """(height, width) that every block has; None where it depends on the picture or there are no blocks."""
        return None

    @property
    def unused_token_id(self) -> int:
        """An id that no text holds, for markers that are to be taken for ordinary tokens."""
        return -1

    @property
    def marker_ids(self) -> list[int]:
        """The tokens that enclose latents: the opening and the closing one, or none."""
        return [getattr(self, name) for name in self.latent_marker_fields]

    def step_tokens(self) -> list[int]:
        """What stands in `input_ids` between a prompt and its answer for the steps; nothing where latents are blocks."""
        return []

    def limit_latents(self, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """With which config fields and arguments of `generate` an answer takes `count` steps, or opens at most so many
        blocks: (fields, arguments). 0 is the plain backbone.
        """
        if self.latent_count_argument is not None:
            return {}, {self.latent_count_argument: count}
        return {self.latent_count_field: count}, {}

    def force_latents(self, count: int) -> dict[str, Any]:
        """Arguments of `generate` with which an answer opens at least `count` blocks.

        Raises:
            ValueError: latents are steps, which are taken behind any prompt.
        """
        if self.least_count_argument is None:
            raise ValueError(
                f"`min_blocks` is for models that open blocks, not for {self.model_type}, which takes its steps anyway."
            )
        return {self.least_count_argument: count, self.latent_count_argument: max(count, self.latent_count)}

    @classmethod
    def is_new_weight(cls, name: str) -> bool:
        """Whether a weight of this name belongs to the architecture and not to its backbone."""
        return not set(cls.latent_modules).isdisjoint(name.split("."))

    @classmethod
    def is_frozen_weight(cls, name: str) -> bool:
        """Whether fine-tuning leaves a weight of this name as it is."""
        return not set(cls.frozen_modules).isdisjoint(name.split("."))


def has_latents(config: Any) -> bool:
    """Whether a config is of an architecture with latents: one of this library's or of another that declares as much.

    By the declaration and not by the class, which is another one where a checkpoint brought it.
    """
    return getattr(config, "latent_unit", None) in UNITS


@contextmanager
def changed_fields(config: Any, **fields: Any) -> Iterator[None]:
    """A config with other fields for a while; afterwards, errors or not, it is as before."""
    kept = {name: getattr(config, name) for name in fields}
    try:
        for name, value in fields.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(config, name, value)
