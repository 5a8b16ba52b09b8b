"""Rows: the virtual ranges in which requests see their pages side by side, kept as a cache of mappings.

Row r is ``[window_base + r * row_bytes, + row_bytes)``; its position p holds page ``mapped[r, p]``, or nothing (0).
A row whose request has ended stays mapped (*parked*), so that a later request with the same pages finds them there.
A parked mapping is never ownership: what a position should hold is decided by the ledger, and ``ensure`` makes it so.
Row 0 belongs to padding: all its positions are mapped to page 0, for ever.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch

from sgl_vtensor.core.epochs import Epochs
from sgl_vtensor.core.pages import PADDING_PAGE, Pages
from sgl_vtensor.errors import OutOfMemory, VTensorError

PADDING_ROW = 0
WINDOW_BYTES_MAX = 100 << 40
"""Address space for all rows: what a 47-bit address space leaves beside everything else."""
MAX_AGREEING = 8
MAX_OLDEST = 4
MAX_SCANNED = 256
MAX_UNFINISHED = 4
MAX_CALLS_A_MAPPING = 2
"""What was mapped in its place goes first."""

PageArray = npt.NDArray[np.int32]


class Rows:
    """``num_rows`` rows, the padding row included, of ``max_pages`` positions each."""

    def __init__(
        self, pages: Pages, epochs: Epochs, *, num_rows: int, max_pages: int, max_mappings: int | None = None
    ) -> None:
        self.pages = pages
        self.epochs = epochs
        self.driver = pages.driver
        self.page_bytes = pages.layout.page_bytes
        self.num_rows = num_rows
        self.max_pages = max_pages
        self.max_mappings = max_mappings
        self.row_bytes = max_pages * self.page_bytes
        self.window_bytes = num_rows * self.row_bytes
        self.window_base = self.driver.reserve(self.window_bytes)
        self.mapped = np.zeros((num_rows, max_pages), dtype=np.int32)
        self.claimed = np.zeros(num_rows, dtype=np.int64)
        """Positions that a running row's request has had; no launch of its reads behind them."""
        self._high = np.zeros(num_rows, dtype=np.int64)  # positions [high, max_pages) hold nothing
        self._last_epoch = np.zeros(num_rows, dtype=np.int64)
        self._mappers: dict[int, dict[int, None]] = {}  # page -> the places (row * max_pages + position) that map it
        self._parked: OrderedDict[int, None] = OrderedDict()  # least recently parked first
        self._empty = list(range(num_rows - 1, PADDING_ROW, -1))
        self._duplicates: dict[int, dict[int, int]] = {}  # running row -> position -> fenced page it still reads
        self._unfinished: dict[int, None] = {}  # not running; a prefix was mapped ahead in part, the newest last
        self.mappings_ahead = 0
        self.rows_prepared = 0
        """How often a row came to show all of a prefix because the rest was mapped ahead."""
        self.num_mappings = 0
        self._closed = False
        try:
            for position in range(max_pages):
                self._map(PADDING_ROW, position, PADDING_PAGE)
        except VTensorError:
            self.close()
            raise

    def address(self, row: int, position: int = 0) -> int:
        return self.window_base + row * self.row_bytes + position * self.page_bytes

    def tensor(self) -> torch.Tensor:
        """All rows as flat bytes. Only mapped positions may be touched."""
        return self.driver.tensor(self.window_base, self.window_bytes)

    @property
    def num_parked(self) -> int:
        return len(self._parked)

    @property
    def num_running(self) -> int:
        return self.num_rows - 1 - len(self._parked) - len(self._empty)

    @property
    def num_free(self) -> int:
        """Rows that a new request can have."""
        return len(self._parked) + len(self._empty)

    def acquire(self, prefix: PageArray, num_pages: int) -> int:
        """Take the row that needs the fewest driver calls for ``prefix`` and then pages up to ``num_pages``.

        A row is worth the positions that agree with the prefix, and those behind it that map a free page (which is
        then handed out first), less the mappings of live pages that taking it would destroy. An empty row is worth 0.
        """
        row = self._best(prefix, num_pages) or next(iter(self._parked), 0)
        if not row:
            raise VTensorError("all rows are running; there must be more rows than requests (please report this)")
        self._take(row)
        # Its last tenant may still be read by a launch under way; nothing in it may change before that ends.
        if self._high[row] and self._last_epoch[row] > self.epochs.settled:
            self.epochs.settle(int(self._last_epoch[row]))
        return row

    def map_ahead(self, prefixes: Sequence[PageArray], at_most: int) -> int:
        """Map prefixes of requests that wait into parked rows, where ``acquire`` finds them; the first comes first.

        Each goes into the row that ``acquire`` would take for it now, so that no mapping is lost that would be kept
        otherwise; a row that shows all of one prefix is left to it. Nothing waits for a launch, and no other row gives
        its mappings: where ``max_mappings`` is reached nothing is mapped.

        Args:
            prefixes: pages in use, one array a request, none of them empty.
            at_most: driver calls.

        Returns how many positions were mapped.

        Raises:
            OutOfMemory: the driver has no mapping left. What was mapped stays right.
        """
        kept: set[int] = set()
        missing: list[PageArray] = []
        for prefix in prefixes:
            row = self._showing(prefix, kept)
            if row:
                kept.add(row)
            else:
                missing.append(prefix)
        before = self.mappings_ahead
        for prefix in missing:
            if at_most < MAX_CALLS_A_MAPPING or self._is_full:
                break
            row = self._best(prefix, len(prefix), kept)
            if row:
                kept.add(row)
                at_most -= self._prepare(row, prefix, at_most)
        return self.mappings_ahead - before

    def hint(self, row: int, position: int) -> int:
        """The page that this position maps now, 0 for none: worth allocating if it is free."""
        return int(self.mapped[row, position])

    def ensure(self, row: int, wanted: PageArray, start: int, stop: int) -> int:
        """Map positions ``[start, stop)`` of a row to the wanted pages; returns how many had to change.

        Positions at which a launch under way may read must not be among those that change: the caller passes only
        positions behind what has been launched, and duplicates are left alone.

        Raises:
            OutOfMemory: no mapping is left although all parked rows gave theirs. What was mapped stays right.
        """
        differs = np.flatnonzero(self.mapped[row, start:stop] != wanted[start:stop]) + start
        if differs.size == 0:
            return 0
        self._make_room(differs.size)
        duplicates = self._duplicates.get(row, {})
        changed = 0
        for position in differs.tolist():
            if position in duplicates:
                continue
            if self.mapped[row, position]:
                self._unmap(row, position)
            self._map(row, position, int(wanted[position]))
            changed += 1
        return changed

    def keep_duplicate(self, row: int, position: int, page: int) -> None:
        """The tree replaced this page by its own of equal content, but a launch may still read it through the row."""
        self.pages.fence(page)
        self._duplicates.setdefault(row, {})[position] = page

    def release_duplicates(self, wanted_of_row: dict[int, PageArray]) -> int:
        """Map what the tree wants in place of all duplicates and unfence them. No launch may be under way.

        Args:
            wanted_of_row: for each running row, which page each of its positions should map.

        Raises:
            DriverError: a mapping was refused. One row lacks the page at one position now: ``ensure`` all of it.
        """
        if self.epochs.settled < self.epochs.launched:
            raise VTensorError("duplicates are released while a launch may read them; settle the epochs first")
        released = 0
        for row, duplicates in list(self._duplicates.items()):
            for position, page in list(duplicates.items()):
                self._unmap(row, position)
                del duplicates[position]
                self.pages.unfence(page, self.epochs.launched)
                self._map(row, position, int(wanted_of_row[row][position]))
                released += 1
            del self._duplicates[row]
        return released

    def retire(self, row: int) -> None:
        """The request has ended: park the row. Launches under way may still read it."""
        epoch = self.epochs.launched
        self.claimed[row] = 0
        for page in self._duplicates.pop(row, {}).values():
            # Its next content is written by a later launch, in stream order behind the last read.
            self.pages.unfence(page, epoch)
        self._last_epoch[row] = epoch if self._high[row] else 0  # where nothing is shown nothing is read
        self._park(row)

    def forget(self, page: int) -> None:
        """Unmap a free page everywhere, so that its memory can be released. Its last launch must have settled."""
        for place in list(self._mappers.get(page, ())):
            row, position = divmod(place, self.max_pages)
            self._unmap(row, position)
            if row in self._parked and not self._high[row]:
                del self._parked[row]
                self._empty.append(row)

    def can_forget(self, page: int) -> bool:
        """Whether no launch under way can read the rows that map this page."""
        if self.epochs.settled == self.epochs.launched:
            return True
        for place in self._mappers.get(page, ()):
            row, position = divmod(place, self.max_pages)
            if row in self._parked:
                if self._last_epoch[row] > self.epochs.settled:
                    return False
            elif position < self.claimed[row]:
                return False
        return True

    def num_shown(self, row: int) -> int:
        """Positions from the start of a row behind which nothing is mapped."""
        return int(self._high[row])

    def parked(self, at_most: int) -> list[int]:
        """Parked rows, the newest first."""
        return list(islice(reversed(self._parked), max(0, at_most)))

    def duplicates(self) -> Iterator[tuple[int, int, int]]:
        """(page, row, position) of every fenced page."""
        for row, pages in self._duplicates.items():
            for position, page in pages.items():
                yield page, row, position

    def num_mapped(self, page: int) -> int:
        """In how many places of the rows a page is mapped."""
        return len(self._mappers.get(page, ()))

    def unmap_parked(self, num_mappings: int) -> int:
        """Unmap settled parked rows, the least recently parked first, until so many mappings are gone."""
        gone = 0
        for row in list(self._parked):
            if gone >= num_mappings:
                break
            if self._last_epoch[row] > self.epochs.settled:
                continue
            before = self.num_mappings
            for position in np.flatnonzero(self.mapped[row, : self._high[row]]).tolist():
                self._unmap(row, position)
            gone += before - self.num_mappings
            del self._parked[row]
            self._empty.append(row)
        return gone

    def close(self) -> None:
        """Unmap everything, the padding row too, and give back the address range. Once done, a second does nothing."""
        if self._closed:
            return
        for row in range(self.num_rows):
            for position in np.flatnonzero(self.mapped[row, : self._high[row]]).tolist():
                self._unmap(row, position)
        for position in reversed(range(self.num_mappings)):  # what is left is the padding row's
            self.driver.unmap(self.address(PADDING_ROW, position), self.page_bytes)
            self.num_mappings = position
        self.driver.free_reservation(self.window_base, self.window_bytes)
        self._closed = True

    def _take(self, row: int) -> None:
        """Take what ``_best`` has found, or any parked row."""
        self._unfinished.pop(row, None)
        if row in self._parked:
            del self._parked[row]
        else:
            self._empty.pop()

    def _park(self, row: int) -> None:
        if self._high[row]:
            self._parked[row] = None
        else:
            self._empty.append(row)

    def _prepare(self, row: int, prefix: PageArray, at_most: int) -> int:
        """Map the first positions that differ, as far as so many driver calls go; returns how many were made."""
        differs = np.flatnonzero(self.mapped[row, : len(prefix)] != prefix)
        if not differs.size:
            return 0
        self._take(row)
        calls_left = at_most
        try:
            for position in differs.tolist():
                shows = bool(self.mapped[row, position])
                if calls_left < 1 + shows or self._is_full:
                    break
                if shows:
                    self._unmap(row, position)
                self._map_once(row, position, int(prefix[position]))
                calls_left -= 1 + shows
                self.mappings_ahead += 1
            else:
                self.rows_prepared += 1
        finally:
            self._park(row)
            if not np.array_equal(self.mapped[row, : len(prefix)], prefix):
                self._unfinished[row] = None
                if len(self._unfinished) > MAX_UNFINISHED:
                    del self._unfinished[next(iter(self._unfinished))]
        return at_most - calls_left

    def _showing(self, prefix: PageArray, kept: Collection[int]) -> int:
        """The row that shows all of ``prefix`` and is worth most, if worth more than an empty one; 0: none."""
        best, worth = 0, 0
        for row in self._parked_at(int(prefix[-1]), len(prefix) - 1, kept):
            value = self._worth(row, prefix, len(prefix))
            if value > worth and np.array_equal(self.mapped[row, : len(prefix)], prefix):
                best, worth = row, value
        return best

    def _best(self, prefix: PageArray, num_pages: int, kept: Collection[int] = ()) -> int:
        """The row that ``acquire`` takes without a wait, except for those ``kept``; 0: none."""
        row, worth = (self._empty[-1], 0) if self._empty else (0, -(self.max_pages + 1))
        for candidate in self._candidates(prefix, kept):
            value = self._worth(candidate, prefix, num_pages)
            if value > worth:
                row, worth = candidate, value
        return row

    def _candidates(self, prefix: PageArray, kept: Collection[int]) -> list[int]:
        if not self._parked:  # always so where kernels read the homes: no row maps anything
            return []
        # What is mapped ahead in part must be found again: rows that agree longer may be worth less.
        more = [*islice(self._parked, MAX_OLDEST), *self._unfinished]
        return self._agreeing(prefix, kept) + [row for row in more if row in self._parked and self._is_ready(row, kept)]

    def _is_ready(self, row: int, kept: Collection[int]) -> bool:
        """Whether a parked row is read by no launch and not among those ``kept``."""
        return bool(self._last_epoch[row] <= self.epochs.settled) and row not in kept

    def _agreeing(self, prefix: PageArray, kept: Collection[int]) -> list[int]:
        """Parked rows that map the longest possible beginning of ``prefix``, by bisection.

        A page of the tree stands behind one path only, so a row that maps it there has mapped what precedes it.
        """
        found: list[int] = []
        low, high = 0, len(prefix)
        while low < high:
            middle = (low + high) // 2
            rows = self._parked_at(int(prefix[middle]), middle, kept)
            if rows:
                found, low = rows, middle + 1
            else:
                high = middle
        return found

    def _parked_at(self, page: int, position: int, kept: Collection[int]) -> list[int]:
        rows = []
        for place in islice(self._mappers.get(page, ()), MAX_SCANNED):
            row, at = divmod(place, self.max_pages)
            if at == position and row in self._parked and self._is_ready(row, kept):
                rows.append(row)
                if len(rows) == MAX_AGREEING:
                    break
        return rows

    def _worth(self, row: int, prefix: PageArray, num_pages: int) -> int:
        mapped = self.mapped[row, : self._high[row]]
        shared = min(len(prefix), len(mapped))
        differs = np.flatnonzero(mapped[:shared] != prefix[:shared])
        agreeing = int(differs[0]) if differs.size else shared
        tail = mapped[agreeing:]
        free = self.pages.is_free[tail]
        reusable = free[len(prefix) - agreeing : num_pages - agreeing] if agreeing == len(prefix) else free[:0]
        live = np.count_nonzero(tail) - np.count_nonzero(free)
        return agreeing + int(np.count_nonzero(reusable)) - int(live)

    @property
    def _is_full(self) -> bool:
        return self.max_mappings is not None and self.num_mappings >= self.max_mappings

    def _make_room(self, num_mappings: int) -> None:
        if self.max_mappings is None:
            return
        surplus = self.num_mappings + num_mappings - self.max_mappings
        if surplus > 0:
            self.unmap_parked(surplus)

    def _map(self, row: int, position: int, page: int) -> None:
        while True:
            try:
                return self._map_once(row, position, page)
            except OutOfMemory:
                if self.unmap_parked(1):
                    continue
                if self.epochs.settled == self.epochs.launched:
                    raise
                self.epochs.settle(self.epochs.launched)  # rows that retired since then give theirs, too

    def _map_once(self, row: int, position: int, page: int) -> None:
        self.driver.map(self.address(row, position), self.pages.handle(page), self.page_bytes, writable=False)
        self.num_mappings += 1
        if row == PADDING_ROW:
            return
        self.mapped[row, position] = page
        self._high[row] = max(self._high[row], position + 1)
        self._mappers.setdefault(page, {})[row * self.max_pages + position] = None

    def _unmap(self, row: int, position: int) -> None:
        self.driver.unmap(self.address(row, position), self.page_bytes)
        self.num_mappings -= 1
        page = int(self.mapped[row, position])
        places = self._mappers[page]
        del places[row * self.max_pages + position]
        if not places:
            del self._mappers[page]
        self.mapped[row, position] = 0
        if position + 1 == self._high[row]:
            left = np.flatnonzero(self.mapped[row, :position])
            self._high[row] = left[-1] + 1 if left.size else 0
