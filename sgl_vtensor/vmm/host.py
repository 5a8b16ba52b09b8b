"""The host driver: the contract kept by Linux, without a GPU.

Physical memory is ranges of one memfd, and a mapping is ``mmap(MAP_SHARED | MAP_FIXED)`` of such a range into a
``PROT_NONE`` reservation. So aliasing is real, and so are the faults (SIGSEGV) on unmapped or read-only addresses.
Sources: mmap(2), memfd_create(2), fallocate(2), and vm.max_map_count in the kernel's sysctl documentation.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
from functools import cache
from pathlib import Path
from typing import Final

import torch

from sgl_vtensor.errors import DriverError, OutOfMemory
from sgl_vtensor.vmm.base import Allocation, DriverBase, Mapping, Reservation

logger = logging.getLogger(__name__)

# Not in Python 3.11's mmap module; the values are those of x86-64 and arm64.
_PROT_NONE: Final = 0x0
_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_FALLOC_FL_KEEP_SIZE: Final = 0x1
_FALLOC_FL_PUNCH_HOLE: Final = 0x2
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

# Regions left to the rest of the process: libraries, thread stacks, malloc. With none left, malloc fails anywhere.
_REGION_HEADROOM: Final = 8192


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    size, offset = ctypes.c_size_t, ctypes.c_int64
    libc.mmap.argtypes = [ctypes.c_void_p, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, offset]
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = [ctypes.c_void_p, size]
    libc.munmap.restype = ctypes.c_int
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, offset, offset]
    libc.fallocate.restype = ctypes.c_int
    return libc


def _available_bytes() -> int:
    """MemAvailable: what the kernel thinks can be used without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise DriverError("/proc/meminfo", "ENOENT", "MemAvailable is missing; pass capacity_bytes.")


def _max_map_count() -> int:
    return int(Path("/proc/sys/vm/max_map_count").read_text())


def _system_error(call: str) -> DriverError:
    code = errno.errorcode.get(ctypes.get_errno(), str(ctypes.get_errno()))
    if code in ("ENOMEM", "ENOSPC", "EAGAIN"):
        return OutOfMemory(call, code, "the system has no memory or mapping left; release some, then try again.")
    return DriverError(call, code, f"see the manual page {call}(2).")


class HostDriver(DriverBase):
    """Virtual memory from memfd and mmap, for machines without a GPU.

    Args:
        capacity_bytes: the most physical memory that ``create`` hands out (default: MemAvailable now). It is checked
            against nothing else: in a container with a smaller limit of its own, pass that.

    Raises:
        DriverError: the system refused a memfd.
    """

    name = "host"

    def __init__(self, capacity_bytes: int | None = None) -> None:
        super().__init__(granularity=mmap.PAGESIZE, device=torch.device("cpu"))
        available = _available_bytes() if capacity_bytes is None else capacity_bytes
        self.capacity_bytes = available // self.granularity * self.granularity
        system_regions = _max_map_count()
        self._max_regions = max(system_regions - _REGION_HEADROOM, system_regions // 2)
        self.max_mappings = self._max_regions
        # An upper bound of the kernel's regions (VMAs) in our reservations: each mapping is one, each gap is one.
        # The kernel merges some neighbours, so it never has more.
        self._num_regions = 0
        # Offsets in the memfd, free for the next allocation of that size. Offsets of other sizes are not merged:
        # a hole costs no memory, and the file may be 8 EiB long.
        self._free_offsets: dict[int, list[int]] = {}
        self._file_bytes = 0
        try:
            self._fd = os.memfd_create("sgl_vtensor", os.MFD_CLOEXEC)
        except OSError as error:
            code = errno.errorcode.get(error.errno or 0, str(error.errno))
            raise DriverError("memfd_create", code, "see the manual page memfd_create(2).") from error

    def _reserve(self, num_bytes: int) -> int:
        self._check_regions(1)
        address = _libc().mmap(
            None, num_bytes, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0
        )
        if address == _MAP_FAILED:
            raise _system_error("mmap")
        self._num_regions += 1
        return int(address)

    def _free_reservation(self, reservation: Reservation) -> None:
        if _libc().munmap(reservation.start, reservation.end - reservation.start):
            raise _system_error("munmap")
        self._num_regions -= 1

    def _create(self, num_bytes: int) -> int:
        if self._physical_bytes + num_bytes > self.capacity_bytes:
            raise OutOfMemory(
                "create",
                "CAPACITY",
                f"{num_bytes} bytes more than the {self._physical_bytes} in use exceed the capacity of "
                f"{self.capacity_bytes}; release memory or open the driver with a larger capacity_bytes.",
            )
        free = self._free_offsets.get(num_bytes)
        offset = free[-1] if free else self._file_bytes
        # Commit the pages now, which also grows the file. Left to the first touch, a shortage would be a SIGBUS in
        # whatever tensor operation comes first; here it is an error, and the kernel takes back what it had committed.
        while _libc().fallocate(self._fd, 0, offset, num_bytes):
            if ctypes.get_errno() != errno.EINTR:
                raise _system_error("fallocate")
        if free:
            free.pop()
        else:
            self._file_bytes += num_bytes
        return offset

    def _release(self, allocation: Allocation) -> None:
        return  # the memory goes back in _reclaim, once no mapping shows it any longer

    def _reclaim(self, allocation: Allocation) -> None:
        offset, num_bytes = allocation.native, allocation.num_bytes
        self._free_offsets.setdefault(num_bytes, []).append(offset)
        if _libc().fallocate(self._fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, num_bytes):
            logger.warning(
                "%s The system keeps these %d bytes until they are reused.", _system_error("fallocate"), num_bytes
            )

    def _map(self, address: int, allocation: Allocation, reservation: Reservation, writable: bool) -> None:
        added_regions = self._free_sides(address, allocation.num_bytes, reservation)
        self._check_regions(added_regions)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        flags = mmap.MAP_SHARED | _MAP_FIXED
        if _libc().mmap(address, allocation.num_bytes, protection, flags, self._fd, allocation.native) == _MAP_FAILED:
            error = _system_error("mmap")
            # Some kernels drop the old region before the new one fails. A hole in the reservation would be handed to
            # the next mmap of the process, and a later map of ours would overwrite it.
            self._hide(address, allocation.num_bytes)
            raise error
        self._num_regions += added_regions

    def _unmap(self, address: int, mapping: Mapping) -> None:
        num_bytes = mapping.allocation.num_bytes
        if not self._hide(address, num_bytes):
            raise _system_error("mmap")
        self._num_regions -= self._free_sides(address, num_bytes, mapping.reservation)

    def _tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        return torch.frombuffer((ctypes.c_ubyte * num_bytes).from_address(address), dtype=torch.uint8)

    def _memory_info(self) -> tuple[int, int]:
        return self.capacity_bytes - self._physical_bytes, self.capacity_bytes

    def _close(self) -> None:
        os.close(self._fd)
        self._free_offsets.clear()

    def _hide(self, address: int, num_bytes: int) -> bool:
        """Make the range plain reserved space again, in one step: munmap would leave it to others for a moment."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        return bool(_libc().mmap(address, num_bytes, _PROT_NONE, flags, -1, 0) != _MAP_FAILED)

    def _free_sides(self, address: int, num_bytes: int, reservation: Reservation) -> int:
        """How many of the two neighbouring granules are reserved and unmapped: as many regions as a mapping here adds.

        The mapping itself adds one. The gap that it lies in becomes two, one or none.
        """
        first, last = address // self.granularity, (address + num_bytes) // self.granularity
        before = address > reservation.start and not self._mapped.overlaps(first - 1, first)
        after = address + num_bytes < reservation.end and not self._mapped.overlaps(last, last + 1)
        return before + after

    def _check_regions(self, added_regions: int) -> None:
        if self._num_regions + added_regions > self._max_regions:
            raise OutOfMemory(
                "mmap",
                "ENOMEM",
                f"{len(self._mappings)} mappings use the {self._max_regions} regions that vm.max_map_count leaves us; "
                "unmap some, or raise it: sysctl -w vm.max_map_count=1048576.",
            )
