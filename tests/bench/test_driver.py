"""bench_driver.py on the host driver, and with a GPU that is none."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from pathlib import Path

import bench_driver
import pytest

from sgl_vtensor.vmm import open_driver

KINDS = {"memory_info", "create", "map", "map again", "unmap again", "unmap", "release"}


class SlowGpu:
    """Each step takes a millisecond of the clock."""

    def __init__(self) -> None:
        self.done_at = 0.0

    def step_us(self, meanwhile: Callable[[], object]) -> float:
        done, begin = self.queue(1), time.perf_counter()
        while not done():
            meanwhile()
        return 1e6 * (time.perf_counter() - begin)

    stream_us = step_us

    def launch(self) -> None:
        return

    def queue(self, num_steps: int) -> Callable[[], bool]:
        self.done_at = max(self.done_at, time.perf_counter()) + 0.001 * num_steps
        return lambda: time.perf_counter() >= self.done_at

    def wait(self) -> None:
        while time.perf_counter() < self.done_at:
            time.sleep(0.0001)


def test_every_call_is_timed_beside_neighbours(tmp_path: Path) -> None:
    bench_driver.main(["--pages", "2", "--neighbours", "0", "1", "--calls", "5", "--out", str(tmp_path)])
    with (tmp_path / "driver.csv").open() as file:
        rows = list(csv.DictReader(file))
    for number in (0, 1):
        found = {row["metric"]: row for row in rows if row["case"] == f"pages of 2 MiB, {number} neighbours"}
        assert found.keys() == KINDS
        assert all(0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) for row in found.values())


@pytest.mark.parametrize("waits", (False, True))
def test_a_call_that_waits_for_the_gpu_is_seen(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SlowGpu()
    with open_driver("host") as driver:  # type: ignore[attr-defined]
        look = driver.memory_info
        if waits:
            monkeypatch.setattr(driver, "memory_info", lambda: gpu.wait() or look())
        times = bench_driver.measure(driver, gpu, driver.granularity, 3, 20.0)  # type: ignore[arg-type]
        assert driver.num_mappings == driver.num_handles == driver.num_reservations == 0
    behind = {kind: times[f"{kind} behind a kernel"] for kind in KINDS}
    assert all(len(values) == bench_driver.BEHIND for values in behind.values())
    assert (min(behind["memory_info"]) > 10_000) == waits
    assert all(min(values) < 10_000 for kind, values in behind.items() if kind != "memory_info")
    calls = {f"{kind}{state}" for kind in KINDS for state in ("", " while it computes", " behind a kernel")}
    steps = {f"{work}{state}" for work in ("step", "stream") for state in ("", " beside calls")}
    assert times.keys() == calls | steps | {"launch", "launch behind map"}
    assert len(times["create while it computes"]) == 3
