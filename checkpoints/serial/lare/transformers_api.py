"""The names of transformers that differ between the versions that work. Every other file takes them from here.

transformers 5.24 renamed `past_key_values` to `cache`: as an argument of layers, models, `generate` and its hooks, and as
a field of outputs. A keyword of the other version is swallowed by somebody's `**kwargs` or warned about, so what is
given to transformers has the installed name (`cache_keyword`), and what comes from a caller may have either
(`one_cache`, `take_cache`, `BothCacheNames`).
"""

from typing import Any

import transformers
from packaging.version import Version


NEW_NAME, OLD_NAME = "cache", "past_key_values"
CACHE_NAMES = (NEW_NAME, OLD_NAME)
# By the version and not by looking, so that a config loads without torch; the contract compares it with what is there.
INSTALLED = Version(transformers.__version__).release
IS_RENAMED = INSTALLED >= (5, 24)
CACHE, OTHER_CACHE = (NEW_NAME, OLD_NAME) if IS_RENAMED else (OLD_NAME, NEW_NAME)
# An argument of `TrainingArguments`, and the first part of `..._enable` and `..._disable` of models.
CHECKPOINTING = "activation_checkpointing" if INSTALLED >= (5, 23) else "gradient_checkpointing"


def cache_keyword(cache: Any) -> dict[str, Any]:
    """The cache as a keyword argument of transformers: `layer(hidden_states, **cache_keyword(cache))`."""
    return {CACHE: cache}


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache that a caller gave by either name.

    Raises:
        ValueError: by both.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("`cache` and `past_key_values` are two names of one argument: give one of them.")
    return past_key_values if cache is None else cache


def take_cache(kwargs: dict) -> Any:
    """Take the cache out of keyword arguments, where it may stand by either name.

    Raises:
        ValueError: by both.
    """
    return one_cache(kwargs.pop(OLD_NAME, None), kwargs.pop(NEW_NAME, None))


class BothCacheNames:
    """For an output of transformers: its cache answers to both names, as an attribute and as an item.

    Stands before the output's class. The installed name is the field; the other one is not a field, so that iterating
    and `**output` give the cache once.
    """

    def __getitem__(self, key):
        return super().__getitem__(CACHE if key == OTHER_CACHE else key)

    def __contains__(self, key) -> bool:
        return super().__contains__(CACHE if key == OTHER_CACHE else key)

    def get(self, key, default=None):
        return super().get(CACHE if key == OTHER_CACHE else key, default)


def _other_name() -> property:
    return property(
        lambda output: getattr(output, CACHE),
        lambda output, cache: setattr(output, CACHE, cache),
        doc=f"The cache, by the name that other versions of transformers give to `{CACHE}`.",
    )


setattr(BothCacheNames, OTHER_CACHE, _other_name())
