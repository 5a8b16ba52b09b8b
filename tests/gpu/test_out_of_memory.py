"""A GPU that is really full: what is refused changes nothing, and what is freed can be had again."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sgl_vtensor.core.layout import plan_layout
from sgl_vtensor.core.pages import Pages
from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.errors import OutOfMemory
from sgl_vtensor.vmm import open_driver
from sgl_vtensor.vmm.driver import VmmDriver

pytestmark = pytest.mark.gpu
SLACK_BYTES = 96 << 20
"""So much is free at first; torch needs some of it for the kernels of the test itself."""


@pytest.fixture
def driver() -> Iterator[VmmDriver]:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    with open_driver("cuda") as driver:
        # A full device has no room to load a kernel for the first time.
        assert torch.full((driver.granularity,), 7, dtype=torch.uint8, device="cuda").fill_(7).min().item() == 7
        yield driver
    gc.collect()
    torch.cuda.empty_cache()


def fill(driver: VmmDriver, leave_bytes: int) -> list[int]:
    """Take the device's memory but for about so much; returns the handles."""
    handles = []
    for num_bytes in (1 << 30, 64 << 20, driver.granularity):
        while driver.memory_info()[0] > leave_bytes + num_bytes:
            try:
                handles.append(driver.create(num_bytes))
            except OutOfMemory:
                break
    return handles


def test_a_full_device_refuses_and_takes_back(driver: VmmDriver) -> None:
    handles = fill(driver, 0)
    state = driver.num_handles, driver.physical_bytes
    with pytest.raises(OutOfMemory, match="CUDA_ERROR_OUT_OF_MEMORY"):
        for _ in range(10_000):
            handles.append(driver.create(driver.granularity))
            state = driver.num_handles, driver.physical_bytes
    assert (driver.num_handles, driver.physical_bytes) == state
    driver.release(handles.pop())
    base = driver.reserve(driver.granularity)
    handle = driver.create(driver.granularity)
    driver.map(base, handle, driver.granularity, writable=True)
    driver.tensor(base, driver.granularity).fill_(7)
    assert driver.tensor(base, driver.granularity).min().item() == 7


def test_requests_wait_while_the_device_is_full_and_go_on_after(driver: VmmDriver) -> None:
    """Twelve times over: the pool takes what there is, is refused, loses nothing, and grows when memory is free."""
    layout = plan_layout(
        num_layers=1,
        num_kv_heads=8,
        head_dim=128,
        v_head_dim=128,
        itemsize=2,
        granule_bytes=driver.granularity,
        page_tokens=512,
    )
    size = layout.page_tokens
    pool = VTensorPool(Pages(driver, layout, 4096), num_slots=2, max_len_tokens=256 * size)
    k, _ = pool.pages.home_views(0, torch.bfloat16)
    row_k, _ = pool.row_views(0, torch.bfloat16)
    torch.cuda.synchronize()
    for number in range(12):
        held = fill(driver, SLACK_BYTES)
        pool.open(1, [], size)
        num_tokens = 0
        while pool.grow([1], [num_tokens + size]):
            num_tokens += size
            assert num_tokens < 256 * size, "the device was never full"
        assert num_tokens > 0
        before = pool.stats()
        assert not pool.grow([1], [num_tokens + size]) and not pool.secure(1)
        after = pool.stats()
        assert (before.pages_in_use, before.pages_backed) == (after.pages_in_use, after.pages_backed)
        for handle in held[len(held) // 2 :]:
            driver.release(handle)
        assert pool.grow([1], [num_tokens + size]), "memory is there again"
        num_tokens += size
        pool.ensure([1])
        at = np.arange(num_tokens)
        slots = pool.wanted[1, at // size].astype(np.int64) * size + at % size
        marks = torch.arange(num_tokens, device="cuda") % 251 + number
        k[torch.from_numpy(slots).cuda()] = marks.to(torch.bfloat16)[:, None, None]
        shown = row_k[int(pool.row_of_slot[1]), :num_tokens, 0, 0]
        assert torch.equal(shown, marks.to(torch.bfloat16))
        torch.cuda.synchronize()
        pool.free(pool.pages_of(1, 0, num_tokens // size))
        pool.close(1)
        pool.launch(None)
        pool.shrink(0)
        assert pool.pages.num_backed == 0
        for handle in held[: len(held) // 2]:
            driver.release(handle)
    pool.shutdown()
    assert (driver.physical_bytes, driver.num_mappings) == (0, 0)
