"""Stages that end by accuracy: the measure, the rows that are shown, the learning rate, and runs that go on."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_train_vedas import Killed, logged, state_of, train
from transformers import TrainerControl, TrainerState

from conversion.convert_vedas import convert_vedas
from processing_latentvlm import VedasProcessor
from train.common import training_model
from train.common.stages import AnswerAccuracy, Curriculum, EpochPortions, RowsUpTo, StageArguments, hold_out
from train.data.reasoning_data import ReasoningSample, read_reasoning
from train.data.small_tokenizer import texts_of
from train.data.tasks import write_dataset
from train.recipes.small_backbone import write_backbone
from train.vedas.curriculum import CurriculumCollator


def rows_of(*lengths: int) -> list:
    return [SimpleNamespace(steps=["s"] * length, number=number) for number, length in enumerate(lengths)]


def test_portions_show_every_row_once_before_any_twice():
    rows = EpochPortions(rows_of(*[1] * 10), 4, seed=3)
    seen = []
    for epoch in range(5):
        rows.begin(epoch, None)
        seen += [rows[number].number for number in range(len(rows))]
    assert len(rows) == 4 and sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    again = EpochPortions(rows_of(*[1] * 10), 4, seed=3)
    again.begin(3, None)  # a resumed run begins here
    assert [again[number].number for number in range(4)] == seen[12:16]
    with pytest.raises(IndexError):
        rows[4]


def test_a_stage_shows_short_rationales_alone():
    rows, held_out = EpochPortions(rows_of(1, 3, 2, 1, 4), 6, seed=0), RowsUpTo(rows_of(1, 3, 2))
    for one in (rows, held_out):
        one.begin(1, 2)
    assert {rows[number].number for number in range(6)} == {0, 2, 3}
    assert [held_out[number].number for number in range(len(held_out))] == [0, 2]
    held_out.begin(2, None)
    assert len(held_out) == 3
    with pytest.raises(ValueError, match="at most 1 steps"):
        RowsUpTo(rows_of(2, 3)).begin(0, 1)


def test_questions_about_one_picture_are_held_out_together():
    samples = [ReasoningSample([f"{number // 3}.png"], "q", ["a"], "b", str(number)) for number in range(30)]
    samples.append(ReasoningSample([], "q", ["a"], "b", "alone"))
    kept, held = hold_out(samples, 0.3, seed=1)
    assert len(kept) + len(held) == 31 and len({image for sample in held for image in sample.images}) == 3
    assert not {str(one.images) for one in kept} & {str(one.images) for one in held}
    assert hold_out(samples, 0.3, seed=1) == (kept, held)
    with pytest.raises(ValueError, match="`eval_share` 0.01 of 11 pictures"):
        hold_out(samples, 0.01, seed=1)


def test_the_measure_counts_the_answer_apart_from_the_turn():
    header, slot = [5, 6], 9
    measure = AnswerAccuracy(lambda text, **_: {"input_ids": header}, slot)
    labels = torch.tensor([[-100, slot, 1, 5, 6, 7, 8], [-100, slot, 5, 6, 7, 8, -100]]).repeat_interleave(2, dim=0)
    predicted = labels.roll(-1, dims=1).clamp(min=0)
    predicted[1, 1] = 2  # a word before the answer; the slot of every row is predicted wrongly, which is no fault
    predicted[3, 3] = 2  # the answer
    predicted[:, 0] = 3
    logits = torch.nn.functional.one_hot(predicted, 10).float()
    assert measure.reduce(logits, labels).tolist() == [[1, 1], [1, 0], [1, 1], [0, 0]]
    assert measure.average(SimpleNamespace(predictions=measure.reduce(logits, labels).numpy())) == {
        "answer_accuracy": 0.75,
        "turn_accuracy": 0.5,
    }


class Follower:
    """What a `Curriculum` needs of `Trainer`: epochs of 10 steps, with an evaluation at the end of each."""

    def __init__(self, epochs: list[int], **settings):
        self.collator = SimpleNamespace(stage=None)
        arguments = StageArguments(eval_share=0.1, **settings)
        self.curriculum = Curriculum(self.collator, list(range(len(epochs))), epochs, arguments)
        self.state, self.control = TrainerState(epoch=0.0, max_steps=10 * sum(epochs)), TrainerControl()
        self.args = SimpleNamespace(num_train_epochs=float(sum(epochs)))
        self.curriculum.on_train_begin(self.args, self.state, self.control)

    def epoch(self, accuracy: float) -> int:
        """Run an epoch; return its stage."""
        self.curriculum.on_epoch_begin(self.args, self.state, self.control)
        self.state.epoch, self.state.global_step = self.state.epoch + 1, self.state.global_step + 10
        self.curriculum.on_epoch_end(self.args, self.state, self.control)
        metrics = {"eval_answer_accuracy": accuracy}
        self.curriculum.on_evaluate(self.args, self.state, self.control, metrics=metrics)
        return self.collator.stage


def test_stages_end_by_accuracy_or_after_their_most_epochs():
    run = Follower([3, 2, 2, 2], stage_accuracy=0.9)
    # The accuracy that comes with the end of stage 1 by its epochs is not counted for stage 2 as well.
    stages = [run.epoch(accuracy) for accuracy in (0.5, 0.95, 0.1, 0.99, 0.2, 0.9, 1.0)]
    assert stages == [0, 0, 1, 1, 2, 2, 3] and not run.control.should_training_stop
    assert run.epoch(0.2) == 3 and run.control.should_training_stop  # before the 9 epochs that were planned
    begun = [entry for entry in run.state.log_history if "begins_stage" in entry]
    assert [(entry["begins_stage"], entry["epoch"], entry["step"]) for entry in begun] == [
        (1, 2, 20),
        (2, 4, 40),
        (3, 6, 60),
    ]
    other = Follower([3, 2, 2, 2], stage_accuracy=0.9)
    other.state = run.state
    assert other.curriculum.is_finished(run.state) and other.curriculum.stages[other.curriculum.number_of(3.5)] == 1
    run.state.epoch = 7.0
    assert not other.curriculum.is_finished(run.state)


def test_an_evaluation_within_an_epoch_ends_nothing():
    run = Follower([3, 2], stage_accuracy=0.9)
    run.state.epoch = 1.5
    run.curriculum.on_evaluate(run.args, run.state, run.control, metrics={"eval_answer_accuracy": 1.0})
    assert run.curriculum.begins == [0]


@pytest.mark.parametrize("settings", [{}, {"stage_accuracy": 0.9}], ids=["epochs", "accuracy"])
def test_the_rate_falls_in_the_last_stage_alone(settings):
    run = Follower([2, 4], decay_last_stage=True, **settings)
    assert run.curriculum.scale_rate(15) == 1  # of the first stage, when it is not known how long it lasts
    run.epoch(0.95 if settings else 0)
    if not settings:
        run.epoch(0)
    begin = 10 if settings else 20
    rates = [run.curriculum.scale_rate(begin + step) for step in (-10, 0, 10, 30, 39, 40, 90)]
    assert rates == pytest.approx([1, 1, 0.75, 0.25, 0.025, 0, 0])
    still = Follower([2, 4], **settings)
    still.epoch(0.95)
    assert still.curriculum.scale_rate(50) == 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"stage_accuracy": 0.0}, "`stage_accuracy` must be above 0 and at most 1, got 0.0"),
        ({"stage_measure": "words"}, "`stage_measure` must be one of"),
        ({"eval_share": 1.0}, "`eval_share` must be from 0 to below 1, got 1.0"),
        ({"samples_per_epoch": 0}, "`samples_per_epoch` must be >= 1, got 0"),
        ({"stage_longest": [1, 0]}, "`stage_longest` must be whole numbers >= 1"),
    ],
)
def test_numbers_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        StageArguments(**settings)


@pytest.fixture(scope="module")
def hops(tmp_path_factory):
    """A small Vedas, and serial questions: four about each of four pictures."""
    folder = tmp_path_factory.mktemp("hops")
    questions = write_dataset("hops", 4, 0, folder / "data", image_size=112, questions="steps")
    backbone = write_backbone(texts_of(questions), folder / "backbone", 64, 2, 400)
    overrides = {
        "num_latent_steps": 4,
        "num_replay_tokens": 3,
        "routed_layers": [0],
        "num_routed_tokens": 8,
        "num_routed_step_tokens": 2,
    }
    return convert_vedas(backbone, folder / "vedas", overrides=overrides), questions


SETTINGS = {
    "freeze_vision": True,
    "replay_loss_weight": 0.0,
    "per_device_train_batch_size": 4,
    "samples_per_epoch": 8,
    "seed": 5,
}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"stage_accuracy": 0.9}, "needs held-out questions"),
        ({"stage_accuracy": 0.9, "eval_share": 0.25, "max_steps": 3}, "`max_steps` cannot be set"),
        ({"stage_accuracy": 0.9, "eval_share": 0.25, "eval_strategy": "steps"}, "at the end of every epoch"),
        ({"decay_last_stage": True, "lr_scheduler_type": "cosine"}, "constant or constant_with_warmup, got cosine"),
        ({"stage_longest": [1, 2]}, "one number for each of 5 stages"),
        ({"epochs_per_stage": [1, 2]}, "one number or one for each of 5 stages"),
        ({"latents_per_step": -1}, "`latents_per_step` must be >= 0"),
        ({"latents_per_step": 0, "stages": [0, 4]}, "`stages` must lie within 0 and `num_latent_steps`"),
        ({"latents_per_step": 2, "stages": [0, 4]}, r"\(4\) and end there at 2 latent steps each"),
        ({"latents_per_step": 0, "num_latent_steps": 0}, "`latents_per_step` 0 needs `stages`"),
    ],
)
def test_settings_that_contradict_each_other(hops, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        train(*hops, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_run_killed_within_a_stage_goes_on_as_it_was(hops, tmp_path, monkeypatch):
    """With stages that accuracy ends, portions, and a falling rate; a finished run takes no further step."""
    settings = SETTINGS | {
        "stages": [0, 1, 4],
        "epochs_per_stage": [3, 2, 2],
        "stage_accuracy": 0.5,
        "eval_data_path": str(hops[1]),
        "per_device_eval_batch_size": 16,
        "decay_last_stage": True,
        "save_strategy": "steps",
        "save_steps": 5,
        "resume_from_checkpoint": "last",
    }
    accuracies = iter((0.1, 0.6, 0.1, 0.2, 0.3, 0.4))
    monkeypatch.setattr(AnswerAccuracy, "average", lambda self, _: {"answer_accuracy": next(accuracies)})
    whole = train(*hops, tmp_path / "whole", **settings)
    assert logged(whole, "stage") == sorted(logged(whole, "stage"))
    steps = [entry["stage"] for entry in whole.state.log_history if "loss" in entry]
    assert steps == [0] * 4 + [1] * 4 + [4] * 4
    rates = logged(whole, "learning_rate")
    assert rates == pytest.approx([1e-3] * 8 + [1e-3, 7.5e-4, 5e-4, 2.5e-4])
    kept = json.loads((tmp_path / "whole" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in kept["log_history"] if "begins_stage" in entry] == [4, 8]

    def kill(self, args, state, control, **kwargs):
        if state.global_step == 11:
            raise Killed

    accuracies = iter((0.1, 0.6, 0.1, 0.2, 0.3, 0.4))
    with monkeypatch.context() as patch:
        patch.setattr(Curriculum, "on_step_end", kill)
        with pytest.raises(Killed):
            train(*hops, tmp_path / "cut", **settings)
    accuracies = iter((0.4,))  # what was decided by the others stands in the checkpoint
    resumed = train(*hops, tmp_path / "cut", **settings)
    assert logged(resumed, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-6)
    assert logged(resumed, "learning_rate") == pytest.approx(rates)
    expected = state_of(whole)
    for name, value in state_of(resumed).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0, msg=name)

    shorter = settings | {"save_strategy": "epoch"}
    accuracies = iter((0.9, 0.9, 0.1, 0.1))
    train(*hops, tmp_path / "short", **shorter)
    taken = []
    monkeypatch.setattr(training_model.LatentTrainer, "training_step", lambda *args, **kwargs: taken.append(args))
    again = train(*hops, tmp_path / "short", **shorter)
    assert not taken and again.state.global_step == 8  # of 14 that were planned


@pytest.mark.parametrize("each, slots", [(0, 0), (1, 3), (2, 6)])
def test_latents_in_place_of_a_step(hops, each, slots):
    """As many before every answer, also where the rationale is used up; with 0 the words only go."""
    processor = VedasProcessor.from_pretrained(hops[0])
    collator = CurriculumCollator(processor, 4, keep_images=False, latents_per_step=each)
    collator.stage = 3
    samples = read_reasoning(hops[1])[:4]
    batch = collator(samples)
    assert (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|latent|>")).sum(1).tolist() == [
        slots
    ] * 4
    assert ("num_latent_steps" in batch) == (each == 0)
    texts = processor.batch_decode(batch["input_ids"])
    for sample, text in zip(samples, texts):
        said = text.split("assistant\n")[1]
        assert [step in said for step in sample.steps] == [number >= 3 for number in range(len(sample.steps))]


def test_easy_questions_first_without_latents(hops, tmp_path):
    """The direct twin: no words from the start, short ways before long ones, in training and in evaluation."""
    trainer = train(
        *hops,
        tmp_path,
        **SETTINGS,
        num_latent_steps=0,
        latents_per_step=0,
        rationale_steps=4,
        stages=[4, 4],
        stage_longest=[1, 4],
        eval_data_path=str(hops[1]),
        eval_strategy="epoch",
    )
    assert trainer.model.model.config.num_latent_steps == 0
    held_out = trainer.eval_dataset
    held_out.begin(0, 1)
    assert len(held_out) == 4 and len(trainer.evaluate().keys() & {"eval_answer_accuracy", "eval_turn_accuracy"}) == 2
    assert {len(trainer.train_dataset[number].steps) for number in range(8)} <= {1, 2, 3, 4}
