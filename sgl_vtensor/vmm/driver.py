"""What a virtual-memory driver does, in bytes and addresses.

Two drivers implement this contract: ``cuda`` (``cuMem*``) and ``host`` (``memfd_create`` and ``mmap``).
``tests/vmm/test_contract.py`` runs the same tests on both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass
class Looks:
    """Looks at the device's free memory, refused ones included."""

    count: int = 0
    seconds: float = 0.0


class VmmDriver(Protocol):
    """Reserve addresses, create physical memory, map one onto the other.

    Every call either does all of its work or raises and changes nothing. Calls never wait for a running kernel,
    so the caller must know that no kernel uses a range before it unmaps it. All addresses and sizes are multiples
    of ``granularity``. Methods may be called from any thread, one at a time.

    Misuse (an unknown handle, a range that is not reserved, ...) raises ``DriverError`` before anything is touched.
    """

    name: str
    granularity: int
    """Smallest unit that can be mapped, in bytes."""
    device: torch.device
    """Where tensors over these addresses live."""
    read_only_supported: bool
    """Whether a write through a ``writable=False`` mapping faults. If not, such mappings are writable."""
    max_mappings: int | None
    """The most mappings at once (``None``: no known limit). One with unmapped space on both sides counts twice."""
    calls: dict[str, int]
    """How often the driver was asked, by method name. Refused misuse does not reach the driver and is not counted."""
    seconds: dict[str, float]
    """How long these calls took together, in seconds, by method name."""
    errors: dict[str, int]
    """How many of these calls were refused, by method name."""
    histogram: dict[str, list[int]]
    """How many of these calls took up to each of ``base.CALL_SECONDS``, and longer, by method name."""
    looks: Looks
    """How often ``memory_info`` was asked, and how long that took: it changes nothing, so it is none of the calls."""

    @property
    def physical_bytes(self) -> int:
        """Memory that was created and has not gone back: handles held, and released ones that are still mapped."""
        ...

    @property
    def num_mappings(self) -> int:
        """Mappings that exist now."""
        ...

    @property
    def num_handles(self) -> int:
        """Handles that were created and not released."""
        ...

    @property
    def num_reservations(self) -> int:
        """Address ranges that were reserved and not freed."""
        ...

    def reserve(self, num_bytes: int) -> int:
        """Set aside ``num_bytes`` of address space and return its start. Touching it faults until it is mapped.

        Raises:
            OutOfMemory: no address range of that size is left.
        """
        ...

    def free_reservation(self, address: int, num_bytes: int) -> None:
        """Give back a whole reservation. Nothing in it may be mapped."""
        ...

    def create(self, num_bytes: int) -> int:
        """Create physical memory, not yet mapped, and return its handle: a positive number, never used twice.

        Raises:
            OutOfMemory: the device has not that much free memory.
        """
        ...

    def release(self, handle: int) -> None:
        """Drop a handle. The memory goes back once the last mapping of it is gone, too."""
        ...

    def map(self, address: int, handle: int, num_bytes: int, *, writable: bool) -> None:
        """Map all ``num_bytes`` of ``handle`` at ``address``, which must be reserved and unmapped.

        With ``writable=False`` a write through this address faults (see ``read_only_supported``).

        Raises:
            OutOfMemory: the driver has no room for one more mapping.
            DriverError: the range is mapped already, or not reserved.
        """
        ...

    def unmap(self, address: int, num_bytes: int) -> None:
        """Undo one ``map``: the same address and size."""
        ...

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        """A flat ``uint8`` tensor over a range inside one reservation, without owning it. Making it touches no memory.

        The range need not be mapped, nor a whole number of granules.
        """
        ...

    def memory_info(self) -> tuple[int, int]:
        """Free and total physical memory of the device, in bytes."""
        ...

    def close(self) -> None:
        """Give everything back, mappings first. Any later call but ``close`` raises ``DriverError``."""
        ...
