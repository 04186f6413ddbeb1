"""Record the known answers of a checkpoint folder (`modeling_latentvlm/known_answers.py` says what they are)."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from configuration_latentvlm.hub_code import find_stale_code
from conversion.refresh_code import read_hub_classes, read_json
from conversion.writing import write_file
from modeling_latentvlm.known_answers import (
    FILE,
    FOLDER,
    FORMAT,
    KnownAnswers,
    compute_answer,
    digest_weights,
    read_metadata,
    record,
)


WRITE = "python -m conversion.check {} --write"
SPARE_MEMORY = 1.2  # of what the weights take, for the forward and the recorded tensors


def count_parameters(folder: Path) -> int:
    """Numbers in all weights of a checkpoint, read off the files' headers."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            count += sum(torch.Size(shard.get_slice(name).get_shape()).numel() for name in shard.keys())  # noqa: SIM118
    return count


def write_known_answers(folder: str | Path) -> str | None:
    """Record what the checkpoint in `folder` answers, in float32 and in the stored dtype, beside its weights.

    Returns:
        Why the answers could not be recorded here, or None.

    Raises:
        ValueError: `folder` holds no checkpoint of this library, or one with other code.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"Known answers are recorded of a checkpoint folder, got {folder}.")
    # The installed code runs here, and that of the folder where the answers are compared.
    stale = find_stale_code(folder, read_hub_classes(str(read_json(folder / "config.json").get("model_type"))))
    if stale is not None:
        raise ValueError(
            f"The code in {folder} is not that of this latentvlm ({stale} differs). Bring it up to date first: "
            f"python -m conversion.refresh_code {folder}"
        )
    if not (folder / "processor_config.json").is_file():
        return "the checkpoint has no processor"
    needed = SPARE_MEMORY * 4 * count_parameters(folder)
    if needed > psutil.virtual_memory().available:
        return f"that takes {needed / 2**30:.0f} GiB of memory"
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = load(folder, torch.float32)
    known = record(model, processor)
    stored = AutoConfig.from_pretrained(folder, trust_remote_code=True).dtype or torch.float32
    if stored != torch.float32:
        model = None  # one at a time
        model = load(folder, stored)
        known.dtype = str(stored).removeprefix("torch.")
        known.answers[known.dtype] = compute_answer(model, known.inputs, known.answers["float32"], force_grids=True)
    known.weights = digest_weights(model.state_dict())
    write_answers(folder, known)
    return None


def record_answers(folder: Path, output: Path | None = None) -> None:
    """Record the answers of a checkpoint that was just written, or say how to.

    Args:
        output: the folder's later name, for messages.
    """
    problem = write_known_answers(folder)
    if problem is not None:
        command = WRITE.format(output or folder)
        print(f"No known answers were recorded: {problem}. Record them later: {command}", file=sys.stderr)


def record_answers_apart(folder: Path) -> None:
    """As `record_answers`, in a process that does not belong to the distributed run which wrote the checkpoint."""
    ours = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = [sys.executable, "-m", "conversion.check", str(folder.resolve()), "--write"]
    if subprocess.run(command, env=environment, cwd=Path(__file__).parent.parent).returncode:
        print(f"No known answers were recorded. Record them: {WRITE.format(folder)}", file=sys.stderr)


def load(folder: Path, dtype: torch.dtype):
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()


def write_answers(folder: Path, known: KnownAnswers) -> None:
    target = folder / FOLDER / FILE
    write_file(target, known.to_bytes())


def rewrite_answers(folder: Path) -> list[str]:
    """Write the same known answers in the form in which they are written today; return the file where it was another.

    Raises:
        ValueError: they are damaged.
    """
    path = folder / FOLDER / FILE
    content = path.read_bytes() if path.is_file() else None
    if content is None or read_metadata(content).get("format") == FORMAT:
        return []
    write_answers(folder, KnownAnswers.from_bytes(content, str(path)))
    return [f"{FOLDER}/{FILE}"]
