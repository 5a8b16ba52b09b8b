"""The attention backend, as far as it can be looked at without a server."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from vtensor_kernels import DecodeWorkspace, Pages, decode, prefill, reference_attention

from sgl_vtensor.core.groups import alone
from sgl_vtensor.srt import backend


class Model(torch.nn.Module):
    """Layers as they alternate in gpt-oss, and one of another stage of a pipeline."""

    def __init__(self, windows: list[int]) -> None:
        super().__init__()
        self.sinks = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
        self.layers = torch.nn.ModuleList(
            RadixAttention(4, 16, 0.25, 2, layer, sliding_window_size=window) for layer, window in enumerate(windows)
        )


def test_every_kind_of_layer_is_warmed_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def warm_up(
        k: str, v: str, dtype: torch.dtype, workspace: str, *, pages: None, **options: Any
    ) -> Iterator[tuple[int, int]]:
        assert (dtype, workspace) == (torch.bfloat16, "workspace")
        asked.append((k, options))
        yield from ((1, 2), (2, 2))

    monkeypatch.setattr(backend, "warm_up", warm_up)
    model = Model([127, -1, 127, -1, 511])
    model.layers[3].attn_type = AttentionType.ENCODER_ONLY
    made = object.__new__(backend.VTensorAttnBackend)
    made._views = {layer: (f"k{layer}", f"v{layer}") for layer in range(4)}
    made._fa3, made._workspace, made._decode_pages = None, "workspace", None
    made._warm_up(model, torch.bfloat16)
    assert [(k, options["sliding_window"], options["causal"]) for k, options in asked] == [
        ("k0", 127, True), ("k1", -1, True), ("k3", -1, False),
    ]  # fmt: skip
    assert all(options["sinks"] is model.sinks for _, options in asked)


def test_layers_that_flash_attention_serves_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(backend, "warm_up", lambda *arguments, **options: asked.append(options) or [])
    model = Model([-1])
    made = object.__new__(backend.VTensorAttnBackend)
    made._views = {0: (torch.empty(1, dtype=torch.bfloat16), None)}
    made._fa3, made._workspace, made._decode_pages = "flash attention", "workspace", None
    made._warm_up(model, torch.bfloat16)
    assert len(asked) == 1, "it takes no sinks"
    del model.sinks
    made._warm_up(model, torch.bfloat16)
    assert len(asked) == 1
    made._decode_pages, made._homes = "pages", {0: ("k", "v")}
    made._warm_up(model, torch.bfloat16)
    assert len(asked) == 2, "decode of pages is our own"
    assert asked[1]["pages"] == "pages"


@pytest.mark.parametrize(("decoding", "paged"), [(True, False), (True, True), (False, False)])
def test_a_pass_makes_one_schedule_for_layers_alike_and_anew_for_new_lengths(
    decoding: bool, paged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a graph is captured: a run before it, with other lengths, leaves nothing that the graph would rely on."""
    launched = []
    module = decode if decoding else prefill
    kernel = module._schedule_kernel

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launched.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, "_schedule_kernel", Counted())
    bounds = []

    def prefill_schedule(*arguments: Any, **options: Any) -> prefill.PrefillSchedule:
        bounds.append(options["max_kv_len"])
        return prefill.prefill_schedule(*arguments, **options)

    monkeypatch.setattr(backend, "prefill_schedule", prefill_schedule)
    windows = [-1, 7, -1, 7]
    model = Model(windows)
    made = object.__new__(backend.VTensorAttnBackend)
    made._views = {layer: torch.randn(2, 3, 64, 2, 16).unbind() for layer in range(len(windows))}
    made._fa3, made._workspace = None, DecodeWorkspace(3, 4, 16, "cpu", kv_heads=2)
    made._kv_lens = torch.zeros(3, dtype=torch.int32)
    rows = torch.tensor([2, 0], dtype=torch.int32)
    # The rows' tokens as pages of 32 that follow each other, seen from request slots 1 and 4.
    homes = {layer: [part.reshape(1, -1, 2, 16) for part in views] for layer, views in made._views.items()}
    table = torch.full((5, 64), 1 << 30, dtype=torch.int32)
    table[1], table[4] = 128 + torch.arange(64), torch.arange(64)
    made._homes, made._first_slots = homes, table[:, ::32]
    pages = Pages(torch.zeros(3, 2, dtype=torch.int32), 32)
    new = [1, 1] if decoding else [3, 5]
    indptr = torch.tensor([0, new[0], sum(new)], dtype=torch.int32)
    made.forward_metadata = backend.Metadata(
        rows=torch.arange(2, dtype=torch.int32) if paged else rows, kv_lens=made._kv_lens[:2], max_q_len=max(new),
        qo_indptr=None if decoding else indptr, pages=pages if paged else None,
        groups=torch.from_numpy(alone(2)) if decoding else None,
    )  # fmt: skip
    q = torch.randn(sum(new), 4 * 16)
    for lengths in ([9, 61], [40, 8]):
        launched.clear()
        batch = types.SimpleNamespace(
            batch_size=2, seq_lens=torch.tensor(lengths), req_pool_indices=torch.tensor([1, 4])
        )
        made.init_forward_metadata_in_graph(batch)
        made.forward_metadata = dataclasses.replace(made.forward_metadata, host_kv_lens=tuple(lengths))
        bounds.clear()
        for layer in model.layers:
            forward = made.forward_decode if decoding else made.forward_extend
            out = forward(q, None, None, layer, batch, save_kv_cache=False)
            expected = torch.empty(sum(new), 4, 16)
            window = layer.sliding_window_size
            reference_attention(
                q.view(-1, 4, 16), *made._views[layer.layer_id], expected, rows, indptr, made._kv_lens[:2], max(new),
                sm_scale=0.25, sliding_window=window,
            )  # fmt: skip
            torch.testing.assert_close(out.view(-1, 4, 16), expected, rtol=1e-5, atol=1e-5)
        assert len(launched) == 2, "one a window"
        assert bounds == ([] if decoding else [max(lengths)] * 2), "rows are longer than is said"


def test_groups_are_copied_to_where_the_graph_of_a_batch_size_reads_them() -> None:
    made = object.__new__(backend.VTensorAttnBackend)
    made._workspace, made._max_members, made.device, made._groups = "workspace", 4, torch.device("cpu"), {}
    together = alone(3)
    together[1:] = [[0, 0, 2], [2, 0, 1], [64, 64, 0]]
    says = {3: alone(3), 2: alone(2)}
    made.runtime = types.SimpleNamespace(groups_of_launch=lambda batch_size, max_members: says[batch_size])
    kept = made._copy_groups(3)
    assert kept.tolist() == alone(3).tolist()
    assert made._copy_groups(2).tolist() == alone(2).tolist()
    for found in (together, alone(3), together):
        says[3] = found
        assert made._copy_groups(3) is kept, "a graph has its address"
        assert kept.tolist() == found.tolist()
    made._max_members = 1
    assert made._copy_groups(3) is None


@pytest.mark.parametrize(
    ("shape", "dtype", "chunk", "ours"),
    [
        ((1, 8, 2, 128), torch.bfloat16, None, True),
        ((1, 8, 2, 64), torch.float16, None, True),
        ((1, 8, 2, 96), torch.bfloat16, None, False),
        ((1, 8, 2, 256), torch.bfloat16, None, False),
        ((1, 8, 2, 128), torch.float8_e4m3fn, None, False),
        ((1, 8, 2, 128), torch.bfloat16, 8192, False),
    ],
)
def test_our_decode_serves_what_has_been_measured(
    shape: tuple[int, ...], dtype: torch.dtype, chunk: int | None, ours: bool
) -> None:
    made = object.__new__(backend.VTensorAttnBackend)
    made._views = {3: (torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype))}
    assert made._decodes_fastest(types.SimpleNamespace(attention_chunk_size=chunk)) == ours


def test_the_page_table_is_as_wide_as_slots_need_it() -> None:
    made = object.__new__(backend.VTensorAttnBackend)
    made.runtime = types.SimpleNamespace(pool=types.SimpleNamespace(layout=types.SimpleNamespace(page_tokens=16)))
    made.req_to_token_pool = types.SimpleNamespace(req_to_token=torch.arange(3 * 50, dtype=torch.int32).view(3, 50))
    made._max_batch, made.device = 5, torch.device("cpu")
    pages = made._make_pages()
    assert pages.table.shape == (5, 4), "50 tokens are in four pages"
    assert made._first_slots[1].tolist() == [50, 66, 82, 98]
    assert pages.page_tokens == 16
