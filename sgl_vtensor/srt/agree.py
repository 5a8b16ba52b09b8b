"""What the ranks of a tensor-parallel server agree on, so that they take the same decisions in the same step.

SGLang repeats every decision on every rank, from the same requests. Two things are not the same everywhere: the clock,
and the free memory of each rank's device. So rank 0 decides what follows from those and sends its decision along with
the requests that SGLang broadcasts anyway, when it has changed. What the other ranks can back, rank 0 reads from a
board in shared memory.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import broadcast_pyobj

from sgl_vtensor.errors import VTensorError

BOARD_FOLDER = "/dev/shm"
NUM_DIGESTS = 64
LAUNCHES_BEHIND = 8
"""Ranks run at most a launch or two apart: so far back, all have written what they decided."""


@dataclass(frozen=True)
class Decision:
    """What all ranks do before they look at the next request."""

    most_in_use: int
    """Pages that every rank can have in use."""
    evict_pages: int
    """Cached pages to drop now, as SGLang's eviction policy ranks them."""


class Ranks:
    """The board: for each rank of one server, what it can back and what it has decided lately."""

    def __init__(self, rank: int, board: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        self.rank = rank
        self._possible = board[:, 0]
        self._digests = board[:, 1:].reshape(len(board), NUM_DIGESTS, 2)

    def publish(self, num_pages: int) -> None:
        """Say how many pages this rank could have in use."""
        self._possible[self.rank] = num_pages

    def least(self) -> int:
        """How many pages every rank could have in use."""
        return int(self._possible.min())

    def compare(self, launch: int, digest: int) -> None:
        """Write what this rank decided for a launch, and compare what all decided a few launches ago.

        Raises:
            VTensorError: a rank decided otherwise.
        """
        mine = self._digests[self.rank]
        mine[launch % NUM_DIGESTS] = 0, digest
        mine[launch % NUM_DIGESTS, 0] = launch  # last: the digest counts once its launch is there
        past = launch - LAUNCHES_BEHIND
        if past <= 0:
            return
        written = self._digests[:, past % NUM_DIGESTS]
        others = np.flatnonzero((written[:, 0] == past) & (written[:, 1] != mine[past % NUM_DIGESTS, 1]))
        if others.size:
            raise VTensorError(
                f"ranks {self.rank} and {int(others[0])} decided differently at launch {past}; please report this"
            )


def join_ranks() -> Ranks | None:
    """Make the board of this server together with its other ranks; None where there is only one."""
    parallel = get_parallel()
    if parallel.tp_size == 1:
        return None
    group = parallel.tp_group
    num_bytes = parallel.tp_size * (1 + 2 * NUM_DIGESTS) * 8
    path = ""
    if parallel.tp_rank == 0:
        descriptor, path = tempfile.mkstemp(prefix="sgl-vtensor-", dir=BOARD_FOLDER)
        os.ftruncate(descriptor, num_bytes)
        os.close(descriptor)
    [path] = broadcast_pyobj([path], group.rank, group.cpu_group, src=group.ranks[0])
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), num_bytes)
    torch.distributed.barrier(group.cpu_group)
    if parallel.tp_rank == 0:
        os.unlink(path)  # all have it: nothing is left behind, whoever is killed
    return Ranks(parallel.tp_rank, np.frombuffer(memory, dtype=np.int64).reshape(parallel.tp_size, -1))
