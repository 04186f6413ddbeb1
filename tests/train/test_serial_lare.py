"""LaRe's serial recipe: its commands can be read by the scripts they name, and each starts from what one before makes."""

import shlex

import pytest
from transformers import HfArgumentParser

from train.lare.objective import LatentLossArguments
from train.serial_lare import NUM_STEPS, commands_of
from train.stages import StageArguments
from train.train_lare import LaReTrainingArguments, ScriptArguments, plan_curriculum


@pytest.fixture
def trainings(tmp_path) -> dict:
    """(made, arguments) of all commands that train."""
    commands = commands_of(tmp_path, "hops", ["latents", "direct", "shorter"])
    parser = HfArgumentParser((ScriptArguments, LatentLossArguments, LaReTrainingArguments, StageArguments))
    return {
        made: parser.parse_args_into_dataclasses(shlex.split(command)[1:])
        for made, command in commands
        if command.startswith("train.train_lare ")
    }


def test_every_training_starts_from_what_was_made_before(tmp_path, trainings):
    made = [made for made, _ in commands_of(tmp_path, "hops", ["latents", "direct", "shorter"])]
    assert len(set(made)) == len(made)
    for path, (args, *_) in trainings.items():
        assert f"{args.model_path}/config.json" in made[: made.index(path)]
        assert args.data_path in made


def test_every_curriculum_fits_and_ends_without_words(trainings):
    for path, (args, _, training_args, stage_args) in trainings.items():
        epochs = plan_curriculum(args, stage_args, training_args, NUM_STEPS)
        stage_args.prepare(training_args, len(epochs), has_eval_data=False)
        assert args.curriculum[-1] == (0 if "/words/" in path else NUM_STEPS)
    latents = next(args for path, (args, *_) in trainings.items() if "/latents/" in path)
    assert latents.start_delimiters and latents.stage == 4
