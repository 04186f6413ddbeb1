"""Show that a change of the code left every number equal to the bit: write all tensors of all modes, then compare two files.

    python tests/same_numbers.py --output after.safetensors
    PYTHONPATH=/path/to/older/checkout python tests/same_numbers.py --output before.safetensors
    python tests/same_numbers.py --compare before.safetensors after.safetensors

Tiny random models with fixed seeds and the three shipped checkpoints run on the CPU, in one thread, through public names
alone: the model classes, their configs, `generate` and `forward`. Packages come from `PYTHONPATH`, else from this checkout, so that the
same script runs old and new code; fields that were renamed are written under their first name (`FIELDS`). `same_numbers_modes.py`
lists the modes. The comparison prints one line a mode and exits with 1 on any difference.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Behind `PYTHONPATH`, so that an older checkout named there is what runs.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from safetensors import safe_open
from safetensors.torch import save_file


# What is read of an output, a trace, a step or a replay: by the first of the names that an object has.
FIELDS = (
    *(
        (name,)
        for name in ("sequences", "sequences_scores", "scores", "logits", "beam_indices", "loss", "hidden_states")
    ),
    ("cache", "past_key_values"),
    ("num_latent_blocks", "num_latent_steps"),
    *(
        (name,)
        for name in ("num_latents", "latent_grid_hw", "latents_unused", "stop_reason", "latent_trace", "replays")
    ),
    *((name,) for name in ("scale_loss", "scale_logits", "latent_states", "latent_mask", "image_hidden_states")),
    *(
        (name,)
        for name in ("num_rows", "steps", "row", "index", "column", "grid", "latents", "image_grids", "windows")
    ),
    *((name,) for name in ("image_attention", "saliency", "picked_tokens", "routed_tokens", "decode_step", "offset")),
    *((name,) for name in ("embeds", "attended", "tokens", "positions", "picked_embeds")),
)


def read_field(value: object, names: tuple[str, ...]) -> object:
    """The first field of an object that is there, set, and no method, by one of its names, or None."""
    found = (getattr(value, name, None) for name in names)
    return next((one for one in found if one is not None and not callable(one)), None)


def flatten(value: object, prefix: str, tensors: dict[str, torch.Tensor]) -> None:
    """Write everything in `value` that is a number or a text into `tensors`, by its path.

    Raises:
        TypeError: an object of which none of `FIELDS` is known, so that it would be left out without notice.
    """
    if value is None:
        return
    if isinstance(value, torch.Tensor):
        tensors[prefix] = value.detach().clone().contiguous()
    elif isinstance(value, bool | int | float):
        tensors[prefix] = torch.tensor(value)
    elif isinstance(value, str):
        tensors[prefix] = torch.tensor(list(value.encode()), dtype=torch.uint8)
    elif isinstance(value, dict) and type(value) is dict:
        for name, one in value.items():
            flatten(one, f"{prefix}/{name}", tensors)
    elif isinstance(value, list | tuple):
        for index, one in enumerate(value):
            flatten(one, f"{prefix}/{index}", tensors)
    elif hasattr(value, "layers") and hasattr(value, "get_seq_length"):  # a cache
        for index, layer in enumerate(value.layers):
            flatten([getattr(layer, "keys", None), getattr(layer, "values", None)], f"{prefix}/{index}", tensors)
    else:
        known = {names[0]: read_field(value, names) for names in FIELDS}
        if all(found is None for found in known.values()):
            raise TypeError(f"{prefix}: none of the fields of {type(value).__name__} is in FIELDS.")
        for name, found in known.items():
            flatten(found, f"{prefix}/{name}", tensors)


def write_numbers(output: Path, pattern: str) -> int:
    """Run every mode whose name matches and write what came out; the number of modes that failed."""
    import transformers
    from same_numbers_modes import collect_modes

    import configuration_latentvlm

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.set_verbosity_error()
    tree = Path(configuration_latentvlm.__file__).resolve().parent.parent
    print(f"code: {tree}, transformers {transformers.__version__}, torch {torch.__version__}")
    tensors: dict[str, torch.Tensor] = {}
    failed, started = [], time.monotonic()
    modes: dict[str, Callable[[], object]] = collect_modes(tree)
    for name, run in modes.items():
        if not re.search(pattern, name):
            continue
        torch.manual_seed(0)
        try:
            flatten(run(), f"{name}:", tensors)
        except Exception as error:  # all others are still of interest; the exit status says that one failed
            failed.append(name)
            print(f"{name} failed: {type(error).__name__}: {error}", file=sys.stderr)
    save_file(tensors, output, {"transformers": transformers.__version__, "torch": torch.__version__})
    print(f"{len(tensors)} tensors of {len(modes)} modes in {time.monotonic() - started:.0f} s, {len(failed)} failed")
    return len(failed)


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """0 where two tensors have the same type, shape and bits; infinity where they cannot be subtracted."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return float("inf")
    if one.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8)):
        return 0.0
    difference = (one.double() - other.double()).abs().nan_to_num(nan=float("inf")).max().item()
    return difference or 5e-324  # the bits differ although the numbers do not: minus zero


def compare_numbers(before: Path, after: Path) -> int:
    """Print one line a mode; the number of modes in which anything differs."""
    with safe_open(before, "pt") as old, safe_open(after, "pt") as new:
        if old.metadata() != new.metadata():
            print(f"versions differ: {old.metadata()} and {new.metadata()}")
        names = {name: None for file in (old, new) for name in sorted(file.keys())}
        by_mode: dict[str, list[str]] = {}
        for name in names:
            by_mode.setdefault(name.partition(":")[0], []).append(name)
        held = set(old.keys()), set(new.keys())
        wrong = 0
        print(f"{'mode':<58} {'tensors':>7} {'largest difference':>19}")
        for mode, found in by_mode.items():
            lacking = [name for name in found if not all(name in keys for keys in held)]
            common = [name for name in found if name not in lacking]
            pairs = {name: (old.get_tensor(name), new.get_tensor(name)) for name in common}
            differences = {name: largest_difference(*pair) for name, pair in pairs.items()}
            most = max(differences, key=differences.get, default=None)
            largest = differences.get(most, 0.0)
            is_equal = not lacking and largest == 0.0
            wrong += not is_equal
            note = "equal to the bit" if is_equal else f"differs: {most}" if largest else "differs"
            missing = f", {len(lacking)} in one file only, e.g. {lacking[0]}" if lacking else ""
            print(f"{mode:<58} {len(found):>7} {largest:>19.3g}  {note}{missing}")
    print(f"{len(by_mode)} modes, {len(names)} tensors, {wrong} modes differ")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file to write the tensors of all modes to (safetensors)")
    parser.add_argument(
        "--only", default="", help="regular expression: run the modes whose name matches (default: all)"
    )
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="two files written by --output"
    )
    arguments = parser.parse_args()
    if (arguments.output is None) == (arguments.compare is None):
        parser.error("give either --output FILE or --compare BEFORE AFTER")
    if arguments.compare:
        sys.exit(bool(compare_numbers(*arguments.compare)))
    sys.exit(bool(write_numbers(arguments.output, arguments.only)))


if __name__ == "__main__":
    main()
