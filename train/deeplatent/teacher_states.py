"""Hidden states of an SFT-1 model at the assistant's pictures: what SFT 2 distils into latents (DeepLatent, eq. 6).

    folder/
      states-00000.safetensors     sample number -> (layers, N, D), for the samples that have assistant images
      states-00001.safetensors     ...
      index.json                   written last, when every shard is there

Every shard carries the fingerprint of what it was made from: the data, the weights of the teacher and the settings. A shard
appears under its name when it is complete, so a run that was killed goes on with the first one that is missing, and any
number of processes may share the work.

Shapes: N image tokens of a sample's assistant pictures, D hidden size.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from configuration_latentvlm import DeepLatentConfig
from conversion.writing import write_file


INDEX = "index.json"
FINGERPRINT = "fingerprint"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_layers(num_layers: int, chosen: Sequence[int] | None = None, count: int = 4) -> tuple[int, ...]:
    """Numbers into `hidden_states`: those given, or `count` evenly spaced ones, the last included.

    Raises:
        ValueError: a layer is given twice or does not exist; 0 would be the embeddings.
    """
    if chosen is None:
        return tuple(sorted({max(1, round(num_layers * part / count)) for part in range(1, count + 1)}))
    if not chosen or len(set(chosen)) != len(chosen) or not all(1 <= layer <= num_layers for layer in chosen):
        raise ValueError(f"`align_layers` must be distinct numbers within 1..{num_layers}, got {list(chosen)}.")
    return tuple(sorted(chosen))


@torch.no_grad()
def read_hidden_states(model, inputs: dict, layers: Sequence[int], columns: Tensor) -> Tensor:
    """(layers, N, D) of the columns that are True, row after row; the last layer after the final norm."""
    output = model(**inputs, output_hidden_states=True, use_cache=False, logits_to_keep=1)
    return torch.stack([output.hidden_states[layer][columns] for layer in layers])


def pool_states(states: Tensor, count: int) -> Tensor:
    """Average (layers, N, D) in raster order to (layers, count, D), for latents that stand at no place of the picture."""
    return F.adaptive_avg_pool1d(states.transpose(1, 2).float(), count).transpose(1, 2).to(states.dtype)


def hash_weights(folder: str | Path) -> str:
    """A hash of a checkpoint's backbone, however it is cut into files. Latent weights play no part in the teacher.

    Raises:
        ValueError: there are no safetensors files.
    """
    places = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            places |= {name: path for name in weights.keys() if not DeepLatentConfig.is_new_weight(name)}  # noqa: SIM118
    if not places:
        raise ValueError(f"{folder} holds no weights in safetensors files.")
    digest = hashlib.sha256()
    for name in sorted(places):
        with safe_open(places[name], "pt") as weights:
            value = weights.get_tensor(name).contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def make_fingerprint(trajectories, folder: str | Path, processor, sizes, layers: Sequence[int]) -> dict:
    """All that the states depend on."""
    tokenizer = processor.tokenizer
    settings = {
        "layers": list(layers),
        "sizes": repr(sizes),
        "images": json.dumps(processor.image_processor.to_dict(), sort_keys=True, default=str),
        "template": processor.chat_template,
        "vocabulary": sorted(tokenizer.get_vocab().items()),
    }
    if (image_size := getattr(processor, "image_size", None)) is not None:
        settings["image_size"] = image_size
    written = json.dumps(settings, sort_keys=True).encode()
    return {
        "data": trajectories.digest,
        "model": hash_weights(folder),
        "settings": hashlib.sha256(written).hexdigest(),
        "layers": list(layers),
    }


def compare_fingerprints(found: dict, expected: dict, where: Path) -> None:
    """Raise a ValueError that names what differs."""
    wrong = [name for name in expected if found.get(name) != expected[name]]
    if wrong:
        raise ValueError(
            f"The teacher states in {where} were made from other {' and '.join(wrong)}: "
            "write them anew with `train.cache_teacher_states`, into another folder."
        )


class TeacherCacheWriter:
    """Writes the shards that are still missing, then the index.

    Args:
        fingerprint: of `make_fingerprint`.
        dtype: a key of `DTYPES`.
    """

    def __init__(self, folder: str | Path, fingerprint: dict, num_samples: int, samples_per_shard: int, dtype: str):
        if dtype not in DTYPES:
            raise ValueError(f"The dtype of states must be one of {sorted(DTYPES)}, got {dtype!r}.")
        if samples_per_shard < 1:
            raise ValueError(f"`samples_per_shard` must be >= 1, got {samples_per_shard}.")
        self.folder, self.dtype, self.num_samples = Path(folder), dtype, num_samples
        self.samples_per_shard = samples_per_shard
        self.fingerprint = fingerprint | {"dtype": dtype, "samples_per_shard": samples_per_shard}
        self.num_shards = -(-num_samples // samples_per_shard)
        self.folder.mkdir(parents=True, exist_ok=True)
        for number in range(self.num_shards):
            if self.path(number).exists():
                compare_fingerprints(read_fingerprint(self.path(number)), self.fingerprint, self.path(number))

    def path(self, number: int) -> Path:
        return self.folder / f"states-{number:05d}.safetensors"

    def samples_of(self, number: int) -> range:
        first = number * self.samples_per_shard
        return range(first, min(first + self.samples_per_shard, self.num_samples))

    def missing(self) -> list[int]:
        return [number for number in range(self.num_shards) if not self.path(number).exists()]

    def write(self, number: int, states: Iterable[tuple[int, Tensor]]) -> None:
        """Write one shard of (sample, states).

        Raises:
            OSError: the disk is full, or fails otherwise. The shards before this one stay valid.
        """
        tensors = {str(sample): values.to(DTYPES[self.dtype]).contiguous().cpu() for sample, values in states}
        # One entry: safetensors writes several in no fixed order.
        content = save(tensors, metadata={FINGERPRINT: json.dumps(self.fingerprint, sort_keys=True)})
        try:
            write_file(self.path(number), content)
        except OSError as error:
            samples = self.samples_of(number)
            raise OSError(
                error.errno,
                f"The states of samples {samples.start} to {samples.stop - 1} could not be written ({error.strerror}). "
                f"{self.num_shards - len(self.missing())} of {self.num_shards} shards are complete: make room and run the "
                "same command again",
                str(self.path(number)),
            ) from error

    def finish(self) -> bool:
        """Write the index if no shard is missing; the last of several processes does."""
        if self.missing():
            return False
        index = self.fingerprint | {"num_samples": self.num_samples}
        write_file(self.folder / INDEX, json.dumps(index, sort_keys=True, indent=2).encode())
        return True


def read_fingerprint(path: Path) -> dict:
    with safe_open(path, "pt") as shard:
        return json.loads((shard.metadata() or {}).get(FINGERPRINT, "{}"))


class TeacherCache:
    """Reads states by the number of a sample.

    Args:
        fingerprint: what they must have been made from.

    Raises:
        ValueError: the cache is not finished, or was made from other data, another model or other settings.
    """

    def __init__(self, folder: str | Path, fingerprint: dict):
        self.folder = Path(folder)
        path = self.folder / INDEX
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no finished teacher states: run `train.cache_teacher_states` to its end."
            )
        self.index = json.loads(path.read_text())
        compare_fingerprints(self.index, fingerprint, self.folder)

    def read(self, sample: int) -> Tensor:
        """(layers, N, D) of a sample that has assistant images."""
        path = self.folder / f"states-{sample // self.index['samples_per_shard']:05d}.safetensors"
        with safe_open(path, "pt") as shard:
            return shard.get_tensor(str(sample))
