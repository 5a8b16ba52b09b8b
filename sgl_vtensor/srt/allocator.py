"""SGLang's paged allocator with its free list on the host: it knows which request gets which page, without a sync."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.prefill_budget import PrefillBudget

from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.errors import VTensorError
from sgl_vtensor.srt.flags import active_config
from sgl_vtensor.srt.memory import MemoryPolicy
from sgl_vtensor.srt.pool import VTensorKVPool

logger = logging.getLogger(__name__)

LAST_REQUEST_SECONDS = 2.0
LAST_REQUEST_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class PageCopy:
    """The first ``len_tokens`` tokens of one page are to be those of another: one contiguous copy."""

    source: int
    target: int
    len_tokens: int


class VTensorPrefillBudget(PrefillBudget):
    """Admits what the limit allows, and no more than memory is found for now, whatever the books say (wall W3).

    What was accepted before the limit fell is served: while nothing runs, the first request is bound by the pool only.
    """

    allocator: VTensorAllocator
    tree_cache: Any
    total_offset: int
    current_offset: int
    page_size: int

    def __init__(self, allocator: VTensorAllocator, tree_cache: Any, *, num_mixed_decode_tokens: int = 0) -> None:
        super().__init__(allocator, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)
        self._most_in_use = allocator.pool.pages.most_in_use(beyond_limit=True)
        self._num_mixed = num_mixed_decode_tokens
        self._nothing_runs = allocator.pool.num_open == 0

    def _beyond_limit(self) -> bool:
        return self._nothing_runs and self.current_offset == self._num_mixed

    def _available_and_evictable(self) -> int:
        pages = self.allocator.pool.pages
        most = self._most_in_use if self._beyond_limit() else min(self._most_in_use, pages.limit_pages)
        room_tokens = (most - pages.num_in_use) * self.page_size  # negative where the limit has just fallen
        evictable: int = self.tree_cache.evictable_size()
        return min(self.allocator.available_size(), room_tokens) + evictable

    def check_prefill(
        self, *, extend_input_len: int, total_tokens: int, chunk_limit: int | None, **others: Any
    ) -> tuple[bool, int | None]:
        fits = super().check_prefill(
            extend_input_len=extend_input_len, total_tokens=total_tokens, chunk_limit=chunk_limit, **others
        )
        now = extend_input_len if chunk_limit is None else min(extend_input_len, chunk_limit)
        if fits[0] and self._secure(now):
            return fits
        self.allocator.note_shortage()
        return False, None

    def can_allocate_prefill(self, *, paged_input: int, chunk_limit: int | None, **others: Any) -> bool:
        now = paged_input if chunk_limit is None else min(paged_input, chunk_limit)
        return super().can_allocate_prefill(
            paged_input=paged_input, chunk_limit=chunk_limit, **others
        ) and self._secure(now)

    def fit_chunk(self, *, extend_input_len: int, max_new_tokens: int, chunk_limit: int) -> int | None:
        """The next chunk of a prefill under way: the limit does not stop it. Without memory it waits (``None``)."""
        if self._secure(min(extend_input_len, chunk_limit), beyond_limit=True):
            return chunk_limit
        ready = self.allocator.pool.pages.num_free_backed * self.page_size
        fitting = (ready - self.current_offset) // self.page_size * self.page_size
        return min(chunk_limit, fitting) if fitting > 0 else None

    def _secure(self, num_tokens: int, *, beyond_limit: bool = False) -> bool:
        """Take the memory for these tokens and all that was admitted before them in this pass.

        Cached prefixes give theirs later: the requests behind these may hit them, and lock what they hit.
        """
        admitted = self.ceil_paged_tokens(self.current_offset) + self.ceil_paged_tokens(num_tokens)
        return self.allocator.can_serve(
            admitted // self.page_size + 1 + self._num_mixed,
            self.tree_cache,
            beyond_limit=beyond_limit or self._beyond_limit(),
        )


class VTensorAllocator(PagedTokenToKVPoolAllocator):
    """Slots are ``page_id * page_size + offset``, as in the base class; pages come from :class:`VTensorPool`.

    SGLang's calls carry no request, so ``serving`` names the batch for which the calls inside it are made.
    """

    _kvcache: VTensorKVPool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._pool: VTensorPool | None = None
        self._policy: MemoryPolicy | None = None
        self._batch: Any = None
        self._copied: dict[int, tuple[int, int]] = {}
        self.extending = False
        self.tokens_hit = 0
        self.tokens_computed = 0
        """Of prompts: found in the cache, and not."""
        self.copies: list[PageCopy] = []
        """Beginnings of cached pages to copy into requests' own pages, before anything else of the next launch."""
        super().__init__(*args, **kwargs)
        self.free_pages = torch.empty(0, dtype=torch.int64)  # so SGLang's page check asks ``get_all_free_pages``

    def attach(self, pool: VTensorPool, policy: MemoryPolicy) -> None:
        """The rows exist now; allocation may begin."""
        self._pool = pool
        self._policy = policy

    @property
    def pool(self) -> VTensorPool:
        if self._pool is None:
            raise VTensorError("pages are asked for before the rows were made; please report this")
        return self._pool

    @contextmanager
    def serving(self, batch: Any, *, extending: bool) -> Iterator[None]:
        """Allocate for this batch: its requests, in its order.

        The policy has its turn afterwards: nothing may let go of memory between a batch's admission and this.
        """
        self.pool.drain(in_flight=1 if batch.enable_overlap else 0)
        self._batch, self.extending = batch, extending
        try:
            yield
        finally:
            self._batch = None
        if self._policy is not None:
            self._policy.step(batch.tree_cache, time.monotonic())

    # Capacity. Retired pages count as available: reuse is ordered by the forward stream.

    def available_size(self) -> int:
        available: int = self._kvcache.pages.num_available * self.page_size
        return available

    def get_all_free_pages(self) -> torch.Tensor:
        return torch.from_numpy(np.flatnonzero(self._kvcache.pages.is_free)).to(self.device)

    def create_prefill_budget(self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0) -> VTensorPrefillBudget:
        return VTensorPrefillBudget(self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)

    def check_decode_capacity(
        self, *, num_tokens: int, tree_cache: Any, requests: Any = None, spec_algorithm: Any = None
    ) -> bool:
        """Whether the next step's pages are there, physically; SGLang retracts requests until they are.

        It aborts the last one rather than retract it. So that one is not held to the limit, and it waits a little for
        memory: for that long a neighbour may take to let go of some.
        """
        if not super().check_decode_capacity(
            num_tokens=num_tokens, tree_cache=tree_cache, requests=requests, spec_algorithm=spec_algorithm
        ):
            return False
        num_pages, is_last = -(-num_tokens // self.page_size), requests is not None and len(requests) <= 1
        waits = is_last and self.pool.pages.agreed_pages is None  # ranks that have agreed wait in their policy
        deadline = time.monotonic() + LAST_REQUEST_SECONDS
        while not self.secure(num_pages, tree_cache, beyond_limit=is_last):
            if not waits or time.monotonic() > deadline:
                return False
            time.sleep(LAST_REQUEST_POLL_SECONDS)
        return True

    def can_serve(self, num_pages: int, tree_cache: Any, *, beyond_limit: bool = False) -> bool:
        """Take memory for so many pages, but for what cached prefixes can give when the pages are allocated.

        ``beyond_limit``: if they and the limit do not suffice, what the pool's size allows.
        """
        for beyond in (False, True) if beyond_limit else (False,):
            if self.pool.secure(num_pages, beyond_limit=beyond):
                return True
            if self._obtainable(num_pages, tree_cache, beyond_limit=beyond) is not None:
                return True
        self.note_shortage()
        return False

    def _obtainable(self, num_pages: int, tree_cache: Any, *, beyond_limit: bool) -> int | None:
        """What is ``_missing``, if cached prefixes have as many to give, else None."""
        missing = self._missing(num_pages, beyond_limit=beyond_limit)
        return missing if missing <= tree_cache.evictable_size() // self.page_size else None

    def _missing(self, num_pages: int, *, beyond_limit: bool = False) -> int:
        """So many of these pages must come from cached prefixes, since neither limit nor memory allows for more.

        The same on all ranks, which have agreed on what there is. The memory for the others is taken.
        """
        pool, pages = self.pool, self.pool.pages
        missing = pages.num_in_use + num_pages - pages.most_in_use(beyond_limit=beyond_limit)
        if missing < num_pages:
            pool.secure(num_pages - max(missing, 0), beyond_limit=beyond_limit)
        if pages.agreed_pages is None:  # the driver may have refused what it said was free
            missing = max(missing, num_pages - pages.num_free_backed)
        return missing

    def evict_to_free_tokens(self, tree_cache: Any, num_tokens: int) -> bool | None:
        """SGLang counts a page too many for each request before it allocates; there ``_grow`` evicts what lacks."""
        if self._batch is not None:
            return None
        evicted: bool | None = super().evict_to_free_tokens(tree_cache, num_tokens)
        return evicted

    def secure(self, num_pages: int, tree_cache: Any, *, beyond_limit: bool = False) -> bool:
        """Take memory for so many pages, from cached prefixes if need be; leave those alone if it would not help."""
        if beyond_limit and self.secure(num_pages, tree_cache):
            return True
        secure = functools.partial(self.pool.secure, num_pages, beyond_limit=beyond_limit)
        if secure():
            return True
        missing = self._obtainable(num_pages, tree_cache, beyond_limit=beyond_limit)
        if missing is None:
            self.note_shortage()
            return False
        return self._evict_until(secure, tree_cache, at_first=missing)

    def note_shortage(self) -> None:
        if self._policy is not None:
            self._policy.note_shortage()

    # Allocation.

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        batch, pool = self._serving_batch(), self.pool
        starts, stops = prefix_lens_cpu.tolist(), seq_lens_cpu.tolist()
        slots = [req.kv.req_pool_idx for req in batch.reqs]
        opened: list[int] = []
        hit = 0
        sources: dict[int, tuple[int, int]] = {}  # slot -> (page to copy from, prefix in tokens)
        for req, slot, start, stop in zip(batch.reqs, slots, starts, stops, strict=True):
            if not pool.is_open(slot):
                pages = batch.tree_cache.prefix_pages(req)
                if start % self.page_size:
                    sources[slot] = pages.pop(), start
                pool.open(slot, pages, stop)
                opened.append(slot)
                hit += start
        if not self._grow(slots, stops, batch.tree_cache):
            for slot in opened:
                pool.close(slot)
            return None
        self.tokens_hit += hit
        self.tokens_computed += extend_num_tokens
        self._copied = sources
        for slot, (source, start) in sources.items():
            target = int(pool.wanted[slot, start // self.page_size])
            self.copies.append(PageCopy(source, target, start % self.page_size))
        return self._to_device(self._slots_of(*_tokens(slots, starts, stops)))

    def point_at_copies(self, req_to_token_pool: Any) -> None:
        """SGLang's table names the pages that are copied from; let it name the requests' own."""
        copied, self._copied = self._copied, {}
        if not copied:
            return
        stops = [start for _, start in copied.values()]
        rows, columns = _tokens(list(copied), [stop - stop % self.page_size for stop in stops], stops)
        table = self._to_device(np.stack([rows, columns, self._slots_of(rows, columns)]))
        req_to_token_pool.write((table[0], table[1]), table[2].to(torch.int32))

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        batch = self._serving_batch()
        slots, stops = batch.req_pool_indices_cpu.numpy(), seq_lens_cpu.numpy()
        crossing = np.flatnonzero((stops - 1) % self.page_size == 0)
        following = last_loc.to(torch.int64) + 1  # right inside a page, and without a copy to the device
        if crossing.size:
            if not self._grow(slots[crossing].tolist(), stops[crossing].tolist(), batch.tree_cache):
                return None
            firsts = self._to_device(np.stack([crossing, self._slots_of(slots[crossing], stops[crossing] - 1)]))
            following[firsts[0]] = firsts[1]
        return following

    def alloc(self, need_size: int) -> torch.Tensor | None:
        raise VTensorError(
            "pages without a request are asked for; a feature in use does not work with --enable-vtensor"
        )

    def _serving_batch(self) -> Any:
        if self._batch is None:
            raise VTensorError(
                "pages are asked for outside a batch; a feature in use does not work with --enable-vtensor"
            )
        return self._batch

    def _grow(self, slots: list[int], stops: list[int], tree_cache: Any) -> bool:
        """Give the requests their pages. Within the limit, from cached prefixes if need be; only then beyond it."""
        pool = self.pool
        had = [int(pool.num_wanted[slot]) for slot in slots]
        num_pages = sum(max(0, pool.layout.num_pages(stop) - have) for stop, have in zip(stops, had, strict=True))
        if not pool.secure(num_pages) and (missing := self._missing(num_pages)) > 0:
            tree_cache.evict(EvictParams(num_tokens=missing * self.page_size))
        grow = lambda: pool.grow(slots, stops, beyond_limit=True)  # noqa: E731
        if not grow() and not self._evict_until(grow, tree_cache):
            return False
        ends = [divmod(stop, self.page_size) for stop in stops]
        begun = [(slot, at) for slot, have, (at, rest) in zip(slots, had, ends, strict=True) if rest and at >= have]
        pool.clear([int(pool.wanted[place]) for place in begun])
        return True

    def _evict_until(self, succeeds: Callable[[], bool], tree_cache: Any, *, at_first: int = 1) -> bool:
        """Evict the pages known to be missing, then one by one until a neighbour's hunger for memory is made good."""
        num_pages = max(1, at_first)
        while tree_cache.evict(EvictParams(num_tokens=num_pages * self.page_size)).num_tokens_evicted > 0:
            if succeeds():
                return True
            num_pages = 1
        return False

    def _slots_of(self, slot: Any, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Token slots at token positions of one request each."""
        pages = self.pool.wanted[slot, positions // self.page_size].astype(np.int64)
        slots: npt.NDArray[np.int64] = pages * self.page_size + positions % self.page_size
        return slots

    def _to_device(self, values: npt.NDArray[np.int64]) -> torch.Tensor:
        return to_device(values, self.device)

    # Freeing: always host pages, never a device tensor.

    def free_segment(self, free_index: Any, *, start_pos: int) -> None:
        """Free what the tree evicts: a :class:`~sgl_vtensor.srt.prefix.PageRun`."""
        self.pool.free(free_index.pages)

    def free(self, free_index: torch.Tensor) -> None:
        # SGLang comes here only to roll back an allocation whose rows could not be mapped: the server stops anyway.
        logger.error("vTensor memory could not map a batch that SGLang has committed itself to; the server stops")

    def free_group_begin(self) -> None:
        self.free_group = []

    def free_group_end(self) -> None:
        self.free_group = None

    def merge_and_sort_free(self) -> None:
        pass

    def clear(self) -> None:
        self.free_group = None
        self.copies = []
        if self._pool is not None and self._policy is not None:
            self._pool.reset()
            self._policy.flushed()


def _tokens(
    slots: list[int], starts: list[int], stops: list[int]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Request slot and position of each token of [start, stop) of each request, in order."""
    first = np.asarray(starts, dtype=np.int64)
    lens = np.asarray(stops, dtype=np.int64) - first
    ends = np.cumsum(lens)
    return np.repeat(slots, lens), np.arange(ends[-1]) + np.repeat(first - ends + lens, lens)


def to_device(values: npt.NDArray[Any], device: Any) -> torch.Tensor:
    """Copy host numbers to the device without waiting: from pinned memory, in stream order."""
    tensor = torch.from_numpy(values)
    if torch.device(device).type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def paged_allocator_class(original: Callable[..., Any], platform: Any) -> type | None:
    """Hook: the allocator class of a CUDA server with ``--enable-vtensor``."""
    if active_config() is None:
        allocator_class: type | None = original(platform)
        return allocator_class
    return VTensorAllocator


def fill_chunks_exactly(original: Callable[[], bool]) -> bool:
    """Hook: what a prefill pass may compute is counted in tokens, as with page 1; its memory still in whole pages."""
    return active_config() is not None or original()
