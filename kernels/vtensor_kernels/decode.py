"""Decode: one query a request against its row, in one launch.

The keys of all requests, in blocks, are cut into equal shares, one a program: a share may hold the end of one request
and the beginning of another. Where a request is in several shares, the program that finishes last combines its parts.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from vtensor_kernels import tile

MAX_HEADS_A_TILE = 64
"""Query heads of a group in one tile; larger groups take several, each reading K and V again."""
VALUES_AT_ONCE = 8192
"""Parts of no more values are combined in one go: 64 registers of a thread. 1 x 8192, in 16 parts of 512 values, takes
18.3 us on an H200, 21.1 in a pipeline."""
COMBINED_VALUES = 1024
"""Of more parts, so many values at a time, in a pipeline of loads of COMBINE_STAGES: one program reads what another
wrote, which takes a microsecond."""
COMBINE_STAGES = 8
COMBINE_BLOCKS = 0.125
"""What that costs, in blocks of keys that a program reads. One request of 8192 tokens with one kv head, on an H200: in
32 parts 13.0 us, in 64 15.1, in 16 14.6; 20.7 with loads of 8192 values one after the other."""
_ENTRY = 4
"""int32 an entry of a schedule: a share's first request, its row, its length, and its first block among all."""


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Tile sizes of one launch, its programs a processor, and the fewest tokens that are worth a program."""

    block_n: int
    num_warps: int
    num_stages: int
    min_tokens: int
    programs: int = 2
    """Programs a processor; what does not fit at once waits."""


class DecodeWorkspace:
    """Memory that ``decode_attention`` writes its partial results to, made once, for any number of calls on a stream.

    Args:
        max_batch: most requests of a call.
        q_heads: query heads of this rank.
        v_head_dim: width of a value.
        device: where the calls run.
        kv_heads: fewest kv heads of a call; fewer heads are cut into more shares.
    """

    MAX_PROGRAMS = 8
    """Most programs a processor, of any configuration."""

    def __init__(
        self, max_batch: int, q_heads: int, v_head_dim: int, device: torch.device | str, *, kv_heads: int = 1
    ) -> None:
        self.max_batch = max_batch
        self.q_heads = q_heads
        self.v_head_dim = v_head_dim
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        self.max_shares = triton.cdiv(self.MAX_PROGRAMS * tile.processors(self.device), kv_heads)
        # A share has at most one request that began before it and one that goes on behind it.
        slots = 2 * self.max_shares * q_heads
        self.partial = torch.empty(slots, v_head_dim, dtype=torch.float32, device=self.device)
        self.lse = torch.empty(slots, dtype=torch.float32, device=self.device)
        # Parts that are done, for each request and kv head; whoever combines them sets 0 again.
        self.arrivals = torch.zeros(max_batch * q_heads, dtype=torch.int32, device=self.device)

    def check(self, batch: int, q_heads: int, v_head_dim: int, device: torch.device) -> None:
        """Raise ValueError for a call that this workspace is too small for."""
        if batch > self.max_batch or q_heads != self.q_heads or v_head_dim != self.v_head_dim:
            raise ValueError(
                f"workspace is for batch <= {self.max_batch}, {self.q_heads} heads of {self.v_head_dim}: this call "
                f"has batch {batch}, {q_heads} heads of {v_head_dim}; make a DecodeWorkspace for it"
            )
        if device != self.device:
            raise ValueError(f"workspace is on {self.device} and q on {device}: make a DecodeWorkspace there")


class DecodeSchedule:
    """Who computes what, for all layers of a forward pass whose K and V are shaped alike.

    ``update`` is one small launch, which a CUDA graph may hold: it depends on shapes only.

    Args:
        workspace: of the calls that it is for.
        k: keys of one layer, as ``decode_attention`` takes them.
        batch: requests of these calls.
        sliding_window: of these calls.
        config: for measurements; the default is chosen by device and shape.

    Raises:
        ValueError: the workspace has too few shares; the message says what to change.
    """

    def __init__(
        self,
        workspace: DecodeWorkspace,
        k: torch.Tensor,
        batch: int,
        *,
        sliding_window: int = -1,
        config: DecodeConfig | None = None,
    ) -> None:
        kv_heads, head_dim = k.shape[2:]
        width = max(head_dim, workspace.v_head_dim)
        self.batch = batch
        self.sliding_window = sliding_window
        group = workspace.q_heads // kv_heads
        self.block_h = min(max(16, triton.next_power_of_2(group)), MAX_HEADS_A_TILE)
        self.config = config or choose_config(tile.capability(k.device), width, k.dtype, batch, self.block_h)
        self.tiles = kv_heads * triton.cdiv(group, self.block_h)
        self.heads_p2 = min(triton.next_power_of_2(group), self.block_h)
        self.shares = max(self.config.programs * tile.processors(k.device) // self.tiles, 1)
        values = self.heads_p2 * tile.block_dim(workspace.v_head_dim)
        at_once = self.shares * values <= VALUES_AT_ONCE
        self.parts_at_a_time = max((VALUES_AT_ONCE if at_once else COMBINED_VALUES) // values, 1)
        self.combine_stages = 1 if at_once else COMBINE_STAGES
        if self.shares > workspace.max_shares:
            raise ValueError(
                f"{kv_heads} kv heads need {self.shares} shares and the workspace has {workspace.max_shares}: make it "
                f"with kv_heads={kv_heads}"
            )
        self.table = torch.empty(1 + self.shares * _ENTRY, dtype=torch.int32, device=k.device)

    def update(self, rows: torch.Tensor, kv_lens: torch.Tensor) -> DecodeSchedule:
        """Cut anew, for these rows and lengths, as ``decode_attention`` takes them. Returns itself."""
        _schedule_kernel[(self.shares,)](
            self.table, rows, kv_lens, self.batch, self.sliding_window,
            BLOCK_N=self.config.block_n,
            MIN_BLOCKS=triton.cdiv(self.config.min_tokens, self.config.block_n),
            PARTS_AT_A_TIME=self.parts_at_a_time,
            COMBINE_BLOCKS=COMBINE_BLOCKS,
            BLOCK_B=tile.block_batch(self.batch),
            HAS_WINDOW=self.sliding_window > 0,
            ENTRY=_ENTRY,
            num_warps=4,
        )  # fmt: skip
        return self


@triton.jit
def _first_block(kv_len, window, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The block of the first key that the query sees."""
    if HAS_WINDOW:
        return tl.maximum(kv_len - 1 - window, 0) // BLOCK_N
    else:
        return kv_len * 0


@triton.jit
def _num_blocks(kv_len, window, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Blocks of a request: one at least, as somebody has to write its output."""
    return tl.maximum(tl.cdiv(kv_len, BLOCK_N) - _first_block(kv_len, window, BLOCK_N, HAS_WINDOW), 1)


@triton.jit(do_not_specialize=["batch", "window"])
def _schedule_kernel(
    table_ptr,  # blocks a share, then an entry for each share
    rows_ptr,
    kv_lens,
    batch,
    window,
    BLOCK_N: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    PARTS_AT_A_TIME: tl.constexpr,
    COMBINE_BLOCKS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    ENTRY: tl.constexpr,
):
    """Write one share's entry. Behind the last share that has work, the first request is ``batch``."""
    request = tl.arange(0, BLOCK_B)
    inside = request < batch
    kv_len = tl.load(kv_lens + request, mask=inside, other=0)
    blocks = tl.where(inside, _num_blocks(kv_len, window, BLOCK_N, HAS_WINDOW), 0)
    ends = tl.cumsum(blocks, 0)
    share = tl.maximum(tl.cdiv(tl.sum(blocks, 0), tl.num_programs(0)), MIN_BLOCKS)
    # One program combines a request's parts: of few kv heads a long request would have so many that this takes longer
    # than to read the keys. s blocks a share, and combining ceil(blocks / s) parts, are shortest together at the root.
    share = tl.maximum(share, tl.sqrt(tl.max(blocks, 0) * (COMBINE_BLOCKS / PARTS_AT_A_TIME)).to(tl.int32))
    index = tl.program_id(0)
    if index == 0:
        tl.store(table_ptr, share)
    first = tl.sum(tl.where(inside & (ends <= index * share), 1, 0), 0)
    entry = table_ptr + 1 + index * ENTRY
    tl.store(entry, first)
    tl.store(entry + 1, tl.load(rows_ptr + first, mask=first < batch, other=0).to(tl.int32))
    tl.store(entry + 2, tl.load(kv_lens + first, mask=first < batch, other=0))
    tl.store(entry + 3, tl.sum(tl.where(request == first, ends - blocks, 0), 0))


@triton.jit(do_not_specialize=["batch", "window"])
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    partial_ptr,  # [shares, 2, q_heads, V_DIM]: of the request that began before, and of the one that goes on
    lse_ptr,  # [shares, 2, q_heads], base 2
    arrivals_ptr,  # [batch, tiles]
    sinks_ptr,
    table_ptr,
    rows_ptr,
    kv_lens,
    slots_ptr,  # None where rows are contiguous
    batch,
    scale,
    cap,
    window,
    v_scale,
    stride_slots,
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
    Q_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,  # parts that are combined at a time
    COMBINE_STAGES: tl.constexpr,
    HEADS_P2: tl.constexpr,  # heads in a tile, as a power of 2
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    USE_TMA: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    ENTRY: tl.constexpr,
):
    """softmax(q k^T * sm_scale) v over one share of the keys, for the query heads of one tile of a kv head."""
    head_tiles: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    tile_index = tl.program_id(0)
    kv_head = tile_index // head_tiles
    first_head = kv_head * GROUP + tile_index % head_tiles * BLOCK_H
    heads_here = tl.minimum(GROUP - tile_index % head_tiles * BLOCK_H, BLOCK_H)
    in_tile = tl.arange(0, BLOCK_H)
    head = first_head + in_tile
    is_head = in_tile < heads_here
    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_DV)
    is_value = is_head[:, None] & (dim_v < V_DIM)[None, :]

    index = tl.program_id(1)
    share = tl.load(table_ptr)
    entry = table_ptr + 1 + index * ENTRY
    request = tl.load(entry)
    row = tl.load(entry + 1)
    kv_len = tl.load(entry + 2)
    begin = tl.load(entry + 3)  # the request's first block among all
    block = index * share
    share_end = block + share
    while (block < share_end) & (request < batch):
        # What comes next is read while this is computed.
        has_next = request + 1 < batch
        next_row = tl.load(rows_ptr + request + 1, mask=has_next, other=0).to(tl.int32)
        next_len = tl.load(kv_lens + request + 1, mask=has_next, other=0)

        end = begin + _num_blocks(kv_len, window, BLOCK_N, HAS_WINDOW)
        stop = tl.minimum(end, share_end)
        skipped = _first_block(kv_len, window, BLOCK_N, HAS_WINDOW) - begin
        lo = (block + skipped) * BLOCK_N
        hi = tl.minimum((stop + skipped) * BLOCK_N, kv_len)
        q = tl.load(
            q_ptr + request.to(tl.int64) * stride_q_token + (head * stride_q_head)[:, None] + dim[None, :],
            mask=is_head[:, None] & (dim < DIM)[None, :],
            other=0.0,
        ).to(DOT_DTYPE)
        k_base = k_ptr + kv_head.to(tl.int64) * stride_k_head
        v_base = v_ptr + kv_head.to(tl.int64) * stride_v_head
        if slots_ptr is None:
            slots = None
            k_base += row.to(tl.int64) * stride_k_row
            v_base += row.to(tl.int64) * stride_v_row
        else:
            slots = slots_ptr + row.to(tl.int64) * stride_slots
        k_row = tile.open_row(k_base, stride_k_token, kv_len, DIM, BLOCK_N, BLOCK_D, USE_TMA)
        v_row = tile.open_row(v_base, stride_v_token, kv_len, V_DIM, BLOCK_N, BLOCK_DV, USE_TMA)
        position = tl.zeros([BLOCK_H], dtype=tl.int32) + (kv_len - 1)
        acc = tl.zeros([BLOCK_H, BLOCK_DV], dtype=tl.float32)
        row_max = tl.full([BLOCK_H], float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_H], dtype=tl.float32)
        acc, row_max, row_sum = tile.attend(
            acc, row_max, row_sum, q, k_row, v_row, slots, stride_k_token, stride_v_token,
            lo, hi, kv_len, position, scale, cap, window,
            DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True, HAS_CAP, HAS_WINDOW, USE_TMA, True, DOT_DTYPE,
        )  # fmt: skip

        out_base = out_ptr + request.to(tl.int64) * stride_out_token
        if (block == begin) & (stop == end):  # all of the request
            if HAS_SINKS:
                sink = tl.load(sinks_ptr + head, mask=is_head, other=0.0).to(tl.float32) * 1.4426950408889634
                with_sink = tl.maximum(row_max, sink)
                rescale = tl.exp2(row_max - with_sink)
                row_sum = row_sum * rescale + tl.exp2(sink - with_sink)
                acc *= rescale[:, None]
            acc *= (v_scale / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
            tl.store(
                out_base + (head * stride_out_head)[:, None] + dim_v[None, :],
                acc.to(out_ptr.dtype.element_ty),
                mask=is_value,
            )
        else:
            slot = 2 * index + tl.where(block == begin, 1, 0)
            part = slot * Q_HEADS + head
            tl.store(lse_ptr + part, row_max + tl.log2(row_sum), mask=is_head)
            acc *= (v_scale / row_sum)[:, None]
            tl.store(partial_ptr + (part * V_DIM)[:, None] + dim_v[None, :], acc, mask=is_value)
            # All threads' parts are stored before one thread counts them, and read after it has.
            tl.debug_barrier()
            first = begin // share
            parts = (end - 1) // share - first + 1
            arrivals = arrivals_ptr + request * tl.num_programs(0) + tile_index
            if tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == parts - 1:
                _combine(
                    out_base, partial_ptr, lse_ptr, sinks_ptr, first, parts, first_head, heads_here, stride_out_head,
                    Q_HEADS, V_DIM, BLOCK_DV, BLOCK_S, COMBINE_STAGES, HEADS_P2, HAS_SINKS,
                )  # fmt: skip
                tl.store(arrivals, 0)
        block = stop
        begin = end
        request += 1
        row = next_row
        kv_len = next_len


@triton.jit
def _combine(
    out_base, partial_ptr, lse_ptr, sinks_ptr, first, parts, first_head, heads_here, stride_out_head,
    Q_HEADS: tl.constexpr, V_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
    COMBINE_STAGES: tl.constexpr, HEADS_P2: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """out = sum_s 2^(lse_s - lse) partial_s for one request and tile; parts are in shares from ``first`` on."""
    in_tile = tl.arange(0, HEADS_P2)
    is_head = in_tile < heads_here
    head = first_head + in_tile
    dim = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([HEADS_P2, BLOCK_DV], dtype=tl.float32)
    biggest = tl.full([HEADS_P2], float("-inf"), dtype=tl.float32)
    total = tl.zeros([HEADS_P2], dtype=tl.float32)
    if HAS_SINKS:  # a sink counts once
        biggest = tl.load(sinks_ptr + head, mask=is_head, other=0.0).to(tl.float32) * 1.4426950408889634
        total += 1.0
    for start in tl.range(0, parts, BLOCK_S, num_stages=COMBINE_STAGES):
        number = start + tl.arange(0, BLOCK_S)
        slot = 2 * (first + number) + tl.where(number == 0, 1, 0)  # the first part goes on behind its share
        part = slot[:, None] * Q_HEADS + head[None, :]
        inside = (number < parts)[:, None] & is_head[None, :]
        # From L2: another processor wrote them.
        lse = tl.load(lse_ptr + part, mask=inside, other=float("-inf"), cache_modifier=".cg")
        values = tl.load(
            partial_ptr + (part * V_DIM)[:, :, None] + dim[None, None, :],
            mask=inside[:, :, None] & (dim < V_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        # Every part holds a key that is seen, so that the maximum is finite for each head.
        new_biggest = tl.where(is_head, tl.maximum(biggest, tl.max(lse, 0)), 0.0)
        weight = tl.exp2(lse - new_biggest[None, :])
        rescale = tl.exp2(biggest - new_biggest)
        acc = acc * rescale[:, None] + tl.sum(values * weight[:, :, None], 0)
        total = total * rescale + tl.sum(weight, 0)
        biggest = new_biggest
    acc = acc / tl.where(is_head, total, 1.0)[:, None]
    tl.store(
        out_base + (head * stride_out_head)[:, None] + dim[None, :],
        acc.to(out_base.dtype.element_ty),
        mask=is_head[:, None] & (dim < V_DIM)[None, :],
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
    schedule: DecodeSchedule | None = None,
    pages: tile.Pages | None = None,
) -> None:
    """Attention of one query a request, at position ``kv_lens[b] - 1``, over its row. Writes ``out``.

    Nothing behind ``kv_lens[b]`` is read: it may be unmapped, or hold NaN. Safe to capture in a CUDA graph: the
    launches depend on shapes only, and lengths and row numbers are read on the device.

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
        schedule: updated with these ``rows`` and ``kv_lens``; saves a launch a layer. Without it one is made.
        pages: where the tokens are, for K and V that are no contiguous view. The rest of a row's last page may hold
            NaN.

    Raises:
        ValueError: a layout, dtype, device, workspace or schedule that the kernel does not take; the message says what
            to change.
    """
    tile.check_layout(q, k, v, out, sinks, sm_scale)
    batch, q_heads, head_dim = q.shape
    kv_heads, v_head_dim = v.shape[2:]
    if rows.shape[0] != batch or kv_lens.shape[0] != batch:
        raise ValueError(f"q has {batch} requests: rows and kv_lens need {batch} entries each")
    workspace.check(batch, q_heads, v_head_dim, q.device)
    if batch == 0:
        return

    # Decode waits for memory either way: plain loads were as fast on an H100, and need no scratch.
    use_tma = loads != "auto" and tile.use_descriptors(loads, k, v)
    if schedule is None:
        schedule = DecodeSchedule(workspace, k, batch, sliding_window=sliding_window, config=config)
        schedule.update(rows, kv_lens)
    elif schedule.batch != batch or schedule.sliding_window != sliding_window:
        raise ValueError(
            f"the schedule is for {schedule.batch} requests and a sliding window of {schedule.sliding_window}, not "
            f"{batch} and {sliding_window}: make a DecodeSchedule for these"
        )
    config = schedule.config
    tile.check_pages(pages, k, config.block_n, loads)
    scale, cap = tile.scales(sm_scale, k_scale, logit_cap)
    if use_tma and not tile.INTERPRETING:
        triton.set_allocator(tile.allocate_scratch)
    _decode_kernel[(schedule.tiles, schedule.shares)](
        q, k, v, out, workspace.partial, workspace.lse, workspace.arrivals, sinks, schedule.table, rows, kv_lens,
        None if pages is None else pages.slots, batch, scale, cap, sliding_window, v_scale,
        0 if pages is None else pages.slots.stride(0),
        *q.stride()[:2],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:2],
        Q_HEADS=q_heads,
        GROUP=q_heads // kv_heads,
        DIM=head_dim,
        V_DIM=v_head_dim,
        BLOCK_H=schedule.block_h,
        BLOCK_N=config.block_n,
        BLOCK_D=tile.block_dim(head_dim),
        BLOCK_DV=tile.block_dim(v_head_dim),
        BLOCK_S=schedule.parts_at_a_time,
        COMBINE_STAGES=schedule.combine_stages,
        HEADS_P2=schedule.heads_p2,
        HAS_CAP=logit_cap > 0,
        HAS_WINDOW=sliding_window > 0,
        HAS_SINKS=sinks is not None,
        USE_TMA=use_tma,
        DOT_DTYPE=tile.dot_dtype(q.dtype),
        ENTRY=_ENTRY,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip


def choose_config(capability: int, width: int, dtype: torch.dtype, batch: int, block_h: int) -> DecodeConfig:
    """Tile sizes for a device (90 = sm_90, 0 = interpreter), the widest head, requests, and query heads in a tile.

    From ``bench/sweep.py decode``. Few long requests are read fastest by one program a processor (1 x 8192 on an H100:
    19.4 us, 22.3 with two) that has four blocks under way (1 x 131072 on an H200: 139.5 us, 144 with three), many
    requests by four (64 x 2048: 184.4 us, 189.9 with two); a share of 128 tokens is worth a program (1 x 1024: 9.0 us,
    10.9 with 256). Of heads of 64 a block of 128 tokens is as many bytes (16 x 4096: 40.8 us, 53.7 with 64 tokens and
    one program). ``programs`` is no part of what is compiled.
    """
    if capability == 0:
        return DecodeConfig(block_n=32, num_warps=4, num_stages=1, min_tokens=64)
    width = tile.block_dim(width)
    if dtype == torch.float32:
        return DecodeConfig(block_n=32, num_warps=4, num_stages=1 if width > 128 else 2, min_tokens=256)
    stages = 2 if tile.has_little_shared(capability) else 3
    if width > 128:
        return DecodeConfig(block_n=32, num_warps=4, num_stages=stages, min_tokens=256)
    if capability < 90:
        return DecodeConfig(block_n=64, num_warps=4, num_stages=stages, min_tokens=128)
    if width <= 64 and block_h == 16:  # of more heads the scores of 128 keys would not fit into registers
        programs = 2 if batch < 64 else 4
        return DecodeConfig(block_n=128, num_warps=4, num_stages=stages, min_tokens=128, programs=programs)
    if batch <= 16 and not tile.has_little_shared(capability):
        return DecodeConfig(block_n=64, num_warps=4, num_stages=4, min_tokens=128, programs=1)
    programs = 1 if batch <= 16 else 2 if batch < 64 else 4
    return DecodeConfig(block_n=64, num_warps=4, num_stages=stages, min_tokens=128, programs=programs)
