"""Rows to records: batches that never change, so that neither a kill nor the number of processes changes an answer.

Donors of a swap and noise follow from the rows themselves, so that the size of batches and the order of rows do not matter either.

`evaluate_rows` is the whole of it for a model at hand; `evaluation.evaluate` adds files.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from tqdm import tqdm

from evaluation.answering import AnswerSettings, answer_batch, check_settings, take_latents
from evaluation.answers import conversation_of
from evaluation.processes import Processes
from evaluation.rows import EvaluationRow, answer_key
from evaluation.scoring import extract, known_answers, read_answer
from evaluation.swapping import Lender
from train.data.seeds import mix


def split_batches(rows: Sequence[EvaluationRow], settings: AnswerSettings) -> list[list[EvaluationRow]]:
    """The batches of all rows, whoever answers them."""
    return [list(rows[start : start + settings.batch_size]) for start in range(0, len(rows), settings.batch_size)]


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

    A swap adds whose latents a row got: `donor_id`, `donor_task`, `same_answer`, whether the answer is the donor's
    (`follows_donor`) and how often it would be by chance (`follow_chance`). With `repeats` every question has several, one after the other for all questions; `repeat` counts them from 0.

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
    known, lender = known_answers(rows), None
    if settings.intervention == "swap":
        take = partial(take_latents, model, processor, settings=settings)
        lender = Lender(rows, settings.donors, settings.seed, take, settings.batch_size)
    work = [(repeat, number) for repeat in range(settings.repeats) for number in range(len(batches))]
    mine = work[processes.rank :: processes.count]
    records = []
    with tqdm(total=sum(len(batches[number]) for _, number in mine), desc="answering", disable=not progress) as bar:
        for repeat, number in mine:
            batch = batches[number]
            keys = [answer_key(row.key, repeat) for row in batch]
            done = {key: finished[key] for key in keys if key in finished}
            if len(done) < len(batch):
                # Also where only a part is missing: the answers of another batch could differ by rounding.
                seed = batch_seed(settings, number, repeat)
                asked = ask(model, processor, batch, settings, seed, repeat, lender, known)
                if settings.repeats > 1:
                    asked = [record | {"repeat": repeat} for record in asked]
                new = {key: record for key, record in zip(keys, asked) if key not in done}
                if on_batch is not None:
                    on_batch(list(new.values()))
                done |= new
            records += [done[key] for key in keys]
            bar.update(len(batch))
    return records


def ask(
    model,
    processor,
    batch: list[EvaluationRow],
    settings: AnswerSettings,
    seed: int,
    repeat: int,
    lender: Lender | None,
    known: dict[str, frozenset[str]],
) -> list[dict]:
    """The records of a batch.

    Args:
        seed: of sampled words.
        lender: of a swap.
        known: by task the answers that are true of some row.
    """
    began = time.perf_counter()
    loans = [None] * len(batch) if lender is None else lender.lend(batch, repeat)
    answers = answer_batch(
        model,
        processor,
        [conversation_of(row) for row in batch],
        settings,
        seed,
        names=[f"{row.id}|{repeat}" for row in batch],
        lent=None if lender is None else [None if loan is None else loan.steps for loan in loans],
    )
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / len(batch)
    records = []
    for row, answer, loan in zip(batch, answers, loans):
        reading = read_answer(answer.text, row, known[row.task])
        records.append(
            {
                "data": row.data,
                "id": row.id,
                "family": row.family,
                "task": row.task,
                "correct": reading.is_right,
                "answer": extract(answer.text)[0],
                "truth": row.answer,
                "is_marked": reading.is_marked,
                "is_valid": reading.is_valid,
                **vars(answer),
                **({} if loan is None else loan.record(reading)),
                "seconds": round(seconds, 6),
            }
        )
    return records
