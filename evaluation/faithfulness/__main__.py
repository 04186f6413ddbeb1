"""Write a faithfulness report: does anything depend on what the latents of a checkpoint hold?

    python -m evaluation.faithfulness --model out/lare --data data/tasks/data.jsonl --output out/faithfulness --limit 200

leaves `faithfulness.html`, one page that needs nothing beside it, and `faithfulness.json` with the same numbers. A killed run
goes on where it stopped. `--controls` also trains the three controls of `controls.py` (about three minutes) and shows them.
"""

import inspect
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor, set_seed

from conversion.commands import CommandParser, exit_on_error
from conversion.own_models import TRUST_HELP
from conversion.reading import check_config_file
from evaluation.analyses.collection import prepare_output
from evaluation.faithfulness.arms import ARMS, DRAWS
from evaluation.faithfulness.controls import controls_result
from evaluation.faithfulness.items import Item, in_order, read_items
from evaluation.faithfulness.report import write_report
from evaluation.faithfulness.run import DIAGNOSTICS, digest, file_digest, take_all
from evaluation.faithfulness.subject import Subject
from train.data.reasoning_data import ADAPTERS


CALLED = (
    "conversion/own_models.py",
    "evaluation/analyses/collection.py",
    "train/data/chats.py",
    "train/data/reasoning_data.py",
    "train/data/tasks/sample.py",
)  # beside `evaluation`, that diagnostics call


SAID = ("D1", "D14", "D15", "D16")  # diagnostics whose notes are printed


def build_parser() -> CommandParser:
    parser = CommandParser(prog="python -m evaluation.faithfulness", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id of a checkpoint with latents")
    parser.add_argument("--data", required=True, help="questions, in a format of `train/data/reasoning_data.py`")
    parser.add_argument("--output", required=True, help="folder for the page and the JSON")
    parser.add_argument("--data-format", default="steps", choices=sorted(ADAPTERS), help="format of the questions")
    parser.add_argument("--split", default="train", help="of a `datasets` folder with several (default: train)")
    parser.add_argument("--limit", type=int, help="take only the first so many questions that have an image")
    parser.add_argument("--batch-size", type=int, default=8, help="questions at a time (default: 8)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="budget of every answer (default: 64)")
    parser.add_argument(
        "--min-latent-blocks", type=int, default=0, help="DeepLatent: open at least so many (default: 0)"
    )
    parser.add_argument(
        "--diagnostics", nargs="+", default=list(DIAGNOSTICS), help=f"which (default: all): {', '.join(DIAGNOSTICS)}"
    )
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help=f"of D1 (default: all): {', '.join(ARMS)}")
    parser.add_argument(
        "--donor-draws",
        "--donor_draws",
        type=int,
        default=DRAWS,
        help=f"donors of every question in D1's arms that swap (default: {DRAWS})",
    )
    parser.add_argument("--controls", action="store_true", help="also train and show the controls")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: the checkpoint's)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the model runs"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    parser.add_argument("--trust-remote-code", action="store_true", help=TRUST_HELP)
    return parser


def key_of(options: Namespace, items: list[Item], model, processor) -> str:
    """What finished diagnostics depend on: checkpoint, data with their pictures, settings, code, and libraries.

    The code is this package with the modules of `train` that it calls, and that which model, config and processor come from:
    the installed packages, or the files of a checkpoint that `trust_remote_code` took.
    """
    folder, data = Path(options.model), Path(options.data)
    weights = file_digest(*(path for path in folder.iterdir() if path.is_file())) if folder.is_dir() else options.model
    shown = (image for item in items for image in (*item.sample.images, *item.assistant_images))
    pictures = {Path(image) for image in shown if isinstance(image, str)}
    asked = file_digest(
        *pictures, *(path for path in ([data] if data.is_file() else data.rglob("*")) if path.is_file())
    )
    here = Path(__file__).parent
    called = (here.parents[1] / name for name in CALLED)
    code = [file_digest(*here.glob("*.py"), *here.parent.glob("*.py"), *called)]
    sources = {Path(inspect.getfile(type(part))).parent for part in (model, model.config, processor)}
    code += [file_digest(*source.glob("*.py")) for source in sorted(sources)]
    libraries = [version(library) for library in ("torch", "transformers", "scikit-learn")]
    names = ("data_format", "split", "limit", "max_new_tokens", "min_latent_blocks", "dtype", "seed")
    return digest(weights, asked, code, libraries, *(getattr(options, name) for name in names))


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    for name in ("batch_size", "limit", "max_new_tokens", "donor_draws"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be >= 1, got {value}.")
    for name, known in (("arms", ARMS), ("diagnostics", DIAGNOSTICS)):
        unknown = sorted(set(getattr(options, name)) - set(known))
        if unknown:
            raise ValueError(f"`{name}` must be of {list(known)}, got {unknown}.")
    output = prepare_output(options.output)
    items = in_order(read_items(options.data, options.data_format, options.split, options.limit))
    set_seed(options.seed)
    check_config_file(options.model)
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=options.trust_remote_code)
    model = AutoModel.from_pretrained(
        options.model, trust_remote_code=options.trust_remote_code, dtype=options.dtype
    ).to(options.device)
    subject = Subject(
        model,
        processor,
        items,
        options.batch_size,
        options.max_new_tokens,
        options.min_latent_blocks,
        options.seed,
    )
    key = key_of(options, items, model, processor)
    results = take_all(
        subject, tuple(options.arms), output / "finished", key, options.donor_draws, tuple(options.diagnostics)
    )
    if options.controls:
        results.append(controls_result(output / "controls", options.seed))
    about = {
        "model": options.model,
        "architecture": model.config.model_type,
        "data": options.data,
        "questions": len(items),
        "seed": options.seed,
        "intervals": "95 %; shares by Wilson, differences paired by bootstrap over questions and by Newcombe",
    }
    page, data = write_report(results, about, output)
    print(summary(results))
    print(f"{page}\n{data}")


def summary(results) -> str:
    """What a terminal has room for: D1's arms, the notes of some diagnostics, and what was left out."""
    lines = []
    for result in results:
        for row in result.tables.get("arms", []) if result.name == "D1" else []:
            change = f"{row['change of accuracy']:+6.1f} [{row['low']:+.1f}, {row['high']:+.1f}]"
            pairs = f"b {row['b']:3d} c {row['c']:3d} p {row.get('p (Holm)', 1.0):.2g}"
            lines.append(
                f"{row['arm']:16s} {row['items']:4d} items {row['accuracy']:5.1f} % {change:24s} {pairs:24s} flips "
                f"{row['flip rate']:.3f}  KL {row['KL']:.4f}"
            )
        lines += [f"{result.name} {note}" for note in result.notes if result.name in SAID]
        lines += [f"{result.name} {part}: not applicable: {reason}" for part, reason in result.not_applicable.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    with exit_on_error():
        main()
