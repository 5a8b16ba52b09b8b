"""Rows as a cache of mappings: which row is taken, what is mapped anew, and when it may be."""

from __future__ import annotations

import numpy as np
import pytest

from sgl_vtensor.core.pages import PADDING_PAGE
from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.core.rows import PADDING_ROW, Rows
from sgl_vtensor.errors import VTensorError
from sgl_vtensor.vmm.host import HostDriver
from tests.core.conftest import MakePool, ManualFence, end_request, read_tokens, start_request, write_tokens


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
