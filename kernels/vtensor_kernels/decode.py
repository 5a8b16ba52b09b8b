"""Decode: one query a request against its row, in one launch.

The keys of all requests, in blocks, are cut into equal shares, one a program: a share may hold the end of one request
and the beginning of another. Keys that several requests share are an item of their own, read once for all of them: a
tile has room for 16 query heads, and a group of 4 fills a fourth of it. Where a request is in several parts, the
program that finishes last combines them.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from vtensor_kernels import tile

LEAST_HEADS_A_TILE = 16
"""Tensor cores take no fewer rows. Tiles of 32 have room for twice as many requests that share keys, but take half as
long again (32 of 4416 tokens of which 16 share 4096, on an H200: 84 us, 58 with 16)."""
MAX_HEADS_A_TILE = 64
"""Query heads of a group in one tile; larger groups take several, each reading K and V again."""
VALUES_AT_ONCE = 8192
"""Parts of no more values are combined in one go: 64 registers of a thread. 1 x 8192, in 16 parts of 512 values, takes
18.3 us on an H200, 21.1 in a pipeline."""
COMBINE_TURNS = 4
"""Of up to as many times more, so many in each turn: 4 x 2000 to 6000 in 33 shares of 512 values takes 28.4 us on an
H200, 30.9 in a pipeline."""
COMBINED_VALUES = 1024
"""Of more parts, so many values at a time, in a pipeline of loads of COMBINE_STAGES: one program reads what another
wrote, which takes a microsecond."""
COMBINE_STAGES = 8
COMBINE_BLOCKS = 0.125
"""What that costs, in blocks of keys that a program reads. One request of 8192 tokens with one kv head, on an H200: in
32 parts 13.0 us, in 64 15.1, in 16 14.6; 20.7 with loads of 8192 values one after the other."""
ALONE_BLOCKS = 4
"""Blocks that a share may be longer if none then holds parts of two items, which takes a program as long: 3 x 600 to
2000 takes 13.3 us on an H200, 16.1 without; 8 x 8192 of which 4 share 7936 36.4 us, 44.8 without."""
FEW = 4
"""Most requests that one program a processor decodes."""
MANY = 64
"""Fewest requests that four do."""
MAX_GROUPED = 128
"""Requests of a batch that may share keys: each needs room for a part of its own."""
_ITEM = 8
"""int32 an item: its first block among all, its end (that of its last share, where it has shares of its own), its first
block in the row, position and number of its requests, its first slot for parts (-1: it is all of its request), row, and
tokens of the row up to its last key."""
_PLACE = 8
"""int32 a position: its request, the number of its parts, first slot of its own ones; first slot of those that it has
of its group's keys, their number, and the step between them; 2 unused."""
_HEADER = 2
"""int32 before them: blocks a share, and how many items there are. Behind the header: each share's first item, as its
number and a copy; then all items, then all positions."""


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
        members = max_members(q_heads, kv_heads)
        slots = _num_slots(self.max_shares, members, min(max_batch, MAX_GROUPED) if members > 1 else 0) * q_heads
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


def max_members(q_heads: int, kv_heads: int) -> int:
    """Requests whose query heads of one kv head fit into a tile together."""
    group = max(q_heads // kv_heads, 1)
    return max(_block_h(group) // group, 1)


def _num_slots(shares: int, members: int, grouped: int) -> int:
    """Parts that there may be, if so many requests may share keys.

    A share has at most one request that began before it and one that goes on behind it. Of keys that are shared each
    member has a part, in each share; and then every request has parts, one more than it is cut, of both kinds.
    """
    return max(2 * shares, (members + 1) * shares + 2 * grouped if grouped else 0)


def _block_h(group: int) -> int:
    """Query heads of a tile."""
    return min(max(LEAST_HEADS_A_TILE, triton.next_power_of_2(group)), MAX_HEADS_A_TILE)


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
        dim, v_dim = tile.block_dim(head_dim), tile.block_dim(workspace.v_head_dim)
        self.batch = batch
        self.sliding_window = sliding_window
        group = workspace.q_heads // kv_heads
        self.block_h = _block_h(group)
        self.config = config or choose_config(tile.capability(k.device), max(dim, v_dim), k.dtype, batch, self.block_h)
        self.tiles = kv_heads * triton.cdiv(group, self.block_h)
        self.heads_p2 = min(triton.next_power_of_2(group), self.block_h)
        self.shares = max(self.config.programs * tile.processors(k.device) // self.tiles, 1)
        values = self.heads_p2 * v_dim
        at_once = self.shares * values <= COMBINE_TURNS * VALUES_AT_ONCE
        self.parts_at_a_time = max((VALUES_AT_ONCE if at_once else COMBINED_VALUES) // values, 1)
        self.combine_stages = 1 if at_once else COMBINE_STAGES
        # Of all members of a group one part at a time, with no more shared memory than the loop over keys has.
        loop_bytes = (self.config.num_stages - 1) * self.config.block_n * (dim + v_dim) * k.element_size()
        part_bytes = self.block_h * v_dim * workspace.partial.element_size()
        self.all_stages = min(1 + loop_bytes // part_bytes, COMBINE_STAGES)
        if self.shares > workspace.max_shares:
            raise ValueError(
                f"{kv_heads} kv heads need {self.shares} shares and the workspace has {workspace.max_shares}: make it "
                f"with kv_heads={kv_heads}"
            )
        members = max_members(workspace.q_heads, kv_heads)
        has_room = workspace.lse.shape[0] // workspace.q_heads >= _num_slots(self.shares, members, batch)
        self.max_members = members if batch <= MAX_GROUPED and has_room and sliding_window <= 0 else 1
        """Requests of a group that ``update`` takes; 1 where none may share keys."""
        size = _HEADER + self.shares * (1 + _ITEM) + 2 * batch * _ITEM + batch * _PLACE
        self.table = torch.empty(size, dtype=torch.int32, device=k.device)

    def update(self, rows: torch.Tensor, kv_lens: torch.Tensor, groups: torch.Tensor | None = None) -> DecodeSchedule:
        """Cut anew, for these rows and lengths, as ``decode_attention`` takes them. Returns itself.

        Args:
            rows: [batch] int32 or int64.
            kv_lens: [batch] int32.
            groups: [4, batch] int32: requests whose rows begin with the same keys, which are then read once for all of
                a group. The requests in an order in which groups are together; then for each position of it the
                position that its group begins at, how many requests the group has (0 but at its beginning; at most
                ``max_members``), and how many tokens it shares (whole blocks, no more than any of them has). It may be
                filled anew between replays of a graph.
        """
        if groups is not None and (groups.shape != (4, self.batch) or self.max_members == 1):
            raise ValueError(
                f"groups has shape {tuple(groups.shape)}: give [4, {self.batch}], and none where max_members is 1"
            )
        _schedule_kernel[(self.shares,)](
            self.table, rows, kv_lens, groups, self.batch, self.sliding_window,
            0 if groups is None else groups.stride(0),
            BLOCK_N=self.config.block_n,
            MIN_BLOCKS=triton.cdiv(self.config.min_tokens, self.config.block_n),
            PARTS_AT_A_TIME=self.parts_at_a_time,
            COMBINE_BLOCKS=COMBINE_BLOCKS,
            ALONE_BLOCKS=ALONE_BLOCKS,
            BLOCK_B=tile.block_batch(self.batch),
            HAS_WINDOW=self.sliding_window > 0,
            HEADER=_HEADER,
            ITEM=_ITEM,
            PLACE=_PLACE,
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


@triton.jit(do_not_specialize=["batch", "window", "stride_groups"])
def _schedule_kernel(
    table_ptr,
    rows_ptr,
    kv_lens,
    groups_ptr,
    batch,
    window,
    stride_groups,
    BLOCK_N: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    PARTS_AT_A_TIME: tl.constexpr,
    COMBINE_BLOCKS: tl.constexpr,
    ALONE_BLOCKS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HEADER: tl.constexpr,
    ITEM: tl.constexpr,
    PLACE: tl.constexpr,
):
    """Write one share's first item; the first program also all items and positions."""
    position = tl.arange(0, BLOCK_B)
    inside = position < batch
    request = position
    leader = position
    members = tl.where(inside, 1, 0)
    shared_tokens = position * 0
    if groups_ptr is not None:
        request = tl.load(groups_ptr + position, mask=inside, other=0)
        leader = tl.load(groups_ptr + stride_groups + position, mask=inside, other=0)
        members = tl.load(groups_ptr + 2 * stride_groups + position, mask=inside, other=0)
        shared_tokens = tl.load(groups_ptr + 3 * stride_groups + position, mask=inside, other=0)
    row = tl.load(rows_ptr + request, mask=inside, other=0).to(tl.int32)
    kv_len = tl.load(kv_lens + request, mask=inside, other=0)

    # A position has its group's shared keys, if it begins the group and there are any, and then its own: one block at
    # least, as somebody has to write its output.
    shared = shared_tokens // BLOCK_N
    first_own = tl.where(shared > 0, shared, _first_block(kv_len, window, BLOCK_N, HAS_WINDOW))
    own = tl.where(inside, tl.maximum(tl.cdiv(kv_len, BLOCK_N) - first_own, 1), 0)
    of_group = tl.where(members > 0, shared, 0)
    total = tl.sum(of_group + own, 0)
    # One program combines a request's parts: of few kv heads a long request would have so many that this takes longer
    # than to read the keys. s blocks a share, and combining ceil(blocks / s) parts, are shortest together at the root.
    most = tl.maximum(tl.max(own, 0), tl.max(of_group, 0))
    least = tl.maximum(tl.sqrt(most * (COMBINE_BLOCKS / PARTS_AT_A_TIME)).to(tl.int32), MIN_BLOCKS)
    share = tl.maximum(tl.cdiv(total, tl.num_programs(0)), least)
    # Where shares that are hardly longer hold one item each, items begin at multiples of a share. What is left of an
    # item's last one is empty.
    alone = share * 0
    for more in tl.static_range(ALONE_BLOCKS, -1, -1):
        num_parts = tl.sum(tl.cdiv(own, share + more) + tl.cdiv(of_group, share + more), 0)
        alone = tl.where(num_parts <= tl.num_programs(0), share + more, alone)
    share = tl.where(alone > 0, alone, share)
    step = tl.where(alone > 0, alone, 1)
    own = tl.cdiv(own, step) * step
    of_group = tl.cdiv(of_group, step) * step
    own_end = tl.cumsum(of_group + own, 0)
    own_begin = own_end - own
    group_begin = own_begin - of_group

    own_parts = (own_end - 1) // share - own_begin // share + 1
    group_parts = tl.where(of_group > 0, (own_begin - 1) // share - group_begin // share + 1, 0)
    has_slots = (own_parts > 1) | (shared > 0)
    own_slots = tl.where(inside & has_slots, own_parts, 0)
    own_slot = tl.cumsum(group_parts * members + own_slots, 0) - own_slots
    group_slot = own_slot - group_parts * members
    own_slot = tl.where(has_slots, own_slot, -1)
    in_items = tl.where(of_group > 0, 1, 0)
    own_item = tl.cumsum(tl.where(inside, in_items + 1, 0), 0) - 1
    num_items = tl.sum(tl.where(inside, in_items + 1, 0), 0)

    index = tl.program_id(0)
    begin = index * share
    item = tl.sum(tl.where(inside & (own_end <= begin), in_items + 1, 0), 0)
    item += tl.sum(tl.where((of_group > 0) & (own_begin <= begin) & (own_end > begin), 1, 0), 0)
    record = table_ptr + HEADER + index * (1 + ITEM)
    tl.store(record, item)
    items = table_ptr + HEADER + tl.num_programs(0) * (1 + ITEM)
    _store_item(
        record + 1 + position * 0, own_begin, own_end, first_own, position, 1 + position * 0, own_slot, row, kv_len,
        inside & (own_item == item),
    )  # fmt: skip
    _store_item(
        record + 1 + position * 0, group_begin, own_begin, position * 0, position, members, group_slot, row,
        shared * BLOCK_N, (of_group > 0) & (own_item - 1 == item),
    )  # fmt: skip
    if index == 0:
        tl.store(table_ptr, share)
        tl.store(table_ptr + 1, num_items)
        _store_item(
            items + own_item * ITEM, own_begin, own_end, first_own, position, 1 + position * 0, own_slot, row, kv_len,
            inside,
        )  # fmt: skip
        _store_item(
            items + (own_item - 1) * ITEM, group_begin, own_begin, position * 0, position, members, group_slot, row,
            shared * BLOCK_N, of_group > 0,
        )  # fmt: skip
        if groups_ptr is not None:  # what stands at the beginning of the group
            group_slot = tl.gather(group_slot, leader, 0) + position - leader
            group_parts = tl.gather(group_parts, leader, 0)
            members = tl.gather(members, leader, 0)
        place = items + 2 * batch * ITEM + position * PLACE
        tl.store(place, request, mask=inside)
        tl.store(place + 1, group_parts + own_parts, mask=inside)
        tl.store(place + 2, own_slot, mask=inside)
        tl.store(place + 3, group_slot, mask=inside)
        tl.store(place + 4, group_parts, mask=inside)
        tl.store(place + 5, members, mask=inside)


@triton.jit
def _store_item(to, begin, end, first, position, members, slot, row, limit, mask):
    tl.store(to, begin, mask=mask)
    tl.store(to + 1, end, mask=mask)
    tl.store(to + 2, first, mask=mask)
    tl.store(to + 3, position, mask=mask)
    tl.store(to + 4, members, mask=mask)
    tl.store(to + 5, slot, mask=mask)
    tl.store(to + 6, row, mask=mask)
    tl.store(to + 7, limit, mask=mask)


@triton.jit(do_not_specialize=["batch", "window"])
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    partial_ptr,  # [slots, q_heads, V_DIM]
    lse_ptr,  # [slots, q_heads], base 2
    arrivals_ptr,  # [batch, tiles]
    sinks_ptr,
    schedule_ptr,
    table_ptr,  # of pages; None where rows are contiguous
    batch,
    scale,
    cap,
    window,
    v_scale,
    stride_table,
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
    ALL_STAGES: tl.constexpr,  # where those of several requests are
    HEADS_P2: tl.constexpr,  # heads in a tile, as a power of 2
    MEMBERS: tl.constexpr,  # most requests in a tile
    MEMBERS_P2: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    USE_TMA: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PAGE: tl.constexpr,
    HEADER: tl.constexpr,
    ITEM: tl.constexpr,
    PLACE: tl.constexpr,
):
    """softmax(q k^T * sm_scale) v over one share of the keys, for the query heads of one tile of a kv head."""
    head_tiles: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    tile_index = tl.program_id(0)
    kv_head = tile_index // head_tiles
    first_head = kv_head * GROUP + tile_index % head_tiles * BLOCK_H
    heads_here = tl.minimum(GROUP - tile_index % head_tiles * BLOCK_H, BLOCK_H)
    in_tile = tl.arange(0, BLOCK_H)
    # Row i of the tile is a head of the item's member i // GROUP.
    member = in_tile * 0
    head = first_head + in_tile
    if MEMBERS > 1:
        member = in_tile // GROUP
        head = first_head + in_tile % GROUP
    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_DV)

    index = tl.program_id(1)
    share = tl.load(schedule_ptr)
    num_items = tl.load(schedule_ptr + 1)
    record = schedule_ptr + HEADER + index * (1 + ITEM)
    items = schedule_ptr + HEADER + tl.num_programs(1) * (1 + ITEM)
    places = items + 2 * batch * ITEM
    item = tl.load(record)
    # Read with the number, and not when that is known: behind the last share that has an item is anything.
    begin, end, first, position, members, slot, row, limit = _load_item(record + 1, True)
    block = index * share
    share_end = block + share
    while (block < share_end) & (item < num_items):
        # What comes next is read while this is computed.
        item += 1
        (
            next_begin, next_end, next_first, next_position, next_members, next_slot, next_row, next_limit
        ) = _load_item(items + item * ITEM, item < num_items)  # fmt: skip

        stop = tl.minimum(end, share_end)
        lo = (block - begin + first) * BLOCK_N
        hi = tl.minimum((stop - begin + first) * BLOCK_N, limit)
        is_row = in_tile < heads_here
        if MEMBERS > 1:
            is_row = member < members
        request = tl.load(places + (position + member) * PLACE, mask=is_row, other=0).to(tl.int64)
        is_value = is_row[:, None] & (dim_v < V_DIM)[None, :]
        q = tl.load(
            q_ptr + (request * stride_q_token + head * stride_q_head)[:, None] + dim[None, :],
            mask=is_row[:, None] & (dim < DIM)[None, :],
            other=0.0,
        ).to(DOT_DTYPE)
        k_base = k_ptr + kv_head.to(tl.int64) * stride_k_head
        v_base = v_ptr + kv_head.to(tl.int64) * stride_v_head
        if table_ptr is None:
            pages = None
            k_base += row.to(tl.int64) * stride_k_row
            v_base += row.to(tl.int64) * stride_v_row
        else:
            pages = table_ptr + row.to(tl.int64) * stride_table
        k_row = tile.open_row(k_base, stride_k_token, limit, DIM, BLOCK_N, BLOCK_D, USE_TMA)
        v_row = tile.open_row(v_base, stride_v_token, limit, V_DIM, BLOCK_N, BLOCK_DV, USE_TMA)
        last_key = tl.zeros([BLOCK_H], dtype=tl.int32) + (limit - 1)
        acc = tl.zeros([BLOCK_H, BLOCK_DV], dtype=tl.float32)
        row_max = tl.full([BLOCK_H], float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_H], dtype=tl.float32)
        acc, row_max, row_sum = tile.attend(
            acc, row_max, row_sum, q, k_row, v_row, pages, stride_k_token, stride_v_token,
            lo, hi, limit, last_key, scale, cap, window,
            DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True, HAS_CAP, HAS_WINDOW, USE_TMA, True, DOT_DTYPE, PAGE,
        )  # fmt: skip

        if slot < 0:  # all of its request
            if HAS_SINKS:
                sink = tl.load(sinks_ptr + head, mask=is_row, other=0.0).to(tl.float32) * 1.4426950408889634
                with_sink = tl.maximum(row_max, sink)
                rescale = tl.exp2(row_max - with_sink)
                row_sum = row_sum * rescale + tl.exp2(sink - with_sink)
                acc *= rescale[:, None]
            acc *= (v_scale / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
            tl.store(
                out_ptr + (request * stride_out_token + head * stride_out_head)[:, None] + dim_v[None, :],
                acc.to(out_ptr.dtype.element_ty),
                mask=is_value,
            )
        else:
            part = (slot + (index - begin // share) * members + member).to(tl.int64) * Q_HEADS + head
            # Of no key at all, for a group that shares all that a request has, the part is 0 with a weight of 0.
            tl.store(lse_ptr + part, row_max + tl.log2(row_sum), mask=is_row)
            acc *= (v_scale / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
            tl.store(partial_ptr + (part * V_DIM)[:, None] + dim_v[None, :], acc, mask=is_value)
            lane = tl.arange(0, MEMBERS_P2)
            is_member = lane < members
            place = places + (position + lane) * PLACE
            of = tl.load(place, mask=is_member, other=0)
            parts = tl.load(place + 1, mask=is_member, other=0)
            # All threads' parts are stored before one thread counts them, and read after it has.
            tl.debug_barrier()
            arrivals = arrivals_ptr + of * tl.num_programs(0) + tile_index
            arrived = tl.atomic_add(arrivals, 1, mask=is_member, sem="acq_rel", scope="gpu")
            complete = tl.where(is_member & (arrived == parts - 1), 1, 0)
            num_complete = tl.sum(complete, 0)
            if num_complete == 1:
                in_place = places + (position + tl.sum(complete * lane, 0)) * PLACE + tl.zeros([HEADS_P2], tl.int32)
                heads = tl.arange(0, HEADS_P2)
                _combine(
                    out_ptr, partial_ptr, lse_ptr, sinks_ptr, in_place, first_head + heads, heads < heads_here,
                    tl.sum(complete * parts, 0), stride_out_token, stride_out_head,
                    Q_HEADS, V_DIM, BLOCK_DV, HEADS_P2, BLOCK_S, COMBINE_STAGES, HAS_SINKS,
                )  # fmt: skip
            if MEMBERS > 1:  # noqa: SIM102  (one constexpr, one tensor)
                if num_complete > 1:
                    is_complete = tl.sum(tl.where(lane[None, :] == member[:, None], complete[None, :], 0), 1) > 0
                    _combine(
                        out_ptr, partial_ptr, lse_ptr, sinks_ptr, places + (position + member) * PLACE, head,
                        is_complete, tl.max(complete * parts, 0), stride_out_token, stride_out_head,
                        Q_HEADS, V_DIM, BLOCK_DV, BLOCK_H, 1, ALL_STAGES, HAS_SINKS,
                    )  # fmt: skip
            tl.store(arrivals, 0, mask=complete > 0)
        block = stop
        begin = next_begin
        end = next_end
        first = next_first
        position = next_position
        members = next_members
        slot = next_slot
        row = next_row
        limit = next_limit


@triton.jit
def _load_item(item, inside):
    return (
        tl.load(item, mask=inside, other=0),
        tl.load(item + 1, mask=inside, other=0),
        tl.load(item + 2, mask=inside, other=0),
        tl.load(item + 3, mask=inside, other=0),
        tl.load(item + 4, mask=inside, other=0),
        tl.load(item + 5, mask=inside, other=0),
        tl.load(item + 6, mask=inside, other=0),
        tl.load(item + 7, mask=inside, other=0),
    )


@triton.jit
def _combine(
    out_ptr, partial_ptr, lse_ptr, sinks_ptr, place, head, is_row, most_parts, stride_out_token, stride_out_head,
    Q_HEADS: tl.constexpr, V_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """out = sum_s 2^(lse_s - lse) partial_s for ROWS query heads of requests at ``place``; the group's parts first."""
    request = tl.load(place, mask=is_row, other=0).to(tl.int64)
    parts = tl.load(place + 1, mask=is_row, other=0)
    own_slot = tl.load(place + 2, mask=is_row, other=0)
    group_slot = tl.load(place + 3, mask=is_row, other=0)
    group_parts = tl.load(place + 4, mask=is_row, other=0)
    step = tl.load(place + 5, mask=is_row, other=0)
    dim = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([ROWS, BLOCK_DV], dtype=tl.float32)
    biggest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    if HAS_SINKS:  # a sink counts once
        biggest = tl.load(sinks_ptr + head, mask=is_row, other=0.0).to(tl.float32) * 1.4426950408889634
        total += 1.0
    for start in tl.range(0, most_parts, BLOCK_S, num_stages=STAGES):
        number = (start + tl.arange(0, BLOCK_S))[:, None]
        of_group = group_slot[None, :] + number * step[None, :]
        slot = tl.where(number < group_parts[None, :], of_group, own_slot[None, :] + number - group_parts[None, :])
        part = slot.to(tl.int64) * Q_HEADS + head[None, :]
        inside = (number < parts[None, :]) & is_row[None, :]
        # From L2: another processor wrote them.
        lse = tl.load(lse_ptr + part, mask=inside, other=float("-inf"), cache_modifier=".cg")
        values = tl.load(
            partial_ptr + (part * V_DIM)[:, :, None] + dim[None, None, :],
            mask=inside[:, :, None] & (dim < V_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        # Some part up to here holds a key that is seen, so that the maximum is finite for each head.
        new_biggest = tl.where(is_row, tl.maximum(biggest, tl.max(lse, 0)), 0.0)
        weight = tl.exp2(lse - new_biggest[None, :])
        rescale = tl.exp2(biggest - new_biggest)
        acc = acc * rescale[:, None] + tl.sum(values * weight[:, :, None], 0)
        total = total * rescale + tl.sum(weight, 0)
        biggest = new_biggest
    acc = acc / tl.where(is_row, total, 1.0)[:, None]
    tl.store(
        out_ptr + (request * stride_out_token + head * stride_out_head)[:, None] + dim[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=is_row[:, None] & (dim < V_DIM)[None, :],
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
        q, k, v, out, workspace.partial, workspace.lse, workspace.arrivals, sinks, schedule.table,
        None if pages is None else pages.table, batch, scale, cap, sliding_window, v_scale,
        0 if pages is None else pages.table.stride(0),
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
        ALL_STAGES=schedule.all_stages,
        HEADS_P2=schedule.heads_p2,
        MEMBERS=schedule.max_members,
        MEMBERS_P2=triton.next_power_of_2(schedule.max_members),
        HAS_CAP=logit_cap > 0,
        HAS_WINDOW=sliding_window > 0,
        HAS_SINKS=sinks is not None,
        USE_TMA=use_tma,
        DOT_DTYPE=tile.dot_dtype(q.dtype),
        PAGE=0 if pages is None else pages.page_tokens,
        HEADER=_HEADER,
        ITEM=_ITEM,
        PLACE=_PLACE,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip


def choose_config(capability: int, width: int, dtype: torch.dtype, batch: int, block_h: int) -> DecodeConfig:
    """Tile sizes for a device (90 = sm_90, 0 = interpreter), the widest head, requests, and query heads in a tile.

    From ``bench/sweep.py decode``. Few requests are read fastest by one program a processor (1 x 8192 on an H100:
    19.4 us, 22.3 with two) that has four blocks under way (1 x 131072 on an H200: 139.5 us, 144 with three). Of more,
    whose lengths differ, one program reads while the other one ends an item (16 x 1500 to 16000 on an H200: 160 us, 169
    with one; 16 x 4096, of which no share holds two, 73 and 70). Many requests take four (64 x 2048 on an H100: 184.4
    us, 189.9 with two); a share of 128 tokens is worth a program (1 x 1024: 9.0 us,
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
        programs = 2 if batch < MANY else 4
        return DecodeConfig(block_n=128, num_warps=4, num_stages=stages, min_tokens=128, programs=programs)
    if batch <= FEW and not tile.has_little_shared(capability):
        return DecodeConfig(block_n=64, num_warps=4, num_stages=4, min_tokens=128, programs=1)
    programs = 1 if batch <= FEW else 2 if batch < MANY else 4
    return DecodeConfig(block_n=64, num_warps=4, num_stages=stages, min_tokens=128, programs=programs)


def first_batches(max_batch: int) -> list[int]:
    """The fewest requests for each variant that ``decode_attention`` compiles, up to ``max_batch``."""
    return [batch for batch in sorted({*tile.batch_blocks(max_batch), FEW + 1, MANY}) if batch <= max_batch]
