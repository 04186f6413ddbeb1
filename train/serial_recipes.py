"""Serial questions from nothing: a model that answers them by latent steps, and its twins that have none.

    python -m train.serial_recipes --output out/serial                            # Vedas on `hops`, seed 0
    python -m train.serial_recipes --output out/serial --arms vedas words direct shorter --seeds 0 1 2
    python -m train.serial_recipes --output out/serial --arms lare lare_words lare_direct lare_shorter
    python -m train.serial_recipes --output out/serial --arms deeplatent deeplatent_drawn      # by latent blocks
    python -m train.serial_recipes --output out/serial --arms vedas direct --plan  # says what is missing, and its minutes

An arm is a way to learn the same questions about the same pictures. All arms of a backbone and a seed begin with one backbone, one
vision tower that stays frozen, and one stage that reasons in words. Every command is one that the README documents; it is printed as
it runs, and what is there already is not made again, so that a run that was killed goes on. At the end stands the accuracy by number
of moves on pictures that were not seen, by `generate`; for arms with latents also with those of another picture, zeros and noise.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from conversion.commands import exit_on_error
from conversion.writing import write_file
from train.evaluation.report import wilson_interval
from train.recipes import IMAGE_SIZE, SHARED, remember, run


STEPS = 4  # the largest number of moves that is asked for, and the latent steps of every question
LAYERS = 4  # of the backbone
PICTURES = {"train": 6000, "val": 64, "test": 480}
INTERVENTIONS = ("swap", "zero", "noise")
# Stages end by what greedy decoding would write word for word; an epoch is 50 steps of 16 questions.
TRAINING = (
    "--freeze_vision --cache_image_features 0.5 --replay_loss_weight 0 --samples_per_epoch 800 "
    f"--rationale_steps {STEPS} --stage_accuracy 0.97 --stage_measure turn --decay_last_stage "
    "--per_device_train_batch_size 16 --per_device_eval_batch_size 64 --lr_scheduler_type constant_with_warmup "
    f"--warmup_steps 100 --adam_beta2 0.98 --disable_tqdm true {SHARED.replace(' --seed 0', '')}"
)


class Stage(NamedTuple):
    """A command: the file that it writes last, and what it is expected to take on one thread of a CPU."""

    made: str
    command: str
    minutes: float


class Place(NamedTuple):
    """Where a run writes: the data are shared by all seeds."""

    output: Path
    task: str
    seed: int

    @property
    def folder(self) -> Path:
        return self.output / f"seed{self.seed}"

    def data(self, split: str) -> str:
        return f"{self.output}/{split}/data.jsonl"


def serial_data(place: Place) -> list[Stage]:
    """Every number of moves is asked about a picture to learn from; one is asked about an unseen picture."""
    made = []
    for split, count in PICTURES.items():
        questions = "one" if split == "test" else "steps"
        command = (
            f"train.tasks --task {place.task} --n {count} --split {split} --image-size {IMAGE_SIZE} --questions {questions} "
            f"--output {place.output}/{split} --force"
        )
        made.append(Stage(place.data(split), command, 0.1 + 0.5 * count / PICTURES["train"]))
    return made


def qwen_backbone(place: Place, layers: int = LAYERS) -> list[Stage]:
    """A Qwen2.5-VL of random weights whose tower sees the tiles, as a Vedas that takes `STEPS` steps."""
    backbone, model = (f"{place.folder}/{name}{layers}" for name in ("backbone", "fresh"))
    return [
        *serial_data(place),
        Stage(
            f"{backbone}/config.json",
            f"train.small_backbone --data {place.data('train')} --output {backbone} --num-layers {layers} --seed {place.seed}",
            0.1,
        ),
        Stage(
            f"{backbone}/vision_pretraining.json",
            f"train.vision_pretraining --model {backbone} --data {place.data('train')} --epochs 1 --seed {place.seed}",
            0.6 * layers / LAYERS,
        ),
        Stage(
            f"{model}/config.json",
            # A token is replayed once: all steps together have at most the 16 of a picture.
            f"conversion.convert_vedas --backbone {backbone} --output {model} --seed {place.seed} "
            f"--set num_latent_steps={STEPS} num_replay_tokens=3 num_routed_tokens=8 num_routed_step_tokens=2",
            0.1,
        ),
    ]


def train_qwen(place: Place, before: str, after: str, options: str, minutes: float) -> Stage:
    """`train.train_vedas` from one folder of a seed to another."""
    return Stage(
        f"{place.folder}/{after}/config.json",
        f"train.train_vedas --model_path {place.folder}/{before} --output_dir {place.folder}/{after} "
        f"--data_path {place.data('train')} --eval_data_path {place.data('val')} {options} {TRAINING} --seed {place.seed}",
        minutes,
    )


# Words are left out one by one, and no latents stand in their place.
NO_LATENTS = "--num_latent_steps 0 --latents_per_step 0"
# No words from the start: the questions of one move first, then those of two, until all are asked.
EASY_FIRST = f"{NO_LATENTS} --stages {' '.join([str(STEPS)] * (STEPS + 1))} --stage_longest 1 2 3 4 4"
CURRICULUM = "--stages 1 2 3 4 4"
LONG = "--epochs_per_stage 12 30 14 14 6"  # the most of each; stage 2, where a step first starts from a latent, is the hardest


def words(place: Place, layers: int = LAYERS) -> list[Stage]:
    """Reasoning in words, which every other arm of a backbone can begin with."""
    options = "--num_latent_steps 0 --stages 0 0 --epochs_per_stage 30 4 --learning_rate 1e-3"
    return [
        *qwen_backbone(place, layers),
        train_qwen(place, f"fresh{layers}", words_folder(layers), options, 3.2 * layers / LAYERS),
    ]


def words_folder(layers: int) -> str:
    return "words" if layers == LAYERS else f"words{layers}"


def vedas(place: Place) -> list[Stage]:
    options = f"--num_latent_steps {STEPS} {CURRICULUM} {LONG} --learning_rate 3e-4"
    return [*words(place), train_qwen(place, "words", "vedas", options, 3.5)]


def shorter(place: Place) -> list[Stage]:
    options = f"{NO_LATENTS} {CURRICULUM} {LONG} --learning_rate 3e-4"
    return [*words(place), train_qwen(place, "words", "shorter", options, 6.5)]


def direct(place: Place, layers: int = LAYERS, name: str = "direct") -> list[Stage]:
    options = f"{EASY_FIRST} {LONG} --learning_rate 3e-4"
    return [*words(place, layers), train_qwen(place, words_folder(layers), name, options, 5.5 * layers / LAYERS)]


def direct_deep(place: Place) -> list[Stage]:
    return direct(place, 2 * LAYERS, "direct_deep")


def direct_from_nothing(place: Place) -> list[Stage]:
    options = f"{EASY_FIRST} {LONG} --learning_rate 1e-3"
    return [*qwen_backbone(place), train_qwen(place, f"fresh{LAYERS}", "direct_from_nothing", options, 6.5)]


def at_once(place: Place) -> list[Stage]:
    """All latents from the start, without the words before."""
    options = f"--stages {STEPS} {STEPS} --epochs_per_stage 70 12 --learning_rate 3e-4"
    return [*qwen_backbone(place), train_qwen(place, f"fresh{LAYERS}", "at_once", options, 14)]


# LaRe's own backbone: a CLIP tower, of which a tile is one token, and a language model. The window is one token too.
LARE_SIZES = (
    f"num_refocus_steps={STEPS} window_size=1 extractor_hidden_size=128 extractor_num_heads=4 extractor_num_layers=1"
)
LARE_TRAINING = (
    "--data_format steps --cache_image_features 0.5 --samples_per_epoch 800 --stage_accuracy 0.97 --stage_measure turn "
    "--decay_last_stage --per_device_train_batch_size 16 --global_batch_size 16 --per_device_eval_batch_size 64 "
    "--lr_scheduler_type constant_with_warmup --warmup_steps 50 --adam_beta2 0.98 --disable_tqdm true "
    f"{SHARED.replace(' --seed 0', '')}"
)
LARE_LONG = "--epochs_per_stage 32 20 24 24"  # the most of each
# What is left out stands in latents: these have to give it back (L_text), and the attention that places a window has no
# gradient of its own: it is learned where the Extractor does not see the window.
LARE_LATENTS = "--fresh_objective --start_delimiters --hidden_windows 0.5 --align_loss_weight 0 --image_loss_weight 0 --text_loss_weight 0.5"


def clip_backbone(place: Place) -> list[Stage]:
    """A CLIP tower that sees the tiles and a language model of random weights, as a LaRe that takes `STEPS` steps."""
    small, model = f"{place.folder}/clip", f"{place.folder}/lare_fresh"
    return [
        *serial_data(place),
        Stage(
            f"{small}/vae/config.json",
            f"train.lare.small --data {place.data('train')} --output {small} --image-size {IMAGE_SIZE} --patch-size 28 "
            f"--num-layers {LAYERS} --seed {place.seed}",
            0.2,
        ),
        Stage(
            f"{small}/vision/vision_pretraining.json",
            f"train.vision_pretraining --model {small}/vision --data {place.data('train')} --epochs 5 --batch-size 64 "
            f"--learning-rate 1e-3 --seed {place.seed}",
            1.0,
        ),
        Stage(
            f"{model}/config.json",
            f"conversion.convert_lare --vision-tower {small}/vision --language-model {small}/language --output {model} "
            f"--seed {place.seed} --set {LARE_SIZES}",
            0.2,
        ),
    ]


def train_lare(place: Place, before: str, after: str, stage: int, options: str, minutes: float) -> Stage:
    """`train.train_lare` from one folder of a seed to another."""
    return Stage(
        f"{place.folder}/{after}/config.json",
        f"train.train_lare --stage {stage} --model_path {place.folder}/{before} --output_dir {place.folder}/{after} "
        f"--data_path {place.data('train')} --eval_data_path {place.data('val')} {options} {LARE_TRAINING} "
        f"--seed {place.seed}",
        minutes,
    )


def lare_words(place: Place) -> list[Stage]:
    """Reasoning in words, no longer than it takes: what was practised longer took longer to turn into latents."""
    options = "--curriculum 0 0 --epochs_per_stage 40 1 --learning_rate 1e-3"
    return [*clip_backbone(place), train_lare(place, "lare_fresh", "lare_words", 0, options, 2.5)]


def lare(place: Place) -> list[Stage]:
    options = f"--curriculum 1 2 3 4 {LARE_LONG} --learning_rate 5e-4 {LARE_LATENTS}"
    return [*lare_words(place), train_lare(place, "lare_words", "lare", 4, options, 10)]


def lare_shorter(place: Place) -> list[Stage]:
    options = f"--curriculum 1 2 3 4 {LARE_LONG} --learning_rate 5e-4"
    return [*lare_words(place), train_lare(place, "lare_words", "lare_shorter", 0, options, 6)]


def lare_direct(place: Place) -> list[Stage]:
    options = f"--curriculum {' '.join([str(STEPS)] * STEPS)} --stage_longest 1 2 3 4 {LARE_LONG} --learning_rate 5e-4"
    return [*lare_words(place), train_lare(place, "lare_words", "lare_direct", 0, options, 6)]


# What `train.train_deeplatent` takes; the learning rate and the sizes are of the experiments that found the stages below.
BLOCKS = (
    "--cache_image_features 0.5 --stage_accuracy 0.96 --stage_measure turn --decay_last_stage --learning_rate 1e-3 "
    "--gradient_accumulation_steps 1 --per_device_eval_batch_size 64 --lr_scheduler_type constant_with_warmup --warmup_steps 50 "
    f"--adam_beta2 0.98 --disable_tqdm true {SHARED.replace(' --seed 0', '')}"
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
        f"--data_path {place.data(f'train{kind}')} --eval_data_path {place.data(f'val{kind}')} {options} {BLOCKS} "
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


class Arm(NamedTuple):
    """What builds the commands; the trained model lies in the folder of the arm's name.

    Args:
        has_latents: whether there are latents to replace.
    """

    build: Callable[[Place], list[Stage]]
    about: str
    has_latents: bool = False


ARMS = {
    "vedas": Arm(vedas, f"{STEPS} latent steps, by the curriculum", True),
    "deeplatent": Arm(deeplatent, "a latent block for every move", True),
    "deeplatent_drawn": Arm(deeplatent_drawn, "one latent block that draws the way", True),
    "words": Arm(words, "chain of thought"),
    "direct": Arm(direct, "answers at once, from the words' checkpoint, easy questions first"),
    "shorter": Arm(shorter, "the same curriculum without latents"),
    "direct_deep": Arm(direct_deep, "as direct, with twice the layers"),
    "direct_from_nothing": Arm(direct_from_nothing, "as direct, without the words before"),
    "at_once": Arm(at_once, "all latent steps from the start, without words", True),
    "lare": Arm(lare, f"{STEPS} refocusing steps, by the curriculum", True),
    "lare_words": Arm(lare_words, "chain of thought, on LaRe's backbone"),
    "lare_direct": Arm(lare_direct, "as direct, on LaRe's backbone"),
    "lare_shorter": Arm(lare_shorter, "as shorter, on LaRe's backbone"),
}


def score_arm(place: Place, name: str, arm: Arm) -> list[Stage]:
    """Answers to the unseen questions by `generate`, as the model is and with its latents replaced."""
    made = []
    for kind in ("", *(INTERVENTIONS if arm.has_latents else ())):
        folder = f"{place.folder}/scores/{name}{kind and '-'}{kind}"
        command = (
            f"train.evaluate --model {place.folder}/{name} --data {place.data('test')} --output {folder} --batch_size 32 "
            f"--max_new_tokens 64{kind and ' --latent_intervention '}{kind}"
        )
        made.append(Stage(f"{folder}/summary.json", command, 0.2))
    return made


def stages_of(place: Place, names: list[str]) -> list[Stage]:
    """Everything that the named arms need, once each, in an order in which it can be made."""
    stages = [stage for name in names for stage in [*ARMS[name].build(place), *score_arm(place, name, ARMS[name])]]
    return list({stage.made: stage for stage in stages}.values())


def describe_missing(stages: list[Stage]) -> str:
    missing = [stage for stage in stages if not Path(stage.made).is_file()]
    lines = [f"{stage.minutes:5.1f} min  {stage.made}" for stage in missing]
    total = sum(stage.minutes for stage in missing)
    return "\n".join([*lines, f"{total:5.1f} minutes of one CPU thread for {len(missing)} of {len(stages)} commands"])


def accuracy_by_steps(results: Path, data: Path) -> dict[str, list]:
    """By number of moves, and for all: [accuracy, low and high end of Wilson's 95 % interval, questions]."""
    num_steps = {row["id"]: str(len(row["rationale"])) for row in map(json.loads, data.read_text().splitlines())}
    groups = defaultdict(list)
    for record in map(json.loads, results.read_text().splitlines()):
        for group in (num_steps[record["id"]], "all"):
            groups[group].append(bool(record["correct"]))
    return {
        name: [sum(group) / len(group), *wilson_interval(sum(group), len(group)), len(group)]
        for name, group in sorted(groups.items())
    }


def training_of(folder: Path) -> dict:
    """The steps at which stages began, and how many there were."""
    path = folder / "trainer_state.json"
    if not path.is_file():
        return {}
    state = json.loads(path.read_text(encoding="utf-8"))
    begun = [[entry["begins_stage"], entry["step"]] for entry in state["log_history"] if "begins_stage" in entry]
    return {"stages_began": begun, "steps": state["global_step"]}


def cost_of(times: Path, made: set[str]) -> float:
    """CPU minutes of the commands that made something."""
    lines = map(json.loads, times.read_text(encoding="utf-8").splitlines()) if times.is_file() else ()
    return sum(line["cpu_seconds"] for line in lines if line["made"] in made) / 60


def summarize(place: Place, names: list[str]) -> dict[str, dict]:
    times, summary = place.output / "times.jsonl", {}
    for name in names:
        scores = {
            Path(stage.made).parent.name: accuracy_by_steps(
                Path(stage.made).with_name("results.jsonl"), Path(place.data("test"))
            )
            for stage in score_arm(place, name, ARMS[name])
        }
        summary[name] = {
            "about": ARMS[name].about,
            "accuracy": scores,
            **training_of(place.folder / name),
            "cpu_minutes": cost_of(times, {f"{place.folder}/{name}/config.json"}),
            "cpu_minutes_from_nothing": cost_of(times, {stage.made for stage in ARMS[name].build(place)}),
        }
    return summary


def draw(summary: dict[str, dict]) -> str:
    lines = []
    for arm in summary.values():
        for name, groups in arm["accuracy"].items():
            cells = "  ".join(f"{group} {100 * values[0]:5.1f}" for group, values in groups.items())
            lines.append(f"{name:24s} {cells}")
        lines.append(
            f"  {arm['about']}; {arm['cpu_minutes']:.1f} CPU minutes, from nothing {arm['cpu_minutes_from_nothing']:.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--task", default="hops", help="a serial task of `train.tasks` (default: hops)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["vedas"], help="by default vedas")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of backbones and trainings (default: 0)")
    parser.add_argument("--plan", action="store_true", help="say what is missing and what it takes, and make nothing")
    args = parser.parse_args()
    places = [Place(args.output, args.task, seed) for seed in args.seeds]
    stages = [stage for place in places for stage in stages_of(place, args.arms)]
    print(describe_missing(list(dict.fromkeys(stages))), flush=True)
    if args.plan:
        return
    remember(args.output, task=args.task, recipe="serial")
    for place in places:
        run([stage[:2] for stage in stages_of(place, args.arms)], args.output / "times.jsonl")
        summary = summarize(place, args.arms)
        write_file(place.folder / "scores.json", json.dumps(summary, indent=2) + "\n")
        print(f"seed {place.seed}\n{draw(summary)}", flush=True)


if __name__ == "__main__":
    with exit_on_error():
        main()
