"""D5: can the answer be read off the latents by a linear map? (PRISM 2606.05753)

Features, one vector an item:

    (a) emitting hidden   the last hidden state that emits the first token of the answer
    (b) last latent       z_K as fed
    (c) mean latent, question mean (text embeddings of the prompt), visual mean (image tokens)
    (d) the latent of each place by itself, and all places side by side

task by task, against the reference answer: StandardScaler, then LogisticRegression (l2, C = 1, lbfgs, 1000 iterations), stratified
k-fold with k = min(5, smallest class). Questions that share a picture, by themselves or by way of other questions, lie in
one fold and count as about one picture: then k is at most min(5, fewest pictures of an answer), and the greatest for which
every answer can be learned for every fold. Of the held-out predictions: accuracy (by Wilson), cross-entropy CE, and

    MI_LB = max(0, H(Y) - CE)      H(Y) the entropy of the answers, both in nats

Chance-corrected accuracy is (Acc - largest class) / (1 - largest class); gap G = Acc(a) - Acc(b). Answers about one
picture alone are left out: no fold could have learned them.

Every row has two controls. "shuffled" is the accuracy of the same probe on labels dealt out anew: what this many features and
items give where there is nothing to read, beside "chance". The learning curve gives the accuracy of a probe that learns from a
part of each fold: one that still rises says that the items, and not the latents, are too few.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from scipy import stats
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from evaluation.faithfulness.collapse import stack, tasks_of
from evaluation.faithfulness.items import NotApplicable
from evaluation.faithfulness.observation import Observed
from evaluation.faithfulness.result import Curve, Result
from evaluation.faithfulness.statistics import share_interval
from evaluation.faithfulness.subject import Subject
from evaluation.final_answer import normalize


FOLDS = 5
EMITTING, LAST, ALL = "(a) hidden that emits the answer", "(b) last latent", "(d) all places"
MOST_PLACES = 16  # that are probed one by one, spread evenly
LEARNED_SHARES = (0.25, 0.5, 1.0)  # of what a fold learns from


def group_by_pictures(shown: Sequence[Sequence[str]]) -> np.ndarray:
    """(N,) numbers, equal where two rows share a picture or are tied by rows that do.

    Args:
        shown: what names every picture of a row.
    """
    numbers: dict[str, int] = {}
    ties = [(row, numbers.setdefault(name, len(numbers))) for row, names in enumerate(shown) for name in names]
    rows, pictures = np.array(ties, dtype=int).reshape(-1, 2).T
    size = len(shown) + len(numbers)  # rows and pictures are the nodes
    graph = coo_array((np.ones(len(ties)), (rows, len(shown) + pictures)), shape=(size, size))
    return connected_components(graph, directed=False)[1][: len(shown)]


def split_folds(labels: np.ndarray, pictures: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows to learn from and rows held out. No picture is on both sides, and every answer is learned.

    Args:
        pictures: (N,) of `group_by_pictures`: equal where two rows share one.

    Raises:
        NotApplicable: not even two folds can be made so.
    """
    shown = Counter(answer for answer, _ in set(zip(labels.tolist(), pictures.tolist())))
    most, rows = min(FOLDS, min(shown.values())), np.zeros(len(labels))
    if len(set(pictures.tolist())) == len(pictures):
        return list(StratifiedKFold(most, shuffle=True, random_state=seed).split(rows, labels))
    for count in range(most, 1, -1):
        folds = StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(rows, labels, pictures)
        folds = [(learned, held) for learned, held in folds if len(held)]
        if len(folds) == count and all(set(labels[learned]) == set(labels) for learned, _ in folds):
            return folds
    raise NotApplicable(
        f"a probe needs two folds that share no picture and both hold every answer, but {len(set(labels.tolist()))} answers "
        f"over {len(set(pictures.tolist()))} groups that share no picture cannot be split so"
    )


def new_probe() -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=1.0, solver="lbfgs", max_iter=1000))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what the definitions bring about: 1000 iterations, and shuffled labels that a fold may not have seen."""
    with warnings.catch_warnings():
        for kind in (ConvergenceWarning, RuntimeWarning, UserWarning):
            warnings.simplefilter("ignore", kind)
        yield


def probe(features: np.ndarray, labels: np.ndarray, seed: int = 0, pictures: np.ndarray | None = None) -> dict:
    """Accuracy, held-out cross-entropy and MI_LB of features (N, F) for labels (N,).

    Args:
        pictures: (N,), equal where two rows share one; each label occurs with two or more. By default all differ.
    """
    counts = Counter(labels.tolist())
    folds = split_folds(labels, np.arange(len(labels)) if pictures is None else pictures, seed)
    with quiet():
        probabilities = cross_val_predict(new_probe(), features, labels, cv=folds, method="predict_proba")
    names = np.unique(labels)
    right = names[probabilities.argmax(axis=1)] == labels
    accuracy, low, high = share_interval(right[:, None])
    cross_entropy = float(log_loss(labels, probabilities, labels=names))
    entropy = float(stats.entropy(list(counts.values())))
    chance = max(counts.values()) / len(labels)
    return {
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "chance": chance,
        "shuffled": shuffled_accuracy(features, labels, folds, seed),
        "above chance": (accuracy - chance) / (1 - chance),
        "CE, nats": cross_entropy,
        "H(Y), nats": entropy,
        "MI_LB, nats": max(0.0, entropy - cross_entropy),
    }


def shuffled_accuracy(features: np.ndarray, labels: np.ndarray, folds: list, seed: int) -> float:
    """Held-out accuracy of the probe where the labels are dealt out anew."""
    shuffled = np.random.default_rng(seed).permutation(labels)
    with quiet():
        predicted = cross_val_predict(new_probe(), features, shuffled, cv=folds)
    return float((predicted == shuffled).mean())


def learning_curve(
    features: np.ndarray, labels: np.ndarray, seed: int = 0, pictures: np.ndarray | None = None
) -> list[tuple[int, float]]:
    """(items learned from, held-out accuracy) where each fold learns from `LEARNED_SHARES` of what it could."""
    folds = split_folds(labels, np.arange(len(labels)) if pictures is None else pictures, seed)
    points = []
    for share in LEARNED_SHARES:
        right, sizes = np.zeros(len(labels), dtype=bool), []
        for number, (learned, held) in enumerate(folds):
            size = max(2, round(share * len(learned)))
            chosen = np.random.default_rng([seed, number]).permutation(learned)[:size]
            sizes.append(size)
            if len(set(labels[chosen])) < 2:
                right[held] = labels[held] == labels[chosen[0]]
                continue
            with quiet():
                right[held] = new_probe().fit(features[chosen], labels[chosen]).predict(features[held]) == labels[held]
        points.append((round(float(np.mean(sizes))), float(right.mean())))
    return points


def features_of(subject: Subject, observed: dict[int, Observed], numbers: list[int]) -> dict[str, np.ndarray]:
    """(N, F) by the name of the feature."""
    places = stack([subject.clean[number] for number in numbers])  # (N, K, D)
    found = {
        EMITTING: torch.stack([observed[number].emitting for number in numbers]),
        LAST: torch.stack([subject.clean[number].latents()[-1] for number in numbers]),
        "(c) mean latent": torch.stack([subject.clean[number].latents().mean(dim=0) for number in numbers]),
        "(c) question mean": torch.stack([observed[number].question for number in numbers]),
        "(c) visual mean": torch.stack([observed[number].visual for number in numbers]),
    }
    count = places.shape[1]
    for place in sorted(set(torch.linspace(0, count - 1, min(count, MOST_PLACES)).long().tolist())):
        found[f"(d) place {place + 1}"] = places[:, place]
    found[ALL] = places.flatten(1)
    return {name: values.double().numpy() for name, values in found.items()}


def measure_probe(subject: Subject, observed: dict[int, Observed]) -> Result:
    """Probe all features, task by task.

    Raises:
        NotApplicable: in no task two answers occur with two pictures or more, or can the pictures be split.
    """
    result = Result(
        "D5",
        "D5: linear probe of the answer",
        "By task: StandardScaler and logistic regression (l2, C = 1), stratified folds that share no picture, held out; MI_LB = "
        "max(0, H(Y) - CE); G = Acc(a) - Acc(b). Shuffled: the same on labels dealt out anew.",
        tables={"probes": [], "gap": [], "learning curve": []},
        notes=["A large G: the model knows the answer where it says it, and its last latent does not hold it."],
    )
    tasks = tasks_of(subject, list(observed))
    for task, numbers in tasks.items():
        try:
            add_task(subject, observed, numbers, task, result, len(tasks) > 1)
        except NotApplicable as reason:
            if len(tasks) == 1:
                raise
            result.not_applicable[f"task {task}"] = str(reason)
    if not result.tables["probes"]:
        raise NotApplicable("; ".join(f"{task}: {reason}" for task, reason in result.not_applicable.items()))
    return result


def add_task(
    subject: Subject,
    observed: dict[int, Observed],
    numbers: list[int],
    task: str,
    result: Result,
    is_one_of_many: bool,
) -> None:
    """Probe the items of one task."""
    labels = {number: normalize(subject.items[number].answer) for number in numbers}
    groups = group_by_pictures([subject.items[number].image_digests() for number in numbers])
    pictures = dict(zip(numbers, groups.tolist()))
    counts = Counter(answer for answer, _ in {(labels[number], pictures[number]) for number in numbers})
    kept = [number for number in numbers if counts[labels[number]] >= 2]
    if len({labels[number] for number in kept}) < 2:
        raise NotApplicable(
            "a probe needs two answers, each about two different pictures or more, among the questions with latents"
        )
    features = features_of(subject, observed, kept)
    target, shown = (np.array([values[number] for number in kept]) for values in (labels, pictures))
    rows = [
        {"task": task, "feature": name} | probe(values, target, subject.seed, shown)
        for name, values in features.items()
    ]
    found = {row["feature"]: row["accuracy"] for row in rows}
    result.tables["probes"] += rows
    gap = {"G": found[EMITTING] - found[LAST], "items": len(kept), "answers": len(set(target))}
    result.tables["gap"].append({"task": task} | gap)
    series = {name: learning_curve(features[name], target, subject.seed, shown) for name in (EMITTING, LAST, ALL)}
    result.tables["learning curve"] += [
        {"task": task, "feature": name, "learned from": size, "accuracy": accuracy}
        for name, points in series.items()
        for size, accuracy in points
    ]
    suffix = f", {task}" if is_one_of_many else ""
    bars = [(row["feature"], row["accuracy"], row["low"], row["high"]) for row in rows]
    result.curves += [
        Curve(f"accuracy of the probe{suffix}", "feature", "accuracy", {"probe": bars}, "bar"),
        Curve(f"learning curve of the probe{suffix}", "items learned from", "accuracy", series),
    ]
    if len(kept) < len(numbers):
        left = len(numbers) - len(kept)
        result.notes.append(
            f"{left} items{' of ' + task if is_one_of_many else ''} whose answer occurs with one picture alone are left out."
        )
