"""What benchmarks share to run servers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import servers

from sgl_vtensor.cli.server import Server as Process

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


@pytest.mark.parametrize(("num_cpus", "num_servers"), [(16, 2), (32, 4), (7, 2), (8, 1), (13, 2)])
def test_servers_have_cores_of_their_own(num_cpus: int, num_servers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads of a core are never two servers'."""
    core_of = {cpu: cpu % ((num_cpus + 1) // 2) for cpu in range(num_cpus)}  # as Linux numbers them: cores, then again
    siblings = {cpu: [other for other in core_of if core_of[other] == core_of[cpu]] for cpu in core_of}
    file = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    text_of = {file.format(cpu): str(of) for cpu, of in siblings.items()}
    monkeypatch.setattr(Path, "exists", lambda path: str(path) in text_of)
    monkeypatch.setattr(Path, "read_text", lambda path: text_of[str(path)])
    shares = servers.shares_of_cpus(num_servers, core_of)
    if (max(core_of.values()) + 1 - 1) // num_servers < servers.CORES_A_SERVER:
        assert not shares
        return
    assert len(shares) == 1 + num_servers
    assert sorted(cpu for share in shares for cpu in share) == sorted(core_of)
    owner = {cpu: number for number, share in enumerate(shares) for cpu in share}
    assert all(owner[other] == owner[cpu] for cpu in core_of for other in siblings[cpu])
    cores = [{core_of[cpu] for cpu in share} for share in shares]
    assert cores[0] and len({len(of) for of in cores[1:]}) == 1
    # Where nobody says which CPUs share a core, neighbours may.
    text_of.clear()
    unknown = servers.shares_of_cpus(num_servers, core_of)
    assert all(len(share) >= servers.CORES_A_SERVER and len(share) % 2 == 0 for share in unknown[1:])
    assert sorted(cpu for share in unknown for cpu in share) == sorted(core_of)


THREADS_AND_A_CHILD = """
import multiprocessing, threading, time

def wait():
    threads = [threading.Thread(target=time.sleep, args=(60,), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(60)

multiprocessing.get_context("fork").Process(target=wait, daemon=True).start()
wait()
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU")
def test_all_threads_of_a_server_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = [sys.executable, "-c", THREADS_AND_A_CHILD]
    monkeypatch.setattr(servers, "Process", lambda command, *others: Process(program, *others))
    own = os.sched_getaffinity(0)
    first, last = min(own), max(own)
    server = servers.Server("stock-default", "none", 1, tmp_path / "log", [])
    try:
        end = time.monotonic() + 30
        while len(threads_of(server)) < 6 and time.monotonic() < end:
            time.sleep(0.05)
        for cpu in (first, last):
            server.run_on([cpu])
            assert {at for thread in threads_of(server) for at in os.sched_getaffinity(thread)} == {cpu}
            assert os.sched_getaffinity(0) == own
    finally:
        server.stop()


def threads_of(server: servers.Server) -> list[int]:
    tasks = Path("/proc").glob("[0-9]*/task/[0-9]*")
    return [int(task.name) for task in tasks if os.getpgid(int(task.parts[2])) == server.pid]
