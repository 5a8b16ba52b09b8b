"""What must hold of a pool's tables between any two calls, each against the others and against the driver's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import numpy as np

from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.errors import VTensorError
from sgl_vtensor.vmm.base import DriverBase


class InvariantBroken(VTensorError, AssertionError):
    """Something that must hold at any time does not: a bug of ours. Report it with the trace that shows it."""


def _require(holds: object, *said: object) -> None:
    """Raise what is said unless it holds; nothing is formatted before."""
    if not holds:
        raise InvariantBroken(" ".join(str(word) for word in said))


def check_tables(pool: VTensorPool, driver: DriverBase, owned: Collection[int]) -> None:
    """Look at every table of the pool's, and at what ``driver``, the innermost, has mapped.

    Args:
        owned: the pages that somebody has, each once: the tree's, and every request's behind those.

    Raises:
        InvariantBroken: two tables contradict each other; the message says which, for which page or row.
    """
    _check_pages(pool, owned)
    _check_homes(pool, driver)
    _check_mappings(pool, driver)
    _check_requests(pool)


def _check_pages(pool: VTensorPool, owned: Collection[int]) -> None:
    """Each page is owned once or free, and free in one way only."""
    pages = pool.pages
    in_use = np.flatnonzero(~pages.is_free[1:]) + 1
    if len(owned) != len(in_use) or set(owned) != set(in_use.tolist()):
        twice = {page for page, count in Counter(list(owned)).items() if count > 1}
        _require(not twice, "owned twice:", twice)
        _require(False, "owned by somebody", sorted(owned), "and in use by the books", in_use.tolist())
    free = [*pages._free_backed, *pages._free_unbacked, *pages.fenced]
    num_free = pages.num_pages - len(owned)
    _require(len(free) == pages.num_available == num_free, "available", len(free), pages.num_available, num_free)
    _require(np.unique(free).size == len(free), "a page is free twice among", free)
    _require(pages.is_free[free].all(), "a free page is in use by the books")


def _check_homes(pool: VTensorPool, driver: DriverBase) -> None:
    """Backed pages, and only those, are at home."""
    pages, current, handles = pool.pages, driver._mappings, pool.pages._handles.tolist()
    backed = np.flatnonzero(pages.backed).tolist()
    num_backed = pages.num_backed + 1  # and the padding page
    _require(len(backed) == num_backed, len(backed), "pages are backed, by the books", num_backed)
    _require(not pages.backed[pages._free_unbacked].any(), "an unbacked page is backed")
    made = pages.num_created - pages.num_released
    _require(made == pages.num_backed, made, "more pages created than released, and", pages.num_backed, "backed")
    base, page_bytes = pages.home_base, pages.layout.page_bytes
    for page in backed:
        mapping = current.get(base + page * page_bytes)
        if mapping is None or mapping.allocation is not driver._allocations[handles[page]]:
            _require(False, "page", page, "is not mapped at its home")
    num_handles = int(np.count_nonzero(pages._handles))
    _require(driver.num_handles == num_handles, driver.num_handles, "handles, by the books", num_handles)
    _require(
        driver.physical_bytes == num_handles * page_bytes, driver.physical_bytes, "bytes for", num_handles, "pages"
    )
    num_mappings = pool.rows.num_mappings + len(backed)
    _require(driver.num_mappings == num_mappings, driver.num_mappings, "mappings, by the books", num_mappings)


def _check_mappings(pool: VTensorPool, driver: DriverBase) -> None:
    """Rows are running, parked or empty; the tables say what is mapped."""
    rows, current, handles = pool.rows, driver._mappings, pool.pages._handles.tolist()
    running = pool.row_of_slot[pool.row_of_slot != 0].tolist()
    states = sorted([*running, *rows._parked, *rows._empty])
    if states != list(range(1, rows.num_rows)):
        _require(False, "rows running", running, "parked", [*rows._parked], "empty", rows._empty)
    _require(rows._unfinished.keys().isdisjoint(running), "mapped ahead", rows._unfinished, "and running", running)
    at_row, at_position = np.nonzero(rows.mapped)
    shown = rows.mapped[at_row, at_position].tolist()
    places = (at_row * rows.max_pages + at_position).tolist()
    base, page_bytes = rows.window_base, rows.page_bytes
    for place, page in zip(places, shown, strict=True):
        mapping = current.get(base + place * page_bytes)
        if mapping is None or mapping.allocation is not driver._allocations.get(handles[page]):
            _require(False, "row", place // rows.max_pages, "does not map page", page, "at", place % rows.max_pages)
        if place not in rows._mappers.get(page, ()):
            _require(False, "the index lacks row", place // rows.max_pages, "for page", page)
    num_indexed = sum(map(len, rows._mappers.values()))
    _require(num_indexed == len(places), "the index holds", num_indexed, "of", len(places), "mappings")
    num_mapped = len(places) + rows.max_pages
    _require(rows.num_mappings == num_mapped, "the rows count", rows.num_mappings, "of", num_mapped, "mappings")
    occupied = rows.mapped != 0
    _require(not occupied[rows._empty].any(), "an empty row is not empty")
    high = np.where(occupied.any(axis=1), rows.max_pages - occupied[:, ::-1].argmax(axis=1), 0)
    _require(np.array_equal(high, rows._high), "the highest mapped positions are not those noted")


def _check_requests(pool: VTensorPool) -> None:
    """A running row shows what its request wants, or a fenced duplicate of it."""
    pages, rows = pool.pages, pool.rows
    for slot in np.flatnonzero(pool.row_of_slot).tolist():
        row, synced = int(pool.row_of_slot[slot]), int(pool.num_synced[slot])
        wanted = pool.wanted[slot, : pool.num_wanted[slot]]
        _require(not pages.is_free[wanted].any(), "slot", slot, "wants a free page")
        for position in np.flatnonzero(rows.mapped[row, :synced] != wanted[:synced]).tolist():
            duplicate = int(rows.mapped[row, position])
            is_known = rows._duplicates.get(row, {}).get(position) == duplicate and duplicate in pages.fenced
            _require(is_known, "row", row, "shows page", duplicate, "at", position, "in place of", wanted[position])
    open_slots = np.flatnonzero(pool.row_of_slot).tolist()
    having = Counter(page for slot in open_slots for page in pool.wanted[slot, : pool.num_wanted[slot]].tolist())
    _require(pool.num_open == len(open_slots), pool.num_open, "requests are said to be open, not", len(open_slots))
    kept = {page: int(pool.requests_of_pages[page]) for page in np.flatnonzero(pool.requests_of_pages).tolist()}
    _require(kept == having, "requests are counted that have pages:", kept, "not", dict(having))
    fenced = sorted(page for duplicates in rows._duplicates.values() for page in duplicates.values())
    _require(fenced == sorted(pages.fenced), "read as duplicates", fenced, "and fenced", sorted(pages.fenced))
