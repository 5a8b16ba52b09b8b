"""Kernels are compiled for GPUs that are not here, in another process: Triton interprets them in this one."""

import os
import subprocess
import sys
from pathlib import Path


def test_kernels_compile_for_every_gpu_and_a_start_makes_all_that_serving_needs() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    checks = Path(__file__).with_name("compiled.py")
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-q", checks]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
