"""From nothing to a trained small model and its scores, one command: data, backbone, conversion, every stage, evaluation.

    python -m train.recipes deeplatent --output out/small
    python -m train.recipes vedas --output out/small
    python -m train.recipes lare --output out/small
    python -m train.recipes lare_blind --output out/small                  # whose answers know the picture through latents alone
    python -m train.recipes deeplatent --task search_color --output out/search   # less to learn: minutes on a CPU

A recipe is a list of the commands that the README documents; they are printed as they run. What is there already is not
made again, so a recipe that was killed goes on, stages from their last checkpoint, and recipes of one task that write into one
folder share data and backbone. The last table says how often the model is right on pictures it has not seen: as it is, with
its latents replaced by noise or by another picture's, and without steps. `train.recipes.shipping` makes of it what is shipped.
"""

import json
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from conversion.commands import CommandParser, exit_on_error
from conversion.writing import append_lines, lock_of, locked, write_file
from evaluation.report import describe
from train.data.tasks import check_task
from train.data.tasks.families import family_of, tasks_of
from train.deeplatent.rl.progress import describe_progress
from train.recipes.hardware import hardware


IMAGE_SIZE = 112  # 4 x 4 cells of 28 pixels, each one image token: what a CPU learns in minutes
SHARED = (
    "--report_to none --save_strategy epoch --save_total_limit 1 --logging_steps 25 --weight_decay 0.01 "
    "--resume_from_checkpoint last --seed 0"
)
ANSWER_TOKENS = 96  # puzzles take 54
# Reinforcement learning of a small model, where the script's defaults are the paper's for 7B. One step of Adam moves every weight
# by the learning rate, whatever the evidence, so that it warms up and sees 128 answers. A reference costs a third of a step.
# Summed over the elements of latents, noise that earns nothing here drowns the words: the mean does not. And this vocabulary
# is so small that what SFT 2 leaves to learn within minutes is to answer well when it samples boldly: hence the temperature.
SMALL_RL = (
    f"--max_new_tokens {ANSWER_TOKENS} --num_generations 8 --per_device_train_batch_size 16 --gradient_accumulation_steps 1 "
    "--micro_batch_size 64 --temperature 1.2 --learning_rate 1e-4 --lr_scheduler_type constant_with_warmup --warmup_steps 6 "
    "--adam_beta2 0.98 --max_grad_norm 0.3 --weight_decay 0 --kl_weight 0 --continuous_logprob mean"
)
RL_STEPS = 40
BATCH = 16  # of Qwen's models; steps of 32 take nearly twice as long
PICTURES_SEEN = 30_000  # by a vision tower in its pretraining, the same ones several times
SETTINGS = "recipe.json"


# What the backbones of DeepLatent and Vedas start from: the command, and its share of the learning rates.
LANGUAGES = {
    "small": ("train.recipes.small_backbone --data {texts} --output {output}/backbone --num-layers 4", 1.0),
    "smollm2": ("conversion.fetch_assets --output {output}/backbone", 0.1),  # 135M that speak English; downloads 93 MB
}


def make_set(
    output: Path, name: str, task: str, split: str, count: int, scale: float, seed: int = 0
) -> tuple[str, str]:
    return (
        f"{output}/{name}/data.jsonl",
        f"train.data.tasks --task {task} --n {max(16, int(count * scale))} --seed {seed} --split {split} --image-size {IMAGE_SIZE} "
        f"--output {output}/{name} --force",
    )


def is_search(task: str) -> bool:
    """Whether a large scene has to be searched."""
    return any(family_of(name) == "search" for name in tasks_of(task))


def is_one_task(task: str) -> bool:
    """Whether there is nothing else to learn, which takes shorter."""
    return len(set(tasks_of(task))) == 1


def make_data(output: Path, task: str, scale: float) -> tuple[list[tuple[str, str]], str, str, int]:
    """(what it makes, command) for scenes to learn to see, questions to learn from, and unseen ones; the files that teach
    tokenizer and tower, and how many pictures those for the tower have. One task's own pictures teach its tower."""
    names = tasks_of(task)
    once = tuple(dict.fromkeys(names))  # whatever their shares
    scenes = {}
    if not is_one_task(task):
        scenes["scenes"] = ("describe_search" if is_search(task) else "describe", 6000)
        if "jigsaw" in names:
            scenes["puzzles"] = ("jigsaw", 3000)
    sets = {name: (kind, "train", count) for name, (kind, count) in scenes.items()}
    num_samples = 6000 if is_one_task(task) else max(4000, 1000 * len(names))
    sets |= {
        "train": (task, "train", num_samples),
        "test": (",".join(once), "test", 400 * len(once)),
    }
    commands = [make_set(output, name, kind, split, count, scale) for name, (kind, split, count) in sets.items()]
    seen = " ".join(f"{output}/{name}/data.jsonl" for name in scenes or ("train",))
    num_pictures = sum(count for _, count in scenes.values()) or num_samples
    return commands, " ".join(dict.fromkeys([f"{output}/train/data.jsonl", *seen.split()])), seen, num_pictures


def make_backbone(output: Path, task: str, scale: float, language: str) -> list[tuple[str, str]]:
    """Data, and a Qwen2.5-VL that sees, its language model as `LANGUAGES` has it."""
    data, texts, scenes, num_pictures = make_data(output, task, scale)
    epochs = round(PICTURES_SEEN / num_pictures) if scale >= 1 else 1
    return [
        *data,
        (f"{output}/backbone/config.json", LANGUAGES[language][0].format(texts=texts, output=output)),
        (
            f"{output}/backbone/vision_pretraining.json",
            f"train.recipes.vision_pretraining --model {output}/backbone --data {scenes} --epochs {epochs}",
        ),
    ]


def vedas(output: Path, task: str, scale: float, language: str = "small") -> list[tuple[str, str]]:
    # The language model starts from nothing, so that it stays longer in the stage that teaches it to speak and to look; and in
    # the last, on as much of every task, where it has to solve in latents what it has put into words.
    once = tuple(dict.fromkeys(tasks_of(task)))
    even = make_set(output, "even", ",".join(once), "train", 4000, scale)
    rounds = [
        ("vedas", "vedas-first", "train", "0 0 0 1 2 3" if scale >= 1 else "0 1 2 3"),
        ("vedas-first", "vedas-trained", "even", "3 3 3 3 3" if scale >= 1 else "3"),
    ]
    return [
        *make_backbone(output, task, scale, language),
        even,
        (
            f"{output}/vedas/config.json",
            f"conversion.convert_vedas --backbone {output}/backbone --output {output}/vedas "
            "--set num_latent_steps=3 num_replay_tokens=4 num_routed_tokens=8 num_routed_step_tokens=2",
        ),
        *(
            (
                f"{output}/{after}/config.json",
                f"train.train_vedas --model_path {output}/{before} --data_path {output}/{data}/data.jsonl "
                f"--output_dir {output}/{after} --stages {stages} --epochs_per_stage 1 "
                f"--learning_rate {1e-3 * LANGUAGES[language][1]:g} "
                f"--per_device_train_batch_size {BATCH} --freeze_vision --replay_crop_size 56 {SHARED}",
            )
            for before, after, data, stages in rounds
        ),
    ]


# Epochs and learning rate of LaRe's stages. Its language model starts from nothing where the paper's only adapts: stage 0 makes
# the plain model, which knows how to look and to speak, that the paper starts from. Where to look is learned suddenly, after
# hundreds of steps that seem to lead nowhere: hence the constant rate. At 1e-3 it learns its puzzles by heart.
LARE_STAGES = {
    0: (12, "3e-4 --lr_scheduler_type constant_with_warmup"),
    1: (0.15, "1e-3"),
    2: (0.4, "1e-3"),
    3: (1, "3e-4"),
    4: (0.25, "1e-4"),
}
# An answer that starts on the latents alone has to learn anew what it could see: as long and as fast as that takes.
BLIND_STAGES = {stage: LARE_STAGES[stage] for stage in (1, 2)} | {3: (3, "1e-3"), 4: (0.25, "3e-4")}


def lare_stage(output: Path, stage: int, before: str, after: str, stages: dict, scale: float) -> tuple[str, str]:
    size, (epochs, rate) = 32 if scale >= 1 else 8, stages[stage]
    return (
        f"{after}/config.json",
        f"train.train_lare --stage {stage} --model_path {before} --data_format steps "
        f"--data_path {output}/train/data.jsonl --output_dir {after} --vae_path {output}/clip/vae "
        f"--crop_size 32 --unet_channels 8 8 16 16 --learning_rate {rate} "
        f"--num_train_epochs {epochs if scale >= 1 else 1} --per_device_train_batch_size {size} "
        f"--global_batch_size {size} {SHARED}",
    )


def lare(output: Path, task: str, scale: float) -> list[tuple[str, str]]:
    data, texts, scenes, _ = make_data(output, task, scale)
    commands = [
        *data,
        (
            f"{output}/clip/vae/config.json",
            f"train.recipes.small_clip --data {texts} --output {output}/clip --image-size {IMAGE_SIZE} --patch-size 28",
        ),
        (
            f"{output}/clip/vision/vision_pretraining.json",
            f"train.recipes.vision_pretraining --model {output}/clip/vision --data {scenes} --epochs {8 if scale >= 1 else 1} "
            "--batch-size 64 --learning-rate 1e-3",
        ),
        (
            f"{output}/lare/config.json",
            f"conversion.convert_lare --vision-tower {output}/clip/vision --language-model {output}/clip/language "
            f"--output {output}/lare --set num_refocus_steps=2 window_size=3 extractor_hidden_size=128 extractor_num_heads=4",
        ),
    ]
    folders = [f"{output}/lare", *(f"{output}/lare-stage{stage}" for stage in LARE_STAGES)]
    steps = zip(LARE_STAGES, folders, folders[1:])
    return [*commands, *(lare_stage(output, *step, LARE_STAGES, scale) for step in steps)]


def lare_blind(output: Path, task: str, scale: float) -> list[tuple[str, str]]:
    """From LaRe's stage 0 on with answers that start on text and latents alone."""
    folders = [f"{output}/lare-stage0", *(f"{output}/lare-blind-stage{stage}" for stage in sorted(BLIND_STAGES))]
    (made, command), *further = (
        lare_stage(output, *step, BLIND_STAGES, scale) for step in zip(sorted(BLIND_STAGES), folders, folders[1:])
    )
    common = lare(output, task, scale)
    common = common[: [made for made, _ in common].index(f"{folders[0]}/config.json") + 1]
    return [*common, (made, f"{command} --config_overrides answer_sees_image=false"), *further]


def sft_epochs(task: str, scale: float) -> tuple[int, int]:
    """Of SFT 1 and SFT 2."""
    return (1, 1) if scale < 1 else (3, 1) if is_one_task(task) else (5, 2)


def deeplatent(output: Path, task: str, scale: float, language: str = "small") -> list[tuple[str, str]]:
    first, second = sft_epochs(task, scale)
    training = f"--per_device_train_batch_size {BATCH} --gradient_accumulation_steps 1 {SHARED}"
    data, share = f"--data_path {output}/train/data.jsonl", LANGUAGES[language][1]
    once = ",".join(dict.fromkeys(tasks_of(task)))
    return [
        *make_backbone(output, task, scale, language),
        # Rewards compare answers to questions that SFT has not shown, as many of every task.
        make_set(output, "questions", once, "train", 16 * RL_STEPS, scale, seed=1),
        (
            f"{output}/deeplatent/config.json",
            f"conversion.convert_deeplatent --backbone {output}/backbone --output {output}/deeplatent "
            "--set latent_grid_size=4",
        ),
        (
            f"{output}/sft1/config.json",
            f"train.train_deeplatent --stage sft1 --model_path {output}/deeplatent {data} --output_dir {output}/sft1 "
            f"--num_train_epochs {first} --learning_rate {1e-3 * share:g} {training}",
        ),
        (
            f"{output}/teacher/index.json",
            f"train.cache_teacher_states --model {output}/sft1 --data {output}/train/data.jsonl --output {output}/teacher "
            "--batch_size 16",
        ),
        (
            f"{output}/sft2/config.json",
            f"train.train_deeplatent --stage sft2 --model_path {output}/sft1 {data} --teacher_states {output}/teacher "
            f"--output_dir {output}/sft2 --num_train_epochs {second} --learning_rate {5e-4 * share:g} {training}",
        ),
        (
            f"{output}/rl/config.json",
            f"train.train_deeplatent --stage rl --model_path {output}/sft2 "
            f"--data_path {output}/questions/data.jsonl --output_dir {output}/rl "
            f"{SMALL_RL} --max_steps {RL_STEPS if scale >= 1 else 8} --report_to none --save_strategy no --seed 0",
        ),
    ]


# What builds the commands, and the folder with the trained model.
RECIPES = {
    "deeplatent": (deeplatent, "rl"),
    "lare": (lare, "lare-stage4"),
    "lare_blind": (lare_blind, "lare-blind-stage4"),
    "vedas": (vedas, "vedas-trained"),
}
ENDS = {name: trained for name, (_, trained) in RECIPES.items()}  # folders of a recipe's output
TASK = "search_color:4,jigsaw"  # a search and a synthesis; the puzzle is learned soon


def run(commands: list[tuple[str, str]], times: Path | None = None) -> None:
    """Run what is not there yet.

    What a command makes is what it writes last (`conversion/writing.py`): where it stands, the command came to its end. Two
    recipes that share a folder do not make the same thing twice: the second waits.

    Args:
        times: JSONL that gets a line for every command that ran: what it made, the command, its seconds and CPU seconds, what it ran on.

    Raises:
        subprocess.CalledProcessError: a command failed; what it wrote is left for the next try.
    """
    for made, command in commands:
        step = Path(made).parent.with_name(f"{Path(made).parent.name}.step")
        if Path(made).is_file() and not lock_of(step).exists():  # one that a killed recipe left is deleted below
            continue
        with locked(step, wait=-1, waiting=f"Another recipe makes {made}: waiting for it."):
            if not Path(made).is_file():
                run_command(made, command, times)


def run_command(made: str, command: str, times: Path | None) -> None:
    print(f"$ python -m {command}", flush=True)
    start, cpu = time.perf_counter(), cpu_seconds()
    subprocess.run([sys.executable, "-m", *shlex.split(command)], check=True)
    if times is not None:
        seconds = round(time.perf_counter() - start, 1)
        spent = round(cpu_seconds() - cpu, 1)  # beside other processes, the better measure of what a command takes
        line = {"made": made, "command": command, "seconds": seconds, "cpu_seconds": spent, "hardware": hardware()}
        append_lines(times, json.dumps(line) + "\n")


def cpu_seconds() -> float:
    """Seconds of all CPUs in the commands that came to their end."""
    used = os.times()
    return used.children_user + used.children_system


def remember(output: Path, **settings) -> None:
    """Write down what a folder is made with: what is there is not made again, so it must not be something else.

    Raises:
        ValueError: the folder was begun with other settings.
    """
    path = output / SETTINGS
    if path.is_file() and (before := json.loads(path.read_text(encoding="utf-8"))) != settings:
        raise ValueError(f"{output} was begun with {before}, not with {settings}: name another folder.")
    output.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(settings))


ARMS: dict[str, dict] = {
    "latents": {},
    "noise": {"latent_intervention": "noise"},
    "swap": {"latent_intervention": "swap"},
    "no latents": {"latents": "off"},
}


def score(folder: Path, data: Path, names: tuple[str, ...] = tuple(ARMS)) -> dict[str, float | None]:
    """Accuracy by arm (None for a swap where no question has a donor), and that of the best constant answer.

    Args:
        names: of the arms, which are asked in this order.
    """
    # Imported here: they take seconds, and `--help` and other recipes need none of them.
    from transformers import AutoModel, AutoProcessor

    import conversion.own_models  # noqa: F401
    from evaluation.answering import AnswerSettings
    from evaluation.evaluate_rows import evaluate_rows
    from evaluation.rows import read_evaluation

    model = AutoModel.from_pretrained(folder, trust_remote_code=False).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    rows = read_evaluation([data])
    scores = {}
    for name in names:
        settings = AnswerSettings(batch_size=32, max_new_tokens=ANSWER_TOKENS, **ARMS[name])
        scores[name] = describe(evaluate_rows(model, processor, rows, settings, progress=True))["accuracy"]
    answers = [row.answer for row in rows]
    scores["constant"] = max(answers.count(answer) for answer in set(answers)) / len(answers)
    return scores


def build_parser() -> CommandParser:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=sorted(RECIPES), help="which model to train")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of everything that is made; recipes of one task share it"
    )
    parser.add_argument("--task", default=TASK, help="task of `train.data.tasks`, several with commas")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the data; below 1 also fewer epochs, to try it out"
    )
    parser.add_argument(
        "--language",
        choices=sorted(LANGUAGES),
        default="small",
        help="language model of DeepLatent and Vedas: one of 1 to 2 million weights, or SmolLM2-135M-Instruct's, for a GPU",
    )
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    build, trained = RECIPES[args.recipe]
    is_lare = build in (lare, lare_blind)
    if is_lare and args.language != "small":
        parser.error("`--language` is for DeepLatent and Vedas")
    check_task(args.task)  # before the folder is bound to it
    if not (args.scale > 0 and math.isfinite(args.scale)):
        parser.error(f"`--scale` must be a finite number above 0, got {args.scale}")
    chosen = {} if is_lare else {"language": args.language}
    remember(args.output, task=args.task, scale=args.scale, language=args.language)
    run(build(args.output, args.task, args.scale, **chosen), args.output / "times.jsonl")
    test = args.output / "test" / "data.jsonl"
    scores = score(args.output / trained, test)
    if args.recipe == "deeplatent":
        print("\n".join(describe_progress(args.output / trained)))
        scores["before RL"] = score(args.output / "sft2", test, ("latents",))["latents"]
    write_file(args.output / f"{args.recipe}-scores.json", json.dumps(scores, indent=2))
    for name, value in scores.items():
        print(f"{name:10s} {'no donors' if value is None else f'{100 * value:5.1f} %'}")


if __name__ == "__main__":
    with exit_on_error():
        main()
