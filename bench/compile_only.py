"""A GPU that Triton compiles for and that runs nothing: launches of our kernels, on a machine that has none.

Arguments are tensors on ``meta``: they have shapes, strides and aligned addresses, and no memory. Not with
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "kernels")]
from vtensor_kernels import decode, prefill, prefill_hopper, tile  # noqa: E402

SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Most shared memory of one program, by capability (CUDA programming guide, technical specifications)."""
PROCESSORS = {80: 108, 89: 142, 90: 132, 100: 148, 120: 188}
"""Of an A100, an L40S, an H100, a B200 and an RTX PRO 6000."""
_KERNELS = [
    value
    for module in (decode, prefill, prefill_hopper)
    for value in vars(module).values()
    if isinstance(value, triton.runtime.JITFunction)
]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One variant of a kernel, as the device would load it."""

    kernel: str
    cpu_seconds: float
    registers: int
    stack_bytes: int
    """Of a thread; what does not fit into registers is spilled there."""
    shared_bytes: int
    num_warps: int


class _Driver:
    """What Triton asks of the driver under a launch."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.compiled: list[Compiled] = []
        self.begin = 0.0
        self.metadata: Any = None
        properties = {"max_shared_mem": SHARED_BYTES[capability]}
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda device: properties, load_binary=self._load, unload_module=lambda module: None
        )

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton keeps what it knows of a device by this number

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: object, metadata: Any) -> Callable[..., None]:
        self.metadata = metadata
        return lambda *arguments: None

    def _load(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[object, None, int, int, int]:
        """As the driver answers: module, function, registers, spilled words, most threads."""
        seconds = _cpu_seconds() - self.begin
        registers, stack_bytes = _resources(cubin)
        self.compiled.append(Compiled(name, seconds, registers, stack_bytes, shared, self.metadata.num_warps))
        return object(), None, registers, stack_bytes // 4, 1024


def _cpu_seconds() -> float:
    """Of this process and of ptxas, which it has waited for."""
    return sum(os.times()[:4])


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump names no registers: {text[:200]!r}")
    return int(found[1]), int(found[2])


@contextlib.contextmanager
def compile_only(capability: int) -> Iterator[list[Compiled]]:
    """Launches compile for this capability (90 = sm_90), raise what they would raise there, and run nothing.

    Yields what has been compiled so far. A launch raises ``triton.runtime.errors.OutOfResources`` where it asks for
    more shared memory than the device has.
    """
    device = _Driver(capability)

    def begin(**compilation: object) -> None:
        device.begin = _cpu_seconds()

    with _pretence(device, capability):
        triton.knobs.runtime.jit_cache_hook = begin
        try:
            yield device.compiled
        finally:
            for kernel in _KERNELS:
                kernel.device_caches.clear()


@contextlib.contextmanager
def count_variants(capability: int) -> Iterator[set[str]]:
    """Launches compile nothing; yields the variants that they would have compiled for, each named once."""
    asked: set[str] = set()

    def skip(*, key: str, **compilation: Any) -> bool:
        asked.add(f"{compilation['fn'].name} {key}")
        return True

    with _pretence(_Driver(capability), capability):
        triton.knobs.runtime.jit_cache_hook = skip
        yield asked


@contextlib.contextmanager
def _pretence(device: _Driver, capability: int) -> Iterator[None]:
    before = tile.capability, tile.processors
    tile.capability, tile.processors = lambda of: capability, lambda of: PROCESSORS[capability]
    triton.runtime.driver.set_active(device)
    try:
        yield
    finally:
        tile.capability, tile.processors = before
        triton.knobs.runtime.jit_cache_hook = None
