"""Prefix-prefill for sm_90 in Gluon: a producer warp copies K and V, two warpgroups compute, each on half a tile.

The plain case only: bfloat16 or float16, head_dim 64 or 128, no cap, window, sinks, log-sum-exp or fp8 (``prefill.py``
takes those). What it wins over the Triton loop: the score product of the next keys runs while the softmax of these
does, the two warpgroups drift apart so that one's softmax hides behind the other's products, and a program fetches
the next tile's keys while it finishes the last one.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from vtensor_kernels import tile

BLOCK_M = 128
"""(token, query head) pairs of a tile; each of the two warpgroups takes half."""
BLOCK_N = 128
STAGES = 2
_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # Triton 3.7 renamed it


@gluon.jit
def _blocks(
    q_len, kv_len, tile_index, split, splits,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """A piece of work: keys [0, end) of its tile, of which it has key blocks [first, last), counted down from the end.

    So no block but one of a row shorter than itself reaches behind the row's end. Where ``end`` is no multiple of a
    block, the lowest begins at 0 all the same, and only its keys that no other has count: it is ``ragged``, and comes
    second, among those that need a mask. An entry without queries has no blocks.
    """
    end = kv_len
    if CAUSAL:
        highest = (tile_index * BLOCK_M + BLOCK_M - 1) // GROUP
        end = gl.maximum(gl.minimum(kv_len - q_len + highest + 1, kv_len), 0)
    last = gl.where(q_len > 0, (end + BLOCK_N - 1) // BLOCK_N, 0)
    first = last * 0
    ragged = gl.where((last > 1) & (end % BLOCK_N > 0), 1, 0)
    if SPLIT:
        share = (last + splits - 1) // splits
        all_blocks = last
        first = gl.minimum(split * share, all_blocks)
        last = gl.minimum(first + share, all_blocks)
        ragged = gl.where((last == all_blocks) & (last > first + 1), ragged, 0)
    return end, first, last, ragged


@gluon.jit
def _block(i, first, last, ragged):
    """The block that comes i-th: the ragged one second."""
    return gl.where((ragged > 0) & (i == 1), last - 1, first + i - gl.where(i > 1, ragged, 0))


@gluon.jit
def _work(turn):
    """The turn-th piece of work of this program. Every other turn runs backwards: work is sorted by length."""
    programs = gl.num_programs(0)
    program = gl.program_id(0)
    return turn * programs + gl.where(turn % 2 == 0, program, programs - 1 - program)


@gluon.jit
def _copy_blocks(
    k_source, v_source, end, first, last, ragged, count, k_token, k_column, v_token, v_column,
    k_tiles, v_tiles, k_ready, k_free, v_ready, v_free, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy a piece of work's blocks, as stages become free."""
    for i in range(last - first):
        stage = count % STAGES
        free_phase = (count // STAGES + 1) & 1
        start = gl.maximum(end - (_block(i, first, last, ragged) + 1) * BLOCK_N, 0)
        mbarrier.wait(k_free.index(stage), free_phase)
        mbarrier.expect(k_ready.index(stage), k_source.block_type.nbytes)
        _copy(k_source, [k_token + start, k_column], k_ready.index(stage), k_tiles.index(stage))
        mbarrier.wait(v_free.index(stage), free_phase)
        mbarrier.expect(v_ready.index(stage), v_source.block_type.nbytes)
        _copy(v_source, [v_token + start, v_column], v_ready.index(stage), v_tiles.index(stage))
        count += 1
    return count


@gluon.jit
def _produce(
    schedule_ptr, num_work, k_ptr, v_ptr, k_tokens, v_tokens,
    stride_k_row, stride_k_token, stride_k_head, stride_v_row, stride_v_token, stride_v_head,
    k_tiles, v_tiles, k_ready, k_free, v_ready, v_free,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, CAUSAL: gl.constexpr, SPLIT: gl.constexpr,
    WHOLE: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, ENTRY: gl.constexpr,
):  # fmt: skip
    """Copy the key blocks of every tile, and read the next tile's entry meanwhile.

    A descriptor takes microseconds to make. All rows and heads share one, made once (WHOLE), since blocks end inside
    their rows. A row shorter than a block needs one of its exact length: what is behind may be unmapped, and the copy
    engine stays out of it. So does every row where rows or heads are not evenly spaced.
    """
    if WHOLE:
        k_all = tma.make_tensor_descriptor(
            k_ptr, [k_tokens, (KV_HEADS - 1) * stride_k_head + DIM], [stride_k_token, 1], [BLOCK_N, DIM],
            k_tiles.layout,
        )  # fmt: skip
        v_all = tma.make_tensor_descriptor(
            v_ptr, [v_tokens, (KV_HEADS - 1) * stride_v_head + DIM], [stride_v_token, 1], [BLOCK_N, DIM],
            v_tiles.layout,
        )  # fmt: skip
    count = 0
    work = _work(0)
    row, _start, q_len, kv_len, tile_index, split, splits, _slot = _load_entry(
        schedule_ptr, work, num_work, KV_HEADS, ENTRY
    )
    for turn in range((num_work + gl.num_programs(0) - 1) // gl.num_programs(0)):
        next_work = _work(turn + 1)
        next_row, _next_start, next_len, next_kv_len, next_index, next_split, next_splits, _next_slot = _load_entry(
            schedule_ptr, next_work, num_work, KV_HEADS, ENTRY
        )
        end, first, last, ragged = _blocks(
            q_len, kv_len, tile_index, split, splits, GROUP, BLOCK_M, BLOCK_N, CAUSAL, SPLIT
        )
        if first < last:
            kv_head = work % KV_HEADS
            exact = True
            if WHOLE:
                exact = kv_len < BLOCK_N
            if exact:
                # These descriptors lie in one place for all tiles: no copy through the old ones may be in flight.
                for any_stage in gl.static_range(STAGES):
                    uses = (count - any_stage + STAGES - 1) // STAGES
                    mbarrier.wait(k_ready.index(any_stage), (uses + 1) & 1)
                    mbarrier.wait(v_ready.index(any_stage), (uses + 1) & 1)
                k_row = tma.make_tensor_descriptor(
                    k_ptr + row.to(gl.int64) * stride_k_row + kv_head.to(gl.int64) * stride_k_head,
                    [kv_len, DIM], [stride_k_token, 1], [BLOCK_N, DIM], k_tiles.layout,
                )  # fmt: skip
                v_row = tma.make_tensor_descriptor(
                    v_ptr + row.to(gl.int64) * stride_v_row + kv_head.to(gl.int64) * stride_v_head,
                    [kv_len, DIM], [stride_v_token, 1], [BLOCK_N, DIM], v_tiles.layout,
                )  # fmt: skip
                count = _copy_blocks(
                    k_row, v_row, end, first, last, ragged, count, 0, 0, 0, 0,
                    k_tiles, v_tiles, k_ready, k_free, v_ready, v_free, BLOCK_N, STAGES,
                )  # fmt: skip
            elif WHOLE:
                count = _copy_blocks(
                    k_all, v_all, end, first, last, ragged, count,
                    (row.to(gl.int64) * (stride_k_row // stride_k_token)).to(gl.int32), kv_head * stride_k_head,
                    (row.to(gl.int64) * (stride_v_row // stride_v_token)).to(gl.int32), kv_head * stride_v_head,
                    k_tiles, v_tiles, k_ready, k_free, v_ready, v_free, BLOCK_N, STAGES,
                )  # fmt: skip
        work, row, q_len, kv_len = next_work, next_row, next_len, next_kv_len
        tile_index, split, splits = next_index, next_split, next_splits


@gluon.jit
def _softmax(
    s, row_max, row_sum, position, start, limit, scale,
    BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, MASKED: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Probabilities of one block, and the running maximum, sum and the factor for what was summed before.

    Its keys from ``limit`` on have been counted in another block, or are none.
    """
    if MASKED:
        key = start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
        highest = position * 0 + (limit - 1)
        if CAUSAL:
            highest = gl.minimum(position, limit - 1)
        s = gl.where(key[None, :] <= highest[:, None], s, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(s, 1) * scale)
    shift = new_max
    if MASKED:
        # Nothing seen yet: a maximum of 0 turns exp2(-inf - max) into 0 where -inf would give NaN.
        shift = gl.where(new_max == float("-inf"), 0.0, new_max)
    p = gl.exp2(s * scale - shift[:, None])
    rescale = gl.exp2(row_max - shift)
    return p, new_max, row_sum * rescale + gl.sum(p, 1), rescale


@gluon.jit
def _pin(row_sum):
    """Keep what ``row_sum`` is made of, which is the whole softmax, in front of what follows.

    ptxas moves a wait for the tensor cores up past arithmetic, which would undo the overlap; it does not move it past
    a store (that never happens: a sum of powers is not negative).
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .pred negative; .reg .b32 nowhere;
        mov.b32 nowhere, 0; setp.lt.f32 negative, $1, 0f00000000;
        @negative st.shared.f32 [nowhere], $1;
        mov.b32 $0, $1; }""",
        "=f,f", [row_sum], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _steps(
    acc, row_max, row_sum, p, count, begin, stop, end, first, last, ragged, position, scale,
    q_tile, k_tiles, v_tiles, k_ready, k_free, v_ready, v_free,
    DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, MASKED: gl.constexpr,
    S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
):  # fmt: skip
    """The blocks that come [begin, stop)-th: scores of each overlap with the values of the one before."""
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    for i in range(begin, stop):
        stage = count % STAGES
        before = (count - 1) % STAGES
        mbarrier.wait(k_ready.index(stage), (count // STAGES) & 1)
        zeros = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
        s = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(before), ((count - 1) // STAGES) & 1)
        acc = warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
        s = warpgroup_mma_wait(num_outstanding=1, deps=[s])
        mbarrier.arrive(k_free.index(stage))
        limit = end - _block(i, first, last, ragged) * BLOCK_N
        start = gl.maximum(limit - BLOCK_N, 0)
        new_p, row_max, row_sum, rescale = _softmax(
            s, row_max, row_sum, position, start, limit, scale, BLOCK_N, CAUSAL, MASKED, S_LAYOUT
        )
        row_sum = _pin(row_sum)
        acc, row_sum = warpgroup_mma_wait(num_outstanding=0, deps=[acc, row_sum])
        mbarrier.arrive(v_free.index(before))
        rescale = gl.convert_layout(rescale, gl.SliceLayout(1, O_LAYOUT))
        acc = acc * rescale[:, None]
        p = gl.convert_layout(new_p.to(q_tile.dtype), P_LAYOUT)
        count += 1
    return acc, row_max, row_sum, p, count


@gluon.jit
def _load_entry(schedule_ptr, work, num_work, KV_HEADS: gl.constexpr, ENTRY: gl.constexpr):
    """(row, q_start, q_len, kv_len, tile in the request, split, splits, slot) of a piece of work; q_len may be 0."""
    inside = work < num_work
    entry = schedule_ptr + work // KV_HEADS * ENTRY
    return (
        gl.load(entry, mask=inside, other=0),
        gl.load(entry + 1, mask=inside, other=0),
        gl.load(entry + 2, mask=inside, other=0),
        gl.load(entry + 3, mask=inside, other=0),
        gl.load(entry + 4, mask=inside, other=0),
        gl.load(entry + 5, mask=inside, other=0),
        gl.load(entry + 6, mask=inside, other=1),
        gl.load(entry + 7, mask=inside, other=0),
    )


@gluon.jit
def _load_queries(
    q_ptr, stride_q_token, stride_q_head, kv_head, half, q_start, q_len, tile_index,
    GROUP: gl.constexpr, DIM: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """This half's 64 pairs of the tile, zeros where there is no query."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DIM, DIM // 8], [4, 1], [1, 0])
    first_pair = tile_index * BLOCK_M + half * 64
    first_token = first_pair // GROUP
    pair = first_pair + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, layout))
    token = pair // GROUP
    head = kv_head * GROUP + pair % GROUP
    offsets = (token - first_token) * stride_q_token + head * stride_q_head
    base = q_ptr + (q_start + first_token).to(gl.int64) * stride_q_token
    mask = (token < q_len)[:, None] & (dim >= 0)[None, :]
    return gl.load(base + offsets[:, None] + dim[None, :], mask=mask, other=0.0)


@gluon.jit
def _consume(
    half, schedule_ptr, num_work, q_ptr, out_ptr, partial_ptr, partial_lse_ptr, scale, v_scale,
    stride_q_token, stride_q_head, stride_out_token, stride_out_head,
    q_tile, k_tiles, v_tiles, k_ready, k_free, v_ready, v_free,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, CAUSAL: gl.constexpr, SPLIT: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, ENTRY: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 of each tile's pairs against all of its key blocks.

    The next tile's entry is read while this tile is computed, and its queries while the last product runs.
    """
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    OUT_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DIM, DIM // 8], [4, 1], [1, 0])
    count = 0
    work = _work(0)
    _row, q_start, q_len, kv_len, tile_index, split, splits, slot = _load_entry(
        schedule_ptr, work, num_work, KV_HEADS, ENTRY
    )
    q = _load_queries(
        q_ptr, stride_q_token, stride_q_head, work % KV_HEADS, half, q_start, q_len, tile_index,
        GROUP, DIM, BLOCK_M,
    )  # fmt: skip
    for turn in range((num_work + gl.num_programs(0) - 1) // gl.num_programs(0)):
        q_tile.store(q)
        fence_async_shared()
        next_work = _work(turn + 1)
        _next_row, next_start, next_len, next_kv_len, next_index, next_split, next_splits, next_slot = _load_entry(
            schedule_ptr, next_work, num_work, KV_HEADS, ENTRY
        )
        first_pair = tile_index * BLOCK_M + half * 64
        first_token = first_pair // GROUP
        end, first, last, ragged = _blocks(
            q_len, kv_len, tile_index, split, splits, GROUP, BLOCK_M, BLOCK_N, CAUSAL, SPLIT
        )
        blocks = last - first
        pair = first_pair + gl.arange(0, 64, layout=gl.SliceLayout(1, S_LAYOUT))
        position = kv_len - q_len + pair // GROUP
        row_max = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
        row_sum = gl.zeros([64], gl.float32, gl.SliceLayout(1, S_LAYOUT))
        acc = gl.zeros([64, DIM], gl.float32, O_LAYOUT)
        p = gl.zeros([64, BLOCK_N], q_tile.dtype, P_LAYOUT)
        if blocks > 0:
            # The highest blocks, which not all queries of this half see whole, and the ragged one need a mask.
            masked = 1
            if CAUSAL:
                seen = gl.maximum(kv_len - q_len + first_token + 1, 0)
                masked = gl.maximum((end - seen + BLOCK_N - 1) // BLOCK_N - first, 1)
            masked = gl.minimum(masked + ragged, blocks)
            mbarrier.wait(k_ready.index(count % STAGES), (count // STAGES) & 1)
            zeros = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
            s = warpgroup_mma(
                q_tile, k_tiles.index(count % STAGES).permute((1, 0)), zeros, use_acc=False, is_async=True
            )
            s = warpgroup_mma_wait(num_outstanding=0, deps=[s])
            mbarrier.arrive(k_free.index(count % STAGES))
            limit = end - first * BLOCK_N
            new_p, row_max, row_sum, _ = _softmax(
                s, row_max, row_sum, position, gl.maximum(limit - BLOCK_N, 0), limit, scale,
                BLOCK_N, CAUSAL, True, S_LAYOUT,
            )  # fmt: skip
            p = gl.convert_layout(new_p.to(q_tile.dtype), P_LAYOUT)
            count += 1
            acc, row_max, row_sum, p, count = _steps(
                acc, row_max, row_sum, p, count, 1, masked, end, first, last, ragged, position, scale,
                q_tile, k_tiles, v_tiles, k_ready, k_free, v_ready, v_free,
                DIM, BLOCK_N, STAGES, CAUSAL, True, S_LAYOUT, O_LAYOUT,
            )  # fmt: skip
            acc, row_max, row_sum, p, count = _steps(
                acc, row_max, row_sum, p, count, masked, blocks, end, first, last, ragged, position, scale,
                q_tile, k_tiles, v_tiles, k_ready, k_free, v_ready, v_free,
                DIM, BLOCK_N, STAGES, CAUSAL, False, S_LAYOUT, O_LAYOUT,
            )  # fmt: skip
        q = _load_queries(
            q_ptr, stride_q_token, stride_q_head, next_work % KV_HEADS, half, next_start, next_len,
            next_index, GROUP, DIM, BLOCK_M,
        )  # fmt: skip
        if blocks > 0:
            before = (count - 1) % STAGES
            mbarrier.wait(v_ready.index(before), ((count - 1) // STAGES) & 1)
            acc = warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
            mbarrier.arrive(v_free.index(before))

        inverse = gl.convert_layout(v_scale / gl.where(row_sum == 0.0, 1.0, row_sum), gl.SliceLayout(1, O_LAYOUT))
        acc = acc * inverse[:, None]
        kv_head = work % KV_HEADS
        is_part = False
        if SPLIT:
            is_part = splits > 1
            if is_part:
                empty = row_sum == 0.0
                lse = (row_max + gl.log2(gl.where(empty, 1.0, row_sum))) * 0.6931471805599453
                base = (slot.to(gl.int64) * KV_HEADS + kv_head) * BLOCK_M + half * 64
                in_half = gl.arange(0, 64, layout=gl.SliceLayout(1, S_LAYOUT))
                lse = gl.where(empty, float("-inf"), lse)
                gl.store(partial_lse_ptr + base + in_half, lse, mask=pair // GROUP < q_len)
                in_half = gl.arange(0, 64, layout=gl.SliceLayout(1, O_LAYOUT))
                dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, O_LAYOUT))
                mask = ((first_pair + in_half) // GROUP < q_len)[:, None] & (dim >= 0)[None, :]
                gl.store(partial_ptr + base * DIM + in_half[:, None] * DIM + dim[None, :], acc, mask=mask)
        if not is_part:
            # Whole lines: in the product's own layout a thread has 4 bytes in a row.
            result = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), OUT_LAYOUT)
            out_pair = first_pair + gl.arange(0, 64, layout=gl.SliceLayout(1, OUT_LAYOUT))
            dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, OUT_LAYOUT))
            token = out_pair // GROUP
            head = kv_head * GROUP + out_pair % GROUP
            offsets = (token - first_token) * stride_out_token + head * stride_out_head
            mask = (token < q_len)[:, None] & (dim >= 0)[None, :]
            out_base = out_ptr + (q_start + first_token).to(gl.int64) * stride_out_token
            gl.store(out_base + offsets[:, None] + dim[None, :], result, mask=mask)
        work, q_start, q_len, kv_len, tile_index = next_work, next_start, next_len, next_kv_len, next_index
        split, splits, slot = next_split, next_splits, next_slot


@gluon.jit(do_not_specialize=["k_tokens", "v_tokens"])
def _prefill_hopper_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    partial_ptr,
    partial_lse_ptr,
    schedule_ptr,
    count_ptr,
    k_tokens,
    v_tokens,
    scale,
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
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
    CAUSAL: gl.constexpr,
    SPLIT: gl.constexpr,  # a tile's keys may be in several pieces, each of which leaves a partial result
    WHOLE: gl.constexpr,  # rows and heads lie evenly spaced in one array of tokens
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    ENTRY: gl.constexpr,
):
    """out = softmax(q k^T * sm_scale) v, one resident program a processor, each taking tiles by turns."""
    num_work = gl.load(count_ptr) * KV_HEADS
    dtype: gl.constexpr = k_ptr.dtype.element_ty
    KV_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, DIM], dtype)
    Q_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, DIM], dtype)
    q_tile_0 = gl.allocate_shared_memory(dtype, [64, DIM], Q_LAYOUT)
    q_tile_1 = gl.allocate_shared_memory(dtype, [64, DIM], Q_LAYOUT)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], KV_LAYOUT)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], KV_LAYOUT)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)  # both warpgroups are done with it
        mbarrier.init(v_free.index(stage), count=2)
    gl.warp_specialize(
        [
            (_consume, (
                0, schedule_ptr, num_work, q_ptr, out_ptr, partial_ptr, partial_lse_ptr, scale, v_scale,
                stride_q_token, stride_q_head, stride_out_token, stride_out_head,
                q_tile_0, k_tiles, v_tiles, k_ready, k_free, v_ready, v_free,
                KV_HEADS, GROUP, DIM, CAUSAL, SPLIT, BLOCK_M, BLOCK_N, STAGES, ENTRY,
            )),
            (_consume, (
                1, schedule_ptr, num_work, q_ptr, out_ptr, partial_ptr, partial_lse_ptr, scale, v_scale,
                stride_q_token, stride_q_head, stride_out_token, stride_out_head,
                q_tile_1, k_tiles, v_tiles, k_ready, k_free, v_ready, v_free,
                KV_HEADS, GROUP, DIM, CAUSAL, SPLIT, BLOCK_M, BLOCK_N, STAGES, ENTRY,
            )),
            (_produce, (
                schedule_ptr, num_work, k_ptr, v_ptr, k_tokens, v_tokens,
                stride_k_row, stride_k_token, stride_k_head, stride_v_row, stride_v_token, stride_v_head,
                k_tiles, v_tiles, k_ready, k_free, v_ready, v_free,
                KV_HEADS, GROUP, DIM, CAUSAL, SPLIT, WHOLE, BLOCK_M, BLOCK_N, STAGES, ENTRY,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def prefill_hopper(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    partial: torch.Tensor | None,
    partial_lse: torch.Tensor | None,
    pieces: torch.Tensor,
    count: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    v_scale: float,
) -> None:
    """Launch for checked arguments of ``prefill_attention``; ``pieces`` and ``count`` are of its schedule.

    A tile in several pieces leaves them in ``partial``, [slots, kv_heads, BLOCK_M, dim], and ``partial_lse``: float32.
    """
    kv_heads = k.shape[2]
    group = q.shape[1] // kv_heads
    triton.set_allocator(tile.allocate_scratch)
    k_tokens, v_tokens = _tokens_in_all(k), _tokens_in_all(v)
    _prefill_hopper_kernel[(min(pieces.shape[0] * kv_heads, tile.processors(q.device)),)](
        q, k, v, out, partial, partial_lse, pieces, count, k_tokens, v_tokens, scale, v_scale,
        *q.stride()[:2],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:2],
        KV_HEADS=kv_heads, GROUP=group, DIM=q.shape[2], CAUSAL=causal, SPLIT=partial is not None,
        WHOLE=k_tokens > 0 and v_tokens > 0,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, STAGES=STAGES, ENTRY=pieces.shape[1],
        num_warps=4, maxnreg=168,
    )  # fmt: skip


def _tokens_in_all(view: torch.Tensor) -> int:
    """Tokens from the first row's start to the last row's end, if one 2-D descriptor can span them all; else 0."""
    rows, tokens, heads, dim = view.shape
    row, token, head = view.stride()[:3]
    if row % token or (heads - 1) * head + dim > token:
        return 0
    spanned = (rows - 1) * (row // token) + tokens
    return spanned if spanned < 2**31 else 0
