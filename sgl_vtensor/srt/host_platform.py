"""The platform class; apart from ``platform``, so that asking whether it applies imports nothing of SGLang."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


class HostPlatform(CpuDeviceMixin, SRTPlatform):
    """Native torch operators: no CUDA, no AMX, no CPU build of sgl_kernel."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def init_backend(self) -> None:
        """A torch that was built for CUDA names it as the machine's device although there is none.

        SGLang would synchronise with it, for instance in ``/release_memory_occupation``, and end there.
        """
        module_of = torch.get_device_module

        @functools.cache  # as the original: torch.compile looks at its ``__wrapped__``
        def get_device_module(device: torch.device | str | None = None) -> ModuleType:
            found: ModuleType = module_of("cpu" if device is None else device)
            return found

        torch.get_device_module = get_device_module

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        from sgl_vtensor.srt.pool import kv_pool_class

        return kv_pool_class(lambda platform, kind: None, self, kind=kind)

    def get_paged_allocator_cls(self) -> type | None:
        from sgl_vtensor.srt.allocator import paged_allocator_class

        return paged_allocator_class(lambda platform: None, self)
