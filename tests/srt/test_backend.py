"""The attention backend, as far as it can be looked at without a server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

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

    def warm_up(k: str, v: str, dtype: torch.dtype, workspace: str, **options: Any) -> Iterator[tuple[int, int]]:
        assert (dtype, workspace) == (torch.bfloat16, "workspace")
        asked.append((k, options))
        yield from ((1, 2), (2, 2))

    monkeypatch.setattr(backend, "warm_up", warm_up)
    model = Model([127, -1, 127, -1, 511])
    model.layers[3].attn_type = AttentionType.ENCODER_ONLY
    made = object.__new__(backend.VTensorAttnBackend)
    made._views = {layer: (f"k{layer}", f"v{layer}") for layer in range(4)}
    made._fa3, made._workspace = None, "workspace"
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
    made._fa3, made._workspace = "flash attention", "workspace"
    made._warm_up(model, torch.bfloat16)
    assert len(asked) == 1, "it takes no sinks"
    del model.sinks
    made._warm_up(model, torch.bfloat16)
    assert len(asked) == 1
