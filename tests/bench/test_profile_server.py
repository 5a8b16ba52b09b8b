"""profile_server.py: what it makes of py-spy's stacks."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import profile_server
import pytest

MAIN = 'process 7:"/env/bin/python -m sglang.launch_server --port 1 --out a;b"'.replace(";", ",")
SCHEDULER = f'{MAIN};process 8:"sglang::scheduler"'


def test_samples_are_counted_by_process_and_function(tmp_path: Path) -> None:
    stacks = tmp_path / "stacks"
    stacks.write_text(
        f"{MAIN};serve (http.py:1);parse (json.py:7) 3\n"
        f"{SCHEDULER};loop (scheduler.py:10);match (radix.py:3);match (radix.py:9) 5\n"
        f"{SCHEDULER};loop (scheduler.py:12) 2\n"
    )
    assert profile_server.functions_of(stacks) == {
        "http: serve (http.py)": 3,
        "http: parse (json.py)": 3,
        "scheduler: loop (scheduler.py)": 7,
        "scheduler: match (radix.py)": 5,
    }


def test_the_table_has_what_takes_longer_than_in_the_first_server() -> None:
    first = Counter({"scheduler: a": 3.0, "scheduler: b": 1.0})  # type: ignore[dict-item]
    times = Counter({"scheduler: a": 2.5, "scheduler: c": 1.5})  # type: ignore[dict-item]
    lines = profile_server.table("second", times, first)
    assert lines[1].split() == ["2.500", "3.000", "scheduler:", "a"]
    longer = lines[lines.index("second: what takes longer than in the first server") + 1]
    assert longer.split() == ["+1.500", "1.500", "scheduler:", "c"]


def test_a_workload_has_a_rate_and_the_cache_a_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PY_SPY", sys.executable)
    command = ["--model", str(tmp_path), "--out", str(tmp_path)]
    options = profile_server.arguments([*command, "--workload", "gsp~20", "--state", "cold"])
    assert (options.workload, profile_server.AGAIN[options.state]) == ("gsp~20", "cold")
    for wrong in (["--workload", "gsp~0"], ["--state", "hot"]):
        with pytest.raises(SystemExit):
            profile_server.arguments([*command, *wrong])


def test_without_py_spy_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PY_SPY", "/nowhere/py-spy")
    with pytest.raises(SystemExit):
        profile_server.arguments(["--model", "x"])
    assert "pip install py-spy" in capsys.readouterr().err
