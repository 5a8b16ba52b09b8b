"""The pool: pages, rows, and the ledger that says which pages each request has.

The main path, once a scheduling step: ``open`` a request, ``grow`` it (secured before), ``ensure`` its row, launch,
``close`` it (its row retires), and ``drain`` what the launches have let go. A request is known by its *slot*, SGLang's
``req_pool_idx``; slot 0 is padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch

from sgl_vtensor.core.epochs import Epochs, Fence
from sgl_vtensor.core.layout import KVLayout, kv_views
from sgl_vtensor.core.pages import Pages
from sgl_vtensor.core.rows import PADDING_ROW, Rows
from sgl_vtensor.errors import ConfigError, DriverError, OutOfMemory, VTensorError
from sgl_vtensor.vmm.driver import VmmDriver


@dataclass(frozen=True)
class PoolStats:
    """One look at the pool. The padding page is left out of all of it."""

    num_pages: int
    pages_backed: int
    pages_free_backed: int
    pages_in_use: int
    pages_shared: int
    pages_running: int
    """Pages that running requests have, each counted once."""
    pages_seen: int
    """The same, counted as often as it is seen: seen / running is what sharing saves."""
    pages_fenced: int
    pages_created: int
    """Pages that were given memory so far; less those released, it is what is backed."""
    pages_released: int
    rows_running: int
    rows_parked: int
    rows_prepared: int
    """How often a parked row came to show all of a prefix that a waiting request has."""
    mappings: int
    mappings_ahead: int
    """Made so far for requests that waited."""
    backed_bytes: int
    limit_pages: int
    limit_bytes: int
    driver_calls: dict[str, int]
    driver_seconds: dict[str, float]
    driver_errors: dict[str, int]
    memory_looks: int
    """How often the driver was asked how much memory is free."""
    memory_look_seconds: float


class VTensorPool:
    """KV memory of one rank: pages seen through rows of up to ``max_len_tokens`` tokens.

    Args:
        num_slots: the largest slot number; slots are ``[1, num_slots]``.
        num_rows: rows to keep, the padding row included; more than ``num_slots``, since parked rows are a cache.
        max_mappings: how many mappings the rows may hold in all (``None``: no limit but the driver's).
    """

    def __init__(
        self,
        pages: Pages,
        *,
        num_slots: int,
        max_len_tokens: int,
        num_rows: int | None = None,
        max_mappings: int | None = None,
    ) -> None:
        self.pages = pages
        self.driver: VmmDriver = pages.driver
        self.layout: KVLayout = pages.layout
        self.epochs = Epochs()
        max_pages = self.layout.num_pages(max_len_tokens)
        self.rows = Rows(
            self.pages,
            self.epochs,
            num_rows=num_rows or 2 * num_slots + 1,
            max_pages=max_pages,
            max_mappings=max_mappings,
        )
        self.num_slots = num_slots
        self.wanted = np.zeros((num_slots + 1, max_pages), dtype=np.int32)
        self.num_wanted = np.zeros(num_slots + 1, dtype=np.int64)
        self.num_synced = np.zeros(num_slots + 1, dtype=np.int64)
        self.row_of_slot = np.full(num_slots + 1, PADDING_ROW, dtype=np.int32)
        self.num_open = 0
        """Requests that are running."""
        self.num_opened = 0
        """Requests so far: as long as it stays, a slot is the same request's."""
        self.requests_of_pages: npt.NDArray[np.int32] = np.zeros(pages.num_pages + 1, dtype=np.int32)
        """[num_pages + 1]: how many running requests have each page. A request has none twice."""

    # The life of a request.

    def open(self, slot: int, prefix_pages: Sequence[int], len_tokens: int) -> int:
        """Give a new request its row; its first pages are the tree's. ``len_tokens`` is what it is about to have."""
        if self.is_open(slot):
            raise VTensorError(f"slot {slot} is open already; please report this")
        prefix = np.asarray(prefix_pages, dtype=np.int32)
        row = self.rows.acquire(prefix, self.layout.num_pages(len_tokens))
        self.wanted[slot, : len(prefix)] = prefix
        self.num_wanted[slot] = len(prefix)
        self.num_synced[slot] = 0
        self.row_of_slot[slot] = row
        self.rows.claimed[row] = len(prefix)
        self.num_open += 1
        self.num_opened += 1
        self.requests_of_pages[prefix] += 1
        return row

    def is_open(self, slot: int) -> bool:
        return bool(self.row_of_slot[slot])

    def grow(self, slots: Sequence[int], lens_tokens: Sequence[int], *, beyond_limit: bool = False) -> bool:
        """Give each request pages for so many tokens. All or nothing.

        A free page that a row maps already at the place where it is needed is taken first: it costs no driver call.

        Args:
            beyond_limit: the scheduler has committed itself to these tokens: only the pool's size bounds them.

        Returns False where there are too few pages; then nothing has changed.
        """
        needs: list[tuple[int, int]] = []  # (slot, position)
        for slot, len_tokens in zip(slots, lens_tokens, strict=True):
            stop = self.layout.num_pages(len_tokens)
            if stop > self.rows.max_pages:
                raise VTensorError(
                    f"a request of {len_tokens} tokens does not fit a row of "
                    f"{self.rows.max_pages * self.layout.page_tokens}; please report this"
                )
            needs.extend((slot, position) for position in range(int(self.num_wanted[slot]), stop))
        if not needs:
            return True
        if not self.secure(len(needs), beyond_limit=beyond_limit):
            return False
        rest: list[tuple[int, int]] = []
        for slot, position in needs:
            page = self.rows.hint(int(self.row_of_slot[slot]), position)
            if page and self.pages.take(page):
                self.wanted[slot, position] = page
            else:
                rest.append((slot, position))
        for (slot, position), page in zip(rest, self.pages.take_many(len(rest)), strict=True):
            self.wanted[slot, position] = page
        self.requests_of_pages[self.wanted[tuple(zip(*needs, strict=True))]] += 1
        for slot, position in needs:
            self.num_wanted[slot] = position + 1
            self.rows.claimed[self.row_of_slot[slot]] = position + 1
        return True

    def ensure(self, slots: npt.ArrayLike) -> int:
        """Map every request's row to all pages that it has; returns how many positions changed.

        Raises:
            DriverError: a mapping was refused. SGLang has committed itself by now, so the server must stop.
        """
        changed = 0
        for slot in self._behind(slots):
            stop = int(self.num_wanted[slot])
            row, start = int(self.row_of_slot[slot]), int(self.num_synced[slot])
            changed += self.rows.ensure(row, self.wanted[slot], start, stop)
            self.num_synced[slot] = stop
        return changed

    def map_ahead(self, prefixes: Sequence[Sequence[int]], *, at_most: int) -> int:
        """Map what requests that wait will find in the tree, with ``at_most`` driver calls; the first comes first.

        It promises nothing: the tree may drop the pages, and another request may take the row. No page gets memory.

        Returns how many positions of parked rows were mapped.

        Raises:
            OutOfMemory: the driver has no mapping left; without these the launch maps them.
        """
        wanted = [np.asarray(prefix, dtype=np.int32) for prefix in prefixes if prefix]
        if any(self.pages.is_free[prefix].any() for prefix in wanted):
            raise VTensorError("a free page is to be mapped ahead; please report this")
        return self.rows.map_ahead(wanted, at_most)

    def count_changes(self, slots: npt.ArrayLike) -> int:
        """How many positions ``ensure`` would have to map now."""
        changes = 0
        for slot in self._behind(slots):
            span = slice(int(self.num_synced[slot]), int(self.num_wanted[slot]))
            changes += int(np.count_nonzero(self.rows.mapped[self.row_of_slot[slot], span] != self.wanted[slot, span]))
        return changes

    def is_synced(self, slots: npt.ArrayLike) -> bool:
        """Whether the rows of these requests show all pages that they have."""
        return not self._behind(slots)

    def _behind(self, slots: npt.ArrayLike) -> list[int]:
        """The requests among these whose rows may lack pages."""
        asked = np.asarray(slots, dtype=np.int64)
        behind: list[int] = asked[self.num_synced[asked] < self.num_wanted[asked]].tolist()
        return behind

    def adopt(self, slot: int, start: int, pages: Sequence[int]) -> list[int]:
        """The tree keeps its own copies of ``[start, start + len(pages))``: the request uses those from now on.

        The request's duplicates go back to the books, but a launch may still read them through the row, so they are
        fenced until the row retires (design: wall W1).

        Returns the positions that changed.
        """
        row = int(self.row_of_slot[slot])
        changed: list[int] = []
        duplicates: list[int] = []
        for position, page in enumerate(pages, start):
            duplicate = int(self.wanted[slot, position])
            if duplicate == page:
                continue
            self.wanted[slot, position] = page
            changed.append(position)
            duplicates.append(duplicate)
            if position < self.num_synced[slot]:
                self.rows.keep_duplicate(row, position, duplicate)
            else:
                self.free([duplicate])
        if changed:
            self.requests_of_pages[duplicates] -= 1
            self.requests_of_pages[self.wanted[slot, changed]] += 1
        return changed

    def pages_of(self, slot: int, start: int, stop: int) -> list[int]:
        """The request's pages at positions ``[start, stop)``."""
        if not 0 <= start <= stop <= self.num_wanted[slot]:
            raise VTensorError(f"slot {slot} has {self.num_wanted[slot]} pages, not [{start}, {stop})")
        pages: list[int] = self.wanted[slot, start:stop].tolist()
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Give pages back that a request or the tree owned. Launches under way may still use them."""
        self.pages.free(pages, self.epochs.launched)

    def close(self, slot: int) -> None:
        """The request has ended and its pages have been given back or kept by the tree: its row retires."""
        row = int(self.row_of_slot[slot])
        if row == PADDING_ROW:
            return
        self.num_open -= 1
        self.requests_of_pages[self.wanted[slot, : self.num_wanted[slot]]] -= 1
        self.row_of_slot[slot] = PADDING_ROW
        self.num_wanted[slot] = 0
        self.num_synced[slot] = 0
        self.rows.retire(row)

    # Memory.

    def secure(self, num_pages: int, *, beyond_limit: bool = False) -> bool:
        """Make sure that ``num_pages`` pages can be had without any further driver memory.

        Where only fenced duplicates are left, waits for the launch under way and maps the tree's pages in their place.
        """
        if self.pages.secure(num_pages, beyond_limit=beyond_limit):
            return True
        if not self.pages.fenced:
            return False
        self.epochs.settle(self.epochs.launched)
        wanted = {int(row): self.wanted[slot] for slot, row in enumerate(self.row_of_slot) if row != PADDING_ROW}
        try:
            self.rows.release_duplicates(wanted)
        except DriverError as error:
            self.num_synced[:] = 0  # a row may lack a page: its next ensure looks at all of it
            if isinstance(error, OutOfMemory):
                return False
            raise
        return self.pages.secure(num_pages, beyond_limit=beyond_limit)

    def prepare(self, num_pages: int) -> None:
        """Back free pages ahead of need until there are so many, as far as that goes at once and without a wait.

        Raises:
            DriverError: the driver refused; as many as were backed before are there.
        """
        self.pages.prepare(num_pages)

    def shrink(self, keep_pages: int, *, at_most: int | None = None) -> int:
        """Release free pages beyond ``keep_pages`` that no launch can read, ``at_most`` so many; returns how many."""
        releasable = self.pages.releasable(keep_pages, self.epochs.settled)
        chosen = list(islice(filter(self.rows.can_forget, releasable), at_most))
        for page in chosen:
            self.rows.forget(page)
            self.pages.release(page)
        return len(chosen)

    def unmap_parked(self) -> int:
        """Unmap every parked row that no launch can read; returns how many mappings are gone."""
        return self.rows.unmap_parked(self.rows.num_mappings)

    def set_limit(self, num_pages: int) -> None:
        """Let so many pages be backed. What is backed beyond it goes by ``shrink``, as it becomes free.

        Raises:
            ConfigError: the pool has not so many pages, or none is left.
        """
        if not 1 <= num_pages <= self.pages.num_pages:
            raise ConfigError(f"a limit of {num_pages} pages is not between 1 and {self.pages.num_pages}; choose one")
        self.pages.limit_pages = num_pages

    @property
    def pages_beyond_limit(self) -> int:
        """Backed pages that the limit does not allow."""
        return max(0, self.pages.num_backed - self.pages.limit_pages)

    # Launches.

    def clear(self, pages: Sequence[int]) -> None:
        """Have pages zeroed before the next launch, of which the requests that they were given to fill but a part.

        A kernel that reads whole tiles reads behind a request's last token, and what another request left there may
        be NaN: times a probability of 0 that is NaN.
        """
        self.pages.clear(pages)

    def take_fresh(self) -> Sequence[int]:
        """Pages that the next launch must zero before anything else, on its own stream."""
        return self.pages.take_fresh(self.epochs.launched + 1)

    def launch(self, fence: Fence | None) -> None:
        """A forward pass that may read every running row has been queued; ``fence`` says when it has finished."""
        self.epochs.launch(fence)

    def drain(self, *, in_flight: int) -> None:
        """All launches but the newest ``in_flight`` have finished, as the scheduler knows."""
        self.epochs.settle(self.epochs.launched - in_flight)

    def reset(self) -> None:
        """Forget every request and free every page; nothing is running. Mappings and memory stay as a cache."""
        self.epochs.settle(self.epochs.launched)
        for slot in np.flatnonzero(self.row_of_slot).tolist():
            self.close(slot)
        self.pages.reset(self.epochs.launched)

    def shutdown(self) -> None:
        """Give everything back to the driver."""
        self.epochs.settle(self.epochs.launched)
        self.rows.close()
        self.pages.close()

    # Views.

    def row_views(self, layer: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer as the rows show them: ``[num_rows, max_tokens, kv_heads, head_dim]``, strided.

        Only positions that ``ensure`` has mapped may be read; nothing may be written.
        """
        layout, rows = self.layout, self.rows
        shape = (rows.num_rows, rows.max_pages * layout.page_tokens)
        return kv_views(rows.tensor(), layout, layer, dtype, shape, (rows.row_bytes, layout.token_stride_bytes))

    # Figures.

    def stats(self) -> PoolStats:
        pages, rows, having = self.pages, self.rows, self.requests_of_pages
        return PoolStats(
            num_pages=pages.num_pages,
            pages_backed=pages.num_backed,
            pages_free_backed=pages.num_free_backed,
            pages_in_use=pages.num_in_use,
            pages_shared=int(np.count_nonzero(having > 1)),
            pages_running=int(np.count_nonzero(having)),
            pages_seen=int(having.sum()),
            pages_fenced=len(pages.fenced),
            pages_created=pages.num_created,
            pages_released=pages.num_released,
            rows_running=rows.num_running,
            rows_parked=rows.num_parked,
            rows_prepared=rows.rows_prepared,
            mappings=rows.num_mappings,
            mappings_ahead=rows.mappings_ahead,
            backed_bytes=pages.num_backed * self.layout.page_bytes,
            limit_pages=pages.limit_pages,
            limit_bytes=pages.limit_pages * self.layout.page_bytes,
            driver_calls=dict(self.driver.calls),
            driver_seconds=dict(self.driver.seconds),
            driver_errors=dict(self.driver.errors),
            memory_looks=self.driver.looks.count,
            memory_look_seconds=self.driver.looks.seconds,
        )
