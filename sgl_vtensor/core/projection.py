"""What another page size, or another number of rows, would have taken for what a trace records.

The events are taken as what they mean in tokens: how long requests are, which beginnings they share, what the tree
keeps and drops. A token is known by the recorded page that holds it, so requests that shared a page share its tokens.

What is approximated:

- Admission, retraction and eviction happen when they did. The other pool has as many pages as that takes, no limit, and
  a driver that refuses nothing.
- Decoding is recorded page by page. Between two of them each launch without a prefill adds a token to every request,
  up to the end of the recorded page: with smaller pages, the end of a request is known to one recorded page.
- A page of the tree goes when a recorded page goes that it covers a part of: leaves go first, so that is its end.
- Rows are mapped ahead for requests that wait in the steps in which they were, with as many driver calls.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field

from sgl_vtensor.core.checks import check_tables
from sgl_vtensor.core.pages import Pages
from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.core.replay import (
    Figures,
    Launches,
    ReplayDriver,
    Result,
    check_spacing,
    follow,
    real_layout,
    small_layout,
)
from sgl_vtensor.core.trace import Event, Header, Op, TraceReader, split_prefixes
from sgl_vtensor.errors import ConfigError
from sgl_vtensor.vmm.base import DriverBase
from sgl_vtensor.vmm.null import NullDriver

Key = tuple[int, int]
"""A page of the tree: the recorded page that holds its last token, and its position. What precedes it follows."""


@dataclass
class _Request:
    """An open request."""

    recorded: list[int]
    """Its recorded pages."""
    len_tokens: int
    num_kept: int
    """Pages at its beginning that the tree owns; of recorded ones, so many tokens."""
    kept_tokens: int
    is_new: bool = True
    """Not launched yet."""


@dataclass
class _Tree:
    """What the tree owns."""

    pages: dict[Key, int] = field(default_factory=dict)
    _covered: dict[Key, list[int]] = field(default_factory=dict)
    """The recorded pages that hold some of a page's tokens."""
    _covering: dict[int, dict[Key, None]] = field(default_factory=dict)
    """The other way round."""

    def add(self, key: Key, page: int, covered: list[int]) -> None:
        self.pages[key] = page
        self._covered[key] = covered
        for recorded in covered:
            self._covering.setdefault(recorded, {})[key] = None

    def drop(self, recorded: int) -> list[int]:
        """The pages that go with a recorded one."""
        gone = []
        for key in list(self._covering.get(recorded, ())):
            gone.append(self.pages.pop(key))
            for other in self._covered.pop(key):
                del self._covering[other][key]
        self._covering.pop(recorded, None)
        return gone


class Projection:
    """Another pool, led through the same life.

    Args:
        page_tokens: of its pages; None: as recorded.
        num_rows: its rows, the padding row included; None: as recorded.

    Raises:
        ConfigError: there must be more rows than slots.
    """

    def __init__(
        self, header: Header, driver: DriverBase, *, page_tokens: int | None = None, num_rows: int | None = None
    ) -> None:
        self.header = header
        self.inner = driver
        self.recorded_tokens = header.layout.page_tokens
        self.page_tokens = self.recorded_tokens if page_tokens is None else page_tokens
        rows = header.num_rows if num_rows is None else num_rows
        if rows <= header.num_slots:
            raise ConfigError(f"--num-rows {rows} is too few for {header.num_slots} requests at once; give more")
        layout = small_layout(self.page_tokens, driver.granularity)
        # So many pages may end in a recorded one; and requests may share less, since they share whole pages.
        a_page = self.recorded_tokens // self.page_tokens + 2
        is_same = self.page_tokens == self.recorded_tokens
        num_pages = header.num_pages if is_same else (2 * header.num_pages + header.num_slots) * a_page
        self.driver = ReplayDriver(driver, layout.page_bytes, layout.page_bytes)
        self.pool = VTensorPool(
            Pages(self.driver, layout, num_pages),
            num_slots=header.num_slots,
            max_len_tokens=header.max_len_tokens,
            num_rows=rows,
            max_mappings=header.max_mappings,
        )
        self.figures = Figures(self.page_tokens, rows, real_layout(header.layout, self.page_tokens).page_bytes)
        self._launches = Launches(self.pool)
        self.driver.on_unmap = self._launches.check_unmapped
        self._requests: dict[int, _Request] = {}
        self._tree = _Tree()
        self._is_shut = False
        self._prefilled = False
        self._grown: set[int] = set()
        """Requests that were told their exact length since the last launch."""

    def apply(self, event: Event) -> None:
        """Do what the event means for pages of the other size."""
        args, pool = event.args, self.pool
        if event.outcome < 0:
            return
        if event.op == Op.OPEN:
            self._open(args[0], args[1], args[2:])
        elif event.op == Op.GROW and event.outcome:
            self._grow(args[1], args[2:])
        elif event.op == Op.ENSURE:
            self._ensure(args)
        elif event.op == Op.ADOPT:
            self._adopt(args[0], args[1], args[2:])
        elif event.op == Op.FREE:
            self._free(args)
        elif event.op == Op.CLOSE:
            self._close(args[0])
        elif event.op == Op.SECURE and event.outcome:
            pool.secure(self._scaled(args[0]))
        elif event.op == Op.PREPARE:
            pool.prepare(self._scaled(args[0]))
        elif event.op == Op.SHRINK:
            pool.shrink(self._scaled(args[0]), at_most=None if args[1] < 0 else self._scaled(args[1]))
        elif event.op == Op.UNMAP:
            pool.unmap_parked()
        elif event.op == Op.AHEAD:
            at_most, prefixes = split_prefixes(args)
            self.figures.positions_ahead += pool.map_ahead([self._found(one) for one in prefixes], at_most=at_most)
        elif event.op == Op.FRESH:
            self._launches.zero(list(pool.take_fresh()))
        elif event.op == Op.LAUNCH:
            self._launch(fenced=bool(args[0]))
        elif event.op == Op.DRAIN:
            pool.drain(in_flight=args[0])
        elif event.op == Op.RESET:
            pool.reset()
            self._requests.clear()
            self._tree = _Tree()
        elif event.op == Op.SHUTDOWN:
            self.driver.on_unmap = lambda address: None
            self._is_shut = True
            pool.shutdown()
        self.figures.look(pool)

    def check(self) -> bool:
        """Look at all tables.

        Raises:
            InvariantBroken: two of them contradict each other.
        """
        if self._is_shut:
            return True
        owned = list(self._tree.pages.values())
        for slot, request in self._requests.items():
            owned += self._pages(slot, request.num_kept)
        check_tables(self.pool, self.inner, owned)
        return True

    def finish(self) -> Figures:
        """The figures so far."""
        self.figures.driver_calls = self.driver.attempts | {"refused": 0}
        return self.figures

    def _scaled(self, num_pages: int) -> int:
        return -(-num_pages * self.recorded_tokens // self.page_tokens)

    def _pages(self, slot: int, start: int) -> list[int]:
        return self.pool.pages_of(slot, start, int(self.pool.num_wanted[slot]))

    def _found(self, prefix: list[int]) -> list[int]:
        """The tree's pages for what a recorded prefix holds."""
        found: list[int] = []
        num_tokens = len(prefix) * self.recorded_tokens
        while (len(found) + 1) * self.page_tokens <= num_tokens:
            page = self._tree.pages.get(self._key(prefix, len(found), num_tokens))
            if page is None:
                break
            found.append(page)
        return found

    def _open(self, slot: int, len_tokens: int, prefix: list[int]) -> None:
        found, num_tokens = self._found(prefix), len(prefix) * self.recorded_tokens
        self.pool.open(slot, found, len_tokens)
        self._requests[slot] = _Request(prefix, num_tokens, len(found), num_tokens)
        self.figures.requests += 1
        self.figures.pages_hit += len(found)

    def _grow(self, count: int, rest: list[int]) -> None:
        slots, lens, given = rest[:count], rest[count : 2 * count], rest[2 * count :]
        for slot, len_tokens in zip(slots, lens, strict=True):
            request = self._requests[slot]
            is_decode = not request.is_new and len_tokens == len(request.recorded) * self.recorded_tokens + 1
            self._prefilled |= not is_decode
            num_given = max(0, -(-len_tokens // self.recorded_tokens) - len(request.recorded))
            request.recorded += given[:num_given]
            given = given[num_given:]
            request.len_tokens = max(request.len_tokens, len_tokens)
        self._grown.update(slots)
        self._give(slots)

    def _give(self, slots: list[int]) -> None:
        """Pages for the tokens that these requests have."""
        lens = [self._requests[slot].len_tokens for slot in slots]
        before = int(self.pool.num_wanted[slots].sum())
        if not self.pool.grow(slots, lens, beyond_limit=True):
            raise ConfigError("this trace needs more pages of that size than a projection has; choose another size")
        self.figures.pages_computed += int(self.pool.num_wanted[slots].sum()) - before

    def _ensure(self, slots: list[int]) -> None:
        pool = self.pool
        positions = int((pool.num_wanted[slots] - pool.num_synced[slots]).sum())
        changed = pool.ensure(slots)
        self.figures.positions_mapped += changed
        self.figures.positions_hit += positions - changed

    def _adopt(self, slot: int, start: int, pages: list[int]) -> None:
        request = self._requests[slot]
        stop = start + len(pages)
        request.recorded[start:stop] = pages
        request.kept_tokens = stop * self.recorded_tokens
        # The last of these pages has one token at least; it may be the last page of a request that ends.
        request.len_tokens = max(request.len_tokens, request.kept_tokens - self.recorded_tokens + 1 if stop else 0)
        self._give([slot])
        self._keep(slot, request.kept_tokens // self.page_tokens)

    def _keep(self, slot: int, stop: int) -> None:
        """The first ``stop`` pages of a request are the tree's, or it uses those that the tree has already."""
        request, kept = self._requests[slot], []
        for position, mine in enumerate(self._pages(slot, 0)[:stop]):
            if position < request.num_kept:
                continue
            key = self._key(request.recorded, position, request.kept_tokens)
            if key not in self._tree.pages:
                first = position * self.page_tokens // self.recorded_tokens
                self._tree.add(key, mine, request.recorded[first : request.recorded.index(key[0]) + 1])
            kept.append(self._tree.pages[key])
        self.pool.adopt(slot, request.num_kept, kept)
        request.num_kept += len(kept)

    def _key(self, recorded: list[int], position: int, num_tokens: int) -> Key:
        last_token = min((position + 1) * self.page_tokens, num_tokens) - 1
        return recorded[last_token // self.recorded_tokens], position

    def _free(self, pages: list[int]) -> None:
        for page in pages:
            gone = self._tree.drop(page)
            if gone:
                self.pool.free(gone)

    def _close(self, slot: int) -> None:
        request = self._requests[slot]
        if request.kept_tokens + self.recorded_tokens >= request.len_tokens:
            # At its end a request gives its last page, too, although that may not be full.
            self._keep(slot, -(-request.kept_tokens // self.page_tokens))
        self.pool.free(self._pages(slot, request.num_kept))
        self.pool.close(slot)
        del self._requests[slot]

    def _launch(self, *, fenced: bool) -> None:
        if not self._prefilled:
            longer = []
            for slot, request in self._requests.items():
                if slot not in self._grown and request.len_tokens < len(request.recorded) * self.recorded_tokens:
                    request.len_tokens += 1
                    if request.len_tokens > int(self.pool.num_wanted[slot]) * self.page_tokens:
                        longer.append(slot)
            if longer:
                synced = [slot for slot in longer if self.pool.is_synced([slot])]
                self._give(longer)
                self._ensure(synced)
        self._prefilled = False
        self._grown.clear()
        for request in self._requests.values():
            request.is_new = False
        self._launches.launch(fenced=fenced)
        self.figures.launches += 1


def project(
    reader: TraceReader,
    *,
    page_tokens: int | None = None,
    num_rows: int | None = None,
    check_every: int | None = None,
) -> Result:
    """Lead another pool through a trace from its start, its tables looked at as ``replay`` does.

    Raises:
        ConfigError: the other pool cannot be, or the file is damaged.
    """
    with NullDriver(mmap.PAGESIZE) as driver:
        run = Projection(reader.header, driver, page_tokens=page_tokens, num_rows=num_rows)
        every = check_every or check_spacing(run.pool.pages.num_pages)
        return follow(run, reader, driver.name, every, lambda number: number % every == 0)
