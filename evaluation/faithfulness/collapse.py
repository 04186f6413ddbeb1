"""D4: do latents differ between pictures of one task, and do they follow them? (X -> Z)

Everything is measured task by task: latents of two tasks differ because the tasks do, so pooled over tasks even latents that are
the same for all pictures look rich.

    inter-instance cosine   place t fixed: mean over t of the mean cosine of all pairs of items
    intra-instance cosine   item fixed: mean over items of the mean cosine of all pairs of places

of raw vectors, of vectors less the mean of their place over the items of the task, and whitened by the principal components of
those that hold 99 % of the variance; beside them text embeddings and image tokens of the same prompts, as many an item, and the
dummy (all equal: 1).

    share between pictures  sum |z_nt - m_t|^2 / sum |z_nt - m|^2    m_t the mean of place t, m that of all places

What remains is the same for every picture. Of the spectrum l_1 >= l_2 >= .. of z_nt - m_t, Rank90/95/99: how many components
hold that share of the variance, and the participation ratio (sum l)^2 / sum l^2 (LVR: 2.6 against 54.3 of visual tokens).

`sensitivity.py` asks what edits of the picture do to them.

Shapes: N items, K places, D size of a latent.
"""

from collections import Counter

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from evaluation.faithfulness.columns import IMAGE, TEXT
from evaluation.faithfulness.edits import UNAVAILABLE
from evaluation.faithfulness.items import NotApplicable
from evaluation.faithfulness.observation import Observed
from evaluation.faithfulness.result import Curve, Result
from evaluation.faithfulness.sensitivity import OTHER_PICTURE, add_sensitivity
from evaluation.faithfulness.subject import Answer, Subject
from modeling_latentvlm.interventions import resize_latents


MOST_PLACES = 64
SHARES = (0.90, 0.95, 0.99)
WHITENED_SHARE = 0.99


def stack(answers: list[Answer]) -> Tensor:
    """(N, K, D): the steps that all answers took, each in its most frequent grid; places thinned evenly to `MOST_PLACES`."""
    count = min(len(answer.steps) for answer in answers)
    columns = []
    for index in range(count):
        grid, _ = Counter(answer.steps[index].grid for answer in answers).most_common(1)[0]
        same = [
            resize_latents(answer.steps[index].latents.float(), answer.steps[index].grid, grid) for answer in answers
        ]
        columns.append(torch.stack(same))
    values = torch.cat(columns, dim=1)
    if values.shape[1] > MOST_PLACES:
        values = values[:, torch.linspace(0, values.shape[1] - 1, MOST_PLACES).long()]
    return values


def mean_cosine(values: Tensor) -> Tensor:
    """(...,) mean cosine of all pairs of the vectors (..., n, D), n >= 2.

    With unit vectors u_i, the sum over ordered pairs is |sum u_i|^2 - n. Zero vectors count as alike.
    """
    norms = values.norm(dim=-1, keepdim=True)
    is_zero = norms.squeeze(-1) < 1e-12
    if bool(is_zero.all()):
        return torch.ones(values.shape[:-2])
    unit = values / norms.clamp(min=1e-12)
    count = values.shape[-2]
    total = unit.sum(dim=-2).square().sum(dim=-1) - unit.square().sum(dim=(-1, -2))
    return total / (count * (count - 1))


def less_place_means(values: Tensor) -> Tensor:
    """(N, K, D) float64, less the mean of each place over the items: what differs between items."""
    values = values.double()
    return values - values.mean(dim=0)


def share_between(values: Tensor) -> float:
    """Of the variance of (N, K, D) around the mean of all vectors, the share that lies between items at one place.

    NaN where nothing varies at all.
    """
    values = values.double()
    total = float((values - values.mean(dim=(0, 1))).square().sum())
    return float(less_place_means(values).square().sum()) / total if total > 1e-20 else float("nan")


def cosines(values: Tensor) -> dict[str, float]:
    """Inter- and intra-instance cosines of (N, K, D), raw, centred and whitened."""
    values = values.double()
    centred = less_place_means(values)
    forms = {"raw": values, "centred": centred}
    if float(centred.square().mean()) > 1e-12 * max(1e-12, float(values.square().mean())):
        flat = centred.flatten(0, 1)
        components = min(flat.shape) if len(flat) < 3 else None
        fitted = PCA(components or WHITENED_SHARE, whiten=True, svd_solver="full").fit_transform(flat.numpy())
        forms["whitened"] = torch.from_numpy(fitted).unflatten(0, values.shape[:2])
    row = {}
    for name, form in forms.items():
        row[f"inter, {name}"] = float(mean_cosine(form.transpose(0, 1)).mean())
        row[f"intra, {name}"] = float(mean_cosine(form).mean()) if form.shape[1] > 1 else float("nan")
    return row


def spectrum(values: Tensor) -> np.ndarray:
    """Variances of (N, K, D), less the mean of each place, along their principal components, largest first."""
    flat = less_place_means(values).flatten(0, 1)
    return (torch.linalg.svdvals(flat).square() / max(1, len(flat) - 1)).numpy()


def ranks(variances: np.ndarray) -> dict[str, float]:
    """Rank90/95/99 and the participation ratio; zeros where nothing varies."""
    total = variances.sum()
    if total <= 1e-20:
        return {f"Rank{round(100 * share)}": 0 for share in SHARES} | {"participation ratio": 0.0}
    held = variances.cumsum() / total
    found = {f"Rank{round(100 * share)}": int((held < share - 1e-12).sum()) + 1 for share in SHARES}
    return found | {"participation ratio": float(total**2 / np.square(variances).sum())}


def baseline(observed: dict[int, Observed], kind: int, count: int) -> Tensor | None:
    """(N, count, D) vectors of a kind as they entered the language model, of items that have as many."""
    found = [seen.samples[kind] for seen in observed.values() if kind in seen.samples]
    most = min((len(values) for values in found), default=0)
    if len(found) < 2 or most < 1:
        return None
    return torch.stack([values[: min(count, most)] for values in found])


def tasks_of(subject: Subject, numbers: list[int]) -> dict[str, list[int]]:
    """The items of each task, in the order of the data."""
    found: dict[str, list[int]] = {}
    for number in numbers:
        found.setdefault(subject.items[number].task or "all", []).append(number)
    return found


def measure_collapse(subject: Subject, observed: dict[int, Observed]) -> Result:
    """D4, task by task.

    Raises:
        NotApplicable: no task has two questions with latents.
    """
    tasks = tasks_of(subject, subject.with_latents)
    compared = {task: numbers for task, numbers in tasks.items() if len(numbers) > 1}
    if not compared:
        raise NotApplicable("a comparison between pictures needs two questions of one task with latents")
    rows, series = [], {}
    for task, numbers in compared.items():
        latents = stack([subject.clean[number] for number in numbers])
        seen = {number: observed[number] for number in numbers if number in observed}
        groups = {
            "latents": latents,
            "text tokens": baseline(seen, TEXT, latents.shape[1]),
            "image tokens": baseline(seen, IMAGE, latents.shape[1]),
            "dummy tokens": torch.ones(1, 1, latents.shape[2]).expand(len(numbers), latents.shape[1], -1),
        }
        for name, values in groups.items():
            if values is not None:
                row, points = describe_group(name, values)
                rows.append({"task": task} | row)
                if points:
                    series[f"{name}, {task}" if len(compared) > 1 else name] = points
    result = Result(
        "D4",
        "D4: collapse, and sensitivity to the picture",
        "By task: mean cosines between items at one place and between places of one item, the share of the variance that lies "
        "between pictures, and the rank of what differs between pictures, beside text and image tokens. Then: how far the mean "
        "latent moves (1 - cos) when the picture is edited or exchanged, and how many answers change.",
        tables={"collapse": rows},
        curves=[Curve("share of variance held by the first components", "components", "share", series)],
        notes=[
            "An inter-instance cosine near 1, or a share between pictures near 0: the same latents whatever the picture.",
            f'The row "{OTHER_PICTURE}" is the scale of the distances: an edit that moves latents as far as that has moved them '
            "as far as the picture can.",
        ],
        not_applicable=dict(UNAVAILABLE)
        | {
            f"task {task}": "one question with latents: nothing to compare it with"
            for task in tasks.keys() - compared.keys()
        },
    )
    add_sensitivity(subject, compared, result)
    return result


def describe_group(name: str, values: Tensor) -> tuple[dict, list[tuple[int, float]]]:
    """The row of one kind of vectors (N, K, D), and the points of its curve."""
    row = {"vectors": name, "items": len(values), "places": values.shape[1]}
    if name == "dummy tokens":
        return row | {"inter, raw": 1.0, "intra, raw": 1.0, "share between pictures": 0.0} | ranks(np.zeros(1)), []
    variances = spectrum(values)
    row |= cosines(values) | {"share between pictures": share_between(values)} | ranks(variances)
    if variances.sum() <= 1e-20:
        return row, []
    return row, [(place, float(share)) for place, share in enumerate(variances.cumsum() / variances.sum(), 1)]
