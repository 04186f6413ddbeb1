"""Check that a checkpoint still answers as it did when it was written, or record its answers.

    python -m conversion.check checkpoints/lare            # a table of what differs; exit 1 if anything does
    python -m conversion.check out/mine --write            # record what it answers now

Where this repository is not at hand, `model.check_known_answers()` of a loaded checkpoint does the same.
"""

import sys

from conversion.commands import CommandParser, exit_on_error
from conversion.reading import check_model_folder


def write(model: str) -> None:
    try:
        from conversion.known_answers import write_known_answers
    except ImportError as error:
        raise ValueError(f"Known answers cannot be recorded here: {error}") from error

    problem = write_known_answers(model)
    if problem is not None:
        raise ValueError(f"No known answers were recorded: {problem}.")
    print(f"Wrote the known answers of {model}.")


def check(model: str):
    """The report on a checkpoint, loaded as its users load it: by the code that it brings, not by the installed one.

    Raises:
        ValueError: its code cannot be imported, or is older than known answers.
    """
    from transformers import AutoModelForImageTextToText

    refresh = f"Bring its code up to date: python -m conversion.refresh_code {model}"
    try:
        loaded = AutoModelForImageTextToText.from_pretrained(model, trust_remote_code=True, dtype="auto").eval()
    except ImportError as error:
        raise ValueError(f"The code of {model} cannot be imported here: {error} {refresh}") from error
    if not hasattr(loaded, "check_known_answers"):
        raise ValueError(f"{model} brings code of an older latentvlm, without known answers. {refresh}")
    return loaded.check_known_answers()


def build_parser() -> CommandParser:
    parser = CommandParser(description=__doc__)
    parser.add_argument("model", help="folder, or (without --write) Hub id, of a checkpoint")
    parser.add_argument("--write", action="store_true", help="record the answers, in place of those that are there")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)

    import os

    os.environ["LATENTVLM_CHECK"] = "0"  # the check is below, with its table
    with exit_on_error():
        if args.write:
            write(args.model)
            return
        check_model_folder(args.model)
        report = check(args.model)
    print(report)
    sys.exit(0 if report.passed else 1)


if __name__ == "__main__":
    main()
