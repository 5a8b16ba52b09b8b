"""The reference against attention written out in float64, one query and one head at a time."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import Case, make_case

CPU = torch.device("cpu")


def naive(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse by the formula: the definition that everything else is held against."""
    options = {"causal": True, "logit_cap": 0.0, "sliding_window": -1, "k_scale": 1.0, "v_scale": 1.0, "sinks": None}
    options |= case.options
    num_tokens, q_heads, _ = case.q.shape
    group = q_heads // case.k.shape[2]
    out = torch.zeros(num_tokens, q_heads, case.v.shape[3], dtype=torch.float64)
    lse = torch.full((num_tokens, q_heads), -math.inf, dtype=torch.float64)
    starts = case.qo_indptr.tolist()
    for request, (row, kv_len) in enumerate(zip(case.rows.tolist(), case.kv_lens.tolist(), strict=True)):
        q_len = starts[request + 1] - starts[request]
        for i in range(q_len):
            position = kv_len - q_len + i
            keys = []
            for key in range(kv_len):
                if options["causal"] and key > position:
                    continue
                if options["sliding_window"] > 0 and abs(position - key) > options["sliding_window"]:
                    continue
                keys.append(key)
            for head in range(q_heads):
                token = starts[request] + i
                scores = case.k[row, keys, head // group].double() @ case.q[token, head].double()
                scores = scores * options["k_scale"] * options["sm_scale"]
                if options["logit_cap"] > 0:
                    scores = options["logit_cap"] * torch.tanh(scores / options["logit_cap"])
                sink = [] if options["sinks"] is None else [options["sinks"][head].double().view(1)]
                denominator = torch.cat([scores, *sink])
                if denominator.numel() == 0:
                    continue
                lse[token, head] = torch.logsumexp(denominator, 0)
                weights = torch.exp(scores - lse[token, head])
                out[token, head] = weights @ case.v[row, keys, head // group].double() * options["v_scale"]
    return out, lse


FEATURES = {
    "plain": {},
    "not causal": {"causal": False},
    "cap": {"logit_cap": 3.0},
    "window": {"sliding_window": 5},
    "window, not causal": {"sliding_window": 5, "causal": False},
    "sinks": {"sinks": True},
    "scales": {"k_scale": 0.5, "v_scale": 3.0},
    "everything": {"logit_cap": 3.0, "sliding_window": 7, "sinks": True, "k_scale": 0.5, "v_scale": 3.0},
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 2), (6, 1), (3, 3)])
def test_reference_is_the_formula(feature: str, q_heads: int, kv_heads: int) -> None:
    case = make_case(
        CPU, [1, 9, 0, 4, 12], [17, 9, 5, 31, 12], dtype=torch.float64, q_heads=q_heads, kv_heads=kv_heads,
        head_dim=8, v_head_dim=6, **FEATURES[feature],
    )  # fmt: skip
    out, lse = naive(case)
    torch.testing.assert_close(case.expected(torch.float64)[0], out, rtol=0, atol=1e-12)
    out_with_lse, given_lse = case.expected(torch.float64, with_lse=True)
    torch.testing.assert_close(out_with_lse, out, rtol=0, atol=1e-12)
    torch.testing.assert_close(given_lse, lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sinks", [False, True])
def test_queries_without_keys_give_zeros(sinks: bool) -> None:
    # Two queries on an empty row, and three on a row of one token: the first two sit in front of it.
    case = make_case(CPU, [2, 3], [0, 1], dtype=torch.float64, sinks=sinks)
    out, lse = naive(case)
    assert not out[:4].any()
    torch.testing.assert_close(case.expected(torch.float64)[0], out, rtol=0, atol=1e-12)
    torch.testing.assert_close(case.expected(torch.float64, with_lse=True)[1], lse, rtol=0, atol=1e-12)


def test_sliced_queries_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(CPU, [23], [40], dtype=torch.float64, logit_cap=2.0)
    whole, _ = case.expected(torch.float64)
    monkeypatch.setattr("vtensor_kernels.reference._MAX_SCORES", 4 * 40 * 5)
    torch.testing.assert_close(case.expected(torch.float64)[0], whole, rtol=0, atol=1e-12)
