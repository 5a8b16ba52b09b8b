"""What a test needs is told by where it lies and how it is called, so that ``make test`` never meets a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.is_relative_to(ROOT):
            continue
        if item.path.relative_to(ROOT).parts[0] == "gpu":
            item.add_marker(pytest.mark.gpu)
        if "deep" in item.name.split("[")[0].split("_") and item.get_closest_marker("deep") is None:
            raise pytest.UsageError(f"{item.nodeid} calls itself deep: mark it so, or make test would run it")
