"""What joins the pool to SGLang's scheduler while the server runs: rows for requests, fences for launches."""

from __future__ import annotations

import dataclasses
import logging
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.managers.io_struct import GetInternalStateReqOutput
from sglang.srt.runtime_context import get_parallel

from sgl_vtensor.config import VTensorConfig, format_bytes
from sgl_vtensor.core.groups import alone, group_prefixes, saved_tokens
from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.core.rows import WINDOW_BYTES_MAX
from sgl_vtensor.core.trace import RecordedPool
from sgl_vtensor.errors import ConfigError, OutOfMemory
from sgl_vtensor.srt import page
from sgl_vtensor.srt.agree import Decision, join_ranks
from sgl_vtensor.srt.allocator import VTensorAllocator
from sgl_vtensor.srt.debug import DebugChecker
from sgl_vtensor.srt.flags import active_config
from sgl_vtensor.srt.memory import LimitHandler, MemoryPolicy
from sgl_vtensor.srt.metrics import WAIT_BUCKETS_SECONDS, Metrics
from sgl_vtensor.srt.pool import VTensorKVPool

logger = logging.getLogger(__name__)

HOST_SPARE_MAPPINGS = 8192
"""Linux mappings left to the process for its own libraries and threads."""


MAX_VIEWS = 8
"""Requests that FlashAttention-3 reads through views, one launch each; a larger batch is read at its homes in one."""
METRICS_SECONDS = 1.0
MAX_WAITS_KEPT = 10_000
MAX_MAPPINGS_AHEAD = 8
"""Mappings that a prefill waits for; where its rows lack more, it is read at its homes."""
MAX_WAITING = 8
"""Requests at the head of the queue whose prefixes are mapped ahead."""
STEPS_AHEAD = 16
"""For so many decode steps pages are created ahead, eight behind each launch: two for each of 64 requests."""
MIN_SHARED_TOKENS = 256
"""Requests that share fewer are decoded each by itself."""
MIN_SAVED_SHARE = 0.25
"""Of what a batch reads; if groups save less, all are decoded by themselves, since every part takes time to combine. On
an H200 16 requests of 2304 tokens that share 512 take 44.4 us in groups and 41.2 alone; that share 1024, 38.0 and 40.5.
"""
CALLS_A_LAUNCH = 16
TOKENS_A_CALL = 64
"""What is mapped ahead for them behind one launch: so many driver calls, about a millisecond, and one more for so many
tokens of a prefill, which computes for much longer than that."""


class Runtime:
    """Lives on SGLang's model runner as ``vtensor``.

    SGLang sees it as the auxiliary cache of its request slots (``ReqToTokenPool.attach_aux_cache``): it is told of
    every length that a slot reaches and of every slot that is let go.
    """

    def __init__(
        self,
        pool: VTensorPool,
        allocator: VTensorAllocator,
        policy: MemoryPolicy,
        config: VTensorConfig,
        *,
        dense_capacity: int,
    ) -> None:
        self.pool = pool
        self.policy = policy
        self.allocator = allocator
        self.config = config
        self.dense_capacity = dense_capacity
        self._on_cuda = pool.driver.device.type == "cuda"
        self._batch_slots: npt.NDArray[np.int64] | None = None
        # As for any backend of SGLang's own, which is paged and knows no rows: none is mapped for it.
        self.can_read_homes = True
        """Whether the attention backend can also read pages at their homes."""
        self.decode_reads_homes = True
        """Whether it always decodes there."""
        self.extend_reads_homes = True
        """Whether it always prefills there."""
        self.launch_reads_homes = False
        """Whether the batch that is being launched does."""
        self.attention = "another attention backend on homes"
        """What reads the pages, in words; ours says so itself."""
        self.words = pool.pages.tensor().view(torch.int64).view(pool.pages.num_pages + 1, -1)
        self.tokens_copied = 0
        self._was_brief = False
        """The launch before computed few tokens of prompts."""
        self._grouped_requests: tuple[int, bytes] | None = None
        self._grouped = (alone(0), 0)
        """Their groups, and how many pages these save."""
        self.decode_pages = 0
        """Pages of all requests of all decode steps that our kernel computed."""
        self.decode_pages_saved = 0
        """Those of them that were read together with another request's."""
        self.mapping_waits = 0
        """Launches that waited for mappings; so many seconds, of which the longest."""
        self.mapping_wait_seconds = 0.0
        self.mapping_wait_longest_seconds = 0.0
        self.mapping_wait_counts = [0] * (len(WAIT_BUCKETS_SECONDS) + 1)
        """How many took up to each of ``WAIT_BUCKETS_SECONDS`` and longer than the one before; the last: longer yet."""
        self._waits_seconds: deque[float] = deque(maxlen=MAX_WAITS_KEPT)
        self._metrics: Metrics | None = None
        self._next_update = 0.0
        self._checker = DebugChecker(self) if config.debug else None

    # SGLang's auxiliary cache.

    def alloc_to_lengths(self, *, req_pool_indices_cpu: torch.Tensor, target_seq_lens_cpu: torch.Tensor) -> None:
        """SGLang has written its table and launches next: map what the rows lack, if this launch reads rows.

        A driver call takes tens of microseconds, and a long prefix that no parked row shows takes hundreds of them. A
        backend that can read pages at their homes waits for none of that; rows are mapped while the GPU computes.
        """
        slots = req_pool_indices_cpu.numpy()
        if not self.can_read_homes:
            reads_rows = True
        elif self.allocator.extending:
            reads_rows = not self.extend_reads_homes and (
                len(slots) <= MAX_VIEWS and self.pool.count_changes(slots) <= MAX_MAPPINGS_AHEAD
            )
        else:
            reads_rows = not self.decode_reads_homes
        if reads_rows:
            start = time.perf_counter()
            if self._map(slots):
                self._note_wait(time.perf_counter() - start)

    def _note_wait(self, seconds: float) -> None:
        self.mapping_waits += 1
        self.mapping_wait_seconds += seconds
        self.mapping_wait_longest_seconds = max(self.mapping_wait_longest_seconds, seconds)
        self.mapping_wait_counts[bisect_left(WAIT_BUCKETS_SECONDS, seconds)] += 1
        self._waits_seconds.append(seconds)

    def _map(self, slots: npt.ArrayLike) -> int:
        """Map what these requests' rows lack. Rows are a cache: where no mapping is left, the homes are read.

        Returns how many positions changed.

        Raises:
            OutOfMemory: no mapping is left and the kernels read nothing but rows. The server must stop.
        """
        try:
            return self.pool.ensure(slots)
        except OutOfMemory as error:
            if not self.can_read_homes:
                raise
            logger.debug("rows stay unmapped: %s", error)
            return 0

    def free(self, slot: int) -> None:
        self.pool.close(slot)

    def clear(self) -> None:
        """Nothing to do: the allocator's ``clear`` follows and resets the pool."""

    def reset_allocator(self) -> None:
        pass

    # Launches.

    def begin_launch(self, batch: Any) -> None:
        """On the forward stream, before anything of this launch: device work that page turnover left behind."""
        slots = batch.req_pool_indices_cpu.numpy()
        many = batch.forward_mode.is_extend() and len(slots) > MAX_VIEWS
        self.launch_reads_homes = self.can_read_homes and (many or not self.pool.is_synced(slots))
        if self._checker is not None:
            self._checker.poison_freed(self.words)
        self.zero_fresh_pages()
        self._copy_pages()
        if self._checker is not None:
            self._checker.check(batch)
        if self.policy.ranks is not None:
            self.policy.ranks.note(self.pool.epochs.launched + 1, *self._decided(batch))
        self._batch_slots = slots

    def _decided(self, batch: Any) -> tuple[npt.NDArray[np.int64], ...]:
        """What all ranks must have decided alike for this launch. Page ids are not: each rank's driver has its say."""
        tree, mode = batch.tree_cache, int(batch.forward_mode)
        books = np.array([mode, self.pool.pages.num_in_use, tree.evictable_size(), tree.protected_size()])
        return batch.req_pool_indices_cpu.numpy(), batch.seq_lens_cpu.numpy(), books

    def end_launch(self, batch: Any) -> None:
        """On the forward stream, behind the launch. Rows that will be worth it are mapped while the GPU computes."""
        self._batch_slots = None
        self.launch_reads_homes = False
        if self._on_cuda:
            event = torch.cuda.Event()
            event.record()
            self.pool.launch(event)
        else:
            self.pool.launch(None)
        extends = batch.forward_mode.is_extend()
        computed = (batch.extend_num_tokens or 0) // self.pool.layout.page_tokens if extends else 0
        # Where nearly all is cached the GPU has done a prefill as soon as it is launched, layer by layer; and this
        # thread sees its tokens once it has launched the next batch.
        brief = extends and not computed
        self.policy.launched(self._pages_soon(batch), computed, hurried=brief or self._was_brief)
        self._was_brief = brief
        if self.config.unmap_rows:
            self.pool.unmap_parked()
        if self.can_read_homes and self.reads_rows:
            self._map_ahead(batch)

    def _pages_soon(self, batch: Any) -> int:
        """Pages that this batch's requests begin within the next steps."""
        # What each has room for in its last page.
        left_tokens = -batch.seq_lens_cpu.numpy() % self.pool.layout.page_tokens
        return int(np.count_nonzero(left_tokens < STEPS_AHEAD))

    def _map_ahead(self, batch: Any) -> None:
        """Map the row of a prefill that goes on, and all rows while few requests run: the CPU has the time then."""
        if self.pool.num_open <= MAX_VIEWS:
            self._map(batch.req_pool_indices_cpu.numpy())
        elif batch.chunked_req is not None and batch.chunked_req.kv.holds_kv:
            self._map([batch.chunked_req.kv.req_pool_idx])

    @property
    def reads_rows(self) -> bool:
        """Whether any launch may read rows."""
        return not (self.can_read_homes and self.extend_reads_homes and self.decode_reads_homes)

    def map_waiting(self, requests: Sequence[Any], tree_cache: Any, batch: Any) -> None:
        """Map the prefixes of requests that wait, behind the launch of ``batch``: the CPU waits for the GPU next.

        What is mapped depends on the queue, the tree and the books, which are the same on all ranks, and on no clock.
        """
        if not requests or not self.reads_rows or self.config.unmap_rows:
            return
        prefixes = [tree_cache.known_pages(req) for req in requests[:MAX_WAITING]]
        at_most = CALLS_A_LAUNCH + (batch.extend_num_tokens or 0) // TOKENS_A_CALL
        try:
            self.pool.map_ahead(prefixes, at_most=at_most)
        except OutOfMemory as error:
            logger.debug("nothing more is mapped ahead: %s", error)

    def idle(self, tree_cache: Any, now: float) -> None:
        """No batch is in flight. ``now``: seconds of ``time.monotonic``."""
        self.pool.drain(in_flight=0)
        if self.config.unmap_rows:
            self.pool.unmap_parked()
        self.policy.idle(tree_cache, now)

    def rows_of_launch(self) -> npt.NDArray[np.int32] | None:
        """Rows of the batch that is being launched; None in dummy and capture runs, which use the padding row."""
        return None if self._batch_slots is None else self.pool.row_of_slot[self._batch_slots]

    def groups_of_launch(self, batch_size: int, max_members: int) -> npt.NDArray[np.int32]:
        """[4, batch_size]: requests of the launch that begin with the same pages, as ``group_prefixes`` has them.

        A graph's batch is padded: those requests are alone, and so are all in dummy and capture runs.
        """
        groups = alone(batch_size)
        slots = self._batch_slots
        if slots is None:
            return groups
        num_pages = int(self.pool.num_wanted[slots].sum())
        self.decode_pages += num_pages
        # What requests share does not change while they decode: new pages are their own.
        requests = self.pool.num_opened, slots.tobytes()
        if requests != self._grouped_requests:
            page_tokens = self.pool.layout.page_tokens
            found = group_prefixes(
                self.pool.wanted[slots], self.pool.num_wanted[slots] - 1,  # the last page's next token is being written
                page_tokens=page_tokens, max_members=max_members, min_pages=-(-MIN_SHARED_TOKENS // page_tokens),
            )  # fmt: skip
            self._grouped_requests, self._grouped = requests, (found, saved_tokens(found) // page_tokens)
        found, saved_pages = self._grouped
        if saved_pages >= MIN_SAVED_SHARE * num_pages:
            groups[:, : len(slots)] = found
            self.decode_pages_saved += saved_pages
        return groups

    def zero_fresh_pages(self) -> None:
        """New memory may hold anything, and 0 times NaN is NaN."""
        fresh = self.pool.take_fresh()
        if fresh:
            # As memset, a few launches for all of them: requests of one length begin a page each in the same step.
            torch._foreach_zero_([self.words[page] for page in fresh])

    def _copy_pages(self) -> None:
        """Token-granular reuse. On the forward stream, so behind the launch that wrote the source page."""
        copies, self.allocator.copies = self.allocator.copies, []
        if not copies:
            return
        stride_words = self.pool.layout.token_stride_bytes // self.words.itemsize
        targets = [self.words[copy.target, : copy.len_tokens * stride_words] for copy in copies]
        sources = [self.words[copy.source, : copy.len_tokens * stride_words] for copy in copies]
        torch._foreach_copy_(targets, sources)  # one launch for many of them
        self.tokens_copied += sum(copy.len_tokens for copy in copies)

    # Figures.

    def describe(self) -> str:
        """The log's one line at start."""
        layout, pages, rows = self.pool.layout, self.pool.pages, self.pool.rows
        parts = [
            f"{self.pool.driver.name} driver",
            f"page {layout.page_tokens} tokens = {format_bytes(layout.page_bytes)}",
            f"token stride {layout.token_stride_bytes} B, {layout.waste:.1%} padding",
            f"limit {format_bytes(pages.limit_pages * layout.page_bytes)} of "
            f"{format_bytes(pages.num_pages * layout.page_bytes)} ({pages.num_pages * layout.page_tokens} tokens)",
            f"{rows.num_rows - 1} rows of {rows.max_pages * layout.page_tokens} tokens, "
            f"{rows.window_bytes / (1 << 40):.2f} TiB of addresses",
            self.attention,
        ]
        if rows.max_mappings is not None:
            parts.append(f"at most {rows.max_mappings} mappings in rows")
        if isinstance(self.pool, RecordedPool):
            parts.append(f"trace {self.pool.trace_path}")
        return f"vTensor memory: {'; '.join(parts)}"

    def update_metrics(self, scheduler: Any, now: float) -> None:
        """Once in a while, for SGLang's ``/metrics``; nothing without ``--enable-metrics``."""
        if now < self._next_update:
            return
        self._next_update = now + METRICS_SECONDS
        if self._metrics is None:
            reporter = scheduler.metrics_reporter
            if not reporter.enable_metrics:
                self._next_update = float("inf")
                return
            self._metrics = Metrics(reporter.metrics_collector.labels)
        waits = [self._waits_seconds.popleft() for _ in range(len(self._waits_seconds))]
        self._metrics.update(self.stats(scheduler.tree_cache), waits, self.pool.driver.histogram)

    def figures(self, scheduler: Any) -> dict[str, Any]:
        """The vtensor section of ``/server_info``; no text and no token ids."""
        stats = self.stats(scheduler.tree_cache)
        return stats | {
            "replica": get_parallel().dp_rank or 0,
            "requests_waiting": len(scheduler.waiting_queue),
            "tokens_live": stats["pages_cached"] * self.pool.layout.page_tokens + _own_tokens(scheduler),
        }

    def stats(self, tree_cache: Any) -> dict[str, Any]:
        """What of it does not depend on the queue."""
        layout, pages = self.pool.layout, self.pool.pages
        stats = dataclasses.asdict(self.pool.stats())
        return stats | {
            "driver": self.pool.driver.name,
            "kernel": self.config.kernel,
            "tokens_hit": self.allocator.tokens_hit,
            "tokens_computed": self.allocator.tokens_computed,
            "tokens_copied": self.tokens_copied,
            "decode_pages": self.decode_pages,
            "decode_pages_saved": self.decode_pages_saved,
            "mapping_waits": self.mapping_waits,
            "mapping_wait_seconds": self.mapping_wait_seconds,
            "mapping_wait_longest_seconds": self.mapping_wait_longest_seconds,
            "mapping_wait_buckets_seconds": WAIT_BUCKETS_SECONDS,
            "mapping_wait_counts": list(self.mapping_wait_counts),
            "pages_created_ahead": self.policy.pages_created_ahead,
            "pages_evicted_by_limit": self.policy.pages_evicted_by_limit,
            "pages_evicted_by_age": self.policy.pages_evicted_by_age,
            "reserve_pages": self.policy.reserve_pages,
            "ready_pages": self.policy.ready_pages,
            "launches": self.pool.epochs.launched,
            "launches_compared": self.policy.ranks.launches_compared if self.policy.ranks else 0,
            "page_tokens": layout.page_tokens,
            "token_stride_bytes": layout.token_stride_bytes,
            "page_bytes": layout.page_bytes,
            "pages_cached": (tree_cache.evictable_size() + tree_cache.protected_size()) // layout.page_tokens,
            "stock_bytes": (pages.num_pages + 1) * layout.page_tokens * layout.token_bytes,
        }


def _own_tokens(scheduler: Any) -> int:
    """Tokens of running requests that the tree does not hold."""
    batches = (scheduler.running_batch, scheduler.last_batch)
    running = {id(req): req for batch in batches if batch is not None for req in batch.reqs}
    if scheduler.chunked_req is not None:
        running[id(scheduler.chunked_req)] = scheduler.chunked_req
    reqs = (req for req in running.values() if not req.finished())
    return sum(max(0, req.kv.kv_allocated_len - req.kv.cache_protected_len) for req in reqs)


def attach(result: None, runner: Any, *args: Any, **kwargs: Any) -> None:
    """Hook, after SGLang has built its pools: make the rows."""
    config = active_config()
    if config is None:
        return
    kv_pool, allocator, slots = runner.token_to_kv_pool, runner.token_to_kv_pool_allocator, runner.req_to_token_pool
    if not isinstance(kv_pool, VTensorKVPool) or not isinstance(allocator, VTensorAllocator):
        raise ConfigError(
            f"SGLang built {type(kv_pool).__name__} and {type(allocator).__name__} in place of vTensor memory; "
            "a flag in use brings its own KV pool: drop it or --enable-vtensor"
        )
    pages = kv_pool.pages
    num_rows = _num_rows(config, slots.size, pages.layout.num_pages(slots.max_context_len) * pages.layout.page_bytes)
    make_pool = VTensorPool if config.trace is None else partial(RecordedPool, path=_trace_of_rank(config.trace))
    pool = make_pool(
        pages,
        num_slots=slots.size,
        max_len_tokens=slots.max_context_len,
        num_rows=num_rows,
        max_mappings=_max_mappings(pages.driver.name, pages.num_pages, pages.layout.num_pages(slots.max_context_len)),
    )
    policy = MemoryPolicy(pool, config, ranks=join_ranks(every_launch=config.debug))
    allocator.attach(pool, policy)
    runner.vtensor = Runtime(pool, allocator, policy, config, dense_capacity=runner.max_total_num_tokens)
    runner.vtensor.zero_fresh_pages()
    slots.attach_aux_cache(runner.vtensor)


def _trace_of_rank(path: Path) -> Path:
    """Ranks are counted through all replicas, as SGLang counts their GPUs."""
    parallel = get_parallel()
    return path.with_name(f"{path.name}.{(parallel.dp_rank or 0) * parallel.tp_size + parallel.tp_rank}")


def _num_rows(config: VTensorConfig, num_slots: int, row_bytes: int) -> int:
    fitting = WINDOW_BYTES_MAX // row_bytes
    if fitting < num_slots + 1:
        raise ConfigError(
            f"{num_slots} requests of {row_bytes / (1 << 30):.1f} GiB of addresses each do not fit the address space; "
            f"lower --max-running-requests to {fitting - 1} or lower --context-length"
        )
    wanted = config.num_rows if config.num_rows is not None else 2 * num_slots + 1
    if wanted < num_slots + 1:
        raise ConfigError(
            f"--vtensor-num-rows {wanted} is too few for {num_slots} requests at once; give at least {num_slots + 1}"
        )
    return min(wanted, fitting)


def _max_mappings(driver_name: str, num_pages: int, max_pages_a_row: int) -> int | None:
    """On the host each mapping is one of the process's ``vm.max_map_count``; homes take one a page."""
    if driver_name != "host":
        return None
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    left = limit - HOST_SPARE_MAPPINGS - (num_pages + 1)
    if left < 2 * max_pages_a_row:
        raise ConfigError(
            f"{num_pages} pages leave {max(left, 0)} of Linux's {limit} mappings for rows; lower --max-total-tokens, "
            "raise --vtensor-page-tokens, or raise vm.max_map_count with sysctl"
        )
    return left


def runtime_of(owner: Any) -> Runtime | None:
    """The runtime of a model runner, None where it runs without vTensor memory."""
    return getattr(owner, "vtensor", None)


# Hooks of the scheduler's path.


def alloc_for_extend(original: Callable[..., Any], batch: Any) -> Any:
    """Hook: the pages of a prefill."""
    allocator = batch.token_to_kv_pool_allocator
    if not isinstance(allocator, VTensorAllocator):
        return original(batch)
    with allocator.serving(batch, extending=True), batch.tree_cache.granting(batch.reqs):
        result = original(batch)
        allocator.point_at_copies(batch.req_to_token_pool)
        return result


def alloc_for_decode(original: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Hook: the pages of a decode step."""
    allocator = batch.token_to_kv_pool_allocator
    if not isinstance(allocator, VTensorAllocator):
        return original(batch, *args, **kwargs)
    with allocator.serving(batch, extending=False):
        return original(batch, *args, **kwargs)


def forward_batch(original: Callable[..., Any], worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Hook around one launch. In overlap mode SGLang has made the forward stream current here."""
    runtime = runtime_of(worker.model_runner)
    if runtime is None or batch is None:
        return original(worker, batch, *args, **kwargs)
    runtime.begin_launch(batch)
    try:
        return original(worker, batch, *args, **kwargs)
    finally:
        runtime.end_launch(batch)


def map_waiting(result: Any, scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """Hook, behind a launch."""
    runtime = runtime_of(scheduler.tp_worker.model_runner)
    if runtime is not None:
        runtime.map_waiting(scheduler.waiting_queue, scheduler.tree_cache, batch)


def on_idle(scheduler: Any) -> None:
    """Hook: no batch is in flight."""
    runtime = runtime_of(scheduler.tp_worker.model_runner)
    if runtime is not None:
        runtime.idle(scheduler.tree_cache, time.monotonic())


def add_internal_state(original: Callable[..., Any], controller: Any, recv_req: Any) -> Any:
    """Hook: our section of ``/server_info``, or, where the page asks, its picture and nothing else."""
    scheduler = controller.scheduler
    runtime = runtime_of(scheduler.tp_worker.model_runner)
    if runtime is None:
        return original(controller, recv_req)
    if recv_req.rid == page.ASKS:
        return GetInternalStateReqOutput(internal_state=page.picture(runtime, scheduler, time.monotonic()))
    result = original(controller, recv_req)
    result.internal_state["vtensor"] = runtime.figures(scheduler)
    return result


def bound_requests(result: tuple[Any, ...], worker: Any) -> tuple[Any, ...]:
    """Hook, once all is built: the longest request that SGLang accepts, within the limit; the line at start."""
    runtime = runtime_of(worker.model_runner)
    if runtime is None:
        return result
    logger.info(runtime.describe())
    runtime.policy.full_request_lens = result[4], result[5]
    return (*result[:4], *runtime.policy.request_lens(), *result[6:])


def add_update_handlers(result: dict[str, Any], controller: Any) -> dict[str, Any]:
    """Hook: the limit among the things that ``POST /set_internal_state`` changes."""
    from sglang.srt.managers.scheduler_components.internal_state import UpdateRejected

    runtime = runtime_of(controller.scheduler.tp_worker.model_runner)
    if runtime is None:
        return result
    return result | {LimitHandler.KEY: LimitHandler(runtime.policy, controller.scheduler, UpdateRejected)}


def add_decision(result: list[Any], scheduler: Any) -> list[Any]:
    """Hook, on rank 0: what the memory of all ranks asks for travels with the requests."""
    runtime = runtime_of(scheduler.tp_worker.model_runner)
    if runtime is None or runtime.policy.ranks is None:
        return result
    decision = runtime.policy.decide(scheduler.tree_cache, time.monotonic())
    return result if decision is None else [*result, decision]


def follow_decisions(original: Callable[..., Any], scheduler: Any, recv_reqs: list[Any]) -> Any:
    """Hook, on all ranks, in the step in which SGLang takes up these requests."""
    runtime = runtime_of(scheduler.tp_worker.model_runner)
    if runtime is None:
        return original(scheduler, recv_reqs)
    requests = []
    for request in recv_reqs:
        if isinstance(request, Decision):
            runtime.policy.follow(request, scheduler.tree_cache)
        else:
            requests.append(request)
    runtime.update_metrics(scheduler, time.monotonic())
    return original(scheduler, requests)
