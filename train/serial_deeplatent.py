"""Recipes of DeepLatent for serial questions: latents that compute what the words before them said.

    python -m train.recipes deeplatent_serial --task hops --output out/hops          # a block for every move
    python -m train.recipes deeplatent_serial_drawn --task hops --output out/drawn   # one block that draws the whole way

Both go from words to latents. First the words alone: the language model learns to look one move up, and to do so again from
its own words. Then the pictures behind the words (SFT 1), whose states are the teacher's. Then blocks in the place of the
pictures (SFT 2), while stage by stage the words before them are left out, with ways of one move first: a block then takes the
next move on from what the block before it holds. A stage ends when what the model writes about held-out pictures is right.
"""

from pathlib import Path


PICTURES = 6000
TEST = 480
MOST_MOVES = 4  # of an easy question
TRAINING = (
    "--gradient_accumulation_steps 1 --adam_beta2 0.98 --learning_rate 1e-3 --lr_scheduler_type constant_with_warmup "
    "--warmup_steps 50 --weight_decay 0.01 --cache_image_features 0.2 --eval_share 0.01 --per_device_eval_batch_size 48 "
    "--stage_accuracy 0.96 --stage_measure turn --decay_last_stage --report_to none --save_strategy epoch --save_total_limit 1 "
    "--logging_steps 25 --resume_from_checkpoint last --seed 0"
)


def make_questions(output: Path, name: str, task: str, split: str, count: int, more: str) -> tuple[str, str]:
    return (
        f"{output}/{name}/data.jsonl",
        f"train.tasks --task {task} --n {count} --seed 0 --split {split} --image-size 112 {more} --output {output}/{name} --force",
    )


def make_stages(stages: list[tuple[int, int, int]]) -> str:
    """(texts left out, longest way, most epochs) of every stage, as arguments."""
    names = ("stages", "stage_longest", "epochs_per_stage")
    return " ".join(f"--{name} {' '.join(map(str, values))}" for name, values in zip(names, zip(*stages)))


def build_serial(
    output: Path, task: str, scale: float, is_drawn: bool, grid: int, latentformer: str, stages: list[tuple]
) -> list[tuple[str, str]]:
    """The commands from nothing to SFT 2.

    Args:
        is_drawn: one picture, and block, of the whole way.
        grid: the largest side of a block.
        latentformer: more fields of the model's configuration.
        stages: of SFT 2, for `make_stages`.
    """
    pictures, most = max(32, int(PICTURES * scale)), MOST_MOVES
    epochs = 1 if scale < 1 else 15
    drawn = "--questions steps --pictures joined" if is_drawn else "--questions steps"
    train = make_questions(output, "train", task, "train", pictures, drawn)
    test = make_questions(
        output, "test", task, "test", max(16, int(TEST * scale)), drawn.replace("--questions steps", "")
    )
    data = train[0]
    rounds = [
        ("words", "deeplatent", "sft1", "--chain_of_thought text", [(0, most, epochs), (0, most, 1)], 16, 1600),
        ("sft1", "words", "sft1", "", [(0, most, min(epochs, 6)), (0, most, 1)], 16, 1600),
        ("sft2", "sft1", "sft2", f"--teacher_path {output}/sft1", stages, 24, 1200),
    ]
    return [
        train,
        test,
        (
            f"{output}/backbone/config.json",
            f"train.small_backbone --data {data} --output {output}/backbone --num-layers 4",
        ),
        (
            f"{output}/backbone/vision_pretraining.json",
            f"train.vision_pretraining --model {output}/backbone --data {data} --epochs {5 if scale >= 1 else 1}",
        ),
        (
            f"{output}/deeplatent/config.json",
            f"conversion.convert_deeplatent --backbone {output}/backbone --output {output}/deeplatent "
            f"--set latent_grid_size={grid} {latentformer}".strip(),
        ),
        *(
            (
                f"{output}/{after}/config.json",
                f"train.train_deeplatent --stage {stage} --model_path {output}/{before} --data_path {data} "
                f"--output_dir {output}/{after} {more} {make_stages(planned)} --samples_per_epoch {max(size, int(epoch * scale))} "
                f"--per_device_train_batch_size {size} {TRAINING}",
            )
            for after, before, stage, more, planned, size, epoch in rounds
        ),
    ]


def deeplatent_serial(output: Path, task: str, scale: float, language: str = "small") -> list[tuple[str, str]]:
    """One block of 2 x 2 latents a move, in the place of the picture of the tile that it leads to."""
    stages = [(0, 1, 6), (1, 1, 10), (2, 2, 12), (3, 3, 10), (4, 4, 6)]
    if scale < 1:
        stages = [(dropped, longest, 1) for dropped, longest, _ in stages]
    return build_serial(output, task, scale, False, 2, "", stages)
