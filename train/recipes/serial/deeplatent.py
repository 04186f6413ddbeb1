"""DeepLatent on serial questions, on the backbone of `qwen.py`."""

from train.recipes.serial.plan import LAYERS, STEPS, TRAINED_ALIKE, Place, Stage, serial_data
from train.recipes.serial.qwen import qwen_backbone


# What `train.train_deeplatent` takes; the learning rate and the sizes are of the experiments that found the stages below.
TRAINING = (
    "--cache_image_features 0.5 --stage_accuracy 0.96 --stage_measure turn --decay_last_stage --learning_rate 1e-3 "
    "--gradient_accumulation_steps 1 --per_device_eval_batch_size 64 --lr_scheduler_type constant_with_warmup --warmup_steps 50 "
    f"--adam_beta2 0.98 --disable_tqdm true {TRAINED_ALIKE}"
)
WORDS_FIRST = "--stages 0 0 --epochs_per_stage 15 1 --samples_per_epoch 1600 --per_device_train_batch_size 16"
SOON = WORDS_FIRST.replace("15 1", "6 1")
# Words are left out while ways grow longer: a block takes the next move on from what the block before it holds.
LONGER = "--stages 0 1 2 3 4 --stage_longest 1 1 2 3 4 --samples_per_epoch 1200 --per_device_train_batch_size 24"


def train_blocks(
    place: Place, stage: str, before: str, after: str, options: str, minutes: float, kind: str = ""
) -> Stage:
    """`train.train_deeplatent` from one folder of a seed to another.

    Args:
        kind: ends the names of the folders with the data.
    """
    return Stage(
        f"{place.folder}/{after}/config.json",
        f"train.train_deeplatent --stage {stage} --model_path {place.folder}/{before} --output_dir {place.folder}/{after} "
        f"--data_path {place.data(f'train{kind}')} --eval_data_path {place.data(f'val{kind}')} {options} {TRAINING} "
        f"--seed {place.seed}",
        minutes,
    )


def block_words(place: Place) -> list[Stage]:
    """The words of DeepLatent, on the same backbone: with them the language model learns to look one move up."""
    fresh = f"{place.folder}/blocks"
    return [
        *qwen_backbone(place)[:-1],
        Stage(
            f"{fresh}/config.json",
            f"conversion.convert_deeplatent --backbone {place.folder}/backbone{LAYERS} --output {fresh} --set latent_grid_size=2 "
            f"--seed {place.seed}",
            0.1,
        ),
        train_blocks(place, "sft1", "blocks", "block_words", f"--chain_of_thought text {WORDS_FIRST}", 2.0),
    ]


def deeplatent(place: Place) -> list[Stage]:
    """A block of 2 x 2 latents for every move, in the place of the picture of the tile that it leads to."""
    teacher = f"--teacher_path {place.folder}/pictures"
    return [
        *block_words(place),
        train_blocks(place, "sft1", "block_words", "pictures", SOON, 1.5),
        train_blocks(
            place, "sft2", "pictures", "deeplatent", f"{teacher} {LONGER} --epochs_per_stage 6 10 12 10 6", 5
        ),
    ]


def deeplatent_drawn(place: Place) -> list[Stage]:
    """One block that draws the tiles of the whole way side by side. Its layers take one move after the other."""
    joined = [
        Stage(
            made.replace("/data.jsonl", "_joined/data.jsonl"),
            command.replace(" --force", "_joined --pictures joined --force"),
            minutes,
        )
        for made, command, minutes in serial_data(place)[:2]
    ]
    larger = f"--config_overrides latent_grid_size={2 * STEPS} latentformer_layers={STEPS}"
    options = f"--teacher_path {place.folder}/drawn {LONGER} --epochs_per_stage 2 12 24 20 20"
    return [
        *block_words(place),
        *joined,
        train_blocks(place, "sft1", "block_words", "drawn", f"{larger} {SOON}", 1.5, "_joined"),
        train_blocks(place, "sft2", "drawn", "deeplatent_drawn", options, 10, "_joined"),
    ]
