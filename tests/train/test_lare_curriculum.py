"""LaRe's curriculum: what every stage shows, which steps it takes, how it begins, and what it refuses."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModel, AutoProcessor, HfArgumentParser

from configuration_latentvlm.latent_architecture import changed_fields
from conversion.convert_lare import convert_lare
from train import train_lare
from train.common.stages import StageArguments
from train.common.training_model import StepPart
from train.data.reasoning_data import ReasoningSample, read_reasoning
from train.data.small_tokenizer import texts_of
from train.data.tasks import write_dataset
from train.lare.curriculum import RefocusCurriculumCollator, opening_token, shorten, start_delimiters
from train.lare.data import LaReCollator, check_rows
from train.lare.objective import LaReObjective, LatentLossArguments
from train.recipes.small_clip import write_small
from train.train_lare import LaReTrainingArguments, ScriptArguments


NO_TERMS = {"align_loss_weight": 0, "image_loss_weight": 0, "text_loss_weight": 0}
SIZES = {"window_size": 1, "num_refocus_steps": 2, "extractor_hidden_size": 24, "extractor_num_heads": 2}
STEPS = ["red 1", "blue 2", "green 3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset("hops", 4, 0, tmp_path_factory.mktemp("data") / "hops", image_size=112, questions="steps")


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    small = write_small(texts_of(data), folder / "small", 64, 2, 400, image_size=112, patch_size=28)
    return convert_lare(small / "vision", small / "language", folder / "lare", overrides=dict(SIZES))


@pytest.fixture
def loaded(base):
    model = AutoModel.from_pretrained(base, trust_remote_code=False, dtype="float32")
    return model, AutoProcessor.from_pretrained(base, trust_remote_code=False)


@pytest.fixture(scope="module")
def run(base, data):
    def start(output_dir, **options):
        """The command with its defaults made small; None leaves an option out."""
        options = {
            "stage": 4,
            "model_path": base,
            "data_path": data,
            "output_dir": output_dir,
            "curriculum": (0, 1, 2),
            "fresh_objective": True,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 8,
            "global_batch_size": 8,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **NO_TERMS,
            **options,
        }
        words = []
        for name, value in options.items():
            if value is not None:
                words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
        kinds = (ScriptArguments, LatentLossArguments, LaReTrainingArguments, StageArguments)
        return train_lare.main(*HfArgumentParser(kinds).parse_args_into_dataclasses(words))

    return start


def sample_of(steps: list[str]) -> ReasoningSample:
    return ReasoningSample([], "Where?", steps, "green", "Row 0")


@pytest.mark.parametrize(
    "left_out, text, reasoning",
    [
        (0, "red 1\nblue 2\ngreen 3\nThe answer is \\boxed{green}.", ""),
        (2, "green 3\nThe answer is \\boxed{green}.", "red 1\nblue 2"),
        (4, "The answer is \\boxed{green}.", "red 1\nblue 2\ngreen 3"),
    ],
)
def test_a_stage_leaves_out_the_first_steps_which_latents_stand_for(left_out, text, reasoning):
    conversation = shorten(sample_of(STEPS), left_out, 4)
    assert conversation.messages[-1]["content"] == text
    assert conversation.reasoning == reasoning


def test_longer_reasoning_is_merged_so_that_the_last_stage_leaves_nothing():
    assert shorten(sample_of(STEPS), 1, 2).messages[-1]["content"].startswith("blue 2 green 3\nThe")
    assert shorten(sample_of(STEPS), 2, 2).messages[-1]["content"].startswith("The answer")


@pytest.mark.parametrize("takes_steps", [True, False])
def test_batches_follow_the_stage(loaded, data, takes_steps):
    _, processor = loaded
    samples = read_reasoning(data)[2:4]  # three and four hops
    collator = RefocusCurriculumCollator(LaReCollator(processor), 4, takes_steps)
    assert check_rows(samples, collator) == samples
    lengths = []
    for stage in (0, 1, 3):
        collator.stage = stage
        batch = collator(samples)
        assert batch["num_refocus_steps"] == (stage if takes_steps else 0)
        said = [processor.tokenizer.decode(row[row >= 0]) for row in batch["labels"]]
        kept = ["\n".join([*one.steps[stage:], ""]) for one in samples]
        assert [text.split("The answer")[0] for text in said] == kept
        given = [
            processor.tokenizer.decode(ids[mask]) for ids, mask in zip(batch["reasoning_ids"], batch["reasoning_mask"])
        ]
        assert given == ["\n".join(one.steps[:stage]) for one in samples]
        lengths.append(batch["input_ids"].shape[1])
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) == 3


def test_the_objective_takes_the_steps_of_the_stage(loaded, data):
    model, processor = loaded
    objective = LaReObjective(model, processor.image_processor, LatentLossArguments(**NO_TERMS), True, False)
    collator = RefocusCurriculumCollator(LaReCollator(processor), 4)
    losses = {}
    for stage in (0, 1, 2):
        collator.stage = stage
        batch = collator(read_reasoning(data)[:3])
        losses[stage] = objective(model, **batch)["loss"]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels", "pixel_values")}
        with changed_fields(model.config, num_refocus_steps=stage):
            assert_close(losses[stage], model(**inputs).loss, atol=1e-6, rtol=0)
    assert model.config.num_refocus_steps == 2  # what is saved
    assert len({round(float(loss), 4) for loss in losses.values()}) == 3


def test_words_give_a_gradient_to_every_weight_that_trains(loaded, data):
    """Also to those that no word depends on: processes that share a model wait for the gradients of all."""
    model, processor = loaded
    model.model.vision_tower.requires_grad_(False)
    arguments = LatentLossArguments(**(NO_TERMS | {"align_loss_weight": 0.1}))
    objective = LaReObjective(model, processor.image_processor, arguments, True, False)
    batch = RefocusCurriculumCollator(LaReCollator(processor), 4)(read_reasoning(data)[:3])
    assert objective(model, part=StepPart(0), **batch)["rows"] == {}
    objective(model, part=StepPart(0, others=[{}]), **batch)["loss"].backward()
    weights = [*model.named_parameters(), *objective.named_parameters()]
    assert [name for name, one in weights if one.requires_grad and one.grad is None] == []


def test_hidden_windows_are_hidden_from_the_extractor_in_training_alone(loaded, data):
    """Without windows the latents do not depend on what stands in them, and the Extractor's share is drawn by row."""
    model, processor = loaded
    LaReObjective(model, processor.image_processor, LatentLossArguments(**NO_TERMS, hidden_windows=0.5), True, False)
    states = torch.randn(400, 2, 64)
    one, other = torch.randn(400, 1, 64), torch.randn(400, 1, 64)
    there = torch.ones(400, 1, dtype=torch.bool)

    def follows_the_window() -> torch.Tensor:  # (B,)
        found = []
        for visual in (one, other):
            torch.manual_seed(0)
            found.append(model.refocus(states, visual, there)[0])
        return (found[0] != found[1]).flatten(1).any(dim=1)

    model.eval()
    assert follows_the_window().all()
    model.train()
    assert 0.4 < follows_the_window().float().mean() < 0.6


def test_a_model_without_an_extractor_has_no_window_to_hide(loaded):
    model, processor = loaded
    model.refocus = None
    with pytest.raises(ValueError, match="which this model has not"):
        LaReObjective(model, processor.image_processor, LatentLossArguments(**NO_TERMS, hidden_windows=1), True, False)
    with pytest.raises(ValueError, match="`hidden_windows` must be within 0 and 1, got 1.5"):
        LatentLossArguments(hidden_windows=1.5)


def test_delimiters_start_as_what_the_answer_begins_behind(loaded):
    model, processor = loaded
    assert processor.tokenizer.decode(opening_token(processor)) == "\n"
    before = model.get_input_embeddings().weight.detach().clone()
    start_delimiters(model, processor)
    after, chosen = model.get_input_embeddings().weight, [model.config.bot_token_id, model.config.eot_token_id]
    changed_rows = (after != before).any(dim=1).nonzero().flatten().tolist()
    assert changed_rows == sorted(chosen)
    for token in chosen:
        assert_close(after[token], before[opening_token(processor)])


def test_a_template_that_writes_nothing_before_the_answer_is_refused(loaded):
    _, processor = loaded
    processor.chat_template = processor.tokenizer.chat_template = "{{ messages[0]['content'][0]['text'] }}"
    with pytest.raises(ValueError, match="must write something before the answer"):
        opening_token(processor)


def test_stages_end_by_accuracy_and_the_rate_decays_in_the_last(run, tmp_path, monkeypatch):
    """A model that is always right takes one of three epochs in each stage, and all in the last."""
    seen = []

    def average(predictions) -> dict:
        seen.append(predictions.predictions.shape)
        return {"answer_accuracy": 1.0, "turn_accuracy": 0.0}

    monkeypatch.setattr(train_lare.AnswerAccuracy, "average", staticmethod(average))
    trainer = run(
        tmp_path,
        epochs_per_stage=(3, 3, 2),
        eval_share=0.25,
        stage_accuracy=0.9,
        decay_last_stage=True,
        lr_scheduler_type="constant",
        warmup_steps=0,
        start_delimiters=True,
    )
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["stage"] for log in logs] == [0, 0, 1, 1, 2, 2, 2, 2]  # two batches an epoch
    assert set(seen) == {(4, 2)}  # the questions of one picture; the answer, and the whole turn
    last = [log["learning_rate"] for log in logs if log["stage"] == 2]
    assert last == sorted(last, reverse=True) and last[-1] < last[0] == logs[0]["learning_rate"]
    assert AutoModel.from_pretrained(tmp_path, trust_remote_code=False).config.num_refocus_steps == 2


def test_without_latents_nothing_stands_for_what_is_left_out(run, tmp_path):
    trainer = run(tmp_path, stage=0, data_format="steps", curriculum=(0, 4))
    assert trainer.data_collator.takes_steps is False
    assert [log["stage"] for log in trainer.state.log_history if "loss" in log] == [0, 0, 4, 4]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"curriculum": (0, 1)}, r"must end at `num_refocus_steps` \(2\)"),
        ({"curriculum": (0, 2, 1)}, "the largest at the end"),
        ({"curriculum": None, "epochs_per_stage": (2,)}, "need a `curriculum`"),
        ({"curriculum": None, "samples_per_epoch": 8}, "need a `curriculum`"),
        ({"epochs_per_stage": (1, 2)}, "one for each of 3 stages"),
        ({"num_train_epochs": 2}, "given by `epochs_per_stage`"),
        ({"direct_answers": True}, "needs reasoning to leave out"),
        ({"data_format": "llava"}, "needs reasoning to leave out"),
        ({"stage_accuracy": 0.5}, "needs held-out questions"),
    ],
)
def test_curricula_that_do_not_fit_are_refused(run, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **options)
