"""What a test needs is told by where it lies and how it is called, so that ``make test`` never meets a wrong one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent / "kernels"))

if not torch.cuda.is_available():
    # Triton looks at the variable when it and a kernel are imported, so this must come before any test module, which
    # may import Triton by way of SGLang. Taken back at once: servers that tests start must not inherit it.
    os.environ["TRITON_INTERPRET"] = "1"
import triton.experimental.gluon  # noqa: E402, F401  (Triton would import it at the first launch)
import vtensor_kernels  # noqa: E402, F401

os.environ.pop("TRITON_INTERPRET", None)

from tests.leaks import held  # noqa: E402


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test of the driver, the core or the plugin leaves a thread running, or a host driver open that it opened."""
    before = held()
    yield
    if request.path.parent.name in ("vmm", "core", "srt"):
        left = held() - before
        assert not left, f"left behind: {dict(left)}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.is_relative_to(ROOT):
            continue
        if item.path.relative_to(ROOT).parts[0] == "gpu":
            item.add_marker(pytest.mark.gpu)
        if "deep" in item.name.split("[")[0].split("_") and item.get_closest_marker("deep") is None:
            raise pytest.UsageError(f"{item.nodeid} calls itself deep: mark it so, or make test would run it")
