"""The trace of a pool: every call that changed it, with what came of it, compactly, and read back again.

A file is one line, a checksum and the header in JSON, and then blocks: how long, two checksums, and zlib-compressed
32-bit integers. An event is ``op, outcome, n`` and n integers; a ``DRIVER`` record before it says which driver calls it
made. Nothing in it is text or a token: requests are slots and lengths, prefixes are page numbers. A process that is
killed loses what is not written yet, at most a second and a block of it; a file that ends inside a block is good up to
there.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import struct
import sys
import time
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy.typing as npt

from sgl_vtensor.core.epochs import Fence
from sgl_vtensor.core.layout import KVLayout
from sgl_vtensor.core.pages import Pages
from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.errors import ConfigError, DriverError, OutOfMemory, VTensorError
from sgl_vtensor.vmm.proxy import DriverProxy

logger = logging.getLogger(__name__)

FORMAT = "sgl_vtensor trace"
VERSION = 1
BLOCK_INTS = 8192
FLUSH_SECONDS = 1.0
MAX_FILES = 10_000
CALLS = ("create", "release", "map", "unmap")
"""The driver calls that are counted for each event, in this order."""
_BLOCK = struct.Struct("<III")  # payload bytes, CRC-32 of the payload, CRC-32 of these two


class Op(IntEnum):
    """What was asked of the pool; behind each, its integers."""

    DRIVER = 0  # calls of each kind, number of refusals, (number of the call, how it was refused) each, free pages...
    SETTINGS = 1  # limit in pages, what the ranks agreed on (-1: nothing), whether a margin is left to others
    OPEN = 2  # slot, tokens, prefix pages...; outcome: row
    GROW = 3  # beyond the limit, number of slots, slots..., tokens..., pages that they were given...; outcome: whether
    ENSURE = 4  # slots that lacked pages...; outcome: positions that were mapped
    ADOPT = 5  # slot, first position, the tree's pages...; outcome: duplicates
    FREE = 6  # pages...
    CLOSE = 7  # slot
    SECURE = 8  # pages, beyond the limit; outcome: whether
    PREPARE = 9  # pages
    SHRINK = 10  # pages to keep, at most (-1: any number); outcome: pages released
    FRESH = 11  # outcome: pages to zero
    LAUNCH = 12  # whether it has a fence, milliseconds since the start
    DRAIN = 13  # launches in flight
    RESET = 14
    SHUTDOWN = 15
    UNMAP = 16  # outcome: mappings of parked rows that are gone
    AHEAD = 17  # driver calls at most, then each prefix: how many pages, pages...; outcome: positions mapped
    CLEAR = 18  # pages...: given to requests, to be zeroed before the next launch


class Raised(IntEnum):
    """The outcome of an event that ended in an exception."""

    VTENSOR = -1
    NO_MEMORY = -2
    REFUSED = -3
    OTHER = -4

    @classmethod
    def of(cls, error: BaseException | type[BaseException]) -> Raised:
        kind = error if isinstance(error, type) else type(error)
        for known, outcome in ((OutOfMemory, cls.NO_MEMORY), (DriverError, cls.REFUSED), (VTensorError, cls.VTENSOR)):
            if issubclass(kind, known):
                return outcome
        return cls.OTHER


@dataclass(frozen=True)
class Header:
    """The pool as it was made. Recording starts with a new one."""

    layout: KVLayout
    driver: str
    num_pages: int
    num_slots: int
    num_rows: int
    max_len_tokens: int
    max_mappings: int | None
    release: str = ""

    def to_line(self) -> bytes:
        """The first line of a trace."""
        kind = {"format": FORMAT, "version": VERSION, "byteorder": sys.byteorder}
        text = json.dumps(kind | dataclasses.asdict(self)).encode()
        return b"%08x %b\n" % (zlib.crc32(text), text)

    @classmethod
    def from_line(cls, name: str, line: bytes) -> Header:
        """Read the first line of a trace.

        Raises:
            ConfigError: it is none, or one of another version.
        """
        try:
            text = line[9:-1]
            found = json.loads(text)
            if found.pop("format") != FORMAT or int(line[:8], 16) != zlib.crc32(text):
                raise ValueError("another format, or damaged")
            recorded, order = found.pop("version"), found.pop("byteorder")
            if recorded == VERSION and order == sys.byteorder:
                return cls(**found | {"layout": KVLayout(**found["layout"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{name} is not a trace, or is damaged in its first line; give a file that --vtensor-trace wrote"
            ) from error
        if recorded != VERSION:
            raise ConfigError(
                f"{name} is a trace of version {recorded} and this release reads version {VERSION}; replay it with "
                f"sgl-vtensor {found.get('release') or 'of the time'}"
            )
        raise ConfigError(f"{name} was recorded on a {order}-endian machine; replay it on one")


@dataclass(slots=True)
class Event:
    """One call of the pool's, with what the driver did meanwhile.

    Attributes:
        number: counted from 1 over the whole trace.
        outcome: what it returned, as a number, or how it failed (:class:`Raised`).
        calls: driver calls of each kind in :data:`CALLS`.
        refused: which of these calls, counted from 1 over all kinds, was refused, and how.
        free_pages: what the driver said was free beyond the margin, each time that it was asked; -1: it could not say.
    """

    number: int
    op: Op
    outcome: int
    args: list[int]
    calls: list[int] = field(default_factory=lambda: [0] * len(CALLS))
    refused: dict[int, Raised] = field(default_factory=dict)
    free_pages: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.args[:12])) + (", ..." if len(self.args) > 12 else "")
        outcome = Raised(self.outcome).name if self.outcome < 0 else self.outcome
        return f"event {self.number}, {self.op.name} [{shown}] -> {outcome}"


def split_prefixes(args: list[int]) -> tuple[int, list[list[int]]]:
    """Of an ``AHEAD`` event: driver calls at most, and the prefixes."""
    at_most, *rest = args
    prefixes = []
    while rest:
        count = rest[0]
        prefixes.append(rest[1 : 1 + count])
        rest = rest[1 + count :]
    return at_most, prefixes


# Writing.


class TraceWriter:
    """Integers into a file, in blocks. A file that cannot be written any more ends the recording, not the server.

    Raises:
        ConfigError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._file = _create(path)
        self._ints = array("i")
        self._start = self._flushed = time.monotonic()

    def begin(self, header: Header) -> None:
        self._write(header.to_line())

    def add(self, op: Op, outcome: int, args: Sequence[int]) -> None:
        ints = self._ints
        ints.extend((op, outcome, len(args)))
        ints.extend(args)
        if len(ints) >= BLOCK_INTS and op != Op.DRIVER:  # an event and its driver calls stay together
            self.flush()

    def milliseconds(self) -> int:
        """Since the recording began; writes what has been waiting for too long."""
        now = time.monotonic()
        if now - self._flushed > FLUSH_SECONDS:
            self.flush()
        return int((now - self._start) * 1000) & 0x7FFFFFFF

    def flush(self) -> None:
        self._flushed = time.monotonic()
        if not self._ints:
            return
        payload = zlib.compress(self._ints.tobytes(), 1)
        del self._ints[:]
        sizes = struct.pack("<II", len(payload), zlib.crc32(payload))
        self._write(sizes + struct.pack("<I", zlib.crc32(sizes)) + payload)

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, data: bytes) -> None:
        if self._file is None:
            return
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            logger.warning("vTensor trace: %s ends here (%s); the server goes on", self.path, error)
            self._file.close()
            self._file = None


def _create(path: Path) -> tuple[Path, BinaryIO | None]:
    """A new file at ``path``, or beside it where there is one: the trace of a server that crashed is kept."""
    for number in range(MAX_FILES):
        candidate = path.with_name(f"{path.name}.{number}") if number else path
        try:
            return candidate, open(candidate, "xb")
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(
                f"the trace {candidate} cannot be written ({error.strerror}); name another file"
            ) from error
    raise ConfigError(f"there are {MAX_FILES} traces at {path} already; name another file")


class _Tap(DriverProxy):
    """Notes what the pool asked the driver during one event."""

    def begin(self) -> None:
        self.counts = [0] * len(CALLS)
        self.refused: list[int] = []
        self.free_bytes: list[int | None] = []

    def create(self, num_bytes: int) -> int:
        self.counts[0] += 1
        try:
            return super().create(num_bytes)
        except DriverError as error:
            self._refuse(error)
            raise

    def release(self, handle: int) -> None:
        self.counts[1] += 1
        try:
            super().release(handle)
        except DriverError as error:
            self._refuse(error)
            raise

    def map(self, address: int, handle: int, num_bytes: int, *, writable: bool) -> None:
        self.counts[2] += 1
        try:
            super().map(address, handle, num_bytes, writable=writable)
        except DriverError as error:
            self._refuse(error)
            raise

    def unmap(self, address: int, num_bytes: int) -> None:
        self.counts[3] += 1
        try:
            super().unmap(address, num_bytes)
        except DriverError as error:
            self._refuse(error)
            raise

    def memory_info(self) -> tuple[int, int]:
        self.free_bytes.append(None)
        info = super().memory_info()
        self.free_bytes[-1] = info[0]
        return info

    def _refuse(self, error: DriverError) -> None:
        self.refused += (sum(self.counts), Raised.of(error))


class _Scope:
    """One call of the pool's while it runs. Calls that it makes itself are part of it and leave no event."""

    __slots__ = ("args", "op", "outcome", "pool")

    def __init__(self, pool: RecordedPool, op: Op, args: list[int]) -> None:
        self.pool = pool
        self.op = op
        self.args = args
        self.outcome = 0

    def __enter__(self) -> _Scope:
        self.pool._enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.pool._leave(self.op, self.outcome if kind is None else Raised.of(kind), self.args)


class RecordedPool(VTensorPool):
    """A pool that writes a trace of its life.

    Args:
        path: the trace; where there is a file of that name, a number is added.

    Raises:
        ConfigError: the file cannot be made.
    """

    def __init__(
        self,
        pages: Pages,
        path: Path,
        *,
        num_slots: int,
        max_len_tokens: int,
        num_rows: int | None = None,
        max_mappings: int | None = None,
    ) -> None:
        self._writer = TraceWriter(path)
        self._tap = pages.driver = _Tap(pages.driver)
        self._tap.begin()
        self._depth = 0
        self._settings: tuple[int, int | None, int] | None = None
        super().__init__(
            pages, num_slots=num_slots, max_len_tokens=max_len_tokens, num_rows=num_rows, max_mappings=max_mappings
        )
        try:
            release = version("sgl-vtensor")
        except PackageNotFoundError:
            release = ""
        self._writer.begin(
            Header(
                layout=self.layout,
                driver=self.driver.name,
                num_pages=pages.num_pages,
                num_slots=num_slots,
                num_rows=self.rows.num_rows,
                max_len_tokens=max_len_tokens,
                max_mappings=max_mappings,
                release=release,
            )
        )

    @property
    def trace_path(self) -> Path:
        """The file that is written."""
        return self._writer.path

    def close_trace(self) -> None:
        """Write what is left, and no more; ``shutdown`` does it too."""
        self._writer.close()

    # The calls, each recorded once it has returned or raised.

    def open(self, slot: int, prefix_pages: Sequence[int], len_tokens: int) -> int:
        with _Scope(self, Op.OPEN, [slot, len_tokens, *prefix_pages]) as scope:
            row = scope.outcome = super().open(slot, prefix_pages, len_tokens)
        return row

    def grow(self, slots: Sequence[int], lens_tokens: Sequence[int], *, beyond_limit: bool = False) -> bool:
        starts = [int(self.num_wanted[slot]) for slot in slots]
        with _Scope(self, Op.GROW, [beyond_limit, len(slots), *slots, *lens_tokens]) as scope:
            grown = super().grow(slots, lens_tokens, beyond_limit=beyond_limit)
            scope.outcome = int(grown)
            if grown:
                for slot, start in zip(slots, starts, strict=True):
                    scope.args += self.wanted[slot, start : self.num_wanted[slot]].tolist()
        return grown

    def ensure(self, slots: npt.ArrayLike) -> int:
        behind = self._behind(slots)
        if not behind:
            return 0
        with _Scope(self, Op.ENSURE, behind) as scope:
            changed = scope.outcome = super().ensure(behind)
        return changed

    def map_ahead(self, prefixes: Sequence[Sequence[int]], *, at_most: int) -> int:
        args = [at_most]
        for prefix in prefixes:
            args += (len(prefix), *prefix)
        with _Scope(self, Op.AHEAD, args) as scope:
            mapped = scope.outcome = super().map_ahead(prefixes, at_most=at_most)
        return mapped

    def adopt(self, slot: int, start: int, pages: Sequence[int]) -> list[int]:
        with _Scope(self, Op.ADOPT, [slot, start, *pages]) as scope:
            changed = super().adopt(slot, start, pages)
            scope.outcome = len(changed)
        return changed

    def free(self, pages: Iterable[int]) -> None:
        pages = list(pages)
        with _Scope(self, Op.FREE, pages):
            super().free(pages)

    def close(self, slot: int) -> None:
        if self.is_open(slot):
            with _Scope(self, Op.CLOSE, [slot]):
                super().close(slot)

    def secure(self, num_pages: int, *, beyond_limit: bool = False) -> bool:
        with _Scope(self, Op.SECURE, [num_pages, beyond_limit]) as scope:
            secured = super().secure(num_pages, beyond_limit=beyond_limit)
            scope.outcome = int(secured)
        return secured

    def prepare(self, num_pages: int) -> None:
        with _Scope(self, Op.PREPARE, [num_pages]):
            super().prepare(num_pages)

    def shrink(self, keep_pages: int, *, at_most: int | None = None) -> int:
        with _Scope(self, Op.SHRINK, [keep_pages, -1 if at_most is None else at_most]) as scope:
            released = scope.outcome = super().shrink(keep_pages, at_most=at_most)
        return released

    def unmap_parked(self) -> int:
        if not self.rows.num_parked:
            return 0
        with _Scope(self, Op.UNMAP, []) as scope:
            gone = scope.outcome = super().unmap_parked()
        return gone

    def clear(self, pages: Sequence[int]) -> None:
        if pages:
            with _Scope(self, Op.CLEAR, list(pages)):
                super().clear(pages)

    def take_fresh(self) -> Sequence[int]:
        if not self.pages.fresh:
            return []
        with _Scope(self, Op.FRESH, []) as scope:
            fresh = super().take_fresh()
            scope.outcome = len(fresh)
        return fresh

    def launch(self, fence: Fence | None) -> None:
        with _Scope(self, Op.LAUNCH, [fence is not None, self._writer.milliseconds()]):
            super().launch(fence)

    def drain(self, *, in_flight: int) -> None:
        before = self.epochs.settled
        super().drain(in_flight=in_flight)
        if self.epochs.settled != before:
            self._enter()
            self._leave(Op.DRAIN, 0, [in_flight])
        else:
            self._writer.milliseconds()

    def reset(self) -> None:
        with _Scope(self, Op.RESET, []):
            super().reset()

    def shutdown(self) -> None:
        with _Scope(self, Op.SHUTDOWN, []):
            super().shutdown()
        self._writer.close()

    def _enter(self) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        self._tap.begin()
        pages = self.pages
        settings = pages.limit_pages, pages.agreed_pages, pages.margin_bytes
        if settings != self._settings:
            self._settings = settings
            limit, agreed, margin = settings
            self._writer.add(Op.SETTINGS, 0, (limit, -1 if agreed is None else agreed, margin > 0))

    def _leave(self, op: Op, outcome: int, args: list[int]) -> None:
        self._depth -= 1
        if self._depth:
            return
        tap = self._tap
        if op == Op.AHEAD and outcome == 0 and not any(tap.counts):
            return  # nothing has changed
        if tap.free_bytes or any(tap.counts):
            margin, page_bytes = self.pages.margin_bytes, self.layout.page_bytes
            free = [-1 if one is None else max(0, one - margin) // page_bytes for one in tap.free_bytes]
            self._writer.add(Op.DRIVER, 0, (*tap.counts, len(tap.refused) // 2, *tap.refused, *free))
        self._writer.add(op, outcome, args)
        if outcome < 0:
            self._writer.flush()  # it may be the last


# Reading.


class TraceReader:
    """The header of a trace, and its events.

    Attributes:
        bytes_left_out: at the end, once all events have been read: of a block that was not written whole.

    Raises:
        ConfigError: the file is not a trace, or one of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_left_out = 0
        try:
            with path.open("rb") as file:
                line = file.readline(1 << 16)
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be read ({error.strerror}); give a file that --vtensor-trace wrote"
            ) from error
        self.header = Header.from_line(str(path), line)

    def events(self) -> Iterator[Event]:
        """All of them, from the first.

        Raises:
            ConfigError: a block is damaged. Those before it have been read.
        """
        number = 0
        for at, ints in self._blocks():
            driver: list[int] = []
            here = 0
            try:
                while here < len(ints):
                    op, outcome, size = ints[here : here + 3]
                    args = ints[here + 3 : here + 3 + size]
                    if size < 0 or len(args) < size:
                        raise ValueError("an event is cut")
                    here += 3 + size
                    if op == Op.DRIVER:
                        driver = args
                        continue
                    number += 1
                    event = Event(number, Op(op), outcome, args)
                    if driver:
                        event.calls, pairs = driver[:4], driver[5 : 5 + 2 * driver[4]]
                        event.refused = {at: Raised(how) for at, how in zip(pairs[::2], pairs[1::2], strict=True)}
                        event.free_pages = driver[5 + 2 * driver[4] :]
                        driver = []
                    yield event
            except (ValueError, IndexError) as error:
                raise self._damaged(at, number) from error

    def _blocks(self) -> Iterator[tuple[int, list[int]]]:
        """Where each block starts, and what is in it."""
        with self.path.open("rb") as file:
            file.readline(1 << 16)
            self.bytes_left_out = 0
            while True:
                at = file.tell()
                head = file.read(_BLOCK.size)
                if len(head) < _BLOCK.size:
                    self.bytes_left_out = len(head)
                    return
                size, checksum, head_checksum = _BLOCK.unpack(head)
                if zlib.crc32(head[:8]) != head_checksum:
                    raise self._damaged(at)
                payload = file.read(size)
                if len(payload) < size:
                    self.bytes_left_out = len(head) + len(payload)
                    return
                if zlib.crc32(payload) != checksum:
                    raise self._damaged(at)
                yield at, array("i", zlib.decompress(payload)).tolist()

    def _damaged(self, at: int, number: int | None = None) -> ConfigError:
        where = "" if number is None else f", behind event {number}"
        return ConfigError(
            f"{self.path} is damaged in the block at byte {at}{where}; cut it there (truncate -s {at}) to replay what "
            "precedes it"
        )
