"""The commands that ask trained models: answers, answers with other latents, and the diagnostics of serial questions."""

from train.recipes.serial.arms import ARMS, Model
from train.recipes.serial.plan import Place, Stage


INTERVENTIONS = ("swap", "zero", "noise")
DIAGNOSTICS = ("D1", "D14", "D15", "D16")
# D1 adds what `evaluation.evaluate` has not: one's own latents once more, and the task's mean at every place.
D1_ARMS = ("swap", "sham", "shared")
REPORTED = 256  # questions: as many of every answer and number of moves


def kinds_of(model: Model) -> tuple[str, ...]:
    """How a model is asked: first as it was trained, then with its latents replaced where it has any.

    LaRe's checkpoints take refocusing steps even where training took none, unless they are told not to.
    """
    arm = ARMS[model.arm]
    if arm.has_latents:
        return ("", *INTERVENTIONS)
    return ("off",) if arm.backbone == "clip" else ("",)


def ask(model: Model, kind: str) -> str:
    """Options of `evaluation.evaluate` that ask a model in one of the kinds, each with a blank before it."""
    options = {"": "", "off": "--latents off"}.get(kind, f"--latent_intervention {kind}")
    return "".join(f" {one}" for one in (options, ARMS[model.arm].asked) if one)


def fresh_scores(seed: int) -> dict[str, str]:
    """Where answers to pictures of another seed lie, and which data these are (`plan.draw_again`)."""
    return {"folder": f"scores-fresh{seed}", "split": f"fresh{seed}"}


def score_folder(place: Place, model: Model, kind: str = "", folder: str = "scores") -> str:
    return f"{place.folder}/{folder}/{model.name}{kind and '-'}{kind}"


def score_model(place: Place, model: Model, folder: str = "scores", split: str = "test") -> list[Stage]:
    """Answers to unseen questions by `generate`, as the model is and with its latents replaced.

    Args:
        folder: of the seed's, for the answers.
        split: the name of the data.
    """
    made = []
    for kind in kinds_of(model):
        output = score_folder(place, model, kind, folder)
        command = (
            f"evaluation.evaluate --model {place.folder}/{model.name} --data {place.data(split)} --output {output} --batch_size 32 "
            f"--max_new_tokens 64{ask(model, kind)}"
        )
        made.append(Stage(f"{output}/summary.json", command, 0.2))
    return made


def report_model(place: Place, model: Model) -> list[Stage]:
    """How many latents serve how many moves, whose answer a swap gives, which latent holds which move (`evaluation.faithfulness`)."""
    if not ARMS[model.arm].has_latents:
        return []
    output = f"{place.folder}/report/{model.name}"
    command = (
        f"evaluation.faithfulness --model {place.folder}/{model.name} --data {place.data('test')} --output {output} --batch-size 32 "
        f"--limit {REPORTED} --donor-draws 1 --diagnostics {' '.join(DIAGNOSTICS)} --arms {' '.join(D1_ARMS)} --device cpu"
    )
    return [Stage(f"{output}/faithfulness.json", command, 8)]
