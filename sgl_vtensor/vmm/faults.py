"""A driver that fails where it is told to, for tests and for trying out recovery on a live server."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from sgl_vtensor.errors import DriverError, OutOfMemory
from sgl_vtensor.vmm.base import CALL_KINDS
from sgl_vtensor.vmm.driver import VmmDriver
from sgl_vtensor.vmm.proxy import DriverProxy

FAULT_KINDS = (*CALL_KINDS, "memory_info")


class Call(NamedTuple):
    """One call as a predicate sees it: its method name, its number among those of that name (from 1), its arguments."""

    kind: str
    number: int
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """Fail calls of ``kind`` (a method name such as ``"create"``; ``"*"``: any of them).

    Attributes:
        when: the number of the call to fail, counted from 1 since the driver was wrapped (``"*"``: among all calls);
            or a predicate, asked at every call of that kind.
        error: ``OutOfMemory`` or ``DriverError``.
    """

    kind: str
    when: int | Callable[[Call], bool]
    error: type[DriverError] = OutOfMemory

    def __post_init__(self) -> None:
        if self.kind != "*" and self.kind not in FAULT_KINDS:
            raise ValueError(f"no calls of kind {self.kind!r}; the kinds are {', '.join(FAULT_KINDS)} and *")


class FaultyDriver(DriverProxy):
    """Raises what ``plan`` asks for before ``inner`` is reached, and leaves everything else to ``inner``.

    Attributes:
        plan: the faults; a list, which may be changed between calls.
        attempts: calls so far by kind, failed ones included (``"*"``: all of them).
    """

    def __init__(self, inner: VmmDriver, plan: Iterable[Fault] = ()) -> None:
        super().__init__(inner)
        self.plan = list(plan)
        self.attempts: dict[str, int] = dict.fromkeys((*FAULT_KINDS, "*"), 0)

    def reserve(self, num_bytes: int) -> int:
        self._maybe_fail("reserve", num_bytes=num_bytes)
        return super().reserve(num_bytes)

    def free_reservation(self, address: int, num_bytes: int) -> None:
        self._maybe_fail("free_reservation", address=address, num_bytes=num_bytes)
        super().free_reservation(address, num_bytes)

    def create(self, num_bytes: int) -> int:
        self._maybe_fail("create", num_bytes=num_bytes)
        return super().create(num_bytes)

    def release(self, handle: int) -> None:
        self._maybe_fail("release", handle=handle)
        super().release(handle)

    def map(self, address: int, handle: int, num_bytes: int, *, writable: bool) -> None:
        self._maybe_fail("map", address=address, handle=handle, num_bytes=num_bytes, writable=writable)
        super().map(address, handle, num_bytes, writable=writable)

    def unmap(self, address: int, num_bytes: int) -> None:
        self._maybe_fail("unmap", address=address, num_bytes=num_bytes)
        super().unmap(address, num_bytes)

    def memory_info(self) -> tuple[int, int]:
        self._maybe_fail("memory_info")
        return super().memory_info()

    def _maybe_fail(self, kind: str, **arguments: Any) -> None:
        self.attempts[kind] += 1
        self.attempts["*"] += 1
        for fault in self.plan:
            if fault.kind not in (kind, "*"):
                continue
            number = self.attempts[fault.kind]
            hit = fault.when == number if isinstance(fault.when, int) else fault.when(Call(kind, number, arguments))
            if hit:
                if kind in self.errors:  # a look is not counted
                    self.errors[kind] += 1
                raise fault.error(kind, "INJECTED", f"call {number} of kind {fault.kind!r} fails by plan.")
