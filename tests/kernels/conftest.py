"""Kernel tests run on the Triton interpreter where there is no GPU, with the same bodies: see ``tests/conftest.py``."""

from __future__ import annotations

import pytest
import torch

ON_GPU = torch.cuda.is_available()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the kernels run: the interpreter, or the GPU."""
    if request.param == "cuda" and not ON_GPU:
        pytest.skip("no GPU")
    if request.param == "cpu" and ON_GPU:
        pytest.skip("kernels are compiled for the GPU in this process")
    return torch.device(request.param)
