"""The options that all converters share. Imports nothing slow."""

from conversion.commands import CommandParser


CAST_DTYPE_NAMES = ("bfloat16", "float16", "float32")


def add_converter_options(parser: CommandParser, licensed: str) -> None:
    """Add where the checkpoint goes, and what a user may decide about it.

    Args:
        licensed: whose licence the model card names by default.
    """
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--dtype", choices=CAST_DTYPE_NAMES, help="cast the weights (default: as they are)")
    parser.add_argument("--set", nargs="+", default=[], action="extend", metavar="FIELD=VALUE", help="config fields")
    parser.add_argument("--seed", type=int, default=0, help="of the new weights")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint at --output")
    parser.add_argument("--license", metavar="ID", help=f"licence for the model card (default: {licensed}'s)")
    parser.add_argument(
        "--no-known-answers",
        dest="known_answers",
        action="store_false",
        help="do not record what the checkpoint answers, which takes its weights in float32 at once",
    )


def backbone_parser(description: str) -> CommandParser:
    """The parser of a converter that takes one backbone."""
    parser = CommandParser(description=description)
    parser.add_argument("--backbone", required=True, help="folder or Hub id of the backbone's checkpoint")
    add_converter_options(parser, "the backbone")
    return parser
