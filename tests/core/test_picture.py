"""The page table as a picture: what comes out says exactly what the tables hold."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_vtensor.core import picture
from sgl_vtensor.core.picture import CACHED_BIT, FENCED, FREE, IN_USE, REQUESTS_SHIFT, UNBACKED, Runs
from sgl_vtensor.core.pool import VTensorPool
from tests.core.conftest import MakePool, ManualFence, end_request, start_request

PAGE_LISTS = st.lists(st.lists(st.one_of(st.integers(0, 6), st.integers(0, 100)), max_size=12), max_size=8)


def mask(pool: VTensorPool, pages: list[int]) -> npt.NDArray[np.bool_]:
    return np.isin(np.arange(pool.pages.num_pages + 1), pages)


def lists_of(runs: Runs) -> list[list[int]]:
    """What a reader makes of it."""
    at, found = 0, []
    for num_runs in runs.num_runs:
        pages: list[int] = []
        for first, length in zip(
            runs.firsts[at : at + num_runs].tolist(), runs.lens[at : at + num_runs].tolist(), strict=True
        ):
            pages += [first + i if first else 0 for i in range(length)]
        found.append(pages)
        at += num_runs
    assert at == len(runs.firsts) == len(runs.lens)
    return found


@settings(deadline=None)
@given(PAGE_LISTS)
def test_ranges_say_the_same_as_the_lists(lists: list[list[int]]) -> None:
    arrays = [np.array(pages, dtype=np.int32) for pages in lists]
    runs = picture.runs_of(arrays)
    assert lists_of(runs) == lists
    neighbours = sum(b != (a + 1 if a else 0) for pages in lists for a, b in pairwise(pages))
    assert len(runs.firsts) == sum(map(bool, lists)) + neighbours, "a range ends only where the next page is another's"


@settings(deadline=None)
@given(PAGE_LISTS, st.integers(0, 20))
def test_what_is_too_much_is_left_out_at_the_end(lists: list[list[int]], most: int) -> None:
    arrays = [np.array(pages, dtype=np.int32) for pages in lists]
    all_runs = picture.runs_of(arrays)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(picture, "MAX_RUNS", most)
        runs = picture.runs_of(arrays)
    kept = len(runs.num_runs)
    assert lists_of(runs) == lists[:kept] and len(runs.firsts) <= most
    assert kept == len(lists) or sum(all_runs.num_runs[: kept + 1]) > most, "nothing is left out without need"


def test_every_page_is_in_one_state_and_adds_up_to_the_figures(make_pool: MakePool) -> None:
    pool = make_pool(num_pages=16)
    cached = start_request(pool, 1, [], 8)
    start_request(pool, 2, cached, 12)
    start_request(pool, 3, cached[:1], 8)
    twin = start_request(pool, 4, [], 4)
    end_request(pool, 1, num_kept=2)
    pool.launch(ManualFence())
    assert pool.adopt(4, 0, [cached[0]]) == [0], "its own page is a duplicate of the tree's now"
    freed = pool.pages_of(3, 1, 2)
    end_request(pool, 3, num_kept=1)
    states = picture.page_states(pool, mask(pool, cached))
    assert states.shape == (16,) and states.dtype == np.uint8
    state = {page: int(states[page - 1]) for page in range(1, 17)}
    assert state[cached[0]] == IN_USE | CACHED_BIT | 2 << REQUESTS_SHIFT
    assert state[cached[1]] == IN_USE | CACHED_BIT | 1 << REQUESTS_SHIFT
    assert state[twin[0]] == FENCED
    assert state[freed[0]] == FREE
    stats, low = pool.stats(), states & 3
    assert np.count_nonzero(low == UNBACKED) == stats.num_pages - stats.pages_backed > 0
    assert np.count_nonzero(low == FREE) == stats.pages_free_backed
    assert np.count_nonzero(low == FENCED) == stats.pages_fenced == 1
    assert np.count_nonzero(low == IN_USE) == stats.pages_in_use
    assert np.count_nonzero(states >> REQUESTS_SHIFT > 1) == stats.pages_shared
    assert int((states >> REQUESTS_SHIFT).sum()) == stats.pages_seen
    assert picture.rows_picture(pool).fenced == ((twin[0], int(pool.row_of_slot[4]), 0),)


def test_a_page_of_many_requests_says_so_without_spilling_into_its_state(make_pool: MakePool) -> None:
    pool = make_pool(num_slots=40, num_pages=60)
    [page] = start_request(pool, 1, [], 4)
    for slot in range(2, 41):
        start_request(pool, slot, [page], 4)
    assert (
        picture.page_states(pool, mask(pool, [page]))[page - 1]
        == IN_USE | CACHED_BIT | picture.MAX_REQUESTS << REQUESTS_SHIFT
    )


def test_rows_show_what_their_requests_have_and_what_stays_mapped(pool: VTensorPool) -> None:
    first = start_request(pool, 1, [], 24)
    end_request(pool, 1)
    pool.launch(None)
    pool.open(2, [], 12)
    assert pool.grow([2], [12])
    row = int(pool.row_of_slot[2])
    shown = picture.rows_picture(pool)
    assert shown.table == ((row, 2, 3, 0),), "not mapped yet"
    assert lists_of(shown.shows) == [pool.pages_of(2, 0, 3) + pool.rows.mapped[row, 3:6].tolist()]
    pool.ensure(np.array([2]))
    assert picture.rows_picture(pool).table == ((row, 2, 3, 3),)
    start_request(pool, 3, [], 4)
    end_request(pool, 3)
    end_request(pool, 2)
    shown = picture.rows_picture(pool)
    assert [(entry[1:], pages) for entry, pages in zip(shown.table, lists_of(shown.shows), strict=True)] == [
        ((0, 0, 0), pool.rows.mapped[entry[0]][: pool.rows.num_shown(entry[0])].tolist()) for entry in shown.table
    ]
    assert [entry[0] for entry in shown.table] == [row, *[r for r in pool.rows.parked(9) if r != row]]
    assert shown.num_left_out == 0 and first


def test_more_rows_than_a_screen_holds(pool: VTensorPool, monkeypatch: pytest.MonkeyPatch) -> None:
    for slot in (1, 2, 3):
        start_request(pool, slot, [], 4)
    end_request(pool, 1)
    monkeypatch.setattr(picture, "MAX_ROWS", 1)
    shown = picture.rows_picture(pool)
    assert [entry[1] for entry in shown.table] == [2] and shown.num_left_out == 2
