"""programs.py reads what the programs print, and tells of one that fails."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import programs
import pytest
from results import Results

SAID = """4 requests: 525 prompt tokens, 345 cached (66%)
pages of 16 tokens: 20 taken from the cache whole, at most 3 shared by running requests at one time"""


def test_figures_become_rows_and_a_failure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "frontend_good.py").write_text(f"print({SAID!r})")
    (tmp_path / "frontend_bad.py").write_text("raise SystemExit('the server refused')")
    monkeypatch.setattr(programs, "EXAMPLES", tmp_path)
    flushes: list[None] = []
    server = SimpleNamespace(name="ours", url="http://127.0.0.1:9", flush=lambda: flushes.append(None))
    assert not programs.run_all(server, Results("programs", tmp_path, keep=False), tmp_path)  # type: ignore[arg-type]
    assert "frontend_bad.py: exit status 1: the server refused" in capsys.readouterr().out
    assert len(flushes) == 4
    with (tmp_path / "programs.csv").open() as file:
        rows = {row["metric"]: float(row["p50"]) for row in csv.DictReader(file) if row["case"] == "frontend_good"}
    assert rows.pop("time with Python's start") > 0
    assert rows == {"requests": 4, "prompt_tokens": 525, "cached_tokens": 345, "pages_reused": 20, "pages_shared": 3}
