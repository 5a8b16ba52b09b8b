"""Decode against the reference: every feature, dtype and edge, one split and many, NaN behind every row's end."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator

import pytest
import torch
from attention_cases import Case, make_case
from vtensor_kernels import DecodeSchedule, DecodeWorkspace, decode, decode_attention, tile

EDGES = [1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257]


def run(case: Case, workspace: DecodeWorkspace | None = None, **arguments: object) -> torch.Tensor:
    out = case.empty_out()
    if workspace is None:
        batch, q_heads, _ = case.q.shape
        workspace = DecodeWorkspace(batch, q_heads, case.v.shape[3], case.q.device)
        workspace.partial.fill_(float("nan"))
        workspace.lse.fill_(float("nan"))
    decode_attention(
        case.q, case.k, case.v, out, case.rows, case.kv_lens, workspace=workspace, **case.options, **arguments
    )
    return out


def check(case: Case, **arguments: object) -> None:
    case.assert_close(run(case, **arguments))


def decode_case(device: torch.device, kv_lens: list[int], **options: object) -> Case:
    return make_case(device, [1] * len(kv_lens), kv_lens, **options)


@pytest.fixture(params=["pointer", "tma"])
def loads(request: pytest.FixtureRequest, device: torch.device) -> str:
    if request.param == "tma" and device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("bulk copies need sm_90")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mixed_lengths(device: torch.device, loads: str, dtype: torch.dtype) -> None:
    check(decode_case(device, [69, 1, 1500, 64], dtype=dtype), loads=loads)


@pytest.mark.parametrize("edge", EDGES)
def test_row_length_at_tile_edges(device: torch.device, loads: str, edge: int) -> None:
    check(decode_case(device, [edge], q_heads=2, kv_heads=1), loads=loads)


@pytest.mark.parametrize(
    "options",
    [
        {"logit_cap": 2.0},
        {"sliding_window": 7},
        {"sliding_window": 300},
        {"sliding_window": 5000},
        {"sinks": True},
        {"k_scale": 0.25, "v_scale": 2.0},
        {"logit_cap": 2.0, "sliding_window": 300, "sinks": True, "k_scale": 0.5, "v_scale": 2.0},
    ],
    ids=str,
)
def test_features(device: torch.device, loads: str, options: dict) -> None:
    check(decode_case(device, [20, 700], **options), loads=loads)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(device: torch.device, loads: str, head_dim: int) -> None:
    check(decode_case(device, [150], head_dim=head_dim, q_heads=2, kv_heads=1), loads=loads)


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(3, 3), (5, 1), (14, 2), (70, 1)])
def test_group_sizes(device: torch.device, q_heads: int, kv_heads: int) -> None:
    check(decode_case(device, [150, 33], q_heads=q_heads, kv_heads=kv_heads, v_head_dim=32))


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_cache(device: torch.device, loads: str, kv_dtype: torch.dtype) -> None:
    if device.type == "cuda" and kv_dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs sm_89")
    check(decode_case(device, [150, 33], kv_dtype=kv_dtype, k_scale=0.5, v_scale=2.0), loads=loads)


@pytest.mark.parametrize("sinks", [False, True])
def test_empty_rows_give_zeros(device: torch.device, loads: str, sinks: bool) -> None:
    case = decode_case(device, [0, 600, 0], sinks=sinks)
    out = run(case, loads=loads)
    assert not out[0].any()
    case.assert_close(out)


PAGED_CASES: list[tuple[list[int], dict]] = [
    ([edge], {"q_heads": 2, "kv_heads": 1}) for edge in (1, 127, 128, 129, 255, 256, 257)
] + [
    ([69, 1, 1500, 64, 0, 128], {}),
    ([150, 700], {"logit_cap": 2.0, "sliding_window": 300, "sinks": True}),
    ([150, 33], {"kv_dtype": torch.float8_e5m2, "k_scale": 0.5, "v_scale": 2.0}),
    ([150, 300], {"head_dim": 80, "v_head_dim": 64, "dtype": torch.bfloat16}),
]


@pytest.mark.parametrize(("kv_lens", "options"), PAGED_CASES, ids=str)
@pytest.mark.parametrize("page_tokens", [128, 256])
def test_pages(device: torch.device, kv_lens: list[int], options: dict, page_tokens: int) -> None:
    """As from rows, to the bit."""
    case = decode_case(device, kv_lens, **options)
    expected = run(case)
    k, v, pages = case.in_pages(page_tokens)
    paged = dataclasses.replace(case, k=k, v=v)
    out = run(paged, pages=pages)
    assert torch.equal(out, expected)
    case.assert_close(out)


def test_pages_that_are_refused(device: torch.device) -> None:
    case = decode_case(device, [150, 33])
    k, v, pages = case.in_pages(128)
    paged = dataclasses.replace(case, k=k, v=v)
    for wrong, message in (
        (dataclasses.replace(pages, page_tokens=96), "use a power of 2"),
        (dataclasses.replace(pages, page_tokens=16), "use a power of 2"),
        (dataclasses.replace(pages, table=pages.table.long()), "int32"),
        (dataclasses.replace(pages, table=pages.table[:, ::2]), "contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            run(paged, pages=wrong)
    with pytest.raises(ValueError, match="num_slots"):
        run(case, pages=pages)
    with pytest.raises(ValueError, match="loads='auto'"):
        run(paged, pages=pages, loads="tma")


def grouped(case: Case, members: list[list[int]], tokens: list[int]) -> torch.Tensor:
    """Make requests of a group begin with the same keys, and say so: the argument ``groups``."""
    alone = [[request] for request in range(len(case.kv_lens)) if not any(request in group for group in members)]
    groups = torch.zeros(4, len(case.kv_lens), dtype=torch.int32)
    position = 0
    for requests, shared in [*zip(members, tokens, strict=True), *((request, 0) for request in alone)]:
        for place, request in enumerate(requests):
            count = 0 if place else len(requests)
            groups[:, position + place] = torch.tensor([request, position, count, shared], dtype=torch.int32)
            for part in (case.k, case.v):
                part[case.rows[request], :shared] = part[case.rows[requests[0]], :shared]
        position += len(requests)
    return groups.to(case.q.device)


def _backwards_over_programs(*ends: int) -> Iterator[int] | range:
    """The interpreter's ``range``: loops within a kernel stay as they are."""
    over_programs = sys._getframe(1).f_code.co_qualname == "GridExecutor.__call__"
    return reversed(range(*ends)) if over_programs else range(*ends)


GROUPED_CASES: list[tuple[list[int], list[list[int]], list[int], dict]] = [
    ([300, 129], [[1, 0]], [128], {}),
    ([700, 69, 800, 750, 1, 1000], [[2, 0, 3]], [640], {}),
    ([1500, 1400, 1300, 1290, 1289], [[4, 2], [0, 3]], [1280, 256], {}),
    ([300] * 9, [[0, 2, 4, 6], [8, 1]], [256, 128], {}),
    ([129] * 8, [[0, 1, 2, 3, 4, 5, 6, 7]], [128], {}),
    ([128, 256, 700], [[0, 1]], [128], {}),  # all that one has
    # A block alone; and what is shared crosses from a share into the next, with two programs or with eight.
    ([68, 130, 136, 131, 33], [[0, 1], [2, 3]], [64, 128], {}),
    ([70, 66, 132, 190, 48, 3, 89], [[0, 1], [2, 3]], [64, 128], {}),
    ([600, 0, 700], [[0, 2]], [512], {"q_heads": 8, "kv_heads": 1}),
    ([600, 650, 700], [[0, 2]], [512], {"q_heads": 6, "kv_heads": 2, "sinks": True, "logit_cap": 2.0}),
    ([600, 650, 700], [[0, 2, 1]], [512], {"kv_dtype": torch.float8_e5m2, "k_scale": 0.5, "v_scale": 2.0}),
]


# Any two of the three with each case, and any three of them with every other case.
GROUPED_WAYS = [
    (*case, (1, 4)[(number + paged + backwards) % 2], paged, backwards)
    for number, case in enumerate(GROUPED_CASES)
    for paged, backwards in itertools.product((False, True), repeat=2)
]


@pytest.mark.parametrize(
    ("kv_lens", "members", "tokens", "options", "programs", "paged", "backwards"), GROUPED_WAYS, ids=str
)
def test_groups_that_share_keys(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    kv_lens: list[int],
    members: list[list[int]],
    tokens: list[int],
    options: dict,
    programs: int,
    paged: bool,
    backwards: bool,
) -> None:
    """However they are cut, whoever is last; the counters are 0 again, and nobody reads a follower's shared keys."""
    if backwards:
        if device.type == "cuda":
            pytest.skip("a GPU runs programs as it likes")
        # The interpreter's programs, the last one first: what a group shares is then complete behind all else.
        monkeypatch.setattr(sys.modules["triton.runtime.interpreter"], "range", _backwards_over_programs, raising=False)
    case = decode_case(device, kv_lens, **options)
    groups = grouped(case, members, tokens)
    batch, q_heads, _ = case.q.shape
    workspace = DecodeWorkspace(batch, q_heads, case.v.shape[3], device, kv_heads=case.k.shape[2])
    for part in (workspace.partial, workspace.lse):
        part.fill_(float("nan"))
    config = decode.DecodeConfig(block_n=64, num_warps=4, num_stages=2, min_tokens=64, programs=programs)
    schedule = DecodeSchedule(workspace, case.k, batch, config=config)
    assert schedule.max_members >= max(map(len, members))
    schedule.update(case.rows, case.kv_lens, groups)
    read, pages = case, None
    if paged:
        k, v, pages = case.in_pages(128)
        read = dataclasses.replace(case, k=k, v=v)
        for requests, shared in zip(members, tokens, strict=True):
            for request in requests[1:]:
                pages.table[case.rows[request], : shared // 128] = 1 << 20
    out = run(read, workspace=workspace, schedule=schedule, pages=pages)
    case.assert_close(out)
    assert not workspace.arrivals.any()


def test_groups_that_are_refused(device: torch.device) -> None:
    case = decode_case(device, [300, 129], sliding_window=64)
    workspace = DecodeWorkspace(2, 4, 64, device, kv_heads=2)
    groups = torch.zeros(4, 2, dtype=torch.int32, device=device)
    windowed = DecodeSchedule(workspace, case.k, 2, sliding_window=64)
    with pytest.raises(ValueError, match="max_members"):
        windowed.update(case.rows, case.kv_lens, groups)
    with pytest.raises(ValueError, match=r"give \[4, 2\]"):
        DecodeSchedule(workspace, case.k, 2).update(case.rows, case.kv_lens, groups[:3])


@pytest.mark.parametrize(("q_heads", "num_parts"), [(64, 4), (32, 3), (32, 4)])
def test_more_parts_than_are_combined_at_a_time(device: torch.device, q_heads: int, num_parts: int) -> None:
    """One part at a time or two, of which the last turn may have one left."""
    config = decode.DecodeConfig(block_n=64, num_warps=4, num_stages=1, min_tokens=64, programs=1)
    check(decode_case(device, [num_parts * 64], q_heads=q_heads, kv_heads=1, head_dim=128), config=config)


def test_shares_cross_requests(device: torch.device) -> None:
    """Whatever the lengths, every request is computed once; the counters are 0 again, for the next call."""
    config = decode.DecodeConfig(block_n=32, num_warps=4, num_stages=1, min_tokens=32, programs=4)
    for kv_lens in ([700, 10, 90], [32] * 9, [33, 0, 31, 64, 1, 300, 65], [400, 1], [1, 400]):
        case = decode_case(device, kv_lens, q_heads=2, kv_heads=1)
        workspace = DecodeWorkspace(len(kv_lens), 2, 64, device)
        for _ in range(2):
            workspace.lse.fill_(float("nan"))
            workspace.partial.fill_(float("nan"))
            check(case, config=config, workspace=workspace)
            assert not workspace.arrivals.any()


@pytest.mark.parametrize(("heads", "kv_len"), [((8, 1), 8191), ((8, 1), 131071), ((32, 8), 8191), ((8, 1), 300)])
def test_one_request_is_cut_so_that_reading_and_combining_are_short_together(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int], kv_len: int
) -> None:
    """Within a fourth of the best share there is, in blocks of keys."""
    monkeypatch.setattr(tile, "processors", lambda device: 132)
    q_heads, kv_heads = heads
    k = torch.empty(1, 64, kv_heads, 128, device=device)
    config = decode.DecodeConfig(block_n=64, num_warps=4, num_stages=1, min_tokens=128, programs=1)
    schedule = DecodeSchedule(DecodeWorkspace(1, q_heads, 128, device, kv_heads=kv_heads), k, 1, config=config)
    lengths = torch.tensor([kv_len], dtype=torch.int32, device=device)
    schedule.update(torch.zeros_like(lengths), lengths)
    blocks, combined = -(-kv_len // 64), schedule.parts_at_a_time

    def cost(share: int) -> int:
        parts = -(-blocks // share)
        return share + (decode.COMBINE_BLOCKS * -(-parts // combined) if parts > 1 else 0)

    least = max(2, -(-blocks // schedule.shares))
    assert cost(int(schedule.table[0])) <= 1.25 * min(map(cost, range(least, blocks + 1)))


@pytest.mark.parametrize(
    ("kv_lens", "share"),
    [
        ([1024] * 8, 4),
        ([1024, 1000, 961] * 4, 8),
        ([600, 1300, 2000], 2),
        ([64] * 33, 1),
        ([1088] * 11, 6),
        ([4000, 2100, 70] * 5, None),
    ],
)
def test_a_share_holds_one_item_where_it_is_hardly_longer_then(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, kv_lens: list[int], share: int | None
) -> None:
    """And where it would be much longer, the keys are cut evenly, whoever they belong to."""
    monkeypatch.setattr(tile, "processors", lambda device: 132)
    batch = len(kv_lens)
    k = torch.empty(1, 64, 8, 128, device=device)
    config = decode.DecodeConfig(block_n=64, num_warps=4, num_stages=1, min_tokens=64, programs=2)
    schedule = DecodeSchedule(DecodeWorkspace(batch, 32, 128, device, kv_heads=8), k, batch, config=config)
    lengths = torch.tensor(kv_lens, dtype=torch.int32, device=device)
    schedule.update(torch.arange(batch, dtype=torch.int32, device=device), lengths)
    items = schedule.table[decode._HEADER + schedule.shares * (1 + decode._ITEM) :].cpu()
    begins, ends = items[: batch * decode._ITEM].view(batch, decode._ITEM)[:, :2].T
    blocks = [-(-length // 64) for length in kv_lens]
    assert begins[0] == 0 and begins[1:].equal(ends[:-1])
    if share is None:
        assert schedule.table[0] == -(-sum(blocks) // schedule.shares) and (ends - begins).tolist() == blocks
    else:
        assert (ends - begins).tolist() == [-(-length // share) * share for length in blocks]
        assert schedule.table[0] == share and ends[-1] <= schedule.shares * share


def test_what_a_group_shares_is_an_item_like_others(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an odd number of blocks, in shares of two."""
    monkeypatch.setattr(tile, "processors", lambda device: 132)
    k = torch.empty(1, 64, 8, 128, device=device)
    config = decode.DecodeConfig(block_n=64, num_warps=4, num_stages=1, min_tokens=64, programs=2)
    schedule = DecodeSchedule(DecodeWorkspace(4, 32, 128, device, kv_heads=8), k, 4, config=config)
    rows, lengths = (torch.tensor(values, dtype=torch.int32, device=device) for values in (range(4), [1024] * 4))
    groups = torch.tensor([[0, 1, 2, 3], [0] * 4, [4, 0, 0, 0], [448] * 4], dtype=torch.int32, device=device)
    schedule.update(rows, lengths, groups)
    items = schedule.table[decode._HEADER + schedule.shares * (1 + decode._ITEM) :].cpu()
    assert items[: 5 * decode._ITEM].view(5, decode._ITEM)[:, 0].tolist() == [0, 8, 18, 28, 38]


def test_one_schedule_serves_all_layers(device: torch.device) -> None:
    """Made before the lengths are known, updated once, used twice; and refused where it would be wrong."""
    case = decode_case(device, [1500, 1, 69], sliding_window=300)
    workspace = DecodeWorkspace(3, 4, 64, device, kv_heads=2)
    schedule = DecodeSchedule(workspace, case.k, 3, sliding_window=300)
    schedule.update(case.rows, torch.ones_like(case.kv_lens))
    schedule.update(case.rows, case.kv_lens)
    for seed in (1, 2):
        case.q = torch.randn(case.q.shape, generator=torch.Generator().manual_seed(seed)).to(case.q)
        check(case, workspace=workspace, schedule=schedule)
    with pytest.raises(ValueError, match="make a DecodeSchedule"):
        run(decode_case(device, [1500, 1, 69]), workspace=workspace, schedule=schedule)
    with pytest.raises(ValueError, match="kv_heads=1"):
        DecodeSchedule(DecodeWorkspace(3, 4, 64, device, kv_heads=64), case.k[:, :, :1], 3)


def test_larger_blocks(device: torch.device, loads: str) -> None:
    config = decode.DecodeConfig(block_n=64, num_warps=4, num_stages=2, min_tokens=64)
    check(decode_case(device, [63, 64, 65, 400, 1]), loads=loads, config=config)
    check(decode_case(device, [63, 400], sliding_window=100), loads=loads, config=config)


def test_many_requests(device: torch.device) -> None:
    check(decode_case(device, [1 + i % 5 for i in range(130)], q_heads=1, kv_heads=1, dtype=torch.float32))


def test_a_small_workspace_is_refused(device: torch.device) -> None:
    case = decode_case(device, [10, 20])
    workspace = DecodeWorkspace(1, 4, 64, device)
    with pytest.raises(ValueError, match="make a DecodeWorkspace"):
        decode_attention(
            case.q, case.k, case.v, case.empty_out(), case.rows, case.kv_lens, workspace=workspace, **case.options
        )


@pytest.mark.gpu
def test_graph_replays_follow_the_lengths() -> None:
    """A graph captured with short rows is right after rows and lengths have changed under it."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    case = decode_case(torch.device("cuda"), [3000, 10, 200])
    lens = case.kv_lens.clone()
    case.kv_lens.fill_(1)
    workspace = DecodeWorkspace(8, 4, 64, "cuda")
    out = case.empty_out()

    def launch() -> None:
        decode_attention(case.q, case.k, case.v, out, case.rows, case.kv_lens, workspace=workspace, **case.options)

    launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    case.kv_lens.copy_(lens)
    graph.replay()
    torch.cuda.synchronize()
    case.assert_close(out)
