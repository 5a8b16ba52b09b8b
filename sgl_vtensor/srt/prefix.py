"""SGLang's radix cache with page ids on the host in its nodes, so that a hit or an eviction needs no device copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.common import coalesce_ranges
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode
from sglang.srt.mem_cache.registry import TreeCacheBuildContext, register_radix_cache_backend

from sgl_vtensor.errors import ConfigError, VTensorError
from sgl_vtensor.srt.allocator import VTensorAllocator, to_device
from sgl_vtensor.srt.flags import NAME


class PageRun:
    """What a node holds in place of a tensor of slots: whole pages, sliced in tokens as the base class does."""

    __slots__ = ("page_tokens", "pages")

    def __init__(self, pages: list[int], page_tokens: int) -> None:
        self.pages = pages
        self.page_tokens = page_tokens

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

    A page belongs to exactly one of: the free pages, one node, or one request (behind ``cache_protected_len``).
    """

    token_to_kv_pool_allocator: VTensorAllocator

    @property
    def pool(self) -> Any:
        return self.token_to_kv_pool_allocator.pool

    def path_pages(self, node: TreeNode) -> list[int]:
        """Page ids from the root to ``node``."""
        runs = []
        while node is not self.root_node:
            runs.append(node.value.pages)
            node = node.parent
        return [page for run in reversed(runs) for page in run]

    def prefix_pages(self, req: Any) -> list[int]:
        """Page ids of the prefix that a request has been granted."""
        if req.prefix_len % self.page_size:
            raise VTensorError(f"a prefix of {req.prefix_len} tokens is not whole pages; please report this")
        return self.path_pages(req.last_node)[: req.prefix_len // self.page_size]

    def path_device_indices(self, node: TreeNode) -> torch.Tensor:
        return self._device_slots(self.path_pages(node))

    def checkpoint(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        """Give the tree the request's full pages up to ``up_to``; where it has them already, use the tree's.

        The request's duplicates are freed in the books, but its row keeps showing them until it retires, because a
        launch may be reading them (design: wall W1).
        """
        if self.disable:
            return
        slot, page_size = req.kv.req_pool_idx, self.page_size
        token_ids = req.full_untruncated_fill_ids[:up_to]
        key = self._key_of(req, token_ids)
        pages = self.pool.pages_of(slot, 0, len(key) // page_size)
        priority = req.priority or 0
        self.insert(
            InsertParams(
                key=key,
                value=PageRun(pages, page_size),  # type: ignore[arg-type]
                inserted_len=req.kv.cache_inserted_len,
                priority=priority,
            )
        )
        req.kv.cache_inserted_len = max(req.kv.cache_inserted_len, len(key))
        self._split_at_prompt(req, token_ids, pages, len(key), priority)

        node = self.match_prefix(MatchPrefixParams(key=key)).last_device_node
        kept = self.path_pages(node)
        if len(kept) != len(pages):
            raise VTensorError(f"the tree kept {len(kept)} of {len(pages)} pages; please report this")
        first = req.kv.cache_protected_len // page_size
        changed = self.pool.adopt(slot, first, kept[first:])
        if changed:
            # A paged backend reads pages through this table; only what changed is written.
            start, stop = changed[0] * page_size, (changed[-1] + 1) * page_size
            slots = self._device_slots(kept[changed[0] : changed[-1] + 1])
            self.req_to_token_pool.write((slot, slice(start, stop)), slots.to(torch.int32))
        req.kv.cache_protected_len = len(key)
        self.unlock(req.lock)
        req.lock = self.lock(node)
        req.last_node = node

    def free_kv_row(self, kv: Any, ranges: list[tuple[int, int]]) -> None:
        for start, stop in coalesce_ranges(ranges):
            if start >= stop:
                continue
            if start % self.page_size:
                raise VTensorError(f"[{start}, {stop}) begins inside a page; please report this")
            pages = self.pool.pages_of(kv.req_pool_idx, start // self.page_size, -(-stop // self.page_size))
            self.pool.free(pages)

    def all_values_flatten(self) -> torch.Tensor:
        pages: list[int] = []
        stack = list(self.root_node.children.values())
        while stack:
            node = stack.pop()
            pages.extend(node.value.pages)
            stack.extend(node.children.values())
        return self._device_slots(pages)

    def _key_of(self, req: Any, token_ids: Any) -> RadixKey:
        key = RadixKey(token_ids, req.extra_key, is_bigram=False, cache_salt=req.cache_salt)
        return key.page_aligned(self.page_size)

    def _split_at_prompt(self, req: Any, token_ids: Any, pages: list[int], key_len: int, priority: int) -> None:
        """As in the base class: eviction can then drop what was generated and keep the prompt."""
        prompt = self._key_of(req, token_ids[: len(req.origin_input_ids)])
        if 0 < len(prompt) < key_len:
            self.insert(
                InsertParams(
                    key=prompt,
                    value=PageRun(pages[: len(prompt) // self.page_size], self.page_size),  # type: ignore[arg-type]
                    inserted_len=len(prompt),
                    priority=min(priority + 1, torch.iinfo(torch.int64).max),
                )
            )

    def _device_slots(self, pages: list[int]) -> torch.Tensor:
        if not pages:
            return self._empty_device_indices
        page_ids = to_device(np.asarray(pages, dtype=np.int64), self.device)
        offsets = torch.arange(self.page_size, device=self.device)
        return (page_ids[:, None] * self.page_size + offsets).flatten()


def build_tree(context: TreeCacheBuildContext) -> VTensorRadixCache:
    """SGLang's factory for ``--radix-cache-backend vtensor``. The last place to notice that a hook is missing."""
    from sgl_vtensor.srt import compat

    compat.check_installed()
    allocator = context.params.token_to_kv_pool_allocator
    if not isinstance(allocator, VTensorAllocator):
        raise ConfigError(
            f"SGLang built a {type(allocator).__name__} in place of vTensor memory's allocator; "
            "start the server with --enable-vtensor rather than with --radix-cache-backend vtensor"
        )
    return VTensorRadixCache(context.params)


def register_tree() -> None:
    register_radix_cache_backend(NAME, build_tree)  # type: ignore[arg-type]
