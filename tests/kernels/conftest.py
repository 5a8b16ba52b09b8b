"""Kernel tests run on the Triton interpreter where there is no GPU, with the same bodies."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

ON_GPU = torch.cuda.is_available()
sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))

if not ON_GPU:
    # Triton looks at the variable when it and the kernels are imported. Taken back at once: servers that other
    # tests start as processes must not inherit it.
    os.environ["TRITON_INTERPRET"] = "1"
import triton.experimental.gluon  # noqa: E402, F401  (Triton would import it at the first launch)
import vtensor_kernels  # noqa: E402, F401

os.environ.pop("TRITON_INTERPRET", None)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the kernels run: the interpreter, or the GPU."""
    if request.param == "cuda" and not ON_GPU:
        pytest.skip("no GPU")
    if request.param == "cpu" and ON_GPU:
        pytest.skip("kernels are compiled for the GPU in this process")
    return torch.device(request.param)
