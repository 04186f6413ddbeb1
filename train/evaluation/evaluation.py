"""Rows to records: batches that never change, so that neither a kill nor the number of processes changes an answer.

`evaluate_rows` is the whole of it for a model at hand; `train.evaluate` adds files.
"""

import time
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

from train.answers import conversation_of
from train.evaluation.answering import AnswerSettings, answer_batch, check_settings
from train.evaluation.processes import Processes
from train.evaluation.rows import EvaluationRow
from train.evaluation.scoring import extract, is_correct


def split_batches(rows: Sequence[EvaluationRow], settings: AnswerSettings) -> list[list[EvaluationRow]]:
    """The batches of all rows, whoever answers them. For a swap a last row does not stay alone."""
    size = settings.batch_size
    batches = [list(rows[start : start + size]) for start in range(0, len(rows), size)]
    if settings.latent_intervention == "swap" and len(batches) > 1 and len(batches[-1]) == 1:
        alone = batches.pop()
        batches[-1] += alone
    return batches


def evaluate_rows(
    model,
    processor,
    rows: Sequence[EvaluationRow],
    settings: AnswerSettings | None = None,
    finished: dict[tuple[str, str], dict] | None = None,
    on_batch: Callable[[list[dict]], None] | None = None,
    processes: Processes | None = None,
    progress: bool = False,
) -> list[dict]:
    """Ask the questions and return a record of each: `correct`, `answer`, `text`, counts, `stop_reason` and `seconds`.

    Args:
        finished: records of rows that need not be asked again, by `EvaluationRow.key`.
        on_batch: gets the new records of every batch as soon as they are there.
        processes: this process takes every `count`-th batch and returns the records of those alone.

    Raises:
        ValueError: the model cannot be asked so, or a row cannot be answered.
    """
    settings, finished, processes = settings or AnswerSettings(), finished or {}, processes or Processes()
    check_settings(model, settings)
    batches = split_batches(rows, settings)
    mine = range(processes.rank, len(batches), processes.count)
    records = []
    with tqdm(total=sum(len(batches[number]) for number in mine), desc="answering", disable=not progress) as bar:
        for number in mine:
            batch = batches[number]
            known = {row.key: finished[row.key] for row in batch if row.key in finished}
            if len(known) < len(batch):
                # Also where only a part is missing: the answers of another batch could differ by rounding.
                asked = ask(model, processor, batch, settings, settings.seed + number)
                new = [record for row, record in zip(batch, asked) if row.key not in known]
                if on_batch is not None:
                    on_batch(new)
                known |= {(record["data"], record["id"]): record for record in new}
            records += [known[row.key] for row in batch]
            bar.update(len(batch))
    return records


def ask(model, processor, batch: list[EvaluationRow], settings: AnswerSettings, seed: int) -> list[dict]:
    began = time.perf_counter()
    conversations = [conversation_of(row) for row in batch]
    answers = answer_batch(model, processor, conversations, settings, seed, [row.origin for row in batch])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / len(batch)
    return [
        {
            "data": row.data,
            "id": row.id,
            "family": row.family,
            "task": row.task,
            "correct": is_correct(answer.text, row),
            "answer": extract(answer.text)[0],
            "truth": row.answer,
            **vars(answer),
            "seconds": round(seconds, 6),
        }
        for row, answer in zip(batch, answers)
    ]
