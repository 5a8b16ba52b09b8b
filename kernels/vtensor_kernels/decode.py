"""Decode: one query a request against its row, the keys split over programs by a schedule made on the device."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from vtensor_kernels import tile

MAX_HEADS_A_TILE = 64
"""Query heads of a group in one tile; larger groups take several, each reading K and V again."""


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Tile sizes of one launch, and the fewest tokens that are worth a program of their own."""

    block_n: int
    num_warps: int
    num_stages: int
    min_split: int


class DecodeWorkspace:
    """Memory that ``decode_attention`` writes its partial results to, made once, for any number of calls on a stream.

    Args:
        max_batch: most requests of a call.
        q_heads: query heads of this rank.
        v_head_dim: width of a value.
        device: where the calls run.
        waves: programs to aim for, in multiples of the device's processors. More balance mixed lengths better and
            write more partial results.
    """

    def __init__(
        self, max_batch: int, q_heads: int, v_head_dim: int, device: torch.device | str, *, waves: int = 6
    ) -> None:
        self.max_batch = max_batch
        self.q_heads = q_heads
        self.v_head_dim = v_head_dim
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        self.programs = waves * tile.processors(self.device)
        # A call with h kv heads has at most max_batch + ceil(programs / h) splits of q_heads partials each.
        slots = (max_batch + self.programs) * q_heads
        self.partial = torch.empty(slots, v_head_dim, dtype=torch.float32, device=self.device)
        self.lse = torch.empty(slots, dtype=torch.float32, device=self.device)

    def check(self, batch: int, q_heads: int, v_head_dim: int, device: torch.device) -> None:
        """Raise ValueError for a call that this workspace is too small for."""
        if batch > self.max_batch or q_heads != self.q_heads or v_head_dim != self.v_head_dim:
            raise ValueError(
                f"workspace is for batch <= {self.max_batch}, {self.q_heads} heads of {self.v_head_dim}: this call "
                f"has batch {batch}, {q_heads} heads of {v_head_dim}; make a DecodeWorkspace for it"
            )
        if device != self.device:
            raise ValueError(f"workspace is on {self.device} and q on {device}: make a DecodeWorkspace there")


@triton.jit
def _splits(
    kv_lens, batch, target_splits, window, MIN_SPLIT: tl.constexpr, BLOCK_B: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """Splits of every request, [BLOCK_B]: at least one, and at most batch + target_splits in all.

    One share of tokens for the whole batch, so that a long row is cut and a short one is not.
    """
    request = tl.arange(0, BLOCK_B)
    inside = request < batch
    length = tl.load(kv_lens + request, mask=inside, other=0)
    if WINDOW:
        length = tl.minimum(length, window + 1)
    share = tl.maximum(tl.cdiv(tl.sum(length.to(tl.int64), axis=0), target_splits), MIN_SPLIT)
    return tl.where(inside, tl.maximum(tl.cdiv(length, share), 1), 0).to(tl.int32)


@triton.jit(do_not_specialize=["batch", "target_splits"])
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    partial_ptr,  # [splits, q_heads, V_DIM]
    partial_lse_ptr,  # [splits, q_heads], base 2
    sinks_ptr,
    rows_ptr,
    kv_lens,
    batch,
    target_splits,
    q_heads,
    scale,
    cap,
    window,
    v_scale,
    stride_q_token,
    stride_q_head,
    stride_k_row,
    stride_k_token,
    stride_k_head,
    stride_v_row,
    stride_v_token,
    stride_v_head,
    stride_out_token,
    stride_out_head,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_B: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    USE_TMA: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """softmax(q k^T * sm_scale) v over one split of one request's keys, for the query heads of one kv head."""
    head_tiles: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    kv_head = tl.program_id(0) // head_tiles
    in_group = tl.program_id(0) % head_tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    head = kv_head * GROUP + in_group
    is_head = in_group < GROUP

    slot = tl.program_id(1)
    splits = _splits(kv_lens, batch, target_splits, window, MIN_SPLIT, BLOCK_B, HAS_WINDOW)
    first_slot = tl.cumsum(splits, 0) - splits
    mine = (slot >= first_slot) & (slot < first_slot + splits)
    request = tl.max(tl.where(mine, tl.arange(0, BLOCK_B), -1), axis=0)
    if request < 0:
        return
    split = slot - tl.sum(tl.where(mine, first_slot, 0), axis=0)
    num_splits = tl.sum(tl.where(mine, splits, 0), axis=0)

    kv_len = tl.load(kv_lens + request)
    row = tl.load(rows_ptr + request).to(tl.int64)
    position = tl.zeros([BLOCK_H], dtype=tl.int32) + (kv_len - 1)
    lo = 0
    left = 0
    if HAS_WINDOW:
        left = tl.maximum(kv_len - 1 - window, 0)
        lo = left // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(kv_len - lo, BLOCK_N), num_splits) * BLOCK_N
    lo = tl.minimum(lo + split * share, kv_len)
    hi = tl.minimum(lo + share, kv_len)

    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_DV)
    q = tl.load(
        q_ptr + request.to(tl.int64) * stride_q_token + (head * stride_q_head)[:, None] + dim[None, :],
        mask=is_head[:, None] & (dim < DIM)[None, :],
        other=0.0,
    ).to(DOT_DTYPE)
    k_base = k_ptr + row * stride_k_row + kv_head.to(tl.int64) * stride_k_head
    v_base = v_ptr + row * stride_v_row + kv_head.to(tl.int64) * stride_v_head
    k_row = tile.open_row(k_base, stride_k_token, kv_len, DIM, BLOCK_N, BLOCK_D, USE_TMA)
    v_row = tile.open_row(v_base, stride_v_token, kv_len, V_DIM, BLOCK_N, BLOCK_DV, USE_TMA)

    acc = tl.zeros([BLOCK_H, BLOCK_DV], dtype=tl.float32)
    row_max = tl.full([BLOCK_H], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_H], dtype=tl.float32)
    if HAS_WINDOW:
        whole = tl.cdiv(left, BLOCK_N) * BLOCK_N
        acc, row_max, row_sum = tile.attend(
            acc, row_max, row_sum, q, k_row, v_row, stride_k_token, stride_v_token,
            lo, tl.minimum(whole, hi), kv_len, position, scale, cap, window,
            DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True, HAS_CAP, HAS_WINDOW, USE_TMA, True, DOT_DTYPE,
        )  # fmt: skip
        lo = tl.maximum(lo, whole)
    whole = tl.minimum(kv_len // BLOCK_N * BLOCK_N, hi)
    acc, row_max, row_sum = tile.attend(
        acc, row_max, row_sum, q, k_row, v_row, stride_k_token, stride_v_token,
        lo, whole, kv_len, position, scale, cap, window,
        DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True, HAS_CAP, HAS_WINDOW, USE_TMA, False, DOT_DTYPE,
    )  # fmt: skip
    acc, row_max, row_sum = tile.attend(
        acc, row_max, row_sum, q, k_row, v_row, stride_k_token, stride_v_token,
        tl.maximum(lo, whole), hi, kv_len, position, scale, cap, window,
        DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True, HAS_CAP, HAS_WINDOW, USE_TMA, True, DOT_DTYPE,
    )  # fmt: skip

    if HAS_SINKS:
        # A sink counts once: here, or where the splits are combined.
        sink = tl.load(sinks_ptr + head, mask=is_head, other=0.0).to(tl.float32) * 1.4426950408889634
        sink = tl.where(num_splits == 1, sink, float("-inf"))
        with_sink = tl.maximum(row_max, sink)
        rescale = tl.where(row_max == float("-inf"), 0.0, tl.exp2(row_max - with_sink))
        row_sum = row_sum * rescale + tl.where(sink == float("-inf"), 0.0, tl.exp2(sink - with_sink))
        acc *= rescale[:, None]
        row_max = with_sink
    empty = row_sum == 0.0
    acc *= (v_scale / tl.where(empty, 1.0, row_sum))[:, None]
    is_value = is_head[:, None] & (dim_v < V_DIM)[None, :]
    if num_splits == 1:
        out_base = out_ptr + request.to(tl.int64) * stride_out_token
        tl.store(
            out_base + (head * stride_out_head)[:, None] + dim_v[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=is_value,
        )
    else:
        partial = slot.to(tl.int64) * q_heads + head
        log_sum = row_max + tl.log2(tl.where(empty, 1.0, row_sum))
        tl.store(partial_lse_ptr + partial, tl.where(empty, float("-inf"), log_sum), mask=is_head)
        tl.store(partial_ptr + partial[:, None] * V_DIM + dim_v[None, :], acc, mask=is_value)


@triton.jit(do_not_specialize=["batch", "target_splits"])
def _combine_kernel(
    out_ptr,
    partial_ptr,
    partial_lse_ptr,
    sinks_ptr,
    kv_lens,
    batch,
    target_splits,
    q_heads,
    window,
    stride_out_token,
    stride_out_head,
    V_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """out = sum_s 2^(lse_s - lse) partial_s for one request and head; nothing to do for a request of one split."""
    request = tl.program_id(0)
    head = tl.program_id(1)
    splits = _splits(kv_lens, batch, target_splits, window, MIN_SPLIT, BLOCK_B, HAS_WINDOW)
    index = tl.arange(0, BLOCK_B)
    num_splits = tl.sum(tl.where(index == request, splits, 0), axis=0)
    if num_splits <= 1:
        return
    first_slot = tl.sum(tl.where(index < request, splits, 0), axis=0)

    dim = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_DV], dtype=tl.float32)
    total = 0.0
    biggest = float("-inf")
    if HAS_SINKS:
        biggest = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        total = 1.0
    for start in range(0, num_splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        inside = split < num_splits
        partial = (first_slot + split).to(tl.int64) * q_heads + head
        lse = tl.load(partial_lse_ptr + partial, mask=inside, other=float("-inf"))
        # The first split of a request holds keys, so the maximum is finite from the first step on.
        new_biggest = tl.maximum(biggest, tl.max(lse, axis=0))
        weight = tl.exp2(lse - new_biggest)
        rescale = tl.exp2(biggest - new_biggest)
        values = tl.load(
            partial_ptr + partial[:, None] * V_DIM + dim[None, :],
            mask=inside[:, None] & (dim < V_DIM)[None, :],
            other=0.0,
        )
        acc = acc * rescale + tl.sum(values * weight[:, None], axis=0)
        total = total * rescale + tl.sum(weight, axis=0)
        biggest = new_biggest
    tl.store(
        out_ptr + request.to(tl.int64) * stride_out_token + head * stride_out_head + dim,
        (acc / total).to(out_ptr.dtype.element_ty),
        mask=dim < V_DIM,
    )


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    rows: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    workspace: DecodeWorkspace,
    sm_scale: float,
    logit_cap: float = 0.0,
    sliding_window: int = -1,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    sinks: torch.Tensor | None = None,
    loads: str = "auto",
    config: DecodeConfig | None = None,
) -> None:
    """Attention of one query a request, at position ``kv_lens[b] - 1``, over its row. Writes ``out``.

    Nothing behind ``kv_lens[b]`` is read: it may be unmapped, or hold NaN. Safe to capture in a CUDA graph: the
    launches depend on shapes only, lengths and row numbers are read on the device, and nothing is allocated except
    Triton's scratch for descriptors when ``loads`` is "tma".

    Args:
        q: [batch, q_heads, head_dim], bfloat16, float16 or float32.
        k: [num_rows, max_tokens, kv_heads, head_dim], q's dtype or fp8. Any row, token and head stride, in elements,
            also beyond 2**31; the last stride is 1.
        v: [num_rows, max_tokens, kv_heads, v_head_dim], like k.
        out: [batch, q_heads, v_head_dim], any float dtype.
        rows: [batch] int32 or int64, row number of each request.
        kv_lens: [batch] int32, tokens in the row, the new one included; 0 gives an output of zeros.
        workspace: memory for partial results; calls that share one must be ordered by a stream.
        sm_scale, logit_cap, sliding_window, k_scale, v_scale, sinks, loads, config: as in ``prefill_attention``.

    Raises:
        ValueError: a layout, dtype, device or workspace that the kernel does not take; the message says what to change.
    """
    tile.check_layout(q, k, v, out, sinks, sm_scale)
    batch, q_heads, head_dim = q.shape
    kv_heads, v_head_dim = v.shape[2:]
    if rows.shape[0] != batch or kv_lens.shape[0] != batch:
        raise ValueError(f"q has {batch} requests: rows and kv_lens need {batch} entries each")
    workspace.check(batch, q_heads, v_head_dim, q.device)
    if batch == 0:
        return

    group = q_heads // kv_heads
    # Decode waits for memory either way: plain loads were as fast on an H100, and need no scratch.
    use_tma = loads != "auto" and tile.use_descriptors(loads, k, v)
    if config is None:
        config = choose_config(tile.capability(q.device), head_dim, v_head_dim, k.dtype)
    block_h = min(max(16, triton.next_power_of_2(group)), MAX_HEADS_A_TILE)
    head_tiles = triton.cdiv(group, block_h)
    target_splits = triton.cdiv(workspace.programs, kv_heads * head_tiles)
    block_b = tile.block_batch(batch)

    scale, cap = tile.scales(sm_scale, k_scale, logit_cap)
    if use_tma and not tile.INTERPRETING:
        triton.set_allocator(tile.allocate_scratch)
    _decode_kernel[(kv_heads * head_tiles, batch + target_splits)](
        q, k, v, out, workspace.partial, workspace.lse, sinks, rows, kv_lens,
        batch, target_splits, q_heads, scale, cap, sliding_window, v_scale,
        *q.stride()[:2],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:2],
        GROUP=group,
        DIM=head_dim,
        V_DIM=v_head_dim,
        BLOCK_H=block_h,
        BLOCK_N=config.block_n,
        BLOCK_D=tile.block_dim(head_dim),
        BLOCK_DV=tile.block_dim(v_head_dim),
        BLOCK_B=block_b,
        MIN_SPLIT=config.min_split,
        HAS_CAP=logit_cap > 0,
        HAS_WINDOW=sliding_window > 0,
        HAS_SINKS=sinks is not None,
        USE_TMA=use_tma,
        DOT_DTYPE=tile.dot_dtype(q.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    _combine_kernel[(batch, q_heads)](
        out, workspace.partial, workspace.lse, sinks, kv_lens,
        batch, target_splits, q_heads, sliding_window,
        *out.stride()[:2],
        V_DIM=v_head_dim,
        BLOCK_DV=tile.block_dim(v_head_dim),
        BLOCK_B=block_b,
        BLOCK_S=16,
        MIN_SPLIT=config.min_split,
        HAS_WINDOW=sliding_window > 0,
        HAS_SINKS=sinks is not None,
        num_warps=4,
    )  # fmt: skip


def choose_config(capability: int, head_dim: int, v_head_dim: int, dtype: torch.dtype) -> DecodeConfig:
    """Tile sizes for a device (90 = sm_90, 0 = interpreter) and a shape; see ``bench/bench_decode.py`` for why."""
    if capability == 0:
        return DecodeConfig(block_n=32, num_warps=4, num_stages=1, min_split=128)
    width = tile.block_dim(max(head_dim, v_head_dim))
    if dtype == torch.float32:
        return DecodeConfig(block_n=32, num_warps=4, num_stages=1 if width > 128 else 2, min_split=256)
    if width > 128:
        return DecodeConfig(block_n=32, num_warps=4, num_stages=2 if capability < 90 else 3, min_split=256)
    return DecodeConfig(block_n=64, num_warps=4, num_stages=2 if capability < 90 else 3, min_split=512)
