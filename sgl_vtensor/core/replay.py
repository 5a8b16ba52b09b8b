"""A trace, run again: the same calls on a pool of the same size in pages, each compared with what was recorded.

Only counts matter, so pages have as few bytes as the driver maps: the trace of an 80 GB server runs in little memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from sgl_vtensor.core.checks import InvariantBroken, check_tables
from sgl_vtensor.core.layout import KVLayout, plan_layout
from sgl_vtensor.core.pages import Pages
from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.core.trace import CALLS, Event, Header, Op, Raised, TraceReader, split_prefixes
from sgl_vtensor.errors import ConfigError, DriverError, OutOfMemory, VTensorError
from sgl_vtensor.vmm.base import DriverBase
from sgl_vtensor.vmm.host import HostDriver
from sgl_vtensor.vmm.null import NullDriver
from sgl_vtensor.vmm.proxy import DriverProxy

TREE = 0
"""Owner of a page that no request owns: SGLang's radix tree."""
PAGES_A_CHECK = 256
"""A pool of so many pages is looked at after each event, one of twice as many after every fourth one, ..."""
BUGS = (VTensorError, AssertionError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What an error of ours in the core may look like."""
CAPACITY_BYTES = 1 << 50


@dataclass
class Figures:
    """What a trace took: of the pool as recorded, or of another one.

    Attributes:
        pages_hit: pages of prefixes that requests found.
        pages_computed: pages that requests were given for tokens of their own.
        positions_hit: positions of rows that showed the right page already when they were needed.
        positions_mapped: those that did not.
        positions_ahead: positions of parked rows that were mapped for requests that waited.
        peak_pages_in_use: of requests and of cached prefixes, at most, at once.
        peak_pages_backed: pages with physical memory, the padding page left out.
        peak_mappings: of rows and homes together, that of the padding page included.
        page_bytes: of one page on the device that was recorded, or would be.
    """

    page_tokens: int
    num_rows: int
    page_bytes: int
    requests: int = 0
    launches: int = 0
    pages_hit: int = 0
    pages_computed: int = 0
    positions_hit: int = 0
    positions_mapped: int = 0
    positions_ahead: int = 0
    peak_pages_in_use: int = 0
    peak_pages_backed: int = 0
    peak_mappings: int = 0
    driver_calls: dict[str, int] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        """Physical memory at most, at once."""
        return self.peak_pages_backed * self.page_bytes

    def look(self, pool: VTensorPool) -> None:
        """Note the peaks."""
        self.peak_pages_in_use = max(self.peak_pages_in_use, pool.pages.num_in_use)
        self.peak_pages_backed = max(self.peak_pages_backed, pool.pages.num_backed)
        self.peak_mappings = max(self.peak_mappings, pool.rows.num_mappings + pool.pages.num_backed + 1)


@dataclass(frozen=True)
class Broken:
    """The first event that went wrong, and how."""

    event: Event
    what: str

    def __str__(self) -> str:
        return f"{self.event}: {self.what}"


@dataclass
class Result:
    """A trace that was replayed, to its end or to the event that broke."""

    figures: Figures
    driver: str
    check_every: int
    events: int = 0
    seconds: float = 0.0
    last_good: int = 0
    """The last event after which all tables were looked at and were right."""
    bytes_left_out: int = 0
    broken: Broken | None = None


def small_layout(page_tokens: int, granule_bytes: int) -> KVLayout:
    """The layout of the fewest bytes with that many tokens a page."""
    return plan_layout(
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        v_head_dim=1,
        itemsize=1,
        granule_bytes=granule_bytes,
        page_tokens=page_tokens,
    )


def real_layout(recorded: KVLayout, page_tokens: int) -> KVLayout:
    """What another page size would be on the device of the trace."""
    return plan_layout(
        num_layers=recorded.num_layers,
        num_kv_heads=recorded.num_kv_heads,
        head_dim=recorded.head_dim,
        v_head_dim=recorded.v_head_dim,
        itemsize=recorded.itemsize,
        granule_bytes=recorded.granule_bytes,
        page_tokens=page_tokens,
    )


def open_driver_for(header: Header) -> DriverBase:
    """The host driver; the null driver where the trace might need more mappings than Linux allows a process."""
    host = HostDriver(CAPACITY_BYTES)
    most = header.num_rows * -(-header.max_len_tokens // header.layout.page_tokens)
    if header.max_mappings is not None:
        most = min(most, header.max_mappings + header.num_slots * header.max_len_tokens // header.layout.page_tokens)
    if host.max_mappings is not None and 2 * (most + header.num_pages) > host.max_mappings:
        host.close()
        return NullDriver(host.granularity)
    return host


class ReplayDriver(DriverProxy):
    """Refuses what was refused, says what was said of free memory, and tells of every unmapping."""

    def __init__(self, inner: DriverBase, margin_bytes: int, page_bytes: int) -> None:
        super().__init__(inner)
        self.margin_bytes = margin_bytes
        self.page_bytes = page_bytes
        self.on_unmap: Callable[[int], None] = lambda address: None
        self.attempts = dict.fromkeys(CALLS, 0)
        """All calls by kind, refused ones included."""
        self.num_refused = 0
        self.begin(Event(0, Op.RESET, 0, []))

    def begin(self, event: Event) -> None:
        """The calls to come are those of ``event``."""
        self.counts = [0] * len(CALLS)
        self.refused = dict(event.refused)
        self.free_pages = iter(event.free_pages)

    def create(self, num_bytes: int) -> int:
        self._count(0)
        return super().create(num_bytes)

    def release(self, handle: int) -> None:
        self._count(1)
        super().release(handle)

    def map(self, address: int, handle: int, num_bytes: int, *, writable: bool) -> None:
        self._count(2)
        super().map(address, handle, num_bytes, writable=writable)

    def unmap(self, address: int, num_bytes: int) -> None:
        self._count(3)
        super().unmap(address, num_bytes)
        self.on_unmap(address)

    def memory_info(self) -> tuple[int, int]:
        free_pages = next(self.free_pages, None)
        if free_pages is None:
            raise InvariantBroken("the driver is asked for free memory more often than when this was recorded")
        if free_pages < 0:
            raise DriverError("memory_info", "RECORDED", "the driver could not say when the trace was recorded")
        free_bytes = self.margin_bytes + free_pages * self.page_bytes
        return free_bytes, free_bytes

    def _count(self, kind: int) -> None:
        self.counts[kind] += 1
        self.attempts[CALLS[kind]] += 1
        raised = self.refused.pop(sum(self.counts), None)
        if raised is not None:
            self.num_refused += 1
            error = OutOfMemory if raised == Raised.NO_MEMORY else DriverError
            raise error(CALLS[kind], "RECORDED", "the driver refused this call when the trace was recorded")


class Launches:
    """What launches under way may read, kept apart from the pool's own books; a launch ends when it is waited for."""

    def __init__(self, pool: VTensorPool) -> None:
        self.pool = pool
        self.launched = self.finished = 0
        self._row_launch = np.zeros(pool.rows.num_rows, dtype=np.int64)
        self._row_pages = np.zeros(pool.rows.num_rows, dtype=np.int64)
        self._page_launch = np.zeros(pool.pages.num_pages + 1, dtype=np.int64)

    def launch(self, *, fenced: bool) -> None:
        """Every running request may be in it: its row, as far as it is in step, and its pages' homes."""
        pool = self.pool
        self.launched += 1
        if not fenced:  # it has run
            pool.launch(None)
            self.finished = self.launched
            return
        slots = np.flatnonzero(pool.row_of_slot)
        rows = pool.row_of_slot[slots]
        self._row_launch[rows] = self.launched
        self._row_pages[rows] = pool.num_synced[slots]
        counts = pool.num_wanted[slots]
        width = int(counts.max(initial=0))
        self._page_launch[pool.wanted[slots, :width][np.arange(width) < counts[:, None]]] = self.launched
        pool.launch(Waited(self, self.launched))

    def zero(self, pages: list[int]) -> None:
        """The next launch writes these pages' homes."""
        self._page_launch[pages] = self.launched + 1

    def check_unmapped(self, address: int) -> None:
        """Raise InvariantBroken where a launch under way may touch what has just been unmapped."""
        pages, rows = self.pool.pages, self.pool.rows
        if 0 <= address - pages.home_base < pages.home_bytes:
            page = (address - pages.home_base) // pages.layout.page_bytes
            launch, what = int(self._page_launch[page]), f"the home of page {page}"
        else:
            row, offset = divmod(address - rows.window_base, rows.row_bytes)
            position = offset // rows.page_bytes
            launch, what = int(self._row_launch[row]), f"position {position} of row {row}"
            if position >= self._row_pages[row]:
                return
        if launch > self.finished:
            raise InvariantBroken(f"{what} was unmapped while launch {launch} may touch it")


@dataclass(frozen=True)
class Waited:
    """The fence of a launch that ends when it is waited for, and then all before it have ended, too."""

    launches: Launches
    launch: int

    def synchronize(self) -> None:
        self.launches.finished = max(self.launches.finished, self.launch)


class Replay:
    """A pool like the recorded one, and who owns its pages.

    Raises (from ``apply`` and ``check``):
        InvariantBroken: something does not hold, or came out otherwise than when it was recorded.
    """

    def __init__(self, header: Header, driver: DriverBase) -> None:
        self.header = header
        self.inner = driver
        layout = small_layout(header.layout.page_tokens, driver.granularity)
        self.driver = ReplayDriver(driver, layout.page_bytes, layout.page_bytes)
        self.pool = VTensorPool(
            Pages(self.driver, layout, header.num_pages),
            num_slots=header.num_slots,
            max_len_tokens=header.max_len_tokens,
            num_rows=header.num_rows,
            max_mappings=header.max_mappings,
        )
        self.pool.pages.on_refusal = self._on_refusal
        self.launches = Launches(self.pool)
        self.driver.on_unmap = self.launches.check_unmapped
        self.owner: dict[int, int] = {}
        """page -> the slot that has it, or TREE."""
        self._ending: set[int] = set()
        """Slots that have given pages back and are closed next; until then they want what they no longer have."""
        self._begun: set[int] = set()
        """Pages to be zeroed before the next launch, since requests fill but a part of them."""
        self.figures = Figures(header.layout.page_tokens, header.num_rows, header.layout.page_bytes)
        self._event = Event(0, Op.RESET, 0, [])
        self._steps: dict[Op, Callable[[Event], int]] = {
            Op.SETTINGS: self._settings,
            Op.OPEN: self._open,
            Op.GROW: self._grow,
            Op.ENSURE: self._ensure,
            Op.ADOPT: self._adopt,
            Op.FREE: self._free,
            Op.CLOSE: self._close,
            Op.SECURE: lambda event: self.pool.secure(event.args[0], beyond_limit=bool(event.args[1])),
            Op.PREPARE: lambda event: self.pool.prepare(event.args[0]) or 0,  # type: ignore[func-returns-value]
            Op.SHRINK: self._shrink,
            Op.CLEAR: self._clear,
            Op.FRESH: self._fresh,
            Op.LAUNCH: self._launch,
            Op.DRAIN: self._drain,
            Op.RESET: self._reset,
            Op.SHUTDOWN: self._shutdown,
            Op.UNMAP: lambda event: self.pool.unmap_parked(),
            Op.AHEAD: self._ahead,
        }

    def apply(self, event: Event) -> None:
        """Do what was done, and compare what comes of it."""
        self._event = event
        self.driver.begin(event)
        try:
            outcome = self._steps[event.op](event)
        except InvariantBroken:
            raise
        except DriverError as error:
            outcome = Raised.of(error)
            if outcome != event.outcome:
                raise
        _same("it returned", int(outcome), event.outcome)
        _same("driver calls (create, release, map, unmap)", self.driver.counts, event.calls)
        self.figures.look(self.pool)

    def check(self) -> bool:
        """Look at all tables; False: not now, a request is just ending."""
        if self._ending:
            return False
        if self._event.op != Op.SHUTDOWN:
            check_tables(self.pool, self.inner, self.owner)
        return True

    def finish(self) -> Figures:
        """The figures so far."""
        self.figures.driver_calls = self.driver.attempts | {"refused": self.driver.num_refused}
        return self.figures

    def _settings(self, event: Event) -> int:
        limit, agreed, has_margin = event.args
        pages = self.pool.pages
        pages.limit_pages = limit
        pages.agreed_pages = None if agreed < 0 else agreed
        pages.margin_bytes = self.driver.margin_bytes if has_margin else 0
        return 0

    def _open(self, event: Event) -> int:
        slot, len_tokens, *prefix = event.args
        for page in prefix:
            if page not in self.owner:
                raise InvariantBroken(f"a request begins with page {page}, which nobody has")
        row = self.pool.open(slot, prefix, len_tokens)
        self.figures.requests += 1
        self.figures.pages_hit += len(prefix)
        return row

    def _grow(self, event: Event) -> int:
        beyond_limit, count, *rest = event.args
        slots, lens, recorded = rest[:count], rest[count : 2 * count], rest[2 * count :]
        pool, page_tokens = self.pool, self.header.layout.page_tokens
        starts = [int(pool.num_wanted[slot]) for slot in slots]
        if not pool.grow(slots, lens, beyond_limit=bool(beyond_limit)):
            return 0
        pages: list[int] = []
        for slot, start, len_tokens in zip(slots, starts, lens, strict=True):
            new = pool.wanted[slot, start : pool.num_wanted[slot]].tolist()
            num_pages = max(start, (len_tokens + page_tokens - 1) // page_tokens)
            if pool.num_wanted[slot] != num_pages:
                raise InvariantBroken(
                    f"slot {slot} has {pool.num_wanted[slot]} pages for {len_tokens} tokens, not {num_pages}"
                )
            for page in new:
                if page in self.owner:
                    raise InvariantBroken(f"page {page} is handed out to slot {slot} while {self._who(page)} has it")
                self.owner[page] = slot
            pages += new
        _same("pages handed out", pages, recorded)
        self.figures.pages_computed += len(pages)
        return 1

    def _ensure(self, event: Event) -> int:
        pool = self.pool
        positions = int((pool.num_wanted[event.args] - pool.num_synced[event.args]).sum())
        changed = pool.ensure(event.args)
        self.figures.positions_mapped += changed
        self.figures.positions_hit += positions - changed
        return changed

    def _ahead(self, event: Event) -> int:
        at_most, prefixes = split_prefixes(event.args)
        for page in {page for prefix in prefixes for page in prefix}:
            if self.owner.get(page) != TREE:
                raise InvariantBroken(f"page {page} is mapped ahead, and it is not the tree's")
        mapped = self.pool.map_ahead(prefixes, at_most=at_most)
        self.figures.positions_ahead += mapped
        return mapped

    def _adopt(self, event: Event) -> int:
        slot, start, *pages = event.args
        before = self.pool.wanted[slot, start : start + len(pages)].tolist()
        changed = self.pool.adopt(slot, start, pages)
        for mine, kept in zip(before, pages, strict=True):
            if kept not in self.owner:
                raise InvariantBroken(f"the tree keeps page {kept}, which nobody has")
            if mine != kept:
                del self.owner[mine]
            self.owner[kept] = TREE
        return len(changed)

    def _free(self, event: Event) -> int:
        self.pool.free(event.args)
        for page in event.args:
            owner = self.owner.pop(page, None)
            if owner is None:
                raise InvariantBroken(f"page {page} is freed, and nobody had it")
            if owner != TREE:
                self._ending.add(owner)
        return 0

    def _close(self, event: Event) -> int:
        [slot] = event.args
        pages = self.pool.wanted[slot, : self.pool.num_wanted[slot]].tolist()
        lost = [page for page in pages if self.owner.get(page) == slot]
        if lost:
            raise InvariantBroken(f"slot {slot} is closed, and its pages {lost} are neither freed nor the tree's")
        self.pool.close(slot)
        self._ending.discard(slot)
        return 0

    def _shrink(self, event: Event) -> int:
        keep, at_most = event.args
        return self.pool.shrink(keep, at_most=None if at_most < 0 else at_most)

    def _clear(self, event: Event) -> int:
        kept = [page for page in event.args if self.owner.get(page, TREE) == TREE]
        if kept:
            raise InvariantBroken(f"pages {kept} are to be zeroed, and no request alone has them")
        self._begun.update(event.args)
        self.pool.clear(event.args)
        return 0

    def _fresh(self, event: Event) -> int:
        fresh = list(self.pool.take_fresh())
        self._begun.difference_update(fresh)
        self.launches.zero(fresh)
        return len(fresh)

    def _launch(self, event: Event) -> int:
        if self._ending:
            raise InvariantBroken(f"slots {sorted(self._ending)} are launched, and their pages have been freed")
        stale = [page for page in sorted(self._begun) if self.pool.pages.backed[page]]
        self._begun.clear()
        if stale:
            raise InvariantBroken(f"pages {stale} were to be zeroed before a launch, and were not")
        self.launches.launch(fenced=bool(event.args[0]))
        self.figures.launches += 1
        return 0

    def _drain(self, event: Event) -> int:
        self.pool.drain(in_flight=event.args[0])
        return 0

    def _reset(self, event: Event) -> int:
        self.pool.reset()
        self.owner.clear()
        self._ending.clear()
        return 0

    def _shutdown(self, event: Event) -> int:
        self.driver.on_unmap = lambda address: None
        self.pool.shutdown()
        inner = self.inner
        left = inner.num_mappings, inner.physical_bytes, inner.num_handles, inner.num_reservations
        _same("mappings, bytes, handles and reservations left", left, (0, 0, 0, 0))
        return 0

    def _who(self, page: int) -> str:
        return f"slot {self.owner[page]}" if self.owner[page] != TREE else "the tree"

    def _on_refusal(self, error: DriverError) -> bool:
        """As the recorded server: alone it did without; a rank waited for a neighbour unless it gave up."""
        if self.pool.pages.agreed_pages is None:
            return False
        if self._event.outcome == Raised.NO_MEMORY and not self.driver.refused:
            raise error
        return True


def _same(what: str, found: object, recorded: object) -> None:
    if found != recorded:
        raise InvariantBroken(f"{what}: {found}, and {recorded} when it was recorded")


def check_spacing(num_pages: int) -> int:
    """After how many events all tables are looked at: a larger pool has both larger tables and longer traces."""
    return max(1, (num_pages // PAGES_A_CHECK) ** 2)


def replay(reader: TraceReader, *, check_every: int | None = None) -> Result:
    """Run a trace from its start, and compare and check it.

    What one event returns and which driver calls it makes is compared at each; all tables are looked at after every
    ``check_every`` events. Where that finds something, the trace is run again to see after which event it is so first.

    Raises:
        ConfigError: the file is damaged.
    """
    every = check_every or check_spacing(reader.header.num_pages)
    result = _run(reader, lambda number: number % every == 0)
    if result.broken is not None and every > 1:
        again = _run(reader, lambda number: number > result.last_good)
        result.broken = again.broken or result.broken
    result.check_every = every
    return result


def _run(reader: TraceReader, is_checked: Callable[[int], bool]) -> Result:
    with open_driver_for(reader.header) as driver:
        return follow(Replay(reader.header, driver), reader, driver.name, 1, is_checked)


class Follower(Protocol):
    """What can be led through a trace."""

    figures: Figures

    def apply(self, event: Event) -> None: ...

    def check(self) -> bool: ...

    def finish(self) -> Figures: ...


def follow(
    run: Follower, reader: TraceReader, driver: str, check_every: int, is_checked: Callable[[int], bool]
) -> Result:
    """Apply all events, with a look at all tables after those that ``is_checked`` and after the last."""
    result = Result(run.figures, driver, check_every)
    began = time.perf_counter()
    event, due = Event(0, Op.RESET, 0, []), False

    def check(event: Event) -> None:
        nonlocal due
        if run.check():
            due, result.last_good = False, event.number

    for event in reader.events():
        due |= is_checked(event.number)
        result.broken = _broken_by(run.apply, event)
        if result.broken is None and due:
            result.broken = _broken_by(check, event)
        if result.broken is not None:
            break
        result.events = event.number
    else:
        result.broken = _broken_by(check, event)
    result.seconds = time.perf_counter() - began
    result.figures = run.finish()
    result.bytes_left_out = reader.bytes_left_out
    return result


def _broken_by(step: Callable[[Event], None], event: Event) -> Broken | None:
    try:
        step(event)
    except ConfigError:
        raise
    except BUGS as error:
        return Broken(event, str(error) if isinstance(error, VTensorError) else f"{type(error).__name__}: {error}")
    return None
