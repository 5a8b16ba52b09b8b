"""The host driver, the core and the plugin under Python's debug allocator, faulthandler and warnings as errors."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from sgl_vtensor.vmm.host import HostDriver
from tests.leaks import held

ROOT = Path(__file__).parents[1]
PARTS = {
    "core": ("vmm", "core/test_pages.py", "core/test_pool.py", "core/test_rows.py", "core/test_faults.py"),
    "plugin": ("srt/test_memory.py", "srt/test_prefix.py", "srt/test_runtime.py"),
}
SANITIZED = (sys.executable, "-X", "dev", "-W", "error::ResourceWarning")
"""``-X dev``: PYTHONMALLOC=debug, faulthandler, and more."""

OVERRUN = """
import ctypes
buffer = ctypes.create_string_buffer(64)
ctypes.memset(buffer, 1, 72)
del buffer
"""


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """Side by side: neither uses more than a core."""

    def run(names: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        files = [f"tests/{name}" for name in names]
        command = [*SANITIZED, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu and not deep", *files]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)

    with ThreadPoolExecutor(len(PARTS)) as executor:
        yield {part: executor.submit(run, names) for part, names in PARTS.items()}


@pytest.mark.parametrize("part", PARTS)
def test_what_needs_no_server_runs_sanitized(
    runs: dict[str, Future[subprocess.CompletedProcess[str]]], part: str
) -> None:
    done = runs[part].result()
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert "passed" in done.stdout


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (OVERRUN, "bad trailing pad byte"),
        ("import ctypes; ctypes.string_at(8)", "Fatal Python error: Segmentation fault"),
        ("open('/dev/null'); import gc; gc.collect()", "ResourceWarning: unclosed file"),
    ],
    ids=["overrun", "fault", "unclosed"],
)
def test_a_mistake_is_seen_there(mistake: str, said: str) -> None:
    done = subprocess.run([*SANITIZED, "-c", mistake], capture_output=True, text=True, timeout=60, check=False)
    assert said in done.stderr


def test_what_is_left_behind_is_seen() -> None:
    before, end = held(), threading.Event()
    thread = threading.Thread(target=end.wait, name="forgotten")
    thread.start()
    with HostDriver(1 << 20):
        assert held() - before == {"thread forgotten": 1, "memfd of a host driver": 1}
        end.set()
        thread.join()
    assert not held() - before
