"""LaRe on serial questions, and its twins on the same backbone: a CLIP tower, of which a tile is one token, and a language model."""

from train.recipes.serial.plan import LAYERS, STEPS, TOWER_TRAINING, TRAINED_ALIKE, Place, Stage, serial_data
from train.recipes.small_models import IMAGE_SIZE


SIZES = (  # the window is one token, too
    f"num_refocus_steps={STEPS} window_size=1 extractor_hidden_size=128 extractor_num_heads=4 extractor_num_layers=1"
)
TRAINING = (
    "--data_format steps --cache_image_features 0.5 --samples_per_epoch 800 --stage_accuracy 0.97 --stage_measure turn "
    "--decay_last_stage --per_device_train_batch_size 16 --global_batch_size 16 --per_device_eval_batch_size 64 "
    f"--lr_scheduler_type constant_with_warmup --warmup_steps 50 --adam_beta2 0.98 --disable_tqdm true {TRAINED_ALIKE}"
)
LONG = "--epochs_per_stage 32 20 24 24"  # the most of each
EASY_FIRST = f"--curriculum {' '.join([str(STEPS)] * STEPS)} --stage_longest 1 2 3 4"
# A latent step lies at the word that it stands for, so that the text behind it finds there what it found in words. With L_text in
# its place the steps behind the second were not learned within this budget (seed 0: 100, 100, 25 and 16 % for 1 to 4 hops). The
# attention that places a window has no gradient of its own: it is learned where the Extractor does not see the window.
LATENTS = (
    "--fresh_objective --start_delimiters --hidden_windows 0.5 --align_loss_weight 0 --image_loss_weight 0 "
    "--text_loss_weight 0 --word_loss_weight 1"
)
MOST_OF_LATENTS = "--epochs_per_stage 24 24 24 24"


def sized(name: str, layers: int) -> str:
    return name if layers == LAYERS else f"{name}{layers}"


def clip_backbone(place: Place, layers: int = LAYERS) -> list[Stage]:
    """A CLIP tower that sees the tiles and a language model of random weights, as a LaRe that takes `STEPS` steps.

    The tower is the same for all numbers of layers.
    """
    tower = f"{place.folder}/clip/vision"
    small, model = (f"{place.folder}/{sized(name, layers)}" for name in ("clip", "lare_fresh"))
    seen = Stage(
        f"{tower}/vision_pretraining.json",
        f"train.recipes.vision_pretraining --model {tower} --data {place.data('train')} "
        f"{TOWER_TRAINING[place.task][1]} --seed {place.seed}",
        1.0,
    )
    converted = Stage(
        f"{model}/config.json",
        f"conversion.convert_lare --vision-tower {tower} --language-model {small}/language --output {model} "
        f"--seed {place.seed} --set {SIZES}",
        0.2,
    )
    parts = [write_small(place, one) for one in dict.fromkeys((LAYERS, layers))]
    return [*serial_data(place), parts[0], seen, *parts[1:], converted]


def write_small(place: Place, layers: int) -> Stage:
    small = f"{place.folder}/{sized('clip', layers)}"
    return Stage(
        f"{small}/vae/config.json",
        f"train.recipes.small_clip --data {place.data('train')} --output {small} --image-size {IMAGE_SIZE} --patch-size 28 "
        f"--num-layers {layers} --seed {place.seed}",
        0.2,
    )


def train_clip(place: Place, before: str, after: str, stage: int, options: str, minutes: float) -> Stage:
    """`train.train_lare` from one folder of a seed to another."""
    return Stage(
        f"{place.folder}/{after}/config.json",
        f"train.train_lare --stage {stage} --model_path {place.folder}/{before} --output_dir {place.folder}/{after} "
        f"--data_path {place.data('train')} --eval_data_path {place.data('val')} {options} {TRAINING} --seed {place.seed}",
        minutes,
    )


def lare_words(place: Place, layers: int = LAYERS) -> list[Stage]:
    """Reasoning in words, no longer than it takes: what was practised longer took longer to turn into latents."""
    options = "--curriculum 0 0 --epochs_per_stage 40 1 --learning_rate 1e-3"
    before, after = (sized(name, layers) for name in ("lare_fresh", "lare_words"))
    return [*clip_backbone(place, layers), train_clip(place, before, after, 0, options, 2.5 * layers / LAYERS)]


def lare(place: Place) -> list[Stage]:
    options = f"--curriculum 1 2 3 4 {MOST_OF_LATENTS} --learning_rate 5e-4 {LATENTS}"
    return [*lare_words(place), train_clip(place, "lare_words", "lare", 4, options, 13.5)]


def lare_shorter(place: Place) -> list[Stage]:
    options = f"--curriculum 1 2 3 4 {LONG} --learning_rate 5e-4"
    return [*lare_words(place), train_clip(place, "lare_words", "lare_shorter", 0, options, 6)]


def lare_direct(place: Place, layers: int = LAYERS, name: str = "lare_direct") -> list[Stage]:
    options = f"{EASY_FIRST} {LONG} --learning_rate 5e-4"
    before = sized("lare_words", layers)
    return [*lare_words(place, layers), train_clip(place, before, name, 0, options, 5 * layers / LAYERS)]


def lare_direct_deep(place: Place) -> list[Stage]:
    return lare_direct(place, 2 * LAYERS, "lare_direct_deep")
