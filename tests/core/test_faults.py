"""Every driver call of the core fails once: the tables hold, the error is typed, and the same step works afterwards."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sgl_vtensor.core.checks import check_tables
from sgl_vtensor.core.pages import Pages
from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.errors import DriverError, OutOfMemory
from sgl_vtensor.vmm.faults import FAULT_KINDS, Call, Fault, FaultyDriver
from sgl_vtensor.vmm.host import HostDriver
from tests.core.conftest import ManualFence, read_tokens, small_layout, write_tokens

CORE = Path(sys.modules[Pages.__module__].__file__ or "").parent


class Story:
    """A pool's life that makes every kind of driver call at every place in the core. Each step may be taken again."""

    def __init__(self, inner: HostDriver, plan: list[Fault]) -> None:
        self.inner = inner
        self.driver = FaultyDriver(inner, plan)
        self.tree: list[int] = []
        self.outcomes: list[type[DriverError] | bool] = []
        """Of the steps that were refused: what they raised, or False."""
        self.blind: list[DriverError] = []
        self.pages: Pages | None = None
        self.pool: VTensorPool | None = None

    def tell(self) -> Story:
        self.pages = pages = self.take(lambda: Pages(self.driver, small_layout(self.driver), 9))
        pages.on_blind = self.blind.append
        pages.margin_bytes = pages.layout.page_bytes
        self.pool = pool = self.take(
            lambda: VTensorPool(pages, num_slots=3, max_len_tokens=16, num_rows=4, max_mappings=4 + 7)
        )
        self.take(lambda: pool.prepare(2))
        assert pages.num_free_backed == 2
        for slot in (1, 2):
            self.request(slot, [], [1, 2, 3, 4, 5, 6, 7, 8, 9])
        pool.launch(ManualFence())
        self.tree = pool.pages_of(1, 0, 2)
        pool.adopt(2, 0, self.tree)
        self.request(3, self.tree, [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 14, 15])
        self.take(lambda: pool.secure(2))  # none but duplicates are left: they are mapped anew
        self.take(lambda: pool.ensure(np.array([1, 2, 3], dtype=np.int32)))
        assert read_tokens(pool, 2, 9) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
        pool.launch(ManualFence())
        for slot in (1, 2):
            pool.free(pool.pages_of(slot, 2, 3))
            pool.close(slot)
        pool.drain(in_flight=0)
        self.request(2, [], [21, 22, 23, 24, 25])  # takes a row that maps other pages, over the limit of mappings
        self.take(lambda: pool.shrink(0))
        pool.rows.max_mappings = None
        for waiting in (pool.pages_of(2, 0, 2), self.tree):  # the second in place of the first
            self.take(lambda waiting=waiting: pool.map_ahead([waiting], at_most=4))  # type: ignore[misc]
        self.request(1, self.tree, [1, 2, 3, 4, 5, 6, 7, 8, 31])
        assert read_tokens(pool, 3, 13) == [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 14, 15]
        pool.reset()
        self.tree = []
        self.take(pool.shutdown)
        left = self.inner.num_mappings, self.inner.physical_bytes, self.inner.num_handles, self.inner.num_reservations
        assert left == (0, 0, 0, 0)
        return self

    def request(self, slot: int, prefix: list[int], values: list[int]) -> None:
        pool = self.pool
        assert pool is not None
        pool.open(slot, prefix, len(values))
        self.take(lambda: pool.grow([slot], [len(values)]))
        self.take(lambda: pool.ensure(np.array([slot], dtype=np.int32)))
        start = len(prefix) * pool.layout.page_tokens
        write_tokens(pool, slot, start, values[start:])
        assert read_tokens(pool, slot, len(values)) == values

    def take(self, step: Callable[[], Any]) -> Any:
        """A step of the story; once more where the driver refused (False: no memory)."""
        before = len(self.driver.plan)
        try:
            result = step()
        except DriverError as error:
            assert error.code == "INJECTED"
            self.outcomes.append(type(error))
        else:
            if result is not False:
                return result
            assert before, "there is memory enough for this story"
            self.outcomes.append(False)
        self.check()
        self.driver.plan.clear()
        result = step()
        assert result is not False
        if self.pool is not None:
            self.check()
        return result

    def check(self) -> None:
        pool, pages = self.pool, self.pages
        if pool is None:
            left = (self.inner.num_mappings, self.inner.num_handles, self.inner.num_reservations)
            assert left == ((0, 0, 0) if pages is None else (1, 1, 1)), "a constructor left something behind"
        elif pages is not None and pages.backed[0] and pool.rows.num_mappings >= pool.rows.max_pages:
            own = [
                page
                for slot in np.flatnonzero(pool.row_of_slot).tolist()
                for page in pool.wanted[slot, : pool.num_wanted[slot]].tolist()
                if page not in self.tree
            ]
            check_tables(pool, self.inner, own + self.tree)


def tell(plan: list[Fault]) -> Story:
    with HostDriver(capacity_bytes=1 << 24) as inner:
        return Story(inner, plan).tell()


def calls_of_the_story() -> list[str]:
    kinds: list[str] = []

    def note(call: Call) -> bool:
        kinds.append(call.kind)
        return False

    tell([Fault("*", note)])
    return kinds


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "number" in metafunc.fixturenames:
        metafunc.parametrize(("number", "kind"), list(enumerate(calls_of_the_story(), 1)))


@pytest.mark.parametrize("error", [OutOfMemory, DriverError])
def test_any_call_may_fail_once(number: int, kind: str, error: type[DriverError]) -> None:
    """The n-th call fails, for each n: the story goes on to its end with the right bytes and nothing left over."""
    story = tell([Fault("*", number, error)])
    if kind == "memory_info":
        assert (len(story.blind), story.outcomes) == (1, []), "a look that fails is told, and costs nothing"
    elif kind not in ("create", "map"):  # these are tried again where duplicates can make way
        assert story.outcomes in ([error], [False]), "a refusal that nobody was told of"


@pytest.mark.parametrize("kind", FAULT_KINDS)
def test_a_kind_of_call_may_fail_until_the_fault_is_gone(kind: str) -> None:
    """From its first, second or third call on, until the step has been refused."""
    for first in (1, 2, 3):
        tell([Fault(kind, lambda call, first=first: call.number >= first, DriverError)])  # type: ignore[misc]


def test_the_story_makes_every_driver_call_in_the_core() -> None:
    """Whoever adds a call site adds it to the story: sites are counted in the source and in the run."""
    reached: set[tuple[str, int]] = set()

    def note(_: Call) -> bool:
        frame = sys._getframe()
        while frame.f_back is not None and not frame.f_code.co_filename.startswith(str(CORE)):
            frame = frame.f_back
        reached.add((Path(frame.f_code.co_filename).name, frame.f_lineno))
        return False

    tell([Fault("*", note)])
    sites = set(call_sites(CORE))
    assert reached == sites
    others = {name for name, _ in call_sites(CORE.parent)} - {name for name, _ in sites}
    assert others == {"doctor.py"}, "who calls the driver elsewhere needs a story of its own (tests/cli/test_doctor.py)"


def call_sites(folder: Path) -> Iterator[tuple[str, int]]:
    """``driver.map(...)`` and its like. Drivers' own calls to the system: ``tests/vmm/test_system_calls.py``."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in FAULT_KINDS
                and ast.unparse(node.func.value).endswith("driver")
            ):
                yield path.name, node.lineno


def test_parked_rows_give_their_mappings_before_a_mapping_is_refused() -> None:
    """Rows of launches under way give theirs too, after a wait, rather than stop the server."""
    with HostDriver(capacity_bytes=1 << 24) as inner:
        driver = FaultyDriver(inner)
        pool = VTensorPool(Pages(driver, small_layout(driver), 9), num_slots=2, max_len_tokens=16, num_rows=5)
        for slot in (1, 2):
            pool.open(slot, [], 8)
            assert pool.grow([slot], [8])
            pool.ensure(np.array([slot], dtype=np.int32))
        fence = ManualFence()
        pool.launch(fence)
        held = pool.pages_of(1, 0, 2)
        pool.close(1)
        pool.open(1, [], 4)
        assert pool.grow([1], [4])
        limit = inner.num_mappings
        driver.plan.append(Fault("map", lambda call: inner.num_mappings >= limit))
        pool.ensure(np.array([1], dtype=np.int32))
        assert fence.waited == 1 and inner.num_mappings <= limit
        check_tables(pool, inner, [*held, *pool.pages_of(2, 0, 2), *pool.pages_of(1, 0, 1)])
        driver.plan.clear()
        pool.shutdown()
