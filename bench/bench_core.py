"""What the books of the pool cost the scheduler's thread: admit, decode step and free, as the server grows.

The driver here does nothing, so that only our own Python is timed; what driver calls cost is in the servers' figures.
Times are of this thread's CPU, so that a busy machine shows little in them. What looking costs is told apart, also as a
part of a decode step of 10 ms: by default (``hook`` each step, ``count`` each driver call), with ``--enable-metrics``
(``metrics`` once a second), and while somebody watches ``/vtensor`` (``picture`` once a second, and no longer than
``page.MAX_SHARE`` of the time). With ``--trace``, also what recording adds, how large the trace is, and how fast it is
replayed. Needs no GPU:

    python bench/bench_core.py [--steps 300] [--trace] [--no-record]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from prometheus_client import CollectorRegistry
from results import Results
from sglang.srt.managers.io_struct import GetInternalStateReqOutput, msgpack_encode
from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from vtensor_kernels import MAX_GROUPED

from sgl_vtensor.config import VTensorConfig
from sgl_vtensor.core.layout import plan_layout
from sgl_vtensor.core.pages import Pages
from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.core.replay import replay
from sgl_vtensor.core.trace import RecordedPool, TraceReader
from sgl_vtensor.srt import page, runtime
from sgl_vtensor.srt.agree import BOARD_COLUMNS, Ranks
from sgl_vtensor.srt.allocator import VTensorAllocator
from sgl_vtensor.srt.memory import MemoryPolicy
from sgl_vtensor.srt.metrics import Metrics
from sgl_vtensor.srt.prefix import PageRun, VTensorRadixCache
from sgl_vtensor.srt.runtime import MAX_WAITING, Runtime
from sgl_vtensor.vmm.null import NullDriver

GRANULE_BYTES = 2 << 20
PAGE_TOKENS = 64
PREFIX_PAGES, OWN_PAGES = 64, 32
NUM_PREFIXES = 16
NEW_WAITING_STEPS = 40
"""After so many steps other requests wait. Theirs are mapped ahead in 32; in the others there is nothing to do."""
EVICTED_PAGES = 16
"""What a decode step of 1 000 requests takes, on average, of pages of 64 tokens."""
CALLS = 1000
"""Of what is too short to be timed alone."""
MEMBERS = 4
"""Requests in a tile, with four query heads a kv head."""
STEP_US = 10_000.0
STEP_CALLS = 2 * EVICTED_PAGES
"""Driver calls of a step of 1 000 requests whose rows are read: a page is mapped at its home and in a row."""


@dataclass(frozen=True)
class Size:
    """How large a server is."""

    rows: int
    pages: int
    running: int
    context_tokens: int
    leaves: int
    """Of the tree of cached prefixes."""

    def __str__(self) -> str:
        return (
            f"rows={self.rows} pages={self.pages} running={self.running} context={self.context_tokens} "
            f"leaves={self.leaves}"
        )


SIZES = (
    Size(rows=512, pages=25_000, running=125, context_tokens=32_768, leaves=2_000),
    Size(rows=4096, pages=100_000, running=125, context_tokens=131_072, leaves=2_000),
    Size(rows=4096, pages=100_000, running=125, context_tokens=131_072, leaves=40_000),
    Size(rows=4096, pages=100_000, running=500, context_tokens=131_072, leaves=40_000),
    Size(rows=4096, pages=100_000, running=1000, context_tokens=131_072, leaves=40_000),
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


class Surroundings:
    """What ``srt`` does around the pool: launches of two ranks, looks at memory, figures, eviction under a limit."""

    def __init__(self, load: Load, size: Size) -> None:
        self.load, self.pool = load, load.pool
        self.allocator: Any = VTensorAllocator.__new__(VTensorAllocator)
        self.allocator.page_size, self.allocator.device = PAGE_TOKENS, torch.device("cpu")
        self.allocator.size = size.pages * PAGE_TOKENS
        self.allocator._pool, self.allocator._kvcache = self.pool, SimpleNamespace(pages=self.pool.pages)
        self.allocator.copies, self.allocator.tokens_hit, self.allocator.tokens_computed = [], 0, 0
        self.tree = VTensorRadixCache(CacheInitParams(False, None, self.allocator, PAGE_TOKENS))
        config = VTensorConfig()
        self.policy = MemoryPolicy(self.pool, config)
        self.runtime = Runtime(self.pool, self.allocator, self.policy, config, dense_capacity=0)
        self.runtime.decode_reads_homes = self.runtime.extend_reads_homes = False
        self.pool.take_fresh()
        self.policy.ranks = Ranks(0, np.zeros((2, BOARD_COLUMNS), dtype=np.int64))
        kv = SimpleNamespace(kv_allocated_len=PAGE_TOKENS, cache_protected_len=0)
        reqs = [SimpleNamespace(finished=lambda: False, kv=kv) for _ in range(size.running)]
        self.scheduler: Any = SimpleNamespace(
            running_batch=SimpleNamespace(reqs=reqs),
            last_batch=None,
            chunked_req=None,
            tree_cache=self.tree,
            waiting_queue=[],
            tp_worker=SimpleNamespace(model_runner=SimpleNamespace(vtensor=self.runtime)),
        )
        labels = dict.fromkeys(("model_name", "engine_type", "tp_rank", "pp_rank", "moe_ep_rank"), "0")
        self.runtime._metrics = Metrics(labels, registry=CollectorRegistry())
        self.next_token = 0
        self.cache(size.leaves)
        self.waiting: list[SimpleNamespace] = []

    def cache(self, num_prefixes: int, num_pages: int = 1) -> list[array[int]]:
        """Prefixes of so many pages each; returns their tokens."""
        told = []
        for _ in range(num_prefixes):
            tokens = array("q", range(self.next_token, self.next_token + num_pages * PAGE_TOKENS))
            self.next_token += len(tokens)
            run: Any = PageRun(self.pool.pages.take_many(num_pages), PAGE_TOKENS)
            self.tree.insert(InsertParams(key=RadixKey(tokens), value=run, inserted_len=0, priority=0))
            told.append(tokens)
        return told

    def arrive(self) -> None:
        """As many requests wait as are looked at, each with a long prefix that no row shows."""
        self.waiting = [
            SimpleNamespace(
                origin_input_ids=tokens + array("q", [0]),
                output_ids=array("q"),
                extra_key=None,
                cache_salt=None,
                positional_embed_overrides=None,
                _compute_max_prefix_len=lambda length: length - 1,
            )
            for tokens in self.cache(MAX_WAITING, PREFIX_PAGES)
        ]

    def map_waiting(self) -> None:
        self.runtime.map_waiting(self.waiting, self.tree, SimpleNamespace(extend_num_tokens=None))

    def launch(self) -> None:
        slots = self.load.slots
        batch = SimpleNamespace(
            req_pool_indices_cpu=torch.from_numpy(slots),
            seq_lens_cpu=torch.from_numpy(self.load.lens[slots]),
            forward_mode=ForwardMode.DECODE,
            tree_cache=self.tree,
            chunked_req=None,
        )
        self.runtime.begin_launch(batch)
        self.runtime.end_launch(batch)

    def groups(self) -> None:
        """Where a batch has other requests than before: which of them begin with the same pages, of 128 at most."""
        self.runtime._grouped_requests = None
        self.runtime._batch_slots = self.load.slots[:MAX_GROUPED]
        self.runtime.groups_of_launch(len(self.runtime._batch_slots), MEMBERS)
        self.runtime._batch_slots = None

    def look(self) -> None:
        """Twice a second: the device's free memory, and the age of the cache."""
        self.policy.decide(self.tree, time.monotonic() + 1e6)

    def figures(self) -> None:
        """For ``/server_info`` and ``top``."""
        self.runtime.stats(self.tree)

    def hook(self) -> None:
        """Each step, whatever is on: requests of ours are looked for among those that came, and metrics may be due."""
        for _ in range(CALLS):
            runtime.follow_decisions(_nothing, self.scheduler, [])

    def count(self) -> None:
        """Each driver call: counted and timed."""
        for _ in range(CALLS):
            self.pool.driver._timed("map", _nothing)  # type: ignore[attr-defined]

    def metrics(self) -> None:
        """Once a second, for ``/metrics``."""
        self.runtime._next_update = 0.0
        self.runtime.update_metrics(self.scheduler, time.monotonic() + 1e6)

    def picture(self) -> None:
        """Once a second, while somebody watches: taken, and made ready to be sent."""
        shown = page.picture(self.runtime, self.scheduler, time.monotonic())
        msgpack_encode(GetInternalStateReqOutput(internal_state=shown))

    def evict(self) -> None:
        """A step's pages, while the limit is reached."""
        if not self.allocator.secure(EVICTED_PAGES, self.tree):
            raise SystemExit("nothing was evicted")


def _nothing(*_: Any) -> None:
    pass


def timed(call: Callable[[], None]) -> float:
    """Microseconds of this thread's CPU."""
    start = time.thread_time_ns()
    call()
    return (time.thread_time_ns() - start) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description="What the pool's books cost the scheduler's thread.")
    parser.add_argument("--steps", type=int, default=300, help="decode steps a size (%(default)s)")
    parser.add_argument("--trace", action="store_true", help="also with a trace being recorded, and replay it")
    parser.add_argument("--no-record", action="store_true", help="only print")
    parser.add_argument("--out", type=Path, help="a folder for a copy of the rows")
    options = parser.parse_args()
    results = None if options.no_record else Results("core", options.out)
    runtime.get_parallel = lambda: SimpleNamespace(dp_rank=0)  # there is no server whose parallelism could be asked for
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder  # as in SGLang: figures are kept in files
        for size in SIZES:
            middles = measure(size, options.steps, results)
            overheads = overheads_of(middles)
            if options.trace:
                path = Path(folder) / "trace"
                traced = measure(size, options.steps, results, path)
                measure_replay(size, path, results)
                path.unlink()
                overheads["trace"] = 100 * (traced["decode_step"] - middles["decode_step"]) / STEP_US
            for name, percent in overheads.items():
                print(f"{size!s:60} {'vtensor':13} {name:12} {percent:9.3f} % of a step of 10 ms", flush=True)
                if results:
                    results.add(str(size), "vtensor", f"overhead_{name}", "% of 10 ms", [percent])


def overheads_of(middles: dict[str, float]) -> dict[str, float]:
    """What looking costs, in percent of the scheduler's time when a step takes 10 ms; each beside the default's."""
    return {
        "default": 100 * (middles["hook"] + STEP_CALLS * middles["count"]) / STEP_US,
        "metrics": 100 * middles["metrics"] / 1e6,
        "page": 100 * min(middles["picture"] / 1e6, page.MAX_SHARE),
    }


def measure(size: Size, steps: int, results: Results | None, trace: Path | None = None) -> dict[str, float]:
    """One size, recorded or not: the median of each of its times, in microseconds."""
    load = Load(size, trace)
    around = Surroundings(load, size) if trace is None else None
    times: dict[str, list[float]] = {}

    def note(name: str, call: Callable[[], None], calls: int = 1) -> None:
        times.setdefault(name, []).append(timed(call) / calls)

    for step in range(steps):
        note("decode_step", load.decode)
        if around is not None:
            note("launch", around.launch)
            note("groups", around.groups)
            if step % NEW_WAITING_STEPS == 0:
                around.arrive()
            before = around.pool.rows.mappings_ahead
            duration = timed(around.map_waiting)
            name = "map_ahead" if around.pool.rows.mappings_ahead > before else "nothing_ahead"
            times.setdefault(name, []).append(duration)
        slot = int(load.slots[step % size.running])
        note("free", partial(load.free, slot))
        note("admit", partial(load.admit, slot))
        if around is not None and step % 10 == 0:
            around.policy._next_decision = 0.0
            note("look", around.look)
            note("figures", around.figures)
            around.pool.pages.limit_pages = around.pool.pages.num_in_use
            note("evict", around.evict)
            around.pool.pages.limit_pages = size.pages
            around.cache(EVICTED_PAGES)
            note("hook", around.hook, CALLS)
            note("count", around.count, CALLS)
            note("picture", around.picture)
            note("metrics", around.metrics)
    impl = "vtensor" if trace is None else "vtensor-trace"
    for name, values in times.items():
        low, middle, high = np.percentile(values, (20, 50, 80))
        print(f"{size!s:60} {impl:13} {name:12} {middle:9.1f} us  ({low:.1f} to {high:.1f})", flush=True)
        if results:
            results.add(str(size), impl, f"{name}_time", "us", values)
    if isinstance(load.pool, RecordedPool):
        load.pool.close_trace()
    return {name: float(np.median(values)) for name, values in times.items()}


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
