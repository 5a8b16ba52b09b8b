"""Record and replay: the same tables again, to the last mapping, and the event at which a bug shows."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import inspect
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sgl_vtensor.core import trace
from sgl_vtensor.core.pages import Pages
from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.core.projection import project
from sgl_vtensor.core.replay import Replay, open_driver_for, replay
from sgl_vtensor.core.trace import Event, Header, Op, Raised, RecordedPool, TraceReader
from sgl_vtensor.errors import ConfigError, DriverError, OutOfMemory, VTensorError
from sgl_vtensor.vmm.faults import Fault, FaultyDriver
from sgl_vtensor.vmm.host import HostDriver
from sgl_vtensor.vmm.null import NullDriver
from tests.core.conftest import ManualFence, end_request, small_layout, start_request
from tests.core.simulation import Server, simulate
from tests.core.test_mutations import MUTATIONS, Patch, ensure_stops_short

NUM_SEEDS = 12
NUM_STEPS = 120
SETTERS = {"set_limit"}
"""What they set is looked at before each event."""
READERS = {"is_open", "count_changes", "is_synced", "pages_of", "row_views", "stats"}
"""Methods of the pool's that change nothing."""


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of a few seeds, from their start to their end."""
    folder = tmp_path_factory.mktemp("traces")
    for seed in range(NUM_SEEDS):
        simulate(seed, NUM_STEPS, checks=False, trace=folder / f"{seed}")
    return sorted(folder.iterdir(), key=lambda path: int(path.name))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace"


class Recorded:
    """A small pool that is recorded, over a driver that can be told to fail."""

    def __init__(self, path: Path, num_pages: int = 16) -> None:
        self.host = HostDriver(capacity_bytes=1 << 26)
        self.driver = FaultyDriver(self.host)
        pages = Pages(self.driver, small_layout(self.driver), num_pages)
        try:
            self.pool = RecordedPool(pages, path, num_slots=4, max_len_tokens=24)
        except ConfigError:
            self.host.close()
            raise

    def __enter__(self) -> RecordedPool:
        return self.pool

    def __exit__(self, *_: object) -> None:
        self.pool.close_trace()
        self.host.close()


def tables_of(pool: VTensorPool) -> dict[str, Any]:
    """Everything that decides what a pool does next, in one comparable piece."""
    pages, rows = pool.pages, pool.rows
    slots = np.flatnonzero(pool.row_of_slot).tolist()
    return {
        "wanted": {slot: pool.wanted[slot, : pool.num_wanted[slot]].tolist() for slot in slots},
        "synced": pool.num_synced.tolist(),
        "row_of_slot": pool.row_of_slot.tolist(),
        "mapped": rows.mapped.tolist(),
        "parked": list(rows._parked),
        "empty": rows._empty,
        "unfinished": list(rows._unfinished),
        "ahead": (rows.mappings_ahead, rows.rows_prepared),
        "duplicates": {row: found for row, found in rows._duplicates.items() if found},
        "free_backed": list(pages._free_backed.items()),
        "free_unbacked": pages._free_unbacked,
        "fenced": list(pages.fenced),
        "fresh": pages.fresh,
        "limit": (pages.limit_pages, pages.agreed_pages),
        "epochs": (pool.epochs.launched, pool.epochs.settled),
    }


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_a_replay_ends_in_the_same_tables(seed: int, path: Path) -> None:
    """Stopped in the middle, with launches under way, duplicates, refused calls and limits."""
    server = Server(seed, checks=False, trace=path)
    for _ in range(60):
        server.step()
    assert isinstance(server.pool, RecordedPool)
    server.pool.close_trace()
    reader = TraceReader(path)
    with open_driver_for(reader.header) as driver:
        again = Replay(reader.header, driver)
        for event in reader.events():
            again.apply(event)
        assert tables_of(again.pool) == tables_of(server.pool)
        figures = again.finish()
        for kind in trace.CALLS:
            assert figures.driver_calls[kind] == server.driver.calls[kind]
        assert driver.num_mappings == server.driver.num_mappings
    server.stream.clear()
    server.driver.close()


def test_recording_changes_no_decision(traces: list[Path]) -> None:
    for seed, path in enumerate(traces):
        plain = simulate(seed, NUM_STEPS, checks=False)
        other = path.with_suffix(".again")
        recorded = simulate(seed, NUM_STEPS, checks=False, trace=other)
        assert recorded.digest == plain.digest
        events, again = (
            [str(event) for event in TraceReader(one).events() if event.op != Op.LAUNCH] for one in (path, other)
        )
        assert events == again


def test_whole_runs_replay_clean(traces: list[Path]) -> None:
    """Each to its end, where nothing is left; what happens often in the simulator is in the traces."""
    seen: dict[Op, int] = {}
    for path in traces:
        result = replay(TraceReader(path), check_every=1)
        assert result.broken is None, result.broken
        assert result.figures.launches > 20 and result.bytes_left_out == 0
        for event in TraceReader(path).events():
            seen[event.op] = seen.get(event.op, 0) + 1
    assert set(seen) == set(Op) - {Op.DRIVER, Op.UNMAP}


def test_every_call_that_changes_a_pool_is_recorded() -> None:
    """Whoever adds one to the pool adds it to the trace, or to the readers here."""
    public = {name for name, _ in inspect.getmembers(VTensorPool, inspect.isfunction) if not name.startswith("_")}
    recorded = {name for name in public if name in vars(RecordedPool)}
    assert public == recorded | SETTERS | READERS and not recorded & READERS


# Files that are not whole.


def test_a_file_that_is_cut_replays_up_to_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a process is killed: the events of whole blocks are there, and no others."""
    monkeypatch.setattr(trace, "BLOCK_INTS", 200)
    simulate(3, 80, checks=False, trace=path)
    whole = path.read_bytes()
    everything = [str(event) for event in TraceReader(path).events()]
    first_line = whole.index(b"\n") + 1
    lengths = set()
    for size in [first_line, first_line + 1, *range(first_line, len(whole), 211), len(whole) - 1]:
        path.write_bytes(whole[:size])
        reader = TraceReader(path)
        found = [str(event) for event in reader.events()]
        assert found == everything[: len(found)]
        lengths.add(len(found))
        assert (reader.bytes_left_out > 0) == (size > first_line) or found
        result = replay(reader)
        assert result.broken is None and result.events == len(found)
        assert result.bytes_left_out == reader.bytes_left_out
    assert len(lengths) > 10 and max(lengths) < len(everything)


def test_a_file_that_is_damaged_says_where(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any byte: the header, a block's sizes, its contents. What it names as sound is."""
    monkeypatch.setattr(trace, "BLOCK_INTS", 2000)
    simulate(3, 80, checks=False, trace=path)
    whole = path.read_bytes()
    for at in [*range(0, 600, 13), *range(600, len(whole), 101), len(whole) - 1]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        with pytest.raises(ConfigError, match=r"is damaged|not a trace") as caught:
            list(TraceReader(path).events())
        if "truncate -s" in str(caught.value):
            sound = int(str(caught.value).split("truncate -s ")[1].split(")")[0])
            assert sound <= at
            path.write_bytes(whole[:sound])
            assert replay(TraceReader(path)).broken is None


def _line(**changes: object) -> bytes:
    layout = small_layout(NullDriver(4096))
    header = Header(layout, "host", 16, 4, 9, 24, None, release="9.8.7")
    found = json.loads(header.to_line()[9:]) | changes
    text = json.dumps(found).encode()
    return b"%08x %b\n" % (zlib.crc32(text), text)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (_line(version=2), "version 2 and this release reads version 1; replay it with sgl-vtensor 9.8.7"),
        (_line(version=2, layout=None, release=""), "version 2"),
        (_line(byteorder="big"), "big-endian"),
        (_line(format="something else"), "not a trace"),
        (_line(pages=3), "not a trace"),
        (_line()[1:], "not a trace"),
        (b"", "not a trace"),
        (b"\x00" * 100, "not a trace"),
        (b"[1, 2]\n", "not a trace"),
    ],
)
def test_what_is_no_trace_of_ours_is_refused(path: Path, line: bytes, said: str) -> None:
    path.write_bytes(line)
    with pytest.raises(ConfigError) as caught:
        TraceReader(path)
    assert said in str(caught.value)
    path.write_bytes(_line())
    assert list(TraceReader(path).events()) == []


def test_a_file_that_is_missing(path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        TraceReader(path)


def test_a_trace_is_never_overwritten(path: Path) -> None:
    """The server that crashed comes up again with the same flags."""
    names = []
    for _ in range(3):
        with Recorded(path) as pool:
            names.append(pool.trace_path.name)
    assert names == ["trace", "trace.1", "trace.2"]


def test_a_trace_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"), Recorded(tmp_path / "none" / "trace"):
        pass


def test_a_full_disk_ends_the_recording_and_nothing_else(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None: ...

    with Recorded(path) as pool:
        start_request(pool, 1, [], 9)
        pool._writer.flush()
        file, pool._writer._file = pool._writer._file, Full()  # type: ignore[assignment]
        assert file is not None
        file.close()
        for _ in range(2):
            end_request(pool, 1)
            pool._writer.flush()
            start_request(pool, 1, [], 9)
        assert [record for record in caplog.records if "No space left" in record.message] == caplog.records[-1:]
    result = replay(TraceReader(path))
    assert result.broken is None and result.figures.requests == 1


def test_what_waits_is_written_after_a_second(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a server that has nothing to do but to drain."""
    monkeypatch.setattr(trace, "FLUSH_SECONDS", 0.0)
    with Recorded(path) as pool:
        pool.open(1, [], 4)
        assert not list(TraceReader(path).events())
        pool.drain(in_flight=0)
        assert [event.op for event in TraceReader(path).events()] == [Op.SETTINGS, Op.OPEN]


# What the driver did.


@pytest.mark.parametrize("error", [OutOfMemory, DriverError])
@pytest.mark.parametrize("kind", ["create", "map", "unmap", "release"])
def test_refused_calls_are_refused_again(path: Path, kind: str, error: type[DriverError]) -> None:
    """Wherever in a short life; the events that failed fail again, and the tables hold."""
    seen = set()
    for first in range(1, 9):
        path.unlink(missing_ok=True)
        recorded = Recorded(path)
        attempts = recorded.driver.attempts
        with recorded as pool:
            before = attempts[kind]
            recorded.driver.plan.append(Fault(kind, lambda call, at=before + first: call.number == at, error))  # type: ignore[misc]
            _live(pool)
        result = replay(TraceReader(path), check_every=1)
        assert result.broken is None, result.broken
        refused = [event for event in TraceReader(path).events() if event.refused]
        assert result.figures.driver_calls["refused"] == len(refused) <= 1
        seen.update((event.op, event.outcome) for event in refused)
    assert len(seen) > 0, "no call was refused"
    outcomes = {outcome for _, outcome in seen}
    if error is DriverError and kind in ("unmap", "release"):
        assert outcomes == {Raised.REFUSED}
    elif error is DriverError:
        assert outcomes <= {Raised.REFUSED, False}, "a page that is refused is done without, a mapping raises"
        assert (Raised.REFUSED in outcomes) == (kind == "map")


def _live(pool: RecordedPool) -> None:
    """Two requests, a duplicate, memory given back; each step once more where it is refused."""

    def again(step: Callable[[], Any]) -> None:
        for _ in range(2):
            try:
                if step() is not False:
                    return
            except DriverError:
                continue

    for slot in (1, 2):
        pool.open(slot, [], 9)
        again(lambda slot=slot: pool.grow([slot], [9]))  # type: ignore[misc]
        again(lambda slot=slot: pool.ensure([slot]))  # type: ignore[misc]
    pool.launch(ManualFence())
    kept = pool.pages_of(1, 0, 2)
    pool.adopt(1, 0, kept)
    pool.adopt(2, 0, kept)
    again(lambda: pool.secure(13))
    again(lambda: pool.ensure([1, 2]))
    pool.drain(in_flight=0)
    for slot in (1, 2):
        pool.free(pool.pages_of(slot, 2, 3))
        pool.close(slot)
    again(lambda: pool.map_ahead([kept] * 3, at_most=8))
    pool.free(kept)
    again(lambda: pool.shrink(2))
    pool.open(1, [], 24)
    again(lambda: pool.grow([1], [24]))
    again(lambda: pool.ensure([1]))


def test_memory_that_others_take_is_part_of_the_trace(path: Path) -> None:
    """With a margin the driver is asked what is free, and the answer decides; alone, replayed, it is the same."""
    recorded = Recorded(path)
    with recorded as pool:
        page_bytes = pool.layout.page_bytes
        pool.pages.margin_bytes = 3 * page_bytes
        recorded.host.capacity_bytes = 6 * page_bytes
        pool.open(1, [], 24)
        assert not pool.grow([1], [24]) and pool.grow([1], [8])
    result = replay(TraceReader(path), check_every=1)
    assert result.broken is None, result.broken
    assert [event.free_pages for event in TraceReader(path).events() if event.op == Op.GROW] == [[2], []]


def test_a_look_at_free_memory_that_fails_is_part_of_the_trace(path: Path) -> None:
    """Without it more is asked for than with it: alone, replayed, it is the same, up to the refusal."""
    recorded = Recorded(path)
    with recorded as pool:
        page_bytes = pool.layout.page_bytes
        pool.pages.margin_bytes = 3 * page_bytes
        recorded.host.capacity_bytes = 6 * page_bytes
        recorded.driver.plan.append(Fault("memory_info", lambda _: True, DriverError))
        pool.prepare(4)
        with pytest.raises(OutOfMemory):
            pool.prepare(8)
        recorded.driver.plan.clear()
        pool.prepare(8)
        assert pool.pages.num_free_backed == 5
    result = replay(TraceReader(path), check_every=1)
    assert result.broken is None, result.broken
    prepared = [event for event in TraceReader(path).events() if event.op == Op.PREPARE]
    assert [event.free_pages for event in prepared] == [[-1], [-1], [0]]
    assert [event.outcome for event in prepared] == [0, Raised.NO_MEMORY, 0]


def test_ranks_that_wait_for_a_neighbour(path: Path) -> None:
    """What they agreed on is there in the end, or the server stopped."""
    recorded = Recorded(path)
    with recorded as pool:
        pool.pages.agreed_pages = 16
        waits: list[DriverError] = []

        def wait(error: DriverError) -> bool:
            waits.append(error)
            return True

        pool.pages.on_refusal = wait
        recorded.driver.plan.append(Fault("create", lambda call: len(waits) < 2))
        assert pool.secure(2) and len(waits) == 2

        def give_up(error: DriverError) -> bool:
            raise error

        pool.pages.on_refusal = give_up
        recorded.driver.plan.append(Fault("create", lambda call: True))
        with pytest.raises(OutOfMemory):
            pool.secure(3)
    result = replay(TraceReader(path), check_every=1)
    assert result.broken is None, result.broken
    assert result.figures.driver_calls["refused"] == 3


def test_rows_that_are_unmapped_when_their_request_ends(path: Path) -> None:
    """As with ``--vtensor-unmap-rows``: no mapping is found again, neither here nor with other pages."""
    with Recorded(path) as pool:
        for _ in range(4):
            start_request(pool, 1, [], 9)
            pool.launch(ManualFence())
            end_request(pool, 1)
            assert pool.unmap_parked() == 0, "a launch may read it"
            pool.drain(in_flight=0)
            assert pool.unmap_parked() == 3 and pool.unmap_parked() == 0
    for result in (replay(TraceReader(path), check_every=1), project(TraceReader(path), page_tokens=2)):
        assert result.broken is None, result.broken
        assert result.figures.positions_hit == 0 and result.figures.positions_mapped in (12, 20)


def test_rows_that_are_mapped_ahead(path: Path) -> None:
    """Each step that maps something is an event; the request that waited finds its prefix in place."""
    with Recorded(path) as pool:
        pages = start_request(pool, 1, [], 16)
        pool.adopt(1, 0, pages[:3])
        assert [pool.map_ahead([[], pages[:3]], at_most=2) for _ in range(5)] == [2, 1, 0, 0, 0]
        start_request(pool, 2, pages[:3], 16)
    assert sum(event.op == Op.AHEAD for event in TraceReader(path).events()) == 2
    result = replay(TraceReader(path), check_every=1)
    assert result.broken is None, result.broken
    figures = result.figures
    assert (figures.positions_ahead, figures.positions_hit, figures.positions_mapped) == (3, 3, 5)
    other = project(TraceReader(path), page_tokens=2, check_every=1)
    assert other.broken is None, other.broken
    assert (other.figures.positions_ahead, other.figures.positions_hit) == (4, 4), "twice two calls of six"


# Bugs.


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_a_bug_of_the_recorded_server_is_found(
    mutate: Callable[[Patch], None], tmp_path: Path, monkeypatch: Patch
) -> None:
    """As from the field: recorded and replayed with the bug in, whether or not the server noticed it."""
    mutate(monkeypatch)
    for seed in range(NUM_SEEDS):
        path = tmp_path / f"{seed}"
        with contextlib.suppress(AssertionError, VTensorError, KeyError):
            simulate(seed, NUM_STEPS, checks=False, trace=path)
        result = replay(TraceReader(path))
        if result.broken is not None:
            assert result.events == result.broken.event.number - 1
            return
    pytest.fail("no trace shows it")


def test_the_event_is_the_right_one(traces: list[Path], monkeypatch: Patch) -> None:
    """``ensure`` stops a page short: that shows at the first request that needs two pages at once, and not before,
    however seldom the tables are looked at."""
    path = traces[0]
    events = TraceReader(path).events()
    first = next(event.number for event in events if event.op == Op.ENSURE and event.outcome > len(event.args))
    assert first > 5
    ensure_stops_short(monkeypatch)
    for check_every in (1, 7, 10_000):
        result = replay(TraceReader(path), check_every=check_every)
        assert result.broken is not None and result.broken.event.number == first
        assert result.check_every == check_every
    assert replay(TraceReader(traces[0])).broken is not None
    monkeypatch.undo()
    assert replay(TraceReader(path), check_every=7).broken is None


def test_a_bug_that_only_tables_show_is_traced_back_to_its_event(path: Path, monkeypatch: Patch) -> None:
    """Nothing that the pool returns is wrong; a look every 50 events finds it late, and the second run finds where."""
    with Recorded(path) as pool:
        for _ in range(30):
            start_request(pool, 1, [], 9)
            end_request(pool, 1)
    original = Pages.free

    def free(self: Pages, pages: Any, epoch: int) -> None:
        original(self, pages, epoch)
        if self.calls == 12:
            self.is_free[5] = False
        self.calls += 1

    monkeypatch.setattr(Pages, "calls", 0, raising=False)
    monkeypatch.setattr(Pages, "free", free)
    found = set()
    for check_every in (1, 50):
        result = replay(TraceReader(path), check_every=check_every)
        assert result.broken is not None
        found.add((result.broken.event.number, result.broken.event.op))
    # The request is just ending when the page is freed: the tables are looked at once it is closed.
    assert len(found) == 1 and found.pop()[1] == Op.CLOSE


def test_a_leak_is_found_where_the_slot_is_closed(path: Path) -> None:
    with Recorded(path) as pool:
        pages = start_request(pool, 1, [], 9)
        pool.adopt(1, 0, pages[:1])
        pool.free(pages[1:2])
        pool.close(1)
    broken = replay(TraceReader(path)).broken
    assert broken is not None and broken.event.op == Op.CLOSE and f"its pages [{pages[2]}] are neither" in broken.what


def test_only_pages_of_the_tree_are_mapped_ahead(path: Path) -> None:
    """A request's own are written while they would be waited for."""
    with Recorded(path) as pool:
        pages = start_request(pool, 1, [], 9)
        pool.map_ahead([pages[:1]], at_most=8)
    broken = replay(TraceReader(path)).broken
    assert broken is not None and broken.event.op == Op.AHEAD and "it is not the tree's" in broken.what


def test_another_decision_than_the_recorded_one_is_found(path: Path) -> None:
    """A core that chooses other pages is not the one that wrote the trace."""
    with Recorded(path) as pool:
        start_request(pool, 1, [], 9)
    reader = TraceReader(path)
    events = list(reader.events())
    grow = next(event for event in events if event.op == Op.GROW)
    assert grow.args[-3:] == [1, 2, 3]
    grow.args[-1] = 9
    with HostDriver(1 << 26) as driver:
        again = Replay(reader.header, driver)
        with pytest.raises(VTensorError, match=r"pages handed out: \[1, 2, 3\], and \[1, 2, 9\] when it was recorded"):
            for event in events:
                again.apply(event)


# Large servers.


def test_a_server_of_many_mappings_is_replayed_on_tables() -> None:
    """80 GB in pages of 8 MiB, 512 rows of 32 768 tokens: more mappings than Linux allows."""
    layout = small_layout(NullDriver(4096), page_tokens=64)
    large = Header(layout, "cuda", 10_000, 256, 513, 32_768, None)
    small = dataclasses.replace(large, num_pages=100, num_rows=9, num_slots=4)
    for header, name in ((large, "null"), (small, "host")):
        with open_driver_for(header) as driver:
            assert driver.name == name
            Replay(header, driver).check()


# Another page size, another number of rows.


def test_the_same_size_takes_the_same(traces: list[Path]) -> None:
    """What is logical is equal to the last page: requests, shared pages, pages of their own, the peak."""
    for path in traces:
        reader = TraceReader(path)
        recorded, other = replay(reader).figures, project(reader, page_tokens=reader.header.layout.page_tokens).figures
        for name in ("requests", "launches", "pages_hit", "pages_computed", "peak_pages_in_use", "page_bytes"):
            assert getattr(other, name) == getattr(recorded, name), (path.name, name)
        positions = recorded.positions_hit + recorded.positions_mapped
        assert other.positions_hit + other.positions_mapped == positions


@pytest.mark.parametrize("page_tokens", [1, 3, 5, 64])
def test_the_tables_hold_with_other_pages(traces: list[Path], page_tokens: int) -> None:
    for path in traces[:6]:
        result = project(TraceReader(path), page_tokens=page_tokens, check_every=4)
        assert result.broken is None, (path.name, result.broken)


@pytest.fixture
def chat(path: Path) -> Iterator[TraceReader]:
    host = HostDriver(capacity_bytes=1 << 26)
    pool = RecordedPool(Pages(host, small_layout(host), 16), path, num_slots=4, max_len_tokens=64)
    pages = start_request(pool, 1, [], 16)
    pool.launch(None)
    pool.adopt(1, 0, pages)
    pool.close(1)
    start_request(pool, 2, pages, 25)
    pool.launch(None)
    for len_tokens in range(26, 35):
        if len_tokens % 4 == 1:
            assert pool.grow([2], [len_tokens])
        pool.ensure([2])
        pool.launch(None)
    pool.adopt(2, 4, pool.pages_of(2, 4, 8))
    pool.free(pool.pages_of(2, 8, 9))
    pool.close(2)
    pool.close_trace()
    host.close()
    yield TraceReader(path)


@pytest.mark.parametrize(
    ("page_tokens", "hit", "computed", "in_use"),
    [
        (4, 4, 4 + 5, 9),
        (2, 8, 8 + 9, 17),
        (8, 2, 2 + 3, 5),
        (16, 1, 1 + 2, 3),
        (6, 2, 3 + 4, 7),
        (32, 0, 1 + 2, 3),
    ],
)
def test_another_page_size_by_hand(chat: TraceReader, page_tokens: int, hit: int, computed: int, in_use: int) -> None:
    """16 tokens are cached; a second request has those and 9 of its own, decodes to 34, and ends.

    With pages of 6 tokens two are whole in 16; the third, with the other 4, is cached, too, and the second request has
    one of its own for them.
    """
    figures = project(chat, page_tokens=page_tokens, check_every=1).figures
    assert (figures.pages_hit, figures.pages_computed, figures.peak_pages_in_use) == (hit, computed, in_use)


def test_more_rows_are_a_larger_cache_of_mappings(path: Path) -> None:
    """Three chats by turns: with a row each, every turn finds its pages mapped; with too few, it maps them anew."""
    host = HostDriver(capacity_bytes=1 << 26)
    pool = RecordedPool(Pages(host, small_layout(host), 16), path, num_slots=1, max_len_tokens=24, num_rows=2)
    prefixes = []
    for _ in range(3):
        pages = start_request(pool, 1, [], 8)
        pool.launch(None)
        pool.adopt(1, 0, pages)
        pool.close(1)
        prefixes.append(pages)
    for _ in range(4):
        for pages in prefixes:
            start_request(pool, 1, pages, 9)
            pool.launch(None)
            end_request(pool, 1, num_kept=2)
    pool.close_trace()
    host.close()
    reader = TraceReader(path)
    few, many = (project(reader, num_rows=num_rows, check_every=1).figures for num_rows in (2, 4))
    assert few == dataclasses.replace(replay(reader).figures, driver_calls=few.driver_calls)
    assert few.positions_mapped > 20 and few.num_rows == 2
    assert many.positions_mapped < 12 and many.driver_calls["unmap"] == 0
    with pytest.raises(ConfigError, match="too few for 1 requests"):
        project(reader, num_rows=1)


def test_an_event_reads_well() -> None:
    assert str(Event(7, Op.FREE, -1, [3, 4])) == "event 7, FREE [3, 4] -> VTENSOR"
    assert str(Event(8, Op.OPEN, 5, list(range(20)))).endswith("10, 11, ...] -> 5")


def test_a_trace_of_a_gpu_runs_again_here() -> None:
    """Of a server under load on an H200: 577 requests, 16 708 launches, 21 951 driver calls.

    It holds which pages and rows were chosen, so it has to be recorded anew when that changes.
    """
    reader = TraceReader(Path(__file__).parents[2] / "bench/results/traces/chat-16k-2026-11-27-h200.trace")
    result = replay(reader, check_every=20_000)
    assert reader.header.driver == "cuda" and result.broken is None and result.bytes_left_out == 0
    figures = result.figures
    assert (figures.requests, figures.launches, result.events) == (577, 16_708, 66_640)
    assert figures.driver_calls == {"create": 3_684, "release": 871, "map": 15_131, "unmap": 2_265, "refused": 0}
