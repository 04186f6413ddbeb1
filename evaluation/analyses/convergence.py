"""How the latents change from step to step (LaRe, section 4.5: do they converge?).

    python -m evaluation.analyses.convergence --model out/lare --data data/tasks/data.jsonl --output out/convergence

With m_t the mean latent of step t, measured as adaptive stopping measures it:

    cosine_change         1 - cos(m_t, m_t-1)
    l1_change, l2_change  |m_t - m_t-1| / |m_t-1|
    similarity_to_last    cos(m_t, m_T), T the last step of the row

`convergence.csv` holds mean and quantiles over the questions by measure and step, `convergence.png` the same as curves.
"""

from pathlib import Path

import pandas
import torch
from matplotlib.figure import Figure
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
    latents_of,
    open_study,
)
from modeling_latentvlm.decoding_lare import measure_change


MEASURES = ("cosine", "l1", "l2")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MOST_STEPS = 8


def measure_changes(steps: list[Tensor]) -> list[tuple[str, int, float]]:
    """(measure, step, value) of the steps of one row, (K, D) each; steps count from 1."""
    latents = torch.stack(steps)  # (steps, K, D)
    found = []
    for measure in MEASURES:
        changes = measure_change(latents[1:], latents[:-1], measure)
        found += [(f"{measure}_change", step, change) for step, change in enumerate(changes.tolist(), 2)]
    means = latents.mean(dim=1)
    similar = torch.cosine_similarity(means, means[-1:], dim=-1)
    return found + [("similarity_to_last", step, value) for step, value in enumerate(similar.tolist(), 1)]


def summarize(rows: list[tuple[str, int, float]]) -> pandas.DataFrame:
    """Mean and quantiles by measure and step, over the rows that took the step."""
    data = pandas.DataFrame(rows, columns=["measure", "step", "value"])
    table = data.groupby(["measure", "step"])["value"].describe(percentiles=QUANTILES)
    return table.rename(columns={"count": "questions"}).astype({"questions": int}).reset_index()


def measure_convergence(study: Study, num_steps: int | None = None) -> pandas.DataFrame:
    """Let the model take its steps on every question and summarize how they change.

    Args:
        num_steps: in place of the model's own number, adaptive stopping off.

    Raises:
        ValueError: an architecture without steps, or a number of steps that it cannot take.
    """
    config = study.model.config
    check_takes_steps(config)
    most = config.latent_count_limit or MOST_STEPS
    if num_steps is None:
        check_steps(config)
    elif not 1 <= num_steps <= most:
        raise ValueError(f"`num_steps` must be 1 to {most} for this model, got {num_steps}.")
    rows = []
    with changed_fields(config, **fields_of_steps(config, num_steps)):
        for samples, inputs in encoded_batches(study, study.samples):
            output = study.model.generate(**inputs, **GREEDY, output_latents=True, max_new_tokens=1)
            for steps in latents_of(output, samples):
                rows += measure_changes(steps)
    return summarize(rows)


def draw(table: pandas.DataFrame, path: Path) -> None:
    """One panel per measure: the median, and bands of 50 % and 90 % of the questions."""
    measures = list(table["measure"].unique())
    figure = Figure(figsize=(3.4 * len(measures), 3), layout="constrained")
    for axis, measure in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures):
        part = table[table["measure"] == measure]
        for low, high in (("5%", "95%"), ("25%", "75%")):
            axis.fill_between(part["step"], part[low], part[high], color="tab:blue", alpha=0.2, linewidth=0)
        axis.plot(part["step"], part["50%"], color="tab:blue", marker="o", markersize=3)
        axis.set(title=measure.replace("_", " "), xlabel="step", xticks=part["step"].tolist())
    with replaced_file(path) as partial:
        figure.savefig(partial, dpi=110)


def build_parser() -> CommandParser:
    parser = analysis_parser("convergence", __doc__.splitlines()[0])
    parser.add_argument("--num-steps", type=int, help="in place of the model's own number, without adaptive stopping")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    study = open_study(options)
    table = measure_convergence(study, options.num_steps)
    write_file(study.output / "convergence.csv", table.to_csv(index=False))
    draw(table, study.output / "convergence.png")
    print(table.to_string(index=False, float_format="{:.4f}".format))


if __name__ == "__main__":
    with exit_on_error():
        main()
