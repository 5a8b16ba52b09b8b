"""Prefix-prefill: new queries against the whole row, prefix and new tokens alike, in one loop."""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl

from vtensor_kernels import tile

MAX_SPLITS = 32
MIN_SPLIT_TOKENS = 1024
"""A split shorter than this costs more in the second kernel than it wins; with small tiles, half of it."""
FEW_PAIRS = 64
"""Up to so many (token, query head) pairs of a request and kv head, tiles are small."""
FULL_SHARE = 0.75
"""Where large tiles would keep no larger share of the processors busy, tiles are small, too."""
LEVELS = 16
"""Pieces are sorted by length in steps of the longest row over this."""
MIXED_SHARE = 0.7
"""With more tiles than programs, no tile is longer than twice this share of what a program does, as far as it is split:
one row of 30 000 tokens beside 31 of 512 would keep eight processors busy for twice as long as all others."""
LONG_TOKENS = 8192
"""From this length on a row's keys may be split although there are enough tiles; a second launch costs little there."""
COMBINED_PAIRS = 8
"""Pairs that a program combines."""


@dataclasses.dataclass(frozen=True)
class PrefillConfig:
    """Tile sizes of one launch. ``block_m`` counts (token, query head of the group) pairs."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    hopper: bool = False
    """Whether the kernel of ``prefill_hopper`` serves, where it can; its tile sizes are its own."""
    tma: bool = True
    """Whether the copy engine reads K and V, where it can: a program's descriptors take as long as 128 short keys."""
    min_split_tokens: int = 1024
    splits: int | None = None
    """Programs that share a tile's keys; None: as many as fill the device."""


@dataclasses.dataclass(frozen=True)
class PrefillSchedule:
    """What the calls of a pass share that differ in q, k, v and out only. Made by ``prefill_schedule``."""

    pieces: torch.Tensor
    """[pieces, 8] int32: a tile of queries against its keys, or a part of them; longest first."""
    combined: torch.Tensor
    """[tiles, 8] int32: the tiles whose keys are in several pieces; none where nothing can be split."""
    count: torch.Tensor
    """How many pieces there are; the first of [8] int32."""
    num_slots: int
    """Room for partial results, in tiles of a kv head."""
    num_tiles: int
    config: PrefillConfig


_ENTRY = 8
"""int32 a piece: row, q_start, q_len, kv_len, tile in the request, split, splits, slot. Of a combined tile: q_start,
q_len, tile in the request, splits, first slot, 3 unused. q_len is 0 behind the last: there are as many as could be."""


@triton.jit
def _tiles_as_long(tokens, tiles, q_len, kv_len, most_seen, group, block_m, CAUSAL: tl.constexpr):
    """How many of each request's tiles see at least so many keys, as ``_keys_seen`` has it; all of them do see 0."""
    shorter = tl.zeros_like(tiles)
    if CAUSAL:
        missing = tokens - 1 - (kv_len - q_len)
        differ = (missing > 0) & (2 * q_len > kv_len)
        shorter = tl.where(differ, tl.cdiv(missing * group + 1, block_m) - 1, 0)
    found = tl.where(tokens <= tl.minimum(kv_len, most_seen), tl.maximum(tiles - shorter, 0), 0)
    return tl.where(tokens <= 0, tiles, found)


@triton.jit
def _keys_seen(tile_index, q_len, kv_len, most_seen, group, block_m, CAUSAL: tl.constexpr):
    """By a tile of queries. Behind a prefix that is as long all tiles count alike, so that they stay together."""
    seen = kv_len
    if CAUSAL:
        last = kv_len - q_len + ((tile_index + 1) * block_m - 1) // group
        seen = tl.where(2 * q_len > kv_len, tl.maximum(tl.minimum(last + 1, kv_len), 0), kv_len)
    return tl.minimum(seen, most_seen)


@triton.jit(
    do_not_specialize=[
        "batch", "most_seen", "group", "block_m", "kv_heads", "programs", "pieces", "combined", "slots", "min_split",
        "most_splits", "forced",
    ]
)  # fmt: skip
def _schedule_kernel(
    pieces_ptr,
    combined_ptr,
    count_ptr,
    rows_ptr,
    qo_indptr,
    kv_lens,
    batch,
    most_seen,  # keys that a tile sees through a sliding window
    group,
    block_m,
    kv_heads,
    programs,  # that run at once
    pieces,  # room for so many
    combined,
    slots,
    min_split,
    most_splits,
    forced,  # splits of each tile, as a measurement asks; 0: as many as balance the work
    BLOCK_B: tl.constexpr,
    LEVELS: tl.constexpr,
    MIXED_SHARE: tl.constexpr,
    SPLIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    ENTRY: tl.constexpr,
):
    """Write one tile's pieces to where they belong by length; never beyond the table, whatever bounds a caller broke.

    Lengths are compared in steps of a part of the longest row: tiles of one request read the same keys, which are in
    the L2 cache as long as they stay together.
    """
    index = tl.program_id(0)
    request = tl.arange(0, BLOCK_B)
    inside = request < batch
    q_start = tl.load(qo_indptr + request, mask=inside, other=0)
    q_len = tl.load(qo_indptr + request + 1, mask=inside, other=0) - q_start
    kv_len = tl.load(kv_lens + request, mask=inside, other=0)
    tiles = tl.cdiv(q_len * group, block_m)
    num_tiles = tl.sum(tiles, 0)
    splits = tl.full([BLOCK_B], 1, tl.int32)
    if SPLIT:
        seen = kv_len.to(tl.float32)  # by a query, on average
        if CAUSAL:
            seen -= q_len / 2
        seen = tl.minimum(tl.maximum(seen, 1.0), most_seen)
        share = tl.sum(seen * tiles, 0) * kv_heads / programs
        # With more tiles than programs, shorter pieces fill up what longer ones leave.
        share *= tl.where(num_tiles * kv_heads <= programs, 1.0, MIXED_SHARE)
        splits = tl.minimum((seen / share).to(tl.int32), tl.cdiv(tl.minimum(kv_len, most_seen), min_split))
        splits = tl.where(forced > 0, forced, tl.minimum(tl.maximum(splits, 1), most_splits))
        splits = tl.where(tl.sum(tl.where(splits > 1, tiles * splits, 0), 0) <= slots, splits, 1)
    last = tl.cumsum(tiles, 0)
    mine = (index >= last - tiles) & (index < last)

    if index < num_tiles:
        own_request = tl.max(tl.where(mine, request, 0), 0)
        own_tiles = tl.sum(tl.where(mine, tiles, 0), 0)
        own_start = tl.sum(tl.where(mine, q_start, 0), 0)
        own_len = tl.sum(tl.where(mine, q_len, 0), 0)
        own_kv_len = tl.sum(tl.where(mine, kv_len, 0), 0)
        own_splits = tl.sum(tl.where(mine, splits, 0), 0)
        tile_index = index - tl.sum(tl.where(mine, last - tiles, 0), 0)
        row = tl.load(rows_ptr + own_request).to(tl.int32)
        step = tl.maximum(tl.minimum(tl.max(kv_len, 0), most_seen) // LEVELS, 1)
        level = _keys_seen(tile_index, own_len, own_kv_len, most_seen, group, block_m, CAUSAL) // own_splits // step
        longer = _tiles_as_long((level + 1) * step * splits, tiles, q_len, kv_len, most_seen, group, block_m, CAUSAL)
        alike = _tiles_as_long(level * step * splits, tiles, q_len, kv_len, most_seen, group, block_m, CAUSAL) - longer
        before = longer * splits + tl.where(request < own_request, alike * splits, 0)
        # Of its own request the later tiles, which see more.
        place = tl.sum(before, 0) + (own_tiles - 1 - tile_index - tl.sum(tl.where(mine, longer, 0), 0)) * own_splits
        is_split = splits > 1
        earlier = (request < own_request) & is_split
        slot = tl.sum(tl.where(earlier, tiles * splits, 0), 0) + tile_index * own_splits
        for split in range(tl.minimum(own_splits, pieces - place)):
            entry = pieces_ptr + (place + split) * ENTRY
            tl.store(entry, row)
            tl.store(entry + 1, own_start)
            tl.store(entry + 2, own_len)
            tl.store(entry + 3, own_kv_len)
            tl.store(entry + 4, tile_index)
            tl.store(entry + 5, split)
            tl.store(entry + 6, own_splits)
            tl.store(entry + 7, slot + split)
        place = tl.sum(tl.where(earlier, tiles, 0), 0) + tile_index
        if (own_splits > 1) & (place < combined):
            entry = combined_ptr + place * ENTRY
            tl.store(entry, own_start)
            tl.store(entry + 1, own_len)
            tl.store(entry + 2, tile_index)
            tl.store(entry + 3, own_splits)
            tl.store(entry + 4, slot)
    num_pieces = tl.minimum(tl.sum(tiles * splits, 0), pieces)
    if index == 0:
        tl.store(count_ptr, num_pieces)
    if (index >= num_pieces) & (index < pieces):
        entry = pieces_ptr + index * ENTRY
        for number in tl.static_range(ENTRY):
            tl.store(entry + number, 0)
    if (index >= tl.sum(tl.where(splits > 1, tiles, 0), 0)) & (index < combined):
        tl.store(combined_ptr + index * ENTRY + 1, 0)


@triton.jit(do_not_specialize=["window"])
def _prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,  # [num_tokens, q_heads] or None
    partial_ptr,  # contiguous [slots, kv_heads, BLOCK_M, V_DIM] float32 when SPLIT, else None
    partial_lse_ptr,  # [slots, kv_heads, BLOCK_M], or None
    sinks_ptr,
    schedule_ptr,
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
    stride_lse_token,
    stride_lse_head,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ENTRY: tl.constexpr,
    SPLIT: tl.constexpr,  # a tile's keys may be in several pieces, each of which leaves a partial result
    CAUSAL: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    USE_TMA: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """out = softmax(q k^T * sm_scale) v for one piece: BLOCK_M (token, query head) pairs of one kv head.

    Packing the query heads of a group into the tile's rows fills it when a request has few new tokens.
    """
    kv_head = tl.program_id(0)
    entry = schedule_ptr + tl.program_id(1) * ENTRY
    q_len = tl.load(entry + 2)
    if q_len == 0:
        return
    row = tl.load(entry).to(tl.int64)
    q_start = tl.load(entry + 1)
    kv_len = tl.load(entry + 3)
    tile_index = tl.load(entry + 4)

    pair = tile_index * BLOCK_M + tl.arange(0, BLOCK_M)
    token = pair // GROUP
    first_token = tile_index * BLOCK_M // GROUP
    # Large offsets in 64 bits and once, those within the tile in 32.
    tile_start = (q_start + first_token).to(tl.int64)
    in_tile = token - first_token
    head = kv_head * GROUP + pair % GROUP
    is_query = token < q_len
    position = kv_len - q_len + token

    # Keys of this tile: [lo, hi). All of its queries see all of [left, right); the rest needs a mask.
    first_position = kv_len - q_len + first_token
    last_position = tl.minimum(kv_len - q_len + (tile_index * BLOCK_M + BLOCK_M - 1) // GROUP, kv_len - 1)
    lo = 0
    left = 0
    hi = kv_len
    right = kv_len
    if CAUSAL:
        hi = tl.maximum(last_position + 1, 0)
        right = tl.maximum(first_position + 1, 0)
    if HAS_WINDOW:
        lo = tl.maximum(first_position - window, 0) // BLOCK_N * BLOCK_N
        left = tl.cdiv(tl.maximum(last_position - window, 0), BLOCK_N) * BLOCK_N
        if not CAUSAL:
            hi = tl.minimum(hi, tl.maximum(last_position + window + 1, 0))
            right = tl.minimum(right, tl.maximum(first_position + window + 1, 0))
    right = right // BLOCK_N * BLOCK_N
    splits = 1
    slot = 0
    if SPLIT:
        splits = tl.load(entry + 6)
        share = tl.cdiv(tl.cdiv(hi - lo, BLOCK_N), splits) * BLOCK_N
        lo = tl.minimum(lo + tl.load(entry + 5) * share, hi)
        hi = tl.minimum(lo + share, hi)
        slot = (tl.load(entry + 7).to(tl.int64) * tl.num_programs(0) + kv_head) * BLOCK_M

    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_DV)
    q_base = q_ptr + tile_start * stride_q_token
    q = tl.load(
        q_base + (in_tile * stride_q_token + head * stride_q_head)[:, None] + dim[None, :],
        mask=is_query[:, None] & (dim < DIM)[None, :],
        other=0.0,
    ).to(DOT_DTYPE)
    k_base = k_ptr + row * stride_k_row + kv_head.to(tl.int64) * stride_k_head
    v_base = v_ptr + row * stride_v_row + kv_head.to(tl.int64) * stride_v_head
    k_row = tile.open_row(k_base, stride_k_token, kv_len, DIM, BLOCK_N, BLOCK_D, USE_TMA)
    v_row = tile.open_row(v_base, stride_v_token, kv_len, V_DIM, BLOCK_N, BLOCK_DV, USE_TMA)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    if HAS_WINDOW:
        acc, row_max, row_sum = tile.attend(
            acc, row_max, row_sum, q, k_row, v_row, None, stride_k_token, stride_v_token,
            lo, tl.minimum(left, hi), kv_len, position, scale, cap, window,
            DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, CAUSAL, HAS_CAP, HAS_WINDOW, USE_TMA, True, DOT_DTYPE, 0,
        )  # fmt: skip
        lo = tl.maximum(lo, left)
    acc, row_max, row_sum = tile.attend(
        acc, row_max, row_sum, q, k_row, v_row, None, stride_k_token, stride_v_token,
        lo, tl.minimum(right, hi), kv_len, position, scale, cap, window,
        DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, CAUSAL, HAS_CAP, HAS_WINDOW, USE_TMA, False, DOT_DTYPE, 0,
    )  # fmt: skip
    acc, row_max, row_sum = tile.attend(
        acc, row_max, row_sum, q, k_row, v_row, None, stride_k_token, stride_v_token,
        tl.maximum(lo, right), hi, kv_len, position, scale, cap, window,
        DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, CAUSAL, HAS_CAP, HAS_WINDOW, USE_TMA, True, DOT_DTYPE, 0,
    )  # fmt: skip

    if SPLIT:  # noqa: SIM102  (one constexpr, one tensor)
        if splits > 1:
            empty = row_sum == 0.0
            acc *= (v_scale / tl.where(empty, 1.0, row_sum))[:, None]
            log_sum = (row_max + tl.log2(tl.where(empty, 1.0, row_sum))) * 0.6931471805599453
            in_slot = tl.arange(0, BLOCK_M)
            tl.store(partial_lse_ptr + slot + in_slot, tl.where(empty, float("-inf"), log_sum), mask=is_query)
            tl.store(
                partial_ptr + slot * V_DIM + in_slot[:, None] * V_DIM + dim_v[None, :],
                acc,
                mask=is_query[:, None] & (dim_v < V_DIM)[None, :],
            )
            return
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head, mask=is_query, other=0.0).to(tl.float32) * 1.4426950408889634
        with_sink = tl.maximum(row_max, sink)
        rescale = tl.exp2(row_max - with_sink)
        row_sum = row_sum * rescale + tl.exp2(sink - with_sink)
        acc *= rescale[:, None]
        row_max = with_sink
    empty = row_sum == 0.0
    acc *= (v_scale / tl.where(empty, 1.0, row_sum))[:, None]
    if HAS_LSE:
        log_sum = (row_max + tl.log2(tl.where(empty, 1.0, row_sum))) * 0.6931471805599453
        tl.store(
            lse_ptr + tile_start * stride_lse_token + in_tile * stride_lse_token + head * stride_lse_head,
            tl.where(empty, float("-inf"), log_sum),
            mask=is_query,
        )
    out_base = out_ptr + tile_start * stride_out_token
    tl.store(
        out_base + (in_tile * stride_out_token + head * stride_out_head)[:, None] + dim_v[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=is_query[:, None] & (dim_v < V_DIM)[None, :],
    )


@triton.jit
def _combine_kernel(
    partial_ptr,
    partial_lse_ptr,
    out_ptr,
    lse_ptr,
    sinks_ptr,
    combined_ptr,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    stride_lse_head,
    GROUP: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ENTRY: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """out = sum_s exp(lse_s - lse) partial_s for BLOCK_P pairs of a tile. A piece without keys has lse_s = -inf."""
    entry = combined_ptr + tl.program_id(0) * ENTRY
    q_len = tl.load(entry + 1)
    if q_len == 0:
        return
    q_start = tl.load(entry)
    first_pair = tl.load(entry + 2) * BLOCK_M
    splits = tl.load(entry + 3)
    kv_head = tl.program_id(1)
    in_slot = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    pair = first_pair + in_slot
    is_query = pair // GROUP < q_len
    token = (q_start + pair // GROUP).to(tl.int64)
    head = kv_head * GROUP + pair % GROUP
    dim = tl.arange(0, BLOCK_DV)
    is_value = is_query[:, None] & (dim < V_DIM)[None, :]
    slot = (tl.load(entry + 4).to(tl.int64) * tl.num_programs(1) + kv_head) * BLOCK_M
    step = tl.num_programs(1) * BLOCK_M
    lse_base = partial_lse_ptr + slot + in_slot
    partial_base = partial_ptr + slot * V_DIM + (in_slot * V_DIM)[:, None] + dim[None, :]
    acc = tl.zeros([BLOCK_P, BLOCK_DV], dtype=tl.float32)
    total = tl.zeros([BLOCK_P], dtype=tl.float32)
    biggest = tl.full([BLOCK_P], float("-inf"), dtype=tl.float32)
    if HAS_SINKS:
        biggest = tl.load(sinks_ptr + head, mask=is_query, other=0.0).to(tl.float32)
        total += 1.0
    for split in tl.range(0, splits, num_stages=3):
        part = tl.load(lse_base + split * step, mask=is_query, other=float("-inf"))
        values = tl.load(partial_base + split * step * V_DIM, mask=is_value, other=0.0)
        new_biggest = tl.maximum(biggest, part)
        shift = tl.where(new_biggest == float("-inf"), 0.0, new_biggest)
        weight = tl.exp(part - shift)
        rescale = tl.exp(biggest - shift)
        acc = acc * rescale[:, None] + values * weight[:, None]
        total = total * rescale + weight
        biggest = new_biggest
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    tl.store(
        out_ptr + (token * stride_out_token + head * stride_out_head)[:, None] + dim[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=is_value,
    )
    if HAS_LSE:
        log_sum = tl.where(empty, float("-inf"), biggest + tl.log(tl.where(empty, 1.0, total)))
        tl.store(lse_ptr + token * stride_lse_token + head * stride_lse_head, log_sum, mask=is_query)


def prefill_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    rows: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_lens: torch.Tensor,
    max_q_len: int,
    *,
    sm_scale: float,
    causal: bool = True,
    logit_cap: float = 0.0,
    sliding_window: int = -1,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    sinks: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    max_kv_len: int | None = None,
    loads: str = "auto",
    config: PrefillConfig | None = None,
    schedule: PrefillSchedule | None = None,
) -> None:
    """Attention of each request's new queries over its row. Writes ``out``, and ``lse`` where given.

    The new tokens' K and V must be in the row already. Query i of request b sits at position
    ``kv_lens[b] - q_len + i``. Nothing behind ``kv_lens[b]`` is read: it may be unmapped, or hold NaN.

    Args:
        q: [num_tokens, q_heads, head_dim], bfloat16, float16 or float32. Tokens behind ``qo_indptr[-1]`` are padding.
        k: [num_rows, max_tokens, kv_heads, head_dim], q's dtype or fp8. Any row, token and head stride, in elements,
            also beyond 2**31; the last stride is 1.
        v: [num_rows, max_tokens, kv_heads, v_head_dim], like k.
        out: [num_tokens, q_heads, v_head_dim], any float dtype.
        rows: [batch] int32 or int64, row number of each request.
        qo_indptr: [batch + 1] int32, where each request's queries start in q.
        kv_lens: [batch] int32, tokens in the row: prefix and new ones.
        max_q_len: an upper bound of the requests' numbers of queries.
        sm_scale: factor on q k^T, before the cap. Positive.
        causal: whether a query sees only positions up to its own.
        logit_cap: c > 0 turns a score s into c * tanh(s / c).
        sliding_window: w > 0: a query sees its own position and the w before it (and after it when not causal).
        k_scale, v_scale: factors that turn the stored (fp8) K and V into their values.
        sinks: [q_heads], one extra logit in each head's softmax denominator.
        lse: [num_tokens, q_heads] float32, receives the natural log of the denominator, sink included.
        max_kv_len: an upper bound of ``kv_lens``, where the host knows one: short rows' keys are not split, which takes
            a second launch. None: ``max_tokens``.
        loads: "tma", "pointer", or "auto" for whichever is faster, as far as this device and layout allow it.
        config: tile sizes, for measurements; the default is chosen by device and shape.
        schedule: of ``prefill_schedule``, for calls that differ in q, k, v and out only; saves a launch a layer. It
            brings its ``config``, and ``max_kv_len`` has had its say.

    Raises:
        ValueError: a layout, dtype or device that the kernel does not take; the message says what to change.
    """
    tile.check_layout(q, k, v, out, sinks, sm_scale)
    num_tokens, q_heads, head_dim = q.shape
    kv_heads, v_head_dim = v.shape[2:]
    batch = rows.shape[0]
    if qo_indptr.shape[0] != batch + 1 or kv_lens.shape[0] != batch:
        raise ValueError(f"rows has {batch} requests: qo_indptr needs {batch + 1} entries and kv_lens {batch}")
    if num_tokens == 0 or batch == 0 or max_q_len == 0:
        return

    group = q_heads // kv_heads
    if schedule is None:
        schedule = prefill_schedule(
            q, k, v, rows, qo_indptr, kv_lens, max_q_len, causal=causal, sliding_window=sliding_window,
            max_kv_len=max_kv_len, config=config,
        )  # fmt: skip
    config = schedule.config
    tiles = _num_tiles(batch, num_tokens, max_q_len, group, config.block_m)
    if schedule.num_tiles != tiles:
        raise ValueError(f"the schedule has {schedule.num_tiles} tiles and these queries {tiles}: make one for them")
    use_tma = (loads != "auto" or config.tma) and tile.use_descriptors(loads, k, v)
    hopper = config.hopper and use_tma and _fits_hopper(q, k, v, logit_cap, sliding_window, sinks, lse)
    pieces, combined = schedule.pieces, schedule.combined
    partial = partial_lse = None
    if schedule.num_slots:
        partial = q.new_empty(schedule.num_slots, kv_heads, config.block_m, v_head_dim, dtype=torch.float32)
        partial_lse = q.new_empty(schedule.num_slots, kv_heads, config.block_m, dtype=torch.float32)

    scale, cap = tile.scales(sm_scale, k_scale, logit_cap)
    if hopper:
        from vtensor_kernels.prefill_hopper import prefill_hopper  # Gluon, needed here only

        prefill_hopper(
            q, k, v, out, partial, partial_lse, pieces, schedule.count, scale=scale, causal=causal, v_scale=v_scale
        )  # fmt: skip
    else:
        if use_tma and not tile.INTERPRETING:
            triton.set_allocator(tile.allocate_scratch)
        _prefill_kernel[(kv_heads, pieces.shape[0])](
            q, k, v, out, lse, partial, partial_lse, sinks, pieces, scale, cap, sliding_window, v_scale,
            *q.stride()[:2],
            *k.stride()[:3],
            *v.stride()[:3],
            *out.stride()[:2],
            *(lse.stride() if lse is not None else (0, 0)),
            GROUP=group,
            DIM=head_dim,
            V_DIM=v_head_dim,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_D=tile.block_dim(head_dim),
            BLOCK_DV=tile.block_dim(v_head_dim),
            ENTRY=_ENTRY,
            SPLIT=schedule.num_slots > 0,
            CAUSAL=causal,
            HAS_CAP=logit_cap > 0,
            HAS_WINDOW=sliding_window > 0,
            HAS_SINKS=sinks is not None,
            HAS_LSE=lse is not None,
            USE_TMA=use_tma,
            DOT_DTYPE=tile.dot_dtype(q.dtype),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )  # fmt: skip
    if schedule.num_slots:
        _combine_kernel[(combined.shape[0], kv_heads, config.block_m // COMBINED_PAIRS)](
            partial, partial_lse, out, lse, sinks, combined,
            *out.stride()[:2],
            *(lse.stride() if lse is not None else (0, 0)),
            GROUP=group,
            V_DIM=v_head_dim,
            BLOCK_M=config.block_m,
            BLOCK_P=COMBINED_PAIRS,
            BLOCK_DV=tile.block_dim(v_head_dim),
            ENTRY=_ENTRY,
            HAS_SINKS=sinks is not None,
            HAS_LSE=lse is not None,
            num_warps=4,
        )  # fmt: skip


def prefill_schedule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_lens: torch.Tensor,
    max_q_len: int,
    *,
    causal: bool = True,
    sliding_window: int = -1,
    max_kv_len: int | None = None,
    config: PrefillConfig | None = None,
) -> PrefillSchedule:
    """Who computes what, for all layers: tile sizes, which keys are split, and the order of the pieces, longest first.

    Nothing of it is computed on the host, and only shapes and dtypes of ``q``, ``k`` and ``v`` count. Arguments are as
    ``prefill_attention`` takes them; the schedule is for calls with these ``rows``, lengths, ``max_q_len``, ``causal``
    and ``sliding_window``.
    """
    num_tokens, q_heads = q.shape[:2]
    kv_heads = k.shape[2]
    group = q_heads // kv_heads
    batch = rows.shape[0]
    longest = k.shape[1] if max_kv_len is None else max_kv_len
    processors = tile.processors(q.device)

    def most_seen(config: PrefillConfig) -> int:
        """Keys that a tile sees, at most, through a sliding window."""
        if sliding_window <= 0:
            return 2**30
        return (1 if causal else 2) * sliding_window + triton.cdiv(config.block_m, group) + 1

    def useful(config: PrefillConfig) -> int:
        """Most splits of a tile."""
        return max(min(MAX_SPLITS, triton.cdiv(min(longest, most_seen(config)), config.min_split_tokens)), 1)

    def fit(config: PrefillConfig) -> tuple[int, int]:
        """Its tiles, and the pieces that each would be in if all were as long."""
        tiles = _num_tiles(batch, num_tokens, max_q_len, group, config.block_m)
        return tiles, max(min(useful(config), processors // max(tiles * kv_heads, 1)), 1)

    if config is None:
        few, config = tile_configs(tile.capability(q.device), k.shape[3], v.shape[3], q.dtype)
        tiles, splits = fit(config)
        if max_q_len * group <= FEW_PAIRS or tiles * kv_heads * splits <= FULL_SHARE * processors:
            config = few
    tiles, splits = fit(config)
    slots = combined = 0
    if config.splits is not None:
        if config.splits > 1:
            slots, combined = tiles * config.splits, tiles
    elif splits > 1 or (batch > 1 and min(longest, most_seen(config)) >= LONG_TOKENS):
        # A piece of a split tile is MIXED_SHARE of what a program does, or more.
        slots = min(int(processors / (MIXED_SHARE * kv_heads)) + 1, tiles * useful(config))
        combined = min(slots // 2, tiles)
    pieces = tiles + slots
    table = torch.empty(pieces + combined + 1, _ENTRY, dtype=torch.int32, device=q.device)
    schedule = PrefillSchedule(table[:pieces], table[pieces:-1], table[-1], slots, tiles, config)
    if tiles:
        _schedule_kernel[(pieces,)](
            schedule.pieces, schedule.combined, schedule.count, rows, qo_indptr, kv_lens, batch, most_seen(config),
            group, config.block_m, kv_heads, processors, pieces, combined, slots, config.min_split_tokens,
            useful(config), config.splits or 0,
            BLOCK_B=tile.block_batch(batch), LEVELS=LEVELS, MIXED_SHARE=MIXED_SHARE,
            SPLIT=slots > 0, CAUSAL=causal, ENTRY=_ENTRY, num_warps=4,
        )  # fmt: skip
    return schedule


def _num_tiles(batch: int, num_tokens: int, max_q_len: int, group: int, block_m: int) -> int:
    """At most so many tiles of ``block_m`` pairs a kv head."""
    return min(batch * triton.cdiv(max_q_len * group, block_m), num_tokens * group // block_m + batch)


def _fits_hopper(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logit_cap: float,
    sliding_window: int,
    sinks: torch.Tensor | None,
    lse: torch.Tensor | None,
) -> bool:
    """Whether this is the plain case that ``prefill_hopper`` computes."""
    return (
        tile.capability(q.device) == 90
        and tile.has_gluon()
        and q.dtype in (torch.bfloat16, torch.float16)
        and k.dtype == q.dtype
        and q.shape[2] in (64, 128)
        and v.shape[3] == q.shape[2]
        and q.data_ptr() % 16 == 0
        and logit_cap <= 0
        and sliding_window <= 0
        and sinks is None
        and lse is None
    )


def tile_configs(
    capability: int, head_dim: int, v_head_dim: int, dtype: torch.dtype
) -> tuple[PrefillConfig, PrefillConfig]:
    """Small and large tiles for a device (90 = sm_90, 0 = interpreter) and these heads.

    Those of sm_90 were measured (``bench/sweep.py prefill``). The others are chosen by what the compiler says of them:
    they fit, and spill little or nothing (``bench/compile_table.py``).
    """
    make = functools.partial(PrefillConfig, min_split_tokens=MIN_SPLIT_TOKENS)
    if capability == 0:
        config = make(32, 32, num_warps=4, num_stages=1)
        return config, config
    width = tile.block_dim(max(head_dim, v_head_dim))
    if dtype == torch.float32:
        config = make(32, 32, num_warps=4, num_stages=1 if width > 128 else 2)
        return config, config
    if tile.has_little_shared(capability):
        if width > 128:
            config = make(64, 32, num_warps=8, num_stages=2)
            return config, config
        return make(64, 64, num_warps=4, num_stages=2), make(128, 64, num_warps=8, num_stages=2)
    if width > 128:
        few_warps = 4 if capability == 90 else 8
        return make(64, 64, num_warps=few_warps, num_stages=2), make(128, 64, num_warps=8, num_stages=2)
    if capability > 90:  # with 128 keys its products leave too few registers
        return make(64, 64, num_warps=4, num_stages=3), make(128, 64, num_warps=8, num_stages=3)
    few = make(64, 64, num_warps=4, num_stages=3, tma=False)
    few = dataclasses.replace(few, min_split_tokens=MIN_SPLIT_TOKENS // 2)
    return few, make(128, 128, num_warps=8, num_stages=3, hopper=True)
