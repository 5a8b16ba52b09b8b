"""Each call of each driver to its system fails once: the driver's tables stay those of the system, and it goes on.

CUDA is a stand-in here, so that this runs anywhere; ``tests/gpu/test_out_of_memory.py`` fills a real one.
"""

from __future__ import annotations

import ast
import ctypes
import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sgl_vtensor.errors import DriverError, OutOfMemory
from sgl_vtensor.vmm import host
from sgl_vtensor.vmm.base import DriverBase

SITES = {"cuda": r"driver", "host": r"_libc()"}


class Failing:
    """A module or library whose ``number``-th call fails; it has the calls noted, by name and by line of ``path``."""

    def __init__(self, inner: Any, path: Path, number: int | None, fail: Callable[[str], Any]) -> None:
        self.inner, self.path, self.number, self.fail = inner, str(path), number, fail
        self.names: list[str] = []
        self.lines: set[int] = set()
        self.failed: str | None = None

    def __getattr__(self, name: str) -> Any:
        found, frame = getattr(self.inner, name), sys._getframe(1)
        if name.startswith("CU"):
            return found
        assert frame.f_code.co_filename == self.path
        self.lines.add(frame.f_lineno)
        return partial(self._call, name, found)

    def _call(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        self.names.append(name)
        if len(self.names) == self.number:
            self.failed = name
            return self.fail(name)
        return call(*arguments)


class System:
    """One of the two systems under its driver, failing at one call."""

    def __init__(self, name: str, patch: pytest.MonkeyPatch, number: int | None, *, out_of_memory: bool) -> None:
        self.name = name
        self.error = OutOfMemory if out_of_memory else DriverError
        if name == "host":
            code = errno.ENOMEM if out_of_memory else errno.EINVAL

            def fail(call: str) -> Any:
                ctypes.set_errno(code)
                return host._MAP_FAILED if call == "mmap" else -1

            self.calls = Failing(host._libc(), Path(host.__file__), number, fail)
            patch.setattr(host, "_libc", lambda: self.calls)
            self.open: Callable[[], DriverBase] = lambda: host.HostDriver(1 << 20)
        else:
            cuda, fake = import_module("sgl_vtensor.vmm.cuda"), import_module("tests.vmm.fake_cuda")
            self.cuda = fake.FakeCuda()
            code = cuda.driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY if out_of_memory else fake.INVALID
            arity = {"cuMemGetInfo": 3}
            one = ("Map", "SetAccess", "Unmap", "Release", "AddressFree", "SetCurrent", "PushCurrent", "Synchronize")

            def refuse(call: str) -> Any:
                return (code,) if call.endswith(one) else (code, *[None] * (arity.get(call, 2) - 1))

            self.calls = Failing(self.cuda, Path(cuda.__file__ or ""), number, refuse)
            patch.setattr(cuda, "driver", self.calls)
            self.open = lambda: cuda.CudaDriver(0)
        self._lost: set[int] = set()

    def opened(self) -> None:
        """A driver that could not undo its own trial has raised; what it lost is no fault of the next one."""
        if self.name == "cuda":
            self._lost = {*self.cuda.mappings, *self.cuda.allocations, *self.cuda.reservations}

    def check(self, driver: DriverBase) -> None:
        """The driver knows what the system has."""
        if self.name == "host":
            assert driver._num_regions <= 1 + 2 * driver.num_mappings + driver.num_reservations  # type: ignore[attr-defined]
            return
        cuda, lost = self.cuda, self._lost
        mapped = {at: mapping.allocation.native for at, mapping in driver._mappings.items()}
        assert mapped == {at: handle for at, (_, handle, _) in cuda.mappings.items() if at not in lost}
        assert all(access is not None for _, _, access in cuda.mappings.values()), "mapped, but not accessible"
        natives = {allocation.native for allocation in driver._allocations.values()}
        assert natives == cuda.allocations.keys() - lost
        assert {*driver._reservation_starts} == cuda.reservations.keys() - lost


def tell(system: System) -> list[type[DriverError]]:
    """Every call of the contract, each again where it was refused; returns what it was refused with."""
    refused: list[type[DriverError]] = []

    def take(step: Callable[[], Any], driver: DriverBase | None = None) -> Any:
        try:
            return step()
        except DriverError as error:
            refused.append(type(error))
            if driver is not None:
                system.check(driver)
            return step()

    driver = take(system.open)
    system.opened()
    size = driver.granularity
    base = take(lambda: driver.reserve(3 * size), driver)
    handle = take(lambda: driver.create(size), driver)
    take(lambda: driver.map(base, handle, size, writable=True), driver)
    take(lambda: driver.map(base + 2 * size, handle, size, writable=False), driver)
    take(driver.memory_info, driver)
    take(lambda: driver.unmap(base, size), driver)
    take(lambda: driver.release(handle), driver)
    take(lambda: driver.unmap(base + 2 * size, size), driver)
    take(lambda: driver.free_reservation(base, 3 * size), driver)
    base, handle = take(lambda: driver.reserve(size), driver), take(lambda: driver.create(size), driver)
    take(lambda: driver.map(base, handle, size, writable=True), driver)
    system.check(driver)
    driver.close()
    return refused


def names_of_calls(name: str) -> list[str]:
    if name == "cuda" and find_spec("cuda") is None:
        return []
    with pytest.MonkeyPatch.context() as patch:
        system = System(name, patch, None, out_of_memory=False)
        assert tell(system) == []
        return system.calls.names


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "number" in metafunc.fixturenames:
        cases = [(name, number, call) for name in SITES for number, call in enumerate(names_of_calls(name), 1)]
        metafunc.parametrize(("name", "number", "call"), cases, ids=[f"{n}-{i}-{call}" for n, i, call in cases])


NOBODY_IS_TOLD = ("cuCtxPopCurrent", "cuDevicePrimaryCtxRelease")
"""There is nothing that a caller could do about it."""


@pytest.mark.parametrize("out_of_memory", [True, False], ids=["memory", "other"])
def test_any_call_to_the_system_may_fail_once(
    name: str, number: int, call: str, out_of_memory: bool, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    system = System(name, monkeypatch, number, out_of_memory=out_of_memory)
    refused = tell(system)
    assert system.calls.failed == call
    told = bool(refused) or "calls failed while closing" in caplog.text or "until they are reused" in caplog.text
    probing = name == "cuda" and call in ("cuMemMap", "cuMemSetAccess") and not out_of_memory  # read-only: a question
    assert told or probing or call in NOBODY_IS_TOLD
    # Where undoing is refused, it goes on, and the last error of it is told.
    assert refused in ([], [system.error], [DriverError] if call == "cuMemUnmap" else [])
    if name == "cuda" and not call.startswith(("cuMemUnmap", "cuMemRelease", "cuMemAddressFree", *NOBODY_IS_TOLD)):
        assert system.cuda.left == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("name", SITES)
def test_every_call_to_the_system_was_made_to_fail(name: str) -> None:
    """Whoever adds a call adds it to the story: sites are counted in the source and in the runs."""
    calls = names_of_calls(name)
    if not calls:
        pytest.skip("cuda-python is not installed")
    reached: set[int] = set()
    for number in range(1, len(calls) + 1):
        with pytest.MonkeyPatch.context() as patch:
            system = System(name, patch, number, out_of_memory=True)
            tell(system)
            reached |= system.calls.lines
    assert reached == set(sites(Path(system.calls.path), SITES[name]))


def sites(path: Path, receiver: str) -> Iterator[int]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and not node.attr.startswith("CU") and ast.unparse(node.value) == receiver:
            yield node.lineno


def test_an_interrupted_fallocate_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(call: str) -> int:
        ctypes.set_errno(errno.EINTR)
        return -1

    calls = Failing(host._libc(), Path(host.__file__), 1, interrupt)
    monkeypatch.setattr(host, "_libc", lambda: calls)
    with host.HostDriver(1 << 20) as driver:
        driver.release(driver.create(driver.granularity))
    assert calls.names[:2] == ["fallocate", "fallocate"] and calls.failed == "fallocate"


def test_a_system_without_memfd_is_a_driver_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(DriverError, match="memfd_create failed with EMFILE"), suppress(OutOfMemory):
        host.HostDriver()
