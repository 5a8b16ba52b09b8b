"""The pages of the pool: which are backed by physical memory, which are free, and where their home is.

A page id is what SGLang knows (slot = page_id * page_tokens + offset). Its home address is fixed; physical memory is
created at its first use and mapped there for as long as the page is backed. Page 0 takes what padded tokens write: it
is always backed and never handed out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch

from sgl_vtensor.core.layout import KVLayout, kv_views
from sgl_vtensor.errors import DriverError, OutOfMemory, VTensorError
from sgl_vtensor.vmm.driver import VmmDriver

PADDING_PAGE = 0


def _give_up(_: DriverError) -> bool:
    return False


def _ignore(_: DriverError) -> None:
    return


class Pages:
    """``num_pages`` usable pages with ids ``[1, num_pages]``, and the padding page 0.

    A page is in one of four states: *in use*; *free and backed*; *free and unbacked*; or *fenced*: free in the books,
    but a running row still reads it as a duplicate, so it is handed out last (``Rows.release_duplicates``).
    """

    def __init__(self, driver: VmmDriver, layout: KVLayout, num_pages: int, *, limit_pages: int | None = None) -> None:
        self.driver = driver
        self.layout = layout
        self.num_pages = num_pages
        self.limit_pages = num_pages if limit_pages is None else limit_pages
        """Pages that may be backed, the padding page not counted. It may move below what is backed at any time."""
        self.margin_bytes = 0
        """Free memory of the device that is left to others."""
        self.agreed_pages: int | None = None
        """What the ranks of one server agreed that each of them can have in use; None: this rank decides alone."""
        self.on_refusal: Callable[[DriverError], bool] = _give_up
        """Called when the driver refuses memory that the limit allows: true to try again, false to do without."""
        self.on_blind: Callable[[DriverError], None] = _ignore
        """Called when the driver cannot say how much memory is free: it is taken for enough until it refuses some."""
        self.home_bytes = (num_pages + 1) * layout.page_bytes
        self.home_base = driver.reserve(self.home_bytes)
        self._handles = np.zeros(num_pages + 1, dtype=np.uint64)
        self.backed = np.zeros(num_pages + 1, dtype=bool)
        self.is_free = np.zeros(num_pages + 1, dtype=bool)
        self._free_backed: OrderedDict[int, int] = OrderedDict()  # page -> epoch at which it was freed
        self._free_unbacked = list(range(num_pages, 0, -1))
        self.fenced: OrderedDict[int, None] = OrderedDict()
        self._closed = False
        self.num_created = self.num_released = 0
        """Pages that were given memory so far, and that gave theirs back; the padding page is not counted."""
        self.num_taken = 0
        """Pages that were handed out so far."""
        self.fresh: list[int] = []
        """Backed since the last launch: to be zeroed on the forward stream before anything reads them."""
        self.freed: list[int] | None = None
        """Set to a list to be told which pages were freed (debug mode)."""
        self.is_free[1:] = True
        try:
            self._back(PADDING_PAGE)
            self.num_created = 0
        except VTensorError:
            self.close()
            raise

    def home(self, page: int) -> int:
        return self.home_base + page * self.layout.page_bytes

    def handle(self, page: int) -> int:
        """The driver's handle of a backed page."""
        return int(self._handles[page])

    @property
    def num_available(self) -> int:
        """Pages that are not in use."""
        return len(self._free_backed) + len(self._free_unbacked) + len(self.fenced)

    @property
    def num_free_backed(self) -> int:
        return len(self._free_backed)

    @property
    def num_backed(self) -> int:
        """Pages with physical memory, as the limit counts them: the padding page is not among them."""
        return self.num_pages - len(self._free_unbacked)

    @property
    def num_in_use(self) -> int:
        return self.num_pages - self.num_available

    def tensor(self) -> torch.Tensor:
        """The whole home range as flat bytes. Only backed pages may be touched."""
        return self.driver.tensor(self.home_base, self.home_bytes)

    def home_views(self, layer: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer at the pages' homes: ``[(num_pages + 1) * page_tokens, kv_heads, head_dim]``, strided.

        This is where keys and values are written, and what a paged backend reads. Only backed pages may be touched.
        """
        num_tokens = (self.num_pages + 1) * self.layout.page_tokens
        return kv_views(self.tensor(), self.layout, layer, dtype, (num_tokens,), (self.layout.token_stride_bytes,))

    def most_in_use(self, *, beyond_limit: bool = False) -> int:
        """How many pages can be in use at once as things stand: by the pool's size, the limit, and the memory there is.

        It may be less than what is in use.
        """
        most = self._allowed(beyond_limit)
        if self.agreed_pages is not None or self.num_backed >= most:
            return most
        possible = self.possible()
        return most if possible is None else min(most, possible)

    def free_bytes(self) -> int | None:
        """The device's free memory; None: the driver cannot say, and ``on_blind`` has been told why."""
        try:
            return self.driver.memory_info()[0]
        except DriverError as error:
            self.on_blind(error)
            return None

    def possible(self) -> int | None:
        """How many pages the pool's size and the device's free memory, less the margin, would let be backed now.

        None where the driver cannot say.
        """
        free_bytes = self.free_bytes()
        if free_bytes is None:
            return None
        more = max(0, free_bytes - self.margin_bytes) // self.layout.page_bytes
        return min(self.num_pages, self.num_backed + more)

    def _allowed(self, beyond_limit: bool) -> int:
        most = self.num_pages if beyond_limit else min(self.limit_pages, self.num_pages)
        return most if self.agreed_pages is None else min(most, self.agreed_pages)

    def secure(self, num_pages: int, *, beyond_limit: bool = False) -> bool:
        """Back free pages until ``num_pages`` of them can be taken without asking the driver for memory.

        Returns False where the limit or the driver does not allow it; what could be backed stays backed.

        Raises:
            DriverError: ``on_refusal`` made it the caller's affair.
        """
        if self.num_in_use + num_pages > self._allowed(beyond_limit):
            return False
        missing = num_pages - len(self._free_backed)
        if missing <= 0:
            return True
        room = missing
        if self.agreed_pages is None:
            # Without a margin the driver itself says when memory ends.
            most = self.most_in_use(beyond_limit=beyond_limit) if self.margin_bytes else self._allowed(beyond_limit)
            room = max(0, most - self.num_backed)
        room = min(missing, room, len(self._free_unbacked))
        while room > 0:
            try:
                self._back_one()
            except DriverError as error:
                if not self.on_refusal(error):
                    return False
                continue
            room -= 1
        return num_pages <= len(self._free_backed)

    def prepare(self, num_pages: int) -> None:
        """Back free pages until so many are ready, as far as the limit and the device's free memory go.

        Nobody needs them yet, so ``on_refusal``, which may wait, is not asked.

        Raises:
            DriverError: the driver refused one; those before it are ready.
        """
        room = min(num_pages - len(self._free_backed), self._allowed(False) - self.num_backed)
        if room > 0 and self.margin_bytes and (possible := self.possible()) is not None:
            room = min(room, possible - self.num_backed)
        for _ in range(min(room, len(self._free_unbacked))):
            self._back_one()

    def take_many(self, num_pages: int) -> list[int]:
        """Take pages out of the free ones: backed ones first, the longest free first.

        Raises:
            OutOfMemory: there are too few; nothing was taken. A caller secures them before it commits itself; those
                that are secured can be taken whatever the limit is.
        """
        if num_pages > len(self._free_backed) and not self.secure(num_pages):
            raise OutOfMemory(
                "cuMemCreate",
                "VTENSOR_NO_PAGES",
                f"{num_pages} pages are needed and {len(self._free_backed)} are ready; free pages or raise the limit",
            )
        taken = [self._free_backed.popitem(last=False)[0] for _ in range(num_pages)]
        self.is_free[taken] = False
        self.num_taken += num_pages
        return taken

    def take(self, page: int) -> bool:
        """Take this very page if it is free and backed."""
        if self._free_backed.pop(page, None) is None:
            return False
        self.is_free[page] = False
        self.num_taken += 1
        return True

    def free(self, pages: Iterable[int], epoch: int) -> None:
        """Give pages back to the books. They stay backed; launches up to ``epoch`` may still read them."""
        for page in pages:
            if self.is_free[page] or page == PADDING_PAGE:
                raise VTensorError(f"page {page} is freed twice, or was never handed out; please report this")
            self.is_free[page] = True
            self._free_backed[page] = epoch
            if self.freed is not None:
                self.freed.append(page)

    def fence(self, page: int) -> None:
        """Free a page in the books only: a running row still reads it."""
        if self.is_free[page]:
            raise VTensorError(f"page {page} is freed twice; please report this")
        self.is_free[page] = True
        self.fenced[page] = None

    def unfence(self, page: int, epoch: int) -> None:
        """The row that read the duplicate is done with it, or maps another page there."""
        del self.fenced[page]
        self._free_backed[page] = epoch
        if self.freed is not None:
            self.freed.append(page)

    def releasable(self, keep_pages: int, settled_epoch: int) -> Iterator[int]:
        """Free backed pages beyond ``keep_pages`` that no launch can read any more, the longest free first.

        They are looked for one by one, so that a few cost little where many are free; nothing may change meanwhile.
        """
        surplus = len(self._free_backed) - keep_pages
        settled = (page for page, epoch in self._free_backed.items() if epoch <= settled_epoch)
        return islice(settled, max(surplus, 0))

    def release(self, page: int) -> None:
        """Give a free page's physical memory back. It must not be mapped in any row (``Rows.forget``)."""
        if page not in self._free_backed:
            raise VTensorError(f"page {page} is not free and backed, so its memory cannot be released")
        self.driver.unmap(self.home(page), self.layout.page_bytes)
        del self._free_backed[page]
        self.backed[page] = False
        self.num_released += 1
        self._free_unbacked.append(page)
        self._drop_handle(page)

    def clear(self, pages: Iterable[int]) -> None:
        """Have these pages zeroed with the fresh ones, before anything of the next launch."""
        known = set(self.fresh)
        self.fresh += [page for page in pages if page not in known]

    def take_fresh(self, epoch: int) -> Sequence[int]:
        """Pages to zero before anything else of launch ``epoch``; the caller does it, on that launch's stream."""
        fresh, self.fresh = [page for page in self.fresh if self.backed[page]], []
        for page in fresh:
            if page in self._free_backed:
                self._free_backed[page] = epoch  # nobody has it, but its memory must outlast the zeroing
        return fresh

    def reset(self, epoch: int) -> None:
        """Everything is free again; backed pages stay backed."""
        for page in self.fenced:
            self._free_backed[page] = epoch
        self.fenced.clear()
        in_use = np.flatnonzero(~self.is_free[1:]) + 1
        for page in in_use.tolist():
            self._free_backed[page] = epoch
        self.is_free[1:] = True

    def close(self) -> None:
        """Unmap and release every page and give back the address range. Once done, a second call does nothing."""
        if self._closed:
            return
        for page in np.flatnonzero(self._handles).tolist():
            if self.backed[page]:
                self.driver.unmap(self.home(page), self.layout.page_bytes)
                self.backed[page] = False
            self._drop_handle(page)
        self.driver.free_reservation(self.home_base, self.home_bytes)
        self._closed = True

    def _back_one(self) -> None:
        page = self._free_unbacked[-1]
        self._back(page)
        self._free_unbacked.pop()
        self._free_backed[page] = 0

    def _back(self, page: int) -> None:
        page_bytes = self.layout.page_bytes
        if not self._handles[page]:
            self._handles[page] = self.driver.create(page_bytes)
        try:
            self.driver.map(self.home(page), self.handle(page), page_bytes, writable=True)
        except VTensorError:
            self._drop_handle(page)
            raise
        self.backed[page] = True
        self.num_created += 1
        self.fresh.append(page)

    def _drop_handle(self, page: int) -> None:
        """Release an unmapped page's memory. If the driver refuses, the handle stays and backs the page next time."""
        self.driver.release(self.handle(page))
        self._handles[page] = 0
