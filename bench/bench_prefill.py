"""How fast is prefix-prefill on a contiguous row, against what SGLang runs on pages? TFLOP/s; rows to prefill.csv."""

from __future__ import annotations

import torch
from attention_bench import Call, Inputs, Shape, arguments, measure
from vtensor_kernels import prefill_attention
from vtensor_kernels.prefill import choose_config

SHAPES = [
    Shape(1, 0, 8192),
    Shape(8, 0, 2048),
    Shape(8, 4096, 512),
    Shape(32, 2048, 128),
    Shape(4, 8192, 1024),
    Shape(1, 32768, 512),
    Shape(16, 3968, 64),
]
GRID = [
    *(Shape(batch, prefix, new) for batch in (1, 8) for prefix in (0, 4096, 32768) for new in (16, 256)),
    *(Shape(4, 4096, 512, q_heads, kv_heads) for q_heads, kv_heads in ((32, 32), (32, 4))),
    *(Shape(4, 4096, 512, 32, 8, head_dim) for head_dim in (64, 256)),
]


def vtensor_triton(inputs: Inputs, shape: Shape) -> Call:
    return _vtensor(inputs, shape)


def vtensor_loop(inputs: Inputs, shape: Shape) -> Call:
    """The portable Triton loop also where a Hopper kernel exists."""
    group = shape.q_heads // shape.kv_heads
    config = choose_config(90, shape.head_dim, shape.head_dim, torch.bfloat16, shape.new * group)
    return _vtensor(inputs, shape, config=config)


def vtensor_pointer(inputs: Inputs, shape: Shape) -> Call:
    return _vtensor(inputs, shape, loads="pointer")


def _vtensor(inputs: Inputs, shape: Shape, **options: object) -> Call:
    out = torch.empty_like(inputs.q)

    def call(layer: int) -> torch.Tensor:
        k, v = inputs.views[layer]
        prefill_attention(
            inputs.q, k, v, out, inputs.rows, inputs.qo_indptr, inputs.kv_lens, shape.new,
            sm_scale=inputs.sm_scale, **options,
        )  # fmt: skip
        return out

    return call


def fa3_view(inputs: Inputs, shape: Shape) -> Call:
    """FlashAttention-3 as SGLang ships it, on the row views. It reads whole tiles: all of this memory is mapped."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    q = inputs.q.view(shape.batch, shape.new, shape.q_heads, shape.head_dim)

    def call(layer: int) -> torch.Tensor:
        k, v = inputs.views[layer]
        out = flash_attn_with_kvcache(
            q, k, v, cache_seqlens=inputs.kv_lens, cache_batch_idx=inputs.rows, causal=True,
            softmax_scale=inputs.sm_scale,
        )  # fmt: skip
        return out.view_as(inputs.q)

    return call


def fa3_paged(inputs: Inputs, shape: Shape) -> Call:
    """SGLang's default on Hopper: a page table of one token a page over the pool."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    def call(layer: int) -> torch.Tensor:
        k, v = (pool.unsqueeze(1) for pool in inputs.pools[layer])
        return flash_attn_with_kvcache(
            inputs.q, k, v, cache_seqlens=inputs.kv_lens, page_table=inputs.slots, cu_seqlens_q=inputs.qo_indptr,
            max_seqlen_q=shape.new, causal=True, softmax_scale=inputs.sm_scale,
        )  # fmt: skip

    return call


def sglang_triton(inputs: Inputs, shape: Shape) -> Call:
    from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

    out = torch.empty_like(inputs.q)
    indices = inputs.slots[:, : shape.prefix].reshape(-1).long().contiguous()
    indptr = torch.arange(shape.batch + 1, dtype=torch.int32, device="cuda") * shape.prefix
    new = inputs.slots[:, shape.prefix :].reshape(-1).long()
    extends = [(k[new], v[new]) for k, v in inputs.pools]

    def call(layer: int) -> torch.Tensor:
        extend_attention_fwd(
            inputs.q, *extends[layer], out, *inputs.pools[layer], inputs.qo_indptr, indptr, indices,
            None, True, None, shape.new, 1.0, 1.0, sm_scale=inputs.sm_scale,
        )  # fmt: skip
        return out

    return call


def sdpa_view(inputs: Inputs, shape: Shape) -> Call:
    """torch's attention, one call a request, on the view cut to the request's length."""
    from torch.nn.attention.bias import causal_lower_right

    mask = causal_lower_right(shape.new, shape.length)
    out = torch.empty_like(inputs.q)

    def call(layer: int) -> torch.Tensor:
        k, v = inputs.views[layer]
        for request in range(shape.batch):
            new = slice(request * shape.new, (request + 1) * shape.new)
            result = torch.nn.functional.scaled_dot_product_attention(
                inputs.q[new].transpose(0, 1).unsqueeze(0), k[request].transpose(0, 1).unsqueeze(0),
                v[request].transpose(0, 1).unsqueeze(0), attn_mask=mask, scale=inputs.sm_scale, enable_gqa=True,
            )  # fmt: skip
            out[new] = result[0].transpose(0, 1)
        return out

    return call


IMPLEMENTATIONS = {
    "vtensor-triton": vtensor_triton,
    "vtensor-loop": vtensor_loop,
    "vtensor-pointer": vtensor_pointer,
    "fa3-view": fa3_view,
    "fa3-paged-p1": fa3_paged,
    "sglang-triton-p1": sglang_triton,
    "torch-sdpa-view": sdpa_view,
}

if __name__ == "__main__":
    options = arguments(__doc__)
    shapes = SHAPES + GRID if options.grid else SHAPES
    measure("prefill", shapes, IMPLEMENTATIONS, options, lambda shape, us: shape.flops / us / 1e6, "TFLOP/s")
