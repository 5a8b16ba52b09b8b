"""The contract of ``VmmDriver``, the same tests on both drivers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sgl_vtensor.errors import DriverError, OutOfMemory
from sgl_vtensor.vmm import VmmDriver, open_driver

REPOSITORY = Path(__file__).resolve().parents[2]
TIB = 1 << 40

State = tuple[int, int, int, int]


def state(driver: VmmDriver) -> State:
    return driver.num_reservations, driver.num_handles, driver.num_mappings, driver.physical_bytes


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def driver(request: pytest.FixtureRequest) -> Iterator[VmmDriver]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    driver = open_driver(request.param)
    yield driver
    driver.close()
    assert state(driver) == (0, 0, 0, 0)


def create_mapped(driver: VmmDriver, address: int, num_bytes: int) -> int:
    handle = driver.create(num_bytes)
    driver.map(address, handle, num_bytes, writable=True)
    return handle


def values(tensor: torch.Tensor) -> set[int]:
    """The least and the greatest value, so one value if all are equal."""
    return {int(value) for value in tensor.aminmax()}


# Two mappings of one page


def test_a_write_through_one_address_is_read_through_the_other(driver: VmmDriver) -> None:
    page_bytes = driver.granularity
    home, row = driver.reserve(4 * page_bytes), driver.reserve(4 * page_bytes)
    handle = create_mapped(driver, home + page_bytes, page_bytes)
    driver.map(row + 3 * page_bytes, handle, page_bytes, writable=True)

    written = driver.tensor(home + page_bytes, page_bytes)
    read = driver.tensor(row + 3 * page_bytes, page_bytes)
    written.copy_(torch.arange(page_bytes, device=driver.device) % 251)
    assert torch.equal(read, written)
    read[5] = 255
    assert written[5].item() == 255


def test_a_read_only_mapping_shows_later_writes(driver: VmmDriver) -> None:
    page_bytes = driver.granularity
    base = driver.reserve(2 * page_bytes)
    handle = create_mapped(driver, base, page_bytes)
    driver.map(base + page_bytes, handle, page_bytes, writable=False)
    for value in (7, 9):
        driver.tensor(base, page_bytes).fill_(value)
        assert values(driver.tensor(base + page_bytes, page_bytes)) == {value}


def test_one_page_at_many_addresses(driver: VmmDriver) -> None:
    page_bytes = driver.granularity
    base = driver.reserve(9 * page_bytes)
    handle = create_mapped(driver, base, page_bytes)
    for position in range(1, 9):
        driver.map(base + position * page_bytes, handle, page_bytes, writable=False)
    driver.tensor(base, page_bytes).fill_(3)
    assert values(driver.tensor(base, 9 * page_bytes)) == {3}
    assert driver.physical_bytes == page_bytes
    assert driver.num_mappings == 9


def test_remapping_an_address_shows_the_new_page(driver: VmmDriver) -> None:
    page_bytes = driver.granularity
    home, row = driver.reserve(2 * page_bytes), driver.reserve(page_bytes)
    handles = [create_mapped(driver, home + page * page_bytes, page_bytes) for page in range(2)]
    for page, handle in enumerate(handles):
        driver.tensor(home + page * page_bytes, page_bytes).fill_(page + 1)
        driver.map(row, handle, page_bytes, writable=False)
        assert values(driver.tensor(row, page_bytes)) == {page + 1}
        driver.unmap(row, page_bytes)


# Faults, each in a process of its own: a fault ends the process (host) or its CUDA context (cuda)

FAULTING_SCRIPT = """
import resource, sys, torch
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from sgl_vtensor.vmm import open_driver
driver = open_driver(sys.argv[1])
page_bytes = driver.granularity
base = driver.reserve(3 * page_bytes)
handle = driver.create(page_bytes)
driver.map(base, handle, page_bytes, writable=True)
driver.map(base + page_bytes, handle, page_bytes, writable=False)
tensor = driver.tensor(base, 3 * page_bytes)
tensor[:page_bytes].fill_(1)
assert tensor[: 2 * page_bytes].sum().item() == 2 * page_bytes
print("BEFORE", flush=True)
{access}
if driver.name == "cuda":
    torch.cuda.synchronize()
print("SURVIVED", flush=True)
"""


@pytest.mark.parametrize(
    "access",
    [
        pytest.param("tensor[page_bytes : page_bytes + 8].fill_(2)", id="write to a read-only mapping"),
        pytest.param("tensor[2 * page_bytes :].fill_(2)", id="write to unmapped space"),
        pytest.param("print(tensor[page_bytes:].clone())", id="read of unmapped space"),
        pytest.param(
            "driver.unmap(base, page_bytes); print(tensor[:8].clone())", id="read of what is not mapped any longer"
        ),
    ],
)
def test_a_stray_access_faults(driver: VmmDriver, access: str) -> None:
    if "read-only" in access and not driver.read_only_supported:
        pytest.skip("this driver has no read-only mappings")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", FAULTING_SCRIPT.format(access=access), driver.name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("BEFORE"), done.stderr
    assert "SURVIVED" not in done.stdout
    if driver.name == "host":
        assert done.returncode == -signal.SIGSEGV
    else:
        assert done.returncode != 0
        assert "CUDA error" in done.stderr


# Lifetimes


def test_a_released_page_stays_while_it_is_mapped(driver: VmmDriver) -> None:
    page_bytes = driver.granularity
    base = driver.reserve(2 * page_bytes)
    handle = create_mapped(driver, base, page_bytes)
    driver.map(base + page_bytes, handle, page_bytes, writable=False)
    driver.tensor(base, page_bytes).fill_(42)

    driver.release(handle)
    others = [driver.create(page_bytes) for _ in range(4)]  # must not be given the memory that is still seen
    spare = driver.reserve(4 * page_bytes)
    for position, other in enumerate(others):
        driver.map(spare + position * page_bytes, other, page_bytes, writable=True)
    driver.tensor(spare, 4 * page_bytes).fill_(1)
    assert values(driver.tensor(base, 2 * page_bytes)) == {42}
    assert driver.physical_bytes == 5 * page_bytes

    driver.unmap(base, page_bytes)
    assert driver.physical_bytes == 5 * page_bytes
    assert values(driver.tensor(base + page_bytes, page_bytes)) == {42}
    driver.unmap(base + page_bytes, page_bytes)
    assert driver.physical_bytes == 4 * page_bytes


def test_a_page_outlives_its_mappings(driver: VmmDriver) -> None:
    page_bytes = driver.granularity
    base = driver.reserve(2 * page_bytes)
    handle = create_mapped(driver, base, page_bytes)
    driver.tensor(base, page_bytes).fill_(6)
    driver.unmap(base, page_bytes)
    driver.map(base + page_bytes, handle, page_bytes, writable=True)
    assert values(driver.tensor(base + page_bytes, page_bytes)) == {6}


def test_memory_comes_back_and_serves_again(driver: VmmDriver) -> None:
    free_bytes, total_bytes = driver.memory_info()
    assert 0 < free_bytes <= total_bytes
    # Several times the whole memory in all, so that it must be used again; few large pieces, to be quick on a GPU.
    piece_bytes = max(free_bytes // 16, driver.granularity) // driver.granularity * driver.granularity
    if driver.name == "host":
        piece_bytes = 64 * driver.granularity
    for _ in range(40):
        driver.release(driver.create(piece_bytes))
    assert driver.physical_bytes == 0
    assert driver.calls["create"] == driver.calls["release"] == 40


def test_handles_are_never_used_twice(driver: VmmDriver) -> None:
    seen = set()
    for _ in range(10):
        handle = driver.create(driver.granularity)
        assert handle > 0
        seen.add(handle)
        driver.release(handle)
    assert len(seen) == 10


@pytest.mark.parametrize("num_granules", [1, 3, 7, 257])
def test_odd_sizes(driver: VmmDriver, num_granules: int) -> None:
    page_bytes = num_granules * driver.granularity
    base = driver.reserve(5 * page_bytes + driver.granularity)
    start = base + driver.granularity  # so that pages are not aligned to their own size
    for position in (4, 0, 2):
        create_mapped(driver, start + position * page_bytes, page_bytes)
        driver.tensor(start + position * page_bytes, page_bytes).fill_(position + 1)
    for position in (0, 2, 4):
        assert values(driver.tensor(start + position * page_bytes, page_bytes)) == {position + 1}
        driver.unmap(start + position * page_bytes, page_bytes)
    assert driver.num_mappings == 0
    assert driver.physical_bytes == 3 * page_bytes


def test_close_gives_everything_back_and_may_be_repeated(driver: VmmDriver) -> None:
    page_bytes = driver.granularity
    base = driver.reserve(4 * page_bytes)
    driver.reserve(page_bytes)
    driver.release(create_mapped(driver, base, page_bytes))
    handle = create_mapped(driver, base + page_bytes, page_bytes)
    driver.create(page_bytes)
    assert state(driver) == (2, 2, 2, 3 * page_bytes)
    driver.close()
    assert state(driver) == (0, 0, 0, 0)
    driver.close()
    calls: list[Callable[[], object]] = [
        lambda: driver.reserve(page_bytes),
        lambda: driver.free_reservation(base, 4 * page_bytes),
        lambda: driver.create(page_bytes),
        lambda: driver.release(handle),
        lambda: driver.map(base, handle, page_bytes, writable=True),
        lambda: driver.unmap(base, page_bytes),
        lambda: driver.tensor(base, page_bytes),
        driver.memory_info,
    ]
    for call in calls:
        with pytest.raises(DriverError, match="CLOSED"):
            call()


def test_a_device_holds_no_more_after_close_than_before(driver: VmmDriver) -> None:
    torch.zeros(1, device=driver.device)  # torch's own first allocation is not ours to count
    free_before, _ = driver.memory_info()
    second = open_driver(driver.name)  # type: ignore[arg-type]
    page_bytes = 16 * driver.granularity
    base = second.reserve(8 * page_bytes)
    for position in range(8):
        create_mapped(second, base + position * page_bytes, page_bytes)
    second.close()
    free_after, _ = driver.memory_info()
    assert free_after >= free_before - driver.granularity


# Shortage and misuse


def test_more_than_there_is_raises_out_of_memory(driver: VmmDriver) -> None:
    _, total_bytes = driver.memory_info()
    before = state(driver)
    with pytest.raises(OutOfMemory) as caught:
        driver.create((total_bytes // driver.granularity + 1) * driver.granularity)
    assert caught.value.call and caught.value.code
    assert "release memory" in str(caught.value)
    assert state(driver) == before
    assert driver.errors["create"] == 1
    driver.release(driver.create(driver.granularity))


def test_an_impossible_reservation_raises(driver: VmmDriver) -> None:
    with pytest.raises(DriverError):
        driver.reserve(1 << 62)
    assert driver.num_reservations == 0


def test_misuse_is_refused_and_changes_nothing(driver: VmmDriver) -> None:
    page_bytes = 2 * driver.granularity
    base = driver.reserve(8 * page_bytes)
    end = base + 8 * page_bytes
    handle = create_mapped(driver, base + 2 * page_bytes, page_bytes)
    spare = driver.create(page_bytes)
    gone = driver.create(page_bytes)
    driver.release(gone)
    content = driver.tensor(base + 2 * page_bytes, page_bytes)
    content.fill_(17)

    def map_at(address: int, what: int = spare, num_bytes: int = page_bytes) -> Callable[[], None]:
        return lambda: driver.map(address, what, num_bytes, writable=True)

    misuse: list[tuple[str, Callable[[], object]]] = [
        ("ALREADY_MAPPED", map_at(base + 2 * page_bytes)),
        ("ALREADY_MAPPED", map_at(base + 2 * page_bytes, handle)),
        ("ALREADY_MAPPED", map_at(base + page_bytes + driver.granularity)),  # its second half is mapped
        ("ALREADY_MAPPED", map_at(base + 2 * page_bytes + driver.granularity)),  # its first half is mapped
        ("NOT_RESERVED", map_at(end)),
        ("NOT_RESERVED", map_at(end - driver.granularity)),  # half of it
        ("NOT_RESERVED", map_at(base - page_bytes)),
        ("NOT_RESERVED", map_at(0)),
        ("MISALIGNED", map_at(base + 512)),
        ("UNKNOWN_HANDLE", map_at(base, gone)),
        ("UNKNOWN_HANDLE", map_at(base, 0)),
        ("WRONG_SIZE", map_at(base, spare, driver.granularity)),
        ("WRONG_SIZE", map_at(base, spare, 2 * page_bytes)),
        ("WRONG_SIZE", map_at(base, spare, 0)),
        ("NOT_MAPPED", lambda: driver.unmap(base, page_bytes)),
        ("NOT_MAPPED", lambda: driver.unmap(base + 2 * page_bytes + driver.granularity, driver.granularity)),
        ("WRONG_SIZE", lambda: driver.unmap(base + 2 * page_bytes, driver.granularity)),
        ("WRONG_SIZE", lambda: driver.unmap(base + 2 * page_bytes, 2 * page_bytes)),
        ("UNKNOWN_HANDLE", lambda: driver.release(gone)),
        ("UNKNOWN_HANDLE", lambda: driver.release(123456)),
        ("WRONG_SIZE", lambda: driver.create(0)),
        ("WRONG_SIZE", lambda: driver.create(-driver.granularity)),
        ("WRONG_SIZE", lambda: driver.create(driver.granularity + 1)),
        ("WRONG_SIZE", lambda: driver.reserve(driver.granularity - 1)),
        ("STILL_MAPPED", lambda: driver.free_reservation(base, 8 * page_bytes)),
        ("WRONG_SIZE", lambda: driver.free_reservation(base, page_bytes)),
        ("NOT_RESERVED", lambda: driver.free_reservation(base + page_bytes, 7 * page_bytes)),
        ("NOT_RESERVED", lambda: driver.tensor(end - 1, 2)),
        ("WRONG_SIZE", lambda: driver.tensor(base, 0)),
    ]
    before, calls = state(driver), dict(driver.calls)
    for code, call in misuse:
        with pytest.raises(DriverError) as caught:
            call()
        assert caught.value.code == code
        assert state(driver) == before
    assert driver.calls == calls, "misuse must not reach the system"
    assert values(content) == {17}

    # And everything still works: the spare page fits where nothing was mapped, to the last granule.
    map_at(end - page_bytes)()
    driver.unmap(end - page_bytes, page_bytes)
    driver.unmap(base + 2 * page_bytes, page_bytes)
    driver.free_reservation(base, 8 * page_bytes)
    assert driver.num_mappings == driver.num_reservations == 0


def test_neighbouring_reservations_are_not_one(driver: VmmDriver) -> None:
    page_bytes = driver.granularity
    starts = sorted(driver.reserve(page_bytes) for _ in range(4))
    handle = driver.create(2 * page_bytes)
    for start in starts:
        with pytest.raises(DriverError, match="NOT_RESERVED"):
            driver.map(start, handle, 2 * page_bytes, writable=True)


def test_calls_and_seconds_are_counted(driver: VmmDriver) -> None:
    page_bytes = driver.granularity
    base = driver.reserve(page_bytes)
    handle = create_mapped(driver, base, page_bytes)
    driver.unmap(base, page_bytes)
    driver.map(base, handle, page_bytes, writable=False)
    driver.unmap(base, page_bytes)
    driver.release(handle)
    driver.free_reservation(base, page_bytes)
    assert driver.calls == {"reserve": 1, "free_reservation": 1, "create": 1, "release": 1, "map": 2, "unmap": 2}
    assert driver.seconds.keys() == driver.calls.keys()
    assert all(0 < seconds < 5 for seconds in driver.seconds.values())
    assert {kind: sum(counts) for kind, counts in driver.histogram.items()} == driver.calls
    assert not any(driver.errors.values())
    assert (driver.looks.count, driver.looks.seconds) == (0, 0.0)
    driver.memory_info()
    assert driver.looks.count == 1 and 0 < driver.looks.seconds < 5


# Tensors


def test_a_huge_reservation_costs_nothing(driver: VmmDriver) -> None:
    num_bytes = 8 * TIB
    bases = [driver.reserve(num_bytes) for _ in range(3)]
    page_bytes = driver.granularity
    for base in bases:
        everything = driver.tensor(base, num_bytes)
        assert everything.numel() == num_bytes
        assert everything.data_ptr() == base
        last = num_bytes - page_bytes
        create_mapped(driver, base + last, page_bytes)
        everything[last:].fill_(8)
        assert values(everything[last:]) == {8}
    assert driver.physical_bytes == 3 * page_bytes


def test_views_of_other_types_and_strides(driver: VmmDriver) -> None:
    """A bf16 layer view as the pool makes it: tokens apart by a stride with padding, over one row of two pages."""
    page_bytes = 3 * driver.granularity
    base = driver.reserve(1 * TIB)
    for position in range(2):
        create_mapped(driver, base + position * page_bytes, page_bytes)
    flat = driver.tensor(base, 1 * TIB)
    flat[: 2 * page_bytes].zero_()
    stride_elements, heads, head_dim = 96, 2, 16
    num_tokens = 2 * page_bytes // (2 * stride_elements)
    values_bf16 = flat.view(torch.bfloat16)
    layer = values_bf16.as_strided((num_tokens, heads, head_dim), (stride_elements, head_dim, 1), 32)
    wanted = torch.randn(num_tokens, heads, head_dim, device=driver.device).to(torch.bfloat16)
    layer.copy_(wanted)
    assert layer.data_ptr() == base + 64
    assert torch.equal(layer, wanted)
    again = driver.tensor(base, 2 * page_bytes).view(torch.bfloat16)[: num_tokens * stride_elements]
    table = again.view(num_tokens, stride_elements)
    assert torch.equal(table[:, 32:64].reshape(num_tokens, heads, head_dim), wanted)
    assert not table[:, :32].any() and not table[:, 64:].any()


def test_a_tensor_is_on_the_device_and_does_not_own(driver: VmmDriver) -> None:
    page_bytes = driver.granularity
    base = driver.reserve(page_bytes)
    create_mapped(driver, base, page_bytes)
    tensor = driver.tensor(base, page_bytes)
    assert tensor.device == driver.device
    assert tensor.dtype == torch.uint8
    tensor.fill_(1)
    del tensor
    assert values(driver.tensor(base + 3, 5)) == {1}
