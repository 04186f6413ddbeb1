"""What a call of `generate` says of its number of latents, read in one way for every architecture.

    latents="off"                   none: what `config.limit_latents(0)` is, for this call alone
    max_latent_blocks=2             the field that counts them, `config.latent_count_field`, as an argument

Both may also stand in the generation config. An argument wins over it, and it over the model config. Nothing is written into any of them, since other
threads may generate with the same model.
"""

import copy
import re
from collections.abc import Iterable
from typing import Any


# Names of counts and of settings of latents, in this library and in what users guess; transformers has none of this form.
LATENT_ARGUMENT = re.compile(r"(num|min|max)_(\w+_)?(steps|blocks|latents)|latent_\w+")


def are_off(latents: str | None, **counts: Any) -> bool:
    """Whether a call switches its latents off.

    Args:
        latents: "on", which is the default, leaves their number to the counts.
        counts: the numbers that were given as arguments; None where one was not.

    Raises:
        ValueError: `latents` is neither "on" nor "off", or it is "off" and a number asks for some.
    """
    if not isinstance(latents, str | None) or latents not in (None, "on", "off"):
        raise ValueError(f'`latents` must be "on" or "off", got {latents!r}.')
    asked = [f"`{name}={count}`" for name, count in counts.items() if count is not None and count != 0]
    if latents == "off" and asked:
        raise ValueError(
            f'`latents="off"` allows no latents, but {" and ".join(asked)} asks for some: give one of them.'
        )
    return latents == "off"


def check_latent_arguments(given: Iterable[str], own: tuple[str, ...], unit: str, model_type: str) -> None:
    """Raise for an argument of another architecture, which would act on nothing.

    Args:
        given: names that the signature of `generate` did not take.
        own: the names by which this architecture counts.
        unit: what they count, "block" or "step".

    Raises:
        ValueError: a name of the form of a count or setting of latents, with the right names.
    """
    wrong = [f"`{name}`" for name in sorted(given) if LATENT_ARGUMENT.fullmatch(name) and name not in own]
    if wrong:
        right = " and ".join(f"`{name}`" for name in own)
        raise ValueError(
            f"{', '.join(wrong)} cannot be given to `generate` of {model_type}, whose latents come in {unit}s: {right} "
            f'says how many, and `latents="off"` switches them off.'
        )


def with_steps(config: Any, count: int | None) -> Any:
    """The config of one call that takes `count` steps; the model's own where None leaves the number to it.

    Raises:
        ValueError: the count is no whole number from 0 to the config's limit.
    """
    if count is None:
        return config
    name, most = config.latent_count_field, config.latent_count_limit
    is_number = isinstance(count, int) and not isinstance(count, bool)
    if not is_number or count < 0 or (most is not None and count > most):
        limit = "from 0 on" if most is None else f"from 0 to {most}"
        raise ValueError(f"`{name}` must be a whole number {limit}, got {count!r}.")
    changed = copy.copy(config)  # shallow: only numbers are set, and the sub-configs are read
    fields, arguments = config.limit_latents(count)
    for field, value in (fields | arguments).items():
        setattr(changed, field, value)
    return changed
