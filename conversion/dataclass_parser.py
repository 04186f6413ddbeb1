"""The parser of commands whose options are dataclasses; see `conversion/commands.py`. Imports transformers."""

from dataclasses import fields

from transformers import HfArgumentParser

from conversion.commands import CommandOptions


class DataclassParser(CommandOptions, HfArgumentParser):
    """`HfArgumentParser` with the spellings and the help of all commands."""

    def __init__(self, dataclass_types, **settings):
        super().__init__(dataclass_types, **settings)
        # A field whose default alone is changed keeps the help text of the class that it comes from.
        texts = {
            field.name: field.metadata["help"]
            for one in self.dataclass_types
            for ancestor in reversed(one.__mro__)
            if "__dataclass_fields__" in vars(ancestor)
            for field in fields(ancestor)
            if field.metadata.get("help")
        }
        for action in self._actions:
            action.help = action.help or texts.get(action.dest)
