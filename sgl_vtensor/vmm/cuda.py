"""The CUDA driver: the contract kept by ``cuMem*``, through ``cuda.bindings``.

Source: CUDA Driver API, "Virtual Memory Management"; CUDA programming guide, the chapter of that name. Measured and
found by trying (docs of the project): one allocation is one mapping unit, for a mapping at an offset inside one is
refused with CUDA_ERROR_NOT_SUPPORTED; no call waits for a running kernel; cost is per mapping, not per byte.
"""

from __future__ import annotations

import ctypes
import threading
from contextlib import ExitStack
from typing import Any

import torch
from cuda.bindings import driver  # type: ignore[import-untyped, import-not-found, unused-ignore]

from sgl_vtensor.errors import DriverError, OutOfMemory
from sgl_vtensor.vmm.base import Allocation, DriverBase, Mapping, Reservation

_REMEDIES = {
    "CUDA_ERROR_OUT_OF_MEMORY": "the device has not that much left; release memory or lower the limit, then try again.",
    "CUDA_ERROR_INVALID_VALUE": "an address or size was wrong, or somebody else uses the range.",
    "CUDA_ERROR_INVALID_DEVICE": "there is no such device; check CUDA_VISIBLE_DEVICES.",
    "CUDA_ERROR_NO_DEVICE": "there is no NVIDIA GPU here; use the host driver.",
    "CUDA_ERROR_NOT_SUPPORTED": "this device or operating system has no virtual memory management.",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "a kernel touched unmapped memory earlier; restart the process.",
    "CUDA_ERROR_DEINITIALIZED": "the process is shutting down.",
}


def _error(call: str, code: Any) -> DriverError:
    _, raw_name = driver.cuGetErrorName(code)
    name = raw_name.decode() if raw_name else str(code)
    remedy = _REMEDIES.get(name, "see CUresult in the CUDA Driver API reference.")
    kind = OutOfMemory if name == "CUDA_ERROR_OUT_OF_MEMORY" else DriverError
    return kind(call, name, remedy)


class _ThreadState(threading.local):
    has_context = False


class CudaDriver(DriverBase):
    """Virtual memory of one NVIDIA GPU.

    Args:
        device_index: the device's number in this process, as in ``cuda:0``.

    Raises:
        DriverError: there is no such device, or it has no virtual memory management.
        OutOfMemory: not even one granule is free.
    """

    name = "cuda"

    def __init__(self, device_index: int) -> None:
        try:
            _check("cuInit", driver.cuInit(0))
        except RuntimeError as error:  # cuda.pathfinder's DynamicLibNotFoundError: libcuda itself is missing
            remedy = "install the NVIDIA driver, or use the host driver."
            raise DriverError("cuInit", "LIBCUDA_NOT_FOUND", remedy) from error
        self._cu_device = _check("cuDeviceGet", driver.cuDeviceGet(device_index))

        # Built once: making these objects costs as much as a cuMemMap.
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._properties.location.id = device_index
        access = driver.CUmemAccess_flags
        self._read_write = [self._access(device_index, access.CU_MEM_ACCESS_FLAGS_PROT_READWRITE)]
        self._read_only = [self._access(device_index, access.CU_MEM_ACCESS_FLAGS_PROT_READ)]

        minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        granularity = _check(
            "cuMemGetAllocationGranularity", driver.cuMemGetAllocationGranularity(self._properties, minimum)
        )
        super().__init__(granularity=int(granularity), device=torch.device("cuda", device_index))

        # The primary context is the one that torch and the CUDA runtime use.
        self._context = _check("cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(self._cu_device))
        self._thread = _ThreadState()
        try:
            self.read_only_supported = self._probe_read_only()
        except DriverError:
            self._close()
            raise
        if not self.read_only_supported:
            self._read_only = self._read_write

    @staticmethod
    def _access(device_index: int, flags: Any) -> Any:
        access = driver.CUmemAccessDesc()
        access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = device_index
        access.flags = flags
        return access

    def _bind(self) -> None:
        """Give this thread a context if it has none (a mapper thread has none at first).

        A context that is there stays: replacing it would change ``torch.cuda.current_device()`` behind the caller.
        """
        if not self._thread.has_context:
            if not int(_check("cuCtxGetCurrent", driver.cuCtxGetCurrent())):
                _check("cuCtxSetCurrent", driver.cuCtxSetCurrent(self._context))
            self._thread.has_context = True

    def _reserve(self, num_bytes: int) -> int:
        self._bind()
        return int(_check("cuMemAddressReserve", driver.cuMemAddressReserve(num_bytes, self.granularity, 0, 0)))

    def _free_reservation(self, reservation: Reservation) -> None:
        self._bind()
        num_bytes = reservation.end - reservation.start
        _check("cuMemAddressFree", driver.cuMemAddressFree(reservation.start, num_bytes))

    def _create(self, num_bytes: int) -> int:
        self._bind()
        code, handle = driver.cuMemCreate(num_bytes, self._properties, 0)
        if code:
            raise _error("cuMemCreate", code)
        return int(handle)

    def _release(self, allocation: Allocation) -> None:
        self._bind()
        (code,) = driver.cuMemRelease(allocation.native)
        if code:
            raise _error("cuMemRelease", code)

    def _map(self, address: int, allocation: Allocation, reservation: Reservation, writable: bool) -> None:
        self._bind()
        num_bytes = allocation.num_bytes
        (code,) = driver.cuMemMap(address, num_bytes, 0, allocation.native, 0)
        if code:
            raise _error("cuMemMap", code)
        (code,) = driver.cuMemSetAccess(address, num_bytes, self._read_write if writable else self._read_only, 1)
        if code:
            # A mapping without access faults like unmapped space, but would block the address for ever.
            driver.cuMemUnmap(address, num_bytes)
            raise _error("cuMemSetAccess", code)

    def _unmap(self, address: int, mapping: Mapping) -> None:
        self._bind()
        (code,) = driver.cuMemUnmap(address, mapping.allocation.num_bytes)
        if code:
            raise _error("cuMemUnmap", code)

    def _tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        # Not __cuda_array_interface__: torch asks the CUDA runtime there which device the pointer belongs to, and of
        # an unmapped address the runtime knows nothing.
        storage = torch._C._construct_storage_from_data_pointer(address, self.device, num_bytes)
        return torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage, 0, (num_bytes,), (1,))

    def _memory_info(self) -> tuple[int, int]:
        # cuMemGetInfo speaks of the current context's device, which may be another one than ours.
        _check("cuCtxPushCurrent", driver.cuCtxPushCurrent(self._context))
        try:
            code, free, total = driver.cuMemGetInfo()
        finally:
            driver.cuCtxPopCurrent()
        if code:
            raise _error("cuMemGetInfo", code)
        return int(free), int(total)

    def _close(self) -> None:
        driver.cuDevicePrimaryCtxRelease(self._cu_device)

    def _probe_read_only(self) -> bool:
        """Write one granule through one mapping, read it through a read-only one.

        Some drivers refuse PROT_READ for device memory. Whether a write would fault cannot be tried here: the fault
        would end the context for torch, too.
        """
        written = ctypes.create_string_buffer(b"\x5a" * 64, 64)
        read = ctypes.create_string_buffer(64)
        self._bind()
        with ExitStack() as undo:
            # The copies go to the current context's device, which may be another one than ours.
            _check("cuCtxPushCurrent", driver.cuCtxPushCurrent(self._context))
            undo.callback(driver.cuCtxPopCurrent)
            start = self._reserve(2 * self.granularity)
            reservation = Reservation(start, start + 2 * self.granularity)
            undo.callback(self._free_reservation, reservation)
            allocation = Allocation(self._create(self.granularity), self.granularity)
            undo.callback(self._release, allocation)
            self._map(start, allocation, reservation, writable=True)
            undo.callback(self._unmap, start, Mapping(allocation, reservation))
            alias = start + self.granularity
            try:
                self._map(alias, allocation, reservation, writable=False)
            except OutOfMemory:
                raise
            except DriverError:
                return False
            undo.callback(self._unmap, alias, Mapping(allocation, reservation))
            _check("cuMemcpyHtoD", driver.cuMemcpyHtoD(start, ctypes.addressof(written), 64))
            _check("cuCtxSynchronize", driver.cuCtxSynchronize())
            _check("cuMemcpyDtoH", driver.cuMemcpyDtoH(ctypes.addressof(read), alias, 64))
            return read.raw == written.raw


def _check(call: str, result: tuple[Any, ...]) -> Any:
    """The value of a result, or its error raised. The hot calls look at their result themselves."""
    code, *values = result
    if code:
        raise _error(call, code)
    return values[0] if values else None
