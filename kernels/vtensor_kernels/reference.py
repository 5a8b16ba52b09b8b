"""Plain torch attention over KV rows: what the kernels are tested against, and the attention of the host driver."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Scores of one slice of queries, elements: bounds the memory of the explicit path (512 MiB in float32).
_MAX_SCORES = 1 << 27


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    rows: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_lens: torch.Tensor,
    max_q_len: int,
    *,
    sm_scale: float,
    causal: bool = True,
    logit_cap: float = 0.0,
    sliding_window: int = -1,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    sinks: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    """Same arguments and meaning as ``prefill_attention``, computed in ``compute_dtype``; writes ``out`` (and ``lse``).

    K and V are read as views of the row, cut to the request's length: nothing behind it is touched, and in
    ``compute_dtype`` nothing is copied (but see ``_readable``).
    """
    del max_q_len  # the lengths are read here; the kernels need a bound they can have without reading
    starts = qo_indptr.tolist()
    for request, (row, kv_len) in enumerate(zip(rows.tolist(), kv_lens.tolist(), strict=True)):
        new = slice(starts[request], starts[request + 1])
        if new.stop == new.start:
            continue
        _attend_row(
            q[new].to(compute_dtype),
            _readable(k[row, :kv_len].to(compute_dtype)),
            _readable(v[row, :kv_len].to(compute_dtype)),
            out[new],
            None if lse is None else lse[new],
            sm_scale=sm_scale * k_scale,
            causal=causal,
            logit_cap=logit_cap,
            sliding_window=sliding_window,
            v_scale=v_scale,
            sinks=sinks,
        )


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, on CUDA, of what torch's fused attention misreads there: strides that are not whole 16 bytes."""
    aligned = all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:2])
    return tensor if aligned or not tensor.is_cuda else tensor.contiguous()


def _attend_row(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    sm_scale: float,
    causal: bool,
    logit_cap: float,
    sliding_window: int,
    v_scale: float,
    sinks: torch.Tensor | None,
) -> None:
    """One request: q [q_len, q_heads, dim], k and v [kv_len, kv_heads, dim], out [q_len, q_heads, v_dim]."""
    q_len, q_heads, _ = q.shape
    kv_len, kv_heads, _ = k.shape
    group = q_heads // kv_heads

    # Query heads of a group share K and V by a stride of zero: [kv_heads, group, tokens, dim] without a copy.
    queries = q.unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3)
    keys = k.permute(1, 0, 2).unsqueeze(1).expand(-1, group, -1, -1)
    values = v.permute(1, 0, 2).unsqueeze(1).expand(-1, group, -1, -1)
    out_heads = out.unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3)

    # A query in front of the row's first key has nothing to attend to, which SDPA answers with NaN.
    plain = logit_cap <= 0 and sinks is None and lse is None and q_len <= kv_len
    if plain:
        square = causal and sliding_window <= 0 and q_len == kv_len
        mask = None if square else _visible(0, q_len, q_len, kv_len, causal, sliding_window, q.device)
        result = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=square, scale=sm_scale)
        out_heads.copy_(result if v_scale == 1.0 else result * v_scale)
        return

    step = max(1, _MAX_SCORES // max(1, q_heads * kv_len))
    for first in range(0, q_len, step):
        last = min(first + step, q_len)
        scores = torch.matmul(queries[:, :, first:last], keys.transpose(-1, -2)) * sm_scale
        if logit_cap > 0:
            scores = logit_cap * torch.tanh(scores / logit_cap)
        visible = _visible(first, last, q_len, kv_len, causal, sliding_window, q.device)
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        log_sum = torch.logsumexp(scores, dim=-1) if kv_len else scores.new_full(scores.shape[:-1], float("-inf"))
        if sinks is not None:
            log_sum = torch.logaddexp(log_sum, sinks.to(scores.dtype).view(kv_heads, group, 1))
        # An empty row has log_sum = -inf; 0 in its place gives probabilities exp(-inf) = 0 and not NaN.
        weights = torch.exp(scores - log_sum.masked_fill(log_sum == float("-inf"), 0.0).unsqueeze(-1))
        out_heads[:, :, first:last] = torch.matmul(weights, values) * v_scale
        if lse is not None:
            lse[first:last] = log_sum.flatten(0, 1).transpose(0, 1)


def _visible(
    first: int, last: int, q_len: int, kv_len: int, causal: bool, sliding_window: int, device: torch.device
) -> torch.Tensor | None:
    """Mask [last - first, kv_len], true where the query may look; None when every query sees every key.

    Query i sits at position kv_len - q_len + i. A window of w keeps the current token and the w before it
    (and the w after it when not causal), SGLang's convention; w <= 0 means no window.
    """
    one_query_sees_all = causal and last - first == 1 and last == q_len
    if sliding_window <= 0 and (not causal or one_query_sees_all):
        return None
    query = torch.arange(first, last, device=device).unsqueeze(1) + (kv_len - q_len)
    key = torch.arange(kv_len, device=device).unsqueeze(0)
    visible = key <= query if causal else torch.ones(last - first, kv_len, dtype=torch.bool, device=device)
    if sliding_window > 0:
        visible &= query - key <= sliding_window
        if not causal:
            visible &= key - query <= sliding_window
    return visible
