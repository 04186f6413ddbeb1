"""How much of the first generated token's attention goes to the image, with and without latent steps (LaRe, table 5).

    python -m evaluation.analyses.attention --model out/lare --data data/tasks/data.jsonl --output out/attention

The share of a question is the attention of its first generated token, as it is read again to predict the second, to all
visual tokens of the prompt, averaged over layers and heads: between 0 and 1. The paper compares LaRe with LLaVA; here the
same weights answer with their latent steps and with none. `attention_shares.csv` holds the shares by question,
`attention.json` their means and quantiles and

    paired_t_test   of the two shares of each question
    mann_whitney    of the two sets of shares, two-sided, as if they were of different questions (the paper's test)
    cohens_d        mean of the differences over their standard deviation
    rank_biserial   how much oftener a share with latents is the larger one of two drawn at random: -1 to 1
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from configuration_latentvlm.latent_architecture import changed_fields
from conversion.commands import CommandParser, exit_on_error
from conversion.writing import replaced_file, write_file
from evaluation.analyses.collection import (
    GREEDY,
    Study,
    analysis_parser,
    check_steps,
    check_takes_steps,
    encoded_batches,
    fields_of_steps,
    open_study,
)
from modeling_latentvlm.saliency import SaliencyRecorder, record_attention


ARMS = {"with_latents": None, "without_latents": 0}  # number of steps; None: the model's own
QUANTILES = {"q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}


@contextmanager
def recorded_first_token(model: torch.nn.Module) -> Iterator[SaliencyRecorder]:
    """Record where the first generated token looks: in a call of `generate` the second forward of the model."""
    text_model, recorder, forwards = model.model.language_model, SaliencyRecorder(has_gradients=False), 0
    record_attention(text_model)

    def count(module, args) -> None:
        nonlocal forwards
        forwards += 1

    def watch(module, args, kwargs):
        return args, kwargs | {"saliency": recorder} if forwards == 2 else kwargs

    hooks = [model.register_forward_pre_hook(count), text_model.register_forward_pre_hook(watch, with_kwargs=True)]
    try:
        yield recorder
    finally:
        for hook in hooks:
            hook.remove()


def image_share(recorder: SaliencyRecorder, is_image: Tensor) -> Tensor:
    """(B,) of the recorded attention on the image tokens of the prompt, (B, S) bool; the prompt fills the first keys."""
    attention = recorder.mean()[:, : is_image.shape[1]]
    return (attention * is_image.to(attention.device)).sum(dim=1).cpu()


def measure_shares(study: Study) -> pandas.DataFrame:
    """The shares of every question, a column per arm.

    Raises:
        ValueError: a model without latent steps, or whose answers do not attend to the image.
    """
    config = study.model.config
    check_takes_steps(config)
    check_steps(config)
    if not config.answer_sees_image:
        raise ValueError(
            "With `answer_sees_image=False` no generated token attends to the image: there is nothing to measure."
        )
    shares: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for arm, num_steps in ARMS.items():
        with changed_fields(config, **fields_of_steps(config, num_steps)):
            for _, inputs in encoded_batches(study, study.samples):
                with recorded_first_token(study.model) as recorder:
                    study.model.generate(**inputs, **GREEDY, max_new_tokens=2, eos_token_id=None)
                shares[arm] += image_share(recorder, inputs["input_ids"] == config.image_token_id).tolist()
    return pandas.DataFrame({"question": [sample.origin for sample in study.samples]} | shares)


def compare(with_latents: np.ndarray, without: np.ndarray) -> dict:
    """Describe and test two shares of the same questions.

    Raises:
        ValueError: fewer than two questions.
    """
    if len(with_latents) < 2:
        raise ValueError(f"The tests need 2 questions or more, got {len(with_latents)}.")
    paired = stats.ttest_rel(with_latents, without)
    ranked = stats.mannwhitneyu(with_latents, without, alternative="two-sided")
    difference = with_latents - without
    return {
        "questions": len(with_latents),
        "with_latents": describe(with_latents),
        "without_latents": describe(without),
        "paired_t_test": {"statistic": float(paired.statistic), "p_value": float(paired.pvalue)},
        "mann_whitney": {"statistic": float(ranked.statistic), "p_value": float(ranked.pvalue)},
        "cohens_d": float(difference.mean() / difference.std(ddof=1)),
        "rank_biserial": float(2 * ranked.statistic / len(with_latents) ** 2 - 1),
    }


def describe(shares: np.ndarray) -> dict[str, float]:
    quantiles = {name: float(np.quantile(shares, place)) for name, place in QUANTILES.items()}
    return {"mean": float(shares.mean()), "std": float(shares.std(ddof=1))} | quantiles


def draw(shares: pandas.DataFrame, path: Path) -> None:
    """Both distributions in the same bins."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    bins = np.histogram_bin_edges(100 * shares[list(ARMS)], bins=30)
    for arm in ARMS:
        axis.hist(100 * shares[arm], bins=bins, alpha=0.5, label=arm.replace("_", " "))
    axis.set(xlabel="attention of the first generated token to the image, %", ylabel="questions")
    axis.legend()
    with replaced_file(path) as partial:
        figure.savefig(partial, dpi=110)


def build_parser() -> CommandParser:
    return analysis_parser("attention", __doc__.splitlines()[0])


def main(arguments: list[str] | None = None) -> None:
    study = open_study(build_parser().parse_args(arguments))
    shares = measure_shares(study)
    found = compare(*(shares[arm].to_numpy() for arm in ARMS))
    write_file(study.output / "attention_shares.csv", shares.to_csv(index=False))
    write_file(study.output / "attention.json", json.dumps(found, indent=2) + "\n")
    draw(shares, study.output / "attention.png")
    print(pandas.DataFrame({arm: found[arm] for arm in ARMS}).T.to_string(float_format="{:.4f}".format))
    for test in ("paired_t_test", "mann_whitney"):
        print(f"{test}: statistic {found[test]['statistic']:.3f}, p {found[test]['p_value']:.3g}")
    print(f"cohens_d {found['cohens_d']:.3f}, rank_biserial {found['rank_biserial']:.3f}")


if __name__ == "__main__":
    with exit_on_error():
        main()
