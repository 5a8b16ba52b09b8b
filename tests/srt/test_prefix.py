"""The radix tree without a server: what is evicted, in which order, and what requests leave in it."""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode

from sgl_vtensor.core.layout import plan_layout
from sgl_vtensor.core.pages import Pages
from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.srt import prefix
from sgl_vtensor.srt.allocator import VTensorAllocator
from sgl_vtensor.srt.prefix import NO_TOKEN, PageRun, VTensorRadixCache
from sgl_vtensor.vmm.host import HostDriver

PAGE_TOKENS = 4
NUM_PAGES = 110
NUM_SLOTS = 5
MAX_LEN = 80


def nodes_of(cache: VTensorRadixCache) -> list[TreeNode]:
    found, stack = [], [cache.root_node]
    while stack:
        node = stack.pop()
        found.append(node)
        stack += node.children.values()
    return found


class Tree:
    """A tree whose evicted pages are noted."""

    def __init__(self, policy: str = "lru") -> None:
        self.evicted: list[int] = []
        allocator: Any = SimpleNamespace(device="cpu", free_segment=self._free, size=10_000 * PAGE_TOKENS)
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
        return nodes_of(self.cache)

    def check(self) -> None:
        """Each node's children are known by their first pages; every leaf that may go is in line once."""
        children = {
            node.id: sorted(tuple(child.key.token_ids[:PAGE_TOKENS]) for child in node.children.values())
            for node in self.nodes()
            if node.children
        }
        assert {key[0]: pages for key, pages in self.cache._first_pages.items()} == children
        assert self.cache.num_nodes == len(self.nodes()) - 1
        assert np.flatnonzero(self.cache.is_cached).tolist() == sorted(self.cache.all_pages())
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


def test_prefixes_of_a_batch_are_granted_together_and_for_no_longer() -> None:
    tree = Tree()
    tree.insert([1] * 4 + [2] * 8)
    tree.insert([1] * 4 + [3] * 4)
    nodes = [tree.match(tokens) for tokens in ([1] * 4 + [2] * 8, [1] * 4 + [3] * 4, [1] * 4 + [3] * 4, [9] * 4)]
    kv = SimpleNamespace(holds_kv=False)
    reqs = [SimpleNamespace(prefix_len=tree.cache.page_size * bool(node.key), last_node=node, kv=kv) for node in nodes]

    def slots_of(node: TreeNode) -> list[int]:
        pages = tree.cache.path_pages(node)
        return [PAGE_TOKENS * page + token for page in pages for token in range(PAGE_TOKENS)]

    assert [len(slots_of(node)) for node in nodes] == [12, 8, 8, 0]
    with tree.cache.granting(reqs):
        for node, req in zip(nodes, reqs, strict=True):
            assert tree.cache.path_device_indices(node).tolist() == slots_of(node)
            assert tree.cache.prefix_pages(req) == tree.cache.path_pages(node)[:1]
    nodes[0].value.pages[-1], reqs[0].prefix_len = 77, 12
    assert tree.cache.prefix_pages(reqs[0])[-1] == 77
    assert tree.cache.path_device_indices(nodes[0]).tolist() == slots_of(nodes[0])
    with tree.cache.granting([]):
        assert tree.cache.path_device_indices(nodes[3]).numel() == 0


@dataclass(eq=False)
class Request:
    """What the tree looks at of SGLang's."""

    slot: int
    tokens: list[int]
    origin_input_ids: list[int]
    extra_key: str | None
    priority: int
    computed: int = 0
    has_finished: bool = False
    prefix_len: int = 0
    last_node: Any = None
    lock: Any = None
    cache_salt: str | None = None
    kv: Any = field(init=False)

    def __post_init__(self) -> None:
        self.kv = SimpleNamespace(req_pool_idx=self.slot, cache_protected_len=0, cache_inserted_len=0)

    def finished(self) -> bool:
        return self.has_finished

    @property
    def full_untruncated_fill_ids(self) -> Any:
        return array("q", self.tokens)


class WalkingCache(VTensorRadixCache):
    """It does what SGLang's does: each checkpoint comes down from the root, and the prompt is inserted once more."""

    def _resume(self, req: Any) -> tuple[TreeNode, int]:
        return self.root_node, 0

    def _split_at_prompt(self, node: TreeNode, node_end: int, prompt_len: int, priority: int) -> None:
        tokens = tokens_to(node, self)
        if 0 < prompt_len < node_end:
            key = RadixKey(array("q", tokens[:prompt_len]), node.key.extra_key)
            value: Any = PageRun(self.path_pages(node)[: prompt_len // PAGE_TOKENS], PAGE_TOKENS)
            self._insert_helper(self.root_node, key, value, priority + 1, prompt_len)


def tokens_to(node: TreeNode, cache: VTensorRadixCache) -> list[int]:
    parts: list[list[int]] = []
    while node is not cache.root_node:
        parts.append(list(node.key.token_ids))
        node = node.parent
    return [token for part in reversed(parts) for token in part]


class Served:
    """A tree over a real pool, and requests whose every token is written down in the page that it was computed into."""

    def __init__(self, cache_class: type[VTensorRadixCache], policy: str = "lru") -> None:
        self.driver = HostDriver(capacity_bytes=1 << 24)
        layout = plan_layout(
            num_layers=1,
            num_kv_heads=1,
            head_dim=8,
            v_head_dim=8,
            itemsize=4,
            granule_bytes=self.driver.granularity,
            page_tokens=PAGE_TOKENS,
        )
        self.pool = VTensorPool(Pages(self.driver, layout, NUM_PAGES), num_slots=NUM_SLOTS, max_len_tokens=MAX_LEN)
        self.written = np.full((NUM_PAGES + 1, PAGE_TOKENS), NO_TOKEN)
        self.table = np.zeros((NUM_SLOTS + 1, MAX_LEN), dtype=np.int64)
        allocator: Any = VTensorAllocator.__new__(VTensorAllocator)
        allocator.device, allocator.size, allocator._pool = "cpu", NUM_PAGES * PAGE_TOKENS, self.pool
        table: Any = SimpleNamespace(write=self.table.__setitem__)
        self.cache = cache_class(CacheInitParams(False, table, allocator, PAGE_TOKENS, eviction_policy=policy))
        self.running: list[Request] = []
        self.hits: list[int] = []

    def start(
        self, prompt: list[int], extra_key: str | None = None, priority: int = 0, *, chunk: int = MAX_LEN
    ) -> None:
        """A request comes, finds what there is, and computes the first chunk of the rest."""
        slot = min(set(range(1, NUM_SLOTS + 1)) - {other.slot for other in self.running})
        request = Request(slot, list(prompt), list(prompt), extra_key, priority)
        key = RadixKey(array("q", prompt[:-1]), extra_key)
        found = self.cache.match_prefix(MatchPrefixParams(key=key))
        request.prefix_len = request.computed = found.device_prefix_len
        protected = found.cache_protected_len
        request.kv.cache_protected_len = request.prefix_len if protected is None else protected
        request.last_node = found.last_device_node
        request.lock = self.cache.lock(request.last_node)
        self.hits.append(request.prefix_len)
        self.running.append(request)
        pages = self.cache.prefix_pages(request)
        source = pages.pop() if request.prefix_len % PAGE_TOKENS else None
        self.pool.open(slot, pages, request.prefix_len)
        if source is not None:
            self._grow(request, request.prefix_len)
            copied = request.prefix_len % PAGE_TOKENS
            self.written[self.pool.wanted[slot, len(pages)], :copied] = self.written[source, :copied]
        self.compute(request, chunk)

    def compute(self, request: Request, num_tokens: int = 1) -> None:
        """The next chunk of the prompt, or, behind it, of an answer that is given."""
        start, stop = request.computed, min(request.computed + num_tokens, len(request.tokens))
        self._grow(request, stop)
        positions = np.arange(start, stop)
        pages = self.pool.wanted[request.slot, positions // PAGE_TOKENS]
        self.written[pages, positions % PAGE_TOKENS] = request.tokens[start:stop]
        request.computed = stop
        positions = np.arange(stop)
        slots = self.pool.wanted[request.slot, positions // PAGE_TOKENS] * PAGE_TOKENS + positions % PAGE_TOKENS
        self.table[request.slot, :stop] = slots

    def _grow(self, request: Request, len_tokens: int) -> None:
        while not self.pool.grow([request.slot], [len_tokens]):
            assert self.cache.evict(EvictParams(num_tokens=PAGE_TOKENS)).num_tokens_evicted

    def checkpoint(self, request: Request) -> None:
        self.cache.checkpoint(request, up_to=request.computed)

    def end(self, request: Request, *, keep: bool = True) -> None:
        """As SGLang's ``release_kv_cache``; an aborted or retracted request leaves nothing."""
        request.has_finished = keep
        if keep:
            self.checkpoint(request)
        self.cache.free_kv_row(request.kv, [(request.kv.cache_protected_len, request.computed)])
        self.cache.unlock(request.lock)
        self.pool.close(request.slot)
        self.running.remove(request)

    def nodes(self) -> list[TreeNode]:
        return nodes_of(self.cache)

    def topology(self) -> list[tuple[Any, ...]]:
        """All of the tree but its clock."""
        return sorted(
            (
                node.key.extra_key or "",
                tokens_to(node, self.cache),
                len(node.key),
                self.cache.path_pages(node),
                node.lock_ref,
                node.priority,
                node.hit_count,
            )
            for node in self.nodes()
            if node is not self.cache.root_node
        )

    def check(self) -> None:
        """Whose page each is, and that its tokens are those of whoever sees it."""
        owned = self.cache.all_pages()
        for node in self.nodes():
            tokens = np.array(tokens_to(node, self.cache)[-len(node.key) :] if len(node.key) else [], dtype=np.int64)
            shown = self.written[self.cache.path_pages(node)].ravel()[-len(tokens) :] if len(tokens) else tokens
            assert np.array_equal(tokens[tokens != NO_TOKEN], shown[tokens != NO_TOKEN])
        locks = 0
        for request in self.running:
            protected, depth = request.kv.cache_protected_len, len(tokens_to(request.last_node, self.cache))
            pages = self.pool.pages_of(request.slot, 0, -(-request.computed // PAGE_TOKENS))
            slots = np.array(pages)[:, None] * PAGE_TOKENS + np.arange(PAGE_TOKENS)
            seen = self.written.ravel()[slots.ravel()[: request.computed]]
            assert seen.tolist() == request.tokens[: request.computed]
            assert np.array_equal(self.table[request.slot, : request.computed], slots.ravel()[: request.computed])
            assert (
                pages[: protected // PAGE_TOKENS]
                == self.cache.path_pages(request.last_node)[: protected // PAGE_TOKENS]
            )
            assert protected <= depth <= protected + PAGE_TOKENS and request.last_node.lock_ref > 0
            owned += pages[protected // PAGE_TOKENS :]
            locks += depth
        assert sorted(owned) == (np.flatnonzero(~self.pool.pages.is_free[1:]) + 1).tolist()
        assert sum(node.lock_ref * len(node.key) for node in self.nodes()) == locks
        sizes = self.cache.evictable_size() + self.cache.protected_size()
        assert sizes == len(self.cache.all_pages()) * PAGE_TOKENS

    def close(self) -> None:
        self.pool.shutdown()
        self.driver.close()


@pytest.fixture
def served() -> Iterator[Served]:
    world = Served(VTensorRadixCache)
    yield world
    world.check()
    world.close()


@pytest.mark.parametrize("policy", ["lru", "lfu", "slru", "priority"])
@pytest.mark.parametrize("seed", range(3))
def test_a_checkpoint_leaves_what_sglang_would_leave(policy: str, seed: int) -> None:
    """Chunks, answers, hits that end inside a page, retractions and evictions, on two trees: one goes down from its
    root at each checkpoint. Nodes, pages, locks, priorities, hits and what is evicted are the same at each step.
    """
    dice = random.Random(f"{policy} {seed}")
    ours, theirs = worlds = Served(VTensorRadixCache, policy), Served(WalkingCache, policy)
    told: list[list[int]] = [[7] * 40]
    partial = 0

    def both(act: Callable[[Served], Any]) -> None:
        for world in worlds:
            act(world)

    def a_few(most: int) -> list[int]:
        return [dice.randrange(2) for _ in range(dice.randrange(1, most))]

    for _ in range(300):
        number = dice.randrange(len(ours.running)) if ours.running else -1
        action = dice.choice(
            ("start", "start", "compute", "compute", "checkpoint", "checkpoint", "end", "retract", "evict")
        )
        if action == "start" and len(ours.running) < NUM_SLOTS:
            beginning = dice.choice(told)
            prompt = (beginning[: dice.randrange(len(beginning) + 1)] + a_few(9))[: MAX_LEN // 2]
            of, priority, chunk = dice.choice((None, None, "a")), dice.randrange(3), dice.choice((4, 8, MAX_LEN))
            both(lambda world: world.start(prompt, of, priority, chunk=chunk))  # noqa: B023
            partial += ours.hits[-1] % PAGE_TOKENS > 0
        elif number < 0:
            continue
        elif action == "compute":
            chunk, answer = dice.choice((1, 4, 8)), a_few(6)
            for world in worlds:
                request = world.running[number]
                if request.computed == len(request.tokens):
                    request.tokens = (request.tokens + answer)[:MAX_LEN]
                world.compute(request, chunk)
        elif action == "checkpoint":
            both(lambda world: world.checkpoint(world.running[number]))  # noqa: B023
        elif action in ("end", "retract"):
            told.append(list(ours.running[number].tokens))
            both(lambda world: world.end(world.running[number], keep=action == "end"))  # noqa: B023
        else:
            num_tokens = dice.randrange(1, 40)
            both(lambda world: world.cache.evict(EvictParams(num_tokens=num_tokens)))  # noqa: B023
        assert ours.hits == theirs.hits and ours.topology() == theirs.topology()
        ours.check()
    assert partial > 10
    both(Served.close)


def test_a_request_that_copies_from_a_page_goes_on_at_the_border_before_it(served: Served) -> None:
    """Its own page takes the place of the one that it copied from, whether the tree keeps it or not."""
    served.start([1] * 8)
    served.end(served.running[0])
    for rest in ([1, 1, 2, 2, 3], [1, 1, 1, 2, 2]):
        served.start([1] * 4 + rest)
        request = served.running[-1]
        assert (request.prefix_len, request.kv.cache_protected_len) == (4 + rest.count(1), 4)
        served.checkpoint(request)
        assert request.kv.cache_protected_len == 8
        assert tokens_to(request.last_node, served.cache) == request.tokens[:8]
        served.check()
    for request in list(served.running):
        served.end(request)
    assert len(served.cache.root_node.children) == 1 and served.cache.evictable_size() == 24


@pytest.mark.parametrize("hit", [0, 4, 6, 8, 11, 12, 15])
@pytest.mark.parametrize("prompt_len", [1, 3, 4, 5, 8, 10, 12, 16])
def test_an_answer_can_go_and_its_prompt_stay(served: Served, prompt_len: int, hit: int) -> None:
    """Cut at the last border of a page inside the prompt, wherever the request was when it came, and before the last
    page if it is not full, and nowhere else.
    """
    prompt = list(range(prompt_len))
    hit = hit if hit < prompt_len else 0
    if hit:
        served.start([*prompt[:hit], 77])
        served.end(served.running[0])
    served.start(prompt)
    assert served.hits[-1] == hit
    request = served.running[0]
    request.tokens += [50 + number for number in range(9)]
    served.compute(request, 9)
    served.end(request)
    node = request.last_node
    priorities: dict[int, int] = {}
    while node is not served.cache.root_node:
        priorities[len(tokens_to(node, served.cache))] = node.priority
        node = node.parent
    total = prompt_len + 9
    border, shared, full = (length // PAGE_TOKENS * PAGE_TOKENS for length in (prompt_len, hit, total))
    assert priorities.keys() == {shared, border, full, -(-total // PAGE_TOKENS) * PAGE_TOKENS} - {0}
    answer = [priority for end, priority in priorities.items() if end > border]
    if border:
        assert priorities[border] > max(answer), "where priorities decide, the answer goes first"


def ended(served: Served, tokens: list[int]) -> None:
    """A request that is all prompt comes and ends."""
    served.start(tokens)
    served.end(served.running[-1])


def kept(served: Served) -> list[list[int]]:
    """What the tree holds, from its root to each leaf."""
    leaves = (node for node in served.nodes() if not node.children and node is not served.cache.root_node)
    return sorted([token for token in tokens_to(leaf, served.cache) if token != NO_TOKEN] for leaf in leaves)


def test_a_page_that_is_not_full_goes_when_one_that_goes_on_from_it_comes(served: Served) -> None:
    ended(served, [1, 2, 3, 4, 5])
    ended(served, [1, 2, 3, 4, 6])
    ended(served, [1, 2, 3, 4, 5, 5])
    assert kept(served) == [[1, 2, 3, 4, 5, 5], [1, 2, 3, 4, 6]]
    ended(served, [1, 2, 3, 4, 5, 5, 7, 8, 9])
    ended(served, [1, 2, 3, 4, 5, 7, 7])
    assert kept(served) == [[1, 2, 3, 4, 5, 5, 7, 8, 9], [1, 2, 3, 4, 5, 7, 7], [1, 2, 3, 4, 6]]
    served.check()


def test_a_page_that_is_not_full_is_not_kept_beside_one_that_goes_on_from_it(served: Served) -> None:
    """Its tokens are a hit all the same, and count as used."""
    ended(served, list(range(8)))
    middle = time.monotonic()
    ended(served, list(range(7)))
    assert kept(served) == [list(range(8))] and served.cache.old_pages(middle, 10) == 0
    ended(served, [9])  # another first token
    served.start([*range(7), 9])
    assert served.hits[-1] == 7


def test_a_page_that_others_copy_from_waits_for_them(served: Served) -> None:
    ended(served, [1, 2])
    served.start([1, 2, 3])
    served.start([1, 2, 4, 4, 4])
    first, second = served.running
    served.end(second)
    served.check()
    assert [1, 2] in kept(served), "the first request locks it"
    served.end(first)
    assert kept(served) == [[1, 2, 3], [1, 2, 4, 4, 4]]


def test_what_is_gone_is_forgotten_although_nothing_is_evicted(served: Served) -> None:
    ended(served, [7, 7])  # the first in line, as long as it stays
    for length in range(1, 60):
        ended(served, [1] * length)
    cache = served.cache
    assert len(cache._tails) < 5 and len(cache._aging) < len(served.nodes()) + 5
    assert cache.evictable_leaves <= cache._aging == {leaf for _, _, leaf in cache._tails + cache._by_age}


def test_pages_that_have_waited_go_together(served: Served) -> None:
    ended(served, [1])
    served.start([1, 5])
    ended(served, [1, 2])
    served.end(served.running[0], keep=False)
    assert kept(served) == [[1], [1, 2]]
    ended(served, [1, 2, 3])
    assert kept(served) == [[1, 2, 3]]


@pytest.mark.parametrize("seed", range(4))
def test_no_page_is_the_beginning_of_another(seed: int, served: Served) -> None:
    dice = random.Random(seed)
    told: list[list[int]] = [[]]
    for _ in range(150):
        beginning = dice.choice(told)
        tokens = beginning[: dice.randrange(len(beginning) + 1)] + [dice.randrange(2) for _ in range(dice.randrange(9))]
        tokens = (tokens or [0])[:30]
        told.append(tokens)
        ended(served, tokens)
        held = kept(served)
        assert not [(one, more) for one in held for more in held if one != more and more[: len(one)] == one]
        served.check()


def test_a_page_that_is_not_full_goes_first_and_by_its_age_as_any_other(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix, "FRESH_SHARE", 0)
    ended(served, [1] * 8)
    ended(served, [2] * 4)
    middle = time.monotonic()
    ended(served, [3] * 5)
    ended(served, [4] * 6)
    assert served.cache.old_pages(middle, 10) == 3
    served.cache.evict(EvictParams(num_tokens=1))
    assert kept(served) == [[1] * 8, [2] * 4, [3] * 4, [4] * 6]
    assert served.cache.evict_oldest(2) == 2
    assert kept(served) == [[2] * 4, [3] * 4, [4] * 6]
    assert served.cache.evict_oldest(3) == 3 and kept(served) == [[4] * 4]


def test_a_fresh_page_that_is_not_full_waits_for_its_chat(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the tree has been given four pages, itself among them. Whoever copies from it does not renew that."""
    monkeypatch.setattr(prefix, "FRESH_SHARE", 4 / len(served.cache.is_cached))
    ended(served, [1] * 4)
    ended(served, [2] * 6)
    served.cache.evict(EvictParams(num_tokens=1))
    assert kept(served) == [[2] * 6], "the oldest"
    ended(served, [3] * 8)
    served.start([2] * 6 + [1])
    assert served.cache.old_pages(time.monotonic(), 10) == 2, "a request reads the other ones"
    served.end(served.running[0], keep=False)
    ended(served, [4] * 4)
    served.cache.evict(EvictParams(num_tokens=1))
    assert kept(served) == [[2] * 4, [3] * 8, [4] * 4]


def test_a_hit_inside_the_first_page_counts_as_a_use(served: Served) -> None:
    """Of a prompt that is shorter than a page, too."""
    served.start([1] * 4)
    served.end(served.running[0])
    middle = time.monotonic()
    assert served.cache.old_pages(middle, 10) == 1
    served.start([1] * 3)
    assert served.hits[-1] == 2
    served.end(served.running[0], keep=False)
    assert served.cache.old_pages(middle, 10) == 0


def waiting(tokens: list[int], **more: Any) -> Any:
    """A request in SGLang's queue."""
    given: dict[str, Any] = {"output_ids": array("q"), "extra_key": None, "cache_salt": None}
    given |= {"positional_embed_overrides": None, "_compute_max_prefix_len": lambda length: length - 1}
    return SimpleNamespace(origin_input_ids=array("q", tokens), **given | more)


def test_a_prompt_keeps_as_many_tokens_to_compute_as_a_captured_graph_takes(served: Served) -> None:
    """Also where pages end: the last is copied from, then, rather than shared."""
    served.cache.least_computed = 3
    for len_tokens in (1, 2, 3, 7, PAGE_TOKENS, 2 * PAGE_TOKENS + 1, 2 * PAGE_TOKENS + 2, 3 * PAGE_TOKENS + 3):
        for _ in range(2):
            served.start([len_tokens] * len_tokens)
            served.end(served.running[0])
            served.check()
        assert served.hits[-2:] == [0, max(len_tokens - 3, 0)]


@pytest.mark.parametrize("seed", range(4))
def test_what_a_waiting_request_will_be_granted_is_known_without_touching_the_tree(seed: int) -> None:
    dice = random.Random(seed)
    tree = Tree()
    tree.cache.least_computed = 1 + seed % 2
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
