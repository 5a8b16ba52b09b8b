"""When a launch reads rows, and when it reads the pages at their homes: ``Runtime`` over a real pool on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sgl_vtensor.config import VTensorConfig
from sgl_vtensor.core.groups import alone
from sgl_vtensor.core.layout import plan_layout
from sgl_vtensor.core.pages import Pages
from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.errors import ConfigError, DriverError, OutOfMemory
from sgl_vtensor.srt.allocator import PageCopy
from sgl_vtensor.srt.memory import BURST_SECONDS, MemoryPolicy
from sgl_vtensor.srt.runtime import (
    CALLS_A_LAUNCH,
    MAX_MAPPINGS_AHEAD,
    MAX_VIEWS,
    STEPS_AHEAD,
    TOKENS_A_CALL,
    Runtime,
    _max_mappings,
    _num_rows,
)
from sgl_vtensor.vmm.faults import Fault, FaultyDriver
from sgl_vtensor.vmm.host import HostDriver
from tests.core.conftest import ManualFence

NUM_SLOTS = 2 * MAX_VIEWS


class World:
    """A pool, a runtime over it, and what the allocator would say."""

    def __init__(self, driver: FaultyDriver, config: VTensorConfig) -> None:
        self.driver = driver
        layout = plan_layout(
            num_layers=1,
            num_kv_heads=2,
            head_dim=16,
            v_head_dim=16,
            itemsize=4,
            granule_bytes=driver.granularity,
            page_tokens=16,
        )
        self.pool = VTensorPool(Pages(driver, layout, 600), num_slots=NUM_SLOTS, max_len_tokens=40 * 16)
        self.allocator: Any = SimpleNamespace(extending=True, copies=[])
        self.extend_num_tokens: int | None = None
        policy = MemoryPolicy(self.pool, config)
        self.runtime = runtime = Runtime(self.pool, self.allocator, policy, config, dense_capacity=600 * 16)
        runtime.can_read_homes = runtime.decode_reads_homes = runtime.extend_reads_homes = False

    def prefill(self, slots: list[int], num_pages: int, *, chunked: int | None = None) -> bool:
        """Open the requests, allocate, launch; whether the launch read homes."""
        for slot in slots:
            if not self.pool.is_open(slot):
                self.pool.open(slot, [], num_pages * 16)
        assert self.pool.grow(slots, [num_pages * 16] * len(slots))
        return self._launch(slots, extending=True, chunked=chunked)

    def decode(self, slots: list[int]) -> bool:
        return self._launch(slots, extending=False, chunked=None)

    def _launch(self, slots: list[int], *, extending: bool, chunked: int | None) -> bool:
        self.allocator.extending = extending
        slots_cpu = torch.tensor(slots)
        self.runtime.alloc_to_lengths(req_pool_indices_cpu=slots_cpu, target_seq_lens_cpu=slots_cpu)
        req = SimpleNamespace(kv=SimpleNamespace(holds_kv=True, req_pool_idx=chunked))
        batch = SimpleNamespace(
            req_pool_indices_cpu=slots_cpu,
            seq_lens_cpu=torch.tensor([16 * int(self.pool.num_wanted[slot]) for slot in slots]),
            chunked_req=None if chunked is None else req,
            forward_mode=SimpleNamespace(is_extend=lambda: extending),
            extend_num_tokens=self.extend_num_tokens,
        )
        self.runtime.begin_launch(batch)
        rows = self.runtime.rows_of_launch()
        assert rows is not None and (rows == self.pool.row_of_slot[slots]).all()
        self.groups = self.runtime.groups_of_launch(len(slots) + 1, max_members=4).tolist()
        reads_homes = self.runtime.launch_reads_homes
        if not reads_homes:
            assert self.pool.is_synced(slots), "a launch reads rows that lack pages"
        self.runtime.end_launch(batch)
        return reads_homes


@pytest.fixture
def world() -> Iterator[World]:
    with HostDriver(capacity_bytes=64 << 20) as driver:
        built = World(FaultyDriver(driver, []), VTensorConfig())
        yield built
        built.pool.shutdown()


def test_kernels_that_read_only_rows_always_get_them(world: World) -> None:
    assert not world.prefill([1, 2], 30)
    assert not world.decode([1, 2])


def test_a_few_mappings_are_waited_for_and_many_are_not(world: World) -> None:
    world.runtime.can_read_homes = True
    assert not world.prefill([1], MAX_MAPPINGS_AHEAD)
    assert world.prefill([2], MAX_MAPPINGS_AHEAD + 1)


def test_rows_are_mapped_behind_the_launch_while_few_requests_run(world: World) -> None:
    world.runtime.can_read_homes = world.runtime.decode_reads_homes = True
    assert world.prefill([1], 30)
    assert world.pool.is_synced([1])
    assert not world.prefill([1], 31)


def test_a_large_batch_reads_homes_and_maps_only_the_prefill_that_goes_on(world: World) -> None:
    world.runtime.can_read_homes = world.runtime.decode_reads_homes = True
    slots = list(range(1, MAX_VIEWS + 2))
    assert world.prefill(slots, 12, chunked=3)
    assert world.pool.is_synced([3])
    assert not any(world.pool.is_synced([slot]) for slot in slots if slot != 3)
    assert world.decode([1]), "its row was never mapped"
    assert not world.prefill([3], 13), "its row was mapped behind its first chunk"


def test_requests_that_begin_with_the_same_pages_are_decoded_together(world: World) -> None:
    world.prefill([1], 30)
    shared = world.pool.wanted[1, :20].tolist()
    for slot, prefix in ((2, shared), (4, shared[:17])):
        world.pool.open(slot, prefix, 30 * 16)
    world.prefill([2, 3, 4], 30)
    pages_before, world.runtime.decode_pages_saved = world.runtime.decode_pages, 0
    world.decode([3, 4, 2, 1])
    order, leader, members, tokens = world.groups
    assert sorted(order[:4]) == [0, 1, 2, 3]
    assert order[4] == 4, "what a graph's batch is padded with stays behind"
    together = {order[place] for place in range(5) if leader[place] == leader[order.index(1)]}
    assert together == {1, 2, 3}, "slots 4, 2 and 1"
    assert sorted(members) == [0, 0, 1, 1, 3]
    assert sorted(tokens) == [0, 0, *[17 * 16] * 3]
    assert (world.runtime.decode_pages, world.runtime.decode_pages_saved) == (pages_before + 4 * 30, 2 * 17)
    world.decode([3, 4])
    assert world.groups == alone(3).tolist()
    world.decode([3])
    assert (world.runtime.decode_pages, world.runtime.decode_pages_saved) == (pages_before + 7 * 30, 2 * 17)


def test_what_saves_little_is_decoded_alone(world: World) -> None:
    """Two of 34 pages may share 16, but not if three others share nothing."""
    world.prefill([1], 34)
    world.pool.open(2, world.pool.wanted[1, :16].tolist(), 34 * 16)
    world.prefill([2, 3, 4, 5], 34)
    world.decode([1, 2])
    assert max(world.groups[3]) == 0, "16 of 68 pages"
    world.decode([1])
    assert world.groups == alone(2).tolist()
    world.pool.open(6, world.pool.wanted[1, :18].tolist(), 34 * 16)
    world.prefill([6], 34)
    world.decode([1, 6])
    assert max(world.groups[3]) == 18 * 16
    world.decode([1, 3, 6])
    assert max(world.groups[3]) == 0, "18 of 102 pages"


def test_the_page_that_is_written_next_is_shared_with_nobody(world: World) -> None:
    """Even where the books have it twice."""
    world.prefill([1], 20)
    world.pool.open(2, world.pool.wanted[1, :20].tolist(), 20 * 16)
    world.prefill([2], 20)
    world.decode([1, 2])
    assert world.groups[3][:2] == [19 * 16] * 2


def test_a_slot_that_another_request_has_now_is_grouped_anew(world: World) -> None:
    """By its pages, however many there are: while requests decode the groups are not sought again."""
    world.prefill([1], 30)
    shared = world.pool.wanted[1, :29].tolist()
    world.pool.open(2, shared, 30 * 16)
    world.prefill([2], 30)
    for _ in range(2):
        world.decode([1, 2])
        assert world.groups[3][:2] == [29 * 16] * 2
    world.prefill([1, 2], 31)
    world.decode([1, 2])
    assert world.groups[3][:2] == [29 * 16] * 2, "pages that they begin are their own"
    world.pool.close(2)
    world.pool.drain(in_flight=0)
    world.pool.open(2, [], 31 * 16)
    world.prefill([2], 31)
    world.decode([1, 2])
    assert world.groups == alone(3).tolist()


def test_runs_that_are_no_launch_have_nobody_together(world: World) -> None:
    assert world.runtime.groups_of_launch(3, max_members=4).tolist() == alone(3).tolist()


def test_the_line_at_start_says_what_the_pool_is(world: World) -> None:
    world.runtime.policy.set_limit(150 << 12)
    assert world.runtime.describe() == (
        "vTensor memory: host driver; page 16 tokens = 4.00 KiB; token stride 256 B, 0.0% padding; "
        "limit 600.00 KiB of 2.34 MiB (9600 tokens); 32 rows of 640 tokens, 0.00 TiB of addresses; "
        "another attention backend on homes"
    )


def test_where_all_is_read_at_its_home_no_row_is_mapped(world: World) -> None:
    world.runtime.can_read_homes = world.runtime.decode_reads_homes = world.runtime.extend_reads_homes = True
    calls = world.driver.calls["map"]
    pages = world.pool.pages.num_backed
    assert world.prefill([1], 2) and world.prefill([2], 30, chunked=2) and world.decode([1, 2])
    assert world.driver.calls["map"] - calls == world.pool.pages.num_backed - pages, "homes only"


def test_decode_that_reads_rows_gets_them_although_its_prefill_did_not(world: World) -> None:
    world.runtime.can_read_homes = True
    slots = list(range(1, MAX_VIEWS + 2))
    assert world.prefill(slots, 12)
    assert not world.decode(slots)


def test_without_a_mapping_left_the_homes_are_read(world: World) -> None:
    world.runtime.can_read_homes = True
    world.pool.open(1, [], 16)
    assert world.pool.grow([1], [16])
    world.driver.plan.append(Fault("map", when=lambda *_: True, error=OutOfMemory))
    assert world._launch([1], extending=True, chunked=None)
    assert world.decode([1])
    world.driver.plan.clear()
    assert not world.decode([1])
    world.runtime.can_read_homes = False
    assert world.pool.grow([1], [32])
    world.driver.plan.append(Fault("map", when=lambda *_: True, error=OutOfMemory))
    with pytest.raises(OutOfMemory):
        world.decode([1])
    world.driver.plan.clear()


@pytest.mark.parametrize("unmap_rows", [False, True])
def test_rows_of_requests_that_ended_are_unmapped_only_where_that_is_asked(unmap_rows: bool) -> None:
    with HostDriver(capacity_bytes=64 << 20) as driver:
        world = World(FaultyDriver(driver, []), VTensorConfig(unmap_rows=unmap_rows))
        pool = world.pool
        padding = pool.rows.num_mappings
        world.prefill([1, 2], 10)
        pool.launch(ManualFence())  # it runs until the drain below, and may read the rows of both
        pool.free(pool.pages_of(1, 0, 10))
        pool.close(1)
        world.decode([2])
        assert pool.rows.num_mappings == padding + 20
        pool.drain(in_flight=0)
        world.decode([2])
        assert pool.rows.num_mappings == padding + (10 if unmap_rows else 20)
        pool.free(pool.pages_of(2, 0, 10))
        pool.close(2)
        world.runtime.idle(SimpleNamespace(evictable_size=lambda: 0), now=0.0)
        assert pool.rows.num_mappings == padding + (0 if unmap_rows else 20)
        pool.shutdown()


TREE = SimpleNamespace(known_pages=lambda req: req)
"""Of requests that are their prefixes."""


def launched(new_tokens: int | None = None) -> Any:
    return SimpleNamespace(extend_num_tokens=new_tokens)


def test_a_launch_waits_for_no_mapping_of_a_prefix_that_has_waited(world: World) -> None:
    """The longer the launch before computes, the more is mapped behind it."""
    prefix = world.pool.pages.take_many(2 * CALLS_A_LAUNCH + 6)
    mapped = []
    for new_tokens in (None, 5 * TOKENS_A_CALL - 1, 0):
        world.runtime.map_waiting([prefix], TREE, launched(new_tokens))
        mapped.append(world.pool.rows.mappings_ahead)
    assert mapped == [CALLS_A_LAUNCH, 2 * CALLS_A_LAUNCH + 4, len(prefix)]
    assert world.pool.stats().rows_prepared == 1
    waits = world.runtime.mapping_waits
    world.pool.open(1, prefix, len(prefix) * 16)
    assert not world.decode([1])
    assert world.runtime.mapping_waits == waits


def test_nothing_is_mapped_ahead_where_rows_are_not_read_or_not_kept(world: World) -> None:
    prefix = world.pool.pages.take_many(3)
    runtime = world.runtime
    runtime.can_read_homes = runtime.decode_reads_homes = runtime.extend_reads_homes = True
    runtime.map_waiting([prefix], TREE, launched())
    assert world.pool.rows.mappings_ahead == 0
    runtime.extend_reads_homes = False
    runtime.config = VTensorConfig(unmap_rows=True)
    runtime.map_waiting([prefix], TREE, launched())
    assert world.pool.rows.mappings_ahead == 0
    runtime.config = VTensorConfig()
    runtime.map_waiting([prefix], TREE, launched())
    assert world.pool.rows.mappings_ahead == 3


def test_a_mapping_that_is_refused_ahead_stops_nothing_but_a_broken_driver_does(world: World) -> None:
    prefix = world.pool.pages.take_many(3)
    fault = Fault("map", when=lambda *_: True, error=OutOfMemory)
    world.driver.plan.append(fault)
    world.runtime.map_waiting([prefix], TREE, launched())
    assert world.driver.errors["map"] == 1 and world.pool.rows.mappings_ahead == 0
    world.driver.plan[:] = [Fault("map", when=lambda *_: True, error=DriverError)]
    with pytest.raises(DriverError):
        world.runtime.map_waiting([prefix], TREE, launched())
    world.driver.plan.clear()


def test_waits_for_mappings_are_counted_by_length(world: World) -> None:
    assert not world.prefill([1], 3)
    assert sum(world.runtime.mapping_wait_counts) == 1
    assert not world.decode([1]), "nothing to wait for"
    tree = SimpleNamespace(evictable_size=lambda: 0, protected_size=lambda: 0)
    world.allocator.tokens_hit = world.allocator.tokens_computed = 0
    before = world.runtime.stats(tree)["mapping_wait_counts"]
    for seconds in (49e-6, 50e-6, 51e-6, 3e-3, 7.0):
        world.runtime._note_wait(seconds)
    stats = world.runtime.stats(tree)
    grown = [new - old for new, old in zip(stats["mapping_wait_counts"], before, strict=True)]
    assert dict(zip((*stats["mapping_wait_buckets_seconds"], float("inf")), grown, strict=True)) == {
        50e-6: 2, 200e-6: 1, 500e-6: 0, 1e-3: 0, 2e-3: 0, 5e-3: 1, 10e-3: 0, 50e-3: 0, float("inf"): 1,
    }  # fmt: skip


def test_copies_and_zeroing_precede_the_launch(world: World) -> None:
    pool = world.pool
    pool.open(1, [], 32)
    assert pool.grow([1], [32])
    source, target = pool.pages_of(1, 0, 2)
    flat = pool.pages.tensor()
    page_bytes, stride = pool.layout.page_bytes, pool.layout.token_stride_bytes
    world.runtime.zero_fresh_pages()
    flat[source * page_bytes : (source + 1) * page_bytes] = 7
    world.allocator.copies = [PageCopy(source, target, 5)]
    world._launch([1], extending=True, chunked=None)
    copied = flat[target * page_bytes : (target + 1) * page_bytes].numpy()
    assert (copied[: 5 * stride] == 7).all()
    assert np.count_nonzero(copied[5 * stride :]) == 0
    assert world.allocator.copies == []
    assert world.runtime.tokens_copied == 5


def test_pages_are_created_before_requests_begin_them(world: World) -> None:
    """Eight at once, for all that will need one in the next steps; none without a reserve."""
    slots, pages = list(range(12)), world.pool.pages
    world.prefill(slots, 2)  # they end at a page's edge
    for now in (0.0, BURST_SECONDS):  # what this took is forgotten
        world.runtime.policy.step(TREE, now)
    for reserve, created in ((0, 0), (1, 8), (1, 12), (1, 12)):
        world.runtime.policy.reserve_pages = reserve
        world.decode(slots)
        assert pages.num_free_backed == created
    # Behind a prefill one more for each page that it fills; what was computed before says nothing of a decode step.
    world.runtime.policy.reserve_pages, world.extend_num_tokens = 60, 20 * 16 + 15
    world.decode(slots)
    assert pages.num_free_backed == 12 + 8
    world.prefill(slots, 2)
    assert pages.num_free_backed == 12 + 8 + 8 + 20
    # None while first tokens of a prefill that was nearly all cached wait for this thread.
    world.extend_num_tokens = 15
    for _ in range(2):
        world.prefill(slots, 2)
        world.decode(slots)
        assert pages.num_free_backed == 48
    world.decode(slots)
    assert pages.num_free_backed == 48 + 8
    # One whose page has room for more steps than are looked ahead for needs none.
    layout = world.pool.layout
    world.pool.layout = dataclasses.replace(layout, page_tokens=128)
    lens = torch.tensor([128, 129, 128 - STEPS_AHEAD, 128 - STEPS_AHEAD + 1, 127])
    assert world.runtime._pages_soon(SimpleNamespace(seq_lens_cpu=lens)) == 3
    world.pool.layout = layout


def test_rows_that_contradict_other_settings_are_refused() -> None:
    config = VTensorConfig(num_rows=12)
    assert _num_rows(config, 11, 1 << 30) == 12
    with pytest.raises(ConfigError, match="--vtensor-num-rows 12 is too few for 12 requests at once; give at least 13"):
        _num_rows(config, 12, 1 << 30)
    with pytest.raises(ConfigError, match="lower --max-running-requests to 9 or lower --context-length"):
        _num_rows(config, 10, 10 << 40)


def test_pages_that_leave_no_mappings_to_rows_are_refused() -> None:
    assert _max_mappings("cuda", 1 << 30, 8) is None
    with pytest.raises(ConfigError, match=r"pages leave 0 of Linux's \d+ mappings for rows; lower --max-total-tokens"):
        _max_mappings("host", 1 << 30, 8)
