"""The memory that kernels are timed on: rows, homes and stock pools hold the same keys."""

from __future__ import annotations

import pytest
import torch
from attention_bench import Inputs, Memory, Shape, chat, equal


@pytest.fixture(scope="module")
def memory() -> Memory:
    return Memory(64 << 20, "host", page_bytes=1 << 20)


@pytest.mark.parametrize(
    "shape",
    [
        equal(2, 100, 7, 4, 2, 32),
        Shape((300, 0, 5), (1, 9, 2), 4, 1, 64),
        equal(3, 2000, 1, 4, 2, 64),  # too long for 32 layers: fewer
        Shape((60,) * 4, (1,) * 4, 4, 2, 32, shared=32, sharers=2),
    ],
)
def test_rows_homes_and_pools_agree(memory: Memory, shape: Shape) -> None:
    inputs = Inputs(shape, memory, least_page_tokens=16)
    assert inputs.q.shape[0] == sum(shape.news) and inputs.kv_lens.tolist() == list(shape.lengths)
    table = inputs.page_table(16)
    starts, indices = inputs.kv_indptr.tolist(), inputs.pool_indices()
    for layer in (0, 3):
        for part in (0, 1):
            home = inputs.homes[layer][part].unflatten(0, (-1, 16))
            for b, length in enumerate(shape.lengths):
                row = inputs.views[layer][part][b, :length]
                assert torch.equal(home[table[b].long()].flatten(0, 1)[:length], row)
                pool = inputs.pools[layer][part]
                assert torch.equal(pool[indices[starts[b] : starts[b] + length].long()], row)
                assert torch.equal(pool[inputs.slots[b, :length].long()], row)
    assert not torch.equal(inputs.views[0][0], inputs.views[1][0]), "layers are apart"


def test_requests_that_share_have_the_same_pages_and_are_no_neighbours(memory: Memory) -> None:
    inputs = Inputs(Shape((60,) * 4, (1,) * 4, 4, 2, 32, shared=32, sharers=2), memory, least_page_tokens=16)
    table = inputs.page_table(16)
    for slots, shared in ((table, 2), (inputs.slots, 32)):
        assert torch.equal(slots[:2, :shared], slots[2:, :shared])
        assert not (slots[0, :shared] == slots[1, :shared]).any()
        assert not (slots[0, shared:] == slots[2, shared:]).any()


def test_window_is_shuffled(memory: Memory) -> None:
    assert memory.page_of.tolist() != list(range(memory.num_pages))


def test_chats_are_mixed_and_repeatable() -> None:
    first, again = chat(64, decode=True), chat(64, decode=True)
    assert first == again and len(set(first.lengths)) > 32 and set(first.news) == {1}
    assert max(chat(64, decode=False).news) > 64


def test_work_of_a_shape() -> None:
    shape = equal(2, 3, 2, 4, 1, 8)
    # Queries at positions 3 and 4 see 4 and 5 keys; two products of a multiplication and an addition each.
    assert shape.flops == 2 * 2 * 2 * 4 * 8 * (4 + 5)
    assert shape.kv_bytes == 2 * 5 * (2 * 8) * 2
