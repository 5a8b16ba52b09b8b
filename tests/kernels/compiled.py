"""What the compiler makes of the kernels, without a GPU; ``test_compiled.py`` runs this without the interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from compile_only import compile_only
from compile_table import MODELS, launches, on_meta, resident, views
from vtensor_kernels import prefill_attention


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
