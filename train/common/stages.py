"""Stages of a training that end by accuracy: how long they last, what they show, and how the learning rate follows.

    stage n      lasts until the accuracy on held-out questions reaches `stage_accuracy`, at most its number of epochs
    last stage   lasts all its epochs; with `decay_last_stage` the learning rate falls to zero over them

An epoch is the unit in which stages are counted; `samples_per_epoch` makes it short. Everything that is decided during a run
stands in the log history of the trainer's checkpoints, so that a resumed run goes on in the same stage.

Shapes: B rows, S columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback

from train.common.training_model import seed_of


MEASURES = ("answer", "turn")
ANSWER_HEADER = "The answer is"


def answer_text(answer: str) -> str:
    return f"{ANSWER_HEADER} \\boxed{{{answer}}}."


@dataclass
class StageArguments:
    """When stages end, and what they show."""

    stage_accuracy: float | None = field(
        default=None,
        metadata={
            "help": "A stage but the last ends with the epoch in which this share of the held-out questions is right. "
            "`--epochs_per_stage` is then the most that a stage takes."
        },
    )
    stage_measure: str = field(
        default="answer",
        metadata={
            "help": "What must be right, where all earlier words are given: the sentence with the answer (`answer`), or "
            "everything the assistant writes (`turn`), which is what greedy decoding writes word for word."
        },
    )
    eval_share: float = field(
        default=0.0,
        metadata={"help": "Share of the pictures whose questions are held out, without `--eval_data_path`."},
    )
    samples_per_epoch: int | None = field(
        default=None,
        metadata={"help": "Questions in an epoch; by default all of them. The next epoch goes on behind."},
    )
    stage_longest: list[int] | None = field(
        default=None,
        metadata={
            "help": "For every stage the longest rationale, in steps, whose question is asked: easy ones first."
        },
    )
    decay_last_stage: bool = field(
        default=False, metadata={"help": "Let the learning rate fall linearly to zero over the last stage."}
    )

    def __post_init__(self):
        if self.stage_accuracy is not None and not 0 < self.stage_accuracy <= 1:
            raise ValueError(f"`stage_accuracy` must be above 0 and at most 1, got {self.stage_accuracy}.")
        if self.stage_measure not in MEASURES:
            raise ValueError(f"`stage_measure` must be one of {MEASURES}, got {self.stage_measure!r}.")
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"`eval_share` must be from 0 to below 1, got {self.eval_share}.")
        if self.samples_per_epoch is not None and self.samples_per_epoch < 1:
            raise ValueError(f"`samples_per_epoch` must be >= 1, got {self.samples_per_epoch}.")
        if self.stage_longest is not None and min(self.stage_longest, default=0) < 1:
            raise ValueError(f"`stage_longest` must be whole numbers >= 1, got {self.stage_longest}.")

    def prepare(self, training_args, num_stages: int, has_eval_data: bool) -> None:
        """Check what the stages need of the training's arguments, and switch the evaluation on.

        Raises:
            ValueError: settings that contradict each other; the message names them.
        """
        if self.stage_longest is not None and len(self.stage_longest) != num_stages:
            raise ValueError(
                f"`stage_longest` must have one number for each of {num_stages} stages, got {self.stage_longest}."
            )
        if has_eval_data and self.eval_share:
            raise ValueError("Give held-out questions by `eval_data_path` or by `eval_share`, not by both.")
        if training_args.max_steps > 0 and (self.stage_accuracy is not None or self.decay_last_stage):
            raise ValueError(
                "`max_steps` cannot be set with `stage_accuracy` or `decay_last_stage`: epochs are counted."
            )
        kind = str(getattr(training_args.lr_scheduler_type, "value", training_args.lr_scheduler_type))
        if self.decay_last_stage and kind not in ("constant", "constant_with_warmup"):
            raise ValueError(
                f"`decay_last_stage` needs `lr_scheduler_type` constant or constant_with_warmup, got {kind}."
            )
        if self.stage_accuracy is None:
            return
        if not (has_eval_data or self.eval_share):
            raise ValueError("`stage_accuracy` needs held-out questions: give `eval_data_path` or `eval_share`.")
        if training_args.eval_strategy == "steps":
            raise ValueError("`stage_accuracy` evaluates at the end of every epoch: leave `eval_strategy` out.")
        training_args.eval_strategy = type(training_args.eval_strategy)("epoch")


class RowsUpTo(Dataset):
    """The rows that a stage shows: those with rationales of at most so many steps. The curriculum sets the limit.

    Args:
        lengths: steps of every row; by default those of its `steps`.
    """

    def __init__(self, rows: Sequence, lengths: Sequence[int] | None = None):
        self.rows, self.lengths = rows, lengths
        # Shared, so that worker processes that live through several epochs follow: the limit (0: none), the epoch.
        self._now = torch.zeros(2, dtype=torch.long).share_memory_()
        self._shown: tuple[int, list[int]] = (0, list(range(len(rows))))

    def begin(self, epoch: int, longest: int | None) -> None:
        """Show the rows of an epoch.

        Raises:
            ValueError: no row is short enough.
        """
        self._now.copy_(torch.tensor([longest or 0, epoch]))
        if not self.shown():
            raise ValueError(f"No question has a rationale of at most {longest} steps.")

    def shown(self) -> list[int]:
        longest = int(self._now[0])
        if self._shown[0] != longest:
            lengths = [len(row.steps) for row in self.rows] if self.lengths is None else self.lengths
            short = [number for number, length in enumerate(lengths) if length <= longest]
            self._shown = longest, short if longest else list(range(len(self.rows)))
        return self._shown[1]

    def __len__(self) -> int:
        return len(self.shown())

    def __getitem__(self, number: int):
        return self.rows[self.shown()[number]]


class EpochPortions(RowsUpTo):
    """Epochs of a given number of rows: consecutive portions of an endless sequence of shuffles of all shown rows.

    Args:
        size: rows in an epoch.
        seed: of the shuffles.
    """

    def __init__(self, rows: Sequence, size: int, seed: int, lengths: Sequence[int] | None = None):
        super().__init__(rows, lengths)
        self.size, self.seed = size, seed
        self._orders: dict[tuple[int, int], list[int]] = {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int):
        if number >= self.size:
            raise IndexError(number)
        shown = self.shown()
        shuffle, place = divmod(int(self._now[1]) * self.size + number, len(shown))
        return self.rows[shown[self._order(shuffle, len(shown))[place]]]

    def _order(self, shuffle: int, count: int) -> list[int]:
        if (shuffle, count) not in self._orders:
            if len(self._orders) > 1:  # an epoch lies in two shuffles at most, where it is no longer than one
                self._orders.pop(next(iter(self._orders)))
            generator = torch.Generator().manual_seed(seed_of(self.seed, shuffle, count))
            self._orders[shuffle, count] = torch.randperm(count, generator=generator).tolist()
        return self._orders[shuffle, count]


def hold_out(samples: list, share: float, seed: int) -> tuple[list, list]:
    """(questions to learn from, held-out ones): all questions about a picture are on the same side.

    Raises:
        ValueError: nothing would be left on one of the sides.
    """
    sides = split_by_pictures([sample.images for sample in samples], share, seed)
    return tuple([samples[number] for number in side] for side in sides)


def split_by_pictures(images: Sequence[Sequence], share: float, seed: int) -> tuple[list[int], list[int]]:
    """(numbers of questions to learn from, of held-out ones), by the images of each question; see `hold_out`."""
    keys = [tuple(image if isinstance(image, str) else id(image) for image in shown) for shown in images]
    keys = [key or (number,) for number, key in enumerate(keys)]  # a question without a picture stands alone
    pictures = list(dict.fromkeys(keys))
    count = round(share * len(pictures))
    if not 0 < count < len(pictures):
        raise ValueError(
            f"`eval_share` {share} of {len(pictures)} pictures leaves nothing to learn from or to hold out."
        )
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed_of(seed, len(pictures))))
    held = {pictures[number] for number in order[:count].tolist()}
    sides = ([], [])
    for number, key in enumerate(keys):
        sides[key in held].append(number)
    return sides


def plan_epochs(given: int | list[int], num_stages: int) -> list[int]:
    """The epochs of every stage, of `epochs_per_stage`.

    Raises:
        ValueError: there are not as many numbers as stages, or one is below 1.
    """
    epochs = [given] if isinstance(given, int) else list(given)
    if len(epochs) not in (1, num_stages) or min(epochs) < 1:
        raise ValueError(
            f"`epochs_per_stage` must be >= 1, one number or one for each of {num_stages} stages, got {given}."
        )
    return epochs * num_stages if len(epochs) == 1 else epochs


def shown_rows(
    data: Sequence,
    eval_data: Sequence | None,
    arguments: StageArguments,
    seed: int,
    lengths: Sequence[int] | None = None,
    eval_lengths: Sequence[int] | None = None,
) -> tuple:
    """The data as `Trainer` gets them; wrapped where epochs are short or stages show a part.

    Args:
        lengths, eval_lengths: steps of every row; by default those of its `steps`.
    """
    if arguments.samples_per_epoch is None and arguments.stage_longest is None:
        return data, eval_data
    rows = EpochPortions(data, arguments.samples_per_epoch or len(data), seed, lengths)
    return rows, None if eval_data is None else RowsUpTo(eval_data, eval_lengths)


class AnswerAccuracy:
    """Accuracy where all earlier words are given, for `Trainer`: the functions `reduce` and `average`.

    Args:
        tokenizer: of the processor.
        never: a token that is no target (latent slots).
    """

    def __init__(self, tokenizer, never: int):
        self.header = torch.tensor(tokenizer(ANSWER_HEADER, add_special_tokens=False)["input_ids"])
        self.never = never

    def reduce(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B, 2): whether each row's answer, and all of its turn, is what the model finds most likely."""
        targets = labels[:, 1:]
        counts = (targets != -100) & (targets != self.never)
        wrong = counts & (logits[:, :-1].argmax(dim=-1) != targets)
        header = self.header.to(labels.device)
        begins = (targets.unfold(1, len(header), 1) == header).all(dim=-1)
        # The last place where the header stands; the words before it are given.
        first = begins.shape[1] - 1 - begins.flip(1).int().argmax(dim=1)
        after = torch.arange(targets.shape[1], device=labels.device) >= first[:, None]
        return torch.stack([~(wrong & after).any(dim=1), ~wrong.any(dim=1)], dim=1).float()

    @staticmethod
    def average(predictions) -> dict[str, float]:
        answer, turn = torch.as_tensor(predictions.predictions).mean(dim=0).tolist()
        return {"answer_accuracy": answer, "turn_accuracy": turn}


class Curriculum(TrainerCallback):
    """Sets the stage at every epoch, and ends stages; a resumed run finds its stage in the log history.

    Args:
        collator: its `stage` is set.
        stages: the stages in their order.
        epochs_per_stage: of all or of each; after the last of them, the last stage goes on.
        arguments: when stages end; by default after their epochs.
        datasets: of `RowsUpTo`, which are told of every epoch.
    """

    def __init__(
        self,
        collator,
        stages: list[int],
        epochs_per_stage: int | list[int],
        arguments: StageArguments | None = None,
        datasets: tuple[RowsUpTo, ...] = (),
    ):
        self.collator, self.stages, self.datasets = collator, stages, datasets
        self.arguments = arguments or StageArguments()
        is_one = isinstance(epochs_per_stage, int)
        self.epochs = [epochs_per_stage] * len(stages) if is_one else list(epochs_per_stage)
        self.begins = [0]  # the epochs in which stages begin, as far as known
        self.steps_per_epoch = 0.0
        if self.arguments.stage_accuracy is None:
            self.begins = [0, *accumulate(self.epochs[:-1])]

    @property
    def is_last(self) -> bool:
        """Whether it is known when the last stage begins."""
        return len(self.begins) == len(self.stages)

    def number_of(self, epoch: float) -> int:
        return sum(begin <= int(epoch) for begin in self.begins) - 1

    def restore(self, state) -> None:
        """Take the ends of stages that a resumed run had seen from its log."""
        if self.arguments.stage_accuracy is not None:
            self.begins = [0, *(entry["epoch"] for entry in state.log_history if "begins_stage" in entry)]

    def is_finished(self, state) -> bool:
        """Whether a resumed run was at the end of its last stage, which may be before its last epoch."""
        self.restore(state)
        return self.is_last and (state.epoch or 0) >= self.begins[-1] + self.epochs[-1]

    def on_train_begin(self, args, state, control, **kwargs):
        self.restore(state)
        self.steps_per_epoch = state.max_steps / args.num_train_epochs

    def on_epoch_begin(self, args, state, control, **kwargs):
        epoch = int(state.epoch or 0)
        number = self.number_of(epoch)
        self.collator.stage = self.stages[number]
        for data in self.datasets:
            data.begin(epoch, self.arguments.stage_longest and self.arguments.stage_longest[number])

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        reached = (metrics or {}).get(f"eval_{self.arguments.stage_measure}_accuracy")
        if (
            self.arguments.stage_accuracy is not None
            and reached is not None
            and reached >= self.arguments.stage_accuracy
        ):
            self._end_stage(state)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.arguments.stage_accuracy is None:
            return
        if int(state.epoch) - self.begins[-1] >= self.epochs[len(self.begins) - 1]:
            control.should_training_stop |= self.is_last
            self._end_stage(state)

    def _end_stage(self, state) -> None:
        """Begin the next stage with the next epoch. Evaluations within an epoch, or of a stage that has ended, change nothing."""
        if self.is_last or state.epoch != int(state.epoch) or int(state.epoch) == self.begins[-1]:
            return
        stage = self.stages[len(self.begins)]
        self.begins.append(int(state.epoch))
        state.log_history.append({"begins_stage": stage, "epoch": self.begins[-1], "step": state.global_step})

    def scale_rate(self, step: int) -> float:
        """The factor on the learning rate of a step."""
        if not self.arguments.decay_last_stage or not self.is_last or not self.steps_per_epoch:
            return 1.0
        done = step / self.steps_per_epoch - self.begins[-1]
        return min(1.0, max(0.0, 1 - done / self.epochs[-1]))

    def log_terms(self) -> dict[str, float]:
        return {"stage": self.collator.stage}
