"""Remove from a training set what a test set would give away: equal questions with equal answers, and its pictures.

    python -m train.decontaminate --train data/train.jsonl --test data/ai2d_test.jsonl data/mmvp.jsonl \
        --vision-tower FOLDER --output data/train.clean.jsonl

LaRe, "Data Decontamination Procedure". First the samples go whose question and answer are, normalised, those of a test
sample; then those whose image has a cosine similarity of `threshold` or more with any test image, by CLIP (the paper:
ViT-L/14). Files are JSONL of `image`, `question` and `answer`, or LLaVA's `conversations`, one a line or in one array.
Kept lines keep their bytes; OUTPUT.report.jsonl says of each removed one why, and which test sample it is like.

A killed run goes on where it stopped when the same command is given again: its journal lies beside the output. An image
that cannot be read stops the run, which `--skip-unreadable` lets go on: it removes such samples and reports them.
"""

from collections import Counter
from pathlib import Path

from tqdm import tqdm

from conversion.commands import exit_on_error
from conversion.dataclass_parser import DataclassParser
from train.data.decontamination.arguments import DTYPES, DecontaminationArguments
from train.data.decontamination.comparison import EXACT, IMAGE, UNREADABLE, UNREADABLE_TEST, Comparison
from train.data.decontamination.journal import Journal, fingerprint_of
from train.data.decontamination.outputs import KEPT, PUBLISHING, publish
from train.data.decontamination.samples import read_samples
from train.data.decontamination.survey import HeldOut, Survey
from train.data.decontamination.tower import ImageEmbedder


def decontaminate(arguments: DecontaminationArguments) -> Counter:
    """Write the cleaned file and the report; return how many samples were kept, and removed by stage.

    Raises:
        ValueError: a line, an image, the tower or the journal is not what it must be; the message says which.
    """
    train, test, tower = arguments.train, arguments.test, arguments.vision_tower
    held_out, num_samples = survey_files(arguments)
    size = arguments.batch_size
    embedder = ImageEmbedder(tower, DTYPES[arguments.dtype], arguments.device, size, arguments.num_threads)
    journal = Journal(arguments.journal, fingerprint_of(train, test, tower, arguments.settings))
    try:
        arguments.require_new_outputs(is_resumed=journal.recall(PUBLISHING))
        comparison = Comparison(held_out, embedder, journal, arguments.threshold, arguments.skip_unreadable)
        with tqdm(total=num_samples, desc="Comparing training samples", unit="sample") as progress:
            comparison.compare_all(read_samples(train), progress)
        return publish(train, arguments.output, arguments.report, journal, size, comparison.test_records)
    finally:
        journal.close()


def survey_files(arguments: DecontaminationArguments) -> tuple[HeldOut, int]:
    """Read all files once: what is held out, and the number of training samples."""
    survey, held_out, num_samples = Survey(), HeldOut(), 0
    for path in arguments.test:
        for sample in survey.read(path):
            held_out.add(str(path), sample)
    is_moved = arguments.output.parent.resolve() != arguments.train.parent.resolve()
    for sample in survey.read(arguments.train):
        num_samples += 1
        relative = [name for name in sample.image_names if not Path(name).is_absolute()]
        if is_moved and relative:
            raise ValueError(
                f"`output` must be in the folder of `train`, {arguments.train.parent}: lines are kept as they are, and "
                f"number {sample.number} names its image relative to it, {relative[0]}."
            )
    if not arguments.skip_unreadable:
        survey.require_images()
    return held_out, num_samples


def draw_table(counts: Counter) -> str:
    """The outcome by stage, one a row."""
    rows = {stage: counts[stage] for stage in (EXACT, IMAGE, UNREADABLE, KEPT)}
    rows = {"samples read": sum(rows.values()), **rows}
    if counts[UNREADABLE_TEST]:
        rows["test images not compared"] = counts[UNREADABLE_TEST]
    return "\n".join(f"{name:<26}{count:>10,}" for name, count in rows.items())


def build_parser() -> DataclassParser:
    parser = DataclassParser(DecontaminationArguments, description=__doc__)
    return parser


def main() -> None:
    with exit_on_error():
        (arguments,) = build_parser().parse_args_into_dataclasses()
        print(draw_table(decontaminate(arguments)))
        print(f"{arguments.output}, {arguments.report}")


if __name__ == "__main__":
    main()
