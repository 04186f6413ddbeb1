"""Make the README's pictures of serial questions: docs/staircase.png and docs/chase.png.

    python -m docs.serial_pictures staircase out/report-vedas/faithfulness.json out/report-lare/faithfulness.json
    python -m docs.serial_pictures chase --model vedas --hops 4 --seed 2026 --turn 12 --replace 2

The staircase is D14 of `python -m evaluation.faithfulness`, one panel a report: the accuracy by the number of latents that the model is
given, one line for each number of hops that a question needs. It takes reports, or the record of D14 alone. The chase is drawn as
`make demo` draws it, and below it the same with one latent of another picture.
"""

import io
import json
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from conversion.commands import CommandParser, exit_on_error
from examples.chase import MOST, chase_all, draw_question, find_donor, load_serial, say_whose, serial_names, swap
from examples.demo_common import told
from train.recipes.shipping import CHECKPOINTS


DOCS = Path(__file__).parent
NAMES = {"deeplatent": "DeepLatent", "lare": "LaRe", "vedas": "Vedas"}
COLORS = (
    "#3b2e8c",
    "#c2185b",
    "#ef6c00",
    "#00897b",
    "#1565c0",
    "#6d4c41",
    "#9e9d24",
    "#455a64",
)  # by the need, from 1
INK, PALE = "#20242c", "#7b8494"
SPREAD = 0.05  # latents between the lines


def read_need(path: Path) -> tuple[str, list[dict]]:
    """(whose report it is, the rows of D14's table by need).

    Raises:
        ValueError: there is no D14 in the file, or it says why it could not be measured.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a faithfulness.json or the record of D14: {error}") from error
    about = record.get("about", {}) if isinstance(record, dict) else {}
    found = record.get("diagnostics", {"D14": record}).get("D14", {}) if isinstance(record, dict) else {}
    rows = [row for row in found.get("tables", {}).get("accuracy", []) if str(row["need k"]).isdigit()]
    if not rows:
        reason = found.get("not_applicable", {}).get("all", "it holds none")
        raise ValueError(f"{path} must hold D14's accuracy by need: {reason}.")
    return NAMES.get(about.get("architecture"), path.parent.name), rows


def series_of(rows: list[dict]) -> dict[int, list[tuple[float, float, float, float]]]:
    """By need k: (latents given, accuracy, and the ends of its interval)."""
    is_counted = all(str(row["given"]).isdigit() for row in rows)  # else sizes of the one block
    series: dict[int, list] = {}
    for row in rows:
        x = int(row["given"]) if is_counted else row["mean latents"]
        series.setdefault(int(row["need k"]), []).append((x, row["accuracy"], row["low"], row["high"]))
    return {need: sorted(points) for need, points in sorted(series.items())}


def draw_staircase(reports: list[tuple[str, list[dict]]]) -> Image.Image:
    """One panel a report, on one scale."""
    figure = Figure(figsize=(0.9 + 3.9 * len(reports), 3.7), layout="constrained", dpi=120)
    axes = figure.subplots(1, len(reports), sharey=True, squeeze=False)[0]
    for axis, (name, rows) in zip(axes, reports):
        for need, points in series_of(rows).items():
            x, y, low, high = zip(*points)
            color = COLORS[(need - 1) % len(COLORS)]
            x = [one + SPREAD * (need - 2) for one in x]  # so that no line hides another's interval
            errors = [
                [max(0, one - end) for one, end in zip(y, low)],
                [max(0, end - one) for one, end in zip(y, high)],
            ]
            label = f"{need} {'hop' if need == 1 else 'hops'}"
            axis.errorbar(
                x, y, errors, fmt="o-", color=color, linewidth=2.4, markersize=6, elinewidth=1.2, label=label
            )
        chances = [row["chance"] for row in rows if row["chance"] is not None]
        if chances:
            axis.axhline(sum(chances) / len(chances), color=PALE, linestyle=":", linewidth=1.4, label="chance")
        style(axis, name)
    axes[0].set_ylabel("right answers, %", color=INK)
    axes[-1].legend(
        title="the question needs", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), alignment="left"
    )
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    return Image.open(drawn)


def style(axis, name: str) -> None:
    axis.set_title(name, loc="left", fontweight="bold", color=INK)
    axis.set_xlabel("latents given", color=INK)
    axis.set_ylim(-3, 104)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(axis="y", color="#e3e6ea")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=INK)


def draw_example(name: str, folder: Path, hops: int, seed: int, turn: int, number: int | None) -> Image.Image:
    """The chase of one question, and below it with the latent of step `number` of another picture.

    Raises:
        ValueError: no such checkpoint, or its answer is wrong: the picture is to show what it can.
    """
    model, processor = load_serial(name, folder)
    chase = chase_all(model, processor, [draw_question(hops, seed, turn)])[0]
    if not chase.is_right:
        raise ValueError(
            f"{name} must be right about the question that is shown, and says {chase.answer.text!r}: try another."
        )
    if number is None:
        return chase.draw()
    donor = chase_all(model, processor, [find_donor(chase.sample, seed + 1)])[0]
    changed = swap(model, processor, chase, donor, number)
    print(say_whose(chase.sample, donor.sample, number, told(changed.answer.text)))
    upper, lower = chase.draw(), changed.draw()
    both = Image.new("RGB", (upper.width, upper.height + lower.height), "white")
    both.paste(upper, (0, 0))
    both.paste(lower, (0, upper.height))
    return both


def save_small(picture: Image.Image, path: Path) -> None:
    """In 256 colors: a third of the bytes, and hardly another look."""
    picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def build_parser() -> CommandParser:
    parser = CommandParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    stairs = commands.add_parser("staircase", help="D14 of reports")
    stairs.add_argument("reports", type=Path, nargs="+", help="faithfulness.json of each, or the record of D14")
    example = commands.add_parser("chase", help="a question of `hops`, and the way of its latents")
    example.add_argument(
        "--model", choices=serial_names(), default=next(iter(serial_names()), None), help="whose latents are shown"
    )
    example.add_argument("--hops", type=int, default=MOST, help="hops that the question needs")
    example.add_argument("--seed", type=int, default=2026, help="seed of the picture")
    example.add_argument("--turn", type=int, default=0, help="which picture of the seed")
    example.add_argument(
        "--replace", type=int, choices=range(1, MOST + 1), help="also with the latent of this step of another picture"
    )
    example.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="folder of the checkpoints that ship")
    for command in (stairs, example):
        command.add_argument("--output", type=Path, default=DOCS, help="folder for the picture")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    if args.command == "staircase":
        save_small(draw_staircase([read_need(path) for path in args.reports]), args.output / "staircase.png")
    else:
        picture = draw_example(args.model, args.checkpoints, args.hops, args.seed, args.turn, args.replace)
        save_small(picture, args.output / "chase.png")


if __name__ == "__main__":
    with exit_on_error():
        main()
