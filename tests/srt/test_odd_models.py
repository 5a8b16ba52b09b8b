"""Models of odd shapes: few heads, dims that are no power of two, tokens that do not divide a granule."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, Start
from server import SGLangServer
from vtensor_kernels import reference_attention

from sgl_vtensor.cli.smollm2 import smollm2
from sgl_vtensor.cli.tiny_model import TinyLlama
from sgl_vtensor.core.layout import plan_layout
from sgl_vtensor.core.pages import Pages
from sgl_vtensor.core.pool import VTensorPool
from sgl_vtensor.vmm.host import HostDriver

ODDEST = TinyLlama(layers=1, heads=9, kv_heads=3, head_dim=80, hidden=45)


@pytest.mark.parametrize("page_tokens", [None, 1, 7, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize(
    ("layers", "kv_heads", "head_dim", "v_head_dim"),
    [(1, 1, 80, 80), (1, 3, 96, 96), (2, 1, 64, 64), (5, 3, 80, 80), (3, 1, 96, 40), (1, 3, 8, 8)],
)
def test_attention_over_rows_is_attention(
    layers: int, kv_heads: int, head_dim: int, v_head_dim: int, dtype: torch.dtype, page_tokens: int | None
) -> None:
    """What was written at homes, over two requests with a common page, is what attention over rows computes with."""
    with HostDriver(capacity_bytes=64 << 20) as driver:
        layout = plan_layout(
            num_layers=layers,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            itemsize=dtype.itemsize,
            granule_bytes=driver.granularity,
            page_tokens=page_tokens,
        )
        size = layout.page_tokens
        lens = [2 * size + 1, size + max(1, size // 2)]
        pool = VTensorPool(Pages(driver, layout, 8), num_slots=2, max_len_tokens=3 * size)
        pool.open(1, [], lens[0])
        assert pool.grow([1], [lens[0]])
        pool.open(2, pool.pages_of(1, 0, 1), lens[1])
        assert pool.grow([2], [lens[1]])
        pool.ensure([1, 2])
        pool.pages.tensor()[: layout.page_bytes].fill_(0)
        torch.manual_seed(1)
        for layer in range(layers):
            home_k, home_v = pool.pages.home_views(layer, dtype)
            row_k, row_v = pool.row_views(layer, dtype)
            for slot, num_tokens in ((1, lens[0]), (2, lens[1])):
                at = torch.arange(num_tokens)
                slots = torch.from_numpy(pool.wanted[slot].astype(np.int64))[at // size] * size + at % size
                k, v = torch.randn(num_tokens, kv_heads, head_dim), torch.randn(num_tokens, kv_heads, v_head_dim)
                home_k[slots], home_v[slots] = k.to(dtype), v.to(dtype)
                k, v = k.to(dtype).float(), v.to(dtype).float()
                q = torch.randn(2, 2 * kv_heads, head_dim)
                out = torch.empty(2, 2 * kv_heads, v_head_dim)
                row = torch.tensor([int(pool.row_of_slot[slot])], dtype=torch.int32)
                indptr, kv_lens = (torch.tensor(values, dtype=torch.int32) for values in ([0, 2], [num_tokens]))
                reference_attention(q, row_k, row_v, out, row, indptr, kv_lens, 2, sm_scale=head_dim**-0.5)
                scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, dim=1)) * head_dim**-0.5
                scores[:, 0, num_tokens - 1] = float("-inf")
                expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(2, dim=1))
                assert torch.allclose(out, expected, atol=1e-5), (layer, slot)
        pool.shutdown()


@pytest.mark.server
def test_the_oddest_model_answers_as_transformers_does(start: Start, tmp_path: Path) -> None:
    """1 920 bytes a token over pages of 7: prefixes shared in and between pages, in chunks of no power of two."""
    from transformers import AutoModelForCausalLM

    folder = ODDEST.write(tmp_path / "oddest", tokenizer=smollm2())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dice = random.Random(4)
    beginning = [dice.randrange(3, VOCABULARY) for _ in range(60)]
    prompts = [[*beginning[:length], dice.randrange(3, VOCABULARY)] for length in (0, 1, 5, 6, 7, 13, 14, 48, 60)]
    flags = ("--enable-vtensor", "--vtensor-page-tokens=7", "--chunked-prefill-size=21", "--max-total-tokens=1001")
    with start(*flags, "--vtensor-debug", model=folder) as server:
        for prompt in [*prompts, *prompts[::-2]]:
            check_greedy(server, model, prompt)
        figures = server.vtensor()
        assert (figures["page_tokens"], figures["token_stride_bytes"]) == (7, 4096)
        assert figures["tokens_hit"] > 150 and figures["tokens_copied"] > 10
        server.check_healthy()


def check_greedy(server: SGLangServer, model: torch.nn.Module, prompt: list[int], num_new: int = 16) -> None:
    """Each token is the likeliest after those before it, or as good as."""
    answer = list(server.generate(prompt, num_new).output_ids)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    chosen = logits[torch.arange(num_new), torch.tensor(answer)]
    assert (logits.max(dim=-1).values - chosen < 1e-3).all(), (len(prompt), logits.max(dim=-1).values - chosen)
