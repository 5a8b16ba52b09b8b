"""What only the host driver does: limits of Linux, and memory that really goes back."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path

import pytest

from sgl_vtensor.errors import DriverError, OutOfMemory
from sgl_vtensor.vmm import host
from sgl_vtensor.vmm.host import HostDriver

GRANULE = mmap.PAGESIZE


def file_bytes_in_memory(driver: HostDriver) -> int:
    return os.fstat(driver._fd).st_blocks * 512


def memfds() -> int:
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            count += "memfd:sgl_vtensor" in os.readlink(entry)
        except FileNotFoundError:  # the descriptor of this very listing
            continue
    return count


def regions_within(start: int, end: int) -> list[str]:
    """The kernel's own list of regions inside ``[start, end)``."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if start < high and low < end:
            found.append(line)
    return found


def test_memory_goes_back_to_the_system() -> None:
    with HostDriver() as driver:
        num_bytes = 64 * GRANULE
        base = driver.reserve(2 * num_bytes)
        handle = driver.create(num_bytes)
        assert file_bytes_in_memory(driver) == num_bytes, "committed at once, before any touch"
        for half in range(2):
            driver.map(base + half * num_bytes, handle, num_bytes, writable=True)
        driver.tensor(base, num_bytes).fill_(1)
        driver.release(handle)
        driver.unmap(base, num_bytes)
        assert file_bytes_in_memory(driver) == num_bytes, "one mapping is left"
        driver.unmap(base + num_bytes, num_bytes)
        assert file_bytes_in_memory(driver) == 0
        driver.release(driver.create(num_bytes))
        assert file_bytes_in_memory(driver) == 0


def test_offsets_are_used_again_and_come_back_zeroed() -> None:
    with HostDriver() as driver:
        base = driver.reserve(GRANULE)
        for _ in range(100):
            handle = driver.create(GRANULE)
            driver.map(base, handle, GRANULE, writable=True)
            page = driver.tensor(base, GRANULE)
            assert not page.any()
            page.fill_(255)
            driver.unmap(base, GRANULE)
            driver.release(handle)
        assert os.fstat(driver._fd).st_size == GRANULE


def test_capacity_bounds_physical_memory() -> None:
    with HostDriver(capacity_bytes=4 * GRANULE + 100) as driver:
        assert driver.memory_info() == (4 * GRANULE, 4 * GRANULE)
        handles = [driver.create(GRANULE) for _ in range(4)]
        assert driver.memory_info() == (0, 4 * GRANULE)
        with pytest.raises(OutOfMemory, match="capacity_bytes"):
            driver.create(GRANULE)
        base = driver.reserve(GRANULE)
        driver.map(base, handles[0], GRANULE, writable=True)
        driver.release(handles[0])
        with pytest.raises(OutOfMemory):  # still mapped, so still in memory
            driver.create(GRANULE)
        driver.unmap(base, GRANULE)
        driver.create(GRANULE)


def test_default_capacity_is_what_the_system_has() -> None:
    with HostDriver() as driver:
        free_bytes, total_bytes = driver.memory_info()
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert 0 < free_bytes == total_bytes <= physical


@pytest.mark.parametrize("step", [1, 2], ids=["side by side", "with gaps"])
def test_the_limit_of_mappings_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Up to the real limit where it is the usual 65 530, so that the bound is shown to come before the kernel's."""
    if host._max_map_count() > 70_000:
        monkeypatch.setattr(host, "_max_map_count", lambda: 20_000)
    with HostDriver() as driver:
        assert driver.max_mappings is not None
        base = driver.reserve(2 * driver.max_mappings * GRANULE)
        handle = driver.create(GRANULE)
        mapped = 0
        with pytest.raises(OutOfMemory, match=r"vm\.max_map_count"):
            for position in range(0, 2 * driver.max_mappings, step):
                driver.map(base + position * GRANULE, handle, GRANULE, writable=False)
                mapped += 1
        assert driver.num_mappings == mapped
        assert driver.max_mappings // step - 2 <= mapped <= driver.max_mappings // step
        with mmap.mmap(-1, GRANULE):  # the rest of the process still has room
            pass
        driver.unmap(base + step * GRANULE, GRANULE)
        driver.map(base + step * GRANULE, handle, GRANULE, writable=False)


def test_regions_are_counted_from_above() -> None:
    """Our count is never below the kernel's, whatever is mapped, and is 1 again for an empty reservation."""
    with HostDriver() as driver:
        base = driver.reserve(16 * GRANULE)
        one, three = driver.create(GRANULE), driver.create(3 * GRANULE)
        steps = [(2, three), (0, one), (8, one), (9, one), (7, one), (1, one), (5, one), (13, three), (10, three)]
        sizes = {one: GRANULE, three: 3 * GRANULE}
        for position, handle in steps:
            driver.map(base + position * GRANULE, handle, sizes[handle], writable=True)
            assert len(regions_within(base, base + 16 * GRANULE)) <= driver._num_regions <= 10
        for position, handle in sorted(steps):
            driver.unmap(base + position * GRANULE, sizes[handle])
            assert len(regions_within(base, base + 16 * GRANULE)) <= driver._num_regions <= 10
        assert driver._num_regions == 1


def test_reservations_vanish_from_the_address_space() -> None:
    driver = HostDriver()
    kept, freed = driver.reserve(64 * GRANULE), driver.reserve(64 * GRANULE)
    handle = driver.create(GRANULE)
    driver.map(kept + GRANULE, handle, GRANULE, writable=True)
    driver.free_reservation(freed, 64 * GRANULE)
    assert not regions_within(freed, freed + 64 * GRANULE)
    assert any("r" in line.split()[1] for line in regions_within(kept, kept + 64 * GRANULE))
    driver.close()
    assert not regions_within(kept, kept + 64 * GRANULE)


def test_no_descriptor_is_left() -> None:
    before = memfds()
    for _ in range(3):
        driver = HostDriver()
        assert memfds() == before + 1
        driver.close()
        driver.close()
    assert memfds() == before


def test_a_refused_fallocate_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoMemory:
        def fallocate(self, *_: int) -> int:
            ctypes.set_errno(errno.ENOSPC)
            return -1

    with HostDriver() as driver:
        with monkeypatch.context() as patch:
            patch.setattr(host, "_libc", NoMemory)
            with pytest.raises(OutOfMemory, match="fallocate failed with ENOSPC"):
                driver.create(GRANULE)
        assert (driver.num_handles, driver.physical_bytes) == (0, 0)
        driver.create(GRANULE)


def test_a_refused_map_leaves_the_address_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    real = host._libc()
    attempts = []

    class RefusesSharedMaps:
        def mmap(self, address: int, num_bytes: int, protection: int, flags: int, fd: int, offset: int) -> int:
            attempts.append(flags)
            if flags & mmap.MAP_SHARED:
                real.munmap(address, num_bytes)  # the worst that a kernel does: the old region is gone, too
                ctypes.set_errno(errno.ENOMEM)
                return host._MAP_FAILED  # type: ignore[return-value]
            return int(real.mmap(address, num_bytes, protection, flags, fd, offset))

    with HostDriver() as driver:
        base = driver.reserve(3 * GRANULE)
        handle = driver.create(GRANULE)
        with monkeypatch.context() as patch:
            patch.setattr(host, "_libc", RefusesSharedMaps)
            with pytest.raises(OutOfMemory):
                driver.map(base + GRANULE, handle, GRANULE, writable=True)
        assert len(attempts) == 2
        assert len(regions_within(base, base + 3 * GRANULE)) == 1, "no hole"
        assert driver.num_mappings == 0
        driver.map(base + GRANULE, handle, GRANULE, writable=True)
        driver.tensor(base + GRANULE, GRANULE).fill_(1)


def test_a_refused_unmap_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses:
        def mmap(self, *_: object) -> int:
            ctypes.set_errno(errno.EINVAL)
            return host._MAP_FAILED  # type: ignore[return-value]

    with HostDriver() as driver:
        base = driver.reserve(GRANULE)
        handle = driver.create(GRANULE)
        driver.map(base, handle, GRANULE, writable=True)
        with monkeypatch.context() as patch:
            patch.setattr(host, "_libc", Refuses)
            with pytest.raises(DriverError, match=r"mmap failed with EINVAL: see the manual page mmap\(2\)"):
                driver.unmap(base, GRANULE)
        driver.tensor(base, GRANULE).fill_(1)
        driver.unmap(base, GRANULE)
        assert driver.num_mappings == 0
