"""Stream a checkpoint's weights from one folder to another: what every converter needs, whatever the architecture.

A backbone is never held in memory. Its tensors are mapped shard by shard, passed on one at a time, and written to a
folder that appears under its own name only when it is complete (`conversion/writing.py`):

    with replaced_folder(output) as folder:
        write_weights(folder, source, edits, added, dtype)

Shapes: V vocabulary rows on disk, W after growing, D hidden size.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from conversion.reading import read_json_object
from conversion.writing import recover_folder


SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pth", "*.pt")
# A header's names of the dtypes that can be copied. Weights quantised to fewer bits cannot take new ones beside them.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
VOCABULARY_MULTIPLE = 64  # rows; matrices of such a height are fast on GPUs
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class TensorEntry:
    """What a header says about a tensor."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class SourceWeights:
    """The safetensors of a checkpoint folder, known by their headers, read when asked for.

    Raises:
        ValueError: the folder has no safetensors, lacks a shard, or holds one that is cut short.
    """

    def __init__(self, folder: Path):
        self.files = find_shards(folder)
        self.entries = {name: entry for file in self.files for name, entry in read_header(file).items()}
        self.opened: tuple[Path | None, Any] = (None, None)

    def read(self, name: str) -> Tensor:
        """Return a tensor that maps its file: memory is used for what is touched, and only of the file read last."""
        file = self.entries[name].file
        if self.opened[0] != file:
            self.opened = file, safe_open(file, "pt")
        return self.opened[1].get_tensor(name)


class JoinedWeights:
    """The weights of several checkpoints under the names that they have in one model. Reads like `SourceWeights`.

    Args:
        parts: each a source, and the name in the model of a weight on disk, or None where the model has none like it.

    Raises:
        ValueError: two weights have one name.
    """

    def __init__(self, parts: list[tuple[SourceWeights, Callable[[str], str | None]]]):
        self.entries: dict[str, TensorEntry] = {}
        self.origins: dict[str, tuple[SourceWeights, str]] = {}
        for source, rename in parts:
            for name, entry in source.entries.items():
                renamed = rename(name)
                if renamed in self.origins:
                    raise ValueError(f"{name} in {entry.file} and {self.origins[renamed][1]} are both {renamed}.")
                if renamed is not None:
                    self.entries[renamed], self.origins[renamed] = entry, (source, name)
        used = {entry.file for entry in self.entries.values()}
        self.files = [file for source, _ in parts for file in source.files if file in used]

    def read(self, name: str) -> Tensor:
        source, own_name = self.origins[name]
        return source.read(own_name)


def find_shards(folder: Path) -> list[Path]:
    """List the weight files of a folder, the single file first as transformers does."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
        found = f"only {', '.join(pickled[:3])}: save them as safetensors first" if pickled else "neither"
        raise ValueError(f"A backbone must hold {SINGLE_FILE} or {INDEX_FILE}, got {found}, in {folder}.")
    weight_map = read_json_object(folder / INDEX_FILE).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{folder / INDEX_FILE} must hold a `weight_map` of weights to files.")
    files = [folder / name for name in sorted(set(names))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ValueError(f"{INDEX_FILE} names {len(files)} shards, but {absent} are missing in {folder}.")
    return files


def read_header(file: Path) -> dict[str, TensorEntry]:
    """What one shard holds, by name."""
    entries = {}
    try:
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (`safe_open` is no dict)
                view = shard.get_slice(name)
                dtype = view.get_dtype()
                if dtype not in DTYPES:
                    raise ValueError(f"Weights must be one of {list(DTYPES)}, got {dtype} for {name} in {file}.")
                entries[name] = TensorEntry(file, DTYPES[dtype], tuple(view.get_shape()))
    except SafetensorError as error:
        raise ValueError(f"{file} must be a complete safetensors file: {error}.") from error
    return entries


def check_weights(
    source: SourceWeights | JoinedWeights,
    rename: Callable[[str], str],
    expected: dict[str, tuple[int, ...]],
    optional: set[str] = frozenset(),
) -> None:
    """Require that the source holds exactly the expected weights, before anything is written.

    transformers would give a missing weight random values, and tell no more than its log.

    Args:
        rename: name on disk to name in the model.
        expected: shape on disk by name in the model.
        optional: names of `expected` that may be absent (tied weights).

    Raises:
        ValueError: a weight is missing, unknown, or of another shape; the message names it.
    """
    found = {rename(name): entry.shape for name, entry in source.entries.items()}
    differences = {
        "missing": sorted(expected.keys() - found.keys() - optional),
        "unexpected": sorted(name for name in source.entries if rename(name) not in expected),
        "of another shape": [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != tuple(shape)
        ],
    }
    problems = [f"{len(names)} {kind}: {', '.join(names[:8])}" for kind, names in differences.items() if names]
    if problems:
        folders = list(dict.fromkeys(str(file.parent) for file in source.files))
        raise ValueError(
            f"The weights in {' and '.join(folders)} must be those its config.json describes. {'; '.join(problems)}."
        )


def grown_vocabulary(num_rows: int, token_ids: Iterable[int]) -> int:
    """Rows that an embedding needs for these tokens: those it has, or the next multiple of 64. It never shrinks."""
    needed = max(token_ids) + 1
    if needed <= num_rows:
        return num_rows
    return -(-needed // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def extend_vocabulary(
    rows: Tensor,  # (V, D)
    num_rows: int,
    known_ids: Iterable[int],
    added_ids: Iterable[int],
) -> Tensor:  # (W, D)
    """Copy `rows`, give the tokens just added the mean of the known tokens' rows, and every row beyond the old end.

    The mean is accumulated in float32. Spare rows of a real checkpoint were never trained, so they are not in it, and
    a token that moves into one does not keep it.
    """
    mean = torch.zeros(rows.shape[1])
    known = torch.tensor(sorted(token_id for token_id in known_ids if token_id < len(rows)))
    for ids in known.split(ROWS_AT_ONCE):
        mean += rows[ids].float().sum(dim=0)
    mean /= len(known)
    extended = rows.new_empty(num_rows, rows.shape[1])
    extended[: len(rows)] = rows
    extended[len(rows) :] = mean.to(rows.dtype)
    extended[list(added_ids)] = mean.to(rows.dtype)
    return extended


def find_vocabulary_weights(model: nn.Module) -> set[str]:
    """Names of the matrices with one row per token, tied or not."""
    modules = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    return {f"{path}.weight" for path, module in model.named_modules() if id(module) in modules}


@torch.no_grad()
def initialize_weights(model: nn.Module, names: Iterable[str], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Give the named weights of a model on the meta device their initial values, and leave all others unallocated.

    Only the modules that own them are materialised; the model's own `_init_weights` fills them, in float32.
    """
    names = set(names)
    weights = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for path, module in model.named_modules():
            owned = [name for name, _ in module.named_parameters(recurse=False) if f"{path}.{name}" in names]
            if not owned:
                continue
            module.to_empty(device="cpu", recurse=False)
            for name in owned:
                module.get_parameter(name).fill_(torch.nan)
            model._init_weights(module)
            for name in owned:
                values = module.get_parameter(name)
                values.data = values.data.to(dtype)
                assert not values.isnan().any(), f"`_init_weights` leaves {path}.{name} unset"
                weights[f"{path}.{name}"] = values.data
    assert weights.keys() == names, f"not parameters: {sorted(names - weights.keys())}"
    return weights


@dataclass
class Layout:
    """What a file will hold: dtype and shape of every tensor, in the order of writing."""

    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]

    def __post_init__(self):
        # Wide elements first, so that every tensor starts at a multiple of its element size.
        self.tensors = dict(sorted(self.tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])))

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every tensor."""
        return {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in self.tensors.items()}

    def header(self) -> bytes:
        """The file's first bytes (https://huggingface.co/docs/safetensors): length, then JSON, padded to 8 bytes."""
        header, start = {"__metadata__": {"format": "pt"}}, 0
        for (name, (dtype, shape)), size in zip(self.tensors.items(), self.sizes.values()):
            offsets = [start, start + size]
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
            start += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def write_safetensors(path: Path, layout: Layout, read: Callable[[str], Tensor], progress: tqdm) -> None:
    """Write one file, reading and holding one tensor at a time.

    `safetensors.torch.save_file` wants all of them in memory, and a second time where they are cast.
    """
    with path.open("wb") as file:
        file.write(layout.header())
        for name, (dtype, shape) in layout.tensors.items():
            progress.update(write_tensor(file, name, read(name), dtype, shape))


def write_tensor(file: BinaryIO, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), f"{name} is {tensor.dtype} {tuple(tensor.shape)}"
    return file.write(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))


@dataclass
class Edit:
    """A tensor that is not copied but computed from the source's: its shape, and how."""

    shape: tuple[int, ...]
    compute: Callable[[Tensor], Tensor]


def write_weights(
    folder: Path,
    source: SourceWeights | JoinedWeights,
    edits: dict[str, Edit],
    added: dict[str, Tensor],
    dtype: torch.dtype | None = None,
) -> None:
    """Write the source's shards one to one, and one more with what is added, and their index.

    Args:
        edits: by name on disk.
        added: by the name to write.
        dtype: cast floating weights of another dtype; by default every bit is kept.
    """

    def read(name: str) -> Tensor:
        tensor = source.read(name)
        if name in edits:
            tensor = edits[name].compute(tensor)
        return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor

    def describe(name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        entry = source.entries[name]
        shape = edits[name].shape if name in edits else entry.shape
        return dtype if dtype and entry.dtype.is_floating_point else entry.dtype, shape

    layouts = [
        Layout({name: describe(name) for name, entry in source.entries.items() if entry.file == file})
        for file in source.files
    ]
    layouts.append(Layout({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in added.items()}))
    names = [f"model-{number:05d}-of-{len(layouts):05d}.safetensors" for number in range(1, len(layouts) + 1)]
    total = sum(sum(layout.sizes.values()) for layout in layouts)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Writing weights") as progress:
        for file_name, layout in zip(names[:-1], layouts[:-1]):
            write_safetensors(folder / file_name, layout, read, progress)
        write_safetensors(folder / names[-1], layouts[-1], added.__getitem__, progress)
    weight_map = {tensor: file_name for file_name, layout in zip(names, layouts) for tensor in layout.tensors}
    num_parameters = sum(math.prod(shape) for layout in layouts for _, shape in layout.tensors.values())
    index = {"metadata": {"total_parameters": num_parameters, "total_size": total}, "weight_map": weight_map}
    write_json(folder / INDEX_FILE, index)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_output(output: Path, backbone: Path, force: bool) -> None:
    """Refuse an output folder whose replacement would lose something, before any work is done.

    Raises:
        ValueError: `output` is a file, is not empty, is no checkpoint (with `force`), or holds the backbone.
    """
    if backbone.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"`output` must not be or contain the backbone ({backbone}), got {output}.")
    if output.exists() and not output.is_dir():
        raise ValueError(f"`output` must be a folder, got the file {output}.")
    recover_folder(output)
    if not output.exists() or not any(output.iterdir()):
        return
    if not force:
        raise ValueError(f"`output` must be a new or empty folder, got {output}. Replace it with `--force`.")
    if not (output / "config.json").is_file():
        raise ValueError(f"`--force` replaces only a checkpoint folder, but there is no config.json in {output}.")
