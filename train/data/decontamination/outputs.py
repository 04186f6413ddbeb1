"""Write the cleaned file and the report: whole or not at all.

Both are written beside their place and renamed at the end, the cleaned file last: where it stands, all is done
(`conversion/writing.py`).
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from conversion.writing import replaced_file
from train.data.decontamination.journal import Journal
from train.data.decontamination.samples import batched, is_array, read_samples


KEPT = "kept"
PUBLISHING = "publishing"


def publish(
    train: Path, output: Path, report: Path, journal: Journal, batch_size: int, test_records: list[dict[str, Any]]
) -> Counter:
    """Write both files from the journal and delete it; return how many samples were kept, and removed by stage.

    Samples keep the bytes that they have in `train`; so does the text between brackets of the items of an array.
    """
    opening, between, closing = (b"[\n", b",\n", b"\n]\n") if is_array(train) else (b"", b"", b"")
    counts = Counter(record["stage"] for record in test_records)
    # Left from the inside out: the report gets its name before the cleaned file.
    with replaced_file(output) as partial_output, replaced_file(report) as partial_report:
        with partial_output.open("wb") as cleaned, partial_report.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(record) + "\n" for record in test_records)
            before = opening
            for number, batch in enumerate(batched(read_samples(train), batch_size)):
                records = journal.records("train", number)
                lines.writelines(json.dumps(record) + "\n" for record in records)
                counts.update(record["stage"] for record in records)
                removed = {record["line"] for record in records}
                for sample in batch:
                    if sample.number not in removed:
                        cleaned.write(before + sample.source)
                        before = between
                        counts[KEPT] += 1
            cleaned.write(closing if before == between else opening + closing)
        journal.note(PUBLISHING, True)
    journal.delete()
    return counts
