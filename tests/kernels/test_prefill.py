"""Prefix-prefill against the reference: every feature, dtype and edge, NaN behind every row's end."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, make_case
from vtensor_kernels import prefill, prefill_attention

# Lengths around the interpreter's tiles of 32 (and the GPU's of 64 and 128): one less, equal, one more.
EDGES = [1, 31, 32, 33, 63, 64, 65, 127, 128, 129]


def run(case: Case, **arguments: object) -> torch.Tensor:
    out = case.empty_out()
    prefill_attention(
        case.q, case.k, case.v, out, case.rows, case.qo_indptr, case.kv_lens, case.max_q_len,
        **case.options, **arguments,
    )  # fmt: skip
    return out


def check(case: Case, **arguments: object) -> None:
    case.assert_close(run(case, **arguments))


@pytest.fixture(params=["pointer", "tma"])
def loads(request: pytest.FixtureRequest, device: torch.device) -> str:
    if request.param == "tma" and device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("bulk copies need sm_90")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mixed_lengths(device: torch.device, loads: str, dtype: torch.dtype) -> None:
    check(make_case(device, [5, 40, 1, 33], [69, 40, 97, 64], dtype=dtype), loads=loads)


@pytest.mark.parametrize("edge", EDGES)
def test_new_tokens_at_tile_edges(device: torch.device, loads: str, edge: int) -> None:
    check(make_case(device, [edge], [edge], q_heads=2, kv_heads=1), loads=loads)


@pytest.mark.parametrize("edge", EDGES)
def test_row_length_at_tile_edges(device: torch.device, loads: str, edge: int) -> None:
    check(make_case(device, [1], [edge], q_heads=2, kv_heads=1), loads=loads)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"logit_cap": 2.0},
        {"sliding_window": 7},
        {"sliding_window": 40},
        {"sliding_window": 1000},
        {"sliding_window": 9, "causal": False},
        {"sinks": True},
        {"k_scale": 0.25, "v_scale": 2.0},
        {"logit_cap": 2.0, "sliding_window": 20, "sinks": True, "k_scale": 0.5, "v_scale": 2.0},
    ],
    ids=str,
)
def test_features(device: torch.device, loads: str, options: dict) -> None:
    check(make_case(device, [37, 3], [70, 90], **options), loads=loads)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(device: torch.device, loads: str, head_dim: int) -> None:
    check(make_case(device, [35], [50], head_dim=head_dim, q_heads=2, kv_heads=1), loads=loads)


def test_value_width_of_its_own(device: torch.device, loads: str) -> None:
    check(make_case(device, [35], [50], head_dim=96, v_head_dim=64), loads=loads)


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(3, 3), (3, 1), (10, 2), (8, 1)])
def test_group_sizes(device: torch.device, q_heads: int, kv_heads: int) -> None:
    check(make_case(device, [19, 2], [40, 33], q_heads=q_heads, kv_heads=kv_heads))


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_cache(device: torch.device, loads: str, kv_dtype: torch.dtype) -> None:
    if device.type == "cuda" and kv_dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs sm_89")
    check(make_case(device, [35], [80], kv_dtype=kv_dtype, k_scale=0.5, v_scale=2.0), loads=loads)


def test_queries_without_keys_give_zeros(device: torch.device, loads: str) -> None:
    case = make_case(device, [2, 3, 0, 4], [0, 1, 5, 40])
    out = run(case, loads=loads)
    assert not out[:4].any()
    case.assert_close(out)


@pytest.mark.parametrize("sinks", [False, True])
def test_lse(device: torch.device, sinks: bool) -> None:
    case = make_case(device, [7, 2, 3], [50, 0, 33], dtype=torch.float32, sinks=sinks)
    lse = torch.full(case.q.shape[:2], float("nan"), device=device)
    check(case, lse=lse)
    torch.testing.assert_close(lse.double(), case.expected(torch.float64, with_lse=True)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"sinks": True}, {"sliding_window": 150}, {"causal": False}, {"logit_cap": 2.0}], ids=str
)
def test_few_queries_on_a_long_prefix_are_split(
    device: torch.device, loads: str, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "MIN_SPLIT_TOKENS", 64)
    combined = []
    monkeypatch.setattr(prefill, "_combine_kernel", _Recorder(prefill._combine_kernel, combined))
    case = make_case(device, [3, 2], [431, 80], q_heads=2, kv_heads=1, dtype=torch.float32, **options)
    lse = torch.full(case.q.shape[:2], float("nan"), device=device)
    check(case, loads=loads, lse=lse)
    torch.testing.assert_close(lse.double(), case.expected(torch.float64, with_lse=True)[1], rtol=1e-5, atol=1e-5)
    assert combined, "the case is meant for the split path"


def test_pieces_of_several_kv_heads_stay_apart(
    device: torch.device, loads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "MIN_SPLIT_TOKENS", 64)
    combined = []
    monkeypatch.setattr(prefill, "_combine_kernel", _Recorder(prefill._combine_kernel, combined))
    check(make_case(device, [3], [431], q_heads=6, kv_heads=2), loads=loads)
    assert combined, "the case is meant for the split path"


def test_keys_of_rows_that_are_known_to_be_short_are_not_split(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "MIN_SPLIT_TOKENS", 64)
    combined = []
    monkeypatch.setattr(prefill, "_combine_kernel", _Recorder(prefill._combine_kernel, combined))
    case = make_case(device, [3, 2], [64, 20], q_heads=2, kv_heads=1, dtype=torch.float32)
    case.k, case.v = (torch.nn.functional.pad(part, (0, 0, 0, 0, 0, 100)) for part in (case.k, case.v))
    for max_kv_len, launches in ((64, 0), (65, 1), (None, 2)):
        check(case, max_kv_len=max_kv_len)
        assert len(combined) == launches, max_kv_len


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"k_scale": 0.5, "v_scale": 2.0}], ids=str)
@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), [(16, 8, 64), (32, 8, 128), (8, 8, 128), (24, 8, 64)])
def test_hopper_kernel(
    q_heads: int, kv_heads: int, head_dim: int, options: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enough tiles for every processor, several turns each; lengths around block edges, and rows without queries."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    from vtensor_kernels import prefill_hopper

    launches = []
    monkeypatch.setattr(
        prefill_hopper, "_prefill_hopper_kernel", _Recorder(prefill_hopper._prefill_hopper_kernel, launches)
    )
    q_lens = [1, 127, 0, 128, 129, 400, 5, 255, 256, 257, 3, 64, 1000, 2]
    kv_lens = [1, 128, 50, 255, 129, 1411, 0, 257, 300, 257, 1, 2000, 1000, 4095]
    check(
        make_case(
            torch.device("cuda"), q_lens, kv_lens, dtype=dtype, q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim,
            **options,
        )
    )  # fmt: skip
    assert launches, "the case is meant for the Hopper kernel"


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("even", [True, False])
def test_hopper_kernel_splits_and_uneven_rows(even: bool, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tiles on long rows; and rows whose stride is no multiple of a token's: no one descriptor spans those."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    from vtensor_kernels import prefill_hopper

    launches = []
    monkeypatch.setattr(
        prefill_hopper, "_prefill_hopper_kernel", _Recorder(prefill_hopper._prefill_hopper_kernel, launches)
    )
    monkeypatch.setattr(prefill, "MIN_SPLIT_TOKENS", 256)
    device = torch.device("cuda")
    case = make_case(
        device, [130, 5, 0, 64], [2000, 3001, 7, 64], q_heads=16, kv_heads=8, head_dim=128, dtype=torch.bfloat16,
        causal=causal,
    )  # fmt: skip
    if not even:
        rows, tokens, heads, dim = case.k.shape
        row_elements = tokens * heads * dim + 8
        for name in ("k", "v"):
            memory = torch.full((rows * row_elements,), float("nan"), dtype=case.k.dtype, device=device)
            view = memory.as_strided((rows, tokens, heads, dim), (row_elements, heads * dim, dim, 1))
            view.copy_(getattr(case, name))
            setattr(case, name, view)
    assert (prefill_hopper._tokens_in_all(case.k) > 0) == even
    combined = []
    monkeypatch.setattr(prefill, "_combine_kernel", _Recorder(prefill._combine_kernel, combined))
    check(case)
    assert launches and combined, "the case is meant for the split path of the Hopper kernel"


class _Recorder:
    """Stands for a kernel and notes its launches."""

    def __init__(self, kernel: object, launches: list) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple) -> object:
        self.launches.append(grid)
        return self.kernel[grid]


def test_padding_behind_the_last_query_is_left_alone(device: torch.device) -> None:
    case = make_case(device, [5, 3], [20, 30])
    padded = torch.cat([case.q, torch.full_like(case.q, float("nan"))])
    out = padded.new_full(padded.shape, -7.0)
    prefill_attention(
        padded, case.k, case.v, out, case.rows, case.qo_indptr, case.kv_lens, case.max_q_len, **case.options
    )
    assert (out[8:] == -7.0).all()
    case.assert_close(out[:8])


def test_loose_bound_and_int64_rows(device: torch.device) -> None:
    case = make_case(device, [5, 3], [20, 30])
    case.max_q_len, case.rows = 100, case.rows.long()
    check(case)


def test_many_requests(device: torch.device) -> None:
    """More requests than the sorted schedule takes."""
    lens = [1 + i % 3 for i in range(130)]
    check(make_case(device, lens, [n + i % 7 for i, n in enumerate(lens)], q_heads=1, kv_heads=1, dtype=torch.float32))


def test_queries_and_outputs_may_be_strided(device: torch.device) -> None:
    case = make_case(device, [33], [60])
    wide = torch.stack([case.q, case.q], dim=2)
    case.q = wide[:, :, 1]
    out = torch.empty_like(wide)[:, :, 0]
    prefill_attention(
        case.q, case.k, case.v, out, case.rows, case.qo_indptr, case.kv_lens, case.max_q_len, **case.options
    )
    case.assert_close(out)


def test_layouts_that_descriptors_refuse(device: torch.device) -> None:
    """A token stride that is no multiple of 16 bytes goes through pointers by itself, and is refused on demand."""
    case = make_case(device, [5], [40], kv_heads=1, q_heads=1)
    odd = torch.full((*case.k.shape[:2], 1, 67), float("nan"), dtype=case.k.dtype, device=device)
    odd[..., :64] = case.k
    case.k = odd[..., :64]
    check(case)
    with pytest.raises(ValueError, match="loads='auto'"):
        run(case, loads="tma")


def test_refusals_say_what_to_change(device: torch.device) -> None:
    case = make_case(device, [5], [40])
    good = case.k
    case.k = good.transpose(2, 3)
    with pytest.raises(ValueError, match="make it contiguous"):
        run(case)
    case.k = good.float()
    with pytest.raises(ValueError, match="same fp8"):
        run(case)
    case.k = good
    case.kv_lens = case.kv_lens.repeat(2)
    with pytest.raises(ValueError, match="kv_lens"):
        run(case)
