"""The page table as a picture: what each page is doing, and which pages each row shows, small enough to send.

Everything is numbers of pages, rows and slots; nothing of what requests say is known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sgl_vtensor.core.pool import VTensorPool

UNBACKED, FREE, IN_USE, FENCED = range(4)
CACHED_BIT = 4
REQUESTS_SHIFT = 3
MAX_REQUESTS = 31
"""Counts of requests end here: 31 or more."""
MAX_ROWS = 512
MAX_RUNS = 16384
"""Ranges that are sent at most: 128 KiB before compression."""


@dataclass(frozen=True)
class Runs:
    """Lists of pages as ranges of consecutive ids: ``firsts[i], firsts[i] + 1, ..`` for ``lens[i]`` pages.

    Page 0 is a hole: ``lens[i]`` positions that hold nothing.
    """

    firsts: npt.NDArray[np.int32]
    lens: npt.NDArray[np.int32]
    num_runs: tuple[int, ...]
    """How many ranges each list has. Lists that would exceed ``MAX_RUNS`` in all are left out at the end."""


def page_states(pool: VTensorPool, is_cached: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """One byte for each of the pages ``[1, num_pages]``: state | ``CACHED_BIT`` | requests << ``REQUESTS_SHIFT``.

    Args:
        is_cached: [num_pages + 1], which pages the radix tree holds.
    """
    pages = pool.pages
    states = np.where(pages.is_free, np.where(pages.backed, FREE, UNBACKED), IN_USE).astype(np.uint8)
    states[list(pages.fenced)] = FENCED
    states[is_cached] |= CACHED_BIT
    states |= (np.minimum(pool.requests_of_pages, MAX_REQUESTS) << REQUESTS_SHIFT).astype(np.uint8)
    return states[1:]


def runs_of(lists: Sequence[npt.NDArray[np.int32]]) -> Runs:
    """Write each list of page ids as ranges."""
    if not lists:
        return Runs(np.zeros(0, np.int32), np.zeros(0, np.int32), ())
    flat = np.concatenate(lists)
    stops = np.cumsum([len(pages) for pages in lists])
    before = flat[:-1]
    begins = np.ones(len(flat), dtype=bool)
    begins[1:] = flat[1:] != np.where(before == 0, 0, before + 1)
    begins[stops[:-1][stops[:-1] < len(flat)]] = True
    starts = np.flatnonzero(begins)
    run_stops = np.searchsorted(starts, stops)
    fitting = int(np.searchsorted(run_stops, MAX_RUNS, side="right"))
    kept = int(run_stops[fitting - 1]) if fitting else 0
    lens = np.diff(starts, append=len(flat))[:kept].astype(np.int32)
    return Runs(flat[starts[:kept]].astype(np.int32), lens, tuple(np.diff(run_stops[:fitting], prepend=0).tolist()))


@dataclass(frozen=True)
class RowsPicture:
    """Rows that hold anything: running ones, then parked ones, the newest first.

    Each of ``table`` is (row, slot, pages of its request, how many of them from the start the row maps). A parked row
    has no slot (0) and no request's pages: what it maps is a cache of mappings.
    """

    table: tuple[tuple[int, int, int, int], ...]
    shows: Runs
    """A running row's list is its request's pages, then what is still mapped behind them; a parked row's, what it maps.
    """
    num_left_out: int
    fenced: tuple[tuple[int, int, int], ...]
    """(page, row, position): duplicates that a running row still reads in place of the tree's page."""


def rows_picture(pool: VTensorPool) -> RowsPicture:
    """What the rows show now."""
    rows = pool.rows
    slots = np.flatnonzero(pool.row_of_slot).tolist()
    table: list[tuple[int, int, int, int]] = []
    lists: list[npt.NDArray[np.int32]] = []
    for slot in slots[:MAX_ROWS]:
        row, has = int(pool.row_of_slot[slot]), int(pool.num_wanted[slot])
        table.append((row, slot, has, int(pool.num_synced[slot])))
        lists.append(np.concatenate((pool.wanted[slot, :has], rows.mapped[row, has : rows.num_shown(row)])))
    for row in rows.parked(MAX_ROWS - len(table)):
        table.append((row, 0, 0, 0))
        lists.append(rows.mapped[row, : rows.num_shown(row)])
    shows = runs_of(lists)
    num_rows = len(shows.num_runs)
    return RowsPicture(
        tuple(table[:num_rows]),
        shows,
        len(slots) + rows.num_parked - num_rows,
        tuple(rows.duplicates()),
    )
