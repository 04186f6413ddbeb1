"""What a user may say to `train.decontaminate`, checked before any work is done."""

from dataclasses import dataclass, field
from pathlib import Path

import torch


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class DecontaminationArguments:
    """The paths and numbers of a run.

    Raises:
        ValueError: a number is out of range, a file is missing, or a file would be written over another.
    """

    train: Path = field(metadata={"help": "JSONL or LLaVA JSON to clean; image paths are relative to it."})
    test: list[Path] = field(metadata={"help": "One or more files of test samples.", "nargs": "+"})
    vision_tower: Path = field(metadata={"help": "Folder of a CLIP or SigLIP checkpoint, whole or its vision half."})
    output: Path = field(metadata={"help": "File to write the kept samples to."})
    report: Path = field(default=None, metadata={"help": "JSONL of what was removed (OUTPUT.report.jsonl)."})
    # Choice: the paper's number is lost from its text, which calls it conservative.
    threshold: float = field(default=0.95, metadata={"help": "Cosine similarity from which an image goes, in (0, 1]."})
    batch_size: int = field(default=16, metadata={"help": "Samples compared, and saved as progress, at once."})
    dtype: str = field(default="float32", metadata={"help": f"Of the tower: {', '.join(DTYPES)}."})
    device: str = field(default="auto", metadata={"help": "Of the tower; auto is a GPU where there is one."})
    num_threads: int = field(default=4, metadata={"help": "Images decoded at once."})
    skip_unreadable: bool = field(default=False, metadata={"help": "Remove samples with an unreadable image; go on."})
    force: bool = field(default=False, metadata={"help": "Replace an output and a report that are there."})

    def __post_init__(self):
        self.train, self.vision_tower, self.output = map(Path, (self.train, self.vision_tower, self.output))
        self.test = [Path(path) for path in self.test]
        self.report = Path(self.report or f"{self.output}.report.jsonl")
        self.check_numbers()
        self.check_inputs()
        self.check_outputs()

    @property
    def journal(self) -> Path:
        return Path(f"{self.output}.journal")

    @property
    def settings(self) -> dict[str, float | int | str]:
        """What the outcome depends on besides the files."""
        names = ("threshold", "batch_size", "dtype", "device")
        return {name: getattr(self, name) for name in names}

    def check_numbers(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"`threshold` must be in (0, 1], got {self.threshold}.")
        for name in ("batch_size", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1, got {getattr(self, name)}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:  # the latter where torch is built without CUDA
            raise ValueError(f"`device` must be one that torch finds here, got {self.device!r}: {error}") from error

    def check_inputs(self) -> None:
        for path in (self.train, *self.test):
            if not path.is_file():
                raise ValueError(f"`train` and `test` must be files, got {path}.")
        if self.train.resolve() in [path.resolve() for path in self.test]:
            raise ValueError(f"`train` must not be one of the `test` files, got {self.train}: nothing would be left.")
        if not (self.vision_tower / "config.json").is_file():
            raise ValueError(f"`vision_tower` must be a folder with a config.json, got {self.vision_tower}.")

    def check_outputs(self) -> None:
        taken = {path.resolve() for path in (self.train, *self.test)}
        for path in (self.output, self.report, self.journal):
            if path.resolve() in taken:
                raise ValueError(
                    f"`output`, `report`, the journal and the inputs must be different files, got {path}."
                )
            if not path.parent.is_dir() or path.is_dir():
                raise ValueError(f"`output` and `report` must be files in folders that exist, got {path}.")
            taken.add(path.resolve())
        self.require_new_outputs(is_resumed=self.journal.exists())

    def require_new_outputs(self, is_resumed: bool) -> None:
        """Refuse to replace what an earlier run has written, except where it is this run that was killed there."""
        existing = [str(path) for path in (self.output, self.report) if path.exists()]
        if existing and not (self.force or is_resumed):
            raise ValueError(f"`output` and `report` must be new, but {' and '.join(existing)} exist. Pass `--force`.")
