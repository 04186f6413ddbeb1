"""How often a model is right, and what its answers take: accuracy with intervals, tokens, latents, time.

    python -m evaluation.evaluate --model out/deeplatent --data data/search/data.jsonl data/MMVP.tsv --output out/scores
    python -m evaluation.evaluate --model out/deeplatent --data data/search/data.jsonl --latents off --output out/scores-off
    torchrun --nproc_per_node 2 -m evaluation.evaluate --model out/lare --data data/search/data.jsonl --output out/scores
    python -m evaluation.evaluate --model out/deeplatent --data data/search/data.jsonl --output out/sampled --max_new_tokens 2048 \
        --generate temperature=0.5 top_p=0.5 top_k=5 --repeats 4 --seed 0

Any of our architectures, or a plain model that `AutoModelForImageTextToText` loads. Data: our tasks' JSONL, a simple JSONL,
or VLMEvalKit's TSV, all local (`evaluation/rows.py`, `evaluation/tables.py`); how answers are compared: `evaluation/scoring.py`.

OUTPUT gets `results.jsonl`, a line for every row as soon as it is answered, `summary.json`, and `run.json`. A killed run goes
on where it stopped when the same command is given again, with any number of processes; with other data, another model or
other settings it is refused.
"""

import json
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers

from conversion.commands import exit_on_error
from conversion.dataclass_parser import DataclassParser
from conversion.own_models import TRUST_HELP
from conversion.writing import locked, write_file
from evaluation.answering import AnswerSettings, check_settings
from evaluation.evaluate_rows import evaluate_rows
from evaluation.loading import DTYPES, hash_model, load_model, load_processor
from evaluation.processes import Processes
from evaluation.report import draw_table, summarize
from evaluation.results import ResultsFile, bind, gather, read_finished
from evaluation.rows import check_images, read_evaluation
from evaluation.scoring import ANSWER_FORMATS


@dataclass
class EvaluationArguments:
    """What is evaluated, on what, and where to."""

    model: str = field(metadata={"help": "Checkpoint folder."})
    data: list[str] = field(metadata={"help": "JSONL or TSV files."})
    output: Path = field(metadata={"help": "Folder of results.jsonl and summary.json."})
    answer_format: str | None = field(
        default=None, metadata={"help": f"Of rows that give none: one of {sorted(ANSWER_FORMATS)}."}
    )
    instruction: str | None = field(default=None, metadata={"help": "Stands below every question."})
    limit: int | None = field(default=None, metadata={"help": "Rows of each file, from its start."})
    dtype: str = field(default="auto", metadata={"help": f"One of {DTYPES}."})
    device: str | None = field(default=None, metadata={"help": "By default a GPU where there is one."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Of the language model."})
    trust_remote_code: bool = field(default=False, metadata={"help": TRUST_HELP})


def fingerprint_of(arguments: EvaluationArguments, settings: AnswerSettings, data: dict, model, device: str) -> dict:
    """What the answers follow from, and how they are compared."""
    try:
        comparison = version("math-verify")
    except PackageNotFoundError:
        comparison = "not installed"
    names = ("answer_format", "instruction", "limit", "dtype", "attn_implementation")
    return {
        "data": data,
        "model": model,
        "setting": {
            **{name: getattr(arguments, name) for name in names},
            **settings.to_dict(),
            "device": device.partition(":")[0],
        },
        "library": {"torch": torch.__version__, "transformers": transformers.__version__, "math-verify": comparison},
    }


def evaluate(arguments: EvaluationArguments, settings: AnswerSettings) -> dict | None:
    """Write results and summary; return the summary on the main process.

    Raises:
        ValueError: data, model, settings, or what an earlier run left, are not what they must be; the message says which.
    """
    processes = Processes.join()
    output = Path(arguments.output)
    rows = read_evaluation(arguments.data, arguments.answer_format, arguments.instruction, arguments.limit)
    device = processes.device(arguments.device)
    trust = arguments.trust_remote_code
    model = load_model(arguments.model, arguments.dtype, device, arguments.attn_implementation, trust)
    processor = load_processor(arguments.model, trust)
    check_settings(model, settings)
    with locked(output) if processes.is_main else nullcontext():
        if processes.is_main:
            output.mkdir(parents=True, exist_ok=True)
            data = check_images(rows, progress=True)
            bind(output, fingerprint_of(arguments, settings, data, hash_model(arguments.model), str(model.device)))
            gather(output, rows, settings.repeats)
        processes.wait()
        finished = read_finished(output)
        processes.wait()
        if finished and processes.is_main:
            print(f"{len(finished)} of {len(rows) * settings.repeats} rows were finished before.", flush=True)
        append = ResultsFile(output, processes.rank).append
        evaluate_rows(model, processor, rows, settings, finished, append, processes, progress=processes.is_main)
        processes.wait()
        if not processes.is_main:
            return None
        records = list(gather(output, rows, settings.repeats).values())
        summary = {"model": arguments.model, "settings": settings.to_dict(), **summarize(records)}
        write_file(output / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary


def build_parser() -> DataclassParser:
    parser = DataclassParser((EvaluationArguments, AnswerSettings), description=__doc__)
    return parser


def main() -> None:
    with exit_on_error():
        arguments, settings = build_parser().parse_args_into_dataclasses()
        summary = evaluate(arguments, settings)
    if summary is not None:
        print(draw_table(summary))
        print(arguments.output / "summary.json")
    Processes.join().leave()


if __name__ == "__main__":
    main()
