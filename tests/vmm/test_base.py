"""The sparse bitmap behind the check for double mappings, against a plain set."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sgl_vtensor.vmm.base import GranuleSet

RANGES = st.tuples(st.integers(0, 1200), st.integers(1, 600)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(st.lists(RANGES, max_size=30))
def test_granule_set_agrees_with_a_set(ranges: list[tuple[int, int]]) -> None:
    granules, model = GranuleSet(), set()
    held = []
    for start, end in ranges:
        overlaps = not model.isdisjoint(range(start, end))
        assert granules.overlaps(start, end) == overlaps
        if not overlaps:
            granules.add(start, end)
            model.update(range(start, end))
            held.append((start, end))
        elif held:
            first = held.pop(0)
            granules.remove(*first)
            model.difference_update(range(*first))
    for first in held:
        granules.remove(*first)
    assert not granules._words, "an empty set holds no memory"
