"""``sgl-vtensor replay``: what it prints, what it returns, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sgl_vtensor.cli.main import main
from sgl_vtensor.core import trace
from tests.core.simulation import simulate
from tests.core.test_mutations import ensure_stops_short

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("replay") / "trace.0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "BLOCK_INTS", 1000)
        simulate(7, 200, checks=False, trace=path)
    return path


def as_json(capsys: Capture, *arguments: str, status: int = 0) -> dict[str, Any]:
    assert main(["replay", *arguments, "--json"]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_trace_that_is_right(recorded: Path, capsys: Capture) -> None:
    assert main(["replay", str(recorded)]) == 0
    said = capsys.readouterr().out
    assert "all as recorded" in said and "trace.0: a pool of 25 pages of 3 tokens" in said
    figures = as_json(capsys, str(recorded))["recorded"]
    assert figures["broken"] is None and figures["bytes_left_out"] == 0
    for name in ("requests", "launches", "peak_pages_in_use"):
        assert f"{figures[name]:,}" in said
    assert f"{figures['driver_calls']['map']:,}" in said


def test_another_pool_beside_it(recorded: Path, capsys: Capture) -> None:
    found = as_json(capsys, str(recorded), "--page-tokens=8", "--num-rows=30")
    assert (found["other"]["page_tokens"], found["other"]["num_rows"]) == (8, 30)
    assert found["other"]["requests"] == found["recorded"]["requests"]
    assert found["other"]["pages_computed"] < found["recorded"]["pages_computed"]
    assert main(["replay", str(recorded), "--page-tokens=8"]) == 0
    assert "the other pool" in capsys.readouterr().out


def test_a_bug_is_named_with_its_event(recorded: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_stops_short(monkeypatch)
    found = as_json(capsys, str(recorded), "--page-tokens=8", status=1)
    assert list(found) == ["recorded"] and found["recorded"]["broken"]["op"] == "ENSURE"
    number = found["recorded"]["broken"]["event"]
    assert main(["replay", str(recorded), "--check-every=100"]) == 1
    assert f"BROKEN at event {number}, ENSURE [" in capsys.readouterr().out


def test_an_end_that_is_missing_is_said(recorded: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "cut"
    path.write_bytes(recorded.read_bytes()[:-3])
    assert main(["replay", str(path)]) == 0
    assert "was not written whole" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none"], "cannot be read"),
        (["damaged"], "is damaged in the block at byte"),
        (["text"], "not a trace"),
        (["good", "--page-tokens=0"], "--page-tokens 0 is too few"),
        (["good", "--num-rows=-1"], "--num-rows -1 is too few"),
        (["good", "--num-rows=2"], "--num-rows 2 is too few for"),
        (["good", "--check-every=0"], "--check-every 0 is too few"),
        (["good", "--page-tokens=2000000"], "page_tokens must be between"),
    ],
)
def test_what_cannot_be_replayed(
    recorded: Path, tmp_path: Path, capsys: Capture, arguments: list[str], said: str
) -> None:
    whole = recorded.read_bytes()
    (tmp_path / "good").write_bytes(whole)
    (tmp_path / "damaged").write_bytes(whole[:-9] + b"x" + whole[-8:])
    (tmp_path / "text").write_text("a log\n")
    assert main(["replay", str(tmp_path / arguments[0]), *arguments[1:]]) == 1
    assert said in capsys.readouterr().err
