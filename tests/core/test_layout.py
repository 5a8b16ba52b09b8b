"""Where a token's bytes lie: uniform strides across pages, whole granules, no two tensors on the same byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_vtensor.core.layout import (
    ALIGNMENT_BYTES,
    DEFAULT_MAX_WASTE,
    PAGE_TOKENS_CHOICES,
    KVLayout,
    kv_views,
    padded_stride_bytes,
    plan_layout,
)
from sgl_vtensor.errors import ConfigError

GRANULE = 2 << 20


def llama_8b(**changes: int) -> KVLayout:
    sizes = {"num_layers": 32, "num_kv_heads": 8, "head_dim": 128, "v_head_dim": 128, "itemsize": 2}
    return plan_layout(**(sizes | {"granule_bytes": GRANULE} | changes))  # type: ignore[arg-type]


def smollm2(granule_bytes: int = GRANULE, **changes: int) -> KVLayout:
    sizes = {"num_layers": 30, "num_kv_heads": 3, "head_dim": 64, "v_head_dim": 64, "itemsize": 2}
    return plan_layout(**(sizes | {"granule_bytes": granule_bytes} | changes))  # type: ignore[arg-type]


def test_llama_8b_fills_granules_without_padding() -> None:
    layout = llama_8b()
    assert layout.token_bytes == layout.token_stride_bytes == 131072
    assert (layout.page_tokens, layout.page_bytes, layout.waste) == (16, GRANULE, 0)


def test_llama_8b_in_fp8_has_half_the_stride() -> None:
    assert llama_8b(itemsize=1).token_stride_bytes == 65536
    assert llama_8b(itemsize=1, page_tokens=32).page_bytes == GRANULE


def test_smollm2_is_padded_no_more_than_it_must() -> None:
    layout = smollm2()
    assert layout.token_bytes == 23040
    assert layout.waste <= DEFAULT_MAX_WASTE
    finer = [smollm2(page_tokens=tokens) for tokens in PAGE_TOKENS_CHOICES if tokens < layout.page_tokens]
    assert all(candidate.waste > DEFAULT_MAX_WASTE for candidate in finer)


def test_where_every_choice_wastes_much_the_least_is_taken() -> None:
    layout = plan_layout(
        num_layers=1, num_kv_heads=1, head_dim=8, v_head_dim=8, itemsize=2, granule_bytes=GRANULE, max_waste=0.1
    )
    assert layout.page_tokens == PAGE_TOKENS_CHOICES[-1]
    assert layout.waste > 0.1


sizes = st.integers(1, 40)


@given(
    num_layers=sizes,
    num_kv_heads=st.integers(1, 16),
    head_dim=st.integers(1, 256),
    v_head_dim=st.integers(1, 256),
    itemsize=st.sampled_from((1, 2, 4)),
    granule_bytes=st.sampled_from((4096, 65536, GRANULE)),
    page_tokens=st.none() | st.integers(1, 4096),
)
@settings(max_examples=300, deadline=None)
def test_any_model_gets_uniform_strides_over_whole_granules(
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    itemsize: int,
    granule_bytes: int,
    page_tokens: int | None,
) -> None:
    """A page is whole granules and whole strides, strides are aligned, and no smaller stride would do."""
    layout = plan_layout(
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        itemsize=itemsize,
        granule_bytes=granule_bytes,
        page_tokens=page_tokens,
    )
    assert page_tokens is None or layout.page_tokens == page_tokens
    assert layout.page_bytes == layout.page_tokens * layout.token_stride_bytes
    assert layout.page_bytes % granule_bytes == 0
    assert layout.token_stride_bytes % ALIGNMENT_BYTES == 0
    assert layout.token_stride_bytes >= layout.token_bytes
    assert 0 <= layout.waste < 1
    smaller = layout.token_stride_bytes - ALIGNMENT_BYTES
    while smaller >= layout.token_bytes and smaller > layout.token_stride_bytes - 20 * ALIGNMENT_BYTES:
        assert smaller * layout.page_tokens % granule_bytes, f"a stride of {smaller} bytes would do"
        smaller -= ALIGNMENT_BYTES
    ends = [layout.v_offset_bytes(layer) + layout.v_bytes for layer in range(num_layers)]
    starts = [layout.k_offset_bytes(layer) for layer in range(num_layers)]
    assert starts == [0, *ends[:-1]] and ends[-1] == layout.token_bytes


@pytest.mark.parametrize(("len_tokens", "num_pages"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_pages_that_tokens_fill(len_tokens: int, num_pages: int) -> None:
    assert llama_8b().num_pages(len_tokens) == num_pages


def test_stride_of_a_page_that_is_one_token() -> None:
    assert padded_stride_bytes(1, 1, 4096) == 4096
    assert padded_stride_bytes(4097, 1, 4096) == 8192
    assert padded_stride_bytes(1, 4096, 4096) == ALIGNMENT_BYTES


@pytest.mark.parametrize("name", ["num_layers", "num_kv_heads", "head_dim", "v_head_dim", "itemsize", "granule_bytes"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_must_be_positive(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be positive, not {value}"):
        llama_8b(**{name: value})


@pytest.mark.parametrize("value", [0, -16, (1 << 20) + 1])
def test_page_tokens_must_be_sensible(value: int) -> None:
    with pytest.raises(ConfigError, match=f"page_tokens must be between 1 and .*, not {value}"):
        llama_8b(page_tokens=value)


def test_views_cover_each_byte_of_a_token_once() -> None:
    """Numbering all elements through the views numbers the bytes of each token in order, over page borders too."""
    layout = plan_layout(
        num_layers=3, num_kv_heads=3, head_dim=8, v_head_dim=4, itemsize=4, granule_bytes=4096, page_tokens=5
    )
    num_tokens = 2 * layout.page_tokens
    flat = torch.zeros(2 * layout.page_bytes, dtype=torch.uint8)
    elements = layout.token_bytes // layout.itemsize
    for token in range(num_tokens):
        number = token * elements
        for layer in range(layout.num_layers):
            for view in kv_views(flat, layout, layer, torch.int32, (num_tokens,), (layout.token_stride_bytes,)):
                count = view[token].numel()
                view[token] = torch.arange(number, number + count, dtype=torch.int32).view(view[token].shape)
                number += count
    rows = flat.view(torch.int32).view(num_tokens, -1)
    assert torch.equal(rows[:, :elements].flatten(), torch.arange(num_tokens * elements, dtype=torch.int32))
    assert not rows[:, elements:].any(), "padding was written"


def test_views_of_rows_and_of_homes_have_the_shapes_that_kernels_take() -> None:
    layout = smollm2(granule_bytes=4096, page_tokens=16)
    flat = torch.empty(6 * layout.page_bytes, dtype=torch.uint8)
    strides = (3 * layout.page_bytes, layout.token_stride_bytes)
    k, v = kv_views(flat, layout, 29, torch.bfloat16, (2, 48), strides)
    assert k.shape == v.shape == (2, 48, 3, 64)
    assert k.stride() == (3 * layout.page_bytes // 2, layout.token_stride_bytes // 2, 64, 1)
    assert v.data_ptr() - k.data_ptr() == layout.k_bytes


def test_views_of_another_element_size_are_refused() -> None:
    layout = llama_8b()
    with pytest.raises(ConfigError, match="4 bytes an element"):
        kv_views(torch.empty(layout.page_bytes, dtype=torch.uint8), layout, 0, torch.float32, (1,), (16,))
