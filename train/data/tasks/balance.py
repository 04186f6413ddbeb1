"""Measure what is known without looking: per task, chance, the best constant answer, and answers from the question alone.

    python -m train.data.tasks.balance --n 600
    python -m train.data.tasks.balance --data data/train/data.jsonl --held-out data/test/data.jsonl

Everything that learns does so on one set and is scored on another. "question" gives the most frequent answer to the same
question, and where it was never asked the most frequent one of all; "words" is a logistic regression on the words of the
question (where scikit-learn is installed). Without `--data`, samples are made in memory, with pictures left out. For serial tasks a second
table says how far clues in the picture go, such as the distance from the start (`train.data.tasks.shortcuts`).
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from PIL import Image

from conversion.commands import CommandParser, exit_on_error
from conversion.reading import is_file, read_json_lines
from train.data.tasks import FAMILIES, LEVELS, SPLITS, TASKS, family_of, generate_sample, tasks_of
from train.data.tasks.shortcuts import measure_shortcuts, print_shortcuts


NEEDED = {"answer": str, "chance": float, "question": str, "task": str}
COLUMNS = ("chance", "constant", "question", "words")


def read_rows(path: str | Path) -> list[dict]:
    """Rows of a `data.jsonl`.

    Raises:
        ValueError: there is no such file, or a line without task, question, answer or chance.
    """
    path, rows = Path(path), []
    if not is_file(path):
        raise ValueError(
            f"`data` must be a `data.jsonl` of `train.data.tasks`, but there is no file {str(path)[:500]}."
        )
    for origin, row in read_json_lines(path):
        if missing := [
            name for name, kind in NEEDED.items() if not isinstance(row, dict) or not isinstance(row.get(name), kind)
        ]:
            raise ValueError(f"{origin} must have {', '.join(missing)}.")
        rows.append(row)
    return rows


def make_rows(tasks: tuple[str, ...], n: int, seed: int, split: str, level: str, image_size: int) -> Iterator[dict]:
    """Rows of `n` samples of each task. Nothing is painted, which costs most of the time and changes no answer."""
    modules = ("shapes", "search", "jigsaw", "maze", "hops", "arrows", "trace")
    painters = [f"train.data.tasks.{module}.draw_thing" for module in modules]
    patches = [mock.patch(painter, return_value=None) for painter in painters]
    patches.append(mock.patch("train.data.tasks.photos.load_photo", return_value=Image.new("RGB", (28, 28))))
    for patch in patches:
        patch.start()
    try:
        for task in tasks:
            for index in range(n):
                sample = generate_sample(task, seed, index, split, image_size, level)
                record = sample.record()
                row = {name: record[name] for name in (*NEEDED, "objects", "serial") if name in record}
                if "serial" in row:
                    del row["serial"]["contents"]  # of no use here, and large
                yield row
    finally:
        for patch in patches:
            patch.stop()


def halve(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Deal the rows of each task out in turn: tasks may alternate in a file, so every second row would be one task."""
    halves: tuple[list[dict], list[dict]] = ([], [])
    seen: Counter = Counter()
    for row in rows:
        halves[seen[row["task"]] % 2].append(row)
        seen[row["task"]] += 1
    return halves


def measure(train: list[dict], held_out: list[dict]) -> dict[str, dict[str, float | None]]:
    """Accuracy on `held_out` by task and column; None for "words" without scikit-learn.

    Raises:
        ValueError: a task of `held_out` has no row in `train`.
    """
    table = {}
    for task in dict.fromkeys(row["task"] for row in held_out):
        known, asked = ([row for row in rows if row["task"] == task] for rows in (train, held_out))
        if not known:
            raise ValueError(f"There must be rows of task {task} to learn from, got none.")
        answers = [row["answer"] for row in asked]
        table[task] = {
            "chance": sum(row["chance"] for row in asked) / len(asked),
            # The best one in hindsight: no constant does better.
            "constant": max(Counter(answers).values()) / len(asked),
            "question": _share(_answer_by_question(known, asked), answers),
            "words": _score_words(known, asked),
        }
    return table


def _share(given: list[str], right: list[str]) -> float:
    return sum(one == other for one, other in zip(given, right)) / len(right)


def _answer_by_question(train: list[dict], held_out: list[dict]) -> list[str]:
    by_question: dict[str, Counter] = {}
    for row in train:
        by_question.setdefault(row["question"], Counter())[row["answer"]] += 1
    overall = Counter(row["answer"] for row in train)
    return [by_question.get(row["question"], overall).most_common(1)[0][0] for row in held_out]


def _score_words(train: list[dict], held_out: list[dict]) -> float | None:
    try:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        return None
    words = CountVectorizer(token_pattern=r"\w+|[^\w\s]")
    features = words.fit_transform([row["question"] for row in train])
    model = LogisticRegression(max_iter=300).fit(features, [row["answer"] for row in train])
    given = model.predict(words.transform([row["question"] for row in held_out]))
    return _share(list(given), [row["answer"] for row in held_out])


def print_table(table: dict[str, dict[str, float | None]]) -> None:
    print(f"{'family':10s} {'task':16s} " + " ".join(f"{column:>9s}" for column in COLUMNS))
    for task, scores in table.items():
        cells = ["-" if scores[column] is None else f"{100 * scores[column]:.1f} %" for column in COLUMNS]
        print(f"{family_of(task):10s} {task:16s} " + " ".join(f"{cell:>9s}" for cell in cells))


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m train.data.tasks.balance", description="What is known about the answers without looking."
    )
    parser.add_argument("--data", help="a data.jsonl to learn from; default: samples made in memory")
    parser.add_argument(
        "--held-out", help="a data.jsonl to be scored on (default: every second row of each task in --data)"
    )
    parser.add_argument("--task", default="all", help=f"{', '.join(TASKS)}; {', '.join(FAMILIES)} or all")
    parser.add_argument("--n", type=int, default=600, help="samples of each task, to learn from and again to score")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the samples to learn from; those to score have the next one"
    )
    parser.add_argument("--split", default="train", help=f"what is scored: {', '.join(SPLITS)}")
    parser.add_argument("--level", default="easy", help=" or ".join(LEVELS))
    parser.add_argument("--image-size", type=int, default=224, help="pixels, a multiple of 28")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    with exit_on_error():
        if options.data is not None:
            train = read_rows(options.data)
            train, held_out = (train, read_rows(options.held_out)) if options.held_out else halve(train)
        else:
            generate_sample(options.task, 0, 0, options.split, options.image_size, options.level)  # checks the options
            tasks = tasks_of(options.task, options.level)
            settings = (options.level, options.image_size)
            train = list(make_rows(tasks, options.n, options.seed, "train", *settings))
            held_out = list(make_rows(tasks, options.n, options.seed + 1, options.split, *settings))
        print_table(measure(train, held_out))
        print_shortcuts(measure_shortcuts(train, held_out))


if __name__ == "__main__":
    main()
