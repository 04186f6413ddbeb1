"""Pictures from latents (LaRe, figure 4): what the trained U-Net makes of a step's latents, from noise.

    python -m evaluation.analyses.reconstruction --model out/lare-4 --data data/tasks/data.jsonl --vae_path kl16 --output out/pictures

The U-Net lies in `training/` beside the checkpoint. Every picture is held against the window that the step looked at; the
control draws the same noise under the latents that the question before it took at that step. `reconstruction.csv` holds the mean squared
errors (of pixels within 0 and 1) by step, `reconstruction.png` windows, pictures and controls side by side.
"""

from pathlib import Path

import pandas
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from conversion.commands import CommandParser, exit_on_error
from conversion.writing import replaced_file, write_file
from evaluation.analyses.collection import Study, analysis_parser, check_steps, encoded_batches, open_study
from train.common.training_model import OBJECTIVE_FILE, split_state
from train.lare.image_reconstruction import ImageReconstruction, load_vae
from train.lare.objective import window_crops


BLOCKS = 4  # of the U-Net


def load_reconstruction(folder: str | Path, vae_path: str, crop_size: int, image_processor) -> ImageReconstruction:
    """The U-Net that was trained with a checkpoint; its sizes are read off its weights.

    Raises:
        ValueError: none was, or the image tokenizer is not the one it was trained with.
    """
    path = Path(folder) / OBJECTIVE_FILE
    state = split_state(load_file(path), "image_reconstruction.") if path.is_file() else {}
    if not state:
        raise ValueError(
            f"{folder} has no trained U-Net: `{OBJECTIVE_FILE}` with `image_reconstruction.*` is missing."
        )
    channels = [state[f"unet.down_blocks.{number}.resnets.0.conv2.weight"].shape[0] for number in range(BLOCKS)]
    vae = load_vae(vae_path, state["unet.conv_in.weight"].shape[1], crop_size)
    hidden_size = state["condition.weight"].shape[1]
    module = ImageReconstruction(
        hidden_size, vae, image_processor.image_mean, image_processor.image_std, channels, crop_size
    )
    module.load_state_dict(state)
    return module.eval()


def pixels_of(module: ImageReconstruction, crops: Tensor) -> Tensor:
    """Normalised crops as pictures within 0 and 1, of the size that is drawn."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (module.image_mean, module.image_std))
    unit = (crops.float().cpu() * std + mean).clamp(0, 1)
    size = (module.crop_size, module.crop_size)
    return torch.nn.functional.interpolate(unit, size, mode="bilinear", antialias=True)


def find_donors(questions: list[int], steps: list[int]) -> list[int]:
    """For every window a row whose latents are of another question and of the same step; of its last step if no other has it.

    A step may have several windows, and questions several numbers of steps, so that no fixed distance leads to another question.

    Raises:
        ValueError: there is one question alone.
    """
    first = {}
    for row, place in enumerate(zip(questions, steps)):
        first.setdefault(place, row)
    names = sorted(set(questions))
    if len(names) < 2:
        raise ValueError(
            "A control takes the latents of another question, but only one has windows: give more questions."
        )
    donors = []
    for question, step in zip(questions, steps):
        at = names.index(question)
        others = names[:at][::-1] + names[at + 1 :][::-1]  # the one before it first, the first one's is the last
        same = [first[other, step] for other in others if (other, step) in first]
        last = max(taken for name, taken in first if name == others[0])
        donors.append(same[0] if same else first[others[0], last])
    return donors


@torch.no_grad()
def reconstruct(study: Study, module: ImageReconstruction, num_denoising_steps: int, seed: int):
    """Per question and step: (table of errors, windows, pictures, controls), the last three (M, 3, S, S)."""
    check_steps(study.model.config)
    module = module.to(study.model.device)
    latents, windows, questions, steps, num_asked = [], [], [], [], 0
    for _, inputs in encoded_batches(study, study.samples):
        output = study.model(**inputs, output_latents=True)
        chosen, crops, number = window_crops(study.model, output, inputs, output.latent_mask)
        latents.append(chosen[number].float())
        windows.append(pixels_of(module, crops))
        rows, taken = output.latent_mask.nonzero()[number].unbind(dim=1)
        questions += (rows + num_asked).tolist()
        steps += taken.tolist()
        num_asked += len(output.latent_mask)
    latents, windows = torch.cat(latents), torch.cat(windows)
    others = latents[find_donors(questions, steps)]
    arms = {"picture": [], "control": []}
    for start in tqdm(range(0, len(latents), study.batch_size), desc="denoising"):
        part = slice(start, start + study.batch_size)
        for name, source in (("picture", latents), ("control", others)):
            generator = torch.Generator().manual_seed(seed + start)
            arms[name].append(module.sample(source[part], num_denoising_steps, generator).cpu())
    arms = {name: torch.cat(pictures) for name, pictures in arms.items()}
    errors = {name: (pictures - windows).square().mean(dim=(1, 2, 3)).tolist() for name, pictures in arms.items()}
    table = pandas.DataFrame({"step": [step + 1 for step in steps], **errors})
    return table, windows, arms["picture"], arms["control"]


def summarize(table: pandas.DataFrame) -> pandas.DataFrame:
    """Mean errors by step; `nearer` is the share of pictures that are nearer to their window than the control is."""
    table = table.assign(nearer=table["picture"] < table["control"])
    means = table.groupby("step").mean()
    return means.assign(windows=table.groupby("step").size()).reset_index()


def draw(columns: dict[str, Tensor], path: Path, most: int = 8) -> None:
    count = min(most, len(next(iter(columns.values()))))
    figure = Figure(figsize=(1.6 * len(columns), 1.6 * count), layout="constrained")
    axes = figure.subplots(count, len(columns), squeeze=False)
    for column, (name, pictures) in enumerate(columns.items()):
        for row in range(count):
            axes[row, column].imshow(pictures[row].permute(1, 2, 0).numpy())
            axes[row, column].set_axis_off()
        axes[0, column].set_title(name)
    with replaced_file(path) as partial:
        figure.savefig(partial, dpi=110)


def build_parser() -> CommandParser:
    parser = analysis_parser("reconstruction", __doc__.splitlines()[0])
    parser.add_argument(
        "--vae_path", required=True, help="folder of the image tokenizer that the U-Net was trained with"
    )
    parser.add_argument("--crop_size", type=int, default=256, help="as in training (default: 256)")
    parser.add_argument("--denoising-steps", type=int, default=50, help="of 1000 (default: 50)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    if not 1 <= options.denoising_steps <= 1000:
        raise ValueError(f"`denoising_steps` must be within 1 and 1000, got {options.denoising_steps}.")
    study = open_study(options)
    if not getattr(study.model.config, "reconstructs_images", False):
        raise ValueError(
            f"Only LaRe is trained to give pictures back, this one is a {study.model.config.model_type!r}."
        )
    module = load_reconstruction(options.model, options.vae_path, options.crop_size, study.processor.image_processor)
    table, *columns = reconstruct(study, module, options.denoising_steps, options.seed)
    summary = summarize(table)
    write_file(study.output / "reconstruction.csv", summary.to_csv(index=False))
    draw(dict(zip(("window", "from latents", "control"), columns)), study.output / "reconstruction.png")
    print(summary.to_string(index=False, float_format="{:.4f}".format))


if __name__ == "__main__":
    with exit_on_error():
        main()
