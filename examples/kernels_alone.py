"""The attention kernels on a plain KV cache, without SGLang or virtual memory: one prefill, one decode step.

On a machine without a GPU: TRITON_INTERPRET=1 python examples/kernels_alone.py
"""

import torch
from vtensor_kernels import DecodeWorkspace, decode_attention, prefill_attention, reference_attention

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
rows, max_tokens, q_heads, kv_heads, dim = 4, 512, 8, 2, 64
k, v = torch.randn(2, rows, max_tokens, kv_heads, dim, device=device, dtype=dtype)  # any strides but the last

# Two requests, in rows 3 and 0, bring 40 and 7 new tokens behind prefixes of 100 and 200.
which = torch.tensor([3, 0], dtype=torch.int32, device=device)
kv_lens = torch.tensor([140, 207], dtype=torch.int32, device=device)
qo_indptr = torch.tensor([0, 40, 47], dtype=torch.int32, device=device)
q = torch.randn(47, q_heads, dim, device=device, dtype=dtype)
out, expected = torch.empty_like(q), torch.empty_like(q)
prefill_attention(q, k, v, out, which, qo_indptr, kv_lens, 40, sm_scale=dim**-0.5)
reference_attention(q, k, v, expected, which, qo_indptr, kv_lens, 40, sm_scale=dim**-0.5)
print(f"prefill: {(out - expected).abs().max():.1e} from plain torch")

# The next token of each. The workspace is made once; launches depend on shapes only, so CUDA graphs may hold them.
workspace = DecodeWorkspace(max_batch=16, q_heads=q_heads, v_head_dim=dim, device=device)
q1, out1 = q[[39, 46]], out[[39, 46]]
decode_attention(q1, k, v, result := torch.empty_like(q1), which, kv_lens, workspace=workspace, sm_scale=dim**-0.5)
print(f"decode:  {(result - out1).abs().max():.1e} from the prefill's last queries")
