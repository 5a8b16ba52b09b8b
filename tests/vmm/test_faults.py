"""The driver that fails where it is told to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sgl_vtensor.errors import DriverError, OutOfMemory
from sgl_vtensor.vmm.driver import VmmDriver
from sgl_vtensor.vmm.faults import Call, Fault, FaultyDriver
from sgl_vtensor.vmm.host import HostDriver


@pytest.fixture
def inner() -> Iterator[HostDriver]:
    with HostDriver() as driver:
        yield driver


def test_without_a_plan_it_is_the_inner_driver(inner: HostDriver) -> None:
    driver: VmmDriver = FaultyDriver(inner)
    page_bytes = driver.granularity
    base = driver.reserve(2 * page_bytes)
    handle = driver.create(page_bytes)
    driver.map(base, handle, page_bytes, writable=True)
    driver.tensor(base, page_bytes).fill_(1)
    assert (driver.name, driver.device, driver.max_mappings) == (inner.name, inner.device, inner.max_mappings)
    assert driver.read_only_supported == inner.read_only_supported
    assert driver.memory_info() == inner.memory_info()
    assert (driver.num_mappings, driver.num_handles, driver.num_reservations) == (1, 1, 1)
    assert driver.physical_bytes == page_bytes
    assert driver.calls is inner.calls and driver.calls["map"] == 1
    assert driver.seconds is inner.seconds
    driver.unmap(base, page_bytes)
    driver.release(handle)
    driver.free_reservation(base, 2 * page_bytes)
    driver.close()
    assert inner.num_reservations == 0
    with pytest.raises(DriverError, match="CLOSED"):
        inner.reserve(page_bytes)


def test_the_nth_call_of_a_kind_fails_once(inner: HostDriver) -> None:
    driver = FaultyDriver(inner, [Fault("create", 2)])
    driver.reserve(driver.granularity)
    driver.create(driver.granularity)
    with pytest.raises(OutOfMemory) as caught:
        driver.create(driver.granularity)
    assert (caught.value.call, caught.value.code) == ("create", "INJECTED")
    assert inner.calls["create"] == 1, "the failing call did not reach the inner driver"
    assert driver.errors["create"] == 1, "and yet it is counted among those refused"
    driver.create(driver.granularity)
    assert driver.attempts["create"] == 3


def test_any_call_can_fail_by_its_number(inner: HostDriver) -> None:
    driver = FaultyDriver(inner, [Fault("*", 3, DriverError)])
    base = driver.reserve(driver.granularity)
    handle = driver.create(driver.granularity)
    with pytest.raises(DriverError) as caught:
        driver.map(base, handle, driver.granularity, writable=True)
    assert not isinstance(caught.value, OutOfMemory)
    driver.map(base, handle, driver.granularity, writable=True)


@pytest.mark.parametrize("kind", ["reserve", "free_reservation", "create", "release", "map", "unmap"])
def test_every_kind_can_fail_and_changes_nothing(inner: HostDriver, kind: str) -> None:
    driver = FaultyDriver(inner, [Fault(kind, 1, DriverError)])
    page_bytes = driver.granularity

    def run_all() -> None:
        base = driver.reserve(page_bytes)
        handle = driver.create(page_bytes)
        driver.map(base, handle, page_bytes, writable=True)
        driver.unmap(base, page_bytes)
        driver.release(handle)
        driver.free_reservation(base, page_bytes)

    with pytest.raises(DriverError, match=f"^{kind} failed with INJECTED"):
        run_all()
    assert inner.calls[kind] == 0
    run_all()


def test_a_predicate_sees_the_call_and_the_plan_may_change(inner: HostDriver) -> None:
    seen: list[Call] = []

    def refuse_large(call: Call) -> bool:
        seen.append(call)
        return bool(call.arguments["num_bytes"] > 4 * inner.granularity)

    driver = FaultyDriver(inner)
    driver.create(8 * driver.granularity)
    driver.plan.append(Fault("create", refuse_large))
    driver.create(driver.granularity)
    for _ in range(2):
        with pytest.raises(OutOfMemory):
            driver.create(8 * driver.granularity)
    assert [call.number for call in seen] == [2, 3, 4]
    assert seen[0] == Call("create", 2, {"num_bytes": driver.granularity})
    driver.plan.clear()
    driver.create(8 * driver.granularity)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'mmap'"):
        Fault("mmap", 1)
