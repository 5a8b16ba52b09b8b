"""The tables that both drivers keep, so that both refuse the same misuse in the same words.

The public methods check the tables, call the driver's own hook (``_map`` for ``map``, and so on), and write the tables
only when the hook has returned: a hook that raises has changed nothing.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Self, TypeVar, TypeVarTuple

import torch

from sgl_vtensor.errors import DriverError
from sgl_vtensor.vmm.driver import Looks

logger = logging.getLogger(__name__)

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")

CALL_SECONDS = (5e-6, 10e-6, 20e-6, 50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 5e-3, 20e-3)
"""Upper bounds of the driver's histogram; behind the last of them there is one place more."""
CALL_KINDS = ("reserve", "free_reservation", "create", "release", "map", "unmap")


@dataclass(slots=True, eq=False)
class Reservation:
    """The address range ``[start, end)``."""

    start: int
    end: int
    num_mappings: int = 0


@dataclass(slots=True, eq=False)
class Allocation:
    """Physical memory. ``native`` is the driver's own number for it, which the driver may use again later."""

    native: int
    num_bytes: int
    num_mappings: int = 0
    released: bool = False


@dataclass(slots=True, eq=False)
class Mapping:
    """All of ``allocation``, at one address of ``reservation``."""

    allocation: Allocation
    reservation: Reservation


class GranuleSet:
    """A sparse bitmap of granule numbers: a range costs O(1) for every 256 granules, wherever it lies."""

    _WORD_BITS = 256

    def __init__(self) -> None:
        self._words: dict[int, int] = {}

    def overlaps(self, start: int, end: int) -> bool:
        """Whether any granule of ``[start, end)`` is in the set."""
        for word, bits in self._pieces(start, end):  # noqa: SIM110 (any() costs another generator on the hot path)
            if self._words.get(word, 0) & bits:
                return True
        return False

    def add(self, start: int, end: int) -> None:
        for word, bits in self._pieces(start, end):
            self._words[word] = self._words.get(word, 0) | bits

    def remove(self, start: int, end: int) -> None:
        for word, bits in self._pieces(start, end):
            left = self._words[word] & ~bits
            if left:
                self._words[word] = left
            else:
                del self._words[word]

    def clear(self) -> None:
        self._words.clear()

    def _pieces(self, start: int, end: int) -> list[tuple[int, int]]:
        """The words that ``[start, end)`` touches, each with the bits of it; mostly one."""
        pieces = []
        while start < end:
            word, low = divmod(start, self._WORD_BITS)
            stop = min(end, (word + 1) * self._WORD_BITS)
            pieces.append((word, ((1 << (stop - start)) - 1) << low))
            start = stop
        return pieces


class DriverBase(ABC):
    """Tables, checks and counters of a ``VmmDriver``. Subclasses do the system calls."""

    name: str
    max_mappings: int | None = None
    read_only_supported: bool = True

    def __init__(self, granularity: int, device: torch.device) -> None:
        self.granularity = granularity
        self.device = device
        self.calls: dict[str, int] = dict.fromkeys(CALL_KINDS, 0)
        self.seconds: dict[str, float] = dict.fromkeys(CALL_KINDS, 0.0)
        self.errors: dict[str, int] = dict.fromkeys(CALL_KINDS, 0)
        self.histogram: dict[str, list[int]] = {kind: [0] * (len(CALL_SECONDS) + 1) for kind in CALL_KINDS}
        self.looks = Looks()
        self._closed = False
        self._physical_bytes = 0
        self._reservations: dict[int, Reservation] = {}
        self._reservation_starts: list[int] = []  # sorted, to find the reservation that holds an address
        # Our own numbers, never used twice. CUDA and the host driver both reuse theirs, and then a handle that was
        # released by mistake would silently name somebody else's memory.
        self._allocations: dict[int, Allocation] = {}
        self._next_handle = 1
        self._mappings: dict[int, Mapping] = {}
        self._mapped = GranuleSet()

    @property
    def physical_bytes(self) -> int:
        """Memory that was created and has not gone back: handles held, and released ones that are still mapped."""
        return self._physical_bytes

    @property
    def num_mappings(self) -> int:
        """Mappings that exist now."""
        return len(self._mappings)

    @property
    def num_handles(self) -> int:
        """Handles that were created and not released."""
        return len(self._allocations)

    @property
    def num_reservations(self) -> int:
        """Address ranges that were reserved and not freed."""
        return len(self._reservations)

    # The hooks. Each either does its work or raises DriverError with nothing changed.

    @abstractmethod
    def _reserve(self, num_bytes: int) -> int: ...

    @abstractmethod
    def _free_reservation(self, reservation: Reservation) -> None: ...

    @abstractmethod
    def _create(self, num_bytes: int) -> int: ...

    @abstractmethod
    def _release(self, allocation: Allocation) -> None: ...

    @abstractmethod
    def _map(self, address: int, allocation: Allocation, reservation: Reservation, writable: bool) -> None: ...

    @abstractmethod
    def _unmap(self, address: int, mapping: Mapping) -> None: ...

    def _reclaim(self, allocation: Allocation) -> None:
        """The handle and the last mapping are gone. Must not raise: the call that led here has done its work."""
        return

    @abstractmethod
    def _tensor(self, address: int, num_bytes: int) -> torch.Tensor: ...

    @abstractmethod
    def _memory_info(self) -> tuple[int, int]: ...

    @abstractmethod
    def _close(self) -> None: ...

    # The contract. See VmmDriver for what each method promises.

    def reserve(self, num_bytes: int) -> int:
        """Set aside address space of ``num_bytes`` and return its start. Raises OutOfMemory, DriverError."""
        self._check_size("reserve", num_bytes)
        address = self._timed("reserve", self._reserve, num_bytes)
        self._reservations[address] = Reservation(address, address + num_bytes)
        insort(self._reservation_starts, address)
        return address

    def free_reservation(self, address: int, num_bytes: int) -> None:
        """Give back a whole reservation with nothing mapped in it. Raises DriverError."""
        call = "free_reservation"
        self._check_size(call, num_bytes)
        reservation = self._reservations.get(address)
        if reservation is None:
            raise DriverError(call, "NOT_RESERVED", f"no reservation starts at {address:#x}.")
        if reservation.end - reservation.start != num_bytes:
            raise DriverError(
                call, "WRONG_SIZE", f"the reservation has {reservation.end - reservation.start} bytes, not {num_bytes}."
            )
        if reservation.num_mappings:
            raise DriverError(call, "STILL_MAPPED", f"unmap the {reservation.num_mappings} mappings in it first.")
        self._timed(call, self._free_reservation, reservation)
        del self._reservations[address]
        self._reservation_starts.remove(address)

    def create(self, num_bytes: int) -> int:
        """Create physical memory of ``num_bytes`` and return its handle. Raises OutOfMemory, DriverError."""
        self._check_size("create", num_bytes)
        native = self._timed("create", self._create, num_bytes)
        handle = self._next_handle
        self._next_handle += 1
        self._allocations[handle] = Allocation(native, num_bytes)
        self._physical_bytes += num_bytes
        return handle

    def release(self, handle: int) -> None:
        """Drop a handle; its memory goes back with the last mapping. Raises DriverError."""
        allocation = self._allocation("release", handle)
        self._timed("release", self._release, allocation)
        allocation.released = True
        del self._allocations[handle]
        self._reclaim_if_unused(allocation)

    def map(self, address: int, handle: int, num_bytes: int, *, writable: bool) -> None:
        """Map all of ``handle`` at ``address``, reserved and unmapped so far. Raises OutOfMemory, DriverError."""
        self._check_size("map", num_bytes)
        allocation = self._allocation("map", handle)
        if allocation.num_bytes != num_bytes:
            # Both drivers could be asked for part of an allocation; CUDA answers CUDA_ERROR_NOT_SUPPORTED.
            raise DriverError(
                "map", "WRONG_SIZE", f"handle {handle} has {allocation.num_bytes} bytes, not {num_bytes}."
            )
        if address % self.granularity:
            raise DriverError("map", "MISALIGNED", f"{address:#x} is not a multiple of {self.granularity} bytes.")
        reservation = self._reservation("map", address, num_bytes)
        first, last = address // self.granularity, (address + num_bytes) // self.granularity
        if self._mapped.overlaps(first, last):
            # mmap(MAP_FIXED) would replace the old mapping without a word, under whoever reads it.
            raise DriverError("map", "ALREADY_MAPPED", f"unmap [{address:#x}, {address + num_bytes:#x}) first.")
        self._timed("map", self._map, address, allocation, reservation, writable)
        self._mappings[address] = Mapping(allocation, reservation)
        self._mapped.add(first, last)
        allocation.num_mappings += 1
        reservation.num_mappings += 1

    def unmap(self, address: int, num_bytes: int) -> None:
        """Undo one ``map``, with the same address and size. Raises DriverError."""
        self._check_size("unmap", num_bytes)
        mapping = self._mappings.get(address)
        if mapping is None:
            raise DriverError("unmap", "NOT_MAPPED", f"no mapping starts at {address:#x}.")
        allocation, reservation = mapping.allocation, mapping.reservation
        if allocation.num_bytes != num_bytes:
            raise DriverError(
                "unmap", "WRONG_SIZE", f"the mapping has {allocation.num_bytes} bytes, not {num_bytes}; unmap it whole."
            )
        self._timed("unmap", self._unmap, address, mapping)
        del self._mappings[address]
        self._mapped.remove(address // self.granularity, (address + num_bytes) // self.granularity)
        allocation.num_mappings -= 1
        reservation.num_mappings -= 1
        self._reclaim_if_unused(allocation)

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        """A flat ``uint8`` tensor over part of one reservation, mapped or not. Raises DriverError."""
        self._check_open("tensor")
        if num_bytes <= 0:
            raise DriverError("tensor", "WRONG_SIZE", f"{num_bytes} bytes is not a positive size.")
        self._reservation("tensor", address, num_bytes)
        return self._tensor(address, num_bytes)

    def memory_info(self) -> tuple[int, int]:
        """Free and total physical memory of the device, in bytes. Raises DriverError."""
        self._check_open("memory_info")
        began = perf_counter()
        try:
            return self._memory_info()
        finally:
            self.looks.count += 1
            self.looks.seconds += perf_counter() - began

    def close(self) -> None:
        """Unmap, release and free whatever is left. A second call does nothing.

        What the system refuses to take back (after a fatal CUDA error it refuses everything) is logged, not raised:
        the caller has nothing left to do about it, and the error that led here matters more.
        """
        if self._closed:
            return
        refused: list[DriverError] = []
        for address, mapping in self._mappings.items():
            try:
                self._unmap(address, mapping)
            except DriverError as error:
                refused.append(error)
        for allocation in self._allocations.values():
            try:
                self._release(allocation)
            except DriverError as error:
                refused.append(error)
        for reservation in self._reservations.values():
            try:
                self._free_reservation(reservation)
            except DriverError as error:
                refused.append(error)
        self._closed = True
        self._mappings.clear()
        self._mapped.clear()
        self._allocations.clear()
        self._reservations.clear()
        self._reservation_starts.clear()
        self._physical_bytes = 0
        self._close()
        if refused:
            logger.warning("%s driver: %d calls failed while closing, first: %s", self.name, len(refused), refused[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self, call: str) -> None:
        if self._closed:
            raise DriverError(call, "CLOSED", "the driver was closed; open a new one.")

    def _check_size(self, call: str, num_bytes: int) -> None:
        self._check_open(call)
        if num_bytes <= 0 or num_bytes % self.granularity:
            raise DriverError(
                call, "WRONG_SIZE", f"{num_bytes} bytes is not a positive multiple of {self.granularity} bytes."
            )

    def _allocation(self, call: str, handle: int) -> Allocation:
        self._check_open(call)
        try:
            return self._allocations[handle]
        except KeyError:
            raise DriverError(call, "UNKNOWN_HANDLE", f"{handle} was never created or is released.") from None

    def _reservation(self, call: str, address: int, num_bytes: int) -> Reservation:
        """The reservation that holds all of ``[address, address + num_bytes)``."""
        index = bisect_right(self._reservation_starts, address) - 1
        if index >= 0:
            reservation = self._reservations[self._reservation_starts[index]]
            if address + num_bytes <= reservation.end:
                return reservation
        raise DriverError(call, "NOT_RESERVED", f"[{address:#x}, {address + num_bytes:#x}) is not in one reservation.")

    def _reclaim_if_unused(self, allocation: Allocation) -> None:
        if allocation.released and not allocation.num_mappings:
            self._physical_bytes -= allocation.num_bytes
            self._reclaim(allocation)

    def _timed(self, kind: str, hook: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Do a hook's work, and count it."""
        began = perf_counter()
        try:
            return hook(*arguments)
        except DriverError:
            self.errors[kind] += 1
            raise
        finally:
            seconds = perf_counter() - began
            self.calls[kind] += 1
            self.seconds[kind] += seconds
            self.histogram[kind][bisect_left(CALL_SECONDS, seconds)] += 1
