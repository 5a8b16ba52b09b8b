"""What the books of the pool cost the scheduler's thread: admit, decode step and free, as the server grows.

The driver here does nothing, so that only our own Python is timed; what driver calls cost is in ``bench_vmm`` and in
the servers' figures. With ``--trace``, also what recording adds to it, how large the trace is, and how fast it is
replayed. Needs no GPU:

    python bench/bench_core.py [--steps 300] [--trace] [--no-record]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from results import Results

from sgl_vtensor.core.layout import plan_layout
from sgl_vtensor.core.pages import Pages
from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.core.replay import replay
from sgl_vtensor.core.trace import RecordedPool, TraceReader
from sgl_vtensor.vmm.null import NullDriver

GRANULE_BYTES = 2 << 20
PAGE_TOKENS = 64
PREFIX_PAGES, OWN_PAGES = 64, 32
NUM_PREFIXES = 16


@dataclass(frozen=True)
class Size:
    """How large a server is."""

    rows: int
    pages: int
    running: int
    context_tokens: int

    def __str__(self) -> str:
        return f"rows={self.rows} pages={self.pages} running={self.running} context={self.context_tokens}"


SIZES = (
    Size(rows=512, pages=25_000, running=125, context_tokens=32_768),
    Size(rows=4096, pages=100_000, running=125, context_tokens=131_072),
    Size(rows=4096, pages=100_000, running=500, context_tokens=131_072),
    Size(rows=4096, pages=100_000, running=1000, context_tokens=131_072),
)


class Load:
    """Requests that share prefixes, run, end, and leave parked rows behind; each new one takes the place of another."""

    def __init__(self, size: Size, trace: Path | None = None) -> None:
        layout = plan_layout(
            num_layers=32,
            num_kv_heads=8,
            head_dim=128,
            v_head_dim=128,
            itemsize=2,
            granule_bytes=GRANULE_BYTES,
            page_tokens=PAGE_TOKENS,
        )
        pages = Pages(NullDriver(GRANULE_BYTES), layout, size.pages)
        make: Callable[..., VTensorPool] = VTensorPool if trace is None else partial(RecordedPool, path=trace)
        self.pool = make(pages, num_slots=size.running + 1, max_len_tokens=size.context_tokens, num_rows=size.rows)
        self.pool.secure(size.pages)
        self.dice = np.random.default_rng(1)
        self.slots = np.arange(1, size.running + 1)
        self.lens = np.zeros(size.running + 2, dtype=np.int64)
        self.prefixes = []
        for _ in range(NUM_PREFIXES):
            self.prefixes.append(self.cache())
        for slot in self.slots.tolist():
            self.admit(slot)
        for _ in range(2 * size.rows):  # until every row has been used
            slot = int(self.dice.choice(self.slots))
            self.free(slot)
            self.admit(slot)

    def cache(self) -> list[int]:
        """A prefix that the tree keeps."""
        slot, len_tokens = self.pool.num_slots, PREFIX_PAGES * PAGE_TOKENS
        self.pool.open(slot, [], len_tokens)
        self.pool.grow([slot], [len_tokens])
        pages = self.pool.pages_of(slot, 0, PREFIX_PAGES)
        self.pool.adopt(slot, 0, pages)
        self.pool.close(slot)
        return pages

    def admit(self, slot: int) -> None:
        """A prefix hit, pages of its own, and its row in step."""
        len_tokens = (PREFIX_PAGES + OWN_PAGES) * PAGE_TOKENS - int(self.dice.integers(0, PAGE_TOKENS))
        self.pool.open(slot, self.prefixes[int(self.dice.integers(NUM_PREFIXES))], len_tokens)
        if not self.pool.grow([slot], [len_tokens]):
            raise SystemExit("the pool is too small for this load")
        self.pool.ensure([slot])
        self.lens[slot] = len_tokens

    def free(self, slot: int) -> None:
        """Its own pages go back, its row is parked."""
        pages = self.pool.pages_of(slot, PREFIX_PAGES, int(self.pool.num_wanted[slot]))
        self.pool.free(pages)
        self.pool.close(slot)
        self.pool.launch(None)

    def decode(self) -> None:
        """What ``srt/allocator.py`` and ``srt/runtime.py`` do for one step of all requests."""
        pool = self.pool
        pool.drain(in_flight=0)
        self.lens[self.slots] += 1
        stops = self.lens[self.slots]
        crossing = np.flatnonzero((stops - 1) % PAGE_TOKENS == 0)
        if not pool.secure(crossing.size):
            raise SystemExit("the pool is too small for this load")
        if crossing.size:
            pool.grow(self.slots[crossing].tolist(), stops[crossing].tolist())
        last = stops - 1
        _ = pool.wanted[self.slots, last // PAGE_TOKENS].astype(np.int64) * PAGE_TOKENS + last % PAGE_TOKENS
        pool.ensure(self.slots)
        _ = pool.is_synced(self.slots)
        _ = pool.row_of_slot[self.slots]
        pool.launch(None)


def timed(call: Callable[[], None]) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description="What the pool's books cost the scheduler's thread.")
    parser.add_argument("--steps", type=int, default=300, help="decode steps a size (%(default)s)")
    parser.add_argument("--trace", action="store_true", help="also with a trace being recorded, and replay it")
    parser.add_argument("--no-record", action="store_true", help="only print")
    parser.add_argument("--out", type=Path, help="a folder for a copy of the rows")
    options = parser.parse_args()
    results = None if options.no_record else Results("core", options.out)
    for size in SIZES:
        measure(size, options.steps, results)
        if options.trace:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trace"
                measure(size, options.steps, results, path)
                measure_replay(size, path, results)


def measure(size: Size, steps: int, results: Results | None, trace: Path | None = None) -> None:
    """One size, recorded or not."""
    load = Load(size, trace)
    times: dict[str, list[float]] = {"admit": [], "decode_step": [], "free": []}
    for step in range(steps):
        times["decode_step"].append(timed(load.decode))
        slot = int(load.slots[step % size.running])
        times["free"].append(timed(partial(load.free, slot)))
        times["admit"].append(timed(partial(load.admit, slot)))
    impl = "vtensor" if trace is None else "vtensor-trace"
    for name, values in times.items():
        low, middle, high = np.percentile(values, (20, 50, 80))
        print(f"{size!s:60} {impl:13} {name:12} {middle:9.1f} us  ({low:.1f} to {high:.1f})", flush=True)
        if results:
            results.add(str(size), impl, f"{name}_time", "us", values)
    if isinstance(load.pool, RecordedPool):
        load.pool.close_trace()


def measure_replay(size: Size, path: Path, results: Results | None) -> None:
    """A trace's bytes, and its events a second."""
    result = replay(TraceReader(path))
    if result.broken is not None:
        raise SystemExit(f"the trace does not replay: {result.broken}")
    size_bytes, rate = path.stat().st_size / result.events, result.events / result.seconds
    for name, unit, value in (("trace_size", "B/event", size_bytes), ("replay_rate", "events/s", rate)):
        print(f"{size!s:60} {'vtensor-trace':13} {name:12} {value:9.1f} {unit}", flush=True)
        if results:
            results.add(str(size), "vtensor-trace", name, unit, [value])


if __name__ == "__main__":
    main()
