"""Finished rows on disk: a killed evaluation goes on where it stopped.

`run.json` says what the answers follow from: data, model, settings. Every process appends its finished rows to a file of
its own, `results.rank<N>.jsonl`; at the start of the next run, and at the end, they are gathered in `results.jsonl`.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from conversion.writing import append_lines, write_file
from evaluation.rows import EvaluationRow, answer_key


RESULTS, RUN = "results.jsonl", "run.json"


def lines_of(records: Iterable[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def key_of(record: dict) -> tuple:
    return answer_key((record["data"], record["id"]), record.get("repeat", 0))


def bind(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Begin a run in a folder, or make sure that the one begun there, and that finished any row, is this one.

    Raises:
        ValueError: data, model or settings have changed; the message says which.
    """
    run, fingerprint = folder / RUN, json.loads(json.dumps(fingerprint))
    if not any(part.stat().st_size for part in folder.glob("results*.jsonl")):
        write_file(run, json.dumps(fingerprint, indent=2) + "\n")
        return
    if not run.is_file():
        raise ValueError(f"{folder} holds results, but no {RUN} that says of what. Give another `output`.")
    try:
        begun = json.loads(run.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{run} is no JSON: {error}") from error
    changed = []
    for part in sorted(begun.keys() | fingerprint.keys()):
        old, new = begun.get(part, {}), fingerprint.get(part, {})
        changed += [
            f"{part} `{name}`: {old.get(name, 'none')} then, {new.get(name, 'none')} now"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        ]
    if changed:
        raise ValueError(
            f"{folder} holds the results of an evaluation of other data, of another model or with other settings: "
            f"{'; '.join(changed)}. Go on with those, or give another `output`."
        )


def read_results(path: Path) -> list[dict]:
    """The finished rows of a file. A last line that a kill cut off is dropped, and that is said.

    Raises:
        ValueError: another line is no result; the message names it.
    """
    *lines, rest = path.read_bytes().split(b"\n")
    if rest:
        print(f"{path}: the last line was cut off while it was written; its row is asked again.", flush=True)
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            key_of(record)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"Line {number} of {path} is no result: {error!r}.") from error
        records.append(record)
    return records


def gather(folder: Path, rows: list[EvaluationRow], repeats: int = 1) -> dict[tuple, dict]:
    """Bring what all processes finished into `results.jsonl`, in the order of the rows, by repeat; return it by row.

    Raises:
        ValueError: a result belongs to no row.
    """
    parts = sorted(folder.glob("results*.jsonl"))
    found = {key_of(record): record for part in parts for record in read_results(part)}
    keys = [answer_key(row.key, repeat) for repeat in range(repeats) for row in rows]
    strange = found.keys() - set(keys)
    if strange:
        raise ValueError(f"{folder} has results of rows that the data has not: {sorted(strange)[:3]}.")
    finished = {key: found[key] for key in keys if key in found}
    write_file(folder / RESULTS, lines_of(finished.values()))
    for part in parts:
        if part.name != RESULTS:
            part.unlink()
    return finished


def read_finished(folder: Path) -> dict[tuple, dict]:
    """What `gather` left, by row."""
    return {key_of(record): record for record in read_results(folder / RESULTS)}


class ResultsFile:
    """Where one process appends its finished rows."""

    def __init__(self, folder: Path, rank: int):
        self.path = folder / f"results.rank{rank}.jsonl"

    def append(self, records: list[dict]) -> None:
        append_lines(self.path, lines_of(records))
