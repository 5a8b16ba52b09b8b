"""What a common beginning costs in physical memory, as the driver counts it: on the host, and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sgl_vtensor.core.layout import plan_layout
from sgl_vtensor.core.pages import Pages
from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.vmm import open_driver
from sgl_vtensor.vmm.driver import VmmDriver

REQUESTS = 64
PREFIX_TOKENS = 4096


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def driver(request: pytest.FixtureRequest) -> Iterator[VmmDriver]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    driver = open_driver(request.param)
    yield driver
    driver.close()


def test_64_requests_with_one_prefix_back_it_once(driver: VmmDriver) -> None:
    layout = plan_layout(
        num_layers=4, num_kv_heads=8, head_dim=128, v_head_dim=128, itemsize=2, granule_bytes=driver.granularity,
    )  # fmt: skip
    len_tokens = PREFIX_TOKENS + layout.page_tokens // 2
    prefix_pages = layout.num_pages(PREFIX_TOKENS)
    assert prefix_pages * layout.page_tokens == PREFIX_TOKENS
    pages = Pages(driver, layout, 2 * prefix_pages + 2 * REQUESTS)
    pool = VTensorPool(pages, num_slots=REQUESTS, max_len_tokens=len_tokens)
    created, padding_bytes = driver.calls["create"], driver.physical_bytes
    slots = range(1, REQUESTS + 1)

    pool.open(1, [], PREFIX_TOKENS)
    assert pool.grow([1], [PREFIX_TOKENS])
    prefix = pool.pages_of(1, 0, prefix_pages)
    for slot in slots[1:]:
        pool.open(slot, prefix, len_tokens)
    assert pool.grow(slots, [len_tokens] * REQUESTS)
    assert pool.ensure(slots) == REQUESTS * (prefix_pages + 1)

    backed = prefix_pages + REQUESTS
    assert driver.calls["create"] - created == backed
    assert driver.physical_bytes - padding_bytes == backed * layout.page_bytes
    stats = pool.stats()
    assert (stats.pages_shared, stats.pages_seen) == (prefix_pages, REQUESTS * (prefix_pages + 1))

    # One write at each page's home is what every row shows.
    homes = pages.tensor().view(torch.int64).view(pages.num_pages + 1, -1)
    marks = torch.arange(100, 100 + prefix_pages, device=driver.device)
    homes[torch.tensor(prefix, device=driver.device), -1] = marks
    shown = pool.rows.tensor().view(torch.int64).view(pool.rows.num_rows, pool.rows.max_pages, -1)
    for slot in slots:
        assert torch.equal(shown[int(pool.row_of_slot[slot]), :prefix_pages, -1], marks), f"request {slot}"

    for slot in slots:
        pool.free(pool.pages_of(slot, 0 if slot == 1 else prefix_pages, prefix_pages + 1))
        pool.close(slot)
    pool.drain(in_flight=0)
    pool.shrink(0)
    assert driver.physical_bytes == padding_bytes
    pool.shutdown()
