"""What the ranks of a tensor-parallel server agree on, so that they take the same decisions in the same step.

SGLang repeats every decision on every rank, from the same requests. Two things are not the same everywhere: the clock,
and the free memory of each rank's device. So rank 0 decides what follows from those and sends its decision along with
the requests that SGLang broadcasts anyway, when it has changed. What the other ranks can back, and what they should let
go, rank 0 reads from a board in shared memory.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import broadcast_pyobj

from sgl_vtensor.errors import VTensorError

BOARD_FOLDER = "/dev/shm"
NUM_DIGESTS = 64
BOARD_COLUMNS = 2 + 2 * NUM_DIGESTS
"""Of a rank: the pages it could have in use, those it should let go, and its hashes with their launches."""
LAUNCHES_BEHIND = 8
"""Ranks run at most a launch or two apart: so far back, all have written what they decided."""
COMPARE_LAUNCHES = 8
"""How often ranks compare their running hashes. It divides the two numbers above."""


@dataclass(frozen=True)
class Decision:
    """What all ranks do before they look at the next request."""

    most_in_use: int
    """Pages that every rank can have in use."""
    evict_pages: int
    """Cached pages to drop now, as SGLang's eviction policy ranks them."""


class Ranks:
    """The board: for each rank of one server, what it can back and what it has decided so far.

    Args:
        every_launch: compare at each, to name the one at which ranks differ (debug mode).
    """

    def __init__(self, rank: int, board: np.ndarray[Any, np.dtype[np.int64]], *, every_launch: bool = False) -> None:
        self.rank = rank
        self.launches_compared = 0
        self._every = 1 if every_launch else COMPARE_LAUNCHES
        self._digest = 0
        self._possible = board[:, 0]
        self._lacking = board[:, 1]
        self._digests = board[:, 2:].reshape(len(board), NUM_DIGESTS, 2)

    def publish(self, num_pages: int) -> None:
        """Say how many pages this rank could have in use."""
        self._possible[self.rank] = num_pages

    def lack(self, num_pages: int) -> None:
        """Say how many pages of its cache this rank should let go, for neighbours on its device."""
        self._lacking[self.rank] = num_pages

    def least(self) -> int:
        """How many pages every rank could have in use."""
        return int(self._possible.min())

    def most_lacking(self) -> int:
        """How many pages the rank with the hungriest neighbours should let go."""
        return int(self._lacking.max())

    def note(self, launch: int, *decided: npt.NDArray[np.int64]) -> None:
        """Take what this rank decided for a launch into its running hash, and now and then compare all ranks' hashes.

        A difference stays in the hash, so that launches between two comparisons are compared, too.

        Raises:
            VTensorError: a rank decided otherwise. Going on would hang in a collective, or answer wrongly.
        """
        for part in decided:
            self._digest = zlib.crc32(np.ascontiguousarray(part), self._digest)
        if launch % self._every == 0:
            self._compare(launch)

    def _compare(self, launch: int) -> None:
        """Write this rank's hash, and compare what all ranks wrote a few launches ago."""
        mine = self._digests[self.rank]
        mine[launch % NUM_DIGESTS] = 0, self._digest
        mine[launch % NUM_DIGESTS, 0] = launch  # last: the digest counts once its launch is there
        past = launch - LAUNCHES_BEHIND
        if past <= 0:
            return
        written = self._digests[:, past % NUM_DIGESTS]
        others = np.flatnonzero((written[:, 0] == past) & (written[:, 1] != mine[past % NUM_DIGESTS, 1]))
        if others.size:
            raise VTensorError(
                f"ranks {self.rank} and {int(others[0])} decided differently by launch {past}; please report this"
            )
        self.launches_compared = past


def join_ranks(*, every_launch: bool) -> Ranks | None:
    """Make the board of this server together with its other ranks; None where there is only one."""
    parallel = get_parallel()
    if parallel.tp_size == 1:
        return None
    group = parallel.tp_group
    num_bytes = parallel.tp_size * BOARD_COLUMNS * 8
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
    board = np.frombuffer(memory, dtype=np.int64).reshape(parallel.tp_size, -1)
    return Ranks(parallel.tp_rank, board, every_launch=every_launch)
