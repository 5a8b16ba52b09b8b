"""What benchmarks share to run servers."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

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

TOLD_IN_A_CALLBACK = """
import asyncio, contextlib, os, signal, time
from servers import leave_on_sigterm, run_async

def callback():
    with contextlib.suppress(BaseException):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

async def main():
    asyncio.get_running_loop().call_soon(callback)
    await asyncio.sleep(60)
    print("still here")

leave_on_sigterm()
try:
    run_async(main())
finally:
    print("tidied up")
"""


@pytest.mark.parametrize("program", [TOLD_IN_A_DESTRUCTOR, TOLD_IN_A_CALLBACK], ids=["destructor", "callback"])
def test_told_to_end_where_exceptions_are_lost_it_ends_all_the_same(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], cwd=BENCH, capture_output=True, text=True, timeout=50)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "tidied up" in done.stdout and "still here" not in done.stdout
