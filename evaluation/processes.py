"""The processes of a launch (`torchrun`, `accelerate launch`): who this one is, and waiting for the others."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


PATIENCE = timedelta(days=7)  # one process checks all images, and another may have the longer answers


@dataclass
class Processes:
    """This process and how many there are. One alone waits for nobody."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls) -> "Processes":
        """Join those that the launcher started; nothing but waiting is done together, so gloo does everywhere."""
        if not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", 1)) == 1:
                return cls()
            dist.init_process_group("gloo", timeout=PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def device(self, wanted: str | None = None) -> str | None:
        """`wanted`; where that is "cuda", or nothing, a GPU of its own for each process on a machine.

        None leaves the choice to who loads the model.
        """
        if self.count > 1 and wanted in (None, "cuda") and torch.cuda.is_available():
            return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % torch.cuda.device_count()}"
        return wanted

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()

    def leave(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()
