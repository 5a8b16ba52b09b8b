"""The tables of a driver without a driver: for replaying traces and for timing our own Python."""

from __future__ import annotations

import torch

from sgl_vtensor.vmm.base import Allocation, DriverBase, Mapping, Reservation

FREE_BYTES = 1 << 60


class NullDriver(DriverBase):
    """Maps nothing, and refuses only misuse. There is no limit of mappings, and no memory to look at."""

    name = "null"

    def __init__(self, granularity: int) -> None:
        super().__init__(granularity, torch.device("cpu"))
        self._next_address = granularity

    def _reserve(self, num_bytes: int) -> int:
        address, self._next_address = self._next_address, self._next_address + num_bytes
        return address

    def _free_reservation(self, reservation: Reservation) -> None: ...

    def _create(self, num_bytes: int) -> int:
        return 1

    def _release(self, allocation: Allocation) -> None: ...

    def _map(self, address: int, allocation: Allocation, reservation: Reservation, writable: bool) -> None: ...

    def _unmap(self, address: int, mapping: Mapping) -> None: ...

    def _tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device="meta")

    def _memory_info(self) -> tuple[int, int]:
        return FREE_BYTES, FREE_BYTES

    def _close(self) -> None: ...
