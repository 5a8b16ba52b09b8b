"""Rows that end at the edge of mapped memory: a kernel that reads one byte more faults the GPU.

Each case runs in a process of its own, as a fault takes the CUDA context with it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys
import torch
from sgl_vtensor.vmm.cuda import CudaDriver
from vtensor_kernels import DecodeWorkspace, decode_attention, prefill_attention, reference_attention

call, loads, kv_len, q_len, batch = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
over_read = call == "over_read"
heads, q_heads, dim = 8, 32, 128
driver = CudaDriver(0)
page = driver.granularity
# One token is K and V of one layer, 4096 bytes, so that kv_len tokens end at the last mapped byte.
token_bytes = 2 * heads * dim * 2
used = kv_len * token_bytes
mapped = -(-used // page) * page
row_bytes = mapped + page  # the last page of every row stays unmapped
base = driver.reserve(batch * row_bytes)
for row in range(batch):
    for offset in range(0, mapped, page):
        driver.map(base + row * row_bytes + offset, driver.create(page), page, writable=True)
flat = driver.tensor(base, batch * row_bytes).view(torch.bfloat16)
# Push the tokens against the edge: token kv_len - 1 is the last thing that is mapped.
start = (mapped - used) // 2
storage = flat.as_strided(
    (batch, kv_len, 2, heads, dim), (row_bytes // 2, token_bytes // 2, heads * dim, dim, 1), start
)
storage.copy_(torch.randn(batch, kv_len, 2, heads, dim, device="cuda"))
k, v = storage[:, :, 0], storage[:, :, 1]
# The view that a cache would hand out is longer than the row is.
wide = flat.as_strided(
    (batch, kv_len + 128, 2, heads, dim), (row_bytes // 2, token_bytes // 2, heads * dim, dim, 1), start
)
if over_read:
    wide[0, kv_len].float().sum().item()  # the memory behind the row is really unmapped
    raise SystemExit("reading behind the row did not fault")
q = torch.randn(batch * q_len, q_heads, dim, dtype=torch.bfloat16, device="cuda")
rows = torch.arange(batch, dtype=torch.int32, device="cuda")
indptr = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * q_len
lens = torch.full((batch,), kv_len, dtype=torch.int32, device="cuda")
out, expected = torch.empty_like(q), torch.empty_like(q)
reference_attention(q, k, v, expected, rows, indptr, lens, q_len, sm_scale=dim**-0.5)
if call == "prefill":
    prefill_attention(q, wide[:, :, 0], wide[:, :, 1], out, rows, indptr, lens, q_len, sm_scale=dim**-0.5, loads=loads)
else:
    workspace = DecodeWorkspace(batch, q_heads, dim, "cuda")
    decode_attention(
        q, wide[:, :, 0], wide[:, :, 1], out, rows, lens, workspace=workspace, sm_scale=dim**-0.5, loads=loads
    )
torch.cuda.synchronize()
error = ((out.float() - expected.float()).norm() / expected.float().norm()).item()
assert error < 1e-2, error
print("OK", error)
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    path = f"{ROOT}:{ROOT / 'kernels'}"
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path.split(':')!r}\n{SCRIPT}", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("loads", ["auto", "tma", "pointer"])
@pytest.mark.parametrize(("kv_len", "q_len", "batch"), [(1, 1, 1), (513, 37, 2), (640, 512, 3), (1409, 300, 9)])
def test_prefill_stays_in_mapped_memory(loads: str, kv_len: int, q_len: int, batch: int) -> None:
    done = run("prefill", loads, kv_len, q_len, batch)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("loads", ["auto", "tma", "pointer"])
@pytest.mark.parametrize(("kv_len", "batch"), [(1, 1), (511, 2), (640, 3), (4097, 1)])
def test_decode_stays_in_mapped_memory(loads: str, kv_len: int, batch: int) -> None:
    done = run("decode", loads, kv_len, 1, batch)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_over_read_faults() -> None:
    done = run("over_read", "auto", 513, 1, 1)
    assert done.returncode != 0
    assert "illegal memory access" in done.stderr
