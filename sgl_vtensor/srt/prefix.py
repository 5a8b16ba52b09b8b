"""SGLang's radix cache with page ids on the host in its nodes, so that a hit or an eviction needs no device copy."""

from __future__ import annotations

import time
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from heapq import heapify, heappop, heappush, heapreplace
from itertools import chain, count
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, EvictResult, MatchPrefixParams, MatchResult
from sglang.srt.mem_cache.common import coalesce_ranges
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode
from sglang.srt.mem_cache.registry import TreeCacheBuildContext, register_radix_cache_backend

from sgl_vtensor.errors import ConfigError, VTensorError
from sgl_vtensor.srt.allocator import VTensorAllocator, to_device
from sgl_vtensor.srt.flags import NAME

NO_TOKEN = -1
"""Stands behind the last token of a page that is not full. ``check_prompt`` lets no prompt have it, so a match ends
there: what lies behind are another request's bytes."""

FRESH_SHARE = 1 / 16
"""A page that is not full keeps its turn until the tree has been given so many of the pool's pages: chats that go on at
once find it. With none of it chats of 16k tokens, three times what the pool holds, find 83.8% of their prompts, 84.5%
with it; with an eighth questions that come again find 90% in a pool that lacks 5%, 97% with a sixteenth."""

Line = list[tuple[float, int, TreeNode]]
"""A heap of leaves: the time of a last use, a number, and the leaf."""


class PageRun:
    """What a node holds in place of a tensor of slots: whole pages, sliced in tokens as the base class does."""

    __slots__ = ("given_before", "page_tokens", "pages")

    def __init__(self, pages: list[int], page_tokens: int) -> None:
        self.pages = pages
        self.page_tokens = page_tokens
        self.given_before: int | None = None
        """Of a page that is not full: how many pages the tree had been given before it."""

    def __len__(self) -> int:
        return len(self.pages) * self.page_tokens

    def __getitem__(self, tokens: slice) -> PageRun:
        start, stop, step = tokens.indices(len(self))
        if step != 1 or start % self.page_tokens or stop % self.page_tokens:
            raise VTensorError(f"a page is cut in two by [{start}, {stop}); please report this")
        return PageRun(self.pages[start // self.page_tokens : stop // self.page_tokens], self.page_tokens)

    def clone(self) -> PageRun:
        return PageRun(list(self.pages), self.page_tokens)


class VTensorRadixCache(RadixCache):
    """Which prefixes are kept, and for how long, is SGLang's to decide; who owns which page is ours to record.

    A page that is not full, the last of a request, is one leaf. It costs as much as a full one and saves less to
    compute, so it goes before any of those, unless it is fresh; and at once when the tree has a page that begins with
    the same tokens.

    A page belongs to exactly one of: the free pages, one node, or one request (behind ``cache_protected_len``).

    A hit is counted in tokens, although pages are shared whole: where a request goes on like the beginning of a cached
    page, those tokens are copied into the request's own page before its launch (``cache_protected_len`` stays at the
    page's border, ``prefix_len`` is behind it).
    """

    token_to_kv_pool_allocator: VTensorAllocator
    least_computed = 1
    """Tokens of a prompt that are computed, however much of it is cached. Where SGLang captures prefills, as many as
    the smallest graph takes: one token alone runs without, each kernel launched by itself, 15 ms for an 8B model."""

    def reset(self) -> None:
        # Leaves by the time of their last use, as it was when they came in: times only grow, so that the first is not
        # older than it says, and nobody needs to look at all of them. The count decides between equal times alike on
        # all ranks. Leaves that are one page, not full, stand in a line of their own.
        self._tails: Line = []
        self._by_age: Line = []
        self._aging: set[TreeNode] = set()
        self._num_dropped = 0
        self._num_given = 0
        self._arrivals = count()
        super().reset()
        num_pages = self.token_to_kv_pool_allocator.size // self.page_size
        self.is_cached: npt.NDArray[np.bool_] = np.zeros(num_pages + 1, dtype=bool)
        """[num_pages + 1]: which pages the tree owns, and in how many nodes; ``/vtensor`` need not walk it to know."""
        self.num_nodes = 0
        self._positions = torch.arange(self.page_size, device=self.device)
        self._granted: dict[TreeNode, tuple[list[int], torch.Tensor]] = {}
        # (node, namespace) -> the first pages of its children, sorted: neighbours share the longest beginnings.
        self._first_pages: dict[tuple[int, str | None, str | None], list[tuple[int, ...]]] = {}

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        key = params.key
        key = RadixKey(key.token_ids, key.extra_key, limit=self._most_shared(len(key)), cache_salt=key.cache_salt)
        result = super().match_prefix(replace(params, key=key))
        matched = result.device_prefix_len
        if self.disable or matched >= len(key):
            return result
        node = result.last_device_node
        rest = tuple(key.token_ids[matched : min(matched + self.page_size, len(key))])
        page, shared = self._closest_page(node, key, rest)
        if not shared:
            return result
        child = self._child(node, key, page)
        if len(child.key) > self.page_size:
            child = self._split_node(child.key, child, self.page_size)
        child.last_access_time = time.monotonic()
        # The request locks the page that it copies from, for as long as it would lock any other prefix.
        return result._replace(
            device_prefix_len=matched + shared,
            last_device_node=child,
            last_host_node=child,
            best_match_node=child,
            cache_protected_len=matched,
        )

    def _most_shared(self, len_tokens: int) -> int:
        """Of as many tokens as SGLang would have shared, which is one less than the prompt has."""
        return max(len_tokens + 1 - self.least_computed, 0)

    def _closest_page(self, node: TreeNode, key: RadixKey, rest: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """The first page of a child that begins most like ``rest``, and how many tokens they share."""
        pages = self._first_pages.get((node.id, key.extra_key, key.cache_salt), [])
        at = bisect_left(pages, rest)
        best: tuple[tuple[int, ...], int] = ((), 0)
        for page in pages[max(at - 1, 0) : at + 1]:
            shared = _num_shared(page, rest)
            if shared > best[1]:
                best = (page, shared)
        return best

    def _child(self, node: TreeNode, key: RadixKey, page: tuple[int, ...]) -> TreeNode:
        """The child that begins with a page, in the key's namespace."""
        key = RadixKey(array("q", page), key.extra_key, cache_salt=key.cache_salt)
        child: TreeNode = node.children[key.child_key(self.page_size)]
        return child

    def _first_page(self, node: TreeNode) -> tuple[int, ...]:
        return tuple(node.key.token_ids[: self.page_size])

    def _siblings(self, node: TreeNode) -> list[tuple[int, ...]]:
        """First pages of the parent's children, of this node's namespace."""
        return self._first_pages.setdefault((node.parent.id, node.key.extra_key, node.key.cache_salt), [])

    def _insert_helper(
        self, above: TreeNode, key: RadixKey, value: PageRun, *args: Any, **kwargs: Any
    ) -> tuple[int, TreeNode]:
        matched, node = super()._insert_helper(above, key, value, *args, **kwargs)
        if matched < len(key):
            new = value.pages[matched // self.page_size :]
            self.is_cached[new] = True
            self._num_given += len(new)
            self.num_nodes += 1
        if node is not self.root_node:
            siblings, page = self._siblings(node), self._first_page(node)
            at = bisect_left(siblings, page)
            if at == len(siblings) or siblings[at] != page:
                siblings.insert(at, page)
                self._drop_beginnings(node, page, siblings)
        return matched, node

    def _is_covered(self, node: TreeNode, tail: RadixKey) -> bool:
        """Whether a child of ``node`` begins with the tokens of a page that is not full, and goes on."""
        page = tuple(tail.token_ids)
        siblings = self._first_pages.get((node.id, tail.extra_key, tail.cache_salt), [])
        at = bisect_right(siblings, page)
        return at < len(siblings) and _num_shared(siblings[at], page) == page.index(NO_TOKEN)

    def _drop_beginnings(self, node: TreeNode, page: tuple[int, ...], siblings: list[tuple[int, ...]]) -> None:
        """Take pages out of the tree that are not full and whose tokens are the beginning of a new node's ``page``.

        The last page of a chat's turn, once its next turn is there: whoever wants these tokens copies them from here.
        """
        at = bisect_left(siblings, page) - 1
        while at >= 0 and (shared := _num_shared(siblings[at], page)):
            # No other sibling has more in common with the page: the next candidate ends there, or before.
            beginning = page[:shared] + (NO_TOKEN,) * (len(page) - shared)
            if siblings[at] != beginning:
                at = bisect_right(siblings, beginning) - 1
                continue
            child = self._child(node.parent, node.key, beginning)
            if child.lock_ref == 0:
                self._evict_leaf(child)
                self._note_dropped()
            at -= 1

    def _split_node(self, key: RadixKey, child: TreeNode, split_len: int) -> TreeNode:
        upper = super()._split_node(key, child, split_len)
        self._siblings(child).append(self._first_page(child))
        self.num_nodes += 1
        return upper

    def _delete_leaf(self, node: TreeNode) -> None:
        siblings = self._siblings(node)
        del siblings[bisect_left(siblings, self._first_page(node))]
        if not siblings:
            del self._first_pages[node.parent.id, node.key.extra_key, node.key.cache_salt]
        super()._delete_leaf(node)
        self.is_cached[node.value.pages] = False
        self.num_nodes -= 1

    # Eviction. SGLang's looks at every leaf at each call: it is left to policies that are not the default one.

    @property
    def _is_lru(self) -> bool:
        return self.eviction_policy == "lru"

    def _update_leaf_status(self, node: TreeNode) -> None:
        super()._update_leaf_status(node)
        if self._is_lru and node in self.evictable_leaves and node not in self._aging:
            self._push(node)

    def _push(self, leaf: TreeNode) -> None:
        self._aging.add(leaf)
        line = self._by_age
        if leaf.key.token_ids[-1] == NO_TOKEN:
            line = self._tails
            if leaf.value.given_before is None:
                leaf.value.given_before = self._num_given
        heappush(line, (leaf.last_access_time, next(self._arrivals), leaf))

    def _oldest(self, line: Line) -> TreeNode | None:
        """The evictable leaf that nobody asked for the longest; it is then the first in its line."""
        while line:
            noted, _, leaf = line[0]
            if leaf not in self.evictable_leaves:
                self._pop(line)
            elif leaf.last_access_time > noted:
                heapreplace(line, (leaf.last_access_time, next(self._arrivals), leaf))
            else:
                return leaf
        return None

    def _pop(self, line: Line) -> TreeNode:
        leaf = heappop(line)[2]
        self._aging.remove(leaf)
        return leaf

    def _note_dropped(self) -> None:
        """A leaf is gone before its turn. What stands in line no more is forgotten from time to time."""
        self._num_dropped += 1
        if self._num_dropped > len(self._tails) // 2:
            self._num_dropped = 0
            self._aging.difference_update(leaf for _, _, leaf in self._tails)
            self._tails = [entry for entry in self._tails if entry[2] in self.evictable_leaves]
            heapify(self._tails)
            self._aging.update(leaf for _, _, leaf in self._tails)

    def _evict_leaf(self, leaf: TreeNode) -> int:
        """Its tokens, empty ones of its last page included."""
        self.token_to_kv_pool_allocator.free_segment(leaf.value, start_pos=0)
        self._delete_leaf(leaf)
        self.kv_events.record_remove(leaf)
        return len(leaf.value)

    def evict(self, params: EvictParams) -> EvictResult:
        """The least recently used leaves, of which those go first that hold few tokens in a whole page for a while."""
        if self.disable or not self._is_lru:
            return super().evict(params)
        return EvictResult(num_tokens_evicted=self._evict_leaves(params.num_tokens, by_age=False))

    def old_pages(self, used_before: float, at_most: int) -> int:
        """Pages that could go and were last used before that time (``time.monotonic``), as far as ``at_most``."""
        at_most = max(0, at_most)
        if not self._is_lru:
            old = (leaf for leaf in self.evictable_leaves if leaf.last_access_time < used_before)
            return min(sum(len(leaf.value.pages) for leaf in old), at_most)
        found, num_pages = [], 0
        for line in (self._tails, self._by_age):
            while num_pages < at_most and (leaf := self._oldest(line)) and leaf.last_access_time < used_before:
                found.append(self._pop(line))
                num_pages += len(leaf.value.pages)
        for leaf in found:
            self._push(leaf)
        return min(num_pages, at_most)

    def evict_oldest(self, num_pages: int) -> int:
        """Let so many pages go by their age alone, as :meth:`old_pages` has counted them; return how many went."""
        num_tokens = num_pages * self.page_size
        if self.disable or not self._is_lru:
            done: int = super().evict(EvictParams(num_tokens=num_tokens)).num_tokens_evicted
            return done // self.page_size
        return self._evict_leaves(num_tokens, by_age=True) // self.page_size

    def _evict_leaves(self, num_tokens: int, *, by_age: bool) -> int:
        """By their age, or pages that are not full nor fresh first; returns how many tokens went."""
        start, evicted = time.perf_counter(), 0
        while evicted < num_tokens and (lines := [line for line in (self._tails, self._by_age) if self._oldest(line)]):
            line = min(lines, key=lambda line: line[0])
            if not by_age and lines[0] is self._tails and not self._is_fresh(self._tails[0][2]):
                line = self._tails
            evicted += self._evict_leaf(self._pop(line))
        self.update_eviction_metrics(evicted, start)
        return evicted

    def _is_fresh(self, tail: TreeNode) -> bool:
        """Whether a chat may come back to its last page soon: by what all ranks count alike, which no time is."""
        given: int = self._num_given - tail.value.given_before
        return given < FRESH_SHARE * len(self.is_cached)

    @property
    def pool(self) -> Any:
        return self.token_to_kv_pool_allocator.pool

    def _path(self, node: TreeNode, above: TreeNode | None = None) -> list[PageRun]:
        """Runs from below ``above``, by default the root, down to ``node``."""
        above, runs = above or self.root_node, []
        while node is not above:
            runs.append(node.value)
            node = node.parent
        runs.reverse()
        return runs

    def path_pages(self, node: TreeNode) -> list[int]:
        """Page ids from the root to ``node``."""
        granted = self._granted.get(node)
        return [page for run in self._path(node) for page in run.pages] if granted is None else granted[0]

    def prefix_pages(self, req: Any) -> list[int]:
        """Page ids of the prefix that a request has been granted; the last is copied from if only in part its."""
        return self.path_pages(req.last_node)[: -(-req.prefix_len // self.page_size)]

    def known_pages(self, req: Any) -> list[int]:
        """Page ids of the whole pages that a waiting request would be granted now.

        It only looks: nothing is used by it, split, or locked.
        """
        if self.disable or req.positional_embed_overrides is not None:
            return []
        token_ids = req.origin_input_ids + req.output_ids
        limit = self._most_shared(req._compute_max_prefix_len(len(token_ids)))
        key = RadixKey(token_ids, req.extra_key, limit=limit, cache_salt=req.cache_salt)
        node, depth = self.root_node, 0
        pages: list[int] = []
        while depth + self.page_size <= len(key):
            child = node.children.get(key.child_key_at(depth, self.page_size))
            if child is None:
                break
            matched = child.key.match_at(key, depth, page_size=self.page_size)
            pages += child.value.pages[: matched // self.page_size]
            depth += matched
            if matched < len(child.key):
                break
            node = child
        return pages

    @contextmanager
    def granting(self, reqs: Sequence[Any]) -> Iterator[None]:
        """Meanwhile SGLang asks for these requests' paths, one by one: they are copied to the device together."""
        nodes = {req.last_node for req in reqs if req.prefix_len and not req.kv.holds_kv}
        paths = [self.path_pages(node) for node in nodes]
        self._granted = dict(zip(nodes, zip(paths, self._device_slots(paths), strict=True), strict=True))
        try:
            yield
        finally:
            self._granted = {}

    def path_device_indices(self, node: TreeNode) -> torch.Tensor:
        granted = self._granted.get(node)
        return self._device_slots([self.path_pages(node)])[0] if granted is None else granted[1]

    def _device_slots(self, paths: list[list[int]]) -> Sequence[torch.Tensor]:
        """Slots of each path's tokens. Page ids are copied, all at once; the device counts their tokens out."""
        if not any(paths):
            return [self._empty_device_indices] * len(paths)
        pages = to_device(np.fromiter(chain.from_iterable(paths), dtype=np.int64), self.device)
        slots = torch.add(self._positions, pages[:, None], alpha=self.page_size)  # [pages, page_tokens] int64
        return slots.view(-1).split([len(path) * self.page_size for path in paths])

    def checkpoint(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        """Give the tree the request's full pages up to ``up_to``; where it has them already, use the tree's.

        A request that has finished gives its last page, too, although it is not full.

        The request's duplicates are freed in the books, but its row keeps showing them until it retires, because a
        launch may be reading them (design: wall W1).
        """
        if self.disable:
            return
        slot, page_size = req.kv.req_pool_idx, self.page_size
        fill_ids = req.full_untruncated_fill_ids
        num_tokens = min(up_to, len(fill_ids))
        key_len = num_tokens // page_size * page_size
        priority = req.priority or 0
        above, start = self._resume(req)
        # Before what follows, which may take the page that the request has copied from out of the tree.
        self.unlock(req.lock)
        self._touch(above, priority)
        self._count_hits(above, start, req.kv.cache_inserted_len)
        node, pages = above, self.pool.pages_of(slot, start // page_size, key_len // page_size)
        if pages:
            key, inserted_len = self._key_of(req, fill_ids[start:key_len]), req.kv.cache_inserted_len - start
            _, node = self._insert_helper(above, key, PageRun(pages, page_size), priority, inserted_len)
        if num_tokens > key_len and req.finished() and not self.kv_events.enabled:
            # Nobody writes these tokens' page any more: the next turn of a chat copies from it. Whole pages only, so
            # SGLang's accounting needs to know nothing of it; KV events would tell others of tokens that are none.
            padding = array("q", [NO_TOKEN] * (page_size - (num_tokens - key_len)))
            key = self._key_of(req, fill_ids[key_len:num_tokens] + padding)
            if not self._is_covered(node, key):
                pages += (tail := self.pool.pages_of(slot, key_len // page_size, key_len // page_size + 1))
                inserted_len = req.kv.cache_inserted_len - key_len
                _, node = self._insert_helper(node, key, PageRun(tail, page_size), priority, inserted_len)
                key_len += page_size
        req.kv.cache_inserted_len = max(req.kv.cache_inserted_len, key_len)
        self._split_at_prompt(node, key_len, len(req.origin_input_ids) // page_size * page_size, priority)

        kept = [page for run in self._path(node, above) for page in run.pages]
        if len(kept) != len(pages):
            raise VTensorError(f"the tree kept {len(kept)} of {len(pages)} pages; please report this")
        changed = self.pool.adopt(slot, start // page_size, kept)
        if changed and not req.finished():
            # A paged backend reads pages through this table; only what changed is written. A launch that still has a
            # request which has finished reads its duplicates, and they are written anew behind it at the earliest.
            first, last = changed[0] * page_size, (changed[-1] + 1) * page_size
            slots = self._device_slots([self.pool.pages_of(slot, changed[0], changed[-1] + 1)])[0]
            self.req_to_token_pool.write((slot, slice(first, last)), slots)
        req.kv.cache_protected_len = key_len
        req.lock = self.lock(node)
        req.last_node = node

    def _resume(self, req: Any) -> tuple[TreeNode, int]:
        """The node down to which the tree owns the request's pages, and how many tokens lead there.

        The request locks it, so no walk from the root is needed: a long prompt's tokens are not compared anew.
        """
        node, protected = req.last_node, req.kv.cache_protected_len
        depth = sum(len(run) for run in self._path(node))
        while depth > protected:  # a page whose beginning was copied
            depth -= len(node.value)
            node = node.parent
        if depth != protected:
            raise VTensorError(f"no node ends at the {protected} tokens that a request shares; please report this")
        return node, depth

    def _touch(self, node: TreeNode, priority: int) -> None:
        """What the base class does on its way down to a node."""
        now = time.monotonic()
        while node is not None:
            node.last_access_time = now
            node.priority = max(node.priority, priority)
            node = node.parent

    def _count_hits(self, node: TreeNode, end: int, inserted_len: int) -> None:
        """Of the path to ``node``, which ends at token ``end``, what lies behind ``inserted_len`` is a hit: once."""
        while end > inserted_len:
            self._inc_hit_count(node)
            end -= len(node.value)
            node = node.parent

    def free_kv_row(self, kv: Any, ranges: list[tuple[int, int]]) -> None:
        for start, stop in coalesce_ranges(ranges):
            if start >= stop:
                continue
            if start % self.page_size:
                raise VTensorError(f"[{start}, {stop}) begins inside a page; please report this")
            pages = self.pool.pages_of(kv.req_pool_idx, start // self.page_size, -(-stop // self.page_size))
            self.pool.free(pages)

    def all_pages(self) -> list[int]:
        """Every page that the tree owns."""
        pages: list[int] = []
        stack = list(self.root_node.children.values())
        while stack:
            node = stack.pop()
            pages.extend(node.value.pages)
            stack.extend(node.children.values())
        return pages

    def all_values_flatten(self) -> torch.Tensor:
        return self._device_slots([self.all_pages()])[0]

    def _key_of(self, req: Any, token_ids: Any) -> RadixKey:
        key = RadixKey(token_ids, req.extra_key, is_bigram=False, cache_salt=req.cache_salt)
        return key.page_aligned(self.page_size)

    def _split_at_prompt(self, node: TreeNode, node_end: int, prompt_len: int, priority: int) -> None:
        """As in the base class: eviction can then drop what was generated, the end of ``node``, and keep the prompt."""
        if not 0 < prompt_len < node_end:
            return
        start = node_end - len(node.value)
        while start >= prompt_len:
            node = node.parent
            start -= len(node.value)
        if prompt_len < start + len(node.value):
            node = self._split_node(node.key, node, prompt_len - start)
        self._touch(node, min(priority + 1, torch.iinfo(torch.int64).max))


def _num_shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many tokens are the same at the beginning of both."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def build_tree(context: TreeCacheBuildContext) -> VTensorRadixCache:
    """SGLang's factory for ``--radix-cache-backend vtensor``. The last place to notice that a hook is missing."""
    from sglang.srt.model_executor.runner import prefill_cuda_graph_runner  # seconds, and the runner has it by now

    from sgl_vtensor.srt import compat

    compat.check_installed()
    allocator = context.params.token_to_kv_pool_allocator
    if not isinstance(allocator, VTensorAllocator):
        raise ConfigError(
            f"SGLang built a {type(allocator).__name__} in place of vTensor memory's allocator; "
            "start the server with --enable-vtensor rather than with --radix-cache-backend vtensor"
        )
    tree = VTensorRadixCache(context.params)
    graphs = context.tp_worker.model_runner.prefill_cuda_graph_runner
    if isinstance(graphs, prefill_cuda_graph_runner.PrefillCudaGraphRunner):
        padding = prefill_cuda_graph_runner._MAX_PREFILL_CUDA_GRAPH_PADDING_FACTOR
        tree.least_computed = -(-min(graphs.capture_num_tokens) // padding)
    return tree


def register_tree() -> None:
    register_radix_cache_backend(NAME, build_tree)  # type: ignore[arg-type]
