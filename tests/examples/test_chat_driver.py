"""The chat driver on a real server: what it reports is what the server did."""

from __future__ import annotations

import csv
import json
import sys
from itertools import pairwise
from pathlib import Path

import multi_turn_chat
import pytest
from server import SGLangServer

pytestmark = pytest.mark.server


@pytest.mark.parametrize("endpoint", ["sglang", "openai"])
def test_agents_find_cached_what_was_said(
    server: SGLangServer,
    endpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.flush_cache()
    arguments = [f"--url=http://127.0.0.1:{server.port}", f"--endpoint={endpoint}", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["multi_turn_chat.py", *arguments, "--workload=agent", "--scale=0.02"])
    assert multi_turn_chat.main() == 0
    server.check_healthy()
    with (tmp_path / "requests.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24 and not any(row["error"] for row in rows)
    for session in ("0", "1"):
        mine = [row for row in rows if row["session"] == session]
        assert [row["turn"] for row in mine] == [str(turn) for turn in range(12)]
        # All that was said before is a hit, to the last computed token; as text its last word may be cut otherwise.
        for before, row in pairwise(mine):
            said = int(before["prompt_tokens"]) + int(before["output_tokens"])
            assert said - (1 if endpoint == "sglang" else 8) <= int(row["cached_tokens"]) <= said
    report = json.loads((tmp_path / "run.json").read_text())
    assert report["summary"]["cached_share"] > 0.75 and list(report["by_turn"]) == [str(n) for n in range(1, 13)]
    assert report["summary"]["driver_cpu"] < 1
    assert "cached_share" in capsys.readouterr().out and (tmp_path / "by_turn.svg").exists()
