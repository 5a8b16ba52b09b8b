"""How fast is decode on contiguous rows, against what SGLang runs on pages? GB/s of K and V; rows to decode.csv."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from attention_bench import Call, Inputs, Shape, arguments, chat, equal, measure, uneven
from bench_prefill import fa3_layered, fa3_paged, fa3_view, flashinfer_pages
from vtensor_kernels import DecodeSchedule, DecodeWorkspace, Pages, decode_attention, max_members

from sgl_vtensor.core.groups import group_prefixes

SHAPES = [equal(batch, length - 1, 1) for batch, length in ((1, 8192), (8, 4096), (64, 2048), (32, 8192), (128, 1024))]
GRID = [
    # What servers ask for, by how much each says; --seconds cuts at the end.
    equal(1, 131071, 1),
    chat(32, decode=True),
    chat(128, decode=True),
    uneven(16, 1500, 16000),
    uneven(8, 600, 2000),
    uneven(4, 2000, 6000),
    uneven(8, 32500, 34500),
    equal(1, 1023, 1),
    equal(8, 16383, 1),
    equal(256, 127, 1),
    equal(1, 32767, 1),
    equal(8, 1023, 1),
    Shape((29999, *(511,) * 31), (1,) * 32, label="one30k+31x512"),
    equal(64, 16383, 1),
    equal(256, 4095, 1),
    equal(1, 127, 1),
    equal(64, 127, 1),
    *(equal(16, 4095, 1, q_heads, kv_heads) for q_heads, kv_heads in ((32, 4), (8, 8), (8, 1))),
    equal(1, 8191, 1, 8, 1),
    equal(16, 4095, 1, 32, 8, 64),
    equal(16, 4095, 1, 32, 8, 256),
    # Requests that share a prompt, much of what they have, and little.
    *(
        Shape(
            (length - 1,) * batch,
            (1,) * batch,
            label=f"{sharers} share {shared} of {length}",
            shared=shared,
            sharers=sharers,
        )
        for batch, length, shared, sharers in (
            (32, 2304, 2048, 4),
            (32, 2304, 2048, 16),
            (64, 1536, 1024, 64),
            (8, 8192, 7936, 4),
            (16, 2304, 256, 16),
        )
    ),
]


def _ours(
    inputs: Inputs,
    shape: Shape,
    keys: Sequence[tuple[torch.Tensor, torch.Tensor]],
    pages: Pages | None = None,
    groups: torch.Tensor | None = None,
) -> Call:
    """The schedule is made before, as a forward pass makes it once for all layers."""
    out = torch.empty_like(inputs.q)
    workspace = DecodeWorkspace(shape.batch, shape.q_heads, shape.head_dim, "cuda", kv_heads=shape.kv_heads)
    schedule = DecodeSchedule(workspace, keys[0][0], shape.batch).update(inputs.rows, inputs.kv_lens, groups)

    def call(layer: int) -> torch.Tensor:
        k, v = keys[layer]
        decode_attention(
            inputs.q, k, v, out, inputs.rows, inputs.kv_lens, workspace=workspace, sm_scale=inputs.sm_scale,
            schedule=schedule, pages=pages,
        )  # fmt: skip
        return out

    return call


def vtensor_triton(inputs: Inputs, shape: Shape) -> Call:
    """Our kernel on the rows."""
    return _ours(inputs, shape, inputs.views)


def vtensor_homes(inputs: Inputs, shape: Shape, *, grouped: bool = True) -> Call:
    """Our kernel on the pages at their homes; those that requests share are read once for several of them."""
    homes = [(k[None], v[None]) for k, v in inputs.homes]
    table = inputs.page_table(inputs.page_tokens)
    groups = None
    if grouped and shape.shared:
        found = group_prefixes(
            table.cpu().numpy(), (inputs.kv_lens.cpu().numpy() - 1) // inputs.page_tokens,
            page_tokens=inputs.page_tokens, max_members=max_members(shape.q_heads, shape.kv_heads), min_pages=2,
        )  # fmt: skip
        groups = torch.from_numpy(found).cuda()
    return _ours(inputs, shape, homes, Pages(table, inputs.page_tokens), groups)


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
    indices = inputs.pool_indices().long()

    def call(layer: int) -> torch.Tensor:
        decode_attention_fwd(
            inputs.q,
            *inputs.pools[layer],
            out,
            inputs.kv_indptr,
            indices,
            logits,
            lse,
            splits,
            most,
            inputs.sm_scale,
            1.0,
            1.0,
        )
        return out

    return call


def flashinfer_paged(inputs: Inputs, shape: Shape) -> Call:
    """On the stock pools, page 1. It compiles its kernels at the first call, and plans on the host, untimed."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(512 << 20, dtype=torch.uint8, device="cuda"), "NHD", use_tensor_cores=True, backend="fa2"
    )
    wrapper.plan(
        inputs.kv_indptr, *flashinfer_pages(inputs), shape.q_heads, shape.kv_heads, shape.head_dim, 1,
        sm_scale=inputs.sm_scale, q_data_type=inputs.q.dtype, kv_data_type=inputs.q.dtype,
    )  # fmt: skip

    def call(layer: int) -> torch.Tensor:
        k, v = inputs.pools[layer]
        return wrapper.run(inputs.q, (k.unsqueeze(1), v.unsqueeze(1)))

    return call


def sdpa_view(inputs: Inputs, shape: Shape) -> Call:
    """torch's attention on all rows at once."""
    if len(set(shape.lengths)) > 1:
        raise ValueError("all rows must be equally long")
    length = shape.lengths[0]
    out = torch.empty_like(inputs.q)

    def call(layer: int) -> torch.Tensor:
        k, v = (part[:, :length] for part in inputs.views[layer])
        result = torch.nn.functional.scaled_dot_product_attention(
            inputs.q.unsqueeze(2), k.transpose(1, 2), v.transpose(1, 2), scale=inputs.sm_scale, enable_gqa=True
        )
        return out.copy_(result[:, :, 0])

    return call


IMPLEMENTATIONS = {
    "vtensor-triton": vtensor_triton,
    "vtensor-homes": vtensor_homes,
    "vtensor-homes-alone": partial(vtensor_homes, grouped=False),
    "fa3-view": fa3_view,
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
    measure("decode", shapes, IMPLEMENTATIONS, options, lambda shape, us: shape.kv_bytes / us / 1e3, "GB/s")
