"""The commands that ask trained models: answers, answers with other latents, and the diagnostics of serial questions."""

from train.serial.arms import ARMS, Model
from train.serial.plan import Place, Stage


INTERVENTIONS = ("swap", "zero", "noise")
DIAGNOSTICS = ("D1", "D14", "D15", "D16")
# D1 adds what `train.evaluate` has not: one's own latents once more, and the task's mean at every place.
D1_ARMS = ("swap", "sham", "shared")


def kinds_of(model: Model) -> tuple[str, ...]:
    """As it is, and the interventions where there are latents to replace."""
    return ("", *INTERVENTIONS) if ARMS[model.arm].has_latents else ("",)


def score_folder(place: Place, model: Model, kind: str = "", folder: str = "scores") -> str:
    return f"{place.folder}/{folder}/{model.name}{kind and '-'}{kind}"


def score_model(place: Place, model: Model, folder: str = "scores", split: str = "test") -> list[Stage]:
    """Answers to unseen questions by `generate`, as the model is and with its latents replaced.

    Args:
        folder: of the seed's, for the answers.
        split: the name of the data.
    """
    made, asked = [], ARMS[model.arm].asked
    for kind in kinds_of(model):
        output = score_folder(place, model, kind, folder)
        command = (
            f"train.evaluate --model {place.folder}/{model.name} --data {place.data(split)} --output {output} --batch_size 32 "
            f"--max_new_tokens 64{kind and ' --latent_intervention '}{kind}{asked and ' '}{asked}"
        )
        made.append(Stage(f"{output}/summary.json", command, 0.2))
    return made


def report_model(place: Place, model: Model) -> list[Stage]:
    """How many latents serve how many moves, whose answer a swap gives, which latent holds which move (`train.faithfulness`)."""
    if not ARMS[model.arm].has_latents:
        return []
    output = f"{place.folder}/report/{model.name}"
    command = (
        f"train.faithfulness --model {place.folder}/{model.name} --data {place.data('test')} --output {output} --batch-size 32 "
        f"--diagnostics {' '.join(DIAGNOSTICS)} --arms {' '.join(D1_ARMS)} --device cpu"
    )
    return [Stage(f"{output}/faithfulness.json", command, 4)]
