"""Which of the processes of a run this one is."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """The process `rank`, counted from 0, of `world_size` processes."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes the files of which there is one."""
        return self.rank == 0


def launched_ranks() -> Ranks:
    """What the launcher (torchrun, `--nproc`, DeepSpeed) says in RANK and WORLD_SIZE; one process without it."""
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
