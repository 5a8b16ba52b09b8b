"""Who computes what in a prefill: every tile once, with all its keys, longest first."""

from collections import defaultdict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vtensor_kernels import prefill, prefill_schedule
from vtensor_kernels.prefill import LEVELS, PrefillConfig

# The interpreter takes as long for a tile of few queries as for one of many.
BLOCK_M = 64


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Numbers of queries and lengths of rows; some requests have no query, some more queries than keys."""
    size = draw(st.integers(1, 7))
    lengths = st.one_of(st.integers(0, 300), st.integers(0, 20000))
    kv_lens = draw(st.lists(lengths, min_size=size, max_size=size))
    q_lens = [draw(st.one_of(st.just(min(kv_len, 90)), st.integers(0, 60))) for kv_len in kv_lens]
    return q_lens, kv_lens


@pytest.mark.parametrize("causal", [True, False])
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=batches(), group=st.sampled_from([1, 3, 9]), kv_heads=st.sampled_from([1, 2]),
    splits=st.sampled_from([None, None, 1, 3]), known=st.booleans(), window=st.sampled_from([-1, 7, 900]),
)  # fmt: skip
def test_every_tile_is_there_once(
    device: torch.device,
    causal: bool,
    batch: tuple[list[int], list[int]],
    group: int,
    kv_heads: int,
    splits: int | None,
    known: bool,
    window: int,
) -> None:
    q_lens, kv_lens = batch
    config = PrefillConfig(BLOCK_M, 32, 4, 1, min_split_tokens=256, splits=splits)
    q = torch.empty(sum(q_lens), group * kv_heads, 16, device=device)
    k = torch.empty(1, 20000, kv_heads, 16, device="meta")
    rows = torch.arange(len(q_lens), device=device) + 7
    starts = torch.tensor([0, *q_lens], device=device).cumsum(0).int()
    schedule = prefill_schedule(
        q, k, k, rows, starts, torch.tensor(kv_lens, dtype=torch.int32, device=device), max(q_lens), causal=causal,
        sliding_window=window, max_kv_len=max(kv_lens) if known else None, config=config,
    )  # fmt: skip
    through_window = (1 if causal else 2) * window + -(-BLOCK_M // group) + 1 if window > 0 else 1 << 30

    pieces = [entry for entry in schedule.pieces.tolist() if entry[2]] if sum(q_lens) else []
    parts: dict[tuple[int, int], list[tuple[int, int, int]]] = defaultdict(list)
    lengths = []
    for row, q_start, q_len, kv_len, tile_index, split, of, slot in pieces:
        request = row - 7
        assert (q_start, q_len, kv_len) == (starts[request], q_lens[request], kv_lens[request])
        parts[request, tile_index].append((split, of, slot))
        sees = kv_len
        if causal and 2 * q_len > kv_len:
            sees = max(min(kv_len - q_len + ((tile_index + 1) * BLOCK_M - 1) // group + 1, kv_len), 0)
        sees = min(sees, through_window)
        longest = min(kv_len, through_window)
        assert splits is not None or of <= max(-(-longest // 256), 1), "pieces without keys"
        lengths.append(sees // of)
    assert not sum(q_lens) or int(schedule.count[0]) == len(pieces)
    expected = {(request, n) for request, q_len in enumerate(q_lens) for n in range(-(-q_len * group // BLOCK_M))}
    assert set(parts) == expected
    combined, slots = {}, []
    for tile, found in parts.items():
        split, of, slot = (set(values) for values in zip(*found, strict=True))
        assert len(of) == 1 and sorted(split) == list(range(of.pop())) and len(found) == len(split)
        if len(found) > 1:
            slots += slot
            combined[tile] = (len(found), min(slot))
    assert len(set(slots)) == len(slots) and all(0 <= slot < schedule.num_slots for slot in slots)
    listed = {}
    for q_start, q_len, tile_index, of, slot, *_ in schedule.combined.tolist():
        if q_len:
            request = next(n for n, start in enumerate(starts.tolist()) if start == q_start and q_lens[n])
            listed[request, tile_index] = (of, slot)
    assert listed == combined
    step = max(min(max(kv_lens), through_window) // LEVELS, 1)
    levels = [length // step for length in lengths]
    assert levels == sorted(levels, reverse=True), "the longest come first"


def test_one_long_row_beside_many_short_ones_is_split(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """No piece is longer than a program's mean work, although there are tiles for all."""
    monkeypatch.setattr(prefill.tile, "processors", lambda device: 16)
    lens, kv_lens = [256, *[64] * 31], [30000, *[576] * 31]
    q = torch.empty(sum(lens), 4, 16, device=device)
    k = torch.empty(1, 30000, 1, 16, device="meta")
    schedule = prefill_schedule(
        q, k, k, torch.arange(32, device=device), torch.tensor([0, *lens], device=device).cumsum(0).int(),
        torch.tensor(kv_lens, dtype=torch.int32, device=device), 256, config=PrefillConfig(128, 128, 8, 1),
    )  # fmt: skip
    pieces = [entry for entry in schedule.pieces.tolist() if entry[2]]
    work = [kv_len / of for _, _, _, kv_len, _, _, of, _ in pieces]
    assert max(work) <= 1.1 * sum(work) / 16


@pytest.mark.parametrize(
    ("lens", "max_q_len", "max_kv_len"),
    [([300, 200], 10, 8192), ([300, 200], 100, 9000), ([16], 8, 512), ([16], 8, 2048)],
)
def test_bounds_that_a_caller_breaks_reach_nothing_behind_the_table(
    device: torch.device, lens: list[int], max_q_len: int, max_kv_len: int
) -> None:
    """Rows longer than ``max_kv_len``, and more queries than ``max_q_len``."""
    memory: list[torch.Tensor] = []
    empty = torch.empty

    def guarded(num_rows: int, *shape: int, **options: object) -> torch.Tensor:
        memory.append(empty(num_rows + 64, *shape, **options).fill_(-7))  # type: ignore[arg-type]
        return memory[-1][:num_rows]

    q = empty(sum(lens), 4, 16, device=device)
    k = empty(1, 20000, 1, 16, device="meta")
    starts = torch.tensor([0, *lens], device=device).cumsum(0).int()
    kv_lens = torch.tensor([20000, 9000][: len(lens)], dtype=torch.int32, device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill.tile, "processors", lambda device: 4)
        patch.setattr(prefill.torch, "empty", guarded)
        schedule = prefill_schedule(
            q, k, k, torch.arange(len(lens), device=device), starts, kv_lens, max_q_len, max_kv_len=max_kv_len,
            config=PrefillConfig(32, 32, 4, 1, min_split_tokens=256),
        )  # fmt: skip
    assert (memory[0][-64:] == -7).all() and 0 < schedule.count[0] <= len(schedule.pieces)
    assert all(entry[7] < schedule.num_slots for entry in schedule.pieces.tolist() if entry[6] > 1)


def test_a_long_row_is_split_by_what_a_window_shows_of_it(device: torch.device) -> None:
    """One request of few queries: by all keys it would be in 32 pieces, of which 28 have none."""
    q = torch.empty(16, 4, 16, device=device)
    k = torch.empty(1, 65536, 1, 16, device="meta")
    rows, starts, kv_lens = (
        torch.tensor(values, dtype=torch.int32, device=device) for values in ([0], [0, 16], [65000])
    )
    config = PrefillConfig(128, 128, 8, 1, min_split_tokens=1024)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill.tile, "processors", lambda device: 132)
        for window, pieces in ((-1, 32), (4000, 4)):
            made = prefill_schedule(q, k, k, rows, starts, kv_lens, 16, sliding_window=window, config=config)
            assert int(made.count[0]) == pieces
