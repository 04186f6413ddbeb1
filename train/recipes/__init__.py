"""Small models from nothing, step by step, from data to scores; and what ships of them."""

from train import moved_attribute


def __getattr__(name: str):
    return moved_attribute(__name__, name)
