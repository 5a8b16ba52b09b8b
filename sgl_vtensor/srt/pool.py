"""SGLang's KV pool over our pages: its K and V buffers are strided views of the home range."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.runtime_context import get_schedule

from sgl_vtensor.config import format_bytes
from sgl_vtensor.core.layout import plan_layout
from sgl_vtensor.core.pages import Pages
from sgl_vtensor.errors import ConfigError
from sgl_vtensor.srt.flags import active_config
from sgl_vtensor.vmm import open_driver

GIB = 1 << 30
OTHERS_BYTES = 4 * GIB
"""What is in use before a server has loaded anything, and more than its own context and communicators take."""

logger = logging.getLogger(__name__)


class VTensorKVPool(MHATokenToKVPool):
    """Slots, buffers and writers are SGLang's; only the memory under them is ours.

    ``k_buffer[layer]`` is ``[size + page_size, kv_heads, head_dim]`` with the token stride as its first stride, which
    SGLang's own writers accept. A slot may be touched once the allocator has handed out its page.
    """

    pages: Pages

    def _create_buffers(self) -> None:
        if self.is_quantized_kv_cache:
            raise ConfigError(
                "quantized KV caches other than fp8 do not work with --enable-vtensor; drop one of the two"
            )
        if self.size % self.page_size:
            raise ConfigError(f"{self.size} tokens are not whole pages of {self.page_size}; please report this")
        on_cuda = torch.device(self.device).type == "cuda"
        driver = open_driver("cuda" if on_cuda else "host", device_index=torch.cuda.current_device() if on_cuda else 0)
        layout = plan_layout(
            num_layers=self.layer_num,
            num_kv_heads=self.head_num,
            head_dim=self.head_dim,
            v_head_dim=self.v_head_dim,
            itemsize=self.store_dtype.itemsize,
            granule_bytes=driver.granularity,
            page_tokens=self.page_size,
        )
        self.pages = Pages(driver, layout, self.size // self.page_size)
        views = [self.pages.home_views(layer, self.store_dtype) for layer in range(self.layer_num)]
        self.k_buffer = [k for k, _ in views]
        self.v_buffer = [v for _, v in views]
        self.k_scale_buffer = self.v_scale_buffer = None
        self.native_k_scale_buffer = self.native_v_scale_buffer = None
        self.dq_k_buffer = self.dq_v_buffer = None
        self._kv_buffer_descs = self._build_kv_buffer_descs()
        self._init_data_ptrs_and_strides()

    def _clear_buffers(self) -> None:
        self.k_buffer = self.v_buffer = None

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """What the pool may take when it is full. Pages are backed as they are used."""
        total = (self.pages.num_pages + 1) * self.pages.layout.page_bytes
        return total // 2, total - total // 2

    def _finalize_allocation_log(self, num_tokens: int) -> None:
        """Nothing is allocated yet: the line is said once all is known (``Runtime.describe``)."""
        self.mem_usage = sum(self.get_kv_size_bytes()) / GIB


def kv_pool_class(original: Callable[..., Any], platform: Any, *, kind: str) -> type | None:
    """Hook: the pool class of a CUDA server with ``--enable-vtensor``."""
    if active_config() is None or kind != "mha":
        # SGLang asks for every kind; ``runtime.attach`` stops a server that then builds one that is not ours.
        pool_class: type | None = original(platform, kind=kind)
        return pool_class
    return VTensorKVPool


def padded_cell_size(cell_size: int, configurator: Any, kvc: Any, num_layers: int) -> int | None:
    """Hook: SGLang's bytes a token, with our padding, so that its memory budget is true."""
    config = active_config()
    if config is None:
        return None
    from sgl_vtensor.srt.flags import granule_bytes, layout_of

    layout = layout_of(kvc.server_args, config, granule_bytes=granule_bytes(kvc.device))
    return -(-cell_size * layout.token_stride_bytes // layout.token_bytes)


def pool_budget(original: Callable[..., int], configurator: Any, pre_model_load_memory: float) -> int:
    """Hook: how much the pool can hold, in bytes, as if this server were alone on its GPU.

    SGLang counts from the memory that is free when a server starts. Ours takes none of it yet, and what a neighbour has
    now it may give back: a pool that was made while a neighbour's cache was full would be small for ever.
    """
    budget = original(configurator, pre_model_load_memory)
    if active_config() is None or torch.device(configurator.device).type != "cuda":
        return budget
    if torch.cuda.get_device_properties(configurator.gpu_id).is_integrated:
        return budget  # its memory is the system's, and what is in use there is not given back
    total_bytes = torch.cuda.mem_get_info(configurator.gpu_id)[1]
    # The free memory is the least of all ranks', so that ranks on GPUs of a kind come to the same.
    others_bytes = total_bytes - int(pre_model_load_memory * GIB)
    if others_bytes < OTHERS_BYTES:
        return budget
    logger.info(
        "vTensor memory: other processes have %s of the GPU; the pool can grow into what they give back",
        format_bytes(others_bytes),
    )
    return budget + int(get_schedule().mem_fraction_static * others_bytes)
