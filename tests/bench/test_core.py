"""bench_core.py on a small server: every cost that it tells is measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"
SMALL = """
import sys, bench_core
bench_core.SIZES = (bench_core.Size(rows=64, pages=4000, running=8, context_tokens=32768, leaves=50),)
sys.argv[1:] = ["--steps", "11", "--trace", "--no-record"]
bench_core.main()
"""


def test_all_costs_are_told() -> None:
    """In a process of its own: it sets what SGLang's modules look up."""
    done = subprocess.run([sys.executable, "-c", SMALL], cwd=BENCH, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    told = {line.split()[6] for line in done.stdout.splitlines() if line.startswith("rows=64 ")}
    assert told >= {
        "decode_step", "launch", "groups", "map_ahead", "free", "admit", "look", "figures", "evict", "hook",
        "count", "picture", "metrics", "trace",
    }, done.stdout  # fmt: skip
