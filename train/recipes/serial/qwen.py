"""Vedas on serial questions, and its twins on the same backbone, a Qwen2.5-VL of random weights."""

from train.recipes.serial.plan import LAYERS, STEPS, TOWER_TRAINING, TRAINED_ALIKE, Place, Stage, serial_data


# Stages end by what greedy decoding would write word for word; an epoch is 50 steps of 16 questions.
TRAINING = (
    "--freeze_vision --cache_image_features 0.5 --replay_loss_weight 0 --samples_per_epoch 800 "
    f"--rationale_steps {STEPS} --stage_accuracy 0.97 --stage_measure turn --decay_last_stage "
    "--per_device_train_batch_size 16 --per_device_eval_batch_size 64 --lr_scheduler_type constant_with_warmup "
    f"--warmup_steps 100 --adam_beta2 0.98 --disable_tqdm true {TRAINED_ALIKE}"
)
# Words are left out one by one, and no latents stand in their place.
NO_LATENTS = "--num_latent_steps 0 --latents_per_step 0"
# No words from the start: the questions of one move first, then those of two, until all are asked.
EASY_FIRST = f"{NO_LATENTS} --stages {' '.join([str(STEPS)] * (STEPS + 1))} --stage_longest 1 2 3 4 4"
CURRICULUM = "--stages 1 2 3 4 4"
LONG = "--epochs_per_stage 12 30 14 14 6"  # the most of each; stage 2, where a step first starts from a latent, is the hardest
# As many tokens as latent steps, of letters that no question has: their embeddings are learned, and no loss is on them.
PAUSES = "@^~+"
ASK_WITH_PAUSES = f"--instruction {PAUSES}"  # below every question, in training as in evaluation


def qwen_backbone(place: Place, layers: int = LAYERS) -> list[Stage]:
    """A Qwen2.5-VL of random weights whose tower sees the tiles, as a Vedas that takes `STEPS` steps."""
    backbone, model = (f"{place.folder}/{name}{layers}" for name in ("backbone", "fresh"))
    return [
        *serial_data(place),
        Stage(
            f"{backbone}/config.json",
            f"train.recipes.small_backbone --data {place.data('train')} --output {backbone} --num-layers {layers} --seed {place.seed}",
            0.1,
        ),
        Stage(
            f"{backbone}/vision_pretraining.json",
            f"train.recipes.vision_pretraining --model {backbone} --data {place.data('train')} {TOWER_TRAINING[place.task][0]} --seed {place.seed}",
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


def direct(place: Place, layers: int = LAYERS, name: str = "direct", more: str = "") -> list[Stage]:
    """Args:
    more: options of the training script, each with a blank before it.
    """
    options = f"{EASY_FIRST} {LONG} --learning_rate 3e-4{more}"
    return [*words(place, layers), train_qwen(place, words_folder(layers), name, options, 5.5 * layers / LAYERS)]


def direct_deep(place: Place) -> list[Stage]:
    return direct(place, 2 * LAYERS, "direct_deep")


def pauses(place: Place) -> list[Stage]:
    return direct(place, name="pauses", more=f" {ASK_WITH_PAUSES}")


def direct_from_nothing(place: Place) -> list[Stage]:
    options = f"{EASY_FIRST} {LONG} --learning_rate 1e-3"
    return [*qwen_backbone(place), train_qwen(place, f"fresh{LAYERS}", "direct_from_nothing", options, 6.5)]


def at_once(place: Place) -> list[Stage]:
    """All latents from the start, without the words before."""
    options = f"--stages {STEPS} {STEPS} --epochs_per_stage 70 12 --learning_rate 3e-4"
    return [*qwen_backbone(place), train_qwen(place, f"fresh{LAYERS}", "at_once", options, 14)]
