"""The arithmetic of ``prefill_hopper``'s key blocks, run as plain Python: the kernel itself needs a GPU."""

import types

from hypothesis import given
from hypothesis import strategies as st
from vtensor_kernels import prefill_hopper
from vtensor_kernels.prefill_hopper import BLOCK_M, BLOCK_N

_LANGUAGE = types.SimpleNamespace(minimum=min, maximum=max, where=lambda condition, a, b: a if condition else b)


def plain(kernel: object) -> types.FunctionType:
    """A device function on Python's numbers."""
    return types.FunctionType(kernel.fn.__code__, {"gl": _LANGUAGE})


@given(data=st.data(), group=st.sampled_from([1, 3, 4, 8]), causal=st.booleans(), splits=st.integers(1, 6))
def test_every_key_counts_once_and_nothing_behind_the_row_is_read(
    data: st.DataObject, group: int, causal: bool, splits: int
) -> None:
    lengths = st.one_of(st.integers(1, 1500), st.sampled_from([127, 128, 129, 255, 256, 257, 1024]))
    kv_len = data.draw(lengths)
    q_len = data.draw(st.one_of(st.just(kv_len), st.integers(1, kv_len), st.integers(1, 1500)))
    tile_index = data.draw(st.integers(0, (q_len * group - 1) // BLOCK_M))
    highest = (tile_index * BLOCK_M + BLOCK_M - 1) // group
    expected = max(0, min(kv_len, kv_len - q_len + highest + 1)) if causal else kv_len

    counted: list[int] = []
    for split in range(splits):
        end, first, last, ragged = plain(prefill_hopper._blocks)(
            q_len, kv_len, tile_index, split, splits, group, BLOCK_M, BLOCK_N, causal, splits > 1
        )
        assert end == expected
        for i in range(last - first):
            limit = end - plain(prefill_hopper._block)(i, first, last, ragged) * BLOCK_N
            start = max(limit - BLOCK_N, 0)
            assert start + BLOCK_N <= kv_len or kv_len < BLOCK_N, "the copy engine would read behind the row"
            assert limit == start + BLOCK_N or i < 1 + ragged, "only the first blocks are masked"
            counted += range(start, min(limit, start + BLOCK_N))
    assert sorted(counted) == list(range(expected))


def test_entries_without_queries_have_no_blocks() -> None:
    _, first, last, _ = plain(prefill_hopper._blocks)(0, 500, 0, 0, 1, 4, BLOCK_M, BLOCK_N, True, False)
    assert first == last
