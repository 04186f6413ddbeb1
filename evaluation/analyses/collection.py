"""What the analyses share: their arguments, the model's latents over a data set, and a place for what they find.

Shapes: K latents of a step, D hidden size, F pooled features.
"""

import tempfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor, set_seed

from configuration_latentvlm import ARCHITECTURES
from configuration_latentvlm.latent_architecture import has_latents
from conversion.commands import CommandParser
from conversion.own_models import TRUST_HELP
from conversion.reading import check_config_file
from evaluation.answers import encode_questions
from train.data.reasoning_data import ADAPTERS, ReasoningSample, read_reasoning


GREEDY = {"do_sample": False, "return_dict_in_generate": True}


@dataclass
class Study:
    """A model, what it is asked, and where the results go."""

    model: torch.nn.Module
    processor: object
    samples: list[ReasoningSample]  # each with an image
    output: Path
    batch_size: int


def analysis_parser(command: str, description: str) -> CommandParser:
    """The arguments that every analysis takes."""
    parser = CommandParser(prog=f"python -m evaluation.analyses.{command}", description=description)
    parser.add_argument("--model", required=True, help="folder or hub id of a checkpoint")
    parser.add_argument("--data", required=True, help="questions, in a format of `train/data/reasoning_data.py`")
    parser.add_argument("--output", required=True, help="folder for the table and the plot")
    parser.add_argument("--data-format", default="steps", choices=sorted(ADAPTERS), help="format of the questions")
    parser.add_argument("--split", default="train", help="of a `datasets` folder with several (default: train)")
    parser.add_argument("--limit", type=int, help="take only the first so many questions that have an image")
    parser.add_argument("--batch-size", type=int, default=8, help="questions at a time (default: 8)")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: the checkpoint's)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the model runs"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    parser.add_argument("--trust-remote-code", action="store_true", help=TRUST_HELP)
    return parser


def open_study(options: Namespace) -> Study:
    """Check the arguments and load what they name, the model last.

    Raises:
        ValueError: a folder that cannot be written to, data that cannot be used, or sizes below one.
    """
    for name in ("batch_size", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be >= 1, got {value}.")
    output = prepare_output(options.output)
    samples = read_reasoning(options.data, options.data_format, options.split, check_images=False)
    with_image = [sample for sample in samples if sample.images]
    if not with_image:
        raise ValueError(f"None of the {len(samples)} questions of {options.data} has an image.")
    if len(with_image) < len(samples):
        print(f"{len(samples) - len(with_image)} of {len(samples)} questions have no image and are left out.")
    set_seed(options.seed)
    check_config_file(options.model)
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=options.trust_remote_code)
    model = AutoModel.from_pretrained(options.model, trust_remote_code=options.trust_remote_code, dtype=options.dtype)
    model = model.to(options.device).eval()
    return Study(model, processor, with_image[: options.limit], output, options.batch_size)


def prepare_output(folder: str | Path) -> Path:
    """Make the folder before any work is done for it.

    Raises:
        ValueError: it cannot be written to.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"`output` must be a folder that can be written to: {error}") from error
    return Path(folder)


def check_takes_steps(config) -> None:
    """Refuse a model without latents, or whose latents are blocks in its text.

    Raises:
        ValueError: an architecture that takes no steps between prompt and answer.
    """
    if not has_latents(config) or config.latent_unit != "step":
        known = sorted(name for name, kind in ARCHITECTURES.items() if kind.latent_unit == "step")
        raise ValueError(
            f"The analysis needs a model that takes latent steps behind its prompt, one of {known}; this one is "
            f"a {config.model_type!r}."
        )


def check_steps(config) -> None:
    """Refuse a model that is configured to take no latent steps.

    Raises:
        ValueError: it is.
    """
    if has_latents(config) and config.latent_unit == "step" and config.latent_count < 1:
        raise ValueError(f"The model takes no latent steps: `{config.latent_count_field}` is {config.latent_count}.")


def fields_of_steps(config, num_steps: int | None) -> dict:
    """The config fields with which every row takes `num_steps` latent steps; none for None, which leaves all as it is.

    Raises:
        ValueError: an architecture that takes no steps between prompt and answer.
    """
    if num_steps is None:
        return {}
    check_takes_steps(config)
    return config.limit_latents(num_steps)[0]


def encoded_batches(study: Study, samples: list[ReasoningSample]) -> Iterator[tuple]:
    """(samples, model inputs) of one batch after the other, for `generate(..., **GREEDY)`."""
    for start in tqdm(range(0, len(samples), study.batch_size), desc="generating"):
        batch = samples[start : start + study.batch_size]
        yield batch, encode_questions(study.processor, batch).to(study.model.device)


def latents_of(output, samples: list[ReasoningSample]) -> list[list[Tensor]]:
    """Per row of `generate`'s output the latents of its steps, (K, D) float32 each.

    Raises:
        ValueError: a row without latents.
    """
    trace = output.latent_trace.to("cpu")
    found = [[step.latents.float() for step in trace.row(row)] for row in range(trace.num_rows)]
    empty = [sample.origin for sample, steps in zip(samples, found) if not steps]
    if empty:
        raise ValueError(
            f"The model made no latents for {len(empty)} of {len(found)} questions of a batch, the first: {empty[0]}. "
            "A model that opens them in its text may need a larger `max_new_tokens`."
        )
    return found


def pool_mean_max(values: Tensor) -> Tensor:
    """The paper's hybrid pooling, mean and maximum side by side: (tokens, D) to (F,) = (2 * D,)."""
    return torch.cat([values.mean(dim=0), values.amax(dim=0)])
