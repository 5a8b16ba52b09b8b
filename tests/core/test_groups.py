"""Requests that begin with the same pages are read together: whatever the pages, nobody reads another's keys."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sgl_vtensor.core.groups import alone, group_prefixes, saved_tokens

PAGE_TOKENS = 16


@st.composite
def batches(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Page lists that share beginnings as a tree's do: each extends a beginning of one before, or begins anew."""
    lists: list[list[int]] = []
    fresh = 1
    for _ in range(draw(st.integers(1, 12))):
        base = draw(st.sampled_from([[], *lists]))
        own = draw(st.integers(0, 4))
        lists.append([*base[: draw(st.integers(0, len(base)))], *range(fresh, fresh + own)])
        fresh += own
    lists = draw(st.permutations(lists))
    pages = np.full((len(lists), 60), 7, dtype=np.int32)  # behind a list is what was there before
    for request, of in enumerate(lists):
        pages[request, : len(of)] = of
    return pages, np.array([len(of) for of in lists], dtype=np.int64)


@given(batch=batches(), max_members=st.integers(1, 5), min_pages=st.integers(1, 3))
def test_groups(batch: tuple[np.ndarray, np.ndarray], max_members: int, min_pages: int) -> None:
    pages, num_pages = batch
    order, leader, members, tokens = group_prefixes(
        pages, num_pages, page_tokens=PAGE_TOKENS, max_members=max_members, min_pages=min_pages
    ).tolist()
    assert sorted(order) == list(range(len(pages))), "every request once"
    position = 0
    while position < len(order):
        count = members[position]
        assert 1 <= count <= max_members
        group = range(position, position + count)
        shared, rest = divmod(tokens[position], PAGE_TOKENS)
        assert not rest
        assert shared >= min_pages if count > 1 else not shared
        first = pages[order[position], :shared].tolist()
        for place in group:
            assert leader[place] == position
            assert tokens[place] == tokens[position]
            assert members[place] == (count if place == position else 0)
            assert num_pages[order[place]] >= shared
            assert pages[order[place], :shared].tolist() == first, "another's keys would be read"
        position += count


def test_what_saves_most_is_grouped() -> None:
    pages = np.array([[1, 2, 3, 9], [1, 5, 6, 7], [1, 2, 3, 8], [4, 4, 4, 4]], dtype=np.int32)
    found = group_prefixes(pages, np.full(4, 4), page_tokens=PAGE_TOKENS, max_members=4, min_pages=1)
    together = [sorted(found[0, found[1] == leader].tolist()) for leader in np.flatnonzero(found[2])]
    assert sorted(together) == [[0, 2], [1], [3]], "three pages of two are more than one page of three"
    assert sorted(found[3].tolist()) == [0, 0, 3 * PAGE_TOKENS, 3 * PAGE_TOKENS]
    assert saved_tokens(found) == 3 * PAGE_TOKENS
    assert saved_tokens(alone(4)) == 0


def test_nothing_is_shared() -> None:
    pages = np.arange(12, dtype=np.int32).reshape(3, 4)
    groups = group_prefixes(pages, np.full(3, 4), page_tokens=PAGE_TOKENS, max_members=4, min_pages=1)
    assert np.array_equal(groups[1:], alone(3)[1:])
    full = group_prefixes(pages[:1].repeat(3, 0), np.zeros(3, np.int64), page_tokens=16, max_members=4, min_pages=1)
    assert np.array_equal(full, alone(3)), "none may be shared"
