"""Rows to records: batches that never change, so that neither a kill nor the number of processes changes an answer.

`evaluate_rows` is the whole of it for a model at hand; `train.evaluate` adds files.
"""

import time
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

from train.answers import conversation_of
from train.deeplatent_rl.actions import mix
from train.evaluation.answering import AnswerSettings, answer_batch, check_settings
from train.evaluation.processes import Processes
from train.evaluation.rows import EvaluationRow, answer_key
from train.evaluation.scoring import extract, is_correct


def split_batches(rows: Sequence[EvaluationRow], settings: AnswerSettings) -> list[list[EvaluationRow]]:
    """The batches of all rows, whoever answers them. For a swap a last row does not stay alone."""
    size = settings.batch_size
    batches = [list(rows[start : start + size]) for start in range(0, len(rows), size)]
    if settings.latent_intervention == "swap" and len(batches) > 1 and len(batches[-1]) == 1:
        alone = batches.pop()
        batches[-1] += alone
    return batches


def batch_seed(settings: AnswerSettings, number: int, repeat: int) -> int:
    """What a batch draws from: another stream in every repeat, whatever the seed."""
    return settings.seed + number if repeat == 0 else mix(settings.seed, number, repeat)


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

    With `repeats` every question has several, one after the other for all questions; `repeat` counts them from 0.

    Args:
        finished: records of rows that need not be asked again, by `EvaluationRow.key`, with the repeat behind it from 1 on.
        on_batch: gets the new records of every batch as soon as they are there.
        processes: this process takes every `count`-th batch and returns the records of those alone.

    Raises:
        ValueError: the model cannot be asked so, or a row cannot be answered.
    """
    settings, finished, processes = settings or AnswerSettings(), finished or {}, processes or Processes()
    check_settings(model, settings)
    batches = split_batches(rows, settings)
    work = [(repeat, number) for repeat in range(settings.repeats) for number in range(len(batches))]
    mine = work[processes.rank :: processes.count]
    records = []
    with tqdm(total=sum(len(batches[number]) for _, number in mine), desc="answering", disable=not progress) as bar:
        for repeat, number in mine:
            batch = batches[number]
            keys = [answer_key(row.key, repeat) for row in batch]
            known = {key: finished[key] for key in keys if key in finished}
            if len(known) < len(batch):
                # Also where only a part is missing: the answers of another batch could differ by rounding.
                asked = ask(model, processor, batch, settings, batch_seed(settings, number, repeat))
                if settings.repeats > 1:
                    asked = [record | {"repeat": repeat} for record in asked]
                new = {key: record for key, record in zip(keys, asked) if key not in known}
                if on_batch is not None:
                    on_batch(list(new.values()))
                known |= new
            records += [known[key] for key in keys]
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
