"""Small models from nothing, step by step, from data to scores; and what ships of them."""

import conversion.commands  # noqa: F401  (says which extra a command needs where an import fails)
from train import moved_attribute


def __getattr__(name: str):
    return moved_attribute(__name__, name)
