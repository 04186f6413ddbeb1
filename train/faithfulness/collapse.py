"""D4: do latents differ between pictures, and do they follow them? (X -> Z)

    inter-instance cosine   place t fixed: mean over t of the mean cosine of all pairs of items
    intra-instance cosine   item fixed: mean over items of the mean cosine of all pairs of places

of raw vectors, of vectors less the mean over all items and places, and whitened by principal components that hold 99 % of the
variance; beside them text embeddings and image tokens of the same prompts, as many an item, and the dummy (all equal: 1). Of the
spectrum l_1 >= l_2 >= .. of the centred vectors, Rank90/95/99: how many components hold that share of the variance, and the
participation ratio (sum l)^2 / sum l^2 (LVR: 2.6 against 54.3 of visual tokens).

Sensitivity: 1 - cos of the mean latent of a picture and of its edited self, with the share of answers that change; augmentation
consistency is the mean cosine where the edit means nothing.

Shapes: N items, K places, D size of a latent.
"""

from collections import Counter

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from modeling_latentvlm.interventions import resize_latents
from train.faithfulness.edits import AUGMENTATIONS, EDITS, UNAVAILABLE, check_edit, edit_sample
from train.faithfulness.items import NotApplicable
from train.faithfulness.observation import IMAGE, TEXT, Observed
from train.faithfulness.result import Curve, Result
from train.faithfulness.statistics import mean_interval, share_interval
from train.faithfulness.subject import CLEAN, Answer, Subject


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


def cosines(values: Tensor) -> dict[str, float]:
    """Inter- and intra-instance cosines of (N, K, D), raw, centred and whitened."""
    values = values.double()
    flat = values.flatten(0, 1)
    centred = values - flat.mean(dim=0)
    forms = {"raw": values, "centred": centred}
    if float(centred.square().mean()) > 1e-12 * max(1e-12, float(values.square().mean())):
        components = min(flat.shape) if len(flat) < 3 else None
        fitted = PCA(components or WHITENED_SHARE, whiten=True, svd_solver="full").fit_transform(flat.numpy())
        forms["whitened"] = torch.from_numpy(fitted).unflatten(0, values.shape[:2])
    row = {}
    for name, form in forms.items():
        row[f"inter, {name}"] = float(mean_cosine(form.transpose(0, 1)).mean())
        row[f"intra, {name}"] = float(mean_cosine(form).mean()) if form.shape[1] > 1 else float("nan")
    return row


def spectrum(values: Tensor) -> np.ndarray:
    """Variances along the principal components of (n, D), largest first."""
    centred = values.double() - values.double().mean(dim=0)
    return (torch.linalg.svdvals(centred).square() / max(1, len(values) - 1)).numpy()


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


def measure_collapse(subject: Subject, observed: dict[int, Observed]) -> Result:
    numbers = subject.with_latents
    if len(numbers) < 2:
        raise NotApplicable("a comparison between pictures needs two questions with latents")
    latents = stack([subject.clean[number] for number in numbers])
    groups = {
        "latents": latents,
        "text tokens": baseline(observed, TEXT, latents.shape[1]),
        "image tokens": baseline(observed, IMAGE, latents.shape[1]),
        "dummy tokens": torch.ones(1, 1, latents.shape[2]).expand(len(numbers), latents.shape[1], -1),
    }
    rows, series = [], {}
    for name, values in groups.items():
        if values is None:
            continue
        variances = spectrum(values.flatten(0, 1)) if name != "dummy tokens" else np.zeros(1)
        rows.append(
            {"vectors": name, "items": len(values), "places": values.shape[1]}
            | cosines_of(name, values)
            | ranks(variances)
        )
        if variances.sum() > 1e-20:
            series[name] = [
                (place, float(share)) for place, share in enumerate(variances.cumsum() / variances.sum(), 1)
            ]
    result = Result(
        "D4",
        "D4: collapse, and sensitivity to the picture",
        "Mean cosines between items at one place and between places of one item, and the rank of "
        "the latents, beside text and image "
        "tokens. Then: how far the mean latent moves (1 - cos) when the picture is edited, and how "
        "many answers change.",
        tables={"collapse": rows},
        curves=[Curve("share of variance held by the first components", "components", "share", series)],
        notes=["An inter-instance cosine near 1: the same latents whatever the picture."],
        not_applicable=dict(UNAVAILABLE),
    )
    add_sensitivity(subject, result)
    return result


def cosines_of(name: str, values: Tensor) -> dict[str, float]:
    if name == "dummy tokens":
        return {"inter, raw": 1.0, "intra, raw": 1.0}
    return cosines(values)


def add_sensitivity(subject: Subject, result: Result) -> None:
    rows, consistency = [], []
    for kind, edits in (("edit", EDITS), ("augmentation", AUGMENTATIONS)):
        for name, edit in edits.items():
            try:
                check_edit(name, subject.items)
            except NotApplicable as reason:
                result.not_applicable[name] = str(reason)
                continue
            answers = subject.answer(CLEAN, edit=lambda item, edit=edit: edit_sample(item, edit))
            row = {"picture": name, "kind": kind} | sensitivity(subject, answers)
            rows.append(row)
            if kind == "augmentation":
                consistency.append(1 - row["1 - cos"])
    result.tables["sensitivity"] = rows
    result.tables["consistency"] = [{"augmentation consistency (mean cosine)": float(np.mean(consistency))}]
    points = [(row["picture"], row["1 - cos"], row["low"], row["high"]) for row in rows]
    result.curves.append(Curve("how far the mean latent moves", "picture", "1 - cos", {"latents": points}, "bar"))


def sensitivity(subject: Subject, answers: list[Answer]) -> dict:
    pairs = [(subject.clean[number], answers[number]) for number in subject.with_latents if answers[number].steps]
    distances = [
        1 - float(torch.cosine_similarity(one.latents().mean(dim=0), other.latents().mean(dim=0), dim=0))
        for one, other in pairs
    ]
    mean, low, high = mean_interval(distances, subject.seed)
    said = zip(subject.readings(subject.clean), subject.readings(answers))
    flips, low_flips, high_flips = share_interval([[one.answer != other.answer] for one, other in said])
    row = {"items": len(pairs), "1 - cos": mean, "low": low, "high": high, "answers changed": flips}
    return row | {"answers changed, low": low_flips, "answers changed, high": high_flips}
