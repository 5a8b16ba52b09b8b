"""bench_replay.py on a trace of the simulation."""

from __future__ import annotations

import csv
from pathlib import Path

import bench_replay
import pytest

from tests.core.simulation import simulate


def test_larger_pages_take_fewer_calls(tmp_path: Path) -> None:
    trace = tmp_path / "trace.0"
    simulate(7, 200, checks=False, trace=trace)
    assert bench_replay.main([str(trace), "--page-tokens", "1", "3", "6", f"--out={tmp_path}"]) == 0
    with (tmp_path / "replay.csv").open() as file:
        rows = list(csv.DictReader(file))
    calls = {row["impl"]: float(row["p50"]) for row in rows if row["metric"] == "driver calls"}
    assert list(calls) == ["page of 1 tokens", "page of 3 tokens", "page of 6 tokens"]
    assert calls["page of 1 tokens"] > calls["page of 3 tokens"] > calls["page of 6 tokens"] > 0
    assert {row["bench"] for row in rows} == {"replay"} and {row["case"] for row in rows} == {"trace"}


def test_what_is_no_trace_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("no trace")
    assert bench_replay.main([str(tmp_path / "text"), f"--out={tmp_path}"]) == 1
    assert "not a trace" in capsys.readouterr().out
    assert not (tmp_path / "replay.csv").exists()
