"""Any order of calls that the pool allows, against a model of dicts, with real bytes: hypothesis seeks the worst."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sgl_vtensor.core.checks import check_tables
from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.core.rows import Rows
from sgl_vtensor.vmm.host import HostDriver
from tests.core.conftest import PAGE_TOKENS, ManualFence, read_tokens, small_pool, write_tokens

SLOTS = 3
MAX_LEN = 6 * PAGE_TOKENS
slots = st.integers(1, SLOTS)


class PoolMachine(RuleBasedStateMachine):
    """The model: what each open slot's tokens are, how many of its pages are the tree's, and what those hold."""

    @initialize(num_pages=st.integers(4, 16), spare_rows=st.integers(0, 3), limited=st.booleans())
    def begin(self, num_pages: int, spare_rows: int, limited: bool) -> None:
        self.driver = HostDriver(capacity_bytes=1 << 24)
        self.pool: VTensorPool = small_pool(
            self.driver,
            num_pages=num_pages,
            num_slots=SLOTS,
            max_len=MAX_LEN,
            num_rows=SLOTS + 1 + spare_rows,
            max_mappings=12 if limited else None,
        )
        self.tokens: dict[int, list[int]] = {}
        self.shared: dict[int, int] = {}  # slot -> how many of its first pages are the tree's
        self.tree: dict[int, list[int]] = {}  # page -> its tokens
        self.number = 0

    def is_open(self) -> bool:
        return bool(self.tokens)

    @rule(slot=slots, num_shared=st.integers(0, 3), more=st.integers(1, 9))
    def open_and_grow(self, slot: int, num_shared: int, more: int) -> None:
        if slot in self.tokens:
            return
        prefix = list(self.tree)[:num_shared]
        tokens = [token for page in prefix for token in self.tree[page]]
        length = min(len(tokens) + more, MAX_LEN)
        self.pool.open(slot, prefix, length)
        self.tokens[slot], self.shared[slot] = tokens, len(prefix)
        if length == len(tokens) or not self.write(slot, length):
            self.close(slot, keep=False)

    @precondition(is_open)
    @rule(slot=slots, more=st.integers(1, 9))
    def grow(self, slot: int, more: int) -> None:
        if slot in self.tokens:
            self.write(slot, min(len(self.tokens[slot]) + more, MAX_LEN))

    def write(self, slot: int, length: int) -> bool:
        start = len(self.tokens[slot])
        in_use = self.pool.pages.num_in_use
        if not self.pool.grow([slot], [length]):
            assert self.pool.pages.num_in_use == in_use, "half of a request was grown"
            return False
        self.pool.ensure(np.array([slot], dtype=np.int32))
        new = list(range(self.number, self.number + length - start))
        self.number += len(new)
        write_tokens(self.pool, slot, start, new)
        self.tokens[slot] += new
        return True

    @precondition(is_open)
    @rule(slot=slots)
    def give_to_tree(self, slot: int) -> None:
        """A checkpoint of pages that the tree has not."""
        if slot in self.tokens:
            full = len(self.tokens[slot]) // PAGE_TOKENS
            for at, page in enumerate(self.pool.pages_of(slot, 0, full)):
                self.tree.setdefault(page, self.tokens[slot][at * PAGE_TOKENS : (at + 1) * PAGE_TOKENS])
            self.shared[slot] = max(self.shared[slot], full)

    @precondition(is_open)
    @rule(slot=slots, data=st.data())
    def adopt(self, slot: int, data: st.DataObject) -> None:
        """A checkpoint of pages that the tree has: the tree's copies have the same bytes, and stay."""
        if slot not in self.tokens or self.shared[slot] >= len(self.tokens[slot]) // PAGE_TOKENS:
            return
        first = self.shared[slot]
        count = data.draw(st.integers(1, len(self.tokens[slot]) // PAGE_TOKENS - first))
        if not self.pool.pages.secure(count):
            return
        kept = self.pool.pages.take_many(count)
        size = self.pool.layout.page_bytes
        for copy, page in zip(kept, self.pool.pages_of(slot, first, first + count), strict=True):
            source = self.driver.tensor(self.pool.pages.home(page), size)
            self.driver.tensor(self.pool.pages.home(copy), size).copy_(source)
        assert self.pool.adopt(slot, first, kept) == list(range(first, first + count))
        for at, page in enumerate(kept, first):
            self.tree[page] = self.tokens[slot][at * PAGE_TOKENS : (at + 1) * PAGE_TOKENS]
        self.shared[slot] = first + count

    @precondition(is_open)
    @rule(slot=slots, keep=st.booleans())
    def close(self, slot: int, keep: bool) -> None:
        if slot not in self.tokens:
            return
        if keep:
            self.give_to_tree(slot)
        self.pool.free(self.pool.pages_of(slot, self.shared[slot], int(self.pool.num_wanted[slot])))
        self.pool.close(slot)
        del self.tokens[slot], self.shared[slot]

    @rule()
    def evict(self) -> None:
        used = {page for slot, count in self.shared.items() for page in self.pool.pages_of(slot, 0, count)}
        for page in [page for page in self.tree if page not in used]:
            del self.tree[page]
            self.pool.free([page])

    @rule(fenced=st.booleans())
    def launch(self, fenced: bool) -> None:
        self.pool.take_fresh()
        self.pool.launch(ManualFence() if fenced else None)

    @rule(in_flight=st.integers(0, 2))
    def drain(self, in_flight: int) -> None:
        self.pool.drain(in_flight=in_flight)
        assert self.pool.epochs.launched - self.pool.epochs.settled <= in_flight

    @rule(count=st.integers(0, 16))
    def secure(self, count: int) -> None:
        assert not self.pool.secure(count) or self.pool.pages.num_free_backed >= count

    @rule(keep=st.integers(0, 8))
    def shrink(self, keep: int) -> None:
        before = self.pool.pages.num_backed
        assert self.pool.shrink(keep) == before - self.pool.pages.num_backed

    @rule(limit=st.integers(0, 16))
    def limit(self, limit: int) -> None:
        self.pool.pages.limit_pages = limit

    @rule()
    def reset(self) -> None:
        self.pool.reset()
        self.tokens, self.shared, self.tree = {}, {}, {}

    @invariant()
    def rows_show_what_was_written(self) -> None:
        for slot, tokens in getattr(self, "tokens", {}).items():
            assert read_tokens(self.pool, slot, len(tokens)) == tokens

    @invariant()
    def tables_agree(self) -> None:
        if not hasattr(self, "pool"):
            return
        own = [
            page
            for slot, first in self.shared.items()
            for page in self.pool.pages_of(slot, first, int(self.pool.num_wanted[slot]))
        ]
        check_tables(self.pool, self.driver, own + list(self.tree))

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.shutdown()
        left = (self.driver.num_mappings, self.driver.physical_bytes, self.driver.num_reservations)
        self.driver.close()
        assert left == (0, 0, 0)


def run(**profile: Any) -> None:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(PoolMachine, settings=settings(deadline=None, suppress_health_check=slow, **profile))


def test_any_order_of_calls() -> None:
    """120 stories of up to 40 calls, the same ones each time."""
    run(max_examples=120, stateful_step_count=40, derandomize=True, database=None)


def test_the_machine_notices_a_page_handed_out_while_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Duplicates that are not fenced: a row shows another request's tokens."""
    monkeypatch.setattr(
        Rows, "keep_duplicate", lambda self, row, position, page: self.pages.free([page], self.epochs.launched)
    )
    with pytest.raises(AssertionError):
        run(max_examples=200, stateful_step_count=40, derandomize=True, database=None, phases=[Phase.generate])


@pytest.mark.deep
@pytest.mark.timeout(3600)
def test_any_order_of_calls_deep() -> None:
    """3 000 stories of up to 80 calls, others each time; a failure is kept and shown as the shortest story."""
    run(max_examples=3000, stateful_step_count=80)
