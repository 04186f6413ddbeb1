"""Do the latents encode image and text? Probes that tell matched pairs from mismatched ones (LaRe, table 6).

    python -m evaluation.analyses.probing --model out/lare --data data/tasks/data.jsonl --output out/probing

A pair is the latents of one question, mean- and max-pooled over all steps, and a feature of it or of another question:

    image   the projected tokens of its images, mean- and max-pooled
    text    the last hidden states of its rationale (or of the question, `--text question`), read by the language model
            alone: neither image nor latents, mean- and max-pooled

`matched_pairs.py` says which pairs there are. Both halves are standardized, projected to 256 principal components of the
training side and L2-normalized. Whether two vectors match is no linear function of them side by side, so the probes work
on their outer product z x v, without writing it out, since <z x v, z' x v'> = <z, z'> <v, v'>:

    svm   linear on z x v, that is a bilinear score z W v; C by 5-fold cross-validation on the training side
    mlp   one hidden layer on the products with all training pairs, with early stopping

Deviates from the paper, which projects by a trainable layer: principal components need no labels, so the probe is all that
is learned from them.

`probing.csv` holds accuracies on the test side with 95 % intervals, over all pairs and by kind of mismatch; the share of the
more frequent class (`chance`); and as a control the mean of the same probes trained on shuffled labels. Intervals are
Wilson's, as if pairs that share a question were independent; of the control, Student's over the shuffles, which differ by
more than the draw of pairs would explain.

Shapes: N questions, P pairs, F pooled features.
"""

import hashlib
from pathlib import Path

import numpy as np
import pandas
import torch
from matplotlib.figure import Figure
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from sklearn.svm import SVC
from torch import Tensor

from conversion.commands import CommandParser, exit_on_error
from conversion.writing import replaced_file, write_file
from evaluation.analyses.collection import (
    GREEDY,
    Study,
    analysis_parser,
    check_steps,
    encoded_batches,
    latents_of,
    open_study,
    pool_mean_max,
)
from evaluation.analyses.matched_pairs import KINDS, Pairs, Questions, choose_questions, pair_up
from train.data.reasoning_data import ReasoningSample


PROJECTED_SIZE = 256
COSTS = np.logspace(-2, 2, 5)
FOLDS = 5
LEAST_PAIRS = 40  # so that every fold has pairs of both labels
TARGETS = ("image", "text")
TEXTS = ("rationale", "question")


def image_digest(sample: ReasoningSample) -> str:
    """The same for the same pixels, wherever they lie."""
    digest = hashlib.sha256()
    for image in sample.load_images():
        digest.update(repr(image.size).encode() + image.tobytes())
    return digest.hexdigest()


def probed_text(sample: ReasoningSample, text: str) -> str:
    return " ".join(sample.steps) if text == "rationale" else sample.question


def codes(values: list[str]) -> np.ndarray:
    return np.unique(values, return_inverse=True)[1]


@torch.no_grad()
def pool_images(model, samples: list[ReasoningSample], inputs) -> list[Tensor]:
    """The images of each question as the language model gets them, pooled: (F,) each."""
    named = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    named["pixel_values"] = named["pixel_values"].to(model.dtype)
    images = iter(model.model.get_image_features(**named, return_dict=True).pooler_output)
    return [pool_mean_max(torch.cat([next(images) for _ in sample.images]).float()) for sample in samples]


@torch.no_grad()
def pool_texts(model, tokenizer, texts: list[str]) -> list[Tensor]:
    """The last hidden states of texts that are read alone, pooled: (F,) each."""
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(model.device)
    mask = encoded["attention_mask"]
    hidden = model.model.language_model(input_ids=encoded["input_ids"], attention_mask=mask, use_cache=False)
    return [pool_mean_max(row[kept].float()) for row, kept in zip(hidden.last_hidden_state, mask.bool())]


def collect(study: Study, samples: list[ReasoningSample], text: str, max_new_tokens: int) -> dict[str, np.ndarray]:
    """Run the model over all questions: (N, F) of their latents and of each target."""
    found: dict[str, list[Tensor]] = {name: [] for name in ("latents", *TARGETS)}
    for batch, inputs in encoded_batches(study, samples):
        output = study.model.generate(**inputs, **GREEDY, output_latents=True, max_new_tokens=max_new_tokens)
        found["latents"] += [pool_mean_max(torch.cat(steps)) for steps in latents_of(output, batch)]
        found["image"] += pool_images(study.model, batch, inputs)
        texts = [probed_text(sample, text) for sample in batch]
        found["text"] += pool_texts(study.model, study.processor.tokenizer, texts)
    return {name: torch.stack(values).cpu().numpy() for name, values in found.items()}


def project(values: np.ndarray, is_train: np.ndarray, seed: int) -> np.ndarray:
    """(N, F) to (N, 256 or fewer) of norm 1, fitted to the training side."""
    size = min(PROJECTED_SIZE, int(is_train.sum()), values.shape[1])
    steps = make_pipeline(StandardScaler(), PCA(size, random_state=seed), Normalizer())
    return steps.fit(values[is_train]).transform(values)


def shuffle(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels that say nothing: one half of either class becomes the other class.

    A plain permutation agrees with the truth a little more or less than half of the time, and a probe can learn from that.
    """
    shuffled = np.empty_like(labels)
    for label in (0, 1):
        rows = rng.permutation(np.flatnonzero(labels == label))
        shuffled[rows] = np.arange(len(rows)) % 2
    return shuffled


def build_probes(seed: int) -> dict:
    """Probes on the products with the training pairs, (P, training pairs)."""
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    mlp = MLPClassifier((PROJECTED_SIZE,), early_stopping=True, n_iter_no_change=20, max_iter=500, random_state=seed)
    return {
        "svm": GridSearchCV(SVC(kernel="precomputed"), {"C": COSTS}, cv=folds),
        "mlp": make_pipeline(StandardScaler(), mlp),
    }


def run_probes(
    latents: np.ndarray,
    features: np.ndarray,
    train: Pairs,
    test: Pairs,
    groups: np.ndarray,
    num_shuffles: int,
    seed: int,
) -> list[dict]:
    """Train every probe on true and on shuffled labels, and test it on true ones: rows of the table.

    Args:
        latents, features: (N, 256) projected.
        groups: (training pairs,) those of one group stay in one fold.
    """

    def products(pairs: Pairs) -> np.ndarray:  # (P, training pairs)
        latent = latents[pairs.latents] @ latents[train.latents].T
        return latent * (features[pairs.features] @ features[train.features].T)

    rng = np.random.default_rng(seed)
    trained_on = {"true": [train.labels], "shuffled": [shuffle(train.labels, rng) for _ in range(num_shuffles)]}
    rows = []
    for name, probe in build_probes(seed).items():
        named = {"groups": groups} if name == "svm" else {}
        for kind, runs in trained_on.items():
            predicted = [probe.fit(products(train), labels, **named).predict(products(test)) for labels in runs]
            rows += [{"probe": name, "labels": kind, **row} for row in score(np.stack(predicted) == test.labels, test)]
    return rows


def score(is_right: np.ndarray, pairs: Pairs) -> list[dict]:
    """Accuracy over all pairs, then over the mismatched ones of each kind, of one run or of the mean of several.

    Args:
        is_right: (runs, P) bool.
    """
    parts = {"all": np.ones(len(pairs.kinds), dtype=bool)} | {kind: pairs.kinds == kind for kind in KINDS}
    share = pairs.labels.mean()
    rows = []
    for part, mask in parts.items():
        count = int(mask.sum())
        if count:
            low, high = interval(is_right[:, mask])
            accuracy, chance = float(is_right[:, mask].mean()), max(share, 1 - share)
            row = {"pairs": part, "count": count, "accuracy": accuracy, "low": low, "high": high, "chance": chance}
            rows.append(row)
    return rows


def interval(is_right: np.ndarray) -> tuple[float, float]:
    """95 % interval of an accuracy, (runs, P) bool: Wilson's over the pairs of one run, Student's over several runs."""
    runs, count = is_right.shape
    if runs == 1:
        found = stats.binomtest(int(is_right.sum()), count).proportion_ci(method="wilson")
        return found.low, found.high
    accuracies = is_right.mean(axis=1)
    half = stats.t.ppf(0.975, runs - 1) * accuracies.std(ddof=1) / runs**0.5
    return accuracies.mean() - half, accuracies.mean() + half


def probe_latents(
    study: Study,
    num_pairs: int = 1000,
    text: str = "rationale",
    num_shuffles: int = 10,
    seed: int = 0,
    max_new_tokens: int = 1,
) -> pandas.DataFrame:
    """Collect latents and features of `num_pairs / 2` questions and probe them.

    Raises:
        ValueError: too few or too uniform questions for the pairs, or a model without latents.
    """
    if num_pairs < LEAST_PAIRS or num_pairs % 2:
        raise ValueError(f"`num_pairs` must be even and >= {LEAST_PAIRS}, got {num_pairs}.")
    if num_shuffles < 2:
        raise ValueError(f"`num_shuffles` must be >= 2, got {num_shuffles}: one says little about chance.")
    check_steps(study.model.config)
    rng = np.random.default_rng(seed)
    images = codes([image_digest(sample) for sample in study.samples])
    chosen, is_train = choose_questions(images, num_pairs // 2, rng)
    samples = [study.samples[index] for index in chosen]
    questions = Questions(images[chosen], codes([sample.question for sample in samples]), is_train)
    texts = codes([probed_text(sample, text) for sample in samples])
    pairs = {}
    for target, contents in {"image": questions.images, "text": texts}.items():
        pairs[target] = [pair_up(questions, contents, side, rng) for side in (True, False)]
    values = {
        name: project(one, is_train, seed) for name, one in collect(study, samples, text, max_new_tokens).items()
    }
    rows = []
    for target, (train, test) in pairs.items():
        groups = questions.images[train.latents]
        found = run_probes(values["latents"], values[target], train, test, groups, num_shuffles, seed)
        rows += [{"target": target, **row} for row in found]
    return pandas.DataFrame(rows)


def draw(table: pandas.DataFrame, path: Path) -> None:
    """Accuracy over all pairs, with intervals, against chance."""
    part = table[table["pairs"] == "all"]
    names = [f"{row.target}\n{row.probe}\n{row.labels}" for row in part.itertuples()]
    errors = np.stack([part["accuracy"] - part["low"], part["high"] - part["accuracy"]])
    figure = Figure(figsize=(1 + 0.8 * len(part), 3.2), layout="constrained")
    axis = figure.subplots()
    colors = ["tab:blue" if labels == "true" else "lightgray" for labels in part["labels"]]
    axis.bar(names, part["accuracy"], yerr=errors, color=colors, capsize=3)
    axis.axhline(part["chance"].iloc[0], color="black", linestyle="--", linewidth=1)
    axis.set(ylabel="accuracy", ylim=(0, 1))
    with replaced_file(path) as partial:
        figure.savefig(partial, dpi=110)


def build_parser() -> CommandParser:
    parser = analysis_parser("probing", __doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1000, help="matched and mismatched together (default: 1000)")
    parser.add_argument("--text", default="rationale", choices=TEXTS, help="what the text probe is about")
    parser.add_argument("--shuffles", type=int, default=10, help="trainings on shuffled labels (default: 10)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=1, help="more where latents come in the text, as DeepLatent's do"
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    study = open_study(options)
    table = probe_latents(study, options.pairs, options.text, options.shuffles, options.seed, options.max_new_tokens)
    write_file(study.output / "probing.csv", table.to_csv(index=False))
    draw(table, study.output / "probing.png")
    print(table.to_string(index=False, float_format="{:.3f}".format))
    for target, part in table.groupby("target"):
        missing = [kind for kind in KINDS if kind not in set(part["pairs"])]
        if missing:
            print(f"{target}: the data have no mismatch of the kind {', '.join(missing)}; the other kinds stand in.")


if __name__ == "__main__":
    with exit_on_error():
        main()
