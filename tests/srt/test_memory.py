"""When memory is taken and given back: ``MemoryPolicy`` and the prefill budget over a real pool on the host."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from sgl_vtensor.config import Size, VTensorConfig, parse_size
from sgl_vtensor.core.layout import plan_layout
from sgl_vtensor.core.pages import Pages
from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.errors import ConfigError, DriverError, OutOfMemory, VTensorError
from sgl_vtensor.srt import memory
from sgl_vtensor.srt.agree import BOARD_COLUMNS, Decision, Ranks
from sgl_vtensor.srt.allocator import VTensorAllocator, VTensorPrefillBudget
from sgl_vtensor.srt.memory import (
    BURST_SECONDS,
    BURST_SHARE,
    IDLE_NEIGHBOUR_SECONDS,
    LOOK_SECONDS,
    NEIGHBOUR_SECONDS,
    PAGES_CREATED_AT_ONCE,
    PAGES_RELEASED_AT_ONCE,
    PAGES_RELEASED_UNDER_LOAD,
    LimitHandler,
    MemoryPolicy,
)
from sgl_vtensor.vmm.faults import Fault, FaultyDriver
from sgl_vtensor.vmm.host import HostDriver
from sgl_vtensor.vmm.proxy import DriverProxy

PAGE_TOKENS = 16
NUM_PAGES = 300


class Tree:
    """Leaves of one page each, the least recently used first, as SGLang's tree keeps them."""

    def __init__(self, pool: VTensorPool) -> None:
        self.pool = pool
        self.evictable_leaves: list[Any] = []

    def cache(self, pages: list[int], now: float) -> None:
        self.evictable_leaves += [
            SimpleNamespace(value=SimpleNamespace(pages=[page]), last_access_time=now) for page in pages
        ]

    def evictable_size(self) -> int:
        return len(self.evictable_leaves) * PAGE_TOKENS

    def old_pages(self, used_before: float, at_most: int) -> int:
        old = sum(leaf.last_access_time < used_before for leaf in self.evictable_leaves)
        return min(old, max(0, at_most))

    def supports_mamba(self) -> bool:
        return False

    def supports_prefix_sharing(self) -> bool:
        return False

    def evict(self, params: EvictParams) -> Any:
        count = min(-(-params.num_tokens // PAGE_TOKENS), len(self.evictable_leaves))
        gone, self.evictable_leaves = self.evictable_leaves[:count], self.evictable_leaves[count:]
        self.pool.free([leaf.value.pages[0] for leaf in gone])
        return SimpleNamespace(num_tokens_evicted=count * PAGE_TOKENS)

    def evict_oldest(self, num_pages: int) -> int:
        return int(self.evict(EvictParams(num_tokens=num_pages * PAGE_TOKENS)).num_tokens_evicted) // PAGE_TOKENS


class World:
    """A pool, its policy, and a tree that holds what has ended."""

    def __init__(self, driver: Any, **settings: Any) -> None:
        self.driver = driver
        layout = plan_layout(
            num_layers=1,
            num_kv_heads=2,
            head_dim=16,
            v_head_dim=16,
            itemsize=4,
            granule_bytes=driver.granularity,
            page_tokens=PAGE_TOKENS,
        )
        self.pool = VTensorPool(Pages(driver, layout, NUM_PAGES), num_slots=8, max_len_tokens=NUM_PAGES * PAGE_TOKENS)
        self.policy = MemoryPolicy(self.pool, VTensorConfig(**settings))
        self.tree = Tree(self.pool)
        self.allocator: Any = VTensorAllocator.__new__(VTensorAllocator)
        self.allocator.page_size, self.allocator._batch = PAGE_TOKENS, None
        self.allocator._pool, self.allocator._policy = self.pool, self.policy
        self.allocator._kvcache = SimpleNamespace(pages=self.pool.pages)

    @property
    def num_backed(self) -> int:
        return self.pool.pages.num_backed

    def run(self, slot: int, num_pages: int) -> None:
        """A request with so many pages."""
        self.pool.open(slot, [], num_pages * PAGE_TOKENS)
        assert self.pool.grow([slot], [num_pages * PAGE_TOKENS], beyond_limit=True)
        self.pool.ensure([slot])
        self.pool.launch(None)

    def end(self, slot: int, *, now: float) -> None:
        """It ends, and the tree keeps its pages."""
        self.tree.cache(self.pool.pages_of(slot, 0, int(self.pool.num_wanted[slot])), now)
        self.pool.close(slot)

    def budget(self, *, num_mixed: int = 0) -> VTensorPrefillBudget:
        return VTensorPrefillBudget(self.allocator, self.tree, num_mixed_decode_tokens=num_mixed)

    def admits(self, num_pages: int, budget: VTensorPrefillBudget | None = None, *, answer_pages: int = 0) -> bool:
        tokens = num_pages * PAGE_TOKENS
        budget = budget or self.budget()
        admitted, _ = budget.check_prefill(
            extend_input_len=tokens,
            total_tokens=tokens + answer_pages * PAGE_TOKENS,
            max_new_tokens=answer_pages * PAGE_TOKENS,
            input_tokens=tokens,
            swa_host_hit_length=0,
            chunk_limit=None,
        )
        if admitted:
            budget.reserve(tokens, 0)
        return admitted


@pytest.fixture
def world() -> Iterator[World]:
    with HostDriver(capacity_bytes=64 << 20) as driver:
        built = World(driver)
        yield built
        built.pool.shutdown()


def pages(world: World, count: int) -> int:
    return count * world.pool.layout.page_bytes


def test_a_lower_limit_takes_the_cache_first_in_steps_and_leaves_requests_alone(world: World) -> None:
    world.run(1, 100)
    world.run(2, 150)
    world.end(2, now=0.0)
    world.policy.set_limit(pages(world, 40))
    world.policy.step(world.tree, 1.0)
    assert world.num_backed == 250 - PAGES_RELEASED_AT_ONCE
    for _ in range(5):
        world.policy.step(world.tree, 1.0)
    assert (world.num_backed, world.pool.pages.num_in_use) == (100, 100), "the request keeps what it has"
    assert not world.tree.evictable_leaves
    assert world.policy.pages_evicted_by_limit == 150
    world.end(1, now=2.0)
    for _ in range(3):
        world.policy.step(world.tree, 2.0)
    assert (world.num_backed, len(world.tree.evictable_leaves)) == (40, 40)


def test_pages_that_a_running_row_showed_to_an_earlier_request_are_given_back_under_load(world: World) -> None:
    """Overlap: a launch is always under way, and the row of a short request still maps the tail of a long one."""
    world.run(1, 50)
    world.pool.free(world.pool.pages_of(1, 0, 50))
    world.pool.close(1)
    world.pool.drain(in_flight=0)
    world.run(2, 2)
    assert world.pool.row_of_slot[2] and world.pool.rows.num_parked == 0, "the same row"

    class Running:
        def synchronize(self) -> None:
            raise AssertionError("a step must not wait")

    world.pool.launch(Running())
    world.policy.set_limit(pages(world, 2))
    world.policy.step(world.tree, 1.0)
    assert world.num_backed == 2
    world.pool.epochs._fences.clear()


def test_the_limit_holds_admission_and_what_was_accepted_is_served_alone(world: World) -> None:
    world.policy.set_limit(pages(world, 40))
    budget = world.budget()
    assert world.admits(100, budget), "nothing runs: it was accepted before the limit fell"
    assert not world.admits(1, budget), "but nothing goes with it"
    world.run(1, 20)
    assert world.admits(15)
    assert not world.admits(30)
    assert not world.admits(15, answer_pages=10), "its answer counts"
    world.run(2, 15)
    assert not world.admits(6)
    world.policy.set_limit(pages(world, 60))
    assert world.admits(6)


def test_decode_under_a_fallen_limit_retracts_all_but_the_last_request(world: World) -> None:
    world.run(1, 30)
    world.run(2, 30)
    world.policy.set_limit(pages(world, 40))
    fits = world.allocator.check_decode_capacity
    assert not fits(num_tokens=2 * PAGE_TOKENS, tree_cache=world.tree, requests=[1, 2])
    assert fits(num_tokens=PAGE_TOKENS, tree_cache=world.tree, requests=[1])


def test_admission_takes_the_memory_that_it_counts_on(world: World) -> None:
    """A neighbour that comes between admission and allocation must not kill the server."""
    free = world.driver.capacity_bytes - world.driver.physical_bytes
    budget = world.budget()
    assert world.admits(50, budget)
    assert world.pool.pages.num_free_backed >= 50
    world.driver.capacity_bytes = world.driver.physical_bytes
    assert world.pool.grow([], []) and world.pool.secure(50)
    assert not world.admits(50, budget), "found before SGLang commits itself"
    assert not world.admits(60)
    world.driver.capacity_bytes += free
    assert world.admits(60)


def test_admission_leaves_the_cache_to_those_who_are_admitted_next(world: World) -> None:
    """They may hit, and lock, what an earlier request's pages would have cost them. At most all of it is promised."""
    world.run(1, 250)
    world.end(1, now=0.0)
    budget = world.budget()
    assert world.admits(100, budget)
    hit = world.tree.evictable_leaves.pop()
    assert world.admits(50, budget)
    assert len(world.tree.evictable_leaves) == 249, "nothing is thrown away"
    assert not world.admits(149, budget), "that page is locked now, and each request is granted one for rounding"
    world.pool.open(2, [], 150 * PAGE_TOKENS)
    assert world.allocator._grow([2], [150 * PAGE_TOKENS], world.tree)
    assert len(world.tree.evictable_leaves) == 149, "so many as were missing, the oldest"
    assert not world.pool.pages.is_free[hit.value.pages[0]]


@pytest.mark.parametrize("limit", [280, 220])
def test_pages_come_from_the_cache_before_they_come_from_beyond_the_limit(world: World, limit: int) -> None:
    world.run(1, 200)
    world.end(1, now=0.0)
    world.policy.set_limit(pages(world, limit))
    assert world.admits(100)
    world.pool.open(2, [], 100 * PAGE_TOKENS)
    assert world.allocator._grow([2], [100 * PAGE_TOKENS], world.tree)
    assert len(world.tree.evictable_leaves) == limit - 100 and world.num_backed == limit


def test_free_pages_beyond_a_limit_that_has_fallen_are_no_room(world: World) -> None:
    """They are to go back. The cache stays if it would not help; else it goes before the limit is passed."""
    world.run(1, 100)
    world.run(2, 60)
    world.pool.free(world.pool.pages_of(2, 0, 60))
    world.pool.close(2)
    world.run(3, 20)
    world.end(3, now=0.0)
    world.policy.set_limit(pages(world, 110))
    assert world.pool.pages.num_free_backed == 40
    assert not world.allocator.can_serve(31, world.tree) and not world.allocator.secure(31, world.tree)
    assert len(world.tree.evictable_leaves) == 20
    assert world.allocator.can_serve(10, world.tree) and len(world.tree.evictable_leaves) == 20
    world.pool.open(2, [], 10 * PAGE_TOKENS)
    assert world.allocator._grow([2], [10 * PAGE_TOKENS], world.tree)
    assert not world.tree.evictable_leaves and world.pool.pages.num_in_use == 110


def test_a_driver_that_refuses_what_it_said_was_free_costs_the_cache_and_no_request() -> None:
    with HostDriver(capacity_bytes=64 << 20) as inner:
        driver = FaultyDriver(inner)
        world = World(driver)
        world.run(1, 30)
        world.end(1, now=0.0)
        driver.plan.append(Fault("create", lambda _: True, OutOfMemory))
        assert world.admits(20) and len(world.tree.evictable_leaves) == 30
        assert not world.admits(40)
        world.pool.open(2, [], 20 * PAGE_TOKENS)
        assert world.allocator._grow([2], [20 * PAGE_TOKENS], world.tree)
        assert len(world.tree.evictable_leaves) == 10
        world.pool.shutdown()


def test_a_page_that_a_request_begins_is_cleared_of_what_another_left(world: World) -> None:
    """FlashAttention-3 reads whole tiles: NaN behind the last token would be in the answer. Full pages are written."""
    world.run(1, 3)
    world.pool.take_fresh()
    left = world.pool.pages_of(1, 0, 3)
    world.pool.free(left)
    world.pool.close(1)
    world.pool.open(1, [], 3 * PAGE_TOKENS)
    for stop, cleared in ((40, [2]), (44, []), (48, []), (49, [3]), (50, []), (64, [])):
        assert world.allocator._grow([1], [stop], world.tree)
        pages = world.pool.pages_of(1, 0, -(-stop // PAGE_TOKENS))
        assert list(world.pool.take_fresh()) == [pages[position] for position in cleared], stop
    assert set(pages[:3]) == set(left), "they are used again"


def test_nothing_lets_go_of_memory_between_admission_and_allocation(world: World) -> None:
    """The policy has its turn behind an allocation: it may give a neighbour what admission has counted on."""
    said: list[str] = []
    world.allocator._policy = SimpleNamespace(step=lambda tree, now: said.append("policy"))
    batch = SimpleNamespace(enable_overlap=True, tree_cache=world.tree)
    with world.allocator.serving(batch, extending=True):
        said.append("allocation")
    assert said == ["allocation", "policy"]


def test_a_prefill_under_way_gets_a_shorter_chunk_or_waits(world: World) -> None:
    world.run(1, 10)
    world.driver.capacity_bytes = world.driver.physical_bytes + 5 * world.pool.layout.page_bytes
    size = {"extend_input_len": 20 * PAGE_TOKENS, "max_new_tokens": 0}
    assert world.budget().fit_chunk(**size, chunk_limit=4 * PAGE_TOKENS) == 4 * PAGE_TOKENS
    assert world.budget().fit_chunk(**size, chunk_limit=8 * PAGE_TOKENS) == 5 * PAGE_TOKENS
    world.pool.pages.take_many(5)
    assert world.budget().fit_chunk(**size, chunk_limit=8 * PAGE_TOKENS) is None


def test_the_cache_is_not_thrown_away_for_a_request_that_would_not_fit_all_the_same(world: World) -> None:
    world.run(1, 50)
    world.end(1, now=0.0)
    world.run(2, 10)
    world.driver.capacity_bytes = world.driver.physical_bytes
    assert not world.allocator.secure(60, world.tree)
    assert len(world.tree.evictable_leaves) == 50
    assert world.allocator.secure(45, world.tree)
    assert len(world.tree.evictable_leaves) == 5


@pytest.mark.parametrize(("keep", "left"), [("0%", 0), ("10%", 30)])
def test_prefixes_that_nobody_asks_for_are_dropped(keep: str, left: int) -> None:
    with HostDriver(capacity_bytes=64 << 20) as driver:
        world = World(driver, cache_seconds=60.0, cache_keep=parse_size("keep", keep))
        world.run(1, 50)
        world.end(1, now=100.0)
        world.run(2, 10)
        world.end(2, now=150.0)
        world.policy.step(world.tree, 159.0)
        assert len(world.tree.evictable_leaves) == 60
        world.policy.step(world.tree, 159.0 + LOOK_SECONDS)
        world.policy.step(world.tree, 161.0)
        assert len(world.tree.evictable_leaves) == max(10, left)
        world.policy.step(world.tree, 211.0)
        assert len(world.tree.evictable_leaves) == left
        assert world.policy.pages_evicted_by_age == 60 - left
        world.pool.shutdown()


def two_ranks(world: World) -> tuple[MemoryPolicy, Ranks]:
    """Rank 0's policy, and the other rank's side of the board."""
    board = np.zeros((2, BOARD_COLUMNS), dtype=np.int64)
    other = Ranks(1, board)
    other.publish(NUM_PAGES)
    return MemoryPolicy(world.pool, VTensorConfig(cache_seconds=60.0), ranks=Ranks(0, board)), other


def test_ranks_drop_by_the_clock_what_rank_0_says(world: World) -> None:
    policy, _ = two_ranks(world)
    world.run(1, 10)
    world.end(1, now=0.0)
    policy.step(world.tree, 100.0)
    assert len(world.tree.evictable_leaves) == 10, "nothing by its own clock"
    decision = policy.decide(world.tree, 100.0)
    assert decision == Decision(NUM_PAGES, 10)
    policy.follow(decision, world.tree)
    assert not world.tree.evictable_leaves
    assert policy.decide(world.tree, 100.1) is None, "nothing new"
    assert policy.decide(world.tree, 200.0) is None


def test_no_space_on_one_rank_is_no_space_on_all(world: World) -> None:
    policy, other = two_ranks(world)
    world.run(1, 20)
    assert world.admits(100)
    other.publish(50)
    assert world.admits(100), "not before rank 0 has said so to all"
    decision = policy.decide(world.tree, 1.0)
    assert decision == Decision(50, 0)
    policy.follow(decision, world.tree)
    assert not world.admits(31) and world.admits(29)
    assert not world.pool.secure(31, beyond_limit=True)
    other.publish(NUM_PAGES)
    policy.follow(policy.decide(world.tree, 2.0), world.tree)
    assert world.admits(100)


def test_ranks_let_go_together_for_a_neighbour_of_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose pages are free knows each rank by itself; which prefixes go, all must agree on."""
    monkeypatch.setattr(memory, "PAGES_YIELDED_AT_ONCE", 20)
    policy, other = two_ranks(world)
    policy.reserve_pages = 0
    world.run(1, 100)
    world.end(1, now=0.0)
    policy.idle(world.tree, 1.0)
    other.lack(30)
    assert policy.decide(world.tree, 1.5) is None, "its users may come back at once"
    policy.idle(world.tree, 3.5)
    decision = policy.decide(world.tree, 3.5)
    assert decision == Decision(NUM_PAGES, 30)
    policy.follow(decision, world.tree)
    other.lack(0)
    assert policy.decide(world.tree, 5.0) is None and len(world.tree.evictable_leaves) == 70
    # And for one of its own: free pages go at once, then prefixes by the bite, ten times a second.
    world.pool.pages.margin_bytes = pages(world, 8)
    now, gone = 10.0, []
    for _ in range(12):
        world.driver.capacity_bytes = world.driver.physical_bytes + pages(world, 1)
        policy.idle(world.tree, now)
        decision = policy.decide(world.tree, now)
        if decision is not None:
            policy.follow(decision, world.tree)
        gone.append((world.num_backed, len(world.tree.evictable_leaves)))
        now += 0.15
    assert gone[0][0] == 80 and gone[-1] == (0, 0), gone
    assert all(before[1] - after[1] <= 20 for before, after in pairwise(gone)), "a bite at a time"


def test_a_rank_whose_memory_a_neighbour_took_waits_for_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, _ = two_ranks(world)
    free = world.driver.capacity_bytes
    world.driver.capacity_bytes = world.driver.physical_bytes
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 5:
            world.driver.capacity_bytes = free

    monkeypatch.setattr("time.sleep", sleep)
    assert world.pool.secure(3)
    assert len(waited) == 5
    world.driver.capacity_bytes = world.driver.physical_bytes
    monkeypatch.setattr("sgl_vtensor.srt.memory.SHORTAGE_SECONDS", -1.0)
    with pytest.raises(OutOfMemory):
        world.pool.secure(9)
    policy.step(world.tree, 1e9)
    assert policy.decide(world.tree, 1e9) == Decision(3, 0), "and says so to the others"


def test_the_reserve_waits_for_no_memory_and_decides_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that has none of it runs on, and all ranks agree on what they would have agreed on."""
    policy, _ = two_ranks(world)
    policy.reserve_pages = 4
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("a reserve must not wait"))
    monkeypatch.setattr("sgl_vtensor.srt.memory.SHORTAGE_SECONDS", -1.0)
    world.driver.capacity_bytes = world.driver.physical_bytes + 3 * world.pool.layout.page_bytes
    for _ in range(3):
        policy.launched()
    assert world.pool.pages.num_free_backed == 3
    policy.step(world.tree, 1.0)
    assert policy.decide(world.tree, 1.0) == Decision(3, 0), "ready or not, so many can be had"
    world.pool.pages.margin_bytes = 2 * world.pool.layout.page_bytes
    world.driver.capacity_bytes += 3 * world.pool.layout.page_bytes
    policy.launched()
    assert world.pool.pages.num_free_backed == 4
    policy.reserve_pages = 8
    policy.launched()
    assert world.pool.pages.num_free_backed == 4, "what is left to others stays theirs"


@pytest.mark.parametrize("every_launch", [True, False])
def test_ranks_that_decide_differently_are_found(every_launch: bool) -> None:
    """Also by a launch between two comparisons; and what comes later cannot hide it."""
    board = np.zeros((2, BOARD_COLUMNS), dtype=np.int64)
    one, two = (Ranks(rank, board, every_launch=every_launch) for rank in (0, 1))

    def launch(number: int, *, differs: bool = False) -> None:
        lens = np.arange(number, number + 5)
        one.note(number, lens, lens * 2)
        two.note(number, lens, lens * 2 + differs)

    for number in range(1, 201):
        launch(number)
    assert one.launches_compared == two.launches_compared == 192
    found = 203 if every_launch else 208
    with pytest.raises(VTensorError, match=f"ranks 0 and 1 decided differently by launch {found}"):
        for number in range(201, 230):
            launch(number, differs=number == 203)


def test_a_hungry_neighbour_gets_free_pages_and_old_prefixes(world: World) -> None:
    page_bytes = world.pool.layout.page_bytes
    world.run(1, 30)
    world.end(1, now=0.0)
    world.run(2, 30)
    world.end(2, now=NEIGHBOUR_SECONDS)
    world.run(3, 30)
    world.pool.free(world.pool.pages_of(3, 0, 30))
    world.pool.close(3)
    world.policy.reserve_pages = 4
    world.pool.pages.margin_bytes = 100 * page_bytes
    world.driver.capacity_bytes = world.driver.physical_bytes + 130 * page_bytes  # 70 pages too few
    world.policy.step(world.tree, NEIGHBOUR_SECONDS + 1)
    assert world.num_backed == 90 - 26, "free pages but for the reserve"
    assert len(world.tree.evictable_leaves) == 30, "the old ones are gone"
    for look in range(2, 6):
        world.policy.step(world.tree, NEIGHBOUR_SECONDS + look)
    assert world.num_backed == 30 + 4
    assert len(world.tree.evictable_leaves) == 30, "what was used lately stays"


def test_an_idle_server_yields_to_a_neighbour_sooner(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst next door waits; who is idle is not waited for."""
    monkeypatch.setattr(memory, "PAGES_YIELDED_AT_ONCE", 20)
    total = world.driver.capacity_bytes
    world.run(1, 100)
    world.end(1, now=0.0)
    world.policy.reserve_pages = 0
    world.pool.pages.margin_bytes = pages(world, 8)
    now = 0.0

    def idle_until(end: float) -> None:
        nonlocal now
        while now < end:
            # The neighbour takes what there is.
            world.driver.capacity_bytes = world.driver.physical_bytes + pages(world, 1)
            world.policy.idle(world.tree, now)
            now += 0.01

    idle_until(IDLE_NEIGHBOUR_SECONDS - 0.1)
    assert world.num_backed == 100, "its users may come back at once"
    idle_until(IDLE_NEIGHBOUR_SECONDS + 0.4)
    assert 0 < world.num_backed <= 100 - 4 * 20, "more than the 15 that are missing, ten times a second"
    idle_until(IDLE_NEIGHBOUR_SECONDS + 1.5)
    assert world.num_backed == 0
    world.driver.capacity_bytes = total
    world.run(2, 50)
    world.end(2, now=now)
    world.policy.launched()
    idle_until(now + IDLE_NEIGHBOUR_SECONDS - 0.1)
    assert world.num_backed == 50, "it has worked in the meantime"


def test_an_idle_server_that_sleeps_yields_when_it_wakes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--sleep-on-idle``: it wakes once a second."""
    monkeypatch.setattr(memory, "PAGES_YIELDED_AT_ONCE", 60)
    world.run(1, 100)
    world.end(1, now=0.0)
    world.policy.reserve_pages = 0
    world.pool.pages.margin_bytes = pages(world, 8)
    backed = []
    for second in range(5):
        world.driver.capacity_bytes = world.driver.physical_bytes + pages(world, 1)
        world.policy.idle(world.tree, float(second))
        backed.append(world.num_backed)
    assert backed == [100, 100, 100, 40, 0], "nothing is older than two seconds at first"


class SharedDevice(DriverProxy):
    """The memory of one device, of which every server sees what the others have taken."""

    TOTAL_PAGES = 220

    def __init__(self, inner: HostDriver, others: list[SharedDevice]) -> None:
        super().__init__(inner)
        self.others = others
        others.append(self)

    def memory_info(self) -> tuple[int, int]:
        taken = sum(one.inner.physical_bytes for one in self.others)
        return self.total - taken, self.total

    @property
    def total(self) -> int:
        return self.TOTAL_PAGES * self.granularity


@pytest.mark.parametrize("second_burst_at", [6.0, 40.0])
def test_two_servers_that_share_a_device_have_their_bursts_in_turn(
    second_burst_at: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each burst wants 140 of 220 pages cached. The second one gets them within seconds, and nobody is refused."""
    monkeypatch.setattr(memory, "PAGES_YIELDED_AT_ONCE", 16)
    with HostDriver(capacity_bytes=64 << 20) as one, HostDriver(capacity_bytes=64 << 20) as two:
        devices: list[SharedDevice] = []
        first, second = (World(SharedDevice(driver, devices)) for driver in (one, two))
        for world in (first, second):
            world.pool.pages.margin_bytes = pages(world, 4)
            world.policy.reserve_pages = 2

        def serve(world: World, now: float) -> None:
            """One request of ten pages; 14 different ones in turn, so that 140 pages are worth keeping."""
            world.policy.step(world.tree, now)
            while not world.pool.secure(10):
                assert world.tree.evictable_leaves, "a request that fits is refused"
                world.tree.evict(EvictParams(num_tokens=10 * PAGE_TOKENS))
            world.run(1, 10)
            world.policy.launched()
            surplus = len(world.tree.evictable_leaves) + 10 - 140
            if surplus > 0:  # a prompt that is cached is not cached twice
                world.tree.evict(EvictParams(num_tokens=surplus * PAGE_TOKENS))
            world.end(1, now=now)

        now = 0.0
        while now < 5.0:
            serve(first, now)
            second.policy.idle(second.tree, now)
            now += 0.05
        assert len(first.tree.evictable_leaves) == 140
        while now < second_burst_at:
            first.policy.idle(first.tree, now)
            second.policy.idle(second.tree, now)
            now += 0.05
        assert len(first.tree.evictable_leaves) == 140, "nobody has asked for its memory"
        full_at = None
        while now < second_burst_at + 20.0:
            serve(second, now)
            first.policy.idle(first.tree, now)
            assert one.physical_bytes + two.physical_bytes <= devices[0].total
            if full_at is None and len(second.tree.evictable_leaves) >= 140:
                full_at = now
            now += 0.05
        assert full_at is not None and full_at < second_burst_at + 8.0
        left = len(first.tree.evictable_leaves)
        # The second keeps ten more ready, for its next request.
        assert 220 - 140 - 10 - 16 - 20 <= left < 140, f"{left} pages left: more than was needed has been let go"
        for world in (first, second):
            world.pool.shutdown()


def test_the_reserve_is_filled_behind_launches_a_few_pages_at_a_time(world: World) -> None:
    world.policy.reserve_pages = PAGES_CREATED_AT_ONCE + 3
    world.policy.launched()
    assert world.pool.pages.num_free_backed == PAGES_CREATED_AT_ONCE
    for _ in range(3):
        world.policy.launched()
    assert world.pool.pages.num_free_backed == PAGES_CREATED_AT_ONCE + 3
    world.policy.set_limit(pages(world, 2))
    world.policy.step(world.tree, 0.0)
    world.policy.launched()
    assert world.num_backed == 2, "the limit holds for the reserve, too"


def test_what_a_launch_took_is_ready_for_the_next_that_takes_as_many(world: World) -> None:
    """Agents that come back together find their pages; a while after the last of them the memory goes back."""
    policy, in_front = world.policy, [0]

    def burst(num_pages: int) -> int:
        """One launch takes so many. Returns how many of them were created for it, in front of it."""
        before = world.pool.pages.num_created
        world.run(1, num_pages)
        in_front.append(world.pool.pages.num_created - before)
        policy.launched()
        world.end(1, now=0.0)
        return in_front[-1]

    def steps(first: float, last: float) -> None:
        for now in np.arange(first, last, 0.25):
            policy.step(world.tree, now)
            policy.launched()

    most = int(BURST_SHARE * NUM_PAGES)
    assert most > PAGES_CREATED_AT_ONCE + 2
    policy.reserve_pages = 2
    steps(0.0, 1.0)
    assert burst(12) == 10 and policy.ready_pages == 12
    steps(1.0, 2.0)
    assert world.pool.pages.num_free_backed == 12
    assert burst(12) == 0
    # As many as that, but a share of the pool at most; and each page at a time, in portions.
    assert burst(5 * most) > 3 * most and policy.ready_pages == most
    steps(2.0, 3.0)
    assert world.pool.pages.num_free_backed == most
    # It stays for a while, whatever comes in between, and then it goes, but for the reserve.
    steps(3.0, BURST_SECONDS)
    assert burst(1) == 0 and policy.ready_pages == most
    steps(BURST_SECONDS, 2 * BURST_SECONDS)
    assert policy.ready_pages == most
    steps(2 * BURST_SECONDS, 4 * BURST_SECONDS)
    assert policy.ready_pages == world.pool.pages.num_free_backed == 2
    assert world.num_backed == world.pool.pages.num_in_use + 2
    assert policy.pages_created_ahead == world.pool.pages.num_created - sum(in_front) > 0


def test_without_a_reserve_nothing_is_taken_ahead_and_while_memory_is_short_no_more_than_it(world: World) -> None:
    policy, pages = world.policy, world.pool.pages
    policy.reserve_pages = 0
    world.run(1, 12)
    policy.launched()
    assert policy.ready_pages == pages.num_free_backed == 0
    policy.reserve_pages = 2
    assert policy.ready_pages == 12
    pages.margin_bytes = world.driver.memory_info()[0]  # less than twice the margin is free
    policy.step(world.tree, 0.0)
    policy.launched(pages_computed=12)
    assert policy.ready_pages == 2 and pages.num_free_backed == 0, "not a page beyond the margin"
    pages.margin_bytes = 0
    policy.step(world.tree, LOOK_SECONDS)
    policy.launched()
    assert pages.num_free_backed == PAGES_CREATED_AT_ONCE
    policy.launched()
    assert policy.ready_pages == pages.num_free_backed == 12


def test_pages_are_created_in_stretches_rather_than_a_few_behind_each_launch(world: World) -> None:
    """From half of what is to be ready up to all of it; sooner only what requests begin in the next steps."""
    policy, pages = world.policy, world.pool.pages
    policy.reserve_pages = 20
    steps = [(0, 0, 8), (0, 0, 8), (0, 0, 4), (3, 0, 0), (7, 0, 0), (1, 0, 8), (0, 0, 3), (0, 0, 0)]
    for taken, soon, created in [*steps, (6, 14, 0), (0, 15, 6), (0, 15, 0)]:
        pages.take_many(taken)
        before = pages.num_free_backed
        policy.launched(soon)
        assert pages.num_free_backed - before == created, (taken, before)


def test_a_prefill_has_as_many_created_behind_it_as_it_fills(world: World) -> None:
    world.policy.reserve_pages = 40
    world.policy.launched(pages_computed=20)
    assert world.pool.pages.num_free_backed == PAGES_CREATED_AT_ONCE + 20
    world.policy.launched()
    assert world.pool.pages.num_free_backed == 2 * PAGES_CREATED_AT_ONCE + 20


def test_free_pages_that_nobody_needs_go_back_under_load(world: World) -> None:
    """What comes and goes within the time stays: it would only be created anew. The reserve stays, too."""
    world.policy.reserve_pages = 10
    world.run(1, 150)
    world.pool.free(world.pool.pages_of(1, 0, 150))
    world.pool.close(1)

    def second(now: int, needed: int) -> None:
        """Two steps, and a request that comes and goes."""
        world.policy.step(world.tree, now)
        world.run(2, needed)
        world.policy.step(world.tree, now + 0.5)
        world.pool.free(world.pool.pages_of(2, 0, needed))
        world.pool.close(2)
        world.pool.drain(in_flight=0)

    for now in range(20):
        second(now, 100)
    assert world.num_backed == 100 + 10, "50 were never needed; of what is left free the reserve is kept"
    for now in range(20, 60):
        second(now, 100)
    assert world.num_backed == 110 and world.pool.pages.num_created == 150, "nothing goes that is needed again"
    for now in range(60, 82):
        second(now, 1)
    assert world.num_backed == 11


def test_the_memory_that_goes_back_under_load_holds_up_no_launch(world: World) -> None:
    world.run(1, 250)
    world.pool.free(world.pool.pages_of(1, 0, 250))
    world.pool.close(1)
    world.pool.drain(in_flight=0)
    seen = []
    for number in range(200):
        world.policy.step(world.tree, number / 10)
        seen.append(world.num_backed)
    gone = [before - after for before, after in pairwise(seen)]
    assert max(gone) == PAGES_RELEASED_UNDER_LOAD and seen[-1] == 0
    assert all(not (first and second) for first, second in pairwise(gone)), "not in steps that follow each other"


def test_an_idle_server_gives_memory_back_in_steps(world: World) -> None:
    world.run(1, 200)
    world.pool.free(world.pool.pages_of(1, 0, 200))
    world.pool.close(1)
    world.policy.idle(world.tree, 100.0)
    world.policy.idle(world.tree, 109.9)
    assert world.pool.pages.num_free_backed == 200
    world.policy.idle(world.tree, 110.0)
    assert world.pool.pages.num_free_backed == 200 - PAGES_RELEASED_AT_ONCE
    for _ in range(3):
        world.policy.idle(world.tree, 110.1)
    assert world.driver.physical_bytes == world.pool.layout.page_bytes, "the padding page stays"
    assert world.pool.pages.num_released == 200
    world.run(1, 20)
    world.policy.idle(world.tree, 120.0)
    assert world.pool.pages.num_in_use == 20


def test_work_puts_giving_back_off(world: World) -> None:
    world.run(1, 3)
    world.pool.free(world.pool.pages_of(1, 0, 3))
    world.pool.close(1)
    world.policy.idle(world.tree, 0.0)
    world.run(2, 3)
    world.policy.step(world.tree, 5.0)
    world.policy.launched()
    world.pool.free(world.pool.pages_of(2, 0, 3))
    world.pool.close(2)
    world.policy.idle(world.tree, 11.0)
    assert world.pool.pages.num_free_backed == 3
    world.policy.idle(world.tree, 21.0)
    assert world.pool.pages.num_free_backed == 0


def test_requests_are_bound_by_the_limit(world: World) -> None:
    world.policy.full_request_lens = (2000, 1995)
    assert world.policy.request_lens() == (2000, 1995)
    world.policy.set_limit(pages(world, 50))
    assert world.policy.request_lens() == (799, 794)


@pytest.mark.parametrize("copied", [0, 1, PAGE_TOKENS - 1])
def test_the_longest_request_that_is_accepted_is_admitted(world: World, copied: int) -> None:
    """Otherwise it waits for ever, and all requests behind it: also where it copies from a page, which it locks."""
    num_tokens = NUM_PAGES * PAGE_TOKENS
    world.policy.full_request_lens = (num_tokens - 1, num_tokens - 6)  # SGLang's own
    longest, _ = world.policy.request_lens()
    hit = (longest // PAGE_TOKENS - 1) * PAGE_TOKENS + copied if copied else 0
    if hit:
        world.run(1, -(-hit // PAGE_TOKENS))
    new = longest - 1 - hit
    total = new + 1 + PAGE_TOKENS  # as SGLang counts: its answer, and a page for what rounding costs
    admitted, _ = world.budget().check_prefill(
        extend_input_len=new,
        total_tokens=total,
        max_new_tokens=1,
        input_tokens=new,
        swa_host_hit_length=0,
        chunk_limit=None,
    )
    assert admitted and longest == num_tokens - 2 * PAGE_TOKENS


@pytest.mark.parametrize("kind", ["create", "map"])
@pytest.mark.parametrize("error", [OutOfMemory, DriverError])
def test_a_driver_that_refuses_memory_costs_no_request(
    kind: str, error: type[DriverError], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever its reason: SGLang has not committed itself yet, so requests wait, cached prefixes go."""
    with HostDriver(capacity_bytes=64 << 20) as inner:
        driver = FaultyDriver(inner)
        world = World(driver)
        world.policy.reserve_pages = 20
        world.run(1, 10)
        world.end(1, now=0.0)
        driver.plan.append(Fault(kind, lambda _: True, error))
        assert not world.admits(20)
        world.policy.launched()
        assert not world.allocator.check_decode_capacity(
            num_tokens=20 * PAGE_TOKENS, tree_cache=world.tree, requests=[2, 3]
        )
        assert world.allocator.secure(5, world.tree), "cached prefixes give theirs"
        assert len(caplog.records) == 2 * (error is DriverError), "a full device is nothing to speak of"
        driver.plan.clear()
        assert world.admits(20)
        world.pool.shutdown()


def blinded(world: World, driver: FaultyDriver) -> list[int]:
    """The driver cannot say how much memory is free; how often it was asked since."""
    asked: list[int] = []
    driver.plan.append(Fault("memory_info", lambda call: bool(asked.append(call.number)) or True, DriverError))
    world.pool.pages.margin_bytes = world.pool.layout.page_bytes
    return asked


def test_a_driver_that_cannot_say_what_is_free_costs_no_request(caplog: pytest.LogCaptureFixture) -> None:
    """It is only a look: then it is the driver's refusals that say when memory ends. The log says so, and not again."""
    with HostDriver(capacity_bytes=64 << 20) as inner:
        driver = FaultyDriver(inner)
        world = World(driver)
        world.policy.reserve_pages = 20
        asked = blinded(world, driver)
        for now in range(3):
            world.policy.step(world.tree, float(now))
            world.policy.launched()
        assert world.num_backed == 20 and len(asked) >= 6
        assert world.admits(50)
        world.run(1, 50)
        world.end(1, now=0.0)
        inner.capacity_bytes = inner.physical_bytes
        assert not world.admits(60, answer_pages=200), "the driver refuses: the request waits"
        assert world.allocator.check_decode_capacity(num_tokens=PAGE_TOKENS, tree_cache=world.tree, requests=[2, 3])
        assert caplog.text.count("free memory is not known") == 1
        driver.plan.clear()
        assert world.pool.pages.most_in_use() == world.num_backed, "and once it can say, that holds again"
        world.pool.shutdown()


def test_ranks_agree_on_what_was_last_said_to_be_free() -> None:
    with HostDriver(capacity_bytes=64 << 20) as inner:
        driver = FaultyDriver(inner)
        world = World(driver)
        policy, _ = two_ranks(world)
        inner.capacity_bytes = inner.physical_bytes + 50 * world.pool.layout.page_bytes
        policy.step(world.tree, 1.0)
        assert policy.decide(world.tree, 1.0) == Decision(50, 0)
        assert blinded(world, driver) == []
        policy.step(world.tree, 2.0)
        assert policy.decide(world.tree, 2.0) == Decision(50, 0), "neither more nor less than before"
        world.pool.shutdown()


def test_the_last_request_waits_for_memory_rather_than_be_aborted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang answers it with an error where the next page is not there: a neighbour may let go of one."""
    world.run(1, 10)
    free = world.driver.capacity_bytes
    world.driver.capacity_bytes = world.driver.physical_bytes
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 5:
            world.driver.capacity_bytes = free

    monkeypatch.setattr("time.sleep", sleep)
    fits = world.allocator.check_decode_capacity
    assert not fits(num_tokens=PAGE_TOKENS, tree_cache=world.tree, requests=[1, 2]) and not waited
    assert fits(num_tokens=PAGE_TOKENS, tree_cache=world.tree, requests=[1]) and len(waited) == 5
    assert not fits(num_tokens=NUM_PAGES * PAGE_TOKENS, tree_cache=world.tree, requests=[1]), "it never would"
    world.driver.capacity_bytes = world.driver.physical_bytes
    monkeypatch.setattr("sgl_vtensor.srt.allocator.LAST_REQUEST_SECONDS", -1.0)
    assert not fits(num_tokens=2 * PAGE_TOKENS, tree_cache=world.tree, requests=[1])
    assert len(waited) == 5


def test_a_flush_whose_memory_is_not_taken_back_is_a_flush(caplog: pytest.LogCaptureFixture) -> None:
    with HostDriver(capacity_bytes=64 << 20) as inner:
        driver = FaultyDriver(inner, [Fault("release", 3, DriverError)])
        world = World(driver)
        world.run(1, 10)
        world.allocator.clear()
        assert world.pool.pages.num_in_use == 0
        assert world.num_backed == 7 and "could not be given back" in caplog.text
        world.run(1, 10)
        world.pool.shutdown()


@pytest.mark.parametrize("num_bytes", [0, -1, 1024, 1 << 50, float("nan"), float("inf"), float("-inf")])
def test_a_limit_that_cannot_be_is_refused_and_changes_nothing(world: World, num_bytes: int) -> None:
    class Rejected(Exception):
        pass

    handler = LimitHandler(world.policy, SimpleNamespace(), Rejected)
    with pytest.raises(Rejected, match="at least one page"):
        handler.validate(LimitHandler.KEY, num_bytes)
    handler.validate(LimitHandler.KEY, world.policy.capacity_bytes / 2)
    assert world.pool.pages.limit_pages == NUM_PAGES, "validating applies nothing"
    with pytest.raises(ConfigError, match="at least one page"):
        MemoryPolicy(world.pool, VTensorConfig(memory_limit=Size("huge", 1 << 50, False)))


def test_a_reserve_larger_than_the_limit_is_refused(world: World) -> None:
    half = Size("half", pages(world, NUM_PAGES // 2), False)
    MemoryPolicy(world.pool, VTensorConfig(reserve=Size("50%", 0.5, True), memory_limit=half))
    with pytest.raises(ConfigError, match="--vtensor-reserve 60% is more than the memory limit of half; lower it"):
        MemoryPolicy(world.pool, VTensorConfig(reserve=Size("60%", 0.6, True), memory_limit=half))


def test_the_log_speaks_of_a_full_device_and_not_again_and_again(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    world.run(1, 20)
    world.policy.set_limit(pages(world, 30))
    assert not world.admits(20)
    assert "no memory" not in caplog.text, "it was the limit"
    world.driver.capacity_bytes = world.driver.physical_bytes
    for _ in range(3):
        assert not world.admits(5)
    assert caplog.text.count("the device has no memory for more pages, so requests wait") == 1
    world.policy._said.clear()
    assert not world.admits(5)
    assert caplog.text.count("requests wait") == 2


def test_the_log_says_when_memory_is_within_a_lower_limit(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    world.run(1, 100)
    world.policy.set_limit(pages(world, 40))
    world.policy.step(world.tree, 1.0)
    assert "within the limit" not in caplog.text, "a request keeps what it has"
    world.end(1, now=0.0)
    for _ in range(3):
        world.policy.step(world.tree, 1.0)
    assert caplog.text.count("within the limit again") == 1
    world.policy.set_limit(pages(world, 20))
    world.policy.step(world.tree, 1.0)
    assert world.num_backed == 20 and caplog.text.count("within the limit again") == 1, "it has just said so"
