"""Rows as a cache of mappings: which row is taken, what is mapped anew, and when it may be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_vtensor.core.pages import PADDING_PAGE
from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.core.rows import PADDING_ROW, Rows
from sgl_vtensor.errors import OutOfMemory, VTensorError
from sgl_vtensor.vmm.faults import Fault, FaultyDriver
from sgl_vtensor.vmm.host import HostDriver
from tests.core.conftest import (
    PAGE_TOKENS,
    MakePool,
    ManualFence,
    end_request,
    read_tokens,
    small_pool,
    start_request,
    write_tokens,
)


def array(*pages: int) -> np.ndarray:
    return np.array(pages, dtype=np.int32)


def parked_row(pool: VTensorPool, slot: int, prefix: list[int], len_tokens: int) -> tuple[int, list[int]]:
    """A row that a request has left, and the pages that it maps; the pages stay in use, as the tree's."""
    pages = start_request(pool, slot, prefix, len_tokens)
    row = int(pool.row_of_slot[slot])
    pool.close(slot)
    return row, pages


def test_the_padding_row_shows_the_padding_page_everywhere(pool: VTensorPool, driver: HostDriver) -> None:
    rows = pool.rows
    for position in range(rows.max_pages):
        home = pool.pages.home(PADDING_PAGE) + position
        driver.tensor(home, 1).fill_(position + 1)
        shown = driver.tensor(rows.address(PADDING_ROW, position) + position, 1)
        assert shown.item() == position + 1


def test_a_row_is_what_its_address_says(pool: VTensorPool) -> None:
    rows = pool.rows
    assert rows.address(1) - rows.address(0) == rows.row_bytes == rows.max_pages * pool.layout.page_bytes
    assert rows.address(2, 3) == rows.window_base + 2 * rows.row_bytes + 3 * pool.layout.page_bytes
    assert rows.window_bytes == rows.num_rows * rows.row_bytes


def test_the_row_that_agrees_longest_is_taken(pool: VTensorPool) -> None:
    short, first = parked_row(pool, 1, [], 4)
    long, pages = parked_row(pool, 1, [], 20)
    middle, _ = parked_row(pool, 2, pages[:2], 8)
    assert len({short, long, middle}) == 3
    assert pool.rows.acquire(array(*pages), 5) == long
    assert pool.rows.acquire(array(*first), 1) == short


def test_a_row_of_other_live_pages_is_left_alone_while_an_empty_one_is_there(pool: VTensorPool) -> None:
    row, _ = parked_row(pool, 1, [], 16)
    assert pool.rows.acquire(array(), 4) != row


def test_a_row_of_free_pages_is_better_than_an_empty_one(pool: VTensorPool) -> None:
    row, pages = parked_row(pool, 1, [], 16)
    pool.free(pages)
    assert pool.rows.acquire(array(), 4) == row


def test_the_same_prefix_again_costs_no_driver_call(pool: VTensorPool, driver: HostDriver) -> None:
    """The next turn of a chat: pages of the tree in place, new pages where the old ones were."""
    pages = start_request(pool, 1, [], 22)
    write_tokens(pool, 1, 0, list(range(22)))
    end_request(pool, 1, num_kept=3)
    calls = dict(driver.calls)
    again = start_request(pool, 2, pages[:3], 22)
    assert again == pages
    assert driver.calls == calls
    assert read_tokens(pool, 2, 12) == list(range(12))


def test_hints_are_taken_first(pool: VTensorPool, driver: HostDriver) -> None:
    """Of two free pages the one that the row maps in place is taken, though the other was free for longer."""
    spare = pool.pages.take_many(1)
    pages = start_request(pool, 1, [], 8)
    pool.free(spare)
    end_request(pool, 1)
    unmaps = driver.calls["unmap"]
    assert start_request(pool, 1, [], 8) == pages
    assert driver.calls["unmap"] == unmaps


def test_an_empty_row_stays_empty(pool: VTensorPool) -> None:
    row = pool.open(1, [], 4)
    pool.close(1)
    assert (pool.rows.num_parked, pool.rows.num_running) == (0, 0)
    assert pool.open(2, [], 4) == row


def test_ensure_touches_only_what_differs(pool: VTensorPool, driver: HostDriver) -> None:
    row, pages = parked_row(pool, 1, [], 16)
    other = pool.pages.take_many(1)[0]
    taken = pool.rows.acquire(array(*pages), 4)
    assert taken == row
    calls = dict(driver.calls)
    wanted = array(pages[0], other, pages[2], pages[3], 0, 0)
    assert pool.rows.ensure(row, wanted, 0, 4) == 1
    assert (driver.calls["map"] - calls["map"], driver.calls["unmap"] - calls["unmap"]) == (1, 1)
    assert pool.rows.hint(row, 1) == other
    assert pool.rows.ensure(row, wanted, 0, 4) == 0
    assert pool.rows.ensure(row, wanted, 2, 2) == 0


def test_a_row_is_not_taken_over_from_a_running_launch(make_pool: MakePool) -> None:
    """With a single row the next request waits for the launch that may read it; with two it takes the other."""
    for num_rows, waits in ((2, 1), (3, 0)):
        pool = make_pool(num_rows=num_rows, num_slots=1)
        start_request(pool, 1, [], 8)
        fence = ManualFence()
        pool.launch(fence)
        end_request(pool, 1)
        pool.open(1, [], 4)
        assert fence.waited == waits
        pool.shutdown()


def test_all_rows_running_is_a_bug_and_says_so(make_pool: MakePool) -> None:
    pool = make_pool(num_rows=2, num_slots=2)
    start_request(pool, 1, [], 4)
    with pytest.raises(VTensorError, match="all rows are running"):
        pool.open(2, [], 4)


def test_the_least_recently_parked_row_gives_its_mappings_first(make_pool: MakePool, driver: HostDriver) -> None:
    pool = make_pool(max_mappings=6 + 8)
    first, _ = parked_row(pool, 1, [], 16)
    second, pages = parked_row(pool, 1, [], 16)
    assert pool.rows.num_mappings == 14
    start_request(pool, 1, [], 4)
    assert not pool.rows.mapped[first].any()
    assert pool.rows.mapped[second, :4].tolist() == pages
    assert pool.rows.num_mappings <= 14
    assert driver.num_mappings == pool.rows.num_mappings + pool.pages.num_backed + 1


def test_rows_under_a_launch_keep_their_mappings(pool: VTensorPool) -> None:
    start_request(pool, 1, [], 16)
    pool.launch(ManualFence())
    end_request(pool, 1)
    assert pool.rows.unmap_parked(100) == 0
    pool.drain(in_flight=0)
    assert pool.rows.unmap_parked(100) == 4
    assert pool.rows.num_parked == 0


def test_forget_unmaps_a_page_in_every_row(pool: VTensorPool, driver: HostDriver) -> None:
    pages = start_request(pool, 1, [], 4)
    start_request(pool, 2, pages, 8)
    assert pool.rows.num_mapped(pages[0]) == 2
    pool.launch(ManualFence())
    assert not pool.rows.can_forget(pages[0])
    end_request(pool, 2, num_kept=1)
    end_request(pool, 1)
    assert not pool.rows.can_forget(pages[0])
    pool.drain(in_flight=0)
    assert pool.rows.can_forget(pages[0])
    before = driver.num_mappings
    pool.rows.forget(pages[0])
    assert (driver.num_mappings, pool.rows.num_mapped(pages[0])) == (before - 2, 0)
    assert pool.rows.num_parked == 1, "the row that mapped nothing else is empty now"


def test_duplicates_are_left_alone_until_launches_end(pool: VTensorPool) -> None:
    pages = start_request(pool, 1, [], 8)
    kept = pool.pages.take_many(1)
    pool.launch(ManualFence())
    assert pool.adopt(1, 0, [kept[0], pages[1]]) == [0]
    row = int(pool.row_of_slot[1])
    assert pool.rows.hint(row, 0) == pages[0] and pages[0] in pool.pages.fenced
    with pytest.raises(VTensorError, match="settle the epochs first"):
        pool.rows.release_duplicates({row: pool.wanted[1]})
    pool.drain(in_flight=0)
    assert pool.rows.release_duplicates({row: pool.wanted[1]}) == 1
    assert pool.rows.hint(row, 0) == kept[0] and not pool.pages.fenced


# Mapping ahead for requests that wait.


def num_calls(pool: VTensorPool) -> int:
    return sum(pool.driver.calls.values())


def cost_of(pool: VTensorPool, slot: int, prefix: list[int]) -> int:
    """Driver calls until a new request sees its prefix."""
    before = num_calls(pool)
    pool.open(slot, prefix, len(prefix) * PAGE_TOKENS)
    pool.ensure([slot])
    return num_calls(pool) - before


def test_a_prefix_that_was_mapped_ahead_costs_its_request_no_driver_call(pool: VTensorPool) -> None:
    _, pages = parked_row(pool, 1, [], 20)
    pool.rows.unmap_parked(100)
    assert pool.map_ahead([pages], at_most=100) == 5
    assert (pool.rows.mappings_ahead, pool.rows.rows_prepared) == (5, 1)
    assert pool.map_ahead([pages], at_most=100) == 0
    assert cost_of(pool, 2, pages) == 0


def test_a_row_is_prepared_in_steps_although_another_agrees_longer(make_pool: MakePool) -> None:
    """Each step goes on where the last one ended. The row that agreed longest at first shows too much that is alive."""
    pool = make_pool(num_pages=40, num_slots=1, num_rows=10)
    system = pool.pages.take_many(2)
    chat, _ = parked_row(pool, 1, system, 24)
    others = [parked_row(pool, 1, [], 4)[0] for _ in range(8)]
    assert not pool.rows._empty
    wanted = [*system, *pool.pages.take_many(4)]
    before = pool.rows.mapped.copy()
    assert [pool.map_ahead([wanted], at_most=2) for _ in range(5)] == [1, 2, 2, 1, 0]
    changed = np.flatnonzero((pool.rows.mapped != before).any(axis=1)).tolist()
    assert changed == [others[0]] and chat not in changed
    assert cost_of(pool, 1, wanted) == 0


def test_a_row_in_part_mapped_ahead_is_taken(make_pool: MakePool) -> None:
    """Also where another agrees longer, and shows too much that is alive."""
    pool = make_pool(num_pages=40, num_slots=1, num_rows=10, max_len=40)
    system = pool.pages.take_many(3)
    parked_row(pool, 1, system, 40)
    row, *_ = [parked_row(pool, 1, [], 4)[0] for _ in range(8)]
    wanted = [*system, *pool.pages.take_many(3)]
    assert pool.map_ahead([wanted], at_most=3) == 2
    assert pool.rows.acquire(array(*wanted), 6) == row


def test_requests_with_one_prefix_get_a_row_each(pool: VTensorPool) -> None:
    _, pages = parked_row(pool, 1, [], 12)
    assert pool.map_ahead([pages] * 4, at_most=100) == 9
    assert [cost_of(pool, slot, pages) for slot in (1, 2, 3, 4)] == [0, 0, 0, 0]


def test_a_row_that_shows_one_prefix_is_not_taken_for_another(make_pool: MakePool) -> None:
    """Also where the other request is the first in the queue, and no other row is left."""
    pool = make_pool(num_slots=1, num_rows=2)
    row, pages = parked_row(pool, 1, [], 12)
    other = pool.pages.take_many(4)
    assert pool.map_ahead([other, pages], at_most=100) == 0
    assert pool.map_ahead([other], at_most=100) == 4
    assert pool.map_ahead([other, pages], at_most=100) == 0
    assert pool.rows.mapped[row, :4].tolist() == other


def test_a_row_that_would_not_be_taken_is_no_preparation(pool: VTensorPool) -> None:
    """It shows the prefix, and more of a live chat than that: an empty row is taken, so an empty row is prepared."""
    chat, pages = parked_row(pool, 1, [], 24)
    assert pool.map_ahead([pages[:2]], at_most=100) == 2
    assert cost_of(pool, 1, pages[:2]) == 0
    assert pool.rows.mapped[chat].tolist() == pages


def test_mapping_ahead_leaves_rows_under_a_launch_alone_and_does_not_wait(make_pool: MakePool) -> None:
    pool = make_pool(num_slots=1, num_rows=2)
    row, _ = parked_row(pool, 1, [], 12)
    pool.rows.acquire(array(), 1)
    fence = ManualFence()
    pool.launch(fence)
    pool.rows.retire(row)
    wanted = pool.pages.take_many(3)
    assert pool.map_ahead([wanted], at_most=100) == 0
    pool.drain(in_flight=0)
    waited = fence.waited
    assert pool.map_ahead([wanted], at_most=100) == 3
    assert fence.waited == waited


def test_a_row_that_showed_nothing_is_ready_at_once(make_pool: MakePool) -> None:
    """A launch that read the homes does not hold it."""
    pool = make_pool(num_slots=1, num_rows=2)
    pages = pool.pages.take_many(3)
    pool.open(1, pages, 12)
    pool.launch(ManualFence())
    pool.close(1)
    assert [pool.map_ahead([pages], at_most=2) for _ in range(3)] == [2, 1, 0]


def test_mapping_ahead_takes_no_mapping_from_others(make_pool: MakePool) -> None:
    pool = make_pool(max_mappings=6 + 6)
    row, pages = parked_row(pool, 1, [], 16)
    wanted = pool.pages.take_many(5)
    assert pool.map_ahead([wanted], at_most=100) == 2
    assert pool.map_ahead([wanted], at_most=100) == 0
    assert pool.rows.mapped[row, :4].tolist() == pages


def test_a_mapping_that_is_refused_ahead_leaves_the_row_parked(driver: HostDriver) -> None:
    faulty = FaultyDriver(driver)
    pool = small_pool(faulty, num_slots=1, num_rows=2)
    row, _ = parked_row(pool, 1, [], 12)
    wanted = pool.pages.take_many(3)
    second = faulty.attempts["map"] + 2
    faulty.plan.append(Fault("map", lambda call: call.number == second, OutOfMemory))
    with pytest.raises(OutOfMemory):
        pool.map_ahead([wanted], at_most=100)
    assert pool.rows.num_parked == 1
    faulty.plan.clear()
    assert pool.map_ahead([wanted], at_most=100) > 0
    assert pool.rows.acquire(array(*wanted), 3) == row


def test_pages_that_nobody_has_are_not_mapped_ahead(pool: VTensorPool) -> None:
    _, pages = parked_row(pool, 1, [], 8)
    pool.free(pages[1:])
    with pytest.raises(VTensorError, match="a free page"):
        pool.map_ahead([pages], at_most=100)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data(), spare_rows=st.integers(0, 6), at_most=st.integers(2, 9))
def test_mapping_ahead_comes_to_rest_and_serves_the_first(data: st.DataObject, spare_rows: int, at_most: int) -> None:
    """Whatever rows show, and whichever beginnings the waiting requests share: no two of them take a row from each
    other for ever, and the request that is admitted next waits for nothing."""
    with HostDriver(capacity_bytes=1 << 24) as driver:
        pool = small_pool(driver, num_pages=80, num_slots=3, num_rows=4 + spare_rows)
        chains: list[list[int]] = [[]]
        for _ in range(data.draw(st.integers(1, 8))):
            beginning = data.draw(st.sampled_from(chains))
            beginning = beginning[: data.draw(st.integers(0, min(len(beginning), 5)))]
            length = data.draw(st.integers(len(beginning) + 1, 6))
            _, pages = parked_row(pool, 1, beginning, length * PAGE_TOKENS)
            chains.append(pages)
        waiting = data.draw(st.lists(st.sampled_from(chains[1:]), min_size=1, max_size=3))
        waiting = [chain[: data.draw(st.integers(1, len(chain)))] for chain in waiting]
        before = num_calls(pool)
        while pool.map_ahead(waiting, at_most=at_most):
            assert num_calls(pool) - before <= 4 * sum(map(len, waiting)), "rows are mapped to and fro"
        assert cost_of(pool, 1, waiting[0]) == 0
        pool.shutdown()


def test_close_leaves_no_mapping(pool: VTensorPool, driver: HostDriver) -> None:
    start_request(pool, 1, [], 24)
    parked_row(pool, 2, [], 7)
    pool.rows.close()
    assert driver.num_mappings == pool.pages.num_backed + 1
    assert pool.rows.num_mappings == 0


def test_the_row_is_found_among_many(driver: HostDriver, make_pool: MakePool) -> None:
    """The index leads to the best row without a look at all of them."""
    pool = make_pool(num_pages=400, num_slots=1, num_rows=70)
    chats = [parked_row(pool, 1, [], 20) for _ in range(60)]
    seen: list[int] = []
    original = Rows._worth

    class Counting(Rows):
        def _worth(self, row: int, prefix: np.ndarray, num_pages: int) -> int:
            seen.append(row)
            return original(self, row, prefix, num_pages)

    pool.rows.__class__ = Counting
    for row, pages in reversed(chats):
        assert pool.rows.acquire(array(*pages), 5) == row
    assert len(seen) < 60 * 13
