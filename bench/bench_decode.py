"""How fast is decode on contiguous rows, against what SGLang runs on pages? GB/s of K and V; rows to decode.csv."""

from __future__ import annotations

import torch
from attention_bench import Call, Inputs, Shape, arguments, measure
from bench_prefill import fa3_paged, fa3_view
from vtensor_kernels import DecodeWorkspace, decode_attention

SHAPES = [Shape(batch, length - 1, 1) for batch, length in ((1, 8192), (8, 4096), (64, 2048), (32, 8192), (128, 1024))]
GRID = [
    *(Shape(batch, length - 1, 1) for batch in (1, 8, 64) for length in (128, 1024, 16384) if batch * length < 600_000),
    Shape(1, 131071, 1),
    *(Shape(16, 4095, 1, q_heads, kv_heads) for q_heads, kv_heads in ((8, 8), (32, 4))),
    *(Shape(16, 4095, 1, 32, 8, head_dim) for head_dim in (64, 256)),
]


def vtensor_triton(inputs: Inputs, shape: Shape) -> Call:
    return _vtensor(inputs, shape)


def vtensor_pointer(inputs: Inputs, shape: Shape) -> Call:
    return _vtensor(inputs, shape, loads="pointer")


def _vtensor(inputs: Inputs, shape: Shape, *, waves: int | None = None, **options: object) -> Call:
    out = torch.empty_like(inputs.q)
    extra = {} if waves is None else {"waves": waves}
    workspace = DecodeWorkspace(shape.batch, shape.q_heads, shape.head_dim, "cuda", **extra)

    def call(layer: int) -> torch.Tensor:
        k, v = inputs.views[layer]
        decode_attention(
            inputs.q, k, v, out, inputs.rows, inputs.kv_lens, workspace=workspace, sm_scale=inputs.sm_scale, **options
        )
        return out

    return call


def sglang_triton(inputs: Inputs, shape: Shape) -> Call:
    """With the split counts that SGLang's backend computes, and its default of at most 8."""
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
    from sglang.kernels.ops.attention.metadata import get_num_kv_splits_triton

    most = 8
    out = torch.empty_like(inputs.q)
    logits = torch.empty(shape.batch, shape.q_heads, most, shape.head_dim, dtype=torch.float32, device="cuda")
    lse = torch.empty(shape.batch, shape.q_heads, most, dtype=torch.float32, device="cuda")
    splits = torch.empty(shape.batch, dtype=torch.int32, device="cuda")
    cores = torch.cuda.get_device_properties(0).multi_processor_count
    get_num_kv_splits_triton[(1,)](
        splits, inputs.kv_lens, shape.batch, 1, shape.q_heads, shape.kv_heads, most, cores, MAX_NUM_SEQ=256
    )
    indptr = torch.arange(shape.batch + 1, dtype=torch.int32, device="cuda") * shape.length
    indices = inputs.slots.reshape(-1).long().contiguous()

    def call(layer: int) -> torch.Tensor:
        decode_attention_fwd(
            inputs.q, *inputs.pools[layer], out, indptr, indices, logits, lse, splits, most, inputs.sm_scale, 1.0, 1.0
        )
        return out

    return call


def sdpa_view(inputs: Inputs, shape: Shape) -> Call:
    """torch's attention on all rows at once: right here only because all are equally long."""
    out = torch.empty_like(inputs.q)

    def call(layer: int) -> torch.Tensor:
        k, v = inputs.views[layer]
        result = torch.nn.functional.scaled_dot_product_attention(
            inputs.q.unsqueeze(2), k.transpose(1, 2), v.transpose(1, 2), scale=inputs.sm_scale, enable_gqa=True
        )
        return out.copy_(result[:, :, 0])

    return call


IMPLEMENTATIONS = {
    "vtensor-triton": vtensor_triton,
    "vtensor-pointer": vtensor_pointer,
    "fa3-view": fa3_view,
    "fa3-paged-p1": fa3_paged,
    "sglang-triton-p1": sglang_triton,
    "torch-sdpa-view": sdpa_view,
}

if __name__ == "__main__":
    options = arguments(__doc__)
    shapes = SHAPES + GRID if options.grid else SHAPES
    measure("decode", shapes, IMPLEMENTATIONS, options, lambda shape, us: shape.kv_bytes / us / 1e3, "GB/s")
