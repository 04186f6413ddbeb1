"""D5: can the answer be read off the latents by a linear map? (PRISM 2606.05753)

Features, one vector an item:

    (a) emitting hidden   the last hidden state that emits the first token of the answer
    (b) last latent       z_K as fed
    (c) mean latent, question mean (text embeddings of the prompt), visual mean (image tokens)

against the reference answer: StandardScaler, then LogisticRegression (l2, C = 1, lbfgs, 1000 iterations), stratified
k-fold with k = min(5, smallest class). Questions that share a picture, by themselves or by way of other questions, lie in
one fold and count as about one picture: then k is at most min(5, fewest pictures of an answer), and the greatest for which
every answer can be learned for every fold. Of the held-out predictions: accuracy, cross-entropy CE, and

    MI_LB = max(0, H(Y) - CE)      H(Y) the entropy of the answers, both in nats

Chance-corrected accuracy is (Acc - largest class) / (1 - largest class); gap G = Acc(a) - Acc(b). Answers about one
picture alone are left out: no fold could have learned them.
"""

import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from scipy import stats
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from evaluation.final_answer import normalize
from train.faithfulness.items import NotApplicable
from train.faithfulness.observation import Observed
from train.faithfulness.result import Curve, Result
from train.faithfulness.statistics import mean_interval
from train.faithfulness.subject import Subject


FOLDS = 5
EMITTING, LAST = "(a) hidden that emits the answer", "(b) last latent"


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


def probe(features: np.ndarray, labels: np.ndarray, seed: int = 0, pictures: np.ndarray | None = None) -> dict:
    """Accuracy, held-out cross-entropy and MI_LB of features (N, F) for labels (N,).

    Args:
        pictures: (N,), equal where two rows share one; each label occurs with two or more. By default all differ.
    """
    counts = Counter(labels.tolist())
    folds = split_folds(labels, np.arange(len(labels)) if pictures is None else pictures, seed)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, solver="lbfgs", max_iter=1000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the definition stops at 1000 iterations
        probabilities = cross_val_predict(model, features, labels, cv=folds, method="predict_proba")
    names = np.unique(labels)
    right = names[probabilities.argmax(axis=1)] == labels
    accuracy, low, high = mean_interval(right, seed)
    cross_entropy = float(log_loss(labels, probabilities, labels=names))
    entropy = float(stats.entropy(list(counts.values())))
    chance = max(counts.values()) / len(labels)
    return {
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "chance": chance,
        "above chance": (accuracy - chance) / (1 - chance),
        "CE, nats": cross_entropy,
        "H(Y), nats": entropy,
        "MI_LB, nats": max(0.0, entropy - cross_entropy),
    }


def measure_probe(subject: Subject, observed: dict[int, Observed]) -> Result:
    """Probe all features.

    Raises:
        NotApplicable: fewer than two answers occur with two pictures or more, or the pictures cannot be split.
    """
    labels = {number: normalize(subject.items[number].answer) for number in observed}
    groups = group_by_pictures([subject.items[number].image_digests() for number in observed])
    pictures = dict(zip(observed, groups.tolist()))
    counts = Counter(answer for answer, _ in {(labels[number], pictures[number]) for number in observed})
    kept = [number for number in observed if counts[labels[number]] >= 2]
    if len({labels[number] for number in kept}) < 2:
        raise NotApplicable(
            "a probe needs two answers, each about two different pictures or more, among the questions with latents"
        )
    features = {
        EMITTING: [observed[number].emitting for number in kept],
        LAST: [subject.clean[number].latents()[-1] for number in kept],
        "(c) mean latent": [subject.clean[number].latents().mean(dim=0) for number in kept],
        "(c) question mean": [observed[number].question for number in kept],
        "(c) visual mean": [observed[number].visual for number in kept],
    }
    target, shown = (np.array([values[number] for number in kept]) for values in (labels, pictures))
    rows = [
        {"feature": name} | probe(torch.stack(values).double().numpy(), target, subject.seed, shown)
        for name, values in features.items()
    ]
    found = {row["feature"]: row["accuracy"] for row in rows}
    result = Result(
        "D5",
        "D5: linear probe of the answer",
        "StandardScaler and logistic regression (l2, C = 1), stratified folds that share no picture, held out; MI_LB = "
        "max(0, H(Y) - CE); G = Acc(a) - Acc(b).",
        tables={
            "probes": rows,
            "gap": [{"G": found[EMITTING] - found[LAST], "items": len(kept), "answers": len(set(target))}],
        },
        curves=[
            Curve(
                "accuracy of the probe",
                "feature",
                "accuracy",
                {"probe": [(row["feature"], row["accuracy"], row["low"], row["high"]) for row in rows]},
                "bar",
            )
        ],
        notes=["A large G: the model knows the answer where it says it, and its last latent does not hold it."],
    )
    if len(kept) < len(observed):
        result.notes.append(
            f"{len(observed) - len(kept)} items whose answer occurs with one picture alone are left out."
        )
    return result
