"""A driver that fails where it is told to, for tests and for trying out recovery on a live server."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sgl_vtensor.errors import DriverError, OutOfMemory
from sgl_vtensor.vmm.base import CALL_KINDS
from sgl_vtensor.vmm.driver import VmmDriver


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
        if self.kind != "*" and self.kind not in CALL_KINDS:
            raise ValueError(f"no calls of kind {self.kind!r}; the kinds are {', '.join(CALL_KINDS)} and *")


class FaultyDriver:
    """Raises what ``plan`` asks for before ``inner`` is reached, and leaves everything else to ``inner``.

    Attributes:
        plan: the faults; a list, which may be changed between calls.
        attempts: calls so far by kind, failed ones included (``"*"``: all of them).
    """

    def __init__(self, inner: VmmDriver, plan: Iterable[Fault] = ()) -> None:
        self.inner = inner
        self.plan = list(plan)
        self.attempts: dict[str, int] = dict.fromkeys((*CALL_KINDS, "*"), 0)
        self.name = inner.name
        self.granularity = inner.granularity
        self.device = inner.device
        self.read_only_supported = inner.read_only_supported
        self.max_mappings = inner.max_mappings
        self.calls = inner.calls
        self.seconds = inner.seconds
        self.errors = inner.errors
        self.histogram = inner.histogram

    @property
    def physical_bytes(self) -> int:
        return self.inner.physical_bytes

    @property
    def num_mappings(self) -> int:
        return self.inner.num_mappings

    @property
    def num_handles(self) -> int:
        return self.inner.num_handles

    @property
    def num_reservations(self) -> int:
        return self.inner.num_reservations

    def reserve(self, num_bytes: int) -> int:
        self._maybe_fail("reserve", num_bytes=num_bytes)
        return self.inner.reserve(num_bytes)

    def free_reservation(self, address: int, num_bytes: int) -> None:
        self._maybe_fail("free_reservation", address=address, num_bytes=num_bytes)
        self.inner.free_reservation(address, num_bytes)

    def create(self, num_bytes: int) -> int:
        self._maybe_fail("create", num_bytes=num_bytes)
        return self.inner.create(num_bytes)

    def release(self, handle: int) -> None:
        self._maybe_fail("release", handle=handle)
        self.inner.release(handle)

    def map(self, address: int, handle: int, num_bytes: int, *, writable: bool) -> None:
        self._maybe_fail("map", address=address, handle=handle, num_bytes=num_bytes, writable=writable)
        self.inner.map(address, handle, num_bytes, writable=writable)

    def unmap(self, address: int, num_bytes: int) -> None:
        self._maybe_fail("unmap", address=address, num_bytes=num_bytes)
        self.inner.unmap(address, num_bytes)

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        return self.inner.tensor(address, num_bytes)

    def memory_info(self) -> tuple[int, int]:
        return self.inner.memory_info()

    def close(self) -> None:
        self.inner.close()

    def _maybe_fail(self, kind: str, **arguments: Any) -> None:
        self.attempts[kind] += 1
        self.attempts["*"] += 1
        for fault in self.plan:
            if fault.kind not in (kind, "*"):
                continue
            number = self.attempts[fault.kind]
            hit = fault.when == number if isinstance(fault.when, int) else fault.when(Call(kind, number, arguments))
            if hit:
                self.errors[kind] += 1
                raise fault.error(kind, "INJECTED", f"call {number} of kind {fault.kind!r} fails by plan.")
