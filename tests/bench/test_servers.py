"""What benchmarks share to run servers."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"
TOLD_IN_A_DESTRUCTOR = """
import os, signal, time
from servers import leave_on_sigterm

class Dying:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

leave_on_sigterm()
try:
    dying = Dying()
    del dying
    time.sleep(60)
    print("still here")
finally:
    print("tidied up")
"""


def test_told_to_end_where_exceptions_are_lost_it_ends_all_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TOLD_IN_A_DESTRUCTOR], cwd=BENCH, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "tidied up" in done.stdout and "still here" not in done.stdout
