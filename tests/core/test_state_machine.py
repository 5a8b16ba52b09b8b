"""Any order of calls that the pool allows, against a model of dicts, with real bytes: hypothesis seeks the worst.

``python -m tests.core.test_state_machine --steps 2000000`` for a long run.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections import Counter
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
picks = st.integers(0, SLOTS - 1)
"""Which of the slots that a rule may take."""
seen: Counter[str] = Counter()
"""What has happened in all stories of this process."""


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

    def has_closed(self) -> bool:
        return len(self.tokens) < SLOTS

    def open_slot(self, pick: int) -> int:
        return sorted(self.tokens)[pick % len(self.tokens)]

    @precondition(has_closed)
    @rule(pick=picks, num_shared=st.integers(0, 3), more=st.integers(1, 9), mapped=st.booleans())
    def admit(self, pick: int, num_shared: int, more: int, mapped: bool) -> None:
        """A new request, or a retracted one again; with a hit where ``num_shared`` says so."""
        closed = [slot for slot in range(1, SLOTS + 1) if slot not in self.tokens]
        slot = closed[pick % len(closed)]
        prefix = list(self.tree)[:num_shared]
        tokens = [token for page in prefix for token in self.tree[page]]
        length = min(len(tokens) + more, MAX_LEN)
        self.pool.open(slot, prefix, length)
        self.tokens[slot], self.shared[slot] = tokens, len(prefix)
        seen["hit pages"] += len(prefix)
        if length == len(tokens) or not self.write([slot], [length], mapped):
            self.end(slot, keep=False)

    @precondition(is_open)
    @rule(pick=picks, more=st.integers(1, 9), mapped=st.booleans())
    def chunk(self, pick: int, more: int, mapped: bool) -> None:
        slot = self.open_slot(pick)
        self.write([slot], [min(len(self.tokens[slot]) + more, MAX_LEN)], mapped)

    @precondition(is_open)
    @rule(mapped=st.booleans())
    def decode(self, mapped: bool) -> None:
        """A token for every request, or for none: then one is retracted."""
        open_slots = sorted(self.tokens)
        if not self.write(open_slots, [min(len(self.tokens[slot]) + 1, MAX_LEN) for slot in open_slots], mapped):
            seen["retract"] += 1
            self.end(open_slots[-1], keep=False)

    def write(self, slots: list[int], lengths: list[int], mapped: bool) -> bool:
        """Grow and write. Rows that are not mapped now lag behind: a kernel would read the homes."""
        in_use = self.pool.pages.num_in_use
        if not self.pool.grow(slots, lengths):
            assert self.pool.pages.num_in_use == in_use, "half of the requests were grown"
            return False
        if mapped:
            self.map_rows(slots)
        for slot, length in zip(slots, lengths, strict=True):
            start = len(self.tokens[slot])
            new = list(range(self.number, self.number + length - start))
            self.number += len(new)
            write_tokens(self.pool, slot, start, new)
            self.tokens[slot] += new
        return True

    @precondition(is_open)
    @rule(data=st.data())
    def map_behind_the_launch(self, data: st.DataObject) -> None:
        self.map_rows(data.draw(st.lists(st.sampled_from(sorted(self.tokens)), min_size=1, unique=True)))

    def map_rows(self, slots: list[int]) -> None:
        asked = np.array(slots, dtype=np.int32)
        expected = self.pool.count_changes(asked)
        assert self.pool.ensure(asked) == expected
        assert self.pool.is_synced(asked)
        seen["mapped pages"] += expected

    @precondition(lambda self: bool(self.tree))
    @rule(data=st.data(), at_most=st.integers(0, 9))
    def map_ahead(self, data: st.DataObject, at_most: int) -> None:
        """Beginnings that waiting requests share with the tree. Nobody waits for it, and memory stays as it is."""
        begins = st.integers(1, min(len(self.tree), self.pool.rows.max_pages))
        prefixes = [list(self.tree)[:stop] for stop in data.draw(st.lists(begins, min_size=1, max_size=3))]
        before, settled = sum(self.driver.calls.values()), self.pool.epochs.settled
        full, backed = self.pool.rows.num_mappings >= 12, self.pool.pages.num_backed
        mapped = self.pool.map_ahead(prefixes, at_most=at_most)
        assert mapped <= sum(self.driver.calls.values()) - before <= at_most
        assert (self.pool.epochs.settled, self.pool.pages.num_backed) == (settled, backed)
        assert not (mapped and full and self.pool.rows.max_mappings)
        seen["mapped ahead"] += mapped

    @precondition(is_open)
    @rule(pick=picks)
    def checkpoint(self, pick: int) -> None:
        """Of pages that the tree has not."""
        self.give_to_tree(self.open_slot(pick))

    def give_to_tree(self, slot: int) -> None:
        full = len(self.tokens[slot]) // PAGE_TOKENS
        for at, page in enumerate(self.pool.pages_of(slot, 0, full)):
            self.tree.setdefault(page, self.tokens[slot][at * PAGE_TOKENS : (at + 1) * PAGE_TOKENS])
        self.shared[slot] = max(self.shared[slot], full)

    def own_full_pages(self, slot: int) -> int:
        return len(self.tokens[slot]) // PAGE_TOKENS - self.shared[slot]

    @precondition(lambda self: any(self.own_full_pages(slot) > 0 for slot in self.tokens))
    @rule(data=st.data())
    def adopt(self, data: st.DataObject) -> None:
        """A checkpoint of pages that the tree has: the tree's copies have the same bytes, and stay."""
        slot = data.draw(st.sampled_from([slot for slot in sorted(self.tokens) if self.own_full_pages(slot) > 0]))
        first = self.shared[slot]
        count = data.draw(st.integers(1, self.own_full_pages(slot)))
        if not self.pool.pages.secure(count):
            return
        kept = self.pool.pages.take_many(count)
        size = self.pool.layout.page_bytes
        for copy, page in zip(kept, self.pool.pages_of(slot, first, first + count), strict=True):
            source = self.driver.tensor(self.pool.pages.home(page), size)
            self.driver.tensor(self.pool.pages.home(copy), size).copy_(source)
        assert self.pool.adopt(slot, first, kept) == list(range(first, first + count))
        seen["dedup pages"] += count
        for at, page in enumerate(kept, first):
            self.tree[page] = self.tokens[slot][at * PAGE_TOKENS : (at + 1) * PAGE_TOKENS]
        self.shared[slot] = first + count

    @precondition(is_open)
    @rule(pick=picks, keep=st.booleans())
    def close(self, pick: int, keep: bool) -> None:
        """Finish, which keeps what it may; an abort keeps nothing."""
        seen["finish" if keep else "abort"] += 1
        self.end(self.open_slot(pick), keep)

    def end(self, slot: int, keep: bool) -> None:
        if keep:
            self.give_to_tree(slot)
        self.pool.free(self.pool.pages_of(slot, self.shared[slot], int(self.pool.num_wanted[slot])))
        self.pool.close(slot)
        del self.tokens[slot], self.shared[slot]

    @precondition(lambda self: bool(self.tree))
    @rule()
    def evict(self) -> None:
        used = {page for slot, count in self.shared.items() for page in self.pool.pages_of(slot, 0, count)}
        for page in [page for page in self.tree if page not in used]:
            del self.tree[page]
            self.pool.free([page])
            seen["evicted pages"] += 1

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
        released = self.pool.shrink(keep)
        assert released == before - self.pool.pages.num_backed
        seen["released pages"] += released

    @rule(limit=st.sampled_from((16, 16, 16, 8, 3, 0)))
    def limit(self, limit: int) -> None:
        self.pool.pages.limit_pages = limit

    @precondition(lambda self: bool(self.tree))
    @rule()
    def flush(self) -> None:
        seen["flush"] += 1
        self.pool.reset()
        self.tokens, self.shared, self.tree = {}, {}, {}

    @invariant()
    def rows_show_what_was_written(self) -> None:
        seen["steps"] += 1
        for slot, tokens in getattr(self, "tokens", {}).items():
            shown = min(len(tokens), int(self.pool.num_synced[slot]) * PAGE_TOKENS)
            assert read_tokens(self.pool, slot, shown) == tokens[:shown]
            seen["tokens read"] += shown

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
    """4 000 stories of up to 80 calls, others each time; a failure is kept and shown as the shortest story."""
    before = seen.copy()
    run(max_examples=4000, stateful_step_count=80)
    happened = seen - before
    assert happened["steps"] >= 200_000
    events = ("hit pages", "dedup pages", "retract", "evicted pages", "released pages", "tokens read")
    for event in (*events, "mapped ahead"):
        assert happened[event] > 200, f"{event} hardly happens: {happened}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200_000, help="until so many are done (%(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="or so long (%(default)s)")
    options = parser.parse_args()
    begin = time.monotonic()
    while seen["steps"] < options.steps and time.monotonic() - begin < options.seconds:
        # Hypothesis remembers what it has tried: in pieces it stays small.
        run(max_examples=500, stateful_step_count=80, database=None)
        memory_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(f"{time.monotonic() - begin:.0f} s, {memory_mib} MiB: {dict(seen)}", flush=True)


if __name__ == "__main__":
    main()
