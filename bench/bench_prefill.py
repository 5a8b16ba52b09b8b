"""How fast is prefix-prefill on a contiguous row, against what SGLang runs on pages? TFLOP/s; rows to prefill.csv."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from attention_bench import Call, Inputs, Make, Shape, arguments, chat, equal, measure
from vtensor_kernels import prefill_attention, prefill_schedule
from vtensor_kernels.prefill import PrefillConfig, tile_configs

SHAPES = [
    equal(1, 0, 8192),
    equal(8, 0, 2048),
    equal(8, 4096, 512),
    equal(32, 2048, 128),
    equal(4, 8192, 1024),
    equal(1, 32768, 512),
    equal(16, 3968, 64),
]
GRID = [
    # What servers ask for, by how much each says; --seconds cuts at the end.
    equal(1, 4096, 256),
    equal(8, 4096, 16),
    chat(8, decode=False),
    chat(64, decode=False),
    equal(1, 32768, 16),
    equal(1, 32768, 256),
    equal(1, 0, 256),
    equal(1, 4096, 16),
    equal(8, 32768, 256),
    Shape((30000, *(512,) * 31), (256, *(64,) * 31), label="one30k+31x512"),
    equal(1, 65536, 2048),
    equal(64, 1024, 16),
    equal(64, 1024, 128),
    equal(8, 0, 256),
    equal(1, 0, 2048),
    equal(8, 32768, 16),
    equal(8, 4000, 200),
    *(equal(4, 4096, 512, q_heads, kv_heads) for q_heads, kv_heads in ((32, 32), (32, 4), (8, 1))),
    *(equal(1, 4096, 256, q_heads, kv_heads) for q_heads, kv_heads in ((32, 32), (8, 2))),
    equal(4, 4096, 512, 32, 8, 64),
    equal(1, 4096, 256, 32, 8, 64),
    equal(4, 4096, 512, 32, 8, 256),
]


def vtensor_triton(inputs: Inputs, shape: Shape) -> Call:
    return _vtensor(inputs, shape)


def vtensor_loop(inputs: Inputs, shape: Shape) -> Call:
    """The portable Triton loop also where a Hopper kernel exists."""
    _, config = tile_configs(90, shape.head_dim, shape.head_dim, torch.bfloat16)
    return _vtensor(inputs, shape, config=dataclasses.replace(config, hopper=False))


def _vtensor(inputs: Inputs, shape: Shape, config: PrefillConfig | None = None) -> Call:
    """The schedule is made before, as a forward pass makes it once for all layers."""
    out = torch.empty_like(inputs.q)
    schedule = prefill_schedule(
        inputs.q, *inputs.views[0], inputs.rows, inputs.qo_indptr, inputs.kv_lens, shape.max_new,
        max_kv_len=max(shape.lengths), config=config,
    )  # fmt: skip

    def call(layer: int) -> torch.Tensor:
        k, v = inputs.views[layer]
        prefill_attention(
            inputs.q, k, v, out, inputs.rows, inputs.qo_indptr, inputs.kv_lens, shape.max_new,
            sm_scale=inputs.sm_scale, schedule=schedule,
        )  # fmt: skip
        return out

    return call


def _fa3(shape: Shape) -> Callable[..., torch.Tensor]:
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    if shape.head_dim not in (64, 128):
        # A build that lacks a width ends the process.
        raise ValueError(f"head_dim {shape.head_dim} is not in every build of FlashAttention-3")
    return flash_attn_with_kvcache


def _attend_pages(
    attend: Callable[..., torch.Tensor],
    inputs: Inputs,
    shape: Shape,
    page_tokens: int,
    table: torch.Tensor,
    pages: Sequence[tuple[torch.Tensor, ...]],
) -> Call:
    """K and V of each layer in pages. Decode gets its schedule ready, as SGLang computes that once a forward pass."""
    schedule = None
    if shape.max_new == 1:
        from sgl_kernel.flash_attn import get_scheduler_metadata

        schedule = get_scheduler_metadata(
            batch_size=shape.batch, max_seqlen_q=1, max_seqlen_k=max(shape.lengths), num_heads=shape.q_heads,
            num_heads_k=shape.kv_heads, headdim=shape.head_dim, cache_seqlens=inputs.kv_lens,
            qkv_dtype=inputs.q.dtype, cu_seqlens_q=inputs.qo_indptr, page_size=page_tokens, causal=True,
        )  # fmt: skip

    def call(layer: int) -> torch.Tensor:
        k, v = pages[layer]
        return attend(
            inputs.q, k, v, cache_seqlens=inputs.kv_lens, page_table=table, cu_seqlens_q=inputs.qo_indptr,
            max_seqlen_q=shape.max_new, causal=True, softmax_scale=inputs.sm_scale, scheduler_metadata=schedule,
        )  # fmt: skip

    return call


def fa3_view(inputs: Inputs, shape: Shape) -> Call:
    """FlashAttention-3 as SGLang ships it, one launch on the row views. It reads whole tiles: all of it is mapped."""
    attend = _fa3(shape)
    if shape.even:
        q = inputs.q.view(shape.batch, shape.max_new, shape.q_heads, shape.head_dim)
        ragged = {}
    else:
        q, ragged = inputs.q, {"cu_seqlens_q": inputs.qo_indptr, "max_seqlen_q": shape.max_new}

    def call(layer: int) -> torch.Tensor:
        k, v = inputs.views[layer]
        out = attend(
            q, k, v, cache_seqlens=inputs.kv_lens, cache_batch_idx=inputs.rows, causal=True,
            softmax_scale=inputs.sm_scale, **ragged,
        )  # fmt: skip
        return out.view_as(inputs.q)

    return call


def fa3_view_each(inputs: Inputs, shape: Shape) -> Call:
    """The same, one launch a request on its row cut to its length: reads nothing behind it, as the plugin does."""
    attend = _fa3(shape)
    if shape.batch > 8:
        raise ValueError("the plugin launches for 8 requests at most")
    starts = inputs.qo_indptr.tolist()

    def call(layer: int) -> torch.Tensor:
        k, v = inputs.views[layer]
        out = torch.empty_like(inputs.q)
        for b, length in enumerate(shape.lengths):
            new = slice(starts[b], starts[b + 1])
            out[new] = attend(
                inputs.q[None, new], k[b : b + 1, :length], v[b : b + 1, :length],
                cache_seqlens=inputs.kv_lens[b : b + 1], causal=True, softmax_scale=inputs.sm_scale,
            )[0]  # fmt: skip
        return out

    return call


def fa3_paged(page_tokens: int, *, stock: bool = False) -> Make:
    """As SGLang calls it. ``stock``: on SGLang's own pools, with page 1, its default on Hopper; else over the homes.

    Homes are token-major and lie in random order.
    """

    def make(inputs: Inputs, shape: Shape) -> Call:
        attend = _fa3(shape)
        pools = inputs.pools if stock else inputs.homes
        table = inputs.slots if stock else inputs.page_table(page_tokens)
        pages = [tuple(pool.unflatten(0, (-1, page_tokens)) for pool in pair) for pair in pools]
        return _attend_pages(attend, inputs, shape, page_tokens, table, pages)

    return make


def fa3_layered(inputs: Inputs, shape: Shape) -> Call:
    """On pages that hold layer after layer, so that a layer's tokens lie side by side: what a page's own order costs.

    A copy: such pages have no rows in which tokens are evenly spaced.
    """
    attend = _fa3(shape)
    pages = inputs.views[0][0].shape[0] * inputs.views[0][0].shape[1] // inputs.page_tokens
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).to(inputs.q.device)
    memory = inputs.q.new_empty(pages, inputs.layers, 2, inputs.page_tokens, shape.kv_heads, shape.head_dim)
    for layer, view in enumerate(inputs.views):
        for part, keys in enumerate(view):
            memory[order, layer, part] = keys.reshape(pages, inputs.page_tokens, shape.kv_heads, shape.head_dim)
    table = order.view(shape.batch, -1).int()
    layered = [(memory[:, layer, 0], memory[:, layer, 1]) for layer in range(len(inputs.views))]
    return _attend_pages(attend, inputs, shape, inputs.page_tokens, table, layered)


def flashinfer_paged(inputs: Inputs, shape: Shape) -> Call:
    """On the stock pools, page 1, as SGLang's ``flashinfer`` backend has it.

    It compiles its kernels at the first call, and plans on the host, untimed.
    """
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    wrapper = BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(512 << 20, dtype=torch.uint8, device="cuda"), "NHD", backend="fa2"
    )
    wrapper.plan(
        inputs.qo_indptr, inputs.kv_indptr, *flashinfer_pages(inputs), shape.q_heads, shape.kv_heads, shape.head_dim, 1,
        causal=True, sm_scale=inputs.sm_scale, q_data_type=inputs.q.dtype, kv_data_type=inputs.q.dtype,
    )  # fmt: skip

    def call(layer: int) -> torch.Tensor:
        k, v = inputs.pools[layer]
        return wrapper.run(inputs.q, (k.unsqueeze(1), v.unsqueeze(1)))

    return call


def flashinfer_pages(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Page indices, and the tokens in each request's last page, for pages of one token."""
    return inputs.pool_indices(), torch.ones_like(inputs.kv_lens)


def sglang_triton(inputs: Inputs, shape: Shape) -> Call:
    from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

    out = torch.empty_like(inputs.q)
    # The pool's tokens lie request after request: first the prefix, then what is new.
    position = torch.cat([torch.arange(length, device="cuda") for length in shape.lengths])
    is_new = position >= torch.repeat_interleave(inputs.prefixes, inputs.kv_lens)
    indices = (~is_new).nonzero().view(-1)
    indptr = torch.cat([inputs.prefixes.new_zeros(1), inputs.prefixes.cumsum(0)]).int()
    extends = [(k[is_new], v[is_new]) for k, v in inputs.pools]

    def call(layer: int) -> torch.Tensor:
        extend_attention_fwd(
            inputs.q, *extends[layer], out, *inputs.pools[layer], inputs.qo_indptr, indptr, indices,
            None, True, None, shape.max_new, 1.0, 1.0, sm_scale=inputs.sm_scale,
        )  # fmt: skip
        return out

    return call


def sdpa_view(inputs: Inputs, shape: Shape) -> Call:
    """torch's attention, one call a request, on the view cut to the request's length."""
    from torch.nn.attention.bias import causal_lower_right

    out = torch.empty_like(inputs.q)
    starts = inputs.qo_indptr.tolist()

    def call(layer: int) -> torch.Tensor:
        k, v = inputs.views[layer]
        for b, length in enumerate(shape.lengths):
            new = slice(starts[b], starts[b + 1])
            result = torch.nn.functional.scaled_dot_product_attention(
                inputs.q[new].transpose(0, 1).unsqueeze(0), k[b, :length].transpose(0, 1).unsqueeze(0),
                v[b, :length].transpose(0, 1).unsqueeze(0), attn_mask=causal_lower_right(shape.news[b], length),
                scale=inputs.sm_scale, enable_gqa=True,
            )  # fmt: skip
            out[new] = result[0].transpose(0, 1)
        return out

    return call


IMPLEMENTATIONS = {
    "vtensor-triton": vtensor_triton,
    "vtensor-loop": vtensor_loop,
    "fa3-view": fa3_view,
    "fa3-view-each": fa3_view_each,
    "fa3-paged-p1": fa3_paged(1, stock=True),
    "fa3-homes-p1": fa3_paged(1),
    "fa3-paged-p64": fa3_paged(64),
    "fa3-paged-p128": fa3_paged(128),
    "fa3-layered": fa3_layered,
    "sglang-triton-p1": sglang_triton,
    "torch-sdpa-view": sdpa_view,
    "flashinfer-paged": flashinfer_paged,
}

if __name__ == "__main__":
    options = arguments(__doc__)
    shapes = SHAPES + GRID if options.grid else SHAPES
    measure("prefill", shapes, IMPLEMENTATIONS, options, lambda shape, us: shape.flops / us / 1e6, "TFLOP/s")
