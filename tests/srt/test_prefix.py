"""The radix tree without a server: what is evicted, in which order, and what is known of a node's children."""

from __future__ import annotations

import random
import time
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode

from sgl_vtensor.srt.prefix import PageRun, VTensorRadixCache

PAGE_TOKENS = 4


class Tree:
    """A tree whose evicted pages are noted."""

    def __init__(self, policy: str = "lru") -> None:
        self.evicted: list[int] = []
        allocator: Any = SimpleNamespace(device="cpu", free_segment=self._free)
        self.cache = VTensorRadixCache(CacheInitParams(False, None, allocator, PAGE_TOKENS, eviction_policy=policy))  # type: ignore[arg-type]
        self.pages = 0

    def _free(self, run: PageRun, *, start_pos: int) -> None:
        self.evicted += run.pages

    def insert(self, tokens: list[int]) -> None:
        num_pages = len(tokens) // PAGE_TOKENS
        run: Any = PageRun(list(range(self.pages, self.pages + num_pages)), PAGE_TOKENS)
        self.pages += num_pages
        self.cache.insert(InsertParams(key=RadixKey(array("q", tokens)), value=run, inserted_len=0, priority=0))

    def match(self, tokens: list[int]) -> TreeNode:
        node: TreeNode = self.cache.match_prefix(MatchPrefixParams(key=RadixKey(array("q", tokens)))).last_device_node
        return node

    def nodes(self) -> list[TreeNode]:
        found, stack = [], [self.cache.root_node]
        while stack:
            node = stack.pop()
            found.append(node)
            stack += node.children.values()
        return found

    def check(self) -> None:
        """Each node's children are known by their first pages; every leaf that may go is in line once."""
        children = {
            node.id: sorted(tuple(child.key.token_ids[:PAGE_TOKENS]) for child in node.children.values())
            for node in self.nodes()
            if node.children
        }
        assert {key[0]: pages for key, pages in self.cache._first_pages.items()} == children
        assert self.cache.evictable_leaves <= self.cache._aging <= set(self.nodes())
        assert len(self.cache._by_age) == len(self.cache._aging)


@pytest.mark.parametrize("seed", range(4))
def test_what_goes_first_is_what_sglang_would_evict(seed: int) -> None:
    """The same prompts, hits and running requests on two trees, one of which evicts by looking at every leaf."""
    dice = random.Random(seed)
    ours, theirs = Tree(), Tree()
    running: list[tuple[Any, Any]] = []
    told: list[list[int]] = [[]]
    for _ in range(400):
        action = dice.choice(("insert", "insert", "match", "start", "end", "evict"))
        beginning = dice.choice(told)
        tokens = beginning[: dice.randrange(len(beginning) + 1)] + [
            dice.randrange(3) for _ in range(dice.randrange(30))
        ]
        tokens = tokens[: len(tokens) // PAGE_TOKENS * PAGE_TOKENS]
        if action == "insert" and tokens:
            told.append(tokens)
            for tree in (ours, theirs):
                tree.insert(tokens)
        elif action == "match":
            for tree in (ours, theirs):
                tree.match(tokens)
        elif action == "start":
            locks = tuple(tree.cache.lock(tree.match(beginning)) for tree in (ours, theirs))
            running.append(locks)  # type: ignore[arg-type]
        elif action == "end" and running:
            for tree, lock in zip((ours, theirs), running.pop(dice.randrange(len(running))), strict=True):
                tree.cache.unlock(lock)
        elif action == "evict":
            params = EvictParams(num_tokens=dice.randrange(1, 60))
            done = (
                ours.cache.evict(params).num_tokens_evicted,
                RadixCache.evict(theirs.cache, params).num_tokens_evicted,
            )
            assert done[0] == done[1] and ours.evicted == theirs.evicted
            ours.check()
    assert len(ours.evicted) > 100


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_old_pages_are_counted_without_moving_anything(policy: str) -> None:
    tree = Tree(policy)
    for number in range(5):
        tree.insert([number] * PAGE_TOKENS)
    middle = time.monotonic()
    tree.insert([9] * 2 * PAGE_TOKENS)
    tree.match([0] * PAGE_TOKENS)
    lock = tree.cache.lock(tree.match([9] * 2 * PAGE_TOKENS))
    for _ in range(2):
        assert tree.cache.old_pages(middle, 100) == 4
        assert tree.cache.old_pages(middle, 3) == 3 and tree.cache.old_pages(middle, -1) == 0
        assert tree.cache.old_pages(time.monotonic(), 100) == 5
    tree.cache.unlock(lock)
    assert tree.cache.old_pages(time.monotonic(), 100) == 7
    if policy == "lru":
        tree.cache.evict(EvictParams(num_tokens=4 * PAGE_TOKENS))
        assert tree.evicted == [1, 2, 3, 4]
    tree.cache.reset()
    assert tree.cache.old_pages(time.monotonic(), 100) == 0


def waiting(tokens: list[int], **more: Any) -> Any:
    """A request in SGLang's queue."""
    given: dict[str, Any] = {"output_ids": array("q"), "extra_key": None, "cache_salt": None}
    given |= {"positional_embed_overrides": None, "_compute_max_prefix_len": lambda length: length - 1}
    return SimpleNamespace(origin_input_ids=array("q", tokens), **given | more)


@pytest.mark.parametrize("seed", range(4))
def test_what_a_waiting_request_will_be_granted_is_known_without_touching_the_tree(seed: int) -> None:
    dice = random.Random(seed)
    tree = Tree()
    told: list[list[int]] = [[]]
    found = 0

    def state() -> list[Any]:
        return [(node.id, node.last_access_time, node.lock_ref, list(node.children)) for node in tree.nodes()]

    for _ in range(200):
        beginning = dice.choice(told)
        tokens = beginning[: dice.randrange(len(beginning) + 1)] + [
            dice.randrange(3) for _ in range(dice.randrange(20))
        ]
        tokens = tokens or [0]
        before = state()
        known = tree.cache.known_pages(waiting(tokens))
        assert state() == before
        node = tree.match(tokens[:-1])  # which splits it where the match ends, or where a page is copied
        assert known == tree.cache.path_pages(node)[: len(known)]
        granted = tree.cache.match_prefix(MatchPrefixParams(key=RadixKey(array("q", tokens), limit=len(tokens) - 1)))
        assert len(known) == granted.device_prefix_len // PAGE_TOKENS
        found += len(known)
        whole = tokens[: len(tokens) // PAGE_TOKENS * PAGE_TOKENS]
        if whole:
            told.append(whole)
            tree.insert(whole)
        if dice.random() < 0.1:
            tree.cache.evict(EvictParams(num_tokens=8))
    assert found > 100


def test_namespaces_and_what_was_generated_count_for_a_waiting_request() -> None:
    """A request that was retracted has its answer so far, too; another namespace has other pages."""
    tree = Tree()
    tree.insert(list(range(12)))
    assert tree.cache.known_pages(waiting(list(range(6)), output_ids=array("q", range(6, 13)))) == [0, 1, 2]
    assert tree.cache.known_pages(waiting(list(range(12)))) == [0, 1], "the last token is computed"
    for other in ({"extra_key": "x"}, {"cache_salt": "x"}, {"positional_embed_overrides": object()}):
        assert tree.cache.known_pages(waiting(list(range(13)), **other)) == []
    tree.cache.disable = True
    assert tree.cache.known_pages(waiting(list(range(13)))) == []
