"""What the compiler makes of the kernels, without a GPU; ``test_compiled.py`` runs this without the interpreter."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from compile_only import compile_only, count_variants
from compile_table import MAX_TOKENS, MODELS, Model, launches, on_meta, resident, views
from vtensor_kernels import DecodeSchedule, DecodeWorkspace, Pages, decode_attention, prefill_attention, warm_up

MAX_BATCH = 200
MAX_NEW = 8192


@functools.cache
def warm(capability: int, name: str, *, paged: bool = False) -> frozenset[str]:
    """The variants that a server with this model compiles at its start."""
    model = MODELS[name]
    with count_variants(capability) as variants:
        workspace = DecodeWorkspace(MAX_BATCH, model.q_heads, model.head_dim, "meta")
        keys, pages = homes(model) if paged else (views(model), None)
        for done, of in warm_up(*keys, model.dtype, workspace, pages=pages, **model.all_options()):
            assert 0 < done <= of
    return frozenset(variants)


def homes(model: Model) -> tuple[list[torch.Tensor], Pages]:
    """Where a server's pages are, and SGLang's table of them."""
    table = on_meta(MAX_BATCH, MAX_TOKENS // 128)
    return [part.as_strided((1, *part.shape[1:]), part.stride()) for part in views(model)], Pages(table, 128)


def decode(
    model: Model, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *lengths: torch.Tensor, **more: Any
) -> None:
    """As the backend does it: with groups, where requests may share keys."""
    workspace = DecodeWorkspace(MAX_BATCH, model.q_heads, model.head_dim, "meta")
    options = model.all_options()
    schedule = DecodeSchedule(workspace, k, len(q), sliding_window=options.get("sliding_window", -1))
    schedule.update(*lengths, on_meta(4, MAX_BATCH)[:, : len(q)] if schedule.max_members > 1 else None)
    decode_attention(
        q,
        k,
        v,
        on_meta(*q.shape, dtype=model.dtype),
        *lengths,
        workspace=workspace,
        schedule=schedule,
        **more,
        **options,
    )


@st.composite
def news(draw: st.DrawFn) -> list[int]:
    """New tokens of each request of a pass: none to 8 192 in all, and few or many of each."""
    batch = draw(st.sampled_from([1, 4, 5, 15, 16, 17, 63, 64, 127, 128, 129, MAX_BATCH]) | st.integers(1, MAX_BATCH))
    most = draw(st.sampled_from([1, 2, 7, 8, 9, 15, 16, 17, 64, 65, 512, MAX_NEW]) | st.integers(1, MAX_NEW))
    most = max(min(most, MAX_NEW // batch), 1)
    return draw(st.lists(st.integers(0, most), min_size=batch, max_size=batch)) if batch < 20 else [most] * batch


@pytest.mark.parametrize(
    "name", ["llama-8b", "llama-70b", "llama-70b, 8 GPUs", "gemma-2-9b", "gpt-oss-20b", "falcon-7b"]
)
@pytest.mark.parametrize("capability", [80, 90, 100])
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(new=news(), padding=st.integers(0, 40), longest=st.sampled_from([None, 1, 1024, 1025, 100_000]))
def test_serving_needs_no_variant_that_warming_up_has_not_made(
    capability: int, name: str, new: list[int], padding: int, longest: int | None
) -> None:
    model = MODELS[name]
    k, v = views(model)
    with count_variants(capability) as variants:
        # As the backend calls: queries are a slice of what the projection gives, which also holds keys and values.
        tokens = max(sum(new), 1) + padding
        q = on_meta(tokens, (model.q_heads + 2 * model.kv_heads) * model.head_dim, dtype=model.dtype)
        q = q[:, : model.q_heads * model.head_dim].unflatten(1, (model.q_heads, model.head_dim))
        batch = len(new)
        rows, kv_lens = on_meta(MAX_BATCH)[:batch], on_meta(MAX_BATCH)[:batch]
        prefill_attention(
            q, k, v, on_meta(*q.shape, dtype=model.dtype), rows, on_meta(batch + 1), kv_lens, max(new),
            max_kv_len=longest, **model.all_options(),
        )  # fmt: skip
        q = q[:batch] if batch <= tokens else on_meta(batch, model.q_heads, model.head_dim, dtype=model.dtype)
        decode(model, q, k, v, rows, kv_lens)
    assert variants, "nothing was launched"
    missed = variants - warm(capability, name)
    assert not missed, "\n".join(sorted(missed))


@pytest.mark.parametrize("name", ["llama-8b", "gpt-oss-20b"])
@pytest.mark.parametrize("batch", [1, 4, 5, 16, 17, 63, 64, 128, 129, MAX_BATCH])
def test_decoding_pages_needs_none_either(name: str, batch: int) -> None:
    model = MODELS[name]
    keys, pages = homes(model)
    q = on_meta(batch, model.q_heads, model.head_dim, dtype=model.dtype)
    with count_variants(90) as variants:
        decode(model, q, *keys, on_meta(MAX_BATCH)[:batch], on_meta(MAX_BATCH)[:batch], pages=pages)
    assert len(variants) == 2, "a schedule and the decode itself"
    assert not variants - warm(90, name, paged=True)
    assert variants - warm(90, name), "it is not the same kernel as of rows"


def test_a_server_compiles_few_variants() -> None:
    """What a start may take: each is seconds."""
    counts = {name: len(warm(90, name)) for name in ("llama-8b", "gemma-2-9b", "gpt-oss-20b")}
    assert max(counts.values()) <= 24, counts


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_large_variants_fit(capability: int) -> None:
    """One model of each kind that configurations tell apart. ``bench/compile_table.py`` compiles them all."""
    wanted = {"llama-8b": ("decode", "prefill, split"), "gemma-7b": ("decode", "prefill, split")}
    with compile_only(capability) as compiled:
        for name, names in wanted.items():
            for launch, call in launches(MODELS[name], capability):
                if launch in names:
                    call()
    assert len(compiled) >= 6
    for one in compiled:
        assert resident(one, capability) >= 1, one
        assert one.stack_bytes <= 512, f"{one} keeps its tiles on the stack: choose smaller ones"


def test_what_does_not_fit_is_seen() -> None:
    """The check above can fail."""
    from triton.runtime.errors import OutOfResources
    from vtensor_kernels.prefill import PrefillConfig

    model = MODELS["llama-8b"]
    q = on_meta(64, model.q_heads, model.head_dim, dtype=torch.bfloat16)
    with compile_only(89), pytest.raises(OutOfResources):
        prefill_attention(
            q, *views(model), torch.empty_like(q), on_meta(1), on_meta(2), on_meta(1), 64,
            config=PrefillConfig(block_m=64, block_n=64, num_warps=4, num_stages=4, splits=1), **model.all_options(),
        )  # fmt: skip
