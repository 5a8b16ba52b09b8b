"""``cuda.bindings.driver`` without a GPU: the calls of ``CudaDriver``, as tables that refuse what CUDA refuses."""

from __future__ import annotations

import ctypes
from typing import Any

from cuda.bindings import driver as real  # type: ignore[import-untyped, import-not-found, unused-ignore]

GRANULE = 2 << 20
OK = real.CUresult.CUDA_SUCCESS
INVALID = real.CUresult.CUDA_ERROR_INVALID_VALUE
CONTEXT = 77


class FakeCuda:
    """One device. What is no function of the driver API comes from the real module.

    Attributes:
        mappings: address -> [bytes, native handle, access: None until it is set].
        contexts: the thread's stack.
    """

    def __init__(self) -> None:
        self.reservations: dict[int, int] = {}
        self.allocations: dict[int, int] = {}
        self.mappings: dict[int, list[Any]] = {}
        self.contents: dict[int, bytes] = {}
        self.contexts: list[int] = []
        self.retained = 0
        self._next_address, self._next_handle = 1 << 40, 1

    def __getattr__(self, name: str) -> Any:
        return getattr(real, name)

    @property
    def left(self) -> tuple[int, int, int, int, int]:
        """What has not been given back; a context that was made current stays so."""
        pushed = len(self.contexts[1:])
        return len(self.reservations), len(self.allocations), len(self.mappings), self.retained, pushed

    def cuInit(self, flags: int) -> tuple[Any]:
        return (OK,)

    def cuGetErrorName(self, code: Any) -> tuple[Any, bytes]:
        return OK, code.name.encode()

    def cuDeviceGet(self, index: int) -> tuple[Any, int]:
        return OK, index

    def cuMemGetAllocationGranularity(self, properties: Any, option: Any) -> tuple[Any, int]:
        return OK, GRANULE

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, int]:
        self.retained += 1
        return OK, CONTEXT

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[Any]:
        self.retained -= 1
        return (OK,)

    def cuCtxGetCurrent(self) -> tuple[Any, int]:
        return OK, self.contexts[-1] if self.contexts else 0

    def cuCtxSetCurrent(self, context: int) -> tuple[Any]:
        self.contexts[-1:] = [context]
        return (OK,)

    def cuCtxPushCurrent(self, context: int) -> tuple[Any]:
        self.contexts.append(context)
        return (OK,)

    def cuCtxPopCurrent(self) -> tuple[Any, int]:
        return OK, self.contexts.pop()

    def cuCtxSynchronize(self) -> tuple[Any]:
        return (OK,)

    def cuMemGetInfo(self) -> tuple[Any, int, int]:
        return OK, 1 << 30, 2 << 30

    def cuMemAddressReserve(self, num_bytes: int, alignment: int, address: int, flags: int) -> tuple[Any, int]:
        start, self._next_address = self._next_address, self._next_address + num_bytes + GRANULE
        self.reservations[start] = num_bytes
        return OK, start

    def cuMemAddressFree(self, address: int, num_bytes: int) -> tuple[Any]:
        inside = any(address <= at < address + num_bytes for at in self.mappings)
        if self.reservations.get(address) != num_bytes or inside:
            return (INVALID,)
        del self.reservations[address]
        return (OK,)

    def cuMemCreate(self, num_bytes: int, properties: Any, flags: int) -> tuple[Any, int]:
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        self.allocations[handle] = num_bytes
        return OK, handle

    def cuMemRelease(self, handle: int) -> tuple[Any]:
        return (OK if self.allocations.pop(handle, None) else INVALID,)

    def cuMemMap(self, address: int, num_bytes: int, offset: int, handle: int, flags: int) -> tuple[Any]:
        if address in self.mappings or self.allocations.get(handle) != num_bytes or offset:
            return (INVALID,)
        self.mappings[address] = [num_bytes, handle, None]
        return (OK,)

    def cuMemSetAccess(self, address: int, num_bytes: int, access: list[Any], count: int) -> tuple[Any]:
        if address not in self.mappings:
            return (INVALID,)
        self.mappings[address][2] = access[0].flags
        return (OK,)

    def cuMemUnmap(self, address: int, num_bytes: int) -> tuple[Any]:
        found = self.mappings.get(address)
        if found is None or found[0] != num_bytes:
            return (INVALID,)
        del self.mappings[address]
        return (OK,)

    def cuMemcpyHtoD(self, to: int, source: int, num_bytes: int) -> tuple[Any]:
        _, handle, access = self.mappings[to]
        if access != real.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE:
            return (INVALID,)
        self.contents[handle] = ctypes.string_at(source, num_bytes)
        return (OK,)

    def cuMemcpyDtoH(self, to: int, source: int, num_bytes: int) -> tuple[Any]:
        _, handle, access = self.mappings[source]
        if access is None:
            return (INVALID,)
        ctypes.memmove(to, self.contents[handle], num_bytes)
        return (OK,)
