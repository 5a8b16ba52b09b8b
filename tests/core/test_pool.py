"""The life of requests in a pool, with real bytes: written through homes, read through rows."""

from __future__ import annotations

import numpy as np
import pytest

from sgl_vtensor.core.checks import check_tables
from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.errors import VTensorError
from sgl_vtensor.vmm.host import HostDriver
from tests.core.conftest import MakePool, ManualFence, end_request, read_tokens, start_request, write_tokens


@pytest.mark.parametrize("len_tokens", [1, 3, 4, 5, 7, 8, 9, 23, 24])
def test_a_request_sees_its_tokens_side_by_side(pool: VTensorPool, driver: HostDriver, len_tokens: int) -> None:
    """At one token, at the edges of pages, and at the end of the row."""
    pool.pages.take_many(2)
    pool.free([1])  # so that page numbers are out of order
    pages = start_request(pool, 1, [], len_tokens)
    assert len(pages) == -(-len_tokens // 4)
    values = [10 * token for token in range(len_tokens)]
    write_tokens(pool, 1, 0, values)
    assert read_tokens(pool, 1, len_tokens) == values
    assert pool.rows.num_mappings == pool.rows.max_pages + len(pages)


def test_decode_over_a_page_edge(pool: VTensorPool) -> None:
    pool.open(1, [], 3)
    for length in range(3, 25):
        assert pool.grow([1], [length])
        pool.ensure(np.array([1], dtype=np.int32))
        assert pool.num_wanted[1] == -(-length // 4)
        start = 0 if length == 3 else length - 1
        write_tokens(pool, 1, start, list(range(start, length)))
        assert read_tokens(pool, 1, length) == list(range(length))


def test_a_longer_request_than_a_row_is_refused(pool: VTensorPool) -> None:
    pool.open(1, [], 24)
    with pytest.raises(VTensorError, match="does not fit a row of 24"):
        pool.grow([1], [25])
    assert pool.pages.num_in_use == 0


def test_requests_of_one_prefix_share_its_pages_and_no_others(pool: VTensorPool, driver: HostDriver) -> None:
    pages = start_request(pool, 1, [], 10)
    write_tokens(pool, 1, 0, list(range(10)))
    before = driver.physical_bytes
    for slot in (2, 3):
        start_request(pool, slot, pages[:2], 11)
        write_tokens(pool, slot, 8, [slot * 100 + at for at in range(3)])
    assert driver.physical_bytes == before + 2 * pool.layout.page_bytes
    assert pool.stats().pages_shared == 2
    assert read_tokens(pool, 1, 10) == list(range(10))
    for slot in (2, 3):
        assert read_tokens(pool, slot, 11) == [*range(8), *(slot * 100 + at for at in range(3))]


def test_grow_is_all_or_nothing(make_pool: MakePool) -> None:
    pool = make_pool(num_pages=4)
    for slot in (1, 2):
        pool.open(slot, [], 12)
    assert not pool.grow([1, 2], [12, 8])
    assert (pool.num_wanted[1], pool.num_wanted[2], pool.pages.num_in_use) == (0, 0, 0)
    assert pool.grow([1, 2], [12, 4])
    assert pool.grow([1, 2], [9, 1]), "they have these already"


def test_a_slot_is_opened_once(pool: VTensorPool) -> None:
    pool.open(1, [], 4)
    with pytest.raises(VTensorError, match="slot 1 is open already"):
        pool.open(1, [], 4)
    pool.close(1)
    pool.close(1)
    assert not pool.is_open(1) and pool.rows.num_running == 0


def test_only_pages_that_a_request_has_can_be_asked_for(pool: VTensorPool) -> None:
    start_request(pool, 1, [], 8)
    assert pool.pages_of(1, 2, 2) == []
    for start, stop in ((0, 3), (-1, 1), (2, 1)):
        with pytest.raises(VTensorError, match="slot 1 has 2 pages"):
            pool.pages_of(1, start, stop)


def test_a_duplicate_is_read_until_the_row_retires_and_handed_out_afterwards(make_pool: MakePool) -> None:
    """Two requests compute the same page; the tree keeps one. A launch under way still reads the other."""
    pool = make_pool(num_pages=4)
    kept = start_request(pool, 1, [], 4)
    write_tokens(pool, 1, 0, [7, 8, 9, 10])
    mine = start_request(pool, 2, [], 8)
    write_tokens(pool, 2, 0, [7, 8, 9, 10, 11, 12])
    pool.launch(ManualFence())
    assert pool.adopt(2, 0, kept) == [0]
    assert pool.adopt(2, 0, kept) == []
    assert pool.pages_of(2, 0, 2) == [kept[0], mine[1]]
    assert pool.pages.num_available == 2 and pool.stats().pages_fenced == 1
    assert read_tokens(pool, 2, 6) == [7, 8, 9, 10, 11, 12]
    pool.open(3, [], 4)
    assert pool.grow([3], [4]) and pool.pages_of(3, 0, 1) != [mine[0]]
    pool.free([mine[1]])
    pool.close(2)
    assert not pool.pages.fenced and pool.pages.take(mine[0])


def test_a_duplicate_that_was_never_mapped_is_free_at_once(pool: VTensorPool) -> None:
    kept = start_request(pool, 1, [], 4)
    pool.open(2, [], 4)
    assert pool.grow([2], [4])
    mine = pool.pages_of(2, 0, 1)
    assert pool.adopt(2, 0, kept) == [0]
    assert pool.pages.is_free[mine[0]] and not pool.pages.fenced


def test_the_last_pages_are_had_by_waiting_for_the_launch_that_reads_duplicates(make_pool: MakePool) -> None:
    pool = make_pool(num_pages=3)
    kept = start_request(pool, 1, [], 4)
    write_tokens(pool, 1, 0, [1, 2, 3, 4])
    start_request(pool, 2, [], 8)
    write_tokens(pool, 2, 0, [1, 2, 3, 4, 5])
    fence = ManualFence()
    pool.launch(fence)
    pool.adopt(2, 0, kept)
    assert fence.waited == 0 and pool.pages.num_available == 1
    assert pool.secure(1)
    assert fence.waited == 1
    assert read_tokens(pool, 2, 5) == [1, 2, 3, 4, 5]
    assert not pool.secure(2)


def test_shrink_waits_for_launches_and_keeps_what_it_is_told(pool: VTensorPool, driver: HostDriver) -> None:
    start_request(pool, 1, [], 16)
    pool.launch(ManualFence())
    end_request(pool, 1)
    assert pool.shrink(0) == 0
    pool.launch(ManualFence())
    pool.drain(in_flight=1)
    assert pool.shrink(3) == 1
    assert pool.shrink(0) == 3
    assert driver.physical_bytes == pool.layout.page_bytes
    assert (pool.rows.num_parked, pool.rows.num_mappings) == (0, pool.rows.max_pages)
    assert len(start_request(pool, 1, [], 16)) == 4


def test_drain_leaves_the_newest_launches_under_way(pool: VTensorPool) -> None:
    fences = [ManualFence() for _ in range(3)]
    for fence in fences:
        pool.launch(fence)
    pool.drain(in_flight=1)
    assert [fence.waited for fence in fences] == [1, 1, 0]
    assert (pool.epochs.settled, pool.epochs.launched) == (2, 3)
    pool.drain(in_flight=5)
    assert pool.epochs.settled == 2
    pool.launch(None)
    assert pool.epochs.settled == 2, "a launch without a fence ends behind those before it"
    pool.drain(in_flight=0)
    assert pool.epochs.settled == 4 and fences[2].waited == 1


def test_launches_without_fences_are_over_at_once(pool: VTensorPool) -> None:
    pool.launch(None)
    assert pool.epochs.settled == pool.epochs.launched == 1


@pytest.mark.parametrize(
    ("limit", "capacity_pages", "most"), [(16, 64, 16), (5, 64, 5), (16, 8, 7), (1, 64, 1), (16, 1, 2)]
)
def test_most_pages_in_use(driver: HostDriver, make_pool: MakePool, limit: int, capacity_pages: int, most: int) -> None:
    """What the limit, the device and the pool's size leave: two pages and the padding page are backed."""
    pool = make_pool()
    assert pool.secure(2)
    pool.pages.limit_pages = limit
    driver.capacity_bytes = max(capacity_pages * pool.layout.page_bytes, driver.physical_bytes)
    assert pool.pages.most_in_use() == most
    pool.pages.margin_bytes = driver.capacity_bytes
    assert pool.pages.most_in_use() == min(limit, 2)
    assert not pool.secure(3), "the margin is left to others"


def test_reset_forgets_requests_and_keeps_memory_and_mappings(pool: VTensorPool, driver: HostDriver) -> None:
    start_request(pool, 1, [], 16)
    start_request(pool, 2, [], 9)
    fence = ManualFence()
    pool.launch(fence)
    mappings = driver.num_mappings
    pool.reset()
    assert fence.waited == 1
    assert (pool.pages.num_in_use, pool.rows.num_running, pool.rows.num_parked) == (0, 0, 2)
    assert driver.num_mappings == mappings
    check_tables(pool, driver, [])


def test_figures(pool: VTensorPool, driver: HostDriver) -> None:
    pages = start_request(pool, 1, [], 8)
    start_request(pool, 2, pages, 9)
    start_request(pool, 3, [], 4)
    end_request(pool, 3)
    stats = pool.stats()
    assert (stats.num_pages, stats.pages_backed, stats.pages_in_use, stats.pages_shared) == (16, 4, 3, 2)
    assert (stats.rows_running, stats.rows_parked, stats.pages_fenced) == (2, 1, 0)
    assert stats.mappings == 6 + 2 + 3 + 1
    assert stats.backed_bytes == driver.physical_bytes - pool.layout.page_bytes == 4 * pool.layout.page_bytes
    assert stats.limit_bytes == 16 * pool.layout.page_bytes
    pool.set_limit(4)
    assert pool.stats().limit_bytes == stats.backed_bytes and not pool.secure(2), "at the limit, and not beyond it"
    pool.set_limit(16)
    assert stats.driver_calls == driver.calls and stats.driver_calls is not driver.calls
    check_tables(pool, driver, [*pages, *pool.pages_of(2, 2, 3)])


def test_fresh_pages_of_the_next_launch(pool: VTensorPool) -> None:
    pages = start_request(pool, 1, [], 8)
    assert set(pool.take_fresh()) == {0, *pages}
    assert not pool.take_fresh()


def test_shutdown_gives_everything_back(pool: VTensorPool, driver: HostDriver) -> None:
    start_request(pool, 1, [], 24)
    start_request(pool, 2, [], 3)
    end_request(pool, 2)
    fence = ManualFence()
    pool.launch(fence)
    pool.shutdown()
    assert fence.waited == 1
    assert (driver.num_mappings, driver.physical_bytes, driver.num_handles, driver.num_reservations) == (0, 0, 0, 0)
