"""Small pools on the host driver, and bytes written through homes and read through rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from sgl_vtensor.core.layout import KVLayout, plan_layout
from sgl_vtensor.core.pages import Pages
from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.vmm.driver import VmmDriver
from sgl_vtensor.vmm.host import HostDriver

PAGE_TOKENS = 4
LAYERS = 3
MakePool = Callable[..., VTensorPool]


def small_layout(driver: VmmDriver, page_tokens: int = PAGE_TOKENS) -> KVLayout:
    return plan_layout(
        num_layers=LAYERS,
        num_kv_heads=2,
        head_dim=4,
        v_head_dim=2,
        itemsize=4,
        granule_bytes=driver.granularity,
        page_tokens=page_tokens,
    )


def small_pool(
    driver: VmmDriver,
    *,
    num_pages: int = 16,
    num_slots: int = 4,
    max_len: int = 24,
    num_rows: int | None = None,
    max_mappings: int | None = None,
    limit_pages: int | None = None,
) -> VTensorPool:
    pages = Pages(driver, small_layout(driver), num_pages, limit_pages=limit_pages)
    return VTensorPool(pages, num_slots=num_slots, max_len_tokens=max_len, num_rows=num_rows, max_mappings=max_mappings)


@pytest.fixture
def driver() -> Iterator[HostDriver]:
    with HostDriver(capacity_bytes=1 << 26) as driver:
        yield driver


@pytest.fixture
def make_pool(driver: HostDriver) -> MakePool:
    return lambda **sizes: small_pool(driver, **sizes)


@pytest.fixture
def pool(make_pool: MakePool) -> VTensorPool:
    """16 pages of 4 tokens, 4 slots, 8 rows of 6 positions."""
    return make_pool()


def write_tokens(pool: VTensorPool, slot: int, start: int, values: list[int]) -> None:
    """K and V of every layer, through the homes: ``value + layer`` and its negative."""
    size = pool.layout.page_tokens
    positions = np.arange(start, start + len(values))
    pages = pool.wanted[slot, positions // size].astype(np.int64)
    slots = torch.from_numpy(pages * size + positions % size)
    for layer in range(LAYERS):
        k, v = pool.pages.home_views(layer, torch.float32)
        marks = torch.tensor(values, dtype=torch.float32)[:, None, None] + layer
        k[slots] = marks.expand(-1, *k.shape[1:])
        v[slots] = -marks.expand(-1, *v.shape[1:])


def read_tokens(pool: VTensorPool, slot: int, stop: int) -> list[int]:
    """What the row shows of tokens ``[0, stop)``; every layer, K and V, head and dimension must agree."""
    row = int(pool.row_of_slot[slot])
    shown: list[list[int]] = []
    for layer in range(LAYERS):
        k, v = pool.row_views(layer, torch.float32)
        for view, sign in ((k, 1), (v, -1)):
            tokens = sign * view[row, :stop].flatten(1) - layer
            assert torch.equal(tokens, tokens[:, :1].expand_as(tokens)), "a token's elements differ"
            shown.append([int(value) for value in tokens[:, 0]])
    assert all(values == shown[0] for values in shown)
    return shown[0]


def start_request(pool: VTensorPool, slot: int, prefix: list[int], len_tokens: int) -> list[int]:
    """Open, grow, ensure; returns the request's pages."""
    pool.open(slot, prefix, len_tokens)
    assert pool.grow([slot], [len_tokens])
    pool.ensure(np.array([slot], dtype=np.int32))
    return pool.pages_of(slot, 0, pool.layout.num_pages(len_tokens))


def end_request(pool: VTensorPool, slot: int, num_kept: int = 0) -> None:
    """Free the pages behind ``num_kept`` and close."""
    pool.free(pool.pages_of(slot, num_kept, int(pool.num_wanted[slot])))
    pool.close(slot)


class ManualFence:
    """A launch that ends when the test says so, or when it is waited for."""

    def __init__(self) -> None:
        self.waited = 0

    def synchronize(self) -> None:
        self.waited += 1
