"""The core without SGLang: write a prefix once, read it through two requests' vTensors."""

import torch

from sgl_vtensor.core.layout import plan_layout
from sgl_vtensor.core.pages import Pages
from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.vmm import open_driver

driver = open_driver("cuda" if torch.cuda.is_available() else "host")
layout = plan_layout(
    num_layers=2, num_kv_heads=4, head_dim=64, v_head_dim=64, itemsize=2, granule_bytes=driver.granularity
)
pages = Pages(driver, layout, num_pages=64)
pool = VTensorPool(pages, num_slots=8, max_len_tokens=32 * layout.page_tokens)

prefix_len = 3 * layout.page_tokens
pool.open(1, prefix_pages=[], len_tokens=prefix_len)  # request 1 computes the prefix
pool.grow([1], [prefix_len])
pool.ensure([1])
k_home, _ = pages.home_views(layer=0, dtype=torch.bfloat16)
for position, page in enumerate(pool.pages_of(1, 0, 3)):  # writes go to the pages' homes, by token slot
    k_home[page * layout.page_tokens : (page + 1) * layout.page_tokens] = position + 1

pool.open(2, prefix_pages=pool.pages_of(1, 0, 3), len_tokens=prefix_len + 1)  # request 2 shares it, and goes on
pool.grow([2], [prefix_len + 1])
pool.ensure([2])

k_rows, _ = pool.row_views(layer=0, dtype=torch.bfloat16)  # [rows, max_tokens, kv_heads, head_dim]: no page table
one, two = (k_rows[pool.row_of_slot[slot], :prefix_len] for slot in (1, 2))
print("equal:", torch.equal(one, two), "at", hex(one.data_ptr()), "and", hex(two.data_ptr()))
print(f"{pool.stats().pages_in_use} pages in use, {pool.stats().pages_shared} of them shared; calls: {driver.calls}")
pool.shutdown()
driver.close()
