"""Inputs that a paged-by-the-driver cache really has, and the error that a result may have."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from vtensor_kernels import Pages, reference_attention

# A kernel may be this many times as far from float64 as the reference computed in the kernel's own dtype. It sums in
# another order and rounds the probabilities once more; it accumulates in float32, which the reference does not.
ERROR_FACTOR = 2.0
ERROR_FLOOR = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclasses.dataclass
class Case:
    """Arguments of one call. K and V are views of token-major storage that is NaN wherever no token is."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rows: torch.Tensor
    qo_indptr: torch.Tensor
    kv_lens: torch.Tensor
    max_q_len: int
    options: dict[str, Any]

    def empty_out(self) -> torch.Tensor:
        """An output full of NaN: what the kernel leaves unwritten cannot pass."""
        return self.q.new_full((*self.q.shape[:2], self.v.shape[3]), float("nan"))

    def in_pages(self, page_tokens: int) -> tuple[torch.Tensor, torch.Tensor, Pages]:
        """K and V once more, in pages anywhere, and where. Pages that no token has are far out of bounds, or NaN."""
        device, max_tokens = self.q.device, self.k.shape[1]
        num_pages = [-(-kv_len // page_tokens) for kv_len in self.kv_lens.tolist()]
        order = torch.randperm(sum(num_pages) + 3, generator=torch.Generator().manual_seed(2)).to(device)
        table = torch.full((self.k.shape[0], -(-max_tokens // page_tokens) + 1), 1 << 20, dtype=torch.int32)
        table = table.to(device)
        homes = []
        for part in (self.k, self.v):
            size = (1, len(order) * page_tokens, 2, *part.shape[2:])  # of two layers
            homes.append(torch.full(size, float("nan"), dtype=torch.float32).to(part.dtype).to(device)[:, :, 1])
        for request, (row, kv_len) in enumerate(zip(self.rows.tolist(), self.kv_lens.tolist(), strict=True)):
            first = sum(num_pages[:request])
            pages = order[first : first + num_pages[request]]
            table[row, : len(pages)] = pages.int()
            where = (pages[:, None] * page_tokens + torch.arange(page_tokens, device=device)).view(-1)[:kv_len]
            for part, source in zip(homes, (self.k, self.v), strict=True):
                part[0, where] = source[row, :kv_len]
        return homes[0], homes[1], Pages(table, page_tokens)

    def expected(
        self, compute_dtype: torch.dtype, *, with_lse: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output, and log-sum-exp if asked for, of the reference in ``compute_dtype``."""
        out = torch.zeros(*self.q.shape[:2], self.v.shape[3], dtype=compute_dtype, device=self.q.device)
        lse = torch.zeros(self.q.shape[:2], dtype=compute_dtype, device=self.q.device) if with_lse else None
        reference_attention(
            self.q, self.k, self.v, out, self.rows, self.qo_indptr, self.kv_lens, self.max_q_len,
            **self.options, lse=lse, compute_dtype=compute_dtype,
        )  # fmt: skip
        return out, lse

    def assert_close(self, out: torch.Tensor) -> None:
        """``out`` is as near to float64 as its dtype allows."""
        exact, _ = self.expected(torch.float64)
        rounded, _ = self.expected(self.q.dtype)
        allowed = ERROR_FACTOR * (rounded.double() - exact).abs().max().item() + ERROR_FLOOR[self.q.dtype]
        error = (out.double() - exact).abs().max().item()
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def make_case(
    device: torch.device,
    q_lens: list[int],
    kv_lens: list[int],
    *,
    dtype: torch.dtype = torch.float16,
    kv_dtype: torch.dtype | None = None,
    q_heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    v_head_dim: int | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    sinks: bool = False,
    **options: Any,
) -> Case:
    """Random queries and rows. Two layers share the storage, so the token stride is more than heads times dim."""
    generator = torch.Generator().manual_seed(seed)
    v_head_dim = v_head_dim or head_dim
    kv_dtype = kv_dtype or dtype
    batch = len(q_lens)
    max_tokens = max_tokens or max(max(kv_lens), 1) + 70
    num_rows = batch + 2
    rows = torch.randperm(num_rows, generator=generator)[:batch].to(torch.int32)

    width_k, width_v = kv_heads * head_dim, kv_heads * v_head_dim
    storage = torch.full((num_rows, max_tokens, 2, width_k + width_v), float("nan"), dtype=torch.float32)
    for row, kv_len in zip(rows.tolist(), kv_lens, strict=True):
        storage[row, :kv_len] = torch.randn(kv_len, 2, width_k + width_v, generator=generator)
    layer = storage.to(kv_dtype).to(device)[:, :, 1]
    k = layer[..., :width_k].unflatten(-1, (kv_heads, head_dim))
    v = layer[..., width_k:].unflatten(-1, (kv_heads, v_head_dim))

    qo_indptr = torch.tensor([0, *q_lens]).cumsum(0).to(torch.int32)
    q = torch.randn(sum(q_lens), q_heads, head_dim, generator=generator).to(dtype)
    options.setdefault("sm_scale", head_dim**-0.5)
    if sinks:
        options["sinks"] = torch.randn(q_heads, generator=generator).to(device)
    return Case(
        q=q.to(device),
        k=k,
        v=v,
        rows=rows.to(device),
        qo_indptr=qo_indptr.to(device),
        kv_lens=torch.tensor(kv_lens, dtype=torch.int32, device=device),
        max_q_len=max(q_lens),
        options=options,
    )
