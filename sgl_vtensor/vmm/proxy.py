"""A driver that passes every call on to another one; what stands between the core and a driver is a subclass of it."""

from __future__ import annotations

import torch

from sgl_vtensor.vmm.driver import VmmDriver


class DriverProxy:
    """A ``VmmDriver`` over ``inner``, with the same counters."""

    def __init__(self, inner: VmmDriver) -> None:
        self.inner = inner
        self.name = inner.name
        self.granularity = inner.granularity
        self.device = inner.device
        self.read_only_supported = inner.read_only_supported
        self.max_mappings = inner.max_mappings
        self.calls = inner.calls
        self.seconds = inner.seconds
        self.errors = inner.errors
        self.histogram = inner.histogram
        self.looks = inner.looks

    @property
    def physical_bytes(self) -> int:
        return self.inner.physical_bytes

    @property
    def num_mappings(self) -> int:
        return self.inner.num_mappings

    @property
    def num_handles(self) -> int:
        return self.inner.num_handles

    @property
    def num_reservations(self) -> int:
        return self.inner.num_reservations

    def reserve(self, num_bytes: int) -> int:
        return self.inner.reserve(num_bytes)

    def free_reservation(self, address: int, num_bytes: int) -> None:
        self.inner.free_reservation(address, num_bytes)

    def create(self, num_bytes: int) -> int:
        return self.inner.create(num_bytes)

    def release(self, handle: int) -> None:
        self.inner.release(handle)

    def map(self, address: int, handle: int, num_bytes: int, *, writable: bool) -> None:
        self.inner.map(address, handle, num_bytes, writable=writable)

    def unmap(self, address: int, num_bytes: int) -> None:
        self.inner.unmap(address, num_bytes)

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        return self.inner.tensor(address, num_bytes)

    def memory_info(self) -> tuple[int, int]:
        return self.inner.memory_info()

    def close(self) -> None:
        self.inner.close()
