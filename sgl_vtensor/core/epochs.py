"""When may memory be unmapped? Once the last launch that could read it has finished.

Every forward pass that is launched is an *epoch*, numbered from 1. A thing that is let go remembers the number of the
newest launch; it may be unmapped once that epoch is *settled*. Decisions look at ``settled`` only, which moves when the
scheduler says so and never because of the clock, so that all tensor-parallel ranks decide alike.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol


class Fence(Protocol):
    """The end of one launch: a CUDA event, or anything like it."""

    def synchronize(self) -> None:
        """Return once the launch has finished."""
        ...


class Epochs:
    """The launches that are under way, oldest first."""

    def __init__(self) -> None:
        self.launched = 0
        self.settled = 0
        self._fences: deque[tuple[int, Fence]] = deque()

    def launch(self, fence: Fence | None) -> int:
        """Note one launch and return its epoch. ``fence=None``: it has finished already (host driver)."""
        self.launched += 1
        if fence is not None:
            self._fences.append((self.launched, fence))
        elif not self._fences:
            self.settled = self.launched
        return self.launched

    def settle(self, epoch: int) -> None:
        """Make sure that every launch up to ``epoch`` has finished; waits for those that have not."""
        epoch = min(epoch, self.launched)
        while self._fences and self._fences[0][0] <= epoch:
            self._fences[0][1].synchronize()
            self._fences.popleft()
        self.settled = max(self.settled, epoch if self._fences else self.launched)
