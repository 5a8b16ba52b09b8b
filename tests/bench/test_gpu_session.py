"""The script for a session on a GPU, with a stand-in for Python: what fails stays alone, and everything comes back."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
STUB = """#!/bin/bash
# compare.py fails once it has something; pytest passes.
case "$*" in
  *compare.py*)
    while [ "$1" != --out ]; do shift; done
    mkdir -p "$2" && echo row > "$2/serving.csv" && echo '{}' > "$2/runs.jsonl" && echo log > "$2/server-a+b=c.log"
    echo broken >&2; exit 3 ;;
  *memory.py*|*soak.py*) echo "$*" ;;
  *pytest*) echo 28 passed ;;
esac
"""


def session(folder: Path, *steps: str, **variables: str) -> tuple[int, str]:
    stub = folder / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    out = folder / "out"
    environment = {**os.environ, "OUT": str(out), "PYTHON": str(stub), **variables}
    done = subprocess.run(
        [ROOT / "bench" / "gpu_session.sh", *steps], env=environment, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


def test_a_step_that_fails_spoils_nothing_else(tmp_path: Path) -> None:
    status, text = session(tmp_path)
    assert status == 1, "a failed step is told"
    assert "servers: exit status 3" in text and "memcheck: exit status 0" in text and "28 passed" in text
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files >= {"summary.txt", "serving.csv", "runs.jsonl", "memcheck.log", "logs.tar.gz"} and len(files) <= 8
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as logs:
        names = set(logs.getnames())
    assert {"servers.log", "servers/server-a+b=c.log"} <= names
    assert "broken" in (tmp_path / "out" / "summary.txt").read_text()


def test_steps_by_name_and_without_time(tmp_path: Path) -> None:
    status, text = session(tmp_path, "memcheck")
    assert status == 0 and "servers" not in text
    status, text = session(tmp_path, "memory", QUESTIONS="limit pair")
    assert status == 0 and "bench/memory.py --ask limit pair --budget-seconds" in text
    status, text = session(tmp_path, "soak")
    assert status == 0 and "bench/soak.py --debug --budget-seconds" in text
    status, text = session(tmp_path, "memcheck", "nothing", SESSION_SECONDS="10")
    assert status == 1 and "memcheck: left out" in text and "no step nothing" in text


def test_the_scripts_are_bash() -> None:
    for name in ("gpu_session.sh", "pack_gpu.sh"):
        subprocess.run(["bash", "-n", ROOT / "bench" / name], check=True)


def test_packing_says_what_it_lacks(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "bench" / "pack_gpu.sh"],
        env={**os.environ, "SHARED_GPU": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "name its folder: SHARED_GPU=DIR" in done.stderr
